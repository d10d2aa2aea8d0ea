"""Updates in the backward pass where devices have parts of the batch, and averages are small."""

import functools
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
from optax_gale.training import rows

from .models import LAYERS, MODEL, VOCABULARY, WIDTH, make_batch, make_params

DEVICES, SEQUENCES = 2, 8


def optimizer(range_finder="svd", **options):
    """With a range finder that compiles fast; sketches are for the test that compares numbers."""
    return optax_gale.gale_sgd(
        0.1, 4, momentum=0.9, update_proj_gap=3, range_finder=range_finder, **options
    )


def on_devices(train, **options):
    mesh = Mesh(jax.devices()[:DEVICES], ("data",))
    specs = {"in_specs": (P(), P(), P("data")), "out_specs": P()}
    return jax.jit(jax.shard_map(train.step, mesh=mesh, **specs, **options))


def run(train, step, steps=5):
    params = make_params()
    state, metrics = train.init(params), []
    for i in range(steps):
        params, state, found = step(params, state, make_batch(i, SEQUENCES))
        metrics.append(found)
    return params, jax.tree.map(lambda *xs: np.stack(xs), *metrics)


@pytest.mark.parametrize(
    ("range_finder", "micro_batches", "check_vma"),
    [("gale", 1, True), ("svd", 1, False), ("svd", 2, True)],
)
@pytest.mark.quick("svd-2-True")
def test_is_the_step_of_the_whole_batch(range_finder, micro_batches, check_vma):
    build = functools.partial(optax_gale.layerwise, MODEL, micro_batches=micro_batches)
    train = build(optimizer(range_finder, axis_name="data"))
    got, metrics = run(train, on_devices(train, check_vma=check_vma))
    train = build(optimizer(range_finder))
    # The first part of a batch decides the subspaces: every device's first parts.
    reorder = lambda x: x
    if micro_batches > 1:
        order = np.arange(SEQUENCES).reshape(DEVICES, -1, micro_batches)
        reorder = lambda x: x[order.transpose(0, 1, 2).reshape(-1)]
    step = jax.jit(lambda p, s, b: train.step(p, s, jax.tree.map(reorder, b)))
    wanted, whole = run(train, step)
    chex.assert_trees_all_close(got, wanted, atol=2e-5)
    chex.assert_trees_all_close(metrics.loss, whole.loss, atol=1e-5)
    assert (metrics.grad_norm >= whole.grad_norm * 0.9999).all()


def test_a_large_head_takes_its_step_before_the_layers(monkeypatch):
    monkeypatch.setattr(rows, "LARGE", VOCABULARY * WIDTH)
    train = optax_gale.layerwise(MODEL, optimizer(axis_name="data"))
    got, _ = run(train, on_devices(train), steps=2)
    train = optax_gale.layerwise(MODEL, optimizer())
    wanted, _ = run(train, jax.jit(train.step), steps=2)
    chex.assert_trees_all_close(got, wanted, atol=2e-5)


@pytest.mark.parametrize("clip", ["hold", "two_pass"])
def test_clipped_alike_on_all_devices(clip):
    train = optax_gale.layerwise(MODEL, optimizer(axis_name="data"), clip_norm=0.01, clip=clip)
    params, metrics = run(train, on_devices(train), steps=2)
    for x in jax.tree.leaves(params):
        shards = [np.asarray(shard.data) for shard in x.addressable_shards]
        assert len(shards) == DEVICES and np.array_equal(*shards)

    # The norm is the root of the mean of the devices' squares.
    def norm(batch):
        grads = jax.grad(MODEL.loss)(make_params(), batch)
        return optax.tree.norm(grads)

    parts = jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), make_batch(0, SEQUENCES))
    norms = np.asarray(jax.jit(jax.vmap(norm))(parts))
    assert float(metrics.grad_norm[0]) == pytest.approx(float(np.sqrt(np.mean(norms**2))), rel=1e-5)


def test_whole_gradients_of_layers_are_not_sent():
    train = optax_gale.layerwise(MODEL, optimizer(axis_name="data"))
    step = functools.partial(train.step, refresh=False)
    mesh = Mesh(jax.devices()[:DEVICES], ("data",))
    specs = {"in_specs": (P(), P(), P("data")), "out_specs": P()}
    params = make_params()
    arguments = (params, train.init(params), make_batch(0, SEQUENCES))
    program = jax.jit(jax.shard_map(step, mesh=mesh, **specs))
    report = optax_gale.traffic_report(program, *arguments)
    sizes = sorted(size for c in report.collectives for size in c.elements)
    # The embedding and the head are at full rank; of a layer there are R, and vectors.
    assert sizes[-1] == VOCABULARY * WIDTH
    assert [size for size in sizes if size not in (VOCABULARY * WIDTH, 1)][-1] <= 4 * 24
    assert LAYERS > 1


@pytest.mark.parametrize(
    ("options", "dtype"),
    [({}, "bf16"), ({"clip_norm": 1.0}, "bf16"), ({"micro_batches": 2}, "f32")],
    ids=["at once", "held", "summed"],
)
def test_projections_of_bfloat16_gradients_are_sent_in_bfloat16(options, dtype):
    """Sums of several are more precise than a gradient, and sent so."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params())
    tx = optimizer("random", axis_name="data", state_dtype="float32")
    train = optax_gale.layerwise(MODEL, tx, **options)
    mesh = Mesh(jax.devices()[:DEVICES], ("data",))
    specs = {"in_specs": (P(), P(), P("data")), "out_specs": P()}
    step = jax.shard_map(functools.partial(train.step, refresh=False), mesh=mesh, **specs)
    text = str(jax.make_jaxpr(step)(params, train.init(params), make_batch(0, SEQUENCES)))
    sent = set(re.findall(r":(\w+)\[[\d,]+\][^\n]* = psum", text))
    assert sent == {dtype}
