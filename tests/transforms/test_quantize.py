"""Optimizer states and projectors in a few bits: against float32, and what GALE does with them."""

import functools
import math
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_gale
from optax_gale.quantization import Quantized, dequantize

from .reference import moments_of, turned

SHAPES = {"kernel": (24, 40), "stack": (3, 16, 24), "bias": (40,)}
QUANTISED = ("kernel", "stack")
is_quantized = lambda x: isinstance(x, Quantized)


def draw(seed, shapes=SHAPES, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


def read(tree):
    """Quantised arrays of a state as arrays."""
    return jax.tree.map(lambda x: dequantize(x) if is_quantized(x) else x, tree,
                        is_leaf=is_quantized)  # fmt: skip


def regression(params, step):
    """Least squares with a new batch a step: gradients that are noisy and of many sizes."""
    total = 0.0
    for name in QUANTISED:
        key = jax.random.fold_in(jax.random.key(len(name)), step)
        x = jax.random.normal(key, (64, params[name].shape[-2])) * jnp.logspace(
            0, -2, params[name].shape[-2]
        )
        y = x @ jnp.ones(params[name].shape[-2:])
        total += jnp.mean((x @ params[name] - y + params["bias"][: y.shape[-1]]) ** 2)
    return total


def train(tx, steps=100, params=None):
    params = draw(0) if params is None else params
    traces = []

    @jax.jit
    def step(params, state, k):
        traces.append(1)
        loss, grads = jax.value_and_grad(regression)(params, k)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = jax.jit(tx.init)(params), []
    for k in range(steps):
        params, state, loss = step(params, state, k)
        losses.append(float(loss))
    assert len(traces) == 1
    return params, state, np.asarray(losses)


# --- The wrapper around any transformation -----------------------------------------------------

INNERS = {
    "adam": lambda: optax.adamw(0.03, weight_decay=1e-3),
    "momentum": lambda: optax.sgd(0.02, momentum=0.9),
    "lion": lambda: optax.lion(0.01),
    "rmsprop": lambda: optax.rmsprop(0.01),
    "adabelief": lambda: optax.adabelief(0.03),
    "amsgrad": lambda: optax.amsgrad(0.03),
}


@pytest.mark.parametrize(
    ("name", "stochastic"), [*((name, False) for name in INNERS), ("adam", True), ("lion", True)]
)
@pytest.mark.quick("adam-False", "lion-True")
def test_trajectories_stay_near_those_of_float32(name, stochastic):
    """Of the way that the float32 optimizer moves the weights, at most a few hundredths apart."""
    start = draw(0)
    wide, _, wide_losses = train(INNERS[name]())
    tx = optax_gale.quantize_states(
        INNERS[name](), min_size=0, stochastic_rounding=stochastic, block_size=64
    )
    narrow, state, losses = train(tx)
    moved = optax.tree.norm(optax.tree.sub(wide, start))
    assert optax.tree.norm(optax.tree.sub(narrow, wide)) < 0.06 * moved
    first = wide_losses[:5].mean()
    assert wide_losses[-10:].mean() < 0.5 * first  # it trains
    assert abs(losses[-10:].mean() - wide_losses[-10:].mean()) < 0.01 * first
    assert any(map(is_quantized, jax.tree.leaves(state, is_leaf=is_quantized)))


def test_states_stay_near_those_of_the_equations_in_float64():
    """Adam's moments of a run of fixed gradients, within what a few roundings leave."""
    grads = [draw(10 + k)["kernel"] for k in range(20)]
    tx = optax_gale.quantize_states(optax.scale_by_adam(), min_size=0)
    state, m, v = tx.init(draw(0)["kernel"]), 0.0, 0.0
    update = jax.jit(tx.update)
    for g in grads:
        _, state = update(g, state)
        m = 0.9 * m + 0.1 * np.asarray(g, np.float64)
        v = 0.999 * v + 0.001 * np.asarray(g, np.float64) ** 2
    got = read(state.inner_state)
    largest = lambda x: np.abs(x).max(axis=-1, keepdims=True)
    # Of each rounding, of half a distance at most, a tenth is forgotten a step, or next to nothing.
    assert np.all(np.abs(got.mu - m) < 10 * 0.9 / 128 * largest(m))
    assert np.all(np.abs(got.nu - v) < 20 * 0.9 / 256 * largest(v))


def test_which_arrays_are_quantised():
    tx = optax_gale.quantize_states(optax.adamw(1e-3), min_size=24 * 40)
    state = tx.init(draw(0))
    adam = state.inner_state[0]
    for moment, code in ((adam.mu, "dynamic"), (adam.nu, "dynamic_unsigned")):
        assert [is_quantized(moment[k]) for k in SHAPES] == [True, True, False]
        assert moment["kernel"].code == code
        assert moment["kernel"].codes.shape == (24, 40) and moment["kernel"].scales.shape == (24, 1)
        assert moment["bias"].dtype == jnp.float32
    assert adam.count.dtype == state.count.dtype == jnp.int32
    # Neither what nobody knows, nor what would not shrink, nor what is told to be kept.
    unknown = optax.GradientTransformation(
        lambda params: {"copy": params}, lambda u, s, p=None: (u, s)
    )
    for inner, options, params in (
        (unknown, {}, draw(0)),
        (optax.adam(0.1), {}, {"w": jnp.ones((500, 1))}),
        (optax.trace(0.9), {"fields": {"trace": "keep"}}, draw(0)),
    ):
        state = optax_gale.quantize_states(inner, min_size=0, **options).init(params)
        assert not any(map(is_quantized, jax.tree.leaves(state, is_leaf=is_quantized)))
    told = optax_gale.quantize_states(unknown, min_size=0, fields={"copy": "first"})
    assert is_quantized(told.init(draw(0)).inner_state["copy"]["kernel"])


class HandWrittenState(NamedTuple):
    m: Any
    v: Any


def hand_written_adam():
    """With the paper's letters, of which Adan's paper calls a first moment v."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return HandWrittenState(zeros, zeros)

    def update(updates, state, params=None):
        del params
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state.m, updates)
        v = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g**2, state.v, updates)
        steps = jax.tree.map(lambda m, v: -m / (jnp.sqrt(v) + 1e-8), m, v)
        return steps, HandWrittenState(m, v)

    return optax.GradientTransformation(init, update)


def test_letters_are_known_in_the_states_that_use_them_only():
    params, inner = draw(0), hand_written_adam()
    state = optax_gale.quantize_states(inner, min_size=0).init(params)
    assert not any(map(is_quantized, jax.tree.leaves(state, is_leaf=is_quantized)))
    with pytest.raises(ValueError, match=r"state\.m.* 'm' depends .*Rotate\(\{'m': 'first'\}\)"):
        optax_gale.gale(inner, RANK).init(params)
    with pytest.raises(ValueError, match="'v' depends"):
        optax_gale.gale(inner, RANK, moments=optax_gale.Rotate({"m": "first"})).init(params)
    told = {"m": "first", "v": "second"}
    tx = optax_gale.quantize_states(inner, min_size=0, fields=told)
    state = tx.init(params)
    assert state.inner_state.v["kernel"].code == "dynamic_unsigned"
    plain = inner.init(params)
    # A block over many sizes: a second moment rounded to zero would make a step of m / eps.
    sizes = jnp.logspace(0, -6, 40)
    for k in range(3):
        grads = {**draw(k), "kernel": sizes * draw(k)["kernel"]}
        updates, state = tx.update(grads, state, params)
        expected, plain = inner.update(grads, plain, params)
        assert np.abs(updates["kernel"]).max() < 1.3 * np.abs(expected["kernel"]).max()
    tx = optax_gale.gale(inner, RANK, state_dtype="int8", moments=optax_gale.Rotate(told))
    quantised = optax_gale.memory_report(tx, {"w": jnp.ones((256, 2048))}).moments
    assert quantised < 0.3 * 4 * 2 * RANK * 2048


def test_an_average_of_the_hessians_diagonal_keeps_its_sign():
    """Sophia's `nu`, of Hutchinson's estimates, is negative where the loss bends down."""
    tx = optax_gale.quantize_states(optax.contrib.sophia(0.1), min_size=0)
    params = {"w": draw(0)["kernel"]}
    bends = jnp.where(jnp.arange(40) % 2 == 0, 3.0, -2.0)
    objective = lambda params: jnp.sum(bends * params["w"] ** 2) / 2
    state = tx.init(params)
    _, state = tx.update(jax.grad(objective)(params), state, params, obj_fn=objective)
    nu = dequantize(state.inner_state[0].nu["w"])
    np.testing.assert_allclose(nu, 0.01 * np.broadcast_to(bends, (24, 40)), rtol=0.01)


def test_sophias_diagonal_turns_as_a_variance_does():
    """By the rotation's squares, whatever its sign; with an estimator that runs in a subspace."""
    estimator = optax.GradientTransformation(
        lambda params: optax.EmptyState(),
        lambda g, s, p=None: (jax.tree.map(lambda x: x * jnp.abs(x), g), s),
    )
    inner = optax.contrib.sophia(0.1, update_interval=1, hessian_diagonal_fn=estimator)
    tx = optax_gale.gale(
        optax_gale.quantize_states(inner, min_size=0), RANK, range_finder=turned, side="short"
    )
    params = {"w": draw(0)["kernel"]}
    update = jax.jit(functools.partial(tx.update, refresh=True))
    _, before = update({"w": draw(1)["kernel"]}, tx.init(params), params)
    _, after = update({"w": 1e-9 * draw(2)["kernel"]}, before, params)
    old, new = (np.asarray(s.projector["w"], np.float64) for s in (before, after))
    nu, got = (dequantize(s.inner_state.inner_state[0].nu["w"]) for s in (before, after))
    wanted = 0.99 * (new.T @ old) ** 2 @ np.asarray(nu, np.float64)
    assert nu.min() < 0 and np.abs(got - wanted).max() < 0.02 * np.abs(nu).max()


@pytest.mark.parametrize("name", ["MultiSteps", "apply_every", "optimistic", "adan", "rprop"])
@pytest.mark.quick("adan", "MultiSteps")
def test_gradients_that_are_held_are_not_rounded(name):
    """They turn with the subspace, but nothing evens their rounding out."""
    inner, field = {
        "MultiSteps": (optax.MultiSteps(optax.adam(0.1), 2), "acc_grads"),
        "apply_every": (optax.chain(optax.trace(0.9), optax.apply_every(2)), "grad_acc"),
        "optimistic": (optax.optimistic_adam_v2(0.1), "previous_gradient"),
        "adan": (optax.adan(0.1), "g"),
        "rprop": (optax.rprop(0.1), "prev_updates"),
    }[name]
    wide = {"kernel": (64, 2048)}
    params, grads = draw(0, wide), draw(1, wide)
    alone = optax_gale.quantize_states(inner, min_size=0)
    within = optax_gale.gale(inner, RANK, state_dtype="int8", side="short", range_finder="svd")
    gale = optax_gale.gale(inner, RANK, range_finder="svd")
    around = optax_gale.quantize_states(gale, min_size=0)
    for tx in (alone, within, around):
        state = tx.init(params)
        _, state = jax.jit(tx.update)(grads, state, params)
        assert np.any(moments_of(state, field)["kernel"])  # or it would hold codes and scales
        rest = jax.tree.leaves(state, is_leaf=is_quantized)
        assert any(map(is_quantized, rest)) == (name != "rprop")
    told = optax_gale.quantize_states(inner, min_size=0, fields={field: "first"})
    assert "kernel/codes" in moments_of(told.init(params), field)


def test_amsgrad_adafactor_and_accumulators():
    for inner, second in (
        (optax.amsgrad(0.1), ("nu", "nu_max")),
        (optax.adafactor(0.1, min_dim_size_to_factor=8), ("v_row", "v_col")),
        (optax.adabelief(0.1), ("nu",)),
    ):
        state = optax_gale.quantize_states(inner, min_size=0).init(draw(0))
        found = {
            path[[getattr(key, "name", "") in second for key in path].index(True)].name: x.code
            for path, x in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_quantized)
            if is_quantized(x) and any(getattr(key, "name", "") in second for key in path)
        }
        assert found == dict.fromkeys(second, "dynamic_unsigned")


