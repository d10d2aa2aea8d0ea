"""Half-precision weights: rounded at random, or with what rounding took kept beside them."""

import zlib

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_gale
from optax_gale.transforms.rounding import round_stochastically

HALVES = [jnp.bfloat16, jnp.float16]
WRAPPERS = [optax_gale.stochastic_rounding, optax_gale.kahan_summation]

pytestmark = pytest.mark.usefixtures("quick_compilation")


def run(tx, params, gradient, steps):
    """Steps under jit with a gradient that is a function of the parameters."""
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradient(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@pytest.mark.parametrize("dtype", HALVES)
@settings(max_examples=60, deadline=None)
@given(x=st.floats(-(2.0**15), 2.0**15, width=32), seed=st.integers(0, 2**31 - 1))
def test_a_neighbour_is_drawn(dtype, x, seed):
    found = np.asarray(round_stochastically(jax.random.key(seed), jnp.full(64, x), dtype))
    numpy_dtype = ml_dtypes.bfloat16 if dtype == jnp.bfloat16 else np.float16
    near = np.float32(x).astype(numpy_dtype)
    sides = [np.nextafter(near, numpy_dtype(s * np.inf)) for s in (-1, 1)]
    towards = np.sign(x - float(near))
    allowed = {float(near)} | {float(s) for s in sides if np.sign(float(s) - near) == towards}
    assert set(found.astype(np.float64).tolist()) <= allowed


@pytest.mark.parametrize("dtype", HALVES)
def test_draws_are_right_on_average(dtype):
    x = jnp.float32([1.0001, -1.0001, 0.3, 2.99e-8, 1e-4, -700.3])
    draws = jax.vmap(lambda k: round_stochastically(k, x, dtype))(
        jax.random.split(jax.random.key(0), 20_000)
    )
    wide = np.asarray(draws, np.float64)
    noise = wide.std(0) / np.sqrt(len(wide))
    assert (np.abs(wide.mean(0) - np.asarray(x, np.float64)) < 5 * noise + 1e-12).all()
    assert (wide.std(0) > 0).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_what_has_no_neighbours_is_rounded_to_nearest(dtype):
    largest = float(jnp.finfo(dtype).max)
    x = jnp.float32([0.0, 1.0, -2.5, jnp.inf, -jnp.inf, jnp.nan, largest, 2 * largest])
    found = round_stochastically(jax.random.key(0), x, dtype)
    np.testing.assert_array_equal(found.astype(jnp.float32), x.astype(dtype).astype(jnp.float32))


def test_small_updates_arrive():
    """A thousand steps of 1e-4, each far below half the distance to the next bfloat16."""
    params = {"w": jnp.ones(1000, jnp.bfloat16)}
    gradient = lambda params: jax.tree.map(jnp.ones_like, params)
    sgd = optax.sgd(1e-4)
    plain, _ = run(sgd, params, gradient, 1000)
    assert (plain["w"] == 1).all()
    expected = 1 - 1000 * float(jnp.bfloat16(1e-4))
    kahan, state = run(optax_gale.kahan_summation(sgd), params, gradient, 1000)
    whole = kahan["w"].astype(jnp.float32) + state.compensation["w"].astype(jnp.float32)
    np.testing.assert_allclose(whole, expected, atol=2e-3)  # of 16 bits, rounded 1000 times
    drawn, _ = run(optax_gale.stochastic_rounding(sgd), params, gradient, 1000)
    wide = np.asarray(drawn["w"], np.float64)
    assert abs(wide.mean() - expected) < 5 * wide.std() / np.sqrt(len(wide))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_it_follows_float32_where_bfloat16_does_not(wrapper):
    """Least squares with GALE: the distance from where float32 weights get."""
    a = jax.random.normal(jax.random.key(0), (32, 16)) / 4
    b = a @ jax.random.normal(jax.random.key(1), (16, 24))
    loss = lambda p: jnp.mean(jnp.square(a @ p["w"].astype(jnp.float32) - b))
    tx = optax_gale.gale_adamw(optax.cosine_decay_schedule(3e-2, 400), 8, update_proj_gap=20)
    start = {"w": jnp.zeros((16, 24))}
    exact, _ = run(tx, start, jax.grad(loss), 400)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), start)
    plain, _ = run(tx, half, jax.grad(loss), 400)
    found, _ = run(wrapper(tx), half, jax.grad(loss), 400)
    assert loss(found) < 0.8 * loss(plain)
    assert loss(exact) <= loss(found)


