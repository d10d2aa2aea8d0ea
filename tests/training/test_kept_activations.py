"""`layerwise` with activations kept: nothing is computed again, and no weight is kept twice."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import optax_gale
from optax_gale.training import stack, walk

from .models import LAYERS, MODEL, make_batch, make_params
from .test_layerwise import OPTIMIZERS, adamw, assert_same, ordinary, run


def keeping(tx, model=MODEL, **options):
    return optax_gale.layerwise(model, tx, activations="keep", **options)


@pytest.mark.parametrize("name", ["sketch", "8 bits", "fira", "muon", "partition", "kahan"])
@pytest.mark.quick("sketch")
def test_is_the_ordinary_step(name):
    tx, params = OPTIMIZERS[name](), make_params()
    train = keeping(tx)
    got = run(train.step, params, train.init(params))
    assert_same(got, run(ordinary(tx), params, tx.init(params)))


@pytest.mark.parametrize(
    "options",
    [
        *({"clip_norm": 0.5, "clip": clip} for clip in ("hold", "two_pass", "previous")),
        {"micro_batches": 2},
        {"micro_batches": 2, "clip_norm": 0.5, "clip": "two_pass"},
    ],
    ids=["hold", "two_pass", "previous", "micro-batches", "both"],
)
@pytest.mark.quick("both")
def test_is_what_it_is_where_it_computes_again(options):
    tx, params = adamw(), make_params()
    found, wanted = (
        run(train.step, params, train.init(params), 6)
        for train in (keeping(tx, **options), optax_gale.layerwise(MODEL, tx, **options))
    )
    chex.assert_trees_all_close(found, wanted, atol=2e-6)


def test_weights_in_8_bits():
    params = optax_gale.quantize_weights(make_params(), select="up|down", block_size=16)
    tx = optax.sgd(0.1)

    def trained(**options):
        train = optax_gale.layerwise(MODEL, tx, **options)
        state = train.init(params)
        key = jax.random.key(0)
        return jax.jit(train.step)(params, state, make_batch(0), key=key)

    chex.assert_trees_all_close(trained(activations="keep"), trained(), atol=1e-6)


def test_on_devices_that_average_projections():
    params = make_params()

    def trained(**options):
        tx = adamw("gale", axis_name="data")
        train = optax_gale.layerwise(MODEL, tx, **options)
        mesh = Mesh(jax.devices()[:2], ("data",))
        step = jax.shard_map(train.step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
        return jax.jit(step)(params, train.init(params), make_batch(0))

    chex.assert_trees_all_close(trained(activations="keep"), trained(), atol=1e-5)


def kept(model, params, batch):
    """Shapes of what is kept of a layer."""

    def forward(params, batch):
        parameters = stack.Parameters(params, model.keys)
        passes = walk.Walk(model, params, parameters, recompute=False)
        return passes.forward(parameters.stacked(params), batch).kept

    found = jax.tree.leaves(jax.eval_shape(forward, params, batch))
    assert all(x.shape[0] == LAYERS for x in found)
    return [x.shape[1:] for x in found]


def test_no_weight_is_kept_twice():
    """Copies of the layers' weights would be as large as the model."""
    params, batch = make_params(), make_batch(0)
    weights = {x.shape[1:] for x in jax.tree.leaves(params["layers"]) if x.ndim > 2}
    found = kept(MODEL, params, batch)
    assert len(weights) > 1 and not weights & {*found}
    assert not {x.shape for x in jax.tree.leaves(batch)} & {*found}


