"""Batches for the training loop, from Grain, so that the position in the data can be saved.

Grain is imported inside the functions because it imports JAX, for which ``--help`` should not wait.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from examples.flax_llama.data.corpus import Corpus, Example, Sequences, Stream
from examples.flax_llama.errors import UserError

if TYPE_CHECKING:
    import grain

_SHUFFLE_WINDOW = 1024  # documents of a stream shuffled together, as many as GaLore's (1000)


def train_batches(
    corpus: Corpus,
    batch_size: int,
    seed: int = 0,
    num_epochs: int | None = None,
    workers: int = 0,
) -> "grain.DatasetIterator[Example]":
    """Shuffled batches of training sequences, in an order that depends on ``seed`` alone.

    The iterator's ``get_state()`` is a small JSON-compatible dictionary; ``set_state`` (also Orbax
    with ``grain.checkpoint.CheckpointSave`` and ``CheckpointRestore``) continues with the very
    next batch, whatever ``workers`` is.

    With ``workers``, ``close()`` it when done with it.

    Each epoch has its own order. Batches go on from one epoch into the next; only at the very end a
    batch that is not full is dropped.

    Args:
        corpus: What ``load`` returned.
        batch_size: Sequences in a batch, B.
        seed: Seed of the order, 0 to 2**32 - 1.
        num_epochs: Passes over the data; ``None`` for no end.
        workers: Batches to read ahead in the background; 0 reads when asked.

    Returns:
        Iterator over ``tokens (B, T)``, int32, and ``mask (B, T)``, bool.

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
            .batch(batch_size, drop_remainder=True, batch_fn=source.encode)
        )
    else:
        if len(source) < batch_size:
            raise UserError(
                f"too few tokens for one batch: {len(source)} training sequences of "
                f"{corpus.sequence_length} tokens, batch size {batch_size}; use more data, a "
                "smaller batch or shorter sequences."
            )
        batches = (
            grain.MapDataset.source(source)
            .shuffle(seed)
            .repeat(num_epochs)
            .batch(batch_size, drop_remainder=True)
            .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        )
    # One thread is enough: a batch is a copy of memory, or tokenised by all cores at once.
    return iter(
        grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=workers)
        if workers
        else batches
    )


def validation_batches(corpus: Corpus, batch_size: int) -> "grain.IterDataset[Example]":
    """Every validation sequence once, in a fixed order; iterate over the result as often as needed.

    The last batch is filled up with sequences whose mask is all zero, so that a mean weighted by
    the mask is the exact mean over the validation data.

    Args:
        corpus: What ``load`` returned.
        batch_size: Sequences in a batch, B.

    Returns:
        Iterable over ``tokens (B, T)``, int32, and ``mask (B, T)``, bool.

    Raises:
        UserError: If ``batch_size`` is not positive.
    """
    import grain

    if batch_size < 1:
        raise UserError(f"batch_size must be positive, got {batch_size}.")
    source = corpus.validation
    if isinstance(source, Sequences):
        pad = functools.partial(grain.experimental.batch_and_pad, batch_size=batch_size)
        return (
            grain.MapDataset.source(source)
            .batch(batch_size, batch_fn=pad)
            .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        )

    def encode_and_pad(texts: Sequence[str]) -> Example:
        missing = batch_size - len(texts)
        return {
            name: np.pad(array, ((0, missing), (0, 0)))
            for name, array in source.encode(texts).items()
        }

    return source.documents(0, 1).batch(batch_size, batch_fn=encode_and_pad)
