"""A run that is stopped in the middle of a gap goes on exactly, with every saving of memory."""

import itertools

import chex
import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.flax_llama import optimizers
from examples.flax_llama.checkpoint import Checkpoints, Progress
from examples.flax_llama.config import ModelOptions, OptimizerOptions, TrainingOptions
from examples.flax_llama.model import Llama
from examples.flax_llama.step import Walk, make_train_step, trace_init

STEPS, STOP = 6, 3
COMBINATIONS = [
    *(
        pytest.param(*which, marks=pytest.mark.slow) if len({*which}) == 2 else which
        for which in itertools.product((False, True), repeat=4)
    ),
    (True, True, False, "previous"),
    (True, True, True, "two_pass"),
    (True, True, False, "weights"),
]


def batch(step):
    tokens = jax.random.randint(jax.random.key(step), (4, 16), 0, conftest.NANO.vocab_size)
    return {"tokens": tokens, "mask": jnp.ones((4, 16), bool)}


@pytest.mark.parametrize(("int8", "int4", "micro_batches", "layerwise"), COMBINATIONS)
def test_goes_on_exactly(int8, int4, micro_batches, layerwise, tmp_path):
    training = TrainingOptions(
        steps=STEPS,
        batch_size=4,
        micro_batches=2 if micro_batches else 1,
        layerwise=bool(layerwise),
        layerwise_clip=layerwise if layerwise in ("previous", "two_pass") else "hold",
    )
    training.check()
    options = OptimizerOptions(
        rank=4,
        select="down|out",  # one matrix of a kind, for shorter compilation
        range_finder="random",
        update_proj_gap=2,
        state_dtype="int8" if int8 else None,
        projector_dtype="int4" if int4 else None,
    )
    settings = optimizers.resolve("gale_adamw", options, conftest.NANO, STEPS)
    tx = optimizers.build("gale_adamw", settings, training)
    weights = ModelOptions(param_dtype="int8" if layerwise == "weights" else "float32")
    model, walk = Llama(conftest.NANO), Walk.of(training, weights)
    init = trace_init(model, tx, 0, walk)
    schedule = optimizers.schedule(settings["learning_rate"], training)
    state = init.lower().compile()()
    step = make_train_step(model, tx, schedule, 1, walk).lower(state, batch(0)).compile()

    losses = []
    with_checkpoint = Checkpoints(tmp_path, {}, keep=1)
    for i in range(STEPS):
        if i == STOP:
            with_checkpoint.save(i, state, Progress(None, 0.0))
            with_checkpoint.wait()
        state, metrics = step(state, batch(i))
        losses.append(float(metrics["loss"]))
    with_checkpoint.close()

    again = Checkpoints(tmp_path, {}, keep=1)
    resumed, _ = again.restore(init.out_info)
    again.close()
    assert int(resumed.step) == STOP
    for i in range(STOP, STEPS):
        resumed, metrics = step(resumed, batch(i))
        assert float(metrics["loss"]) == losses[i]
    chex.assert_trees_all_equal(resumed, state)
    assert np.isfinite(losses).all() and len(set(losses)) == STEPS