def test_a_second_moment_near_zero_does_not_explode():
    """Sizes over ten orders of magnitude in one block: rounded to the nearest number, the second
    moments of the small ones would be zero, and their steps ``m / eps``."""
    sizes = jnp.logspace(0, -10, 64)
    tx = optax_gale.quantize_states(optax.adam(1.0, eps=1e-12), min_size=0)
    state = tx.init(jnp.zeros(64))
    plain = optax.adam(1.0, eps=1e-12)
    plain_state = plain.init(jnp.zeros(64))
    for k in range(10):
        g = sizes * (1 + 0.5 * jax.random.normal(jax.random.key(k), (64,)))
        updates, state = tx.update(g, state)
        exact, plain_state = plain.update(g, plain_state)
        assert np.all(np.isfinite(updates))
        assert np.max(np.abs(updates)) < 2 * np.max(np.abs(exact))
    assert np.all(np.asarray(dequantize(state.inner_state[0].nu)) > 0)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_useless_gradients(bad):
    """Zero leaves zeros; what is not finite stays visible, and in its row."""
    tx = optax_gale.quantize_states(optax.adam(0.1), min_size=0)
    params = {"w": jnp.ones((4, 16))}
    grads = {"w": jnp.ones((4, 16)).at[2].set(bad)}
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
    assert np.all(np.isfinite(updates["w"][jnp.asarray([0, 1, 3])]))
    if bad == 0:
        np.testing.assert_array_equal(updates["w"][2], 0.0)
    else:
        assert np.all(np.isnan(updates["w"][2]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_parameters_are_stepped_in_float32(dtype):
    params = draw(0, dtype=dtype)
    tx = optax_gale.quantize_states(optax.adamw(0.1), min_size=0)
    state = tx.init(params)
    assert state.inner_state[0].mu["kernel"].dtype == "float32"
    updates, new = jax.jit(tx.update)(draw(1, dtype=dtype), state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


def test_stochastic_rounding_follows_small_changes():
    """A second moment that decays by a thousandth a step: nearest codes stand still."""
    params = {"w": jnp.ones((8, 256))}
    grads = {"w": jnp.zeros((8, 256)).at[:, 0].set(1.0)}  # keeps the scale of each block
    left = {}
    for stochastic in (False, True):
        tx = optax_gale.quantize_states(
            optax.scale_by_rms(0.999), min_size=0, stochastic_rounding=stochastic
        )
        state = tx.init(params)
        _, state = tx.update({"w": jnp.ones((8, 256))}, state)
        step = jax.jit(lambda s, tx=tx: tx.update(grads, s)[1])
        for _ in range(500):
            state = step(state)
        nu = dequantize(state.inner_state.nu["w"])
        left[stochastic] = float(jnp.mean(nu[:, 1:]) / 0.001)
    assert left[True] == pytest.approx(0.999**500, abs=0.05)
    assert abs(left[False] - 0.999**500) > 0.1


def test_seeds_places_and_steps_make_the_random_numbers():
    same = {"a": draw(0)["kernel"], "b": draw(0)["kernel"]}

    def codes(seed, count=0):
        tx = optax_gale.quantize_states(
            optax.adam(0.1), min_size=0, stochastic_rounding=True, seed=seed
        )
        state = tx.init(same)._replace(count=jnp.int32(count))
        _, state = tx.update(same, state, same)
        return jax.tree.map(lambda x: np.asarray(x.codes), state.inner_state[0].mu,
                            is_leaf=is_quantized)  # fmt: skip

    first = codes(0)
    chex.assert_trees_all_equal(first, codes(0))
    assert np.any(first["a"] != first["b"])
    assert np.any(first["a"] != codes(1)["a"])
    assert np.any(first["a"] != codes(0, count=1)["a"])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"block_size": 0}, ValueError, "`block_size` must be at least 1, got 0"),
        ({"block_size": 2.5}, TypeError, "`block_size` must be an int, got 2.5"),
        ({"min_size": -1}, ValueError, "`min_size` must be 0 .* or more, got -1"),
        ({"min_size": None}, TypeError, "`min_size` must be an int"),
        ({"stochastic_rounding": 1}, TypeError, "`stochastic_rounding` must be a bool"),
        ({"seed": 1.5}, TypeError, "`seed` must be an int"),
        ({"fields": {"x": "third"}}, ValueError, "`fields` must give each field one of"),
        ({"fields": "nu"}, TypeError, "`fields` must map"),
        ({"inner": 3}, TypeError, "`inner` must be an Optax gradient transformation"),
    ],
)
def test_what_makes_no_sense_is_refused(options, error, words):
    inner = options.pop("inner", optax.adam(0.1))
    with pytest.raises(error, match=words):
        optax_gale.quantize_states(inner, **options)