@pytest.mark.parametrize("dtype", HALVES)
def test_applying_the_updates_gives_what_was_meant(dtype):
    w = jax.random.normal(jax.random.key(0), (500,)).astype(dtype)
    u = 0.01 * jax.random.normal(jax.random.key(1), (500,)).astype(dtype)
    exact = np.asarray(w, np.float64) + np.asarray(u, np.float64)
    identity = optax.identity()
    tx = optax_gale.kahan_summation(identity)
    updates, state = tx.update(u, tx.init(w), w)
    assert updates.dtype == state.compensation.dtype == dtype
    new = np.asarray(optax.apply_updates(w, updates), np.float64)
    np.testing.assert_array_equal(new, np.asarray(jnp.float32(exact).astype(dtype), np.float64))
    both = new + np.asarray(state.compensation, np.float64)
    np.testing.assert_allclose(both, exact, atol=2.0**-14 * np.abs(exact).max() / 8)
    tx = optax_gale.stochastic_rounding(identity)
    updates, _ = tx.update(u, tx.init(w), w)
    new = np.asarray(optax.apply_updates(w, updates), np.float64)
    near, wide = jnp.float32(exact).astype(dtype), np.asarray(w, np.float64)
    sides = [jnp.nextafter(near, jnp.asarray(s * jnp.inf, dtype)) for s in (-1, 1)]
    known = np.stack([np.asarray(x, np.float64) for x in (near, *sides)])
    alike = (np.abs(exact) < 2 * np.abs(wide)) & (np.abs(exact) > np.abs(wide) / 2)
    assert alike.mean() > 0.9
    assert (new == known).any(0)[alike].all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("compensation_dtype", [None, "float32"])
def test_nothing_is_lost_where_weights_change_sign_and_size(dtype, compensation_dtype):
    """There the step is rounded once more, and the compensation is of what became of it."""
    shape = (4000,)
    w, u = (jax.random.normal(jax.random.key(k), shape) for k in range(2))
    w = w.astype(dtype)
    tx = optax_gale.kahan_summation(optax.identity(), compensation_dtype=compensation_dtype)
    state = tx.init(w)
    wide = compensation_dtype == "float32"
    assert state.compensation.dtype == (jnp.float32 if wide else dtype)
    old = 1e-3 * jax.random.normal(jax.random.key(2), shape).astype(state.compensation.dtype)
    updates, state = tx.update(u, state._replace(compensation=old), w)
    assert state.compensation.dtype == old.dtype and updates.dtype == dtype
    exact = sum(np.asarray(x, np.float64) for x in (w, u, old))
    new = np.asarray(optax.apply_updates(w, updates), np.float64)
    kept = np.asarray(state.compensation, np.float64)
    rounding = 0 if wide else float(jnp.finfo(dtype).eps) / 2 * np.abs(kept) + 3e-8
    assert np.all(np.abs(new + kept - exact) <= 2.0**-21 + rounding)  # of sums up to 8
    again = np.abs(new - np.asarray(exact.astype(np.float32).astype(w.dtype), np.float64))
    assert (again > 0).any()  # or nothing was tested


