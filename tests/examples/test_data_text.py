"""Text files and the standard library."""

import gzip
import hashlib
import json
import logging
import lzma
import os
import random
import subprocess
import sys

import conftest
import numpy as np
import pytest
import zstandard

from examples.flax_llama.data import DataConfig, load, stdlib, tokenizer
from examples.flax_llama.data.files import find_text, read_documents
from examples.flax_llama.data.tokenizer import Encoder, load_tokenizer, train_bpe
from examples.flax_llama.errors import UserError

WORDS = ["gale", "wind", "rank", "seven", "gradient", "every", "wave", "bends", "under"]


def sentence(seed, words=40):
    rng = random.Random(seed)
    return " ".join([f"number {seed}:", *rng.choices(WORDS, k=words)]) + "\n"


def jsonl(texts, field="text"):
    return "".join(json.dumps({field: text, "url": "http://a.b"}) + "\n" for text in texts).encode()


@pytest.fixture
def config(tmp_path):
    def make(path, **kwargs):
        defaults = {"vocab_size": 300, "sequence_length": 16, "validation_fraction": 0.2}
        return DataConfig(
            source="text", path=path, cache_dir=tmp_path / "cache", **{**defaults, **kwargs}
        )

    return make


@pytest.fixture
def folder(tmp_path):
    """Every format, in subfolders; 80 documents in all."""
    folder = tmp_path / "text"
    (folder / "a" / "b").mkdir(parents=True)
    for i in range(20):
        (folder / "a" / f"{i:02}.txt").write_text(sentence(i, words=10 if i < 10 else 40))
    (folder / "b.jsonl").write_bytes(jsonl(sentence(i) for i in range(20, 40)))
    (folder / "a" / "c.jsonl.gz").write_bytes(
        gzip.compress(jsonl(sentence(i) for i in range(40, 60)))
    )
    data = jsonl(sentence(i) for i in range(60, 80))
    half = data.index(b"\n") + 1
    frames = [zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:])]
    (folder / "a" / "b" / "d.jsonl.zst").write_bytes(b"".join(frames))
    (folder / "ignored.md").write_text("nothing")
    return folder


def tokenizer_of(tmp_path):
    (path,) = (tmp_path / "cache").glob("*/tokenizer.json")
    return load_tokenizer(str(path))


def decode(tmp_path, sequences, keep_special=False):
    tokenizer = tokenizer_of(tmp_path)
    ids = [i for row in range(len(sequences)) for i in sequences[row]["tokens"]]
    return tokenizer.decode(ids, skip_special_tokens=not keep_special)


def test_all_formats_are_packed(tmp_path, config, folder):
    corpus = load(config(folder))
    train, validation = (
        decode(tmp_path, part, keep_special=True) for part in (corpus.train, corpus.validation)
    )
    seen = [{i for i in range(80) if f"<bos>number {i}:" in text} for text in (train, validation)]
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) >= 78  # the last document of each may be cut off
    assert 5 <= len(seen[1]) <= 30
    assert sentence(min(i for i in seen[0] if i > 10)) in train
    assert corpus.vocab_size == 300
    assert (corpus.pad_id, corpus.bos_id, corpus.eos_id) == (0, 1, 2)
    for part in (corpus.train, corpus.validation):
        assert all(part[i]["mask"].all() for i in range(len(part)))


def test_documents_are_padded_and_cut(tmp_path, config, folder):
    corpus = load(config(folder, documents="pad", sequence_length=64, vocab_size=290))
    assert len(corpus.train) + len(corpus.validation) == 80
    encoder = Encoder(tokenizer_of(tmp_path))
    expected = {}
    for i in range(80):
        ids = encoder.tokenizer.encode(sentence(i, words=10 if i < 10 else 40)).ids
        assert (ids[0], ids[-1]) == (encoder.bos_id, encoder.eos_id)
        ids = ids if len(ids) <= 64 else [*ids[:63], encoder.eos_id]
        expected[tuple(ids)] = len(ids)
    assert {64} < {*expected.values()}, "some documents must be shorter, some longer"
    for part in (corpus.train, corpus.validation):
        for i in range(len(part)):
            tokens, mask = part[i]["tokens"], part[i]["mask"]
            length = expected.pop(tuple(tokens[mask].tolist()))
            np.testing.assert_array_equal(mask, np.arange(64) < length)
            assert (tokens[length:] == encoder.pad_id).all()
    assert not expected


def test_given_tokenizer(tmp_path, config, folder):
    tokenizer = train_bpe([sentence(i) for i in range(5)], 280)
    tokenizer.save(str(tmp_path / "mine.json"))
    corpus = load(config(folder, vocab_size=None, tokenizer=str(tmp_path / "mine.json")))
    assert corpus.vocab_size == 280
    larger = config(folder, vocab_size=512, tokenizer=str(tmp_path / "mine.json"))
    assert load(larger).vocab_size == 512