def test_nothing_is_kept_twice():
    model = optax_gale.LayeredModel(
        embed=lambda rest, batch: batch["x"] @ rest["embed"],
        block=lambda p, x, batch, layer: x + jnp.sin(x) @ p["a"] + jnp.sin(x) @ p["b"],
        head=lambda rest, x, batch: jnp.mean(x**2),
    )
    params = {
        "embed": jnp.ones((3, 8)),
        "layers": {"a": jnp.ones((LAYERS, 8, 8)), "b": jnp.ones((LAYERS, 8, 8))},
    }
    # sin(x) and cos(x) twice, which JAX computes twice.
    assert kept(model, params, {"x": jnp.ones((2, 3))}) == [(2, 8)] * 4
    remembering = optax_gale.LayeredModel(
        model.embed, jax.checkpoint(model.block, static_argnums=()), model.head
    )
    assert kept(remembering, params, {"x": jnp.ones((2, 3))}) == [(2, 8)]


def masking(mask):
    return optax_gale.LayeredModel(
        embed=lambda rest, batch: batch["x"] @ rest["embed"],
        block=lambda p, x, batch, layer: x + jnp.sin(x * mask) @ p["w"],
        head=lambda rest, x, batch: jnp.mean(x**2),
    )


def test_what_all_layers_share_is_not_kept_for_each():
    """An array of the training step that the block closes over."""
    params = {"embed": jnp.ones((3, 8)), "layers": {"w": jnp.ones((LAYERS, 8, 8))}}
    batch, shapes = {"x": jnp.ones((2, 3))}, []

    def step(params, mask):
        train = keeping(optax.sgd(0.1), masking(mask))
        return train.step(params, train.init(params), batch)[0]

    def kept_with(mask):
        shapes.append(kept(masking(mask), params, batch))
        return step(params, mask)

    mask = jnp.arange(16.0).reshape(2, 8) / 16
    found = jax.jit(kept_with)(mask)
    assert shapes == [[(2, 8)] * 2]  # cos and sin
    grads = jax.grad(masking(mask).loss)(params, batch)
    wanted = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5)
    with jax.disable_jit():
        chex.assert_trees_all_close(step(params, mask), wanted, rtol=1e-5)


def test_a_layer_runs_forward_once():
    calls = {}

    def block(p, x, batch, layer):
        return x + jax.lax.erf_inv(x @ p["w"])

    model = optax_gale.LayeredModel(
        embed=lambda rest, batch: batch["x"] @ rest["embed"],
        block=block,
        head=lambda rest, x, batch: jnp.mean(x**2),
    )
    params = {"embed": jnp.ones((3, 8)) / 100, "layers": {"w": jnp.ones((LAYERS, 8, 8)) / 100}}
    for activations in ("recompute", "keep"):
        tx = optax.sgd(0.1)
        train = optax_gale.layerwise(model, tx, activations=activations)
        text = str(jax.make_jaxpr(train.step)(params, tx.init(params), {"x": jnp.ones((2, 3))}))
        calls[activations] = len(re.findall(r"= erf_inv", text))
    assert calls == {"recompute": 2, "keep": 1}


def test_other_words_are_refused():
    with pytest.raises(ValueError, match=r"activations.*'recompute'.*'keep'.*'store'"):
        optax_gale.layerwise(MODEL, adamw(), activations="store")


def test_gradients_are_those_of_the_loss():
    """Also where a constant of the block is an array."""
    table = np.linspace(0.5, 1.5, 8, dtype=np.float32)
    model = optax_gale.LayeredModel(
        embed=lambda rest, batch: batch["x"] @ rest["embed"],
        block=lambda p, x, batch, layer: x + jnp.tanh((x * table + layer) @ p["w"]),
        head=lambda rest, x, batch: jnp.mean(x**2),
    )
    key = jax.random.key(0)
    params = {
        "embed": jax.random.normal(key, (3, 8)),
        "layers": {"w": jax.random.normal(key, (LAYERS, 8, 8)) / 4},
    }
    batch, tx = {"x": jnp.ones((2, 3))}, optax.sgd(1.0)
    new, _, _ = jax.jit(keeping(tx, model).step)(params, tx.init(params), batch)
    wanted = jax.tree.map(jnp.subtract, params, jax.grad(model.loss)(params, batch))
    chex.assert_trees_all_close(new, wanted, atol=1e-5)
