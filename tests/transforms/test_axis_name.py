"""Gradients that differ between devices: projected where they are, averaged in the subspace."""

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

DEVICES, M, N, RANK = 2, 24, 40, 6
KEY = jax.random.key(0)
STEPS, GAP = 7, 3


@pytest.fixture(autouse=True, scope="module")
def quick(quick_compilation):
    """Nothing here is about speed."""


def mesh():
    return Mesh(jax.devices()[:DEVICES], ("data",))


def params(dtype=jnp.float32):
    return {
        "wide": jnp.zeros((M, N), dtype),
        "bias": jnp.zeros(N, dtype),
    }


def gradients(step, dtype=jnp.float32):
    """One of every leaf for each device, with a range that decays."""

    def draw(i, x):
        key = jax.random.key(100 * step + i)
        noise = jax.random.normal(key, (DEVICES, *x.shape)) * 0.01
        if x.ndim < 2:
            return noise.astype(dtype)
        left, right = (
            jax.random.normal(jax.random.key(i + k), (*x.shape[:-2], size, 10))
            for k, size in ((7, x.shape[-2]), (8, x.shape[-1]))
        )
        decay = 2.0 ** -jnp.arange(10) * (1 + 0.1 * step)
        mean = jnp.einsum("...mk,k,...nk->...mn", left, decay, right)
        spread = 1 + 0.5 * jnp.cos(jnp.arange(DEVICES) + step)
        return (mean * spread.reshape(-1, *(1,) * x.ndim) + noise).astype(dtype)

    leaves, treedef = jax.tree.flatten(params())
    return treedef.unflatten([draw(i, x) for i, x in enumerate(leaves)])


def run(tx, steps=STEPS, dtype=jnp.float32, check_vma=True, apply=True, grads=gradients):
    """Trains on all devices, each with a gradient of its own."""

    def step(params, state, grads):
        grads = jax.tree.map(lambda g: g[0], grads)
        return stepped(tx, params, state, grads, apply)

    specs = {"in_specs": (P(), P(), P("data")), "out_specs": P()}
    step = jax.jit(jax.shard_map(step, mesh=mesh(), check_vma=check_vma, **specs))
    weights = params(dtype)
    state = tx.init(weights)
    for i in range(steps):
        weights, state = step(weights, state, grads(i, dtype))
    return weights, state


def run_averaged(tx, dtype=jnp.float32, apply=True):
    """Trains on one device, with the average."""
    step = jax.jit(functools.partial(stepped, tx, apply=apply))
    weights = params(dtype)
    state = tx.init(weights)
    for i in range(STEPS):
        mean = lambda g: jnp.mean(g.astype(jnp.float32), 0).astype(dtype)
        weights, state = step(weights, state, jax.tree.map(mean, gradients(i, dtype)))
    return weights, state


