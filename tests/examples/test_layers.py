"""The model layer by layer and in micro-batches trains as it does whole."""

import dataclasses
import functools

import chex
import conftest
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_gale
from examples.flax_llama import cli, optimizers
from examples.flax_llama.config import MemoryConfig, ModelOptions, OptimizerOptions, TrainingOptions
from examples.flax_llama.model import Llama, next_token_loss
from examples.flax_llama.step import (
    WHOLE,
    Walk,
    first_state,
    layered,
    make_evaluate,
    make_train_step,
)
from optax_gale import LayerwiseState

TIED = conftest.LlamaSize(
    300, hidden=16, intermediate=20, layers=2, heads=2, kv_heads=1, tied=True, padding=4
)


def batch(seed):
    """With lines of very different lengths."""
    tokens = jax.random.randint(jax.random.key(seed), (4, 16), 0, 300)
    lengths = jnp.asarray([16, 3, 9, 1])[:, None]
    return {"tokens": tokens, "mask": jnp.arange(16)[None] < lengths}


def train(tx, walk=WHOLE, size=conftest.NANO, chunks=1, steps=4):
    model = Llama(size)
    state = first_state(model, tx, 0, walk)
    step = make_train_step(model, tx, optax.constant_schedule(1.0), chunks, walk)
    history = []
    for i in range(steps):
        state, metrics = step(state, batch(i))
        history.append(jax.device_get(metrics))
    return state, history


def assert_same(got, wanted, keys=("loss", "grad_norm")):
    chex.assert_trees_all_close(got[0].params, wanted[0].params, atol=2e-5)
    for x, y in zip(got[1], wanted[1], strict=True):
        for key in keys:
            np.testing.assert_allclose(x[key], y[key], rtol=2e-5)


@pytest.mark.parametrize("size", [conftest.NANO, TIED], ids=["untied", "tied"])
@pytest.mark.quick("untied")
def test_layer_by_layer(size):
    tx = optax.sgd(0.1)
    wanted = train(tx, size=size)
    for activations in ("recompute", "keep"):
        walk = Walk(layerwise=True, activations=activations)
        assert_same(train(tx, walk, size, chunks=2), wanted)


@pytest.mark.parametrize("walk", [Walk(4), Walk(4, layerwise=True)], ids=["whole", "layerwise"])
def test_micro_batches_count_tokens_not_lines(walk):
    tx = optax.sgd(0.1)
    summed = tx if walk.layerwise else optax_gale.accumulate(tx, 4)
    assert_same(train(summed, walk), train(tx), keys=("loss",))


def test_the_options_arrive():
    training = TrainingOptions(
        batch_size=4, layerwise=True, clip_norm=0.3, layerwise_clip="previous"
    )
    walk = Walk.of(training, ModelOptions())
    assert walk == Walk(1, True, 0.3, "previous")
    keeping = dataclasses.replace(training, layerwise_activations="keep")
    assert Walk.of(keeping, ModelOptions()) == walk._replace(activations="keep")
    of_memory = MemoryConfig(batch_size=4, layerwise=True, layerwise_activations="keep")
    assert of_memory.training().layerwise_activations == "keep"
    settings = optimizers.resolve("sgd", OptimizerOptions(), conftest.NANO, 4)
    tx = optimizers.build("sgd", settings, training)
    state, history = train(tx, walk)
    assert isinstance(state.opt_state, LayerwiseState)
    np.testing.assert_allclose(state.opt_state.grad_norm, history[-1]["grad_norm"])
    whole = Walk.of(TrainingOptions(batch_size=4, micro_batches=2, clip_norm=0.3), ModelOptions())
    assert whole == Walk(2, False, 0.0, "hold")


def test_pieces_have_the_loss_of_the_whole():
    model = Llama(conftest.NANO)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    given = {**batch(0), "weight": jnp.float32(0.25)}
    total, _ = jax.jit(functools.partial(next_token_loss, model))(params, given)
    in_pieces = jax.jit(layered(model).loss)(params, given)
    np.testing.assert_allclose(in_pieces, 0.25 * total, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batches": 3}, "--micro-batches 3 must divide --batch-size 4"),
        ({"micro_batches": 0}, "--micro-batches must be at least 1, got 0"),
        (
            {"param_dtype": "int8"},
            "--param-dtype int8 reads weights layer by layer: add --layerwise",
        ),
        ({"layerwise_clip": "previous"}, "--layerwise-clip is for --layerwise True"),
        ({"layerwise_activations": "keep"}, "--layerwise-activations is for --layerwise True"),
        (
            {"layerwise": True, "optimizer": "gale_adamw", "rank": 4, "residual": "fira"},
            "residual='fira' needs the gradient itself",
        ),
        (
            {"layerwise": True, "optimizer": "optax_galore", "rank": 4},
            "does not take the step of a single layer",
        ),
    ],
)
def test_refused_in_one_line(changes, message, nano, tmp_path, capsys):
    options = {"optimizer": "sgd", "out": tmp_path, **changes}
    assert cli.main(["train", *conftest.words(nano, **options)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.slow
def test_weights_in_8_bits():
    """They begin as the others do, train like them, and are validated as what they stand for."""
    training = TrainingOptions(batch_size=4, layerwise=True)
    narrow = Walk.of(training, ModelOptions(param_dtype="int8"))
    wide = Walk.of(training, ModelOptions())
    tx, size = optax.sgd(0.1), dataclasses.replace(conftest.NANO, hidden=32)
    assert narrow.in_8_bits and not wide.in_8_bits
    state, history = train(tx, narrow, size)
    _, wanted = train(tx, wide, size)
    codes = [x for x in jax.tree.leaves(state.params) if x.dtype == jnp.int8]
    assert len(codes) == 7
    for got, other in zip(history, wanted, strict=True):
        np.testing.assert_allclose(got["loss"], other["loss"], rtol=0.01)
    model = Llama(size)
    evaluate = make_evaluate(model)
    full = optax_gale.dequantize_weights(state.params)
    got, other = evaluate(state.params, [batch(9)]), evaluate(full, [batch(9)])
    assert got.tokens == other.tokens
    np.testing.assert_allclose(got.loss, other.loss, rtol=1e-5)
