"""Large leaves that take their steps in blocks of rows."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_gale
from optax_gale.training import rows

from .models import LAYERS, MODEL, make_batch, make_params

BLOCKS = 5


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    """Of the 640 elements of the embedding and the head, blocks of 128."""
    monkeypatch.setattr(rows, "LARGE", 640)
    monkeypatch.setattr(rows, "BLOCK", 640 // BLOCKS)
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def params():
    draw = lambda key, *shape: jax.random.normal(jax.random.key(key), shape)
    return {"table": draw(0, 40, 16), "scale": draw(1, 16), "row": draw(2, 640)}


def in_blocks(tx, tree):
    """Into how many blocks a step of large leaves is cut."""
    state = jax.eval_shape(tx.init, tree)
    step = lambda g, s, p: rows.update_and_apply(optax.with_extra_args_support(tx), g, s, p)
    equations = jax.make_jaxpr(step)(tree, state, tree).jaxpr.eqns
    lengths = [e.params["length"] for e in equations if e.primitive.name == "scan"]
    assert len(set(lengths)) <= 1
    return lengths[0] if lengths else 1


def quantized(inner=None, **options):
    inner = optax.adamw(1e-2, weight_decay=0.1) if inner is None else inner
    return optax_gale.quantize_states(inner, block_size=8, min_size=1, **options)


APART = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "adamw, 8 bits": quantized,
    "schedule, 8 bits": lambda: quantized(
        optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda count: -0.1 / count))
    ),
    "momentum, 8 bits": lambda: quantized(optax.sgd(1e-2, 0.9, nesterov=True)),
    "gale, 8 bits": lambda: optax_gale.gale(
        quantized(), 4, update_proj_gap=2, select=lambda path, leaf: False
    ),
    "hyperparameters": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
}


@pytest.mark.parametrize("name", APART)
def test_is_the_same_step(name):
    tx, tree = optax.with_extra_args_support(APART[name]()), params()
    assert in_blocks(tx, tree) == BLOCKS
    by_rows = jax.jit(lambda g, s, p: rows.update_and_apply(tx, g, s, p))
    at_once = jax.jit(lambda g, s, p: optax_gale.update_and_apply(tx, g, s, p))
    got, wanted = (tree, tx.init(tree)), (tree, tx.init(tree))
    for i in range(4):
        grads = jax.tree.map(lambda x, i=i: jnp.sin(x * (i + 1)), tree)
        got, wanted = by_rows(grads, got[1], got[0]), at_once(grads, wanted[1], wanted[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(got, wanted)
    chex.assert_trees_all_close(got[0], wanted[0], atol=1e-6)
    codes = lambda tree: [np.asarray(x, np.float32) for x in jax.tree.leaves(tree)]
    for x, y in zip(codes(got[1]), codes(wanted[1]), strict=True):
        assert np.mean(np.abs(x - y) > 1e-6 * np.abs(y).max()) < 0.01  # codes on an edge


def test_draws_are_of_a_block():
    tx = optax.with_extra_args_support(quantized(stochastic_rounding=True))
    tree = {"table": jnp.ones((40, 16))}
    assert in_blocks(tx, tree) == BLOCKS
    grads = {"table": jnp.broadcast_to(jnp.linspace(0.3, 1, 16), (40, 16))}
    _, state = rows.update_and_apply(tx, grads, tx.init(tree), tree)
    codes = state.inner_state[0].mu["table"].codes.reshape(BLOCKS, 8, 16)
    assert len(np.unique(codes, axis=0)) == BLOCKS


MIXES = {
    "the leaf's norm": lambda: optax.chain(optax.scale_by_trust_ratio(), optax.sgd(1.0)),
    "means of rows": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "a product": lambda: optax_gale.gale(optax.adamw(1e-2), 4),
    "cumulated sums": lambda: optax.stateless(
        lambda g, p: jax.tree.map(lambda x: jnp.cumsum(x, axis=0), g)
    ),
    "the shape": lambda: optax.stateless(
        lambda g, p: jax.tree.map(lambda x: x + jnp.arange(640.0).reshape(40, 16), g)
    ),
    "the place": lambda: optax.stateless(
        lambda g, p: jax.tree.map(lambda x: x * jnp.arange(x.shape[0])[:, None], g)
    ),
}


@pytest.mark.parametrize("name", MIXES)
def test_what_needs_all_rows_gets_them(name):
    assert in_blocks(MIXES[name](), {"table": jnp.ones((40, 16))}) == 1


def test_devices_keep_what_they_have(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert in_blocks(quantized(), params()) == 1


def test_leaves_without_a_gradient_stay():
    tx, tree = optax.with_extra_args_support(quantized()), params()
    grads = {**tree, "row": optax.MaskedNode(), "scale": optax.MaskedNode()}
    before = tx.init(tree)
    new, state = rows.update_and_apply(tx, grads, before, tree)
    for name in ("row", "scale"):
        chex.assert_trees_all_equal(new[name], tree[name])
        chex.assert_trees_all_equal(state.inner_state[0].mu[name], before.inner_state[0].mu[name])
    assert np.abs(new["table"] - tree["table"]).min() > 0
    assert state.count == 1


@pytest.mark.parametrize("clip", [{}, {"clip_norm": 0.1, "clip": "two_pass"}], ids=["", "clipped"])
def test_layer_by_layer(clip, monkeypatch):
    """The head takes its step before the walk through the layers, the embedding after it."""
    tx, tree = quantized(), make_params()

    def run():
        train = optax_gale.layerwise(MODEL, tx, **clip)
        params, state, norms = tree, train.init(tree), []
        text = str(jax.make_jaxpr(train.step)(params, state, make_batch(0)))
        step = jax.jit(train.step)
        for i in range(6):
            params, state, metrics = step(params, state, make_batch(i))
            norms.append(metrics.grad_norm)
        lengths = [int(length) for length in re.findall(r"\blength=(\d+)", text)]
        return (params, norms, state.count), text.count("scan["), lengths

    got, scans, lengths = run()
    monkeypatch.setattr(rows, "LARGE", 2**30)
    wanted, fewer, _ = run()
    chex.assert_trees_all_close(got, wanted, atol=2e-4, rtol=1e-4)
    assert scans == fewer + 2
    # Forward, the head's 16 rows in 8 blocks, backward, the embedding.
    walks = [length for length in lengths if length in (LAYERS, BLOCKS, 8)]
    assert walks[-4:] == [LAYERS, 8, LAYERS, BLOCKS]


@pytest.mark.gpu  # CPUs drop the barrier that orders reading before writing, and copy
def test_takes_less_memory(monkeypatch):
    tx = optax.with_extra_args_support(optax_gale.quantize_states(optax.adamw(1e-3)))
    tree = {"table": jnp.ones((4000, 4096), jnp.bfloat16)}

    def temporaries():
        step = lambda g, s, p: rows.update_and_apply(tx, g, s, p)
        compiled = jax.jit(step, donate_argnums=(1, 2)).lower(tree, tx.init(tree), tree).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    monkeypatch.setattr(rows, "LARGE", 2**30)
    at_once = temporaries()
    monkeypatch.setattr(rows, "LARGE", 2**23)
    monkeypatch.setattr(rows, "BLOCK", 2**20)
    assert temporaries() < 0.4 * at_once
