"""Batches for the training loop, from Grain, so that the position in the data can be saved.

Grain is imported inside the functions because it imports JAX, for which ``--help`` should not wait.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from examples.flax_llama.data.corpus import Corpus, Example, Sequences, Stream
from examples.flax_llama.errors import UserError

if TYPE_CHECKING:
    import grain

Rows = Sequence[int]

_SHUFFLE_WINDOW = 1024  # documents of a stream shuffled together, as many as GaLore's (1000)


def train_batches(
    corpus: Corpus,
    batch_size: int,
    seed: int = 0,
    num_epochs: int | None = None,
    workers: int = 0,
    rows: Rows | None = None,
) -> "grain.DatasetIterator[Example]":
    """Shuffled batches of training sequences, in an order that depends on ``seed`` alone.

    The iterator's ``get_state()`` is a small JSON-compatible dictionary; ``set_state`` (also Orbax
    with ``grain.checkpoint.CheckpointSave`` and ``CheckpointRestore``) continues with the very
    next batch, whatever ``workers`` is.

    With ``workers``, ``close()`` it when done with it.

    Of several processes each reads its own ``rows`` of the same batches: the order does not depend
    on how many there are, nor does the state. (A stream's documents are read by all, in order, and
    each tokenises its own.)

    Each epoch has its own order. Batches go on from one epoch into the next; only at the very end a
    batch that is not full is dropped.

    Args:
        corpus: What ``load`` returned.
        batch_size: Sequences in a batch, B.
        seed: Seed of the order, 0 to 2**32 - 1.
        num_epochs: Passes over the data; ``None`` for no end.
        workers: Batches to read ahead in the background; 0 reads when asked.
        rows: Numbers of the sequences of a batch that are wanted; all by default.

    Returns:
        Iterator over ``tokens (B, T)``, int32, and ``mask (B, T)``, bool; of the ``rows`` alone.

    Raises:
        UserError: If a number is out of range or the corpus is smaller than one batch.
    """
    import grain

    if batch_size < 1:
        raise UserError(f"batch_size must be positive, got {batch_size}.")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed must lie between 0 and 2**32 - 1, got {seed}.")
    if num_epochs is not None and num_epochs < 1:
        raise UserError(f"num_epochs must be positive, got {num_epochs}.")
    if workers < 0:
        raise UserError(f"workers must not be negative, got {workers}.")
    source = corpus.train
    if isinstance(source, Stream):
        batches = (
            source.documents(seed, num_epochs)
            .pipe(
                grain.experimental.WindowShuffleIterDataset, window_size=_SHUFFLE_WINDOW, seed=seed
            )
            .batch(batch_size, drop_remainder=True, batch_fn=_encoding(source, batch_size, rows))
        )
    else:
        if len(source) < batch_size:
            raise UserError(
                f"too few tokens for one batch: {len(source)} training sequences of "
                f"{corpus.sequence_length} tokens, batch size {batch_size}; use more data, a "
                "smaller batch or shorter sequences."
            )
        batches = (
            grain.MapDataset.range(len(source))
            .shuffle(seed)
            .repeat(num_epochs)
            .batch(batch_size, drop_remainder=True, batch_fn=_reading(source, batch_size, rows))
            .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        )
    # One thread is enough: a batch is a copy of memory, or tokenised by all cores at once.
    return iter(
        grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=workers)
        if workers
        else batches
    )


def validation_batches(
    corpus: Corpus, batch_size: int, rows: Rows | None = None
) -> "grain.IterDataset[Example]":
    """Every validation sequence once, in a fixed order; iterate over the result as often as needed.

    The last batch is filled up with sequences whose mask is all zero, so that a mean weighted by
    the mask is the exact mean over the validation data.

    Args:
        corpus: What ``load`` returned.
        batch_size: Sequences in a batch, B.
        rows: Numbers of the sequences of a batch that are wanted; all by default.

    Returns:
        Iterable over ``tokens (B, T)``, int32, and ``mask (B, T)``, bool; of the ``rows`` alone.

    Raises:
        UserError: If ``batch_size`` is not positive.
    """
    import grain

    if batch_size < 1:
        raise UserError(f"batch_size must be positive, got {batch_size}.")
    source = corpus.validation
    if isinstance(source, Sequences):
        return (
            grain.MapDataset.range(len(source))
            .batch(batch_size, batch_fn=_reading(source, batch_size, rows))
            .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        )
    encode = _encoding(source, batch_size, rows)
    return source.documents(0, 1).batch(batch_size, batch_fn=encode)


def _reading(
    source: Sequences, batch_size: int, rows: Rows | None
) -> Callable[[Sequence[int]], Example]:
    """Reads the rows of a batch whose sequences have the numbers that it is given."""

    def read(numbers: Sequence[int]) -> Example:
        wanted = range(batch_size) if rows is None else rows
        examples = [source[int(numbers[row])] for row in wanted if row < len(numbers)]
        # The last batch of all, of which this process may have no row.
        shapes = examples[0] if examples else source[0]
        return {
            name: _rows([e[name] for e in examples], (len(wanted), *x.shape), x.dtype)
            for name, x in shapes.items()
        }

    return read


def _encoding(
    source: Stream, batch_size: int, rows: Rows | None
) -> Callable[[Sequence[str]], Example]:
    """Tokenises the rows of a batch of documents."""

    def encode(texts: Sequence[str]) -> Example:
        wanted = range(batch_size) if rows is None else rows
        own = [texts[row] for row in wanted if row < len(texts)]
        found = source.encode(own or texts[:1])
        return {
            name: _rows(x[: len(own)], (len(wanted), *x.shape[1:]), x.dtype)
            for name, x in found.items()
        }

    return encode


def _rows(found: Iterable[np.ndarray], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of rows, with zeros in the place of those that are missing."""
    out = np.zeros(shape, dtype)
    for row, x in zip(out, found, strict=False):
        row[...] = x
    return out
