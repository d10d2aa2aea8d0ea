"""The Python standard library's own sources: text that every machine has."""

import hashlib
import sysconfig
from collections.abc import Generator
from pathlib import Path

from examples.flax_llama.data.files import Document, reading
from examples.flax_llama.errors import UserError

# Tests and generated tables are most of the bytes and teach little; the rest is not the library.
_SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}


def find_sources(root: Path | None = None) -> list[Path]:
    """The standard library's modules, sorted, without tests and generated tables.

    Args:
        root: Where to look; this Python's standard library by default.

    Raises:
        UserError: If this Python comes without sources.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in root.rglob("*.py")
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
        and not path.name.startswith("_sysconfigdata")
    ]
    if not files:
        raise UserError(
            f"this Python has no sources of its standard library in {root}; "
            "use the data source 'text' with a path."
        )
    return sorted(files)


def read_source(path: Path) -> Generator[Document]:
    """One module as one document. Its key is its path, so that a module is never split."""
    with reading(path):
        text = path.read_text(encoding="utf-8", errors="replace")
    if text.strip():
        yield Document("/".join(path.parts[-2:]), text)


def content_hash(files: list[Path]) -> str:
    """A hash of all of ``files``."""
    digest = hashlib.blake2b(digest_size=8)
    for path in files:
        with reading(path):
            digest.update(hashlib.blake2b(path.read_bytes()).digest())
    return digest.hexdigest()