@pytest.mark.parametrize(
    ("dtype", "compensation_dtype", "arrives", "stalls"),
    [
        (jnp.bfloat16, None, -16, -18),
        (jnp.float16, None, -22, -24),
        (jnp.bfloat16, "float32", -23, -25),
        (jnp.float16, "float32", -23, -25),
    ],
)
def test_how_small_an_update_arrives(dtype, compensation_dtype, arrives, stalls):
    """The documented thresholds, at both ends of a power of two, however often it comes."""
    w = jnp.asarray([1.0, 1.98], dtype)
    tx = optax_gale.kahan_summation(optax.identity(), compensation_dtype=compensation_dtype)

    @jax.jit
    def steps(u):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(u, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (w, tx.init(w)), None, 2**16)[0][0]

    for exponent in (arrives, stalls):
        new = steps(2.0**exponent * w.astype(jnp.float32))
        assert ((new > w) == (exponent == arrives)).all()


def numpy_steps(wrapper, w, us, seed):
    """Weights after updates, one step at a time in NumPy's half precision."""
    half, c = w.dtype, np.zeros_like(w)
    wide = lambda x: x.astype(np.float32)
    for count, u in enumerate(us):
        total = wide(w) + u + (wide(c) if wrapper is optax_gale.kahan_summation else 0)
        new = total.astype(half)
        if wrapper is optax_gale.stochastic_rounding:
            key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), count)
            draw = jax.random.uniform(jax.random.fold_in(key, zlib.crc32(b"w")), w.shape)
            error = total - wide(new)
            other = np.nextafter(new, np.where(error > 0, np.inf, -np.inf).astype(half))
            new = np.where(
                np.asarray(draw) * np.abs(wide(other) - wide(new)) < abs(error), other, new
            )
        w = (wide(w) + wide((wide(new) - wide(w)).astype(half))).astype(half)
        c = (total - wide(w)).astype(half)
    return w


def check_against_numpy(wrapper, dtype, size):
    """Several steps in one program, in which compilers could skip a rounding to half precision."""
    tx = wrapper(optax.identity())
    random = np.random.default_rng(0)
    w = random.normal(size=size).astype(dtype)
    # Some weights change their sign, and their sizes: there the step is rounded once more.
    us = (0.1 * random.normal(size=(4, size))).astype(np.float32)

    @jax.jit
    def steps(params, us):
        state = tx.init(params)
        for u in us:
            updates, state = tx.update({"w": u}, state, params)
            params = optax.apply_updates(params, updates)
        return params

    got = np.asarray(steps({"w": jnp.asarray(w)}, us)["w"])
    np.testing.assert_array_equal(got, numpy_steps(wrapper, w, us, seed=0))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_program_of_several_steps_is_numpys_steps(wrapper, dtype, full_compilation):
    check_against_numpy(wrapper, dtype, 4000)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_on_a_gpu(wrapper, dtype, full_compilation):
    assert jax.default_backend() == "gpu"
    check_against_numpy(wrapper, dtype, 1_000_000)


