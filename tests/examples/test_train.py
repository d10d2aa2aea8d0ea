"""Whole runs: resuming after a kill, finishing twice, refreshes chosen by the host."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import conftest
import jax
import pytest

from examples.flax_llama import cli
from examples.flax_llama.metrics import read_records
from examples.flax_llama.sizes import count_params

STEPS = 200
CHANGES = {
    "steps": STEPS,
    "optimizer": "gale_adamw",
    "rank": 4,
    "select": "down|query",
    "checkpoint-every": 20,
    "eval-every": 70,
}

# The same as the fixture `nano`, for a process of its own.
CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest
from examples.flax_llama import cli
from examples.flax_llama.sizes import SIZES
SIZES["nano"] = conftest.NANO
sys.exit(cli.main(sys.argv[2:]))
"""


def records(folder, kind):
    return [r for r in read_records(folder / "metrics.jsonl") if r["kind"] == kind]


def train(*arguments):
    assert cli.main(["train", *arguments]) == 0


@pytest.fixture(scope="module")
def whole(corpus_folder, tmp_path_factory):
    """The folder of a run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    options = {**conftest.nano_options(corpus_folder), **CHANGES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(conftest.SIZES, "nano", conftest.NANO)
        train(*conftest.words(options, out=folder, tensorboard=True))
    return folder


@pytest.fixture
def options(nano):
    return {**nano, **CHANGES}


def test_a_run_leaves_everything_behind(whole):
    train_records = records(whole, "train")
    assert [r["step"] for r in train_records] == list(range(1, STEPS + 1))
    assert train_records[-1]["loss"] < train_records[0]["loss"] - 1  # it learns
    assert [r["step"] for r in records(whole, "validation")] == [70, 140, 200]
    assert {path.name for path in (whole / "checkpoints").iterdir()} == {"180", "200"}
    assert list((whole / "tensorboard").iterdir())
    assert (whole / "report.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((whole / "result.json").read_text())
    assert result["loss"] == records(whole, "validation")[-1]["loss"]
    memory = json.loads((whole / "memory.json").read_text())
    counted = jax.local_devices()[0].memory_stats() is not None
    assert (memory["peak_bytes"] is not None) == counted
    assert memory["weights_bytes"] == 4 * count_params(conftest.NANO)
    assert result["tokens_per_second"] > 0 and result["optimizer_bytes"] > 0


def test_killed_and_started_again_gives_the_same_numbers(
    options, whole, tmp_path, capsys, environment
):
    here = Path(__file__).parent
    words = ["train", *conftest.words(options, out=tmp_path)]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(here), *words],
        cwd=here.parents[1],
        env={**os.environ, **environment, "PYTHONPATH": str(here.parents[1])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 200
    # Past some checkpoints, in the middle of a gap of 50 steps.
    while not any(r["step"] > 90 for r in records(tmp_path, "train")):
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    child.stderr.close()
    assert len(records(tmp_path, "train")) < STEPS

    assert cli.main(words) == 0
    assert "Going on from the checkpoint of step" in capsys.readouterr().out
    # Every loss, to the last bit, and each of them once.
    assert records(tmp_path, "train") == records(whole, "train")
    assert records(tmp_path, "validation") == records(whole, "validation")


@pytest.mark.slow
def test_everything_that_saves_memory_goes_on_bit_for_bit(nano, tmp_path, capsys):
    words = conftest.words(
        nano, optimizer="gale_adamw", rank=4, update_proj_gap=4, state_dtype="int8",
        projector_dtype="int4", layerwise=True, micro_batches=2, param_dtype="int8",
        select="down|query", out=tmp_path,
    )  # fmt: skip
    train(*words)
    through = [records(tmp_path, kind) for kind in ("train", "validation")]
    # As if it had been stopped after its first checkpoint, which is in the middle of a gap.
    shutil.rmtree(tmp_path / "checkpoints" / "12")
    (tmp_path / "result.json").unlink()
    capsys.readouterr()
    train(*words)
    assert "Going on from the checkpoint of step 6" in capsys.readouterr().out
    assert [records(tmp_path, kind) for kind in ("train", "validation")] == through


@pytest.mark.slow
def test_finished_run_is_validated_again_and_nothing_else(options, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    train(*conftest.words(options, out=tmp_path / "run"))
    assert "is finished: 200 steps" in capsys.readouterr().out
    for name in ("metrics.jsonl", "result.json"):
        assert (tmp_path / "run" / name).read_text() == (whole / name).read_text()

    train(*conftest.words(options, out=tmp_path / "run", overwrite=True))
    assert "is finished" not in capsys.readouterr().out
    assert records(tmp_path / "run", "speed") != records(whole, "speed")
    assert records(tmp_path / "run", "train") == records(whole, "train")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rank": 3}, "--rank is 3 here and 4 there"),
        ({"optimizer": "gale_lion"}, "--optimizer is gale_lion here and gale_adamw there"),
        ({"batch_size": 2}, "--batch-size is 2 here and 4 there"),
        ({"steps": 300}, "--steps is 300 here and 200 there"),
        ({"kv_heads": 2}, "--kv-heads is 2 here and 1 there"),
        ({"sequence_length": 8}, "the training data's hash is"),
    ],
)
def test_other_settings_are_refused_and_named(changes, named, options, whole, capsys):
    assert cli.main(["train", *conftest.words(options, out=whole, **changes)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "is of another run" in error and named in error


@pytest.mark.slow
def test_a_result_of_other_settings_is_not_replaced(nano, tmp_path, capsys):
    changes = {"optimizer": "sgd", "steps": 2, "checkpoint_every": 0, "out": tmp_path}
    train(*conftest.words(nano, **changes))
    train(*conftest.words(nano, **changes))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {"metrics.jsonl", "result.json", "report.png"} <= {*before}

    capsys.readouterr()
    other = conftest.words(nano, **changes, learning_rate=0.1)
    assert cli.main(["train", *other]) == 2
    error = capsys.readouterr().err
    assert "result.json is of another run: --learning-rate is 0.1 here and 0.5 there" in error
    assert "--overwrite True" in error and error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    train(*other, "--overwrite", "True")
    (tmp_path / "result.json").write_text("{}")
    assert cli.main(["train", *other]) == 2
    assert "result.json is not readable" in capsys.readouterr().err


@pytest.mark.slow
def test_the_host_chooses_the_refreshes_that_the_device_would(options, whole, tmp_path):
    train(*conftest.words(options, host_refresh=True, checkpoint_every=0, out=tmp_path))
    by_host, by_device = (records(folder, "train") for folder in (tmp_path, whole))
    losses = [[r["loss"] for r in rows[:120]] for rows in (by_host, by_device)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_one_process_a_folder(nano, tmp_path, capsys):
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert cli.main(["train", *conftest.words(nano, optimizer="sgd", out=tmp_path)]) == 2
    assert "another process is training in" in capsys.readouterr().err


def test_a_folder_is_needed(nano, tmp_path, capsys):
    out = tmp_path / "file"
    out.touch()
    assert cli.main(["train", *conftest.words(nano, optimizer="sgd", out=out)]) == 2
    assert f"--out {out} cannot be a folder: File exists" in capsys.readouterr().err
