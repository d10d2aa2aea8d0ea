"""Several processes train together: the same numbers, one set of files, and an end to waiting."""

import time
from pathlib import Path

import conftest
import grain
import jax
import numpy as np
import pytest

from benchmarks.groups import Group
from examples.flax_llama import cli, processes
from examples.flax_llama.checkpoint import Checkpoints
from examples.flax_llama.data import Corpus, batches, train_batches, validation_batches
from examples.flax_llama.data.corpus import Stream, windows
from examples.flax_llama.errors import LostError, UserError
from examples.flax_llama.layout import Layout
from examples.flax_llama.metrics import read_records

# The same as the fixture `even`, for a process of its own.
CHILD = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import conftest
from examples.flax_llama import cli
from examples.flax_llama.sizes import SIZES
SIZES["even"] = conftest.EVEN
sys.exit(cli.main(sys.argv[1:]))
"""
STEPS, SAVED = 120, 20
LOST_AFTER, AT_MOST = 10, 90  # seconds; a busy machine may need a while to end processes
CHANGES = {
    "steps": STEPS,
    "select": "query",
    "update-proj-gap": 15,
    "checkpoint-every": SAVED,
    "eval-every": 50,
    "log-every": 5,
    "progress": False,
}

pytestmark = [
    pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices"),
    pytest.mark.usefixtures("even"),
]


@pytest.fixture(scope="module")
def options(corpus_folder):
    return {**conftest.even_options(corpus_folder), **CHANGES}


@pytest.fixture(scope="module")
def undisturbed(options, tmp_path_factory):
    """The losses of a single process."""
    folder = tmp_path_factory.mktemp("alone")
    assert cli.main(["train", *conftest.words(options, out=folder)]) == 0
    return losses(folder)


def losses(folder):
    """Of every step, and of every validation; each must be there once."""
    records = read_records(folder / "metrics.jsonl")
    found = [((r["kind"], r["step"]), r["loss"]) for r in records if "loss" in r]
    assert len(found) == len(dict(found))
    return dict(found)


def assert_close(got, wanted):
    assert got.keys() == wanted.keys()
    np.testing.assert_allclose([got[key] for key in wanted], [*wanted.values()], rtol=1e-4)


def start(count, options, folder, environment, **changes):
    words = conftest.words(options, out=folder, **{"lost_after": LOST_AFTER, **changes})
    return Group(count, CHILD, ["train", *words], devices=4 // count, environment=environment)


def kill_in_mid_run(group, number, folder):
    """Kills a process after a checkpoint; returns the losses until then, and what others say."""
    deadline = time.monotonic() + 200
    while not past_a_checkpoint(folder):
        assert group.running, group.wait(1)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    group.kill(number)
    ended = group.wait(AT_MOST)
    last = max(checkpoints(folder))
    assert last < STEPS
    for i, (status, _, error) in enumerate(ended):
        assert status != 0
        lines = [line for line in error.splitlines() if line.startswith("error: process")]
        assert lines, error
        assert any("Start all of them again" in line for line in lines)
        assert any(f"process {i} of" in line for line in lines)
    return {key: loss for key, loss in losses(folder).items() if key[1] > last}


def checkpoints(folder):
    return [int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit()]


def past_a_checkpoint(folder):
    """Whether there is one, and what follows it is not lost with the next."""
    reached = max((step for kind, step in losses(folder) if kind == "train"), default=0)
    latest = max(checkpoints(folder), default=STEPS)
    return latest + 5 <= reached <= latest + SAVED // 2


@pytest.mark.slow
def test_the_first_of_two_is_killed(options, undisturbed, tmp_path, environment):
    with start(2, options, tmp_path, environment, mesh="fsdp=4") as group:
        lost = kill_in_mid_run(group, 0, tmp_path)

    with start(2, options, tmp_path, environment, mesh="fsdp=4") as group:
        ended = group.wait(200)
    assert [status for status, *_ in ended] == [0, 0], ended
    (_, said, _), (_, other, error) = ended
    assert "Mesh: data 1, fsdp 4, tensor 1; 4 × cpu in 2 processes." in said
    assert "Going on from the checkpoint of step" in said
    assert "error" not in error
    # One process speaks and writes, and the checkpoint is of both.
    assert all(line.startswith("[Gloo]") for line in other.splitlines())
    assert {*checkpoints(tmp_path)} == {STEPS - SAVED, STEPS}
    assert len([*tmp_path.glob("metrics.jsonl*")]) == 1
    got = losses(tmp_path)
    assert_close(got, undisturbed)
    # What was computed before the end is computed again, to the last bit.
    assert lost and {key: got[key] for key in lost} == lost

    # A single process reads what two have written.
    words = conftest.words(options, out=tmp_path)
    assert cli.main(["train", *words]) == 0
    assert losses(tmp_path) == got


@pytest.mark.slow
def test_one_of_four_is_killed_and_one_process_goes_on(
    options, undisturbed, tmp_path, environment, capsys
):
    with start(4, options, tmp_path, environment, mesh="data=2,fsdp=2") as group:
        assert kill_in_mid_run(group, 2, tmp_path)
    assert cli.main(["train", *conftest.words(options, out=tmp_path, mesh="tensor=2")]) == 0
    assert "Going on from the checkpoint of step" in capsys.readouterr().out
    assert_close(losses(tmp_path), undisturbed)


# --- Each process reads its own share of the data ---

LENGTH = 4


@pytest.fixture
def short_window(monkeypatch):
    monkeypatch.setattr(batches, "_SHUFFLE_WINDOW", 7)


PARTITIONS = [
    [range(6)],
    [range(3), range(3, 6)],
    [[0, 1], [2, 3], [4, 5]],
    [[5], [0, 4], [1, 2, 3]],
    [[i] for i in range(6)],
]


class Texts(grain.IterDataset):
    """Numbers as texts, in order, as a stream of documents has them."""

    def __init__(self, numbers, epochs):
        super().__init__()
        self._all = [str(i) for i in numbers], epochs

    def __iter__(self):
        texts, epochs = self._all
        return iter(grain.MapDataset.source(texts).repeat(epochs).to_iter_dataset())


def make_stream(numbers):
    def encode(texts):
        first = np.array([int(text) * LENGTH for text in texts], np.int32)
        tokens = first[:, None] + np.arange(LENGTH, dtype=np.int32)
        return {"tokens": tokens, "mask": tokens % 5 > 0}

    return Stream(lambda seed, epochs: Texts(numbers, epochs), encode)


def make_corpus(kind):
    """23 sequences to train on and 8 to validate on: the last batch of 6 has 2."""
    if kind == "sequences":
        ids = np.arange(31 * LENGTH, dtype=np.uint16)
        train, validation = windows(ids[: 23 * LENGTH], LENGTH), windows(ids[23 * LENGTH :], LENGTH)
    else:
        train, validation = make_stream(range(23)), make_stream(range(23, 31))
    return Corpus(
        description="counting",
        fingerprint="",
        validation_fingerprint="",
        vocab_size=31 * LENGTH,
        sequence_length=LENGTH,
        train=train,
        validation=validation,
    )


@pytest.mark.parametrize("kind", ["sequences", "stream"])
@pytest.mark.parametrize("parts", PARTITIONS, ids=len)
@pytest.mark.quick("2-sequences", "3_1-stream")
def test_the_parts_make_up_the_batches(parts, kind, short_window):
    corpus = make_corpus(kind)
    whole = train_batches(corpus, 6, seed=1)
    own = [train_batches(corpus, 6, seed=1, rows=rows) for rows in parts]
    for _ in range(9):  # more than two epochs
        assert_parts([next(each) for each in own], next(whole), parts)
        assert all(each.get_state() == whole.get_state() for each in own)
    # A position that one has stored is that of all.
    for each in own:
        each.set_state(whole.get_state())
    assert_parts([next(each) for each in own], next(whole), parts)


@pytest.mark.parametrize("kind", ["sequences", "stream"])
@pytest.mark.parametrize("parts", PARTITIONS, ids=len)
def test_the_parts_make_up_the_validation(parts, kind):
    corpus = make_corpus(kind)
    whole = [*validation_batches(corpus, 6)]
    own = [[*validation_batches(corpus, 6, rows=rows)] for rows in parts]
    assert len(whole) == 2 and not whole[1]["mask"][2:].any()
    for i, batch in enumerate(whole):
        assert_parts([each[i] for each in own], batch, parts)


def assert_parts(parts, whole, rows):
    for name, x in whole.items():
        assert x.dtype == parts[0][name].dtype and len(x) == 6
        for part, own in zip(parts, rows, strict=True):
            np.testing.assert_array_equal(part[name], x[list(own)])


@pytest.mark.parametrize("axes", [(8, 1, 1), (1, 4, 1), (2, 2, 2), (1, 1, 4)])
def test_a_batch_is_put_together(axes):
    """From rows in any order, as a process that has only some of them holds them."""
    layout = Layout.of(dict(zip(("data", "fsdp", "tensor"), axes, strict=True)))
    assert layout.own_rows(8) is None  # a single process has all
    tokens = np.arange(8 * LENGTH).reshape(8, LENGTH)
    placed = layout.place({"tokens": tokens}, 8)["tokens"]
    assert placed.sharding.is_equivalent_to(layout.batch, 2)
    np.testing.assert_array_equal(placed, tokens)
    rows = [0, 1, 2, 3, 4, 5, 6, 7]
    np.testing.assert_array_equal(layout.place({"tokens": tokens}, 8, rows)["tokens"], tokens)


# --- Who is gone, and who was started otherwise ---


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        ("UNKNOWN: Gloo all-reduce failed: Read error: Connection reset by peer", True),
        ("INTERNAL: NCCL operation ncclAllReduce failed: remote process exited", True),
        ("UNAVAILABLE: The following tasks are unhealthy", True),
        ("DEADLINE_EXCEEDED: Barrier timed out", True),
        ("RESOURCE_EXHAUSTED: Out of memory, of which NCCL has 2 GiB", False),
        ("INVALID_ARGUMENT: an optimization-barrier of other shapes", False),
    ],
)  # fmt: skip
def test_what_says_that_a_process_is_gone(said, lost, monkeypatch):
    error = ValueError(said)  # Orbax wraps what JAX raises
    assert not processes.is_lost(error)  # a single process has nobody to lose
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert processes.is_lost(error) == lost
    with pytest.raises(LostError if lost else ValueError) as raised, processes.explained():
        raise error
    if lost:
        assert raised.value.status == 75 and "Start all of them again" in str(raised.value)


def test_a_lost_process_is_no_damaged_checkpoint(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, {}, keep=1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(RuntimeError, match="reset by peer"), checkpoints._reported("read"):
        raise RuntimeError("Gloo all-reduce failed: Connection reset by peer")


@pytest.mark.parametrize("changed", [{}, {"--eval-every": 7}])
def test_processes_started_otherwise_do_not_go_on(changed, monkeypatch):
    mine, sent = {"--steps": 3, "--eval-every": 5}, []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    gather = lambda x: sent.append(x) or np.stack([x, x])
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gather)
    processes.agree(mine)
    gather = lambda x: np.stack([sent[0], x])
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gather)
    if changed:
        with pytest.raises(UserError, match="process 1 has other options"):
            processes.agree({**mine, **changed})
    else:
        processes.agree(dict(reversed(mine.items())))
