"""The command line: help, one line for what is wrong, the memory table."""

import os
import subprocess
import sys
from pathlib import Path

import conftest
import jax
import pytest

from examples.flax_llama import cli


def complaint(capsys, *words):
    """Runs a command that must fail; returns the one line that it says."""
    assert cli.main(list(words)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("trian", "unknown command 'trian'; choose from train, compare, memory"),
        ("train --ranj 3", "Unrecognized options: --ranj, 3. Did you mean --rank?"),
        ("train --steps", "Missing value for argument '--steps'"),
        ("train --steps ten", "--steps"),
        ("train --side up", "invalid choice 'up' for argument '--side'"),
        ("train --steps 0", "--steps must be at least 1, got 0"),
        ("train --batch-size -1", "--batch-size must be at least 1, got -1"),
        ("train --clip-norm nan", "--clip-norm must be 0 (off) or more"),
        ("train --warmup-fraction 2", "--warmup-fraction must be between 0 and 1"),
        ("train --log-every 0", "--log-every must be at least 1"),
        ("train --eval-every -1", "--eval-every must be 0 or more"),
        ("train --size 9b", "--size must be one of tiny, 60m"),
        ("train --loss-chunks 3", "--loss-chunks 3 must divide --sequence-length 256"),
        ("train --steps 2147483648", "--steps must be less than 2**31, got 2147483648"),
        ("train --projection-seed -1", "--projection-seed must be 0 or more, got -1"),
        ("train --projection-seed 2147483648", "--projection-seed must be less than 2**31"),
        ("train --update-proj-gap 2147483648", "--update-proj-gap must be less than 2**31"),
        ("train --vocab-size 10000000000", "--vocab-size must be less than 2**31"),
        ("train --source text", "needs a path"),
        ("train --source text --path /does/not/exist", "/does/not/exist does not exist"),
        ("compare", "nothing to compare"),
        ("compare --arm name=x", "optimizer= is missing"),
        ("memory --optimizers gale_adamw --select (", "gale_adamw: "),
        ("memory --optimizers gale_adamw --select nothing", "would project nothing"),
        ("train --kv-heads 3", "--kv-heads must divide the 4 heads of tiny, got 3"),
        ("train --kv-heads 0", "--kv-heads must divide the 4 heads of tiny, got 0"),
        ("memory --kv-heads -2", "--kv-heads must divide the 4 heads of tiny, got -2"),
        ("memory --optimizers adamw,nadam", "unknown optimizer 'nadam'"),
        ("memory --optimizers adamw --rank 3", "--rank is not an option of adamw"),
        ("memory --optimizers gale_adamw --size tiny --rank 0", "--rank must be at least 1"),
    ],
)
def test_one_clear_line(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in complaint(capsys, *words.split())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optimizer": "foo"}, "unknown optimizer 'foo'"),
        ({"optimizer": "adamw", "rank": 3}, "--rank is not an option of adamw"),
        ({"rank": 17}, "nothing would be projected"),
        ({"rank": 4, "select": "nothing"}, "would project nothing"),
        ({"rank": 4, "select": "("}, "gale_adamw: `select`"),
        ({"vocab_size": 2**30}, "--vocab-size of a trained BPE must be <= 1048576"),
        ({"learning_rate": "inf"}, "--learning-rate must be a positive number"),
        ({"batch_size": 100_000}, "too few tokens for one batch"),
        ({"sequence_length": 4096}, "--sequence-length must be at most 2048"),
    ],
)
def test_one_clear_line_once_the_data_is_there(changes, expected, nano, capsys, tmp_path):
    words = conftest.words(nano, **changes, out=tmp_path / "run")
    assert expected in complaint(capsys, "train", *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
@pytest.mark.parametrize("command", ["train", "compare --optimizers sgd"])
def test_the_fused_kernel_needs_a_gpu(command, capsys, tmp_path):
    words = [*command.split(), "--attention-backend", "cudnn", "--out", str(tmp_path / "run")]
    assert "--attention-backend cudnn needs an NVIDIA GPU" in complaint(capsys, *words)


def test_corrupt_and_empty_data(nano, capsys, tmp_path):
    corrupt = tmp_path / "corrupt"
    corrupt.mkdir()
    (corrupt / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    error = complaint(capsys, "train", *conftest.words(nano, path=corrupt, out=tmp_path / "run"))
    assert "a.jsonl, line 2: not valid JSON" in error
    empty = tmp_path / "empty"
    empty.mkdir()
    error = complaint(capsys, "train", *conftest.words(nano, path=empty, out=tmp_path / "run"))
    assert "no text in" in error


@pytest.mark.parametrize(
    ("command", "left", "expected"),
    [
        ("train", [], "there is no checkpoint, the same command starts from step 0"),
        ("train", ["checkpoints/9.orbax-checkpoint-tmp"], "there is no checkpoint, the same"),
        ("train", ["checkpoints/9"], "stopped; the same command goes on from the last checkpoint"),
        ("train --overwrite True", ["checkpoints/9"], "without --overwrite the same command goes"),
        ("compare --optimizers sgd", [], "stopped"),
        ("compare --optimizers sgd", ["results.json"], "runs what"),
        ("memory", None, "stopped"),
    ],
)
def test_ctrl_c_promises_what_there_is(command, left, expected, capsys, tmp_path, monkeypatch):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupt)
    for name in left or ():
        (tmp_path / name).mkdir(parents=True)
    out = [] if left is None else ["--out", str(tmp_path)]
    assert cli.main([*command.split(), *out]) == 130
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert left or "goes on" not in error


def test_folder_that_cannot_be_made(nano, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    words = conftest.words(nano, optimizer="sgd", out=tmp_path / "file" / "run")
    assert "Not a directory" in complaint(capsys, "train", *words)


def test_memory_table(capsys):
    assert cli.main(["memory", "--size", "7b", "--rank", "128", "--details", "True"]) == 0
    out = capsys.readouterr().out
    assert "layers/mlp/down/kernel" in out
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines() if "GiB" in line}
    adamw = rows["adamw"]
    # 6 738 415 616 weights in bfloat16, and two moments each.
    assert adamw[1:3] == ["12.55", "GiB"] and adamw[5:7] == ["25.10", "GiB"]
    assert "gale_adamw, rank 128" in rows and "galore, rank 128" in rows


def test_memory_of_grouped_queries(capsys):
    def weights(*words):
        assert cli.main(["memory", "--size", "7b", "--optimizers", "sgd", *words]) == 0
        row = capsys.readouterr().out.splitlines()[-1].split()
        assert row[0] == "sgd" and row[2] == "GiB"
        return float(row[1])

    # Keys and values of 32 layers, 4096 by 4096 each, shrink to a quarter; 2 bytes a weight.
    saved = 2 * 32 * 4096 * 4096 * 3 / 4 * 2 / 2**30
    assert weights() - weights("--kv-heads", "8") == pytest.approx(saved, abs=0.02)


def test_help_and_errors_in_a_process_of_its_own(tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}

    def run(*words):
        command = [sys.executable, "-m", "examples.flax_llama", *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    shown = run("train", "--help")
    assert shown.returncode == 0 and not shown.stderr
    for words in ("--update-proj-gap", "--checkpoint-every", "--source", "gale_muon"):
        assert words in shown.stdout
    refused = run("train", "--rank", "0")
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr == "error: --rank must be at least 1, got 0\n"
