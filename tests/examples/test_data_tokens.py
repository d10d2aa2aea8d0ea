"""Arrays of token ids."""

import gzip
import lzma

import numpy as np
import pytest
import zstandard

from examples.flax_llama.data import DataConfig, load
from examples.flax_llama.errors import UserError

IDS = np.random.default_rng(0).integers(0, 300, 1003).astype("<u2")

COMPRESS = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress}
COMPRESS[".zst"] = zstandard.ZstdCompressor().compress


@pytest.fixture
def config(tmp_path):
    def make(path, **kwargs):
        return DataConfig(
            source="tokens",
            path=path,
            cache_dir=tmp_path / "cache",
            **{"sequence_length": 10, "validation_fraction": 0.1, **kwargs},
        )

    return make


def write(path, ids):
    plain = path.with_suffix("") if path.suffix in COMPRESS and path.suffix else path
    if plain.suffix == ".npy":
        np.save(plain, ids)
        data = plain.read_bytes()
        plain.unlink()
    else:
        data = ids.astype("<u2").tobytes()
    path.write_bytes(COMPRESS[path.suffix if plain != path else ""](data))
    return path


def all_tokens(sequences):
    return np.concatenate([sequences[i]["tokens"] for i in range(len(sequences))])


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".npy", ".u16", ".bin"])
def test_formats(tmp_path, config, suffix, compression):
    corpus = load(config(write(tmp_path / f"ids{suffix}{compression}", IDS)))
    assert (len(corpus.train), len(corpus.validation)) == (90, 10)
    read = np.concatenate([all_tokens(corpus.train), all_tokens(corpus.validation)])
    np.testing.assert_array_equal(read, IDS[:1000])
    assert corpus.vocab_size == 320
    assert "90 + 10 sequences of 10 tokens" in corpus.description


def test_vocab_size_is_rounded_up_unless_given(tmp_path, config):
    path = write(tmp_path / "ids.u16", np.full(100, 31999))
    assert load(config(path)).vocab_size == 32000
    assert load(config(path, vocab_size=50000)).vocab_size == 50000
    path = write(tmp_path / "other.u16", np.full(100, 64))
    assert load(config(path)).vocab_size == 128


def test_wide_ids(tmp_path, config):
    path = write(tmp_path / "ids.npy", np.arange(100, dtype=np.int64) + 100_000)
    corpus = load(config(path))
    assert corpus.vocab_size == 100_160
    assert corpus.train[0]["tokens"][0] == 100_000


def test_validation_file(tmp_path, config):
    validation = write(tmp_path / "validation.npy", np.arange(400, 425))
    corpus = load(config(write(tmp_path / "train.u16.xz", IDS), validation_path=validation))
    assert (len(corpus.train), len(corpus.validation)) == (100, 2)
    np.testing.assert_array_equal(all_tokens(corpus.validation), np.arange(400, 420))
    assert corpus.vocab_size == 448


def test_validation_limit(tmp_path, config):
    corpus = load(config(write(tmp_path / "ids.u16", IDS), validation_limit=3))
    assert (len(corpus.train), len(corpus.validation)) == (90, 3)


def test_unpacked_once(tmp_path, config):
    path = write(tmp_path / "ids.u16.xz", IDS)
    fingerprint = load(config(path)).fingerprint
    (unpacked,) = (tmp_path / "cache").glob("tokens-*/ids.u16")
    before = unpacked.stat()
    assert load(config(path)).fingerprint == fingerprint
    assert (unpacked.stat().st_ino, unpacked.stat().st_mtime_ns) == (
        before.st_ino,
        before.st_mtime_ns,
    )
    write(path, IDS[::-1])
    assert load(config(path)).fingerprint != fingerprint


def error(config):
    with pytest.raises(UserError) as caught:
        load(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing(tmp_path, config):
    assert error(config(tmp_path / "no.npy")) == f"data path {tmp_path}/no.npy does not exist."
    path = write(tmp_path / "ids.u16", IDS)
    assert "no.npy does not exist" in error(config(path, validation_path=tmp_path / "no.npy"))


@pytest.mark.parametrize("name", ["ids.csv", "ids", "ids.u32.xz"])
def test_unknown_suffix(tmp_path, config, name):
    (tmp_path / name).write_bytes(b"12")
    assert "token ids are read from .npy, or raw uint16" in error(config(tmp_path / name))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros(100), "expected a flat array of integers, got float64 of shape (100,)"),
        (np.zeros((10, 10), int), "got int64 of shape (10, 10)"),
        (np.arange(-5, 95), "token ids must not be negative, found -5"),
        (np.arange(100) + 2**31, "token ids must be less than 2**31 - 1, found 2147483747"),
        (np.arange(19), "too little text, 1 sequences to train on and 0 to validate on"),
        (np.arange(0), "the array is empty"),
    ],
)
def test_unusable_arrays(tmp_path, config, ids, message):
    path = write(tmp_path / "ids.npy", ids)
    found = error(config(path))
    assert message in found
    assert str(path) in found


def test_ids_outside_the_vocabulary(tmp_path, config):
    path = write(tmp_path / "ids.u16", np.array([*range(99), 512]))
    assert "found token id 512, but --vocab-size is 512; raise it to at least 513" in error(
        config(path, vocab_size=512)
    )
    assert load(config(path, vocab_size=513)).vocab_size == 513
    small = write(tmp_path / "small.u16", np.arange(100))
    assert f"{path}: found token id 512" in error(
        config(small, vocab_size=512, validation_path=path)
    )


def test_short_validation_file(tmp_path, config):
    path = write(tmp_path / "ids.u16", IDS)
    short = write(tmp_path / "short.u16", IDS[:9])
    message = "too little text, 100 sequences to train on and 0 to validate on"
    assert message in error(config(path, validation_path=short))
    assert "0 sequences to train on and 100" in error(config(short, validation_path=path))


def test_odd_number_of_bytes(tmp_path, config):
    (tmp_path / "ids.bin").write_bytes(b"123")
    assert "odd number of bytes" in error(config(tmp_path / "ids.bin"))


DAMAGED_HEADER = b"\x93NUMPY\x01\x00" + bytes([20, 0]) + b"{'shape': (((1,), }\n"


@pytest.mark.parametrize(
    "data", [b"", b"not numpy", b"\x93NUMPY\x01\x00", b"PK\x03\x04xxxx", DAMAGED_HEADER]
)
def test_not_npy(tmp_path, config, data):
    (tmp_path / "ids.npy").write_bytes(data)
    assert "ids.npy: not a .npy array" in error(config(tmp_path / "ids.npy"))


@pytest.mark.parametrize("compression", [".xz", ".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_damaged_archives(tmp_path, config, compression, damage):
    path = write(tmp_path / f"ids.u16{compression}", IDS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20] if damage == "cut" else b"garbage" + whole)
    assert f"{path}: damaged or cut short" in error(config(path))
    assert not list((tmp_path / "cache").iterdir())
    path.write_bytes(whole)
    assert len(load(config(path)).train) == 90


def test_folder_instead_of_a_file(tmp_path, config):
    folder = tmp_path / "ids.u16"
    folder.mkdir()
    assert f"cannot read {folder}" in error(config(folder))
