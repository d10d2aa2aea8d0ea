"""Batches: order, epochs, the saved position, and validation without bias."""

import dataclasses
import json
from pathlib import Path

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from examples.flax_llama.data import Corpus, DataConfig, train_batches, validation_batches
from examples.flax_llama.data.corpus import Sequences, hold_out, windows
from examples.flax_llama.errors import UserError

LENGTH = 4


def make_corpus(train=23, validation=7):
    ids = np.arange((train + validation) * LENGTH, dtype=np.uint16)
    return Corpus(
        description="counting",
        fingerprint="",
        validation_fingerprint="",
        vocab_size=len(ids),
        sequence_length=LENGTH,
        train=windows(ids[: train * LENGTH], LENGTH),
        validation=windows(ids[train * LENGTH :], LENGTH),
    )


def take(iterator, count):
    return [next(iterator)["tokens"] for _ in range(count)]


def assert_same(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


def test_shapes_and_dtypes():
    batch = next(train_batches(make_corpus(), 5))
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "tokens": ((5, LENGTH), np.int32),
        "mask": ((5, LENGTH), np.bool_),
    }
    assert batch["mask"].all()


def test_an_epoch_has_every_sequence_once():
    tokens = np.concatenate(take(train_batches(make_corpus(train=20), 5), 8))
    for epoch in (tokens[:20], tokens[20:]):
        np.testing.assert_array_equal(
            np.sort(epoch, axis=0), np.arange(20 * LENGTH).reshape(20, LENGTH)
        )
    assert not np.array_equal(tokens[:20], tokens[20:])
    assert not np.array_equal(tokens[:20], np.sort(tokens[:20], axis=0))


def test_the_order_depends_on_the_seed_alone():
    corpus = make_corpus()
    first = take(train_batches(corpus, 5, seed=1), 9)
    assert_same(first, take(train_batches(corpus, 5, seed=1), 9))
    other = take(train_batches(corpus, 5, seed=2), 9)
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_number_of_epochs():
    assert len(list(train_batches(make_corpus(train=23), 5, num_epochs=2))) == 46 // 5


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 4, 5, 11])  # an epoch is 4.6 batches
def test_a_saved_position_continues_with_the_next_batch(done, workers):
    corpus = make_corpus()
    iterator = train_batches(corpus, 5, seed=3, workers=workers)
    take(iterator, done)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 7)
    iterator.close()
    # Saved with and restored without reading ahead, and the other way round.
    restored = train_batches(corpus, 5, seed=3, workers=2 - workers)
    restored.set_state(state)
    assert_same(take(restored, 7), expected)
    # The other way to restore: rewind an iterator that has gone on.
    take(restored, 2)
    restored.set_state(state)
    assert_same(take(restored, 7), expected)
    restored.close()


def test_orbax_saves_and_restores_the_position(tmp_path):
    corpus = make_corpus()
    iterator = train_batches(corpus, 5, workers=1)
    take(iterator, 6)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(6, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        expected = take(iterator, 6)
        restored = train_batches(corpus, 5, workers=1)
        manager.restore(
            6, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(restored))
        )
    assert_same(take(restored, 6), expected)
    iterator.close()
    restored.close()


def test_validation_has_every_sequence_once_and_masks_the_rest():
    corpus = make_corpus()
    batches = validation_batches(corpus, 3)
    for _ in range(2):
        tokens, mask = (np.stack([batch[name] for batch in batches]) for name in ("tokens", "mask"))
        assert tokens.shape == mask.shape == (3, 3, LENGTH)
        np.testing.assert_array_equal(
            tokens[mask].reshape(-1, LENGTH),
            np.arange(23 * LENGTH, 30 * LENGTH).reshape(-1, LENGTH),
        )
        assert not mask[2, 1:].any()


def test_padded_sequences_are_masked():
    sequences = Sequences(np.arange(8).reshape(2, 4), lengths=np.array([4, 1]))
    corpus = dataclasses.replace(make_corpus(), train=sequences, validation=sequences)
    for batch in (
        next(train_batches(corpus, 2)),
        next(iter(validation_batches(corpus, 2))),
    ):
        np.testing.assert_array_equal(
            batch["mask"].sum(axis=1), np.where(batch["tokens"][:, 0], 1, 4)
        )


