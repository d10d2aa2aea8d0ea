"""Text files and the standard library: tokenised once, kept in the cache, mapped from there."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from examples.flax_llama.data.cache import cached
from examples.flax_llama.data.config import DataConfig
from examples.flax_llama.data.corpus import Corpus, Sequences, hold_out, windows
from examples.flax_llama.data.files import Document
from examples.flax_llama.data.tokenizer import Encoder, load_tokenizer, train_bpe

_FORMAT = 1  # of the cached files; raise it when they change
_BPE_CHARACTERS = 8_000_000  # a BPE of a few thousand merges learns nothing from more
_DEFAULT_VOCAB = 4096
_BATCH = 256  # documents tokenised at once


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """Text files and what identifies their content.

    Args:
        files: The files.
        read: Yields the documents of one file.
        identity: Changes whenever the content does.
    """

    files: Sequence[Path]
    read: Callable[[Path], Generator[Document]]
    identity: str

    def documents(self) -> Iterator[Document]:
        """All documents."""
        return itertools.chain.from_iterable(self.read(path) for path in self.files)


def prepare_text(
    config: DataConfig, origin: str, train: TextFiles, validation: TextFiles | None
) -> Corpus:
    """Tokenises ``train`` and ``validation``, unless the cache has them.

    Without ``validation``, documents are held out by a hash of their key, so that a document stays
    on its side when others come and go, and copies of it stay together; if that leaves nothing to
    validate on, the last sequences are held out.

    Raises:
        UserError: If the text cannot be read or is too little.
    """
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
    key = json.dumps(
        [
            _FORMAT,
            train.identity,
            validation.identity if validation else config.validation_fraction,
            tokenizer.to_str() if tokenizer else None,
            config.vocab_size,
            config.sequence_length if config.documents == "pad" else None,
        ]
    )
    name = f"{config.source}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"
    length = config.sequence_length if config.documents == "pad" else None

    def build(folder: Path) -> None:
        fraction = 0.0 if validation else config.validation_fraction
        bpe = tokenizer or train_bpe(_sample(train, fraction), config.vocab_size or _DEFAULT_VOCAB)
        # Not its own save(), whose errors are not OSErrors.
        (folder / "tokenizer.json").write_text(bpe.to_str(), encoding="utf-8")
        encoder = Encoder(bpe, config.vocab_size if tokenizer else None, length)
        with _Writer(folder, "train", encoder) as kept, _Writer(folder, "val", encoder) as held:
            for document in train.documents():
                (held if _held_out(document, fraction) else kept).add(document)
            for document in validation.documents() if validation else ():
                held.add(document)

    folder = cached(config.cache_dir, name, build)
    encoder = Encoder(
        load_tokenizer(str(folder / "tokenizer.json")),
        config.vocab_size if tokenizer else None,
        length,
    )
    kept, held = hold_out(
        _read(folder, "train", encoder, config),
        _read(folder, "val", encoder, config),
        None if validation else config.validation_fraction,
        origin,
    )
    held = held.rows(0, config.validation_limit or len(held))
    return Corpus(
        description=(
            f"{origin}: {len(kept):,} + {len(held):,} sequences of {config.sequence_length} "
            f"tokens to train and validate on, vocabulary {encoder.vocab_size:,}"
        ),
        fingerprint=kept.fingerprint(),
        validation_fingerprint=held.fingerprint(),
        vocab_size=encoder.vocab_size,
        sequence_length=config.sequence_length,
        train=kept,
        validation=held,
        bos_id=encoder.bos_id,
        eos_id=encoder.eos_id,
        pad_id=encoder.pad_id,
    )


def _held_out(document: Document, fraction: float) -> bool:
    digest = hashlib.blake2b(document.key.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def _sample(text: TextFiles, held_out: float) -> Iterator[str]:
    """Up to ``_BPE_CHARACTERS`` of the training text, an even share from each file."""
    taken = 0
    for number, path in enumerate(text.files, start=1):
        allowed = _BPE_CHARACTERS * number // len(text.files)
        with contextlib.closing(text.read(path)) as documents:
            for document in documents:
                if taken >= allowed:
                    break
                if not _held_out(document, held_out):
                    taken += len(document.text)
                    yield document.text


class _Writer:
    """Appends documents to ``{name}.ids`` and, where they are padded, to ``{name}.lengths``."""

    def __init__(self, folder: Path, name: str, encoder: Encoder) -> None:
        self._encoder = encoder
        self._waiting: list[Document] = []
        self._files = contextlib.ExitStack()
        self._ids: IO[bytes] = self._files.enter_context((folder / f"{name}.ids").open("wb"))
        self._lengths: IO[bytes] = self._files.enter_context(
            (folder / f"{name}.lengths").open("wb")
        )

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: object) -> None:
        with self._files:
            if error[0] is None:
                self._flush()

    def add(self, document: Document) -> None:
        """Appends one document; pieces after the first are of no use where documents are cut."""
        if document.starts or not self._encoder.length:
            self._waiting.append(document)
        if len(self._waiting) == _BATCH:
            self._flush()

    def _flush(self) -> None:
        texts = [document.text for document in self._waiting]
        if texts and self._encoder.length:
            rows = self._encoder.padded(texts)
            self._ids.write(rows["tokens"].astype(self._encoder.dtype).tobytes())
            self._lengths.write(rows["mask"].sum(axis=1, dtype="<u4").tobytes())
        elif texts:
            ids = self._encoder.flat(texts, [document.starts for document in self._waiting])
            self._ids.write(ids.astype(self._encoder.dtype).tobytes())
        self._waiting.clear()


def _read(folder: Path, name: str, encoder: Encoder, config: DataConfig) -> Sequences:
    ids = map_array(folder / f"{name}.ids", encoder.dtype)
    if not encoder.length:
        return windows(ids, config.sequence_length)
    lengths = map_array(folder / f"{name}.lengths", np.dtype("<u4"))
    return Sequences(ids.reshape(-1, encoder.length), lengths)


def map_array(path: Path, dtype: np.dtype) -> np.ndarray:
    """Maps the raw array at ``path`` into memory, which cannot be done to an empty file."""
    empty = not path.stat().st_size
    return np.zeros(0, dtype) if empty else np.asarray(np.memmap(path, dtype, mode="r"))