def test_validation_folder(tmp_path, config, folder):
    other = tmp_path / "other.txt"
    other.write_text("".join(sentence(i) for i in range(100, 110)))
    corpus = load(config(folder, validation_path=other))
    assert {i for i in range(80) if f"number {i}:" in decode(tmp_path, corpus.train)} >= {
        *range(79)
    }
    text = decode(tmp_path, corpus.validation)
    assert "number 100:" in text
    assert "number 7:" not in text


def test_a_short_validation_file_is_not_filled_up(tmp_path, config, folder):
    other = tmp_path / "other.txt"
    other.write_text("short")
    assert "and 0 to validate on" in error(config(folder, validation_path=other))
    assert "0 sequences to train on and" in error(config(other, validation_path=folder))


def test_one_long_file_is_cut_at_lines(tmp_path, config):
    path = tmp_path / "book.txt"
    path.write_text("".join(sentence(i) for i in range(2000)))
    corpus = load(config(path))
    train, validation = (
        decode(tmp_path, part, keep_special=True) for part in (corpus.train, corpus.validation)
    )
    seen = [{i for i in range(2000) if f"number {i}:" in text} for text in (train, validation)]
    assert len(seen[0] | seen[1]) >= 1998
    assert len(seen[0] & seen[1]) <= 1  # cut by a window's edge
    assert (train + validation).count("<bos>") == 1


def test_one_short_file_holds_its_end_out(tmp_path, config):
    path = tmp_path / "note.txt"
    path.write_text("".join(sentence(i) for i in range(10)))
    corpus = load(config(path))
    assert "number 0:" in decode(tmp_path, corpus.train)
    assert "number 9:" in decode(tmp_path, corpus.validation)


def test_a_line_of_any_length(tmp_path):
    path = tmp_path / "line.txt"
    path.write_text("x" * 200_000)
    documents = [*read_documents(path, "text")]
    assert [len(document.text) for document in documents] == [65536, 65536, 65536, 3392]
    assert [document.starts for document in documents] == [True, False, False, False]


def test_text_field_and_blank_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["one", "", " \n", "two"], field="body") + b"\n\n")
    assert [document.text for document in read_documents(path, "body")] == ["one", "two"]


def cache_files(tmp_path):
    files = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    return {path: path.stat().st_ino for path in files}


def test_cache_is_reused_until_something_changes(tmp_path, config, folder):
    first = load(config(folder))
    before = cache_files(tmp_path)
    assert load(config(folder)).fingerprint == first.fingerprint
    load(config(folder, sequence_length=8))  # cuts the same tokens
    assert cache_files(tmp_path) == before
    load(config(folder, vocab_size=310))
    (folder / "b.jsonl").write_bytes(jsonl(sentence(i) for i in range(20, 60)))
    assert load(config(folder)).fingerprint != first.fingerprint
    assert len({path.parent for path in cache_files(tmp_path)}) == 3


def test_damaged_cache_is_rebuilt(tmp_path, config, folder):
    first = load(config(folder))
    (ids,) = (tmp_path / "cache").glob("*/train.ids")
    ids.write_bytes(ids.read_bytes()[:-64])
    again = load(config(folder))
    assert again.fingerprint == first.fingerprint
    assert len(again.train) == len(first.train)


def error(config):
    with pytest.raises(UserError) as caught:
        load(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_and_empty(tmp_path, config):
    assert error(config(tmp_path / "no")) == f"data path {tmp_path}/no does not exist."
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"no text in {empty}: expected .txt or .jsonl files" in error(config(empty))
    (empty / "a.txt").write_text("\n \n")
    assert f"{empty}: too little text" in error(config(empty))
    (empty / "a.txt").write_text("too short")
    assert f"{empty}: too little text" in error(config(empty))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "not valid JSON ("),
        (b'{"text": "\xff\xfe"}', "not valid JSON ('utf-8' codec can't decode"),
        (b'{"body": "text", "n": 1}', "no text in field 'text' (the line has: body, n)"),
        (b'{"text": null}', "no text in field 'text' (the line has: text)"),
        (b'["text"]', "no text in field 'text' (the line has: list)"),
        (b'{"text": "\\ud800 alone"}', "half of a surrogate pair in field 'text'"),
        (b"[" * 100_000, "not valid JSON ("),
    ],
)
def test_corrupt_jsonl(tmp_path, config, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["fine", "fine"]) + b"\n" + line + b"\n" + jsonl(["fine"]))
    found = error(config(path))
    assert found.startswith(f"{path}, line 4: ")
    assert message in found