def test_draws_repeat_and_differ_between_leaves_and_steps():
    w = jnp.ones(200, jnp.bfloat16)
    params = {"a": w, "b": w}
    tx = optax_gale.stochastic_rounding(optax.sgd(1e-3), seed=3)
    grads = jax.tree.map(jnp.ones_like, params)
    first, state = tx.update(grads, tx.init(params), params)
    again, _ = tx.update(grads, tx.init(params), params)
    chex.assert_trees_all_equal(first, again)
    assert (first["a"] != first["b"]).any()
    second, _ = tx.update(grads, state, params)
    assert (first["a"] != second["a"]).any()
    other = optax_gale.stochastic_rounding(optax.sgd(1e-3), seed=4)
    assert (first["a"] != other.update(grads, other.init(params), params)[0]["a"]).any()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_other_leaves_boxes_and_extra_arguments(wrapper):
    params = {
        "boxed": nn.Partitioned(jnp.ones((16, 32), jnp.bfloat16), names=("in", "out")),
        "wide": jnp.ones(3),
        "whole": jnp.arange(3),
        "none": None,
    }
    inner = optax_gale.gale(optax.sgd(1e-3), 4, update_proj_gap=2)
    tx = wrapper(inner)
    state = tx.init(params)
    grads = jax.tree.map(lambda w: jnp.ones_like(w, jnp.float32), params)
    updates, state = tx.update(grads, state, params, refresh=True)
    expected, _ = inner.update(grads, inner.init(params), params, refresh=True)
    chex.assert_trees_all_equal(updates["wide"], expected["wide"])
    assert updates["boxed"].names == ("in", "out")
    assert updates["boxed"].unbox().dtype == jnp.bfloat16
    assert all(jnp.size(x) for x in jax.tree.leaves(state))
    if wrapper is optax_gale.kahan_summation:
        assert state.compensation["boxed"].names == ("in", "out")
        assert state.compensation["wide"] == optax.MaskedNode()
    specs = jax.tree.map(lambda w: jax.sharding.PartitionSpec(), params)
    chex.assert_trees_all_equal_structs(
        jax.tree.map(lambda _: 0, optax_gale.state_partition_specs(tx, params, specs)),
        jax.tree.map(lambda _: 0, nn.unbox(state)),
    )
    report = optax_gale.memory_report(tx, params)
    assert report.state == sum(x.nbytes for x in jax.tree.leaves(state))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_devices_draw_and_keep_what_is_theirs(wrapper, axis_type):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec("x"))
        w = jax.device_put(jnp.ones((64, 48), jnp.bfloat16), sharding)
        tx = wrapper(optax.sgd(1e-3))

        def step(w, state):
            updates, state = tx.update(jnp.ones_like(w), state, w)
            return optax.apply_updates(w, updates), state

        compiled = jax.jit(step).lower(w, tx.init(w)).compile()
        assert "64,48" not in compiled.as_text()
        new, _ = compiled(w, tx.init(w))
    alone, _ = jax.jit(step)(jnp.ones((64, 48), jnp.bfloat16), tx.init(jnp.ones_like(new)))
    np.testing.assert_array_equal(new, alone)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_errors(wrapper):
    with pytest.raises(TypeError, match="`inner` must be an Optax gradient transformation"):
        wrapper(1e-3)
    tx = wrapper(optax.sgd(1e-3))
    params = jnp.ones(2, jnp.bfloat16)
    with pytest.raises(ValueError, match="pass `params` to `update`"):
        tx.update(params, tx.init(params))
    inner = optax.sgd(1e-3, momentum=0.9)
    tx, params = wrapper(inner), {"w": jnp.ones((4, 3), jnp.bfloat16)}
    state = tx.init(params)
    with pytest.raises(TypeError, match=rf"`state` must be .* a {type(state).__name__}, got tuple"):
        tx.update(params, inner.init(params), params)
    with pytest.raises(ValueError, match="`updates` does not have the structure of the parameters"):
        tx.update({"v": params["w"]}, state, params)
    # It would be broadcast.
    with pytest.raises(ValueError, match=r"'w' has shape \(3,\), .* has shape \(4, 3\)"):
        tx.update({"w": jnp.ones(3)}, state, params)


def test_a_compensation_of_other_weights_is_refused():
    tx, params = optax_gale.kahan_summation(optax.sgd(1e-3)), {"w": jnp.ones((4, 3), jnp.bfloat16)}
    for other, words in (
        ({"w": jnp.ones(3, jnp.bfloat16)}, r"'w' has shape \(4, 3\), .* compensation .* \(3,\)"),
        ({"v": params["w"]}, "`state.compensation` does not have the structure"),
    ):
        with pytest.raises(ValueError, match=words):
            tx.update(params, tx.init(other), params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float33", 3, jnp.float16])
def test_a_compensation_is_of_the_weights_dtype_or_float32(dtype):
    with pytest.raises(ValueError, match=r"`compensation_dtype` must be None, .* or .float32."):
        optax_gale.kahan_summation(optax.sgd(1e-3), compensation_dtype=dtype)
