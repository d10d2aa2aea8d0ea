"""A corpus: sequences to train on and sequences to validate on."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from examples.flax_llama.errors import UserError

if TYPE_CHECKING:
    import grain

Example = dict[str, np.ndarray]
"""``tokens (..., T)``, int32, and ``mask (..., T)``, bool, set where a token is real."""


_HASHED_SEQUENCES = 4096  # at once: mapped files may be larger than the memory


class Sequences:
    """Random access to sequences of one length: what Grain calls a data source.

    Args:
        tokens: ``(N, T)`` integers, usually mapped from a file.
        lengths: ``(N,)``, how many tokens of each row are real; all of them by default.
    """

    def __init__(self, tokens: np.ndarray, lengths: np.ndarray | None = None) -> None:
        self._tokens = tokens
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> Example:
        tokens = self._tokens[index].astype(np.int32)
        real = len(tokens) if self._lengths is None else self._lengths[index]
        return {"tokens": tokens, "mask": np.arange(len(tokens)) < real}

    def __repr__(self) -> str:
        return f"Sequences(shape={self._tokens.shape})"

    def fingerprint(self) -> str:
        """A hash of every token and every length, whatever integers they are stored as."""
        digest = hashlib.blake2b(str(self._tokens.shape).encode(), digest_size=8)
        for array in (self._tokens, self._lengths):
            if array is None:
                continue
            for start in range(0, len(array), _HASHED_SEQUENCES):
                digest.update(array[start : start + _HASHED_SEQUENCES].astype("<i4").tobytes())
        return digest.hexdigest()

    def rows(self, start: int, stop: int) -> "Sequences":
        """The sequences ``start`` to ``stop``."""
        lengths = None if self._lengths is None else self._lengths[start:stop]
        return Sequences(self._tokens[start:stop], lengths)


@dataclasses.dataclass(frozen=True)
class Stream:
    """Documents that can only be read in order.

    Args:
        documents: Returns the stream of texts, given a seed for its order and the number of epochs
            (``None`` for no end).
        encode: Makes one batch ``(B, T)`` of B texts.
    """

    documents: "Callable[[int, int | None], grain.IterDataset[str]]"
    encode: Callable[[Sequence[str]], Example]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text ready to train on.

    Args:
        description: One line for the person: what it is, and how much.
        fingerprint: Tells training data apart; the same on every machine that has the same data,
            wherever it is kept.
        validation_fingerprint: Likewise for the validation data.
        vocab_size: Every token id is below this.
        sequence_length: Tokens in a sequence, T.
        train: The training sequences.
        validation: The validation sequences, none of them among the training ones.
        bos_id: Id that starts a document, if there is one.
        eos_id: Id that ends a document, if there is one.
        pad_id: Id that fills up short sequences; always masked.
    """

    description: str
    fingerprint: str
    validation_fingerprint: str
    vocab_size: int
    sequence_length: int
    train: Sequences | Stream
    validation: Sequences | Stream
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int = 0


def windows(tokens: np.ndarray, length: int) -> Sequences:
    """Cuts ``tokens (N,)`` into ``N // length`` sequences, without overlap; drops the rest."""
    count = len(tokens) // length
    return Sequences(tokens[: count * length].reshape(count, length))


def hold_out(
    train: Sequences, validation: Sequences, fraction: float | None, origin: str
) -> tuple[Sequences, Sequences]:
    """Where all sequences are on one side, puts the last ``fraction`` of them up for validation.

    Args:
        train: Sequences to train on, perhaps none.
        validation: Sequences to validate on, perhaps none.
        fraction: Share to hold out; ``None`` moves nothing and only checks.
        origin: Where the text is from, for the error.

    Returns:
        The sequences to train on and those to validate on.

    Raises:
        UserError: If ``train`` and ``validation`` cannot both have a sequence.
    """
    if fraction is not None:
        if not len(train):
            train, validation = validation, train
        if not len(validation) and len(train) > 1:
            cut = max(1, len(train) - max(1, round(fraction * len(train))))
            train, validation = train.rows(0, cut), train.rows(cut, len(train))
    if not len(train) or not len(validation):
        raise UserError(
            f"{origin}: too little text, {len(train)} sequences to train on and {len(validation)} "
            "to validate on; use more text or a shorter sequence_length."
        )
    return train, validation
