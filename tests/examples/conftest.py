"""A LLaMA small enough to train within a test, and text to train it on."""

import resource
from contextlib import contextmanager

import jax
import numpy as np
import pytest

from examples.flax_llama import train
from examples.flax_llama.sizes import SIZES, LlamaSize

NANO = LlamaSize(300, hidden=16, intermediate=24, layers=2, heads=2, kv_heads=1)
# Of which every axis can be divided among 8 devices, for it is padded.
EVEN = LlamaSize(304, hidden=16, intermediate=27, layers=2, heads=2, kv_heads=2, padding=5)


@pytest.fixture(autouse=True, scope="module")
def always_quick(quick_compilation):
    """Asked for by every test."""


@pytest.fixture(scope="session")
def environment(compilation_cache):
    """The variables with which another process finds what this one has compiled."""
    key = {
        "jax_num_cpu_devices": jax.config.jax_num_cpu_devices,
        "jax_disable_most_optimizations": True,  # as `always_quick` does here
    }
    return {**compilation_cache, **{name.upper(): str(value) for name, value in key.items()}}


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    """A folder of text with something to learn: words follow each other in few ways."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(20)]
    at, text = 0, []
    for _ in range(4000):
        at = (at * 3 + rng.integers(2)) % len(words)
        text.append(words[at])
    (folder / "text.txt").write_text(" ".join(text))
    return folder


@pytest.fixture
def nano(monkeypatch, corpus_folder):
    """Options that train the model ``nano`` on that text; registers the model."""
    monkeypatch.setitem(SIZES, "nano", NANO)
    return nano_options(corpus_folder)


def nano_options(corpus_folder):
    """The options of `nano` without registering the model."""
    return {
        "size": "nano",
        "source": "text",
        "path": corpus_folder,
        "cache-dir": corpus_folder / "cache",
        "vocab-size": 300,
        "sequence-length": 16,
        "batch-size": 4,
        "steps": 12,
        "dtype": "float32",
        "log-every": 5,
        "eval-every": 6,
        "checkpoint-every": 6,
        "tensorboard": False,
    }


@pytest.fixture(scope="module")
def even():
    """Registers the model `EVEN`; the runs of a module draw no pictures, which nobody looks at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "even", EVEN)
        patch.setattr(train.plots, "plot_run", lambda *_: None)
        yield


def even_options(corpus_folder):
    """The options of a run of `EVEN`, which refreshes several times, on any devices."""
    return {
        **nano_options(corpus_folder),
        "size": "even",
        "vocab-size": EVEN.vocab_size,
        "batch-size": 8,
        "optimizer": "gale_adamw",
        "rank": 4,
        "select": "query|down",  # one matrix of each layout: faster to compile
        "checkpoint-every": 0,
        "eval-every": 0,
    }


def words(options, **changes):
    """The command line of some options."""
    merged = {**options, **{key.replace("_", "-"): value for key, value in changes.items()}}
    return [word for key, value in merged.items() for word in (f"--{key}", str(value))]


@contextmanager
def small_files(limit):
    """No file may grow beyond ``limit`` bytes: writing then fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