def stepped(tx, params, state, grads, apply):
    if apply:
        return optax_gale.update_and_apply(tx, grads, state, params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def signless(state):
    """What does not depend on the signs of a basis."""
    return jax.tree.map(lambda p: jnp.abs(p), state)


def random_rows(x, *, rank, key, previous):
    del key, previous
    return optax_gale.linalg.orthonormalize(x[..., :rank])


FINDERS = {
    "gale": "gale",
    "warm": "warm",
    "gale_approx": "gale_approx",
    "svd": "svd",
    "random": "random",
    "no iteration": optax_gale.Sketch(power_iterations=0, oversampling=3),
    "a callable": random_rows,
}
adamw = functools.partial(optax_gale.gale_adamw, 1e-2, RANK, weight_decay=0.1, update_proj_gap=GAP)


# Linear in the gradients: what rounding does to the smallest is not made large.
momentum = functools.partial(optax_gale.gale_sgd, 1e-2, RANK, momentum=0.9, update_proj_gap=GAP)


@pytest.mark.parametrize("name", FINDERS)
@pytest.mark.quick("gale", "svd")
def test_is_the_step_of_the_average(name):
    got = run(momentum(range_finder=FINDERS[name], axis_name="data"))
    wanted = run_averaged(momentum(range_finder=FINDERS[name]))
    chex.assert_trees_all_close(got[0], wanted[0], atol=2e-5)
    chex.assert_trees_all_close(signless(got[1]), signless(wanted[1]), atol=1e-4, rtol=1e-3)
    assert min(float(jnp.abs(w).max()) for w in jax.tree.leaves(got[0])) > 1e-3


# What is around a range finder is the same for all of them, and an exact SVD compiles fastest.
SVD = {"update_proj_gap": GAP, "range_finder": "svd"}
OPTIMIZERS = {
    "update": (adamw, {"apply": False}),
    "unchecked": (adamw, {"check_vma": False}),
    "8 bits": (functools.partial(adamw, **SVD, state_dtype="int8", projector_dtype="int8"), {}),
    "muon": (functools.partial(optax_gale.gale_muon, 1e-2, RANK, **SVD), {}),
    "chain": (
        lambda **options: optax_gale.chain(
            optax.scale(0.5),
            optax_gale.gale_project(RANK, **SVD, **options),
            optax.adamw(1e-2),
        ),
        {},
    ),
    "accumulated": (lambda **options: optax_gale.accumulate(adamw(**SVD, **options), 2), {}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.quick("8 bits", "chain", "accumulated")
def test_whatever_it_is_part_of(name):
    make, options = OPTIMIZERS[name]
    got = run(make(axis_name="data"), **options)
    options = {k: v for k, v in options.items() if k != "check_vma"}
    wanted = run_averaged(make(), **options)
    # A code on the edge of two falls to either side where a sum is rounded otherwise.
    bound = 0.02 if name == "8 bits" else 1e-3
    for x, y in zip(jax.tree.leaves(got[0]), jax.tree.leaves(wanted[0]), strict=True):
        assert jnp.linalg.norm(x - y) < bound * jnp.linalg.norm(y)


def test_half_precision():
    make = functools.partial(momentum, state_dtype="float32")
    got = run(make(axis_name="data"), dtype=jnp.bfloat16)
    wanted = run_averaged(make(), dtype=jnp.bfloat16)
    for x, y in zip(jax.tree.leaves(got[0]), jax.tree.leaves(wanted[0]), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.linalg.norm(x - y) < 0.02 * np.linalg.norm(y)


def reduced(tx, refresh):
    """Elements that the step's program reduces between devices, and those of the largest array."""
    step = lambda w, s, g: tx.update(jax.tree.map(lambda x: x[0], g), s, w, refresh=refresh)
    weights, grads = params(), gradients(0)
    weights = {"wide": weights["wide"]}
    grads = {"wide": grads["wide"]}
    program = jax.jit(
        jax.shard_map(step, mesh=mesh(), in_specs=(P(), P(), P("data")), out_specs=P())
    )
    report = optax_gale.traffic_report(program, weights, tx.init(weights), grads)
    assert {c.kind for c in report.collectives} == {"all-reduce"}
    return sum(c.times * sum(c.elements) for c in report.collectives), report.largest


def test_little_is_sent():
    whole, part = M * N, RANK * N
    total, largest = reduced(adamw(axis_name="data"), refresh=False)
    assert total == largest == part
    lean = adamw(axis_name="data", range_finder=optax_gale.Sketch(power_iterations=0))
    total, largest = reduced(lean, refresh=True)
    assert largest == part and total == RANK * (M + N)
    assert total / whole <= 2.1 * RANK / min(M, N)
    total, largest = reduced(adamw(axis_name="data"), refresh=True)
    assert largest == part and total == 2 * RANK * (M + N)


@pytest.mark.parametrize(
    ("dtype", "sent"),
    [("bfloat16", "bfloat16"), ("float32", "float32"), ("float16", "float32")],
)
@pytest.mark.parametrize("several", [False, True], ids=["one batch", "accumulated"])
def test_bfloat16_gradients_projections_are_sent_in_bfloat16(dtype, sent, several):
    """A projection of float16 may be larger than its range."""
    tx = adamw(axis_name="data", state_dtype="float32")
    tx = optax_gale.accumulate(tx, 2) if several else tx
    step = lambda w, s, g: tx.update(jax.tree.map(lambda x: x[0], g), s, w, refresh=False)
    mapped = jax.shard_map(step, mesh=mesh(), in_specs=(P(), P(), P("data")), out_specs=P())
    weights, grads = params(dtype), gradients(0, dtype)
    text = str(jax.make_jaxpr(mapped)(weights, tx.init(weights), grads))
    sums = re.findall(r":(\w+)\[([\d,]*)\][^\n]* = psum", text)
    short = {"bfloat16": "bf16", "float32": "f32"}[sent]
    assert sorted(sums) == sorted([(short, f"{RANK},{N}"), (short, f"{N}")])


def test_what_one_device_cannot_use_nobody_uses():
    def grads(step, dtype):
        out = gradients(step, dtype)
        if step == 3:  # a refresh
            out["wide"] = out["wide"].at[1, 0, 0].set(jnp.nan)
        return out

    for finder in ("gale", "random"):
        tx = optax_gale.gale(optax.sgd(1e-2), RANK, update_proj_gap=GAP, axis_name="data",
                             range_finder=finder)  # fmt: skip
        before = run(tx, steps=3)[1]
        after = run(tx, steps=4, grads=grads)[1]
        chex.assert_trees_all_equal(after.projector["wide"], before.projector["wide"])
        # Every device holds the same.
        shards = [np.asarray(s.data) for s in after.projector["wide"].addressable_shards]
        assert all(np.array_equal(shards[0], s) for s in shards)


def test_several_axes():
    devices = np.array(jax.devices()[:DEVICES]).reshape(DEVICES, 1)
    tx, plain = adamw(axis_name=("host", "chip")), adamw()
    grads = gradients(0)

    def step(w, s, g):
        return optax_gale.update_and_apply(tx, jax.tree.map(lambda x: x[0], g), s, w)

    both = P(("host", "chip"))
    program = jax.shard_map(
        step, mesh=Mesh(devices, ("host", "chip")), in_specs=(P(), P(), both), out_specs=P()
    )
    got, _ = jax.jit(program)(params(), tx.init(params()), grads)
    mean = jax.tree.map(lambda g: jnp.mean(g, 0), grads)
    wanted, _ = optax_gale.update_and_apply(plain, mean, plain.init(params()), params())
    chex.assert_trees_all_close(got, wanted, atol=1e-5)


HALVED = optax_gale.Sketch(average_dtype="bfloat16")


def averaged_in_a_refresh(sketch, dtype="float32"):
    """Dtypes and shapes of all that a refresh averages."""
    tx = adamw(axis_name="data", range_finder=sketch, state_dtype="float32")
    step = lambda w, s, g: tx.update(jax.tree.map(lambda x: x[0], g), s, w, refresh=True)
    mapped = jax.shard_map(step, mesh=mesh(), in_specs=(P(), P(), P("data")), out_specs=P())
    weights = params(dtype)
    text = str(jax.make_jaxpr(mapped)(weights, tx.init(weights), gradients(0, dtype)))
    return re.findall(r":(\w+)\[([\d,]*)\][^\n]* = psum", text)


@pytest.mark.parametrize(
    ("options", "sketches"),
    [
        ({}, [(M, RANK), (N, RANK), (M, RANK)]),
        ({"power_iterations": 0}, [(M, RANK)]),
        ({"oversampling": 3}, [(M, 9), (N, 9), (M, 9), (N, 9)]),
        ({"warm_start": True}, [(N, RANK), (M, RANK)]),
    ],
    ids=["default", "no iteration", "oversampled", "warm"],
)
@pytest.mark.parametrize(
    ("dtype", "average_dtype", "sent"),
    [
        ("float32", "bfloat16", "bf16"),
        ("float32", None, "f32"),
        ("bfloat16", None, "bf16"),
        ("bfloat16", "float32", "f32"),
    ],
)
@pytest.mark.quick("float32-bfloat16-bf16-default", "bfloat16-None-bf16-oversampled")
def test_sketches_are_averaged_in_the_dtype_asked_for(
    options, sketches, dtype, average_dtype, sent
):
    sketch = optax_gale.Sketch(average_dtype=average_dtype, **options)
    sums = averaged_in_a_refresh(sketch, dtype)
    shapes = sorted(f"{m},{k}" for m, k in sketches)
    found = sorted(shape for _, shape in sums if shape in shapes)
    assert found == shapes
    assert {kind for kind, shape in sums if shape in shapes} == {sent}
    # Projections, and what is not projected, as ever.
    own = "bf16" if dtype == "bfloat16" else "f32"
    assert {x for x in sums if x[1] not in shapes} == {(own, f"{RANK},{N}"), (own, f"{N}")}


def test_sketches_averaged_in_bfloat16_capture_as_much():
    tx = optax_gale.gale_sgd(1e-2, RANK, axis_name="data", range_finder=HALVED)
    _, state = run(tx, steps=1)
    mean = jnp.mean(gradients(0)["wide"], 0)
    found = optax_gale.linalg.captured_energy(state.projector["wide"], mean)
    p = optax_gale.linalg.range_finder(jax.random.key(0), mean, RANK)
    assert found > 0.9999 * optax_gale.linalg.captured_energy(p, mean)
    eye = state.projector["wide"].T @ state.projector["wide"]
    np.testing.assert_allclose(eye, np.eye(RANK), atol=1e-5)


def test_a_range_finder_of_a_batch_of_parts():
    """`jax.vmap` has named axes too."""
    g = gradients(0)["wide"]
    find = functools.partial(optax_gale.linalg.range_finder, jax.random.key(0), rank=RANK)
    p = jax.vmap(lambda g: find(g, axis_name="parts"), axis_name="parts")(g)
    chex.assert_trees_all_close(p, jnp.broadcast_to(find(jnp.mean(g, 0)), p.shape), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"axis_name": 3}, TypeError, "name of a mapped axis"),
        ({"axis_name": ()}, TypeError, "name of a mapped axis"),
        ({"axis_name": "data", "residual": "fira"}, ValueError, "whole gradient in every step"),
    ],
)
def test_bad_options(options, error, text):
    with pytest.raises(error, match=text):
        adamw(**options)


@pytest.mark.parametrize("devices", [1, 8, 32])
@pytest.mark.parametrize("decay", [0.7, 2.0])
@pytest.mark.quick("0.7-32")
def test_what_sketches_averaged_in_bfloat16_lose(devices, decay):
    """As docs/flax.md has it."""
    m, n, rank = 256, 512, 16
    left, right = (
        jnp.linalg.qr(jax.random.normal(jax.random.key(i), (size, m)))[0]
        for i, size in enumerate((m, n))
    )
    g = (left * jnp.arange(1.0, m + 1) ** -decay) @ right.T
    noise = jax.random.normal(KEY, (devices, m, n)) * jnp.linalg.norm(g) / (m * n) ** 0.5
    find = functools.partial(optax_gale.linalg.range_finder, KEY, rank=rank)
    half = functools.partial(find, axis_name="parts", average_dtype="bfloat16")
    p = jax.vmap(half, axis_name="parts")(g + noise - noise.mean(0))[0]
    lost = 1 - optax_gale.linalg.captured_energy(p, g) / optax_gale.linalg.captured_energy(
        find(g), g
    )
    assert abs(lost) < 1e-4


@pytest.mark.parametrize(
    "dtype", ["float16", "int8", "(2,", {"names": ["a"]}, 3, np.float32(1), np.ones(2)], ids=str
)
def test_bad_average_dtypes(dtype):
    for make in (
        lambda: optax_gale.Sketch(average_dtype=dtype),
        lambda: optax_gale.linalg.range_finder(KEY, jnp.ones((3, 3)), 2, average_dtype=dtype),
    ):
        with pytest.raises(ValueError, match="must be 'bfloat16', 'float32', or None"):
            make()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.dtype("bfloat16"), "bfloat16"])
def test_all_names_of_a_dtype_make_one_sketch(dtype):
    assert optax_gale.Sketch(average_dtype=dtype) == HALVED
    assert hash(optax_gale.Sketch(average_dtype=dtype)) == hash(HALVED)
