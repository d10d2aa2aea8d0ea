"""Flat arrays of token ids: ``.npy``, or raw little-endian uint16."""

from pathlib import Path

import numpy as np

from examples.flax_llama.data.cache import cached
from examples.flax_llama.data.config import LARGEST_VOCAB, DataConfig
from examples.flax_llama.data.corpus import Corpus, hold_out, windows
from examples.flax_llama.data.files import (
    COMPRESSIONS,
    file_identity,
    plain_suffix,
    read_chunks,
    reading,
)
from examples.flax_llama.data.text import map_array
from examples.flax_llama.errors import UserError

_RAW = (".u16", ".bin")
_ROUND_VOCAB = 64  # aligned rows in the LM head


def prepare_tokens(config: DataConfig) -> Corpus:
    """Maps the arrays at ``config.path`` and ``config.validation_path``.

    Compressed ones are unpacked into the cache first. Without a validation array the last sequences
    are held out.

    Raises:
        UserError: If an array cannot be read, has the wrong dtype or shape, is too short, or has an
            id outside the vocabulary.
    """
    assert config.path is not None  # DataConfig checks
    length = config.sequence_length
    ids = _map_ids(config.path, config.cache_dir)
    largest = _check_ids(config.path, ids, config.vocab_size)
    train, held = windows(ids, length), windows(ids[:0], length)
    fraction: float | None = config.validation_fraction
    if config.validation_path:
        held_ids = _map_ids(config.validation_path, config.cache_dir)
        largest = max(largest, _check_ids(config.validation_path, held_ids, config.vocab_size))
        held, fraction = windows(held_ids, length), None
    train, held = hold_out(train, held, fraction, str(config.path))
    held = held.rows(0, config.validation_limit or len(held))
    vocab_size = config.vocab_size or -(-(largest + 1) // _ROUND_VOCAB) * _ROUND_VOCAB
    return Corpus(
        description=(
            f"{config.path}: {len(train):,} + {len(held):,} sequences of {length} tokens to train "
            f"and validate on, vocabulary {vocab_size:,}"
        ),
        fingerprint=train.fingerprint(),
        validation_fingerprint=held.fingerprint(),
        vocab_size=vocab_size,
        sequence_length=length,
        train=train,
        validation=held,
    )


def _map_ids(path: Path, cache_dir: Path) -> np.ndarray:
    suffix = plain_suffix(path)
    if suffix not in (".npy", *_RAW):
        raise UserError(
            f"{path}: token ids are read from .npy, or raw uint16 as {' or '.join(_RAW)}, plain or "
            f"compressed as {', '.join(COMPRESSIONS)}."
        )
    if not path.exists():
        raise UserError(f"data path {path} does not exist.")
    plain = path
    if path.suffix in COMPRESSIONS:

        def unpack(folder: Path) -> None:
            with (folder / f"ids{suffix}").open("wb") as target:
                for chunk in read_chunks(path):
                    target.write(chunk)

        plain = cached(cache_dir, f"tokens-{file_identity(path)}", unpack) / f"ids{suffix}"
    with reading(path):
        if suffix in _RAW:
            if plain.stat().st_size % 2:
                raise UserError(f"{path}: an odd number of bytes cannot be uint16 ids.")
            return map_array(plain, np.dtype("<u2"))
        try:
            ids = np.load(plain, mmap_mode="r")
        except OSError:
            raise
        except Exception as error:  # a damaged header is read as Python, a zip file as one
            raise UserError(f"{path}: not a .npy array of ids ({error}).") from error
    return np.asarray(ids)


def _check_ids(path: Path, ids: np.ndarray, vocab_size: int | None) -> int:
    """Returns the largest id."""
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UserError(
            f"{path}: expected a flat array of integers, got {ids.dtype} of shape {ids.shape}."
        )
    if not len(ids):
        raise UserError(f"{path}: the array is empty.")
    smallest, largest = int(ids.min()), int(ids.max())
    if smallest < 0:
        raise UserError(f"{path}: token ids must not be negative, found {smallest}.")
    if largest >= LARGEST_VOCAB:
        raise UserError(
            f"{path}: token ids must be less than 2**31 - 1, found {largest}; use the ids of a "
            "tokenizer."
        )
    if vocab_size and largest >= vocab_size:
        raise UserError(
            f"{path}: found token id {largest}, but --vocab-size is {vocab_size}; raise it to "
            f"at least {largest + 1} or use the tokenizer that the ids came from."
        )
    return largest
