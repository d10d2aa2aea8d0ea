"""C4 in its own format, from a local folder and through a stand-in for the hub."""

import dataclasses
import gzip
import json
import shutil
from pathlib import Path

import datasets
import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from examples.flax_llama.data import DataConfig, batches, load, train_batches, validation_batches
from examples.flax_llama.data.tokenizer import load_tokenizer, train_bpe
from examples.flax_llama.errors import UserError

LENGTH = 15
SHARDS, DOCUMENTS = 3, 20


def write_shard(path, texts, field="text"):
    lines = (
        json.dumps({field: text, "timestamp": "2019-04-25T12:57:54Z", "url": "http://a.b"})
        for text in texts
    )
    path.write_bytes(gzip.compress("".join(line + "\n" for line in lines).encode()))


def texts_of(split, shard, count=DOCUMENTS):
    return [f"{split} {shard}.{i} " + "and so on " * (i % 4) for i in range(count)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(texts_of("train", 0) + texts_of("validation", 0), 300).save(str(path))
    return str(path)


@pytest.fixture
def config(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(batches, "_SHUFFLE_WINDOW", 7)
    folder = tmp_path / "c4" / "en"
    folder.mkdir(parents=True)
    for split, shards in (("train", SHARDS), ("validation", 1)):
        for i in range(shards):
            name = f"c4-{split}.{i:05}-of-{shards:05}.json.gz"
            write_shard(folder / name, texts_of(split, i))
    return DataConfig(
        source="c4", path=tmp_path / "c4", tokenizer=tokenizer, sequence_length=LENGTH
    )


@pytest.fixture(params=["folder", "hub"])
def either(config, request, monkeypatch):
    """The folder, or a hub that has it, read by datasets' own reader."""
    if request.param == "folder":
        return config
    hub = datasets.load_dataset

    def load_dataset(path, name, *, split, streaming):
        assert (path, name, streaming) == ("allenai/c4", "en", True)
        files = sorted(map(str, config.path.rglob(f"c4-{split}*")))
        return hub("json", data_files={split: files}, split=split, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return dataclasses.replace(config, path=None)


def decoded(config, batch):
    tokenizer = load_tokenizer(config.tokenizer)
    return [
        tokenizer.decode(row[mask].tolist())
        for row, mask in zip(batch["tokens"], batch["mask"], strict=True)
        if mask.any()
    ]


def test_every_document_once_an_epoch_in_a_new_order(either):
    corpus = load(either)
    iterator = train_batches(corpus, 10, seed=0)
    epochs = [
        [text for _ in range(6) for text in decoded(either, next(iterator))] for _ in range(2)
    ]
    # The window of the shuffle reaches over the end of an epoch by a few documents.
    names = [text.split()[1] for text in epochs[0] + epochs[1]]
    assert {*names} == {f"{shard}.{i}" for shard in range(SHARDS) for i in range(DOCUMENTS)}
    assert {names.count(name) for name in names} <= {1, 2, 3}
    assert epochs[0] != epochs[1]
    one = list(train_batches(corpus, 7, seed=0, num_epochs=1))
    assert len(one) == SHARDS * DOCUMENTS // 7
    assert len({text for batch in one for text in decoded(either, batch)}) == 56


def test_documents_are_cut_or_padded(either):
    corpus = load(either)
    tokenizer = load_tokenizer(either.tokenizer)
    batch = next(iter(validation_batches(corpus, DOCUMENTS)))
    lengths = set()
    for text, tokens, mask in zip(
        texts_of("validation", 0), batch["tokens"], batch["mask"], strict=True
    ):
        ids = tokenizer.encode(text).ids
        ids = ids if len(ids) <= LENGTH else [*ids[: LENGTH - 1], corpus.eos_id]
        lengths.add(len(ids))
        np.testing.assert_array_equal(tokens, ids + [corpus.pad_id] * (LENGTH - len(ids)))
        np.testing.assert_array_equal(mask, np.arange(LENGTH) < len(ids))
    assert max(lengths) == LENGTH > min(lengths)
    assert corpus.vocab_size == tokenizer.get_vocab_size()


def test_validation_is_complete_and_repeatable(either):
    corpus = load(either)
    loader = validation_batches(corpus, 8)
    for _ in range(2):
        got = list(loader)
        assert [len(batch["tokens"]) for batch in got] == [8, 8, 8]
        assert [int(batch["mask"].any(axis=1).sum()) for batch in got] == [8, 8, 4]
    limited = load(dataclasses.replace(either, validation_limit=5))
    texts = [text for batch in validation_batches(limited, 4) for text in decoded(either, batch)]
    assert len(texts) == 5


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.quick("folder-2", "hub-0")
def test_a_saved_position_continues_with_the_next_batch(either, workers):
    corpus = load(either)
    iterator = train_batches(corpus, 5, seed=1, workers=workers)
    states, expected = [], []
    for _ in range(30):  # two and a half epochs
        states.append(json.loads(json.dumps(iterator.get_state())))
        expected.append(next(iterator))
    iterator.close()
    restored = train_batches(corpus, 5, seed=1, workers=2 - workers)
    for start in (0, 1, 11, 12, 13, 20):
        restored.set_state(states[start])
        for batch in expected[start : start + 8]:
            got = next(restored)
            np.testing.assert_array_equal(got["tokens"], batch["tokens"])
            np.testing.assert_array_equal(got["mask"], batch["mask"])
    restored.close()


def test_orbax_saves_and_restores_the_position(config, tmp_path):
    corpus = load(config)
    iterator = train_batches(corpus, 5, workers=1)
    for _ in range(13):
        next(iterator)
    with ocp.CheckpointManager(tmp_path / "checkpoint") as manager:
        manager.save(13, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        restored = train_batches(corpus, 5, workers=1)
        manager.restore(
            13, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(restored))
        )
    for _ in range(5):
        np.testing.assert_array_equal(next(restored)["tokens"], next(iterator)["tokens"])
    iterator.close()
    restored.close()


def test_the_order_depends_on_the_seed(config):
    corpus = load(config)
    first, again, other = (next(train_batches(corpus, 9, seed=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first["tokens"], again["tokens"])
    assert not np.array_equal(first["tokens"], other["tokens"])


def test_ids_outside_the_vocabulary_become_unknown(config, tmp_path, tokenizer):
    spec = json.loads(Path(tokenizer).read_text())
    size = load_tokenizer(tokenizer).get_vocab_size()
    extra = {"id": size, "content": "<extra_id_0>", "special": True}
    defaults = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec["added_tokens"].append({**extra, **defaults})
    spec["model"]["vocab"]["<unk>"] = spec["model"]["vocab"].pop("!")
    (tmp_path / "extra.json").write_text(json.dumps(spec))
    write_shard(config.path / "en" / "c4-validation.00000-of-00001.json.gz", ["so <extra_id_0> on"])
    corpus = load(
        dataclasses.replace(config, tokenizer=str(tmp_path / "extra.json"), vocab_size=size)
    )
    tokens = next(iter(validation_batches(corpus, 1)))["tokens"]
    assert corpus.vocab_size == size
    assert tokens.max() < size
    assert load_tokenizer(str(tmp_path / "extra.json")).token_to_id("<unk>") in tokens


def error(config, batches=40):
    with pytest.raises(UserError) as caught:
        iterator = train_batches(load(config), 4)
        for _ in range(batches):
            next(iterator)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_and_empty(config, tmp_path):
    missing = dataclasses.replace(config, path=tmp_path / "no")
    assert f"{tmp_path}/no is not a folder" in error(missing)
    (tmp_path / "bare").mkdir()
    bare = dataclasses.replace(config, path=tmp_path / "bare")
    assert error(bare) == f"no files c4-train.*.json.gz in {tmp_path}/bare."


def test_fingerprints_follow_the_content(config, tmp_path):
    first = load(config)
    shutil.move(config.path, tmp_path / "elsewhere")
    config = dataclasses.replace(config, path=tmp_path / "elsewhere")
    moved = load(config)
    assert moved.fingerprint == first.fingerprint
    assert moved.validation_fingerprint == first.validation_fingerprint
    limited = load(dataclasses.replace(config, validation_limit=5))
    assert limited.validation_fingerprint != first.validation_fingerprint

    name = "c4-validation.00000-of-00001.json.gz"
    write_shard(config.path / "en" / name, texts_of("validation", 1))
    changed = load(config)
    assert changed.fingerprint == first.fingerprint
    assert changed.validation_fingerprint != first.validation_fingerprint


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-9], "damaged or cut short"),
        (lambda data: b"plain", "damaged or cut short"),
        (lambda data: gzip.compress(gzip.decompress(data) + b"{,}\n"), "line 21: not valid JSON"),
    ],
)
def test_damaged_shards(config, damage, message, workers):
    path = config.path / "en" / "c4-train.00001-of-00003.json.gz"
    path.write_bytes(damage(path.read_bytes()))
    iterator = train_batches(load(config), 4, workers=workers)
    with pytest.raises(UserError) as caught:
        for _ in range(40):
            next(iterator)
    iterator.close()
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_no_text(config):
    for path in config.path.rglob("c4-train*"):
        path.write_bytes(gzip.compress(b""))
    assert error(config) == f"{config.path}: there is no text in the data."


def test_other_fields(either):
    field = dataclasses.replace(either, text_field="body")
    assert "no text in field 'body'" in error(field)


def test_the_hub_breaks_off(config, monkeypatch):
    def rows():
        yield {"text": "one"}
        raise ConnectionError("gone")

    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *args, **kwargs: datasets.IterableDataset.from_generator(rows),
    )
    message = error(dataclasses.replace(config, path=None))
    assert message == "allenai/c4: reading broke off (ConnectionError('gone'))."


def test_unreachable_hub(config, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = error(dataclasses.replace(config, path=None))
    assert message.startswith("cannot open allenai/c4 (ConnectionError(")
    assert message.endswith("it needs the network, or a path to a folder with its files.")
