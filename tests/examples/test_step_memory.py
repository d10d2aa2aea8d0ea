"""The memory of a whole training step: table, verdict, picture, and what is refused."""

import dataclasses

import conftest
import jax
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

from examples.flax_llama import cli, optimizers, plots, step_memory
from examples.flax_llama.config import MemoryConfig, ModelOptions, OptimizerOptions, TrainingOptions
from examples.flax_llama.model import Llama
from examples.flax_llama.sizes import SIZES
from examples.flax_llama.step import make_train_step, trace_init
from optax_gale import LargestBatch, StepMemoryReport

MIB = 2**20


@pytest.fixture
def nano(monkeypatch):
    monkeypatch.setitem(SIZES, "nano", conftest.NANO)


def setting(optimizer="gale_adamw", **options):
    size = conftest.NANO
    settings = optimizers.resolve(optimizer, OptimizerOptions(**options), size, 12)
    tx = optimizers.build(optimizer, settings, TrainingOptions(steps=12))
    model = Llama(size)
    return model, tx, trace_init(model, tx, seed=0).out_info


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_the_report_is_of_the_step_that_training_takes():
    model, tx, state = setting(rank=4, range_finder="random")  # which compiles quickly
    report = step_memory.step_report(model, tx, state, (4, 16), loss_chunks=2)
    assert report.weights == nbytes(state.params)
    assert report.state == nbytes(state.opt_state) and report.projectors > 0
    assert report.inputs == 4 * 16 * (4 + 1) + 4  # tokens, mask, and the number of the step
    assert report.copied == 0  # the state is donated
    step = make_train_step(model, tx, optax.constant_schedule(0.0), 2)
    stats = step.lower(state, step_memory.batch_shapes((4, 16))).compile().memory_analysis()
    assert report.temporaries == stats.temp_size_in_bytes
    assert report.peak == stats.argument_size_in_bytes + (
        stats.output_size_in_bytes - stats.alias_size_in_bytes + stats.temp_size_in_bytes
    )


def test_the_largest_batch_of_a_model(monkeypatch):
    asked = []

    def report_of(model, tx, state, shape, *, loss_chunks, budget, walk):
        asked.append(shape)
        assert loss_chunks == 2 and budget == "1GB" and walk.micro_batches == 1
        return dataclasses.replace(example(), activations=shape[0] * MIB)

    monkeypatch.setattr(step_memory, "step_report", report_of)
    config = MemoryConfig(
        sequence_length=16, budget="1GB", model=ModelOptions(size="tiny", loss_chunks=2)
    )
    found = step_memory.measure(config, None, None, None, 8)
    assert found.report.activations == 8 * MIB
    size = found.largest.size
    held = found.report.peak - found.report.activations
    assert held + size * MIB <= 10**9 < held + (size + 1) * MIB
    assert len(asked) == len(set(asked)) and asked[0] == (8, 16)
    without = dataclasses.replace(config, budget=None)
    monkeypatch.setattr(step_memory, "step_report", lambda *_, **__: example())
    assert step_memory.measure(without, None, None, None, 8).largest is None


def example(**changes):
    parts = dict(
        weights=100 * MIB, moments=200 * MIB, projectors=0, other=MIB, inputs=2 * MIB,
        results=MIB, gradients=90 * MIB, activations=300 * MIB, work_space=10 * MIB,
    )  # fmt: skip
    rest = {"told_apart": True, "copied": 0, "platform": "gpu", "budget": 10**9}
    return StepMemoryReport(**(parts | rest | changes))


def test_the_table_of_several_optimizers():
    found = {
        "adamw": step_memory.StepMemory(example(), LargestBatch(21, example(), {})),
        "sgd": step_memory.StepMemory(
            example(weights=2**30, platform="cpu"), LargestBatch(0, None, {})
        ),
    }
    config = MemoryConfig(batch_size=8, budget="1GB")
    title, text, notes = step_memory.table(config, found).split("\n\n")
    assert title == "One step of LLaMA tiny with 8 sequences of 256 tokens, bfloat16 weights"
    header, adamw, sgd = text.splitlines()
    assert header.split("  ")[-2:] == ["fits in 1GB", "largest batch"]
    cells = [cell.strip() for cell in adamw.split("  ") if cell.strip()]
    assert cells == [
        "adamw", "100.00 MiB", "200.00 MiB", "0 B", "90.00 MiB", "300.00 MiB", "10.00 MiB",
        "4.00 MiB", "704.00 MiB", "yes", "21",
    ]  # fmt: skip
    assert sgd.split()[-2:] == ["no", "none"]
    assert notes.count("estimated") == 1 and notes.count("compiled for cpu") == 1
    without = dataclasses.replace(config, budget=None)
    found = {"adamw": step_memory.StepMemory(example(budget=None), None)}
    assert "fits" not in step_memory.table(without, found)