def test_updates_refuse_what_is_not_theirs():
    inner = optax.sgd(0.1, momentum=0.9)
    tx, params = optax_gale.quantize_states(inner, block_size=np.int32(64)), draw(0)
    state = tx.init(params)
    with pytest.raises(TypeError, match=r"`state` must be .* a QuantizeStatesState, got tuple"):
        tx.update(params, inner.init(params), params)
    with pytest.raises(ValueError, match="`updates` does not have the structure of the parameters"):
        tx.update({"kernel": params["kernel"]}, state, params)
    with pytest.raises(ValueError, match=r"'bias' has shape \(1,\), .* shape \(40,\)"):
        tx.update({**params, "bias": jnp.ones(1)}, state, params)


def test_vmap_is_a_loop():
    tx = optax_gale.quantize_states(optax.adam(0.1), min_size=0, stochastic_rounding=True)
    params = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), draw(0))
    states = jax.jit(jax.vmap(tx.init))(params)
    updates, states = jax.jit(jax.vmap(tx.update))(params, states, params)
    update = jax.jit(tx.update)
    for i in range(2):
        one = jax.tree.map(lambda x, i=i: x[i], params)
        alone, state = update(one, tx.init(one), one)
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], updates), alone, rtol=1e-5)
        chex.assert_trees_all_equal_shapes_and_dtypes(
            jax.tree.map(lambda x, i=i: x[i], states), state
        )


