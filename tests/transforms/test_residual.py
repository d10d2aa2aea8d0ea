"""Fira's term: what the subspace drops, scaled like what it keeps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_gale
from optax_gale.transforms.inner import direction

from .reference import Adam, assert_trees_close, lift, project, turned

RANK = 3
SHAPES = {"wide": (6, 10), "towers": (2, 10, 6)}
GROWTH = 1.01


def rows_of(name):
    return name == "wide"


def draw(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


def norm(x, axes):
    return np.sqrt(np.sum(x * x, axis=axes, keepdims=True))


def fira(g, p, r, u, previous, rows):
    """``phi_i = |U_i| / |R_i|``; ``|phi S| / |U|`` grows by at most 1 % a step."""
    axis = -2 if rows else -1
    scaled = norm(u, axis) / norm(r, axis) * (g - lift(p, r, rows))
    ratio = norm(scaled, (-2, -1)) / norm(u, (-2, -1))
    limited = ratio if previous is None else np.minimum(ratio, GROWTH * previous)
    return scaled * limited / ratio, limited, ratio


def test_equations_and_limiter_over_several_steps():
    """A learning rate that rises inside the inner is no spike; dropped gradients that grow are."""
    schedule = optax.linear_schedule(0.01, 0.1, 10)
    scale, decay, steps = 0.5, 0.2, 10
    tx = optax_gale.gale(
        optax.adamw(schedule, weight_decay=decay),
        RANK,
        scale=scale,
        side="short",
        moments="keep",
        residual="fira",
        update_proj_gap=4,
        range_finder=turned,
    )
    update = jax.jit(tx.update)
    params = draw(0)
    state = tx.init(params)
    chex.assert_trees_all_equal_shapes(
        state.residual, {"wide": jnp.zeros(()), "towers": jnp.zeros(2)}
    )
    adams = {name: Adam() for name in SHAPES}
    previous: dict[str, np.ndarray | None] = dict.fromkeys(SHAPES)
    limits = {name: [] for name in SHAPES}
    for step in range(steps):
        grads = draw(100 + step)
        # Between refreshes, one matrix of the stack loses ever more of its gradient.
        p = np.asarray(state.projector["towers"], np.float64)
        if step % 4:
            grads["towers"][1] += 1.3**step * (draw(1)["towers"] @ (np.eye(6) - p @ p.mT))[1]
        updates, state = update(grads, state, params)
        expected = {}
        for name, g in grads.items():
            g, rows = g.astype(np.float64), rows_of(name)
            p = np.asarray(state.projector[name], np.float64)
            r = project(p, g, rows)
            u = -float(schedule(step)) * adams[name](r)
            term, previous[name], ratio = fira(g, p, r, u, previous[name], rows)
            limits[name].append((previous[name] < ratio * (1 - 1e-9)).reshape(-1))
            expected[name] = scale * (lift(p, u, rows) - term)
            expected[name] -= float(schedule(step)) * decay * params[name]
        assert_trees_close(updates, expected, 1e-4)
        memory = {name: ratio.reshape(SHAPES[name][:-2]) for name, ratio in previous.items()}
        assert_trees_close(state.residual, memory, 1e-4)
    limited = np.array(limits["towers"])
    assert limited[1:4, 1].all()  # the spike is held back,
    assert not limited[:, 0].all()  # while the other matrix is on its own


def term_of(inner, params, grads, *, steps=1):
    """The term of the last step, and the part of the gradient that it should follow."""
    updates = {}
    for residual in (None, "fira"):
        tx = optax_gale.gale(
            inner,
            RANK,
            side="short",
            range_finder=turned,
            update_proj_gap=100,
            residual=residual,
        )
        state = tx.init(params)
        update = jax.jit(tx.update)
        for _ in range(steps):
            updates[residual], state = update(grads, state, params)
    p = state.projector["wide"]
    dropped = grads["wide"] - p @ (p.T @ grads["wide"])
    return updates["fira"]["wide"] - updates[None]["wide"], dropped


WARM_UP = optax.linear_schedule(0.0, 0.1, 20)
DIRECTIONS = {
    "scale_by_adam": (lambda: optax.scale_by_adam(), 1),
    "adamw": (lambda: optax.adamw(0.1, weight_decay=0.5), -1),
    "lion": (lambda: optax.lion(0.1), -1),
    "sgd": (lambda: optax.sgd(0.1, momentum=0.9), -1),
    "ascent": (lambda: optax.sgd(-0.1), 1),
    "warm-up from zero": (lambda: optax.adamw(WARM_UP), -1),
    "injected": (lambda: optax.inject_hyperparams(optax.adamw)(WARM_UP), -1),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_follows_the_direction_of_the_inner(name):
    make, sign = DIRECTIONS[name]
    shapes = {"wide": SHAPES["wide"]}
    term, dropped = term_of(make(), draw(0, shapes), draw(1, shapes), steps=4)
    # Every column of the term is a multiple of the dropped gradient's, with the inner's sign.
    factors = np.sum(np.asarray(term) * dropped, 0) / np.sum(dropped**2, 0)
    assert np.all(np.sign(factors) == sign)
    assert_trees_close(term, factors * dropped, 1e-4)


@pytest.mark.parametrize(
    ("make", "sign"),
    [
        (lambda: optax.MultiSteps(optax.sgd(0.1), 7), -1),
        (lambda: optax.apply_every(5), 1),
        (lambda: optax.sgd(optax.piecewise_constant_schedule(0.0, {}), 1), 0),
        (lambda: optax.sgd(lambda count: jnp.where(count < 500, 0.0, 0.1)), -1),
        (lambda: optax.set_to_zero(), 0),
    ],
    ids=["accumulation", "apply_every", "schedule of zero", "long pause", "frozen"],
)
def test_direction_of_an_inner_that_pauses(make, sign):
    tree = {"wide": jnp.zeros((RANK, 10)), "bias": jnp.zeros(7)}
    inner = optax.with_extra_args_support(make())
    assert direction(inner, tree, [False, True]) == sign


def test_hyperparameters_that_are_traced():
    """`inject_hyperparams` around everything: nothing about the inner is known before it runs."""
    shapes = {"wide": SHAPES["wide"]}
    params, grads = draw(0, shapes), draw(1, shapes)
    make = optax.inject_hyperparams(
        optax_gale.gale_adamw,
        static_args=("rank", "residual", "side", "range_finder", "update_proj_gap"),
    )
    updates = {}
    for residual in (None, "fira"):
        tx = make(
            learning_rate=WARM_UP,
            rank=RANK,
            residual=residual,
            side="short",
            range_finder=turned,
            update_proj_gap=100,
        )
        update, state = jax.jit(tx.update), tx.init(params)
        for _ in range(2):
            updates[residual], state = update(grads, state, params)
    term = updates["fira"]["wide"] - updates[None]["wide"]
    p = state.inner_state.projector["wide"]
    assert np.sum(np.asarray(term) * (grads["wide"] - p @ (p.T @ grads["wide"]))) < 0


def test_an_inner_that_stands_still_stays_there():
    shapes = {"wide": SHAPES["wide"]}
    term, _ = term_of(optax.set_to_zero(), draw(0, shapes), draw(1, shapes))
    np.testing.assert_array_equal(term, 0.0)


def test_zero_gradients_add_nothing_and_keep_the_memory():
    tx = optax_gale.gale(optax.adam(0.1), RANK, residual="fira", range_finder=turned)
    update = jax.jit(tx.update)
    params = draw(0)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, state = update(zeros, tx.init(params), params)
    chex.assert_trees_all_equal(updates, zeros)
    chex.assert_trees_all_equal(
        state.residual, {"wide": np.zeros((), np.float32), "towers": np.zeros(2, np.float32)}
    )
    _, state = update(draw(1), state, params)
    after_zero, later = update(zeros, state, params)
    chex.assert_tree_all_finite(after_zero)  # what momentum is left, and nothing else
    chex.assert_trees_all_equal(state.residual, later.residual)


def test_nothing_is_dropped_at_full_rank():
    shapes = {"wide": (3, 10)}
    term, _ = term_of(optax.adam(0.1), draw(0, shapes), draw(1, shapes))
    np.testing.assert_allclose(term, 0.0, atol=1e-6)


def test_leaves_at_full_rank_have_no_memory():
    params = {**draw(0), "bias": np.ones(7, np.float32)}
    tx = optax_gale.gale_adamw(0.1, RANK, residual="fira")
    residual = jax.eval_shape(tx.init, params).residual
    assert residual["bias"] == optax.MaskedNode()
    plain = jax.eval_shape(optax_gale.gale_adamw(0.1, RANK).init, params)
    assert not jax.tree.leaves(plain.residual)
