"""Reading documents and bytes from files, plain or compressed."""

import contextlib
import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast

import zstandard

from examples.flax_llama.errors import UserError

COMPRESSIONS = (".gz", ".xz", ".zst")
_JSON_SUFFIXES = (".jsonl", ".json")  # C4 calls JSON lines .json
_TEXT_SUFFIXES = (".txt", ".jsonl")
_BLOCK = 1 << 16  # characters of a .txt file that are tokenised at once


class Document(NamedTuple):
    """A text, or a piece of one.

    Args:
        key: Decides between training and validation.
        text: The text.
        starts: Whether the text begins here, rather than going on from the previous piece.
    """

    key: str
    text: str
    starts: bool = True


def plain_suffix(path: Path) -> str:
    """The suffix of ``path`` without compression.

    Example:
        >>> plain_suffix(Path("corpus.jsonl.zst"))
        '.jsonl'
    """
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns every way in which reading ``path`` can fail into a ``UserError`` that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}).") from error
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{path}: damaged or cut short ({error}); fetch it again.") from error
    except OSError as error:
        name = error.filename or path
        raise UserError(f"cannot read {name}: {error.strerror or error}.") from error


def open_bytes(path: Path) -> IO[bytes]:
    """Opens ``path`` for reading, decompressing by its suffix."""
    if path.suffix == ".gz":
        return cast("IO[bytes]", gzip.open(path))
    if path.suffix == ".xz":
        return lzma.open(path)
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdReader(path.open("rb")))
    return path.open("rb")


def read_chunks(path: Path) -> Iterator[bytes]:
    """The content of ``path``, decompressed, a mebibyte at a time."""
    with reading(path), open_bytes(path) as file:
        while chunk := file.read(1 << 20):
            yield chunk


def file_identity(path: Path) -> str:
    """A hash of path, size and time of change: cheap, where the content may be large."""
    with reading(path):
        stat = path.stat()
    key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()


def gzip_checksum(path: Path) -> str:
    """The size of a .gz file and its last bytes, which are a checksum of its content."""
    with reading(path), path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - 8))
        return f"{size} {file.read().hex()}"


class _ZstdReader(io.RawIOBase):
    """Reads zstd frames; a cut file raises ``EOFError``, where zstandard's own reader just ends."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._started = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        while not self._ready:
            rest = self._frame.unused_data if self._frame.eof else b""
            data = rest or self._file.read(1 << 17)
            if not data:
                if self._started and not self._frame.eof:
                    raise EOFError("the last frame is not complete")
                return 0
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._started = True
            self._ready = self._frame.decompress(data)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def find_text(path: Path) -> list[Path]:
    """The text files in the folder ``path`` and below it, sorted, or ``path`` itself.

    Raises:
        UserError: If there is nothing at ``path``, or no text in it.
    """
    with reading(path):
        found = sorted(_below(path)) if path.is_dir() else [path]
        files = [file for file in found if plain_suffix(file) in _TEXT_SUFFIXES]
    if not path.exists():
        raise UserError(f"data path {path} does not exist.")
    if not files:
        raise UserError(
            f"no text in {path}: expected .txt or .jsonl files, plain or compressed as "
            f"{', '.join(COMPRESSIONS)}."
        )
    return files


def _below(folder: Path) -> Iterator[Path]:
    # Not rglob, which is silent about folders that may not be read.
    for path in folder.iterdir():
        yield from _below(path) if path.is_dir() and not path.is_symlink() else [path]


def read_documents(path: Path, field: str) -> Generator[Document]:
    """The documents of one file of plain text or JSON lines; blank ones are left out.

    Raises:
        UserError: If the file cannot be read, or a line is not a JSON object with a text ``field``.
    """
    blocks = _jsonl(path, field) if plain_suffix(path) in _JSON_SUFFIXES else _txt(path)
    with reading(path):
        yield from (document for document in blocks if document.text.strip())


def _txt(path: Path) -> Generator[Document]:
    block = 0
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8") as file:
        while lines := file.readlines(_BLOCK):
            text = "".join(lines)
            for start in range(0, len(text), _BLOCK):  # one line may be the whole file
                yield Document(f"{path.name}:{block}", text[start : start + _BLOCK], not block)
                block += 1


def _jsonl(path: Path, field: str) -> Generator[Document]:
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: not valid JSON ({error}).") from error
            text = record.get(field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                have = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise UserError(
                    f"{path}, line {number}: no text in field {field!r} (the line has: {have}); "
                    "correct the line or set --text-field."
                )
            if not _is_unicode(text):
                raise UserError(
                    f"{path}, line {number}: half of a surrogate pair in field {field!r} is not "
                    "text; correct the line."
                )
            yield Document(text, text)


def _is_unicode(text: str) -> bool:
    """Whether ``text`` can be encoded: JSON can spell out surrogates that stand alone."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
