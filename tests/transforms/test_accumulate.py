"""Accumulation in the subspace: equal to projecting the sum, with one refresh a step."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_gale

K = 3


@pytest.fixture(autouse=True, scope="module")
def always_quick(quick_compilation):
    """Asked for by every test."""


def make_params(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "kernel": jax.random.normal(keys[0], (24, 16)).astype(dtype),
        "stack": jax.random.normal(keys[1], (2, 16, 40)).astype(dtype),
        "bias": jax.random.normal(keys[2], (16,)).astype(dtype),
    }


def gradients(params, seed):
    keys = jax.random.split(jax.random.key(1000 + seed), len(params))
    return {
        name: jax.random.normal(key, x.shape).astype(x.dtype)
        for key, (name, x) in zip(keys, sorted(params.items()), strict=True)
    }


def mean_gradients(params, seeds):
    many = [gradients(params, seed) for seed in seeds]
    total = jax.tree.map(lambda *gs: sum(g.astype(jnp.float32) for g in gs) / len(gs), *many)
    return jax.tree.map(lambda g, w: g.astype(w.dtype), total, params)


def fixed(x, *, rank, key, previous):
    """A basis that depends on no gradient, only on the key, which is of the step."""
    draw = jax.random.normal(key, previous.shape, jnp.float32)
    return optax_gale.linalg.orthonormalize(draw)


class Train:
    """A compiled step, in two calls or in one."""

    def __init__(self, tx, in_place=False, **static):
        def step(params, state, grads):
            if in_place:
                return optax_gale.update_and_apply(tx, grads, state, params, **static)
            updates, state = tx.update(grads, state, params, **static)
            return optax.apply_updates(params, updates), state

        self.tx, self.step = tx, jax.jit(step)

    def run(self, params, all_grads):
        state = self.tx.init(params)
        for grads in all_grads:
            params, state = self.step(params, state, grads)
        return params, state


SCHEDULE = optax.warmup_cosine_decay_schedule(1e-3, 1e-2, 2, 8)

OPTIMIZERS = {
    "adamw": lambda: optax_gale.gale_adamw(
        SCHEDULE, 4, weight_decay=0.1, update_proj_gap=2, range_finder=fixed
    ),
    "long, kept": lambda: optax_gale.gale_adamw(
        1e-2, 4, side="long", moments="keep", update_proj_gap=3, range_finder=fixed
    ),
    "muon": lambda: optax_gale.gale_muon(SCHEDULE, 4, update_proj_gap=2, range_finder=fixed),
    "chain": lambda: optax_gale.chain(
        optax_gale.gale_project(4, update_proj_gap=2, range_finder=fixed),
        optax.clip_by_global_norm(0.5),  # in the subspace, of the mean
        optax.scale_by_adam(),
        optax.scale_by_schedule(lambda step: -SCHEDULE(step)),
    ),
    "8 bits": lambda: optax_gale.gale_adamw(
        1e-2, 4, update_proj_gap=2, range_finder=fixed, state_dtype="int8", projector_dtype="int4"
    ),
    "kahan": lambda: optax_gale.kahan_summation(
        optax_gale.gale_adamw(1e-2, 4, update_proj_gap=2, range_finder=fixed)
    ),
}


@pytest.mark.parametrize(
    ("name", "in_place"),
    [*((name, False) for name in OPTIMIZERS), ("adamw", True)],
)
@pytest.mark.quick("adamw-False", "8 bits-False")
def test_is_a_step_for_the_mean(name, in_place):
    params, steps = make_params(), 5
    all_grads = [gradients(params, i) for i in range(K * steps)]
    means = [mean_gradients(params, range(i * K, i * K + K)) for i in range(steps)]
    tx = OPTIMIZERS[name]()
    got, state = Train(optax_gale.accumulate(tx, K), in_place).run(params, all_grads)
    wanted, wanted_state = Train(tx).run(params, means)
    chex.assert_trees_all_close(got, wanted, atol=2e-5)
    assert int(state.gradient_step) == steps and int(state.mini_step) == 0
    chex.assert_trees_all_equal_shapes_and_dtypes(state.inner_state, wanted_state)
    assert np.abs(got["kernel"] - params["kernel"]).max() > 1e-3


def test_nothing_moves_in_between():
    params = make_params()
    train = Train(optax_gale.accumulate(OPTIMIZERS["adamw"](), K))
    before, state = params, train.tx.init(params)
    for i in range(K - 1):
        params, state = train.step(params, state, gradients(params, i))
        chex.assert_trees_all_equal(params, before)
        assert int(state.mini_step) == i + 1
        assert int(state.inner_state.count) == 0
    params, state = train.step(params, state, gradients(params, K))
    assert np.abs(params["kernel"] - before["kernel"]).max() > 0
    assert int(state.inner_state.count) == 1
    assert all(not x.any() for x in jax.tree.leaves(state.projected))


def test_the_first_gradient_decides_the_subspace():
    params = make_params()
    tx = optax_gale.gale_adamw(1e-2, 4, update_proj_gap=2)
    accumulated = Train(optax_gale.accumulate(tx, K))
    state = accumulated.tx.init(params)
    current, update = params, jax.jit(tx.update)
    for step in range(4):
        first = gradients(params, step * K)
        refreshed = update(first, state.inner_state, current)[1].projector
        for i in range(K):
            grads = gradients(params, step * K + i)
            current, state = accumulated.step(current, state, grads)
            chex.assert_trees_all_close(state.inner_state.projector, refreshed, atol=1e-5)


@pytest.mark.parametrize("refresh", [None, True, False])
def test_the_range_finder_runs_once_a_refresh(refresh):
    calls = []

    def counting(x, *, rank, key, previous):
        jax.debug.callback(lambda: calls.append(1))
        return fixed(x, rank=rank, key=key, previous=previous)

    params = {"kernel": make_params()["kernel"]}
    tx = optax_gale.gale_adamw(1e-2, 4, update_proj_gap=2, range_finder=counting)
    Train(optax_gale.accumulate(tx, K), refresh=refresh).run(
        params, [gradients(params, i) for i in range(4 * K)]
    )
    jax.effects_barrier()
    assert len(calls) == {None: 2, True: 4, False: 0}[refresh]


def test_keeps_nothing_of_the_gradients_size():
    params = make_params()
    state = jax.eval_shape(optax_gale.accumulate(OPTIMIZERS["adamw"](), K).init, params)
    shapes = [x.shape for x in jax.tree.leaves(state)]
    assert (24, 16) not in shapes and (2, 16, 40) not in shapes
    assert state.projected["kernel"].shape == (24, 4)
    assert state.projected["stack"].shape == (2, 4, 40)


@pytest.mark.parametrize("asked, wanted", [(None, jnp.float32), ("bfloat16", jnp.bfloat16)])
def test_sums_of_half_precision(asked, wanted):
    params = make_params(jnp.bfloat16)
    tx = optax_gale.gale_adamw(1e-2, 4, range_finder=fixed)
    accumulated = optax_gale.accumulate(tx, 64, accumulator_dtype=asked)
    state = accumulated.init(params)
    assert all(x.dtype == wanted for x in jax.tree.leaves(state.projected))
    step = jax.jit(accumulated.update)
    for i in range(40):
        _, state = step(gradients(params, i), state, params)
    p = np.asarray(state.inner_state.projector["kernel"], np.float64)
    exact = sum(np.asarray(gradients(params, i)["kernel"], np.float64) for i in range(40)) @ p
    error = np.linalg.norm(np.asarray(state.projected["kernel"], np.float64) - exact)
    # Each product is rounded to bfloat16; only the sums can be exact.
    assert error / np.linalg.norm(exact) < (0.004 if asked is None else 0.02)


def test_other_transformations_match_multi_steps():
    params = make_params()
    all_grads = [gradients(params, i) for i in range(8)]
    clipped_adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    got, _ = Train(optax_gale.accumulate(clipped_adamw, 4)).run(params, all_grads)
    wanted, _ = Train(optax.MultiSteps(clipped_adamw, 4)).run(params, all_grads)
    chex.assert_trees_all_close(got, wanted, atol=1e-6)


def test_clipping_before_the_projection_bounds_every_gradient():
    params = {"bias": jnp.zeros(4)}  # at full rank: the sum is that of the clipped gradients
    tx = optax_gale.chain(
        optax.clip_by_global_norm(1.0), optax_gale.gale_project(2), optax.sgd(1.0)
    )
    grads = [{"bias": jnp.full(4, 10.0)}, {"bias": jnp.full(4, 0.1)}]
    got, _ = Train(optax_gale.accumulate(tx, 2)).run(params, grads)
    np.testing.assert_allclose(got["bias"], -(0.5 + 0.1) / 2, rtol=1e-6)


def test_no_schedule_divides_by_zero():
    params = make_params()
    tx = optax_gale.accumulate(optax.sgd(0.1), lambda step: 0 * step)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda x: -0.1 * x, params), rtol=1e-6)
    assert int(state.gradient_step) == 1


def test_a_schedule_of_k():
    params = make_params()
    tx = optax_gale.accumulate(OPTIMIZERS["adamw"](), lambda step: jnp.where(step < 2, 1, 3))
    state, ends = tx.init(params), []
    step = jax.jit(tx.update)
    for i in range(8):
        _, state = step(gradients(params, i), state, params)
        ends.append(int(state.gradient_step))
    assert ends == [1, 2, 2, 2, 3, 3, 3, 4]


def test_stochastic_rounding_draws_once_a_step():
    params = make_params(jnp.bfloat16)
    tx = optax_gale.stochastic_rounding(
        optax_gale.gale_adamw(1e-4, 4, range_finder=fixed, state_dtype="float32")
    )
    got, state = Train(optax_gale.accumulate(tx, K)).run(
        params, [gradients(params, i) for i in range(2 * K)]
    )
    assert int(state.inner_state.count) == 2
    moved = got["kernel"] != params["kernel"]
    assert 0 < moved.mean() < 1  # of an update below half the distance of two numbers
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(got))


def test_donated_arrays_are_reused():
    params = make_params()
    tx = optax_gale.accumulate(OPTIMIZERS["adamw"](), K)
    step = jax.jit(
        lambda params, state, grads: optax_gale.update_and_apply(tx, grads, state, params),
        donate_argnums=(0, 1),
    )
    state = jax.eval_shape(tx.init, params)
    memory = step.lower(params, state, params).compile().memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, state)))
    assert memory.alias_size_in_bytes >= held


def test_refusals():
    tx = OPTIMIZERS["adamw"]()
    params = make_params()
    with pytest.raises(TypeError, match=r"`every_k_schedule` must be an int, or a call.*got 2.5"):
        optax_gale.accumulate(tx, 2.5)
    for wrong in (None, 2.5):
        every = optax_gale.accumulate(tx, lambda step, k=wrong: k)
        with pytest.raises(TypeError, match=r"must be an int, or a callable that returns one"):
            every.update(params, every.init(params), params)
    sums = optax_gale.accumulate(optax.sgd(0.1), 2)
    with pytest.raises(ValueError, match=r"The update of 'bias' has shape \(1,\).*\(16,\)"):
        sums.update({**params, "bias": jnp.ones(1)}, sums.init(params), params)
    with pytest.raises(ValueError, match=r"`every_k_schedule` must be at least 1, got 0"):
        optax_gale.accumulate(tx, 0)
    with pytest.raises(
        ValueError, match=r"`accumulator_dtype` must be a floating type .* got 'int8'"
    ):
        optax_gale.accumulate(tx, 2, accumulator_dtype="int8")
    with pytest.raises(TypeError, match=r"`tx` must be an Optax gradient transformation"):
        optax_gale.accumulate(0.1, 2)
    scheduled = optax_gale.chain(optax.scale_by_schedule(SCHEDULE), tx)
    with pytest.raises(ValueError, match=r"keeps a state \(ScaleByScheduleState\).*every gradient"):
        optax_gale.accumulate(scheduled, 2).init(params)
    fira = optax_gale.accumulate(optax_gale.gale_adamw(0.1, 4, residual="fira"), 2)
    with pytest.raises(ValueError, match=r"residual='fira' needs the gradient itself"):
        fira.update(params, fira.init(params), params)
    with pytest.raises(TypeError, match=r"`state` must be what `init`.*got GaleState"):
        optax_gale.accumulate(tx, 2).update(params, tx.init(params), params)