def test_binary_instead_of_text(tmp_path, config):
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\xff")
    assert error(config(path)) == f"{path}: not UTF-8 text (invalid start byte)."


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".gz", gzip.compress),
        (".xz", lzma.compress),
        (".zst", zstandard.ZstdCompressor().compress),
    ],
)
def test_damaged_archives(tmp_path, config, suffix, compress):
    path = tmp_path / f"a.jsonl{suffix}"
    whole = compress(jsonl(sentence(i) for i in range(50)))
    for data in (whole[:-10], whole[: len(whole) // 2], b"junk" + whole):
        path.write_bytes(data)
        assert f"{path}: damaged or cut short" in error(config(path))
    path.write_bytes(whole)
    assert len(load(config(path)).train) > 10


def test_no_permission(config, folder):
    (folder / "b.jsonl").chmod(0)
    if os.access(folder / "b.jsonl", os.R_OK):
        pytest.skip("this user may read everything")
    assert error(config(folder)) == f"cannot read {folder / 'b.jsonl'}: Permission denied."
    (folder / "a").chmod(0)
    found = error(config(folder))
    (folder / "a").chmod(0o700)
    assert found == f"cannot read {folder / 'a'}: Permission denied."


def test_unusable_tokenizers(tmp_path, config, folder):
    missing = tmp_path / "none.json"
    assert error(config(folder, tokenizer=str(missing))) == f"tokenizer {missing} does not exist."
    (tmp_path / "bad.json").write_text("{}")
    assert "cannot load the tokenizer" in error(
        config(folder, tokenizer=str(tmp_path / "bad.json"))
    )
    assert "--vocab-size of a trained BPE must be >= 259, got 200" in error(
        config(folder, vocab_size=200)
    )
    train_bpe([sentence(0)], 280).save(str(tmp_path / "mine.json"))
    small = config(folder, vocab_size=270, tokenizer=str(tmp_path / "mine.json"))
    assert "--vocab-size 270 is less than the tokenizer's 280 ids" in error(small)


def test_full_disk(tmp_path, config, folder):
    with conftest.small_files(1000):
        message = error(config(folder))
    assert "cannot use the data cache" in message and "choose another --cache-dir" in message


def test_the_hub_is_quiet_about_its_tries(config, folder, monkeypatch, caplog):
    def unreachable(name):
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s")
        raise OSError("cannot reach it")

    monkeypatch.setattr(tokenizer.Tokenizer, "from_pretrained", unreachable)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    message = "cannot load the tokenizer 't5-base' (cannot reach it)"
    assert message in error(config(folder, vocab_size=None, tokenizer="t5-base"))
    assert not caplog.records
    logging.getLogger("huggingface_hub.utils").warning("as before")
    assert caplog.messages == ["as before"]


def test_the_bpe_is_lossless():
    tokenizer = train_bpe([sentence(i) for i in range(20)], 320)
    for text in (sentence(1), "\tdéjà vu\r\n  ☃ \x00", " leading"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


# --- the standard library -----------------------------------------------------------------------


@pytest.fixture
def small_library(tmp_path, monkeypatch):
    """A standard library of 40 modules."""
    root = tmp_path / "lib"
    for skipped in ("test", "site-packages/numpy", "idlelib", "json/tests"):
        (root / skipped).mkdir(parents=True)
        (root / skipped / "skipped.py").write_text("skipped = True\n")
    for i in range(40):
        folder = root / ("json" if i % 2 else ".")
        (folder / f"module{i}.py").write_text(f"# number {i}: module\n" + sentence(i, 100))
    monkeypatch.setattr(stdlib.sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    return root


def test_standard_library(tmp_path, small_library):
    settings = DataConfig(
        vocab_size=300, sequence_length=16, validation_fraction=0.2, cache_dir=tmp_path / "cache"
    )
    corpus = load(settings)
    train, validation = (
        decode(tmp_path, part, keep_special=True) for part in (corpus.train, corpus.validation)
    )
    seen = [{i for i in range(40) if f"<bos># number {i}:" in text} for text in (train, validation)]
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) >= 38
    assert "skipped" not in train + validation
    assert corpus.description.startswith("Python 3.")
    # The content counts, not its place or its age.
    before = cache_files(tmp_path)
    os.utime(small_library / "module0.py", (0, 0))
    assert load(settings).fingerprint == corpus.fingerprint
    assert cache_files(tmp_path) == before
    (small_library / "module0.py").write_text(sentence(99, 100))
    assert load(settings).fingerprint != corpus.fingerprint


def test_no_standard_library_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(stdlib.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert "this Python has no sources" in error(DataConfig(cache_dir=tmp_path / "cache"))


def test_the_real_standard_library():
    files = stdlib.find_sources()
    total = sum(path.stat().st_size for path in files)
    assert 5e6 < total < 20e6
    assert [path.name for path in files if path.name in ("argparse.py", "test_support.py")] == [
        "argparse.py"
    ]
    assert not {"site-packages", "test"} & {part for path in files for part in path.parts[-3:-1]}


def test_a_tokenizer_trained_twice_is_the_same():
    """With any number of threads: a cache that was deleted must come back as it was."""
    program = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import hashlib, test_data_text as t\n"
        "bpe = t.train_bpe([t.sentence(i) for i in range(200)], 350)\n"
        "print(hashlib.sha256(bpe.to_str().encode()).hexdigest())"
    )
    here = os.path.dirname(os.path.abspath(__file__))
    hashes = {
        subprocess.run(
            [sys.executable, "-c", program, here, os.getcwd()],
            env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for threads in ("1", "2")
    }
    bpe = train_bpe([sentence(i) for i in range(200)], 350)
    assert hashes == {hashlib.sha256(bpe.to_str().encode()).hexdigest()}


def test_find_text_is_sorted(folder):
    files = find_text(folder)
    assert files == sorted(files)
    assert len(files) == 23