@pytest.mark.slow
def test_the_command(nano, capsys, tmp_path):
    words = ["memory", "--size", "nano", "--optimizers", "sgd"]
    words += ["--batch-size", "4", "--sequence-length", "16", "--budget", "1.5MB"]
    words += ["--dtype", "float32", "--remat", "True", "--loss-chunks", "2"]
    picture = tmp_path / "memory.png"
    assert cli.main([*words, "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "no activations" in out  # the table of shapes is still there
    rows = [line.split() for line in out.splitlines() if line.split()[-2:-1] == ["yes"]]
    assert [row[0] for row in rows] == ["sgd"]
    assert all(int(row[-1]) >= 4 for row in rows)
    assert "compiled for cpu" in out
    assert picture.stat().st_size > 10_000


def test_without_a_batch_size_nothing_is_compiled(nano, capsys, monkeypatch):
    def never(*_, **__):
        raise AssertionError("compiled")

    monkeypatch.setattr(jax.stages.Lowered, "compile", never)
    assert cli.main(["memory", "--size", "nano", "--optimizers", "sgd"]) == 0
    assert "peak" not in capsys.readouterr().out


def test_the_picture(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: saved.append(self))
    reports = {"adamw": example(), "$a": example(weights=2**30, budget=10**9)}
    plots.plot_step_memory(tmp_path / "a.png", reports)
    (axes,) = saved[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["adamw", r"\$a"]
    labels = [bar.get_label() for bar in axes.containers]
    assert labels == [
        "weights", "moments", "other state", "inputs", "results", "gradients", "activations",
        "work space",
    ]  # fmt: skip
    for i, report in enumerate(reports.values()):
        bars = [container.patches[i] for container in axes.containers]
        ends = np.array([bar.get_x() + bar.get_width() for bar in bars])
        np.testing.assert_allclose([bar.get_x() for bar in bars], [0, *ends[:-1]], atol=1e-9)
        assert ends[-1] == pytest.approx(report.peak / 2**30)
    assert axes.lines[0].get_xdata()[0] == pytest.approx(10**9 / 2**30)
    plots.plot_step_memory(tmp_path / "a.png", {"adamw": example(budget=None)})
    assert not saved[1].axes[0].lines and saved[1].axes[0].get_xlabel() == "MiB"


def test_a_picture_that_cannot_be_written(nano, capsys, tmp_path, monkeypatch):
    report = step_memory.StepMemory(example(budget=None), None)
    monkeypatch.setattr(step_memory, "measure", lambda *_: report)
    words = ["memory", "--size", "nano", "--optimizers", "sgd", "--batch-size", "2"]
    missing = tmp_path / "missing" / "a.png"
    assert cli.main([*words, "--picture", str(missing)]) == 2
    error = capsys.readouterr().err
    assert f"cannot write {missing}: No such file" in error and "--picture" in error


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--budget 24GB", "--budget is about the whole step: add --batch-size"),
        ("--picture a.png", "--picture is about the whole step: add --batch-size"),
        ("--batch-size 0", "--batch-size must be at least 1, got 0"),
        ("--batch-size 1 --sequence-length 0", "--sequence-length must be at least 1"),
        ("--batch-size 1 --sequence-length 4096", "--sequence-length must be at most 2048"),
        ("--batch-size 1 --loss-chunks 3", "--loss-chunks 3 must divide --sequence-length 256"),
        ("--batch-size 1 --budget 24G", "--budget: a budget of memory must be a positive number"),
        ("--batch-size 1 --picture a.bmp", "--picture must end in .png, .svg, .pdf, got a.bmp"),
    ],
)
def test_one_clear_line(words, expected, capsys):
    assert cli.main(["memory", *words.split()]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_the_fused_kernel_needs_a_gpu(capsys):
    words = ["memory", "--batch-size", "1", "--attention-backend", "cudnn"]
    assert cli.main(words) == 2
    assert "--attention-backend cudnn needs an NVIDIA GPU" in capsys.readouterr().err
