"""Folders of prepared data that are either whole or not there."""

import contextlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from examples.flax_llama.errors import UserError

_MANIFEST = "manifest.json"
_ABANDONED_SECONDS = 24 * 3600


def cached(cache_dir: Path, name: str, build: Callable[[Path], None]) -> Path:
    """Returns the folder ``name`` in ``cache_dir``, made by ``build`` unless it is there and whole.

    ``build`` fills a scratch folder, which then gets its name in one step: nobody ever sees half of
    it, and of several processes that build at once the first wins. Sizes and checksums are compared
    each time, so that a damaged folder is made again.

    Args:
        cache_dir: Where the cache lives; ``~`` is expanded.
        name: Name of the folder. Must change with everything that the content depends on.
        build: Fills the empty folder that it is given.

    Raises:
        UserError: If the cache cannot be written, and whatever ``build`` raises.
    """
    cache_dir = cache_dir.expanduser()
    folder = cache_dir / name
    try:
        if _is_whole(folder):
            return folder
        cache_dir.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(cache_dir)
        scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=cache_dir))
        try:
            build(scratch)
            _write_manifest(scratch)
            _publish(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot use the data cache {folder}: {error.strerror or error}; "
            "choose another --cache-dir or make room in it."
        ) from error
    return folder


def _checksum(path: Path) -> list[int]:
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]


def _write_manifest(folder: Path) -> None:
    checksums = {path.name: _checksum(path) for path in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps(checksums, indent=2))


def _is_whole(folder: Path) -> bool:
    try:
        checksums = json.loads((folder / _MANIFEST).read_text())
        return all(_checksum(folder / name) == expected for name, expected in checksums.items())
    except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError):
        return False


def _publish(scratch: Path, folder: Path) -> None:
    try:
        os.rename(scratch, folder)
    except OSError:
        if _is_whole(folder):  # another process was faster
            return
        damaged = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
        os.replace(folder, damaged / "damaged")
        os.rename(scratch, folder)
        shutil.rmtree(damaged, ignore_errors=True)


def _remove_abandoned(cache_dir: Path) -> None:
    """Removes scratch folders of processes that were killed."""
    for scratch in cache_dir.glob(".building-*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - scratch.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(scratch, ignore_errors=True)