# --- In subspaces ------------------------------------------------------------------------------

RANK = 4
GALES = {
    "alias": lambda **o: optax_gale.gale_adamw(0.03, RANK, state_dtype="int8", **o),
    "wrapped inner": lambda **o: optax_gale.gale(
        optax_gale.quantize_states(optax.adamw(0.03), min_size=0, block_size=16), RANK, **o
    ),
    "stochastic": lambda **o: optax_gale.gale(
        optax_gale.quantize_states(optax.adamw(0.03), min_size=0, stochastic_rounding=True),
        RANK, **o,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("moments", "schedule", "projector"),
    [
        pytest.param("keep", "together", "int8", marks=pytest.mark.slow),
        pytest.param("rotate", "together", "float32", marks=pytest.mark.slow),
        ("rotate", "staggered", "int8"),
        ("rotate", "together", "int4"),
        pytest.param("reset", "staggered", "int4", marks=pytest.mark.slow),
        pytest.param("reset", "together", "float32", marks=pytest.mark.slow),
    ],
)
def test_trajectories_over_refreshes_stay_near_those_of_float32(moments, schedule, projector):
    options = {
        "update_proj_gap": 10, "moments": moments, "refresh_schedule": schedule,
        "range_finder": "svd",
    }  # fmt: skip
    wide, _, wide_losses = train(optax_gale.gale_adamw(0.03, RANK, **options), 60)
    tx = GALES["wrapped inner"](projector_dtype=projector, **options)
    narrow, state, losses = train(tx, 60)
    moved = optax.tree.norm(optax.tree.sub(wide, draw(0)))
    apart = optax.tree.norm(optax.tree.sub(narrow, wide))
    assert apart < (0.3 if projector == "int4" else 0.15) * moved
    np.testing.assert_allclose(losses[-5:].mean(), wide_losses[-5:].mean(), rtol=0.1)
    assert is_quantized(state.inner_state.inner_state[0].mu["kernel"])


@pytest.mark.parametrize("name", ["wrapped inner", "stochastic"])
def test_a_refresh_rotates_the_values(name):
    """What is stored after a refresh with a gradient of zero is the decayed rotation of what was
    stored before, up to two roundings."""
    for moments in ("rotate", "reset"):
        tx = GALES[name](moments=moments, range_finder=turned, projector_dtype="int8")
        params = draw(0)
        state = tx.init(params)
        update = jax.jit(functools.partial(tx.update, refresh=True))
        for k in range(3):
            _, state = update(draw(10 + k), state, params)
        grads = draw(99)
        # A gradient of zero refreshes nothing; a tiny one does, and hardly enters the moments.
        grads["kernel"] = 1e-12 * draw(98)["kernel"]
        _, after = update(grads, state, params)
        old, new = (np.asarray(read(s.projector)["kernel"], np.float64) for s in (state, after))
        assert np.abs(old - new).max() > 0.1
        before, got = (read(s.inner_state.inner_state[0]) for s in (state, after))
        q = new.T @ old
        wanted = q @ np.asarray(before.mu["kernel"], np.float64)  # rows are the shorter side
        wanted = 0.9 * wanted * (moments == "rotate")
        scale = np.abs(before.mu["kernel"]).max()
        assert np.abs(got.mu["kernel"] - wanted).max() < 0.03 * scale
        # LDAdam's rule, of moments corrected for three steps: the decays are found all the same.
        m, v = (np.asarray(x["kernel"], np.float64) for x in (before.mu, before.nu))
        over = (1 - 0.999**3) / (1 - 0.9**3) ** 2
        wanted = np.abs(q**2 @ (v - over * m**2) + over * (q @ m) ** 2) * (moments == "rotate")
        assert np.abs(got.nu["kernel"] - 0.999 * wanted).max() < 0.03 * v.max()
        assert np.all(got.nu["kernel"] >= 0)


@pytest.mark.parametrize("projector", ["int8", "int4"])
def test_moments_are_turned_by_the_projectors_that_are_stored(projector):
    """Not by those that were found, which no gradient ever met; moments in float32 show it."""
    tx = optax_gale.gale(
        optax.trace(0.9), RANK, range_finder=turned, projector_dtype=projector, side="short"
    )
    params = {"w": draw(0)["kernel"]}
    update = jax.jit(functools.partial(tx.update, refresh=True))
    _, before = update({"w": draw(1)["kernel"]}, tx.init(params), params)
    _, after = update({"w": 1e-9 * draw(2)["kernel"]}, before, params)
    old, new = (np.asarray(read(s.projector)["w"], np.float64) for s in (before, after))
    wanted = 0.9 * (new.T @ old) @ np.asarray(before.inner_state.trace["w"], np.float64)
    np.testing.assert_allclose(after.inner_state.trace["w"], wanted, atol=1e-5)


@pytest.mark.parametrize("name", GALES)
def test_decay_of_whole_weights(name):
    """The update with weights less the update without: exactly ``-lr * decay * W``."""
    make = {
        "alias": lambda: optax_gale.gale_adamw(
            0.1, RANK, state_dtype="int8", weight_decay=0.3, range_finder="svd"
        ),
        "wrapped inner": lambda: optax_gale.gale(
            optax_gale.quantize_states(optax.adamw(0.1, weight_decay=0.3), min_size=0),
            RANK,
            range_finder="svd",
        ),
        "stochastic": lambda: optax_gale.gale(
            optax_gale.quantize_states(
                optax.adamw(0.1, weight_decay=0.3), min_size=0, stochastic_rounding=True
            ),
            RANK,
            range_finder="svd",
        ),
    }[name]
    tx, params = make(), draw(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(2):
        (with_weights, new), (without, other) = (update(draw(1), state, p) for p in (params, zeros))
        chex.assert_trees_all_equal(new, other)
        state = new
    chex.assert_trees_all_close(
        jax.tree.map(jnp.subtract, with_weights, without),
        jax.tree.map(lambda w: -0.03 * w, params),
        atol=1e-6,
    )


@pytest.mark.parametrize("projector", ["float32", "int8", "int4"])
@pytest.mark.quick("int4")
def test_update_and_apply_is_the_two_calls(projector):
    tx = GALES["wrapped inner"](projector_dtype=projector, range_finder="svd")
    params, grads = draw(0), draw(1)
    state = tx.init(params)

    @jax.jit
    def two(params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    one = jax.jit(lambda params, state: optax_gale.update_and_apply(tx, grads, state, params))
    expected = got = (params, state)
    for _ in range(3):
        expected, got = two(*expected), one(*got)
    chex.assert_trees_all_close(got[0], expected[0], atol=2e-6)
    chex.assert_trees_all_close(read(got[1]), read(expected[1]), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
def test_quantised_moments_are_not_for_the_elementwise_kernels(implementation, monkeypatch):
    """Their inner is read as a program that is not elementwise, whatever kernel is there."""
    from optax_gale import pallas
    from optax_gale.transforms import in_place

    back_project_apply = pallas.back_project_apply

    def choose(gs, ps, *, rows, implementation):
        return [implementation] * len(gs)

    def refuse(*_, **__):
        raise AssertionError("a kernel was run")

    monkeypatch.setattr(in_place.pallas, "choose_project_update", choose)
    monkeypatch.setattr(in_place.pallas, "project_update", refuse)
    monkeypatch.setattr(
        in_place.pallas,
        "back_project_apply",
        lambda *a, implementation, **k: back_project_apply(*a, implementation="xla", **k),
    )
    params = {k: draw(0)[k] for k in QUANTISED}

    def trace(tx):
        step = functools.partial(optax_gale.update_and_apply, tx, implementation=implementation)
        jax.eval_shape(step, params, jax.eval_shape(tx.init, params), params)

    trace(GALES["wrapped inner"]())
    with pytest.raises(AssertionError, match="a kernel was run"):
        trace(optax_gale.gale_adamw(0.03, RANK))


@pytest.mark.parametrize("name", ["alias", "wrapped inner"])
@pytest.mark.parametrize("projector", ["int8", "int4"])
def test_report_and_specs(name, projector):
    tx = GALES[name](projector_dtype=projector, side="short")
    params = {"w": jnp.ones((256, 2048)), "bias": jnp.ones(8)}
    state = tx.init(params)
    report = optax_gale.memory_report(tx, jax.eval_shape(lambda: params))
    assert report.state == sum(x.nbytes for x in jax.tree.leaves(state))
    leaf = next(x for x in report.leaves if x.path == "w")
    assert leaf.projectors == 256 * (RANK // (2 if projector == "int4" else 1) + 4)
    block = 256 if name == "alias" else 16
    assert leaf.moments == 2 * RANK * (2048 + 4 * math.ceil(2048 / block))
    specs = optax_gale.state_partition_specs(tx, params, {"w": P("data", "model"), "bias": P()})
    assert jax.tree.structure(specs) == jax.tree.structure(state)
    mu = specs.inner_state.inner_state[0].mu["w"]
    assert (mu.codes, mu.scales) == (P(None, "model"), P(None, None))
    p = specs.projector["w"]
    assert (p.codes, p.scales) == (P("data", None), P("data", None))


def test_boxes_hold_codes_and_scales_with_names_of_their_own():
    plain = {"w": draw(0)["kernel"]}
    boxed = {"w": nn.Partitioned(plain["w"], names=("embed", "mlp"))}
    tx = GALES["wrapped inner"](projector_dtype="int4", side="short")
    states = {}
    for params in (plain, boxed):
        state = tx.init(params)
        for _ in range(2):
            updates, state = jax.jit(tx.update)(params, state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        states[type(params["w"])] = state
    boxed_state = states[nn.Partitioned]
    chex.assert_trees_all_equal(
        jax.tree.leaves(nn.meta.unbox(boxed_state)), jax.tree.leaves(states[type(plain["w"])])
    )
    specs = nn.get_partition_spec(boxed_state)
    mu, p = specs.inner_state.inner_state[0].mu["w"], specs.projector["w"]
    assert (mu.codes, mu.scales) == (P(None, "mlp"), P(None, None))
    assert (p.codes, p.scales) == (P("embed", None), P("embed", None))


def test_nnx_variables_hold_codes_and_scales_with_names_of_their_own():
    class Layer(nnx.Module):
        def __init__(self):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", "model"))
            self.linear = nnx.Linear(8, 16, kernel_init=init, rngs=nnx.Rngs(0))

    with jax.set_mesh(
        jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    ):
        model = Layer()
        tx = GALES["wrapped inner"](projector_dtype="int4", side="short", range_finder="svd")
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            optimizer.update(model, nnx.grad(lambda m: jnp.sum(m.linear.kernel[...] ** 2))(model))

        for _ in range(2):
            step(model, optimizer)
        mu = optimizer.opt_state.inner_state.inner_state[0].mu["linear"]["kernel"]
        p = optimizer.opt_state.projector["linear"]["kernel"]
    for x, spec in (
        (mu.codes, P(None, "model")), (mu.scales, P(None, None)), (p.codes, P("data", None)),
        (p.scales, P("data", None)),
    ):  # fmt: skip
        assert P(*x.get_metadata("out_sharding")) == spec
        assert jax.typeof(x.get_value()).sharding.spec == spec


def test_no_gradient_no_update():
    tx, params = optax_gale.quantize_states(optax.adam(0.1), min_size=0), draw(0)
    grads = {**draw(1), "stack": None}
    updates, _ = tx.update(grads, tx.init({**params, "stack": None}), params)
    assert updates["stack"] is None and updates["kernel"].shape == (24, 40)


@pytest.mark.parametrize("kind", [pytest.param("Auto", marks=pytest.mark.slow), "Explicit"])
def test_on_eight_devices_the_numbers_and_shardings_of_one(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(getattr(AxisType, kind),) * 2)
    shapes = {"kernel": (16, 64), "stack": (4, 8, 24), "bias": (8,)}
    specs = {"kernel": P("data", "model"), "stack": P("data", None, "model"), "bias": P("data")}
    tx = optax_gale.gale(
        optax_gale.quantize_states(
            optax.adamw(0.03), min_size=0, block_size=16, stochastic_rounding=kind == "Explicit"
        ),
        3, update_proj_gap=2, projector_dtype="int8", range_finder="svd",
    )  # fmt: skip

    def run(params):
        state = jax.jit(tx.init)(params)
        for k in range(3):
            grads = jax.tree.map(lambda p, k=k: p + 0.3 * jnp.sin(37 * p + k), params)
            updates, state = jax.jit(tx.update)(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    params = draw(0, shapes)
    expected, _ = run(params)
    with jax.set_mesh(mesh):
        placed = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in params.items()}
        got, state = run(placed)
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(expected), atol=5e-3)
    for name, x in got.items():
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, specs[name]), x.ndim)
    codes = state.inner_state.inner_state[0].mu["kernel"].codes  # (3, 64): rows are projected
    assert codes.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "model")), 2)


