"""The benchmark of layerwise training: its command lines, its limits, its tables, and a dry run."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from benchmarks import memory_plot, training_memory
from examples.flax_llama import cli, train
from examples.flax_llama.config import TrainConfig

GIB = 2**30
ON_CPU = pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")


@pytest.fixture
def config(tmp_path):
    ids = np.random.default_rng(0).integers(0, 64, 600).astype("<u2")
    for name in ("train", "validation"):
        ids.tofile(tmp_path / f"{name}.u16")
    return training_memory.Config(
        train=tmp_path / "train.u16",
        validation=tmp_path / "validation.u16",
        dry=True,
        runs=tmp_path / "runs",
        out=tmp_path / "results",
    )


def row(case, run="free", **values):
    known = {
        "case": case, "allocator": run, "limit_gib": None, "peak_bytes": 14 * GIB, "steps": 50,
        "weights_bytes": 12 * GIB, "state_bytes": GIB, "measured_state_bytes": GIB,
        "first_loss": 10.0, "last_loss": 8.0, "falls": True, "validation_loss": 8.5,
        "tokens_per_second": 1000.0,
    }  # fmt: skip
    return {**known, **values}


@pytest.mark.parametrize("dry", [False, True])
def test_every_command_line_is_one_that_the_example_takes(dry, config, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "check_backend", lambda name: None)
    folders = set()
    for name, case in training_memory.CASES.items():
        for run in case.runs:
            words = training_memory.command(
                dataclasses.replace(config, dry=dry), name, run, tmp_path / f"{name}-{run}"
            )
            assert words[:4] == [sys.executable, "-m", "examples.flax_llama", "train"]
            seen = []
            monkeypatch.setattr(cli, "_run", seen.append)
            assert cli.main(words[3:]) == 0
            (parsed,) = seen
            assert isinstance(parsed, TrainConfig)
            train.check(parsed)  # the optimizer has these options
            folders.add(parsed.folder)
            assert parsed.model.size == ("tiny" if dry else name.split(",")[0])
            assert parsed.output.checkpoint_every == 0 and parsed.overwrite
            if not dry:
                assert parsed.model.shape().vocab_size == parsed.data.vocab_size == 32000
                assert parsed.training.steps == case.steps or (case.limit and run == "free")
    assert len(folders) == sum(len(case.runs) for case in training_memory.CASES.values())


def test_every_check_is_about_a_case_that_can_show_it():
    rows = {
        (name, run): row(name, run, steps=case.steps)
        for name, case in training_memory.CASES.items()
        for run in case.runs
    }
    found = [check.found(rows) for check in training_memory.CHECKS]
    # Not those about states, which are as large as AdamW's, and about weights in 8 bits.
    assert [holds for _, holds in found].count(False) == 3
    assert found[1] == ("14.00 GiB", True) and found[0] == ("50 steps, 10.00 to 8.00", True)


def test_a_limit_is_a_share_of_the_whole_memory(config, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.1")
    found = training_memory.environment(config, 24, 96 * GIB)
    assert float(found["XLA_CLIENT_MEM_FRACTION"]) == 0.25
    assert found["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in found
    free = training_memory.environment(config, None, 96 * GIB)
    assert free["XLA_CLIENT_MEM_FRACTION"] == "0.950000"
    assert free["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"
    assert free["JAX_COMPILATION_CACHE_DIR"] == found["JAX_COMPILATION_CACHE_DIR"]
    assert "XLA_CLIENT_MEM_FRACTION" not in training_memory.environment(config, None, None)
    half = dataclasses.replace(config, share=0.5)
    shared = training_memory.environment(half, None, 96 * GIB)
    assert float(shared["XLA_CLIENT_MEM_FRACTION"]) == 0.5
    # A share is for runs without a limit; and what needs more than it has is not tried.
    assert training_memory.environment(half, 24, 96 * GIB) == found
    half = dataclasses.replace(half, dry=False)
    assert "needs 72 GiB" in training_memory.refusal(half, training_memory.WHOLE_SPEED, 96 * GIB)
    assert training_memory.refusal(half, training_memory.THIRTEEN, 48 * GIB) is None


@ON_CPU
def test_a_dry_run_stores_what_the_example_left(config, capsys, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "True")
    case = training_memory.ADAMW  # compiles fastest
    training_memory.main(dataclasses.replace(config, only=(case,)))
    (stored,) = config.out.glob("training_memory_*.json")
    record = json.loads(stored.read_text())
    (found,) = record["rows"]
    assert found["case"] == case and found["allocator"] == "free" and "error" not in found
    assert found["steps"] == 3 and 3 < found["validation_loss"] < 6
    assert found["tokens_per_second"] > 0 and found["state_bytes"] > 0
    assert found["peak_bytes"] is None and found["measured_state_bytes"] is None  # not counted
    assert record["runs"][0]["jax"] == jax.__version__
    assert f"| {case} | – | – |" in stored.with_suffix(".md").read_text()
    assert stored.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    training_memory.main(dataclasses.replace(config, only=(case,)))
    assert capsys.readouterr().out == ""  # it is not measured twice


def stub_process(monkeypatch, run):
    kept = {name: getattr(subprocess, name) for name in ("TimeoutExpired", "STDOUT")}
    monkeypatch.setattr(training_memory, "subprocess", SimpleNamespace(run=run, **kept))


def stub(monkeypatch, run):
    stub_process(monkeypatch, run)
    monkeypatch.setattr(training_memory, "total_memory", lambda: 100 * GIB)
    monkeypatch.setattr(training_memory, "draw", lambda *arguments: None)


def stored_rows(config):
    (stored,) = config.out.glob("training_memory_*.json")
    return json.loads(stored.read_text())["rows"]


def test_a_run_that_fails_is_told_and_tried_again(config, monkeypatch, capsys):
    calls = []

    def run(words, *, stdout, timeout, env, **_):
        calls.append((words, timeout, env))
        if len(calls) == 2:
            raise subprocess.TimeoutExpired(words, timeout)
        stdout.write("noise\nerror: out of memory: lower it\nmore\n")
        return SimpleNamespace(returncode=2)

    stub(monkeypatch, run)
    config = dataclasses.replace(config, only=(training_memory.BIG,), minutes=1.0)
    for _ in range(2):
        with pytest.raises(SystemExit, match="not measured: 7b, r = 1024, 8-bit states, limited"):
            training_memory.main(config)
    rows = {row["allocator"]: row for row in stored_rows(config)}
    assert "status 2: error: out of memory: lower it" in rows["limited"]["error"]
    assert len(rows) == 2 and len(calls) == 4
    assert calls[0][1] <= 60  # what is left of the minutes
    assert [float(env["XLA_CLIENT_MEM_FRACTION"]) for *_, env in calls[:2]] == [0.24, 0.95]
    assert "* 7b, r = 1024, 8-bit states, limited: status 2" in capsys.readouterr().out


def test_a_limit_that_the_allocator_did_not_take_is_an_error(config, monkeypatch):
    found = row("x") | {"limit_bytes": 30 * GIB}
    monkeypatch.setattr(training_memory, "read", lambda folder: found)

    def run(words, **_):
        folder = training_memory.Path(words[words.index("--out") + 1])
        (folder / "result.json").write_text("{}")
        return SimpleNamespace(returncode=0)

    stub_process(monkeypatch, run)
    trained = training_memory.train(config, training_memory.BIG, "limited", 100 * GIB, 10.0)
    assert trained["error"].endswith("not 24 GiB")
    found["limit_bytes"] = 24 * GIB
    assert "error" not in training_memory.train(
        config, training_memory.BIG, "limited", 100 * GIB, 10.0
    )


def test_what_does_not_fit_the_gpu_is_skipped_and_said(config, monkeypatch):
    stub(monkeypatch, None)
    monkeypatch.setattr(training_memory, "total_memory", lambda: 40 * GIB)
    config = dataclasses.replace(config, dry=False, only=(training_memory.WHOLE_SPEED,))
    with pytest.raises(SystemExit):
        training_memory.main(config)
    (found,) = stored_rows(config)
    assert found["error"] == "skipped: needs 72 GiB, and this GPU has 40"


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"only": ("nothing",)}, "no case 'nothing'"), ({"train": None}, "--train must be a file")],
)
def test_options_that_make_no_sense(changes, message, config):
    with pytest.raises(SystemExit, match=message):
        training_memory.main(dataclasses.replace(config, **changes))


def test_the_tables_say_what_holds():
    rows = [
        row(training_memory.BIG, "limited", limit_gib=24),
        row(training_memory.BIG, peak_bytes=20 * GIB),
        {"case": training_memory.SMALL, "allocator": "free", "error": "given up after 3 s"},
    ]
    lines = training_memory.tables(rows).splitlines()
    big = training_memory.BIG
    trains = "trains, the loss falls"
    assert f"| {big}: within 24 GiB | {trains} | 50 steps, 10.00 to 8.00 | yes |" in lines
    assert f"| {big}: peak | at most 19.5 GiB | 20.00 GiB | **no** |" in lines
    assert f"| {training_memory.SMALL}: peak | at most 14.5 GiB | – | – |" in lines
    assert any(line.startswith(f"| {big} | 24 | 14.00 | 12.00 | 1.00 | 50 |") for line in lines)
    assert lines[-1] == f"* {training_memory.SMALL}, free: given up after 3 s"


def test_the_picture_has_our_peaks_beside_the_published(tmp_path):
    drawn = tmp_path / "peaks.png"
    memory_plot.draw(drawn, [row(training_memory.BIG), {"case": "60m", "allocator": "free"}])
    memory_plot.draw(drawn, [])
    assert drawn.read_bytes().startswith(b"\x89PNG")
