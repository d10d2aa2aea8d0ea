"""Weights in 8 bits: small, trained without bias, and read a layer at a time."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_gale
from optax_gale.quantization import Quantized

from .models import MODEL, WIDTH, make_batch, make_params
from .test_layerwise import adamw, nbytes


def in_8_bits(dtype=jnp.float32, layers=3):
    return optax_gale.quantize_weights(make_params(dtype, layers), block_size=8)


def stored(tree):
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Quantized))


def test_the_matrices_that_are_projected():
    q = in_8_bits()
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, x in jax.tree_util.tree_flatten_with_path(
            q, is_leaf=lambda x: isinstance(x, Quantized)
        )[0]
        if isinstance(x, Quantized)
    }
    assert names == {"layers/mlp/up/kernel", "layers/mlp/down/kernel"}
    chosen = optax_gale.quantize_weights(make_params(), select="down", block_size=8)
    assert sum(isinstance(x, Quantized) for x in stored(chosen)) == 1
    # A scale for four numbers of half precision would take as much as they do.
    same = optax_gale.quantize_weights(make_params(jnp.bfloat16), block_size=4)
    assert not any(isinstance(x, Quantized) for x in stored(same))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_they_stand_for(dtype):
    params = make_params(dtype)
    back = optax_gale.dequantize_weights(in_8_bits(dtype))
    chex.assert_trees_all_equal_shapes_and_dtypes(back, params)
    w, r = (np.asarray(t["layers"]["mlp"]["up"]["kernel"], np.float32) for t in (params, back))
    blocks = np.abs(w).reshape(3, WIDTH, 3, 8).max(-1).repeat(8, -1)
    assert (
        np.abs(w - r) <= blocks * (0.5 / 127 + (2**-8 if dtype == jnp.bfloat16 else 1e-6))
    ).all()


def test_boxes_stay():
    boxed = nn.Partitioned(jnp.ones((2, 16, 64)), ("layers", "a", "b"))
    q = optax_gale.quantize_weights({"layers": {"up": boxed}})["layers"]["up"]
    assert q.codes.names == ("layers", "a", "b") and q.scales.names == ("layers", "a", None)
    assert optax_gale.dequantize_weights(q).names == ("layers", "a", "b")


@pytest.mark.parametrize("options", [{}, {"micro_batches": 2}, {"clip_norm": 0.5}])
@pytest.mark.quick("options0")
def test_new_weights_are_right_on_average(options):
    """Of the step that float32 weights would take, from the numbers that the codes stand for."""
    tx = optax_gale.gale_adamw(3e-3, 4, range_finder="random")
    q = in_8_bits()
    train = optax_gale.layerwise(MODEL, tx, **options)
    state = train.init(q)
    wide = optax_gale.dequantize_weights(q)
    chex.assert_trees_all_equal(state, tx.init(wide))
    exact, exact_state, exact_metrics = jax.jit(train.step)(wide, state, make_batch(0))
    keys = jax.random.split(jax.random.key(0), 256)
    step = lambda key: train.step(q, state, make_batch(0), key=key)
    drawn, states, metrics = jax.jit(lambda keys: jax.lax.map(step, keys))(keys)
    values = jax.vmap(optax_gale.dequantize_weights)(drawn)
    for name in ("up", "down"):
        draws = np.asarray(values["layers"]["mlp"][name]["kernel"], np.float64)
        wanted = np.asarray(exact["layers"]["mlp"][name]["kernel"], np.float64)
        shape = (*wanted.shape[:-1], -1, 8)
        quantum = (np.abs(wanted).reshape(shape).max(-1) / 127).repeat(8, -1)
        assert (np.abs(draws - wanted) <= quantum * 1.01).all()
        # A draw is off by half a distance of two numbers at most, in the root of the mean square.
        assert (np.abs(draws.mean(0) - wanted) <= 5 * 0.5 / 16 * quantum).all()
        assert np.abs(draws - np.asarray(wide["layers"]["mlp"][name]["kernel"])).max() > 0
    same = lambda x, y: np.testing.assert_allclose(x, np.broadcast_to(y, x.shape), atol=1e-5)
    jax.tree.map(same, states, exact_state)
    jax.tree.map(same, metrics, exact_metrics)
    jax.tree.map(same, drawn["lm_head"], exact["lm_head"])


def test_small_updates_are_not_lost():
    """A hundred updates of a hundredth of the distance of two numbers add up."""
    model = optax_gale.LayeredModel(
        lambda rest, batch: batch["x"],
        lambda p, x, batch, layer: x + jnp.sum(p["kernel"]),
        lambda rest, x, batch: jnp.sum(x),
    )
    start = jnp.full((2, 16, 32), 0.5).at[..., 0].set(1.27)  # a distance of 0.01
    q = optax_gale.quantize_weights({"layers": {"kernel": start}, "rest": jnp.ones(1)})
    train = optax_gale.layerwise(model, optax.sgd(1e-4))
    step = jax.jit(train.step, donate_argnums=(0, 1))
    state = train.init(q)
    for i in range(100):
        q, state, _ = step(q, state, {"x": jnp.zeros(())}, key=jax.random.key(i))
    moved = start - optax_gale.dequantize_weights(q)["layers"]["kernel"]
    np.testing.assert_allclose(moved[..., 1:].mean(), 0.01, rtol=0.1)
    layers = np.asarray(q["layers"]["kernel"].codes)
    assert (layers[0] != layers[1]).any()  # each layer has draws of its own


def test_half_precision_stays_what_they_stand_for():
    q, tx = in_8_bits(jnp.bfloat16), optax.sgd(0.1)
    train = optax_gale.layerwise(MODEL, tx)
    new, _, _ = jax.jit(train.step)(q, train.init(q), make_batch(0), key=jax.random.key(0))
    chex.assert_trees_all_equal_structs(new, q)
    assert optax_gale.dequantize_weights(new)["layers"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16


def test_draws_repeat_and_steps_need_a_key():
    q, tx = in_8_bits(), adamw()
    train = optax_gale.layerwise(MODEL, tx)
    step = jax.jit(train.step)
    first, again, other = (
        step(q, train.init(q), make_batch(0), key=jax.random.key(i))[0] for i in (0, 0, 1)
    )
    chex.assert_trees_all_equal(first, again)
    codes = lambda p: np.asarray(p["layers"]["mlp"]["up"]["kernel"].codes)
    assert (codes(first) != codes(other)).any()
    with pytest.raises(ValueError, match="8 bits are rounded at random: give `step` a `key`"):
        train.step(q, train.init(q), make_batch(0))


def test_the_loss_reads_them_layer_by_layer():
    q = in_8_bits()
    loss = MODEL.loss(q, make_batch(0))
    wanted = MODEL.loss(optax_gale.dequantize_weights(q), make_batch(0))
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)

    def temporaries(layers):
        shapes = jax.eval_shape(functools.partial(in_8_bits, layers=layers))
        compiled = jax.jit(MODEL.loss).lower(shapes, make_batch(0)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    a_layer = nbytes(jax.eval_shape(make_params)["layers"]) / 3
    assert (temporaries(48) - temporaries(24)) / 24 < a_layer / 4


def test_a_step_holds_one_layer_at_a_time():
    tx = adamw()
    train = optax_gale.layerwise(MODEL, tx)

    def temporaries(layers):
        q = jax.eval_shape(functools.partial(in_8_bits, layers=layers))
        state = jax.eval_shape(train.init, q)
        step = jax.jit(train.step, donate_argnums=(0, 1))
        compiled = step.lower(q, state, make_batch(0), key=jax.random.key(0)).compile()
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= nbytes((q, state))
        return memory.temp_size_in_bytes

    an_input, a_layer = 4 * 6 * WIDTH * 4, nbytes(jax.eval_shape(make_params)["layers"]) / 3
    assert (temporaries(48) - temporaries(24)) / 24 < an_input + a_layer / 4


def test_bad_block_sizes():
    with pytest.raises(TypeError, match="`block_size` must be an int"):
        optax_gale.quantize_weights(make_params(), block_size=2.0)
    with pytest.raises(ValueError, match="`block_size` must be at least 1"):
        optax_gale.quantize_weights(make_params(), block_size=0)