def test_orbax_restores_it_and_it_goes_on_bit_for_bit(tmp_path):
    tx = GALES["stochastic"](projector_dtype="int4", update_proj_gap=3, range_finder="svd")
    params, update = draw(0), jax.jit(tx.update)
    state = tx.init(params)
    for k in range(4):  # the middle of a gap
        _, state = update(draw(k), state, params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
    chex.assert_trees_all_equal(restored, state)
    for k in range(4, 8):
        (updates, state), (again, restored) = (
            update(draw(k), s, params) for s in (state, restored)
        )
        chex.assert_trees_all_equal((again, restored), (updates, state))


@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.02), ("int4", 0.3)])
def test_a_quantised_projector_is_nearly_orthonormal_and_used_as_it_is_stored(dtype, bound):
    tx = optax_gale.gale(optax.sgd(1.0), RANK, projector_dtype=dtype, side="short")
    params, grads = draw(0), draw(1)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    p = np.asarray(dequantize(state.projector["kernel"]), np.float64)
    assert np.linalg.norm(p.T @ p - np.eye(RANK), 2) < bound
    g = np.asarray(grads["kernel"], np.float64)
    np.testing.assert_allclose(updates["kernel"], -p @ (p.T @ g), rtol=1e-4, atol=1e-5)


def test_half_precision_gradients_meet_one_rounded_projector():
    """Read once, in bfloat16: float32 weights do not see another one than the gradient did."""
    tx = optax_gale.gale(optax.sgd(1.0), RANK, projector_dtype="int8", side="short")
    params = {"w": draw(0)["kernel"]}
    grads = {"w": draw(1)["kernel"].astype(jnp.bfloat16)}
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    p = np.asarray(dequantize(state.projector["w"], jnp.bfloat16), np.float64)
    wanted = -p @ (p.T @ np.asarray(grads["w"], np.float64))
    np.testing.assert_allclose(updates["w"], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rank", "shrinks"), [(1, False), (2, True)])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.quick("int4-2-True")
def test_a_projector_that_would_grow_stays_in_float32(rank, shrinks, dtype):
    tx = optax_gale.gale(
        optax.adamw(0.03), rank, projector_dtype=dtype, side="short", range_finder="svd"
    )
    params = {k: draw(0)[k] for k in QUANTISED}
    state, update = tx.init(params), jax.jit(tx.update)
    for k in range(2):
        updates, new = update(draw(k, {k: SHAPES[k] for k in QUANTISED}), state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        state = new
    chex.assert_tree_all_finite(updates)
    for p in state.projector.values():
        assert is_quantized(p) == shrinks
        # Less than in float32, or just that.
        assert (p.nbytes < 4 * math.prod(p.shape)) == shrinks
    specs = optax_gale.state_partition_specs(tx, params, {k: P() for k in params})
    assert jax.tree.structure(specs) == jax.tree.structure(state)


def test_float64_stays_as_it_is():
    """Scales in float32 have not its range: these second moments would be zeros."""
    with jax.enable_x64(True):
        params = {"w": 1e-30 * draw(0)["kernel"].astype(jnp.float64)}
        inner = optax.adam(0.1, eps=1e-300)
        tx = optax_gale.quantize_states(inner, min_size=0)
        updates, state = tx.update(params, tx.init(params), params)
        expected, _ = inner.update(params, inner.init(params), params)
        assert not any(map(is_quantized, jax.tree.leaves(state, is_leaf=is_quantized)))
        chex.assert_trees_all_equal(updates, expected)
        assert updates["w"].dtype == jnp.float64
