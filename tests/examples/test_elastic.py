"""A checkpoint of one mesh goes on with another, as if nothing had happened."""

import functools
import itertools
import shutil

import conftest
import jax
import numpy as np
import pytest
from rich.console import Console

from examples.flax_llama import cli, data, optimizers, train
from examples.flax_llama.checkpoint import Checkpoints, Progress
from examples.flax_llama.config import (
    DeviceOptions,
    ModelOptions,
    OptimizerOptions,
    TrainConfig,
    TrainingOptions,
)
from examples.flax_llama.data import DataConfig
from examples.flax_llama.metrics import read_records
from examples.flax_llama.step import first_state, make_train_step

STEPS, GAP, STOP = 10, 4, 6  # refreshes before steps 1, 5 and 9

# One matrix, and little to compile; another, found by the sketch, in few bits.
PLAIN = {"select": "down", "range_finder": "random"}
SMALL = {"select": "query", "projector_dtype": "int4"}  # and weights in 8 bits

pytestmark = [
    pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices"),
    pytest.mark.usefixtures("even"),
]


class Run:
    """A run on a mesh: its program is compiled once, and takes any steps."""

    def __init__(self, mesh, corpus_folder, small):
        optimization = OptimizerOptions(
            rank=4, update_proj_gap=GAP, state_dtype="int8", **(SMALL if small else PLAIN)
        )
        config = TrainConfig(
            optimizer="gale_adamw",
            optimization=optimization,
            training=TrainingOptions(steps=STEPS, batch_size=8, layerwise=small),
            model=ModelOptions(
                size="even", dtype="float32", param_dtype="int8" if small else "float32"
            ),
            data=DataConfig(
                source="text",
                path=corpus_folder,
                cache_dir=corpus_folder / "cache",
                vocab_size=conftest.EVEN.vocab_size,
                sequence_length=16,
            ),
            devices=DeviceOptions(mesh=mesh),
        )
        self.trainer = t = train.Trainer(config, data.load(config.data), Console(quiet=True))
        rate = optimizers.schedule(t.settings["learning_rate"], config.training)
        shardings = (t.shardings, t.layout.whole)
        step = make_train_step(t.model, t.tx, rate, 1, t.walk, shardings)
        self.batches = [t.layout.place(next(t.batches), 8) for _ in range(STEPS)]
        self.step = step.lower(t.shapes, self.batches[0]).compile()

    def go_on(self, state, steps):
        losses = []
        for batch in self.batches[int(state.step) :][:steps]:
            state, metrics = self.step(state, batch)
            losses.append(float(metrics["loss"]))
        return state, losses

    def save_on_the_way(self, folder):
        """Saves in the middle of a gap; returns the losses after that."""
        t = self.trainer
        state = first_state(t.model, t.tx, 0, t.walk, t.shardings)
        state, before = self.go_on(state, STOP)
        checkpoints = Checkpoints(folder, t.identity(), keep=1)
        checkpoints.save(STOP, state, Progress(None, 0.0))
        checkpoints.close()
        after = self.go_on(state, STEPS - STOP)[1]
        assert len({*before, *after}) == STEPS
        return after

    def restore(self, folder):
        checkpoints = Checkpoints(folder, self.trainer.identity(), keep=1)
        state, _ = checkpoints.restore(self.trainer.shapes)
        checkpoints.close()
        assert int(state.step) == STOP
        return self.go_on(state, STEPS - STOP)[1]


@pytest.fixture(scope="module")
def run_on(corpus_folder):
    return functools.cache(lambda mesh, small=False: Run(mesh, corpus_folder, small))


@pytest.fixture(scope="module")
def saved(run_on, tmp_path_factory):
    @functools.cache
    def save(mesh, small=False):
        folder = tmp_path_factory.mktemp("saved")
        return folder, run_on(mesh, small).save_on_the_way(folder)

    return save


SAVED = ["fsdp=8", "data=2,fsdp=2", "data=1"]
RESTORED = ["fsdp=8", "data=2,fsdp=2", "tensor=4", "fsdp=2", "data=1"]
QUICK = [("fsdp=8", "fsdp=8"), ("fsdp=8", "data=1"), ("data=1", "fsdp=8")]
PAIRS = [
    pair if pair in QUICK else pytest.param(*pair, marks=pytest.mark.slow)
    for pair in itertools.product(SAVED, RESTORED)
]


@pytest.mark.parametrize(("here", "there"), PAIRS)
def test_goes_on_elsewhere(here, there, saved, run_on):
    folder, undisturbed = saved(here)
    check(run_on(there).restore(folder), undisturbed, exactly=here == there)


@pytest.mark.slow
@pytest.mark.parametrize("there", ["fsdp=8", "fsdp=2,tensor=2"])
def test_with_everything_in_few_bits(there, saved, run_on):
    folder, undisturbed = saved("fsdp=8", small=True)
    got = run_on(there, small=True).restore(folder)
    check(got, undisturbed, exactly=there == "fsdp=8")


def check(losses, undisturbed, *, exactly):
    assert len(losses) == len(undisturbed) == STEPS - STOP
    np.testing.assert_allclose(losses, undisturbed, rtol=0 if exactly else 1e-4)


@pytest.mark.slow
def test_the_command_goes_on_with_another_mesh(corpus_folder, tmp_path, capsys):
    """From data to FSDP, with the data where it was."""
    options = {
        **conftest.even_options(corpus_folder),
        **{"optimizer": "adamw", "steps": STEPS, "checkpoint-every": STOP, "out": tmp_path},
    }
    del options["rank"], options["select"]
    assert cli.main(["train", *conftest.words(options, mesh="data=8")]) == 0
    through = losses_in(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / str(STEPS))
    (tmp_path / "result.json").unlink()
    assert cli.main(["train", *conftest.words(options, mesh="fsdp=4")]) == 0
    assert f"Going on from the checkpoint of step {STOP}" in capsys.readouterr().out
    got = losses_in(tmp_path)
    assert got[:STOP] == through[:STOP] and len(got) == len(through) == STEPS + 1
    np.testing.assert_allclose(got, through, rtol=1e-4)


def losses_in(folder):
    records = read_records(folder / "metrics.jsonl")
    rows = {(r["kind"], r["step"]): r["loss"] for r in records if "loss" in r}
    return [rows[key] for key in sorted(rows)]