def test_held_out_sequences_are_the_last():
    all_of_it = windows(np.arange(40), 4)
    train, validation = hold_out(all_of_it, windows(np.arange(0), 4), 0.2, "here")
    assert (len(train), len(validation)) == (8, 2)
    assert validation[0]["tokens"][0] == 32
    train, validation = hold_out(windows(np.arange(0), 4), all_of_it, 0.2, "here")
    assert (len(train), len(validation)) == (8, 2)
    train, validation = hold_out(windows(np.arange(8), 4), windows(np.arange(0), 4), 0.9, "here")
    assert (len(train), len(validation)) == (1, 1)
    with pytest.raises(UserError, match="here: too little text, 10 sequences to train on and 0"):
        hold_out(all_of_it, windows(np.arange(0), 4), None, "here")


def test_fingerprints():
    ids = np.arange(4000)
    assert windows(ids, 4).fingerprint() == windows(ids.astype(np.uint16), 4).fingerprint()
    changed = {
        windows(ids, 4).fingerprint(),
        windows(ids, 8).fingerprint(),
        windows(ids[:-4], 4).fingerprint(),
        windows(ids + 1, 4).fingerprint(),
    }
    assert len(changed) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"batch_size": 24}, "too few tokens for one batch: 23 training sequences of 4 tokens"),
        ({"batch_size": 1, "seed": -1}, "--seed must lie between"),
        ({"batch_size": 1, "num_epochs": 0}, "num_epochs must be positive, got 0"),
        ({"batch_size": 1, "workers": -1}, "workers must not be negative, got -1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        train_batches(make_corpus(), **arguments)


def test_bad_validation_batch_size():
    with pytest.raises(UserError, match="batch_size must be positive, got 0"):
        validation_batches(make_corpus(), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "c5"}, "unknown data source 'c5'; choose from stdlib, c4, text, tokens"),
        ({"documents": "cut"}, "documents must be 'pack' or 'pad', got 'cut'"),
        ({"source": "text"}, "data source 'text' needs a path"),
        ({"source": "tokens"}, "data source 'tokens' needs a path"),
        ({"sequence_length": 1}, "sequence_length must be at least 2, got 1"),
        ({"vocab_size": 0}, "--vocab-size must be at least 2, got 0"),
        ({"validation_fraction": 1.0}, "validation_fraction must lie between 0 and 1, got 1.0"),
        ({"validation_limit": 0}, "validation_limit must be positive, got 0"),
    ],
)
def test_bad_configuration(arguments, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"path": Path("x")}, "--path is an option of the data source c4 or text or tokens, not"),
        ({"validation_path": Path("x")}, "--validation-path is an option of .* not of stdlib"),
        ({"text_field": "body"}, "--text-field is an option of .* not of stdlib"),
        ({"source": "c4", "validation_path": Path("x")}, "--validation-path is .* not of c4"),
        ({"source": "c4", "validation_fraction": 0.1}, "--validation-fraction is .* not of c4"),
        ({"source": "tokens", "tokenizer": "t5-base"}, "--tokenizer is .* not of tokens"),
        ({"source": "tokens", "documents": "pad"}, "--documents is an option of .* not of tokens"),
    ],
)
def test_options_of_other_sources(arguments, named):
    with pytest.raises(UserError, match=f"{named}.*; leave it out or choose another --source"):
        DataConfig(**arguments)


def test_options_of_the_source():
    DataConfig(tokenizer="t5-base", documents="pad", validation_fraction=0.1)
    DataConfig(source="c4", path=Path("x"), tokenizer="t5-base", text_field="body")
    DataConfig(source="text", path=Path("x"), validation_path=Path("y"), text_field="body")
    DataConfig(source="tokens", path=Path("x"), validation_path=Path("y"))


def test_fingerprints_cover_everything():
    ids = np.arange(40_000, dtype=np.uint16).reshape(10_000, 4)
    lengths = np.full(10_000, 3, np.uint32)
    whole = Sequences(ids, lengths).fingerprint()
    assert Sequences(ids.astype(np.int64), lengths.astype(np.int64)).fingerprint() == whole
    prints = {whole, Sequences(ids).fingerprint(), Sequences(ids[:-1], lengths[:-1]).fingerprint()}
    for row in (0, 5_001, 9_999):
        for array in (ids, lengths):
            before, array[row] = array[row].copy(), 1
            prints.add(Sequences(ids, lengths).fingerprint())
            array[row] = before
    assert len(prints) == 9
    assert Sequences(ids, lengths).fingerprint() == whole


def test_errors_are_one_line():
    assert str(UserError("first\n  second\tthird")) == "first second third"
