"""What a refresh does to the inner's moments."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import optax_gale
from optax_gale.transforms import moments
from optax_gale.transforms.matrices import MatrixView, Projection

from .reference import assert_trees_close, lift, moments_of, project, turned

RANK = 4
SHAPES = {"wide": (6, 10), "towers": (2, 2, 10, 6), "b": (7,)}
PROJECTED = [name for name, shape in SHAPES.items() if len(shape) > 1]


def rows_of(name):
    """Whether the rows are the shorter side, and so projected."""
    return name != "towers"


def draw(seed, shapes=SHAPES, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


def numpy64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def across_a_refresh(
    inner, moments, *, side="short", steps=3, dtype=jnp.float32, zero=None, **options
):
    """State before and after a step that refreshes, its gradients, and its updates."""
    tx = optax_gale.gale(
        inner,
        RANK,
        side=side,
        moments=moments,
        range_finder=turned,
        **options,
    )
    update = jax.jit(functools.partial(tx.update, refresh=True))
    params = draw(0, dtype=dtype)
    state = tx.init(params)
    for step in range(steps):
        _, state = update(draw(10 + step, dtype=dtype), state, params)
    grads = draw(99, dtype=dtype)
    if zero is not None:
        grads[zero] = jnp.zeros_like(grads[zero])
    updates, after = update(grads, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    return state, after, grads, updates


def rotation(before, after, name):
    old, new = (np.asarray(s.projector[name], np.float64) for s in (before, after))
    return np.swapaxes(new, -1, -2) @ old


def turn(q, x, name):
    """Q on the axis of x that counts subspace directions."""
    return q @ x if rows_of(name) else x @ np.swapaxes(q, -1, -2)


def projected_gradient(after, grads, name):
    p, g = np.asarray(after.projector[name], np.float64), np.asarray(grads[name], np.float64)
    return project(p, g, rows_of(name))


def ldadam(q, m, v, t, name, b1=0.9, b2=0.999):
    """LDAdam, Algorithm 1."""
    m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
    rotated = turn(q**2, v_hat - m_hat**2, name) + turn(q, m_hat, name) ** 2
    return (1 - b2**t) * np.abs(rotated)


def adam_after_refresh(before, after, grads, names=PROJECTED, b1=0.9, b2=0.999):
    """First and second moments after the step, had they been rotated as LDAdam does."""
    mu, nu = (numpy64(moments_of(before.inner_state, field)) for field in ("mu", "nu"))
    t = int(before.count)
    expected: dict[str, dict[str, np.ndarray]] = {"mu": {}, "nu": {}}
    for name in names:
        q, r = rotation(before, after, name), projected_gradient(after, grads, name)
        expected["mu"][name] = b1 * turn(q, mu[name], name) + (1 - b1) * r
        v = ldadam(q, mu[name], nu[name], t, name, b1, b2)
        expected["nu"][name] = b2 * v + (1 - b2) * r**2
    return expected


def actual(state, names=PROJECTED, fields=("mu", "nu")):
    return {f: {k: moments_of(state.inner_state, f)[k] for k in names} for f in fields}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("side", ["short", "long"])
def test_rotate_is_ldadams_rule(side, steps, monkeypatch):
    if side == "long":
        monkeypatch.setitem(globals(), "rows_of", lambda name: name == "towers")
    before, after, grads, _ = across_a_refresh(optax.adam(0.1), "rotate", steps=steps, side=side)
    for name in PROJECTED:
        assert np.abs(rotation(before, after, name)).max() < 0.999  # a real change of basis
    assert_trees_close(actual(after), adam_after_refresh(before, after, grads), 1e-5)


def test_rotate_at_the_very_first_step_does_nothing():
    _, after, grads, _ = across_a_refresh(optax.adam(0.1), "rotate", steps=0)
    expected = {
        "mu": {k: 0.1 * projected_gradient(after, grads, k) for k in PROJECTED},
        "nu": {k: 0.001 * projected_gradient(after, grads, k) ** 2 for k in PROJECTED},
    }
    assert_trees_close(actual(after), expected, 1e-5)


def test_keep_leaves_moments_as_they_are():
    before, after, grads, _ = across_a_refresh(optax.adam(0.1), "keep")
    mu, nu = (numpy64(moments_of(before.inner_state, field)) for field in ("mu", "nu"))
    r = {k: projected_gradient(after, grads, k) for k in PROJECTED}
    expected = {
        "mu": {k: 0.9 * mu[k] + 0.1 * r[k] for k in PROJECTED},
        "nu": {k: 0.999 * nu[k] + 0.001 * r[k] ** 2 for k in PROJECTED},
    }
    assert_trees_close(actual(after), expected, 1e-5)


def test_reset_starts_again_from_zero_and_spares_the_rest():
    before, after, grads, _ = across_a_refresh(optax.adam(0.1), "reset", zero="towers")
    fresh = ["wide"]
    expected = {
        "mu": {k: 0.1 * projected_gradient(after, grads, k) for k in fresh},
        "nu": {k: 0.001 * projected_gradient(after, grads, k) ** 2 for k in fresh},
    }
    mu, nu = (numpy64(moments_of(before.inner_state, field)) for field in ("mu", "nu"))
    # No gradient, no new subspace; and what is not projected has none.
    expected["mu"]["towers"] = 0.9 * mu["towers"]
    expected["nu"]["towers"] = 0.999 * nu["towers"]
    bias = np.asarray(grads["b"], np.float64)
    expected["mu"]["b"] = 0.9 * mu["b"] + 0.1 * bias
    expected["nu"]["b"] = 0.999 * nu["b"] + 0.001 * bias**2
    assert_trees_close(actual(after, SHAPES), expected, 1e-5)


@pytest.mark.parametrize("moments", ["rotate", "reset", "keep"])
def test_a_zero_gradient_keeps_projector_and_moments(moments):
    before, after, _, updates = across_a_refresh(optax.adam(0.1), moments, zero="towers")
    chex.assert_trees_all_equal(before.projector["towers"], after.projector["towers"])
    mu, nu = (numpy64(moments_of(before.inner_state, field)) for field in ("mu", "nu"))
    expected = {"mu": {"towers": 0.9 * mu["towers"]}, "nu": {"towers": 0.999 * nu["towers"]}}
    assert_trees_close(actual(after, ["towers"]), expected, 1e-5)
    assert np.all(np.isfinite(updates["towers"]))


def test_one_zero_matrix_of_a_stack_is_left_alone():
    tx = optax_gale.gale(optax.adam(0.1), RANK, side="short", moments="reset", range_finder=turned)
    update = jax.jit(functools.partial(tx.update, refresh=True))
    params = draw(0, {"stack": (3, 6, 10)})
    _, before = update(draw(1, {"stack": (3, 6, 10)}), tx.init(params), params)
    grads = {"stack": draw(2, {"stack": (3, 6, 10)})["stack"].at[1].set(0.0)}
    for bad in (0.0, jnp.nan, jnp.inf):
        grads = {"stack": grads["stack"].at[1].set(bad)}
        _, after = update(grads, before, params)
        changed = np.any(np.asarray(before.projector["stack"] != after.projector["stack"]), (1, 2))
        assert changed.tolist() == [True, False, True]
        good = np.array([0, 2])
        expected = {"stack": 0.1 * np.swapaxes(after.projector["stack"], 1, 2) @ grads["stack"]}
        mu = moments_of(after.inner_state, "mu")
        assert_trees_close(mu["stack"][good], expected["stack"][good], 1e-5)
        if bad == 0.0:
            old = moments_of(before.inner_state, "mu")["stack"][1]
            assert_trees_close(mu["stack"][1], 0.9 * old, 1e-5)


@pytest.mark.parametrize(
    ("inner", "field", "rate"),
    [
        (lambda: optax.sgd(0.1, momentum=0.8), "trace", lambda m, r: 0.8 * m + r),
        (lambda: optax.lion(0.1, b2=0.7), "mu", lambda m, r: 0.7 * m + 0.3 * r),
    ],
    ids=["trace", "lion"],
)
def test_first_moments_rotate_so_that_their_lift_is_kept(inner, field, rate):
    before, after, grads, _ = across_a_refresh(inner(), "rotate")
    old = numpy64(moments_of(before.inner_state, field))
    expected = {
        k: rate(turn(rotation(before, after, k), old[k], k), projected_gradient(after, grads, k))
        for k in PROJECTED
    }
    assert_trees_close(actual(after, fields=(field,))[field], expected, 1e-5)
    # P_new (Q M) is the part of P_old M inside the new subspace.
    for k in PROJECTED:
        p_old, p_new = (np.asarray(s.projector[k], np.float64) for s in (before, after))
        turned = turn(rotation(before, after, k), old[k], k)
        inside = project(p_new, lift(p_old, old[k], rows_of(k)), rows_of(k))
        np.testing.assert_allclose(turned, inside, atol=1e-9 * np.abs(old[k]).max())


@pytest.mark.parametrize(
    ("inner", "field", "rate"),
    [
        (lambda: optax.rmsprop(0.1, decay=0.8), "nu", lambda v, r: 0.8 * v + 0.2 * r**2),
        (
            lambda: optax.adagrad(0.1, initial_accumulator_value=0.0),
            "sum_of_squares",
            lambda v, r: v + r**2,
        ),
    ],
    ids=["rmsprop", "adagrad"],
)
def test_a_second_moment_alone_is_mixed_by_squares(inner, field, rate):
    before, after, grads, _ = across_a_refresh(inner(), "rotate")
    old = numpy64(moments_of(before.inner_state, field))
    expected = {
        k: rate(
            turn(rotation(before, after, k) ** 2, old[k], k), projected_gradient(after, grads, k)
        )
        for k in PROJECTED
    }
    assert_trees_close(actual(after, fields=(field,))[field], expected, 1e-5)


@pytest.mark.parametrize(
    ("inner", "dtype"),
    [
        (lambda: optax.adam(0.1, b1=0.875), jnp.bfloat16),  # 0.9 would be rounded
        (lambda: optax.adam(0.1, b1=0.875, mu_dtype=jnp.bfloat16), jnp.float32),
    ],
    ids=["bfloat16 parameters", "mu_dtype"],
)
def test_half_precision_moments_rotate_in_float32(inner, dtype):
    before, after, grads, _ = across_a_refresh(inner(), "rotate", dtype=dtype)
    got = actual(after)
    assert {x.dtype for x in got["mu"].values()} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in got["nu"].values()} == {jnp.dtype(dtype)}
    assert {p.dtype for p in jax.tree.leaves(after.projector)} == {jnp.dtype(jnp.float32)}
    assert_trees_close(got, adam_after_refresh(before, after, grads, b1=0.875), 3 * 2.0**-8)


def test_state_dtype_makes_float32_moments_of_bfloat16_parameters():
    before, after, grads, updates = across_a_refresh(
        optax.adam(0.1), "rotate", dtype=jnp.bfloat16, state_dtype=jnp.float32
    )
    got = actual(after, SHAPES)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}
    assert {x.dtype for x in updates.values()} == {jnp.dtype(jnp.bfloat16)}
    # Only the operands of P^T G are rounded.
    assert_trees_close(actual(after), adam_after_refresh(before, after, grads), 2.0**-8)


@pytest.mark.parametrize("length", [4, 5])
def test_slices_of_a_stack_rotate_with_their_projectors(length):
    """Staggered over a gap of 3, a stack of 4 or 5 is refreshed two matrices at a time."""
    shapes = {"stack": (length, 6, 10)}
    tx = optax_gale.gale(
        optax.adam(0.1),
        RANK,
        side="short",
        moments="rotate",
        update_proj_gap=3,
        refresh_schedule="staggered",
        range_finder=turned,
    )
    update = jax.jit(tx.update)
    params = draw(0, shapes)
    state = tx.init(params)
    for step in range(7):
        grads = draw(10 + step, shapes)
        before = state
        _, state = update(grads, state, params)
        if step:
            expected = adam_after_refresh(before, state, grads, names=["stack"])
            assert_trees_close(actual(state, ["stack"]), expected, 1e-5)


@pytest.mark.parametrize("side", ["short", "long"])
def test_factored_second_moments_rotate_on_the_rank_axis(side, monkeypatch):
    """Adafactor's row and column averages: one counts directions of the subspace, one does not."""
    if side == "long":
        monkeypatch.setitem(globals(), "rows_of", lambda name: name == "towers")
    inner = optax.chain(
        optax.adafactor(
            None, min_dim_size_to_factor=2, multiply_by_parameter_scale=False, momentum=0.9
        ),
    )
    steps = 3
    before, after, grads, _ = across_a_refresh(inner, "rotate", steps=steps, side=side)
    decay = 1 - (steps + 1) ** -0.8
    for name in PROJECTED:
        q, r = rotation(before, after, name), projected_gradient(after, grads, name)
        for field in ("v_row", "v_col"):
            old, new = (
                np.asarray(moments_of(s.inner_state, field)[name], np.float64)
                for s in (before, after)
            )
            counts_directions = old.shape[-1] == RANK
            if counts_directions:
                old = np.einsum("...rs,...s->...r", q**2, old)
            averaged = -1 if rows_of(name) == counts_directions else -2
            expected = decay * old + (1 - decay) * np.mean(r**2, axis=averaged)
            assert_trees_close(new, expected, 1e-5)


def test_muons_momentum_rotates():
    inner = optax.chain(
        optax_gale.scale_by_orthogonalized_momentum(0.9), optax.scale_by_learning_rate(0.1)
    )
    before, after, grads, _ = across_a_refresh(inner, "rotate", full_rank=optax.adam(0.1))
    old = numpy64(moments_of(before.inner_state, "mu"))
    expected = {
        k: 0.9 * turn(rotation(before, after, k), old[k], k)
        + 0.1 * projected_gradient(after, grads, k)
        for k in PROJECTED
    }
    assert_trees_close(actual(after, fields=("mu",))["mu"], expected, 1e-5)


class VelocityState(NamedTuple):
    velocity: Any


def heavy_ball():
    def init(params):
        return VelocityState(jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        del params
        velocity = jax.tree.map(lambda v, g: 0.8 * v + g, state.velocity, updates)
        return velocity, VelocityState(velocity)

    return optax.GradientTransformation(init, update)


def test_an_unknown_field_is_refused_with_the_remedy():
    tx = optax_gale.gale(heavy_ball(), RANK, side="short", moments="rotate")
    with pytest.raises(ValueError, match=r"'velocity'") as caught:
        tx.init(draw(0))
    message = str(caught.value)
    assert "Rotate({'velocity': 'first'})" in message and "moments='keep'" in message
    assert "(2, 2, 10, 4)" in message


@pytest.mark.parametrize("kind", ["first", "second", "keep"])
def test_rotate_learns_new_fields(kind):
    before, after, grads, _ = across_a_refresh(heavy_ball(), optax_gale.Rotate({"velocity": kind}))
    old = numpy64(moments_of(before.inner_state, "velocity"))
    power = {"first": lambda q: q, "second": np.square, "keep": lambda q: np.eye(RANK)}[kind]
    expected = {
        k: 0.8 * turn(power(rotation(before, after, k)), old[k], k)
        + projected_gradient(after, grads, k)
        for k in PROJECTED
    }
    assert_trees_close(actual(after, fields=("velocity",))["velocity"], expected, 1e-5)


@pytest.mark.parametrize("moments", ["keep", "reset"])
def test_unknown_fields_need_no_name_where_nothing_is_rotated(moments):
    before, after, grads, _ = across_a_refresh(heavy_ball(), moments)
    old = numpy64(moments_of(before.inner_state, "velocity"))
    kept = 0.8 if moments == "keep" else 0.0
    expected = {k: kept * old[k] + projected_gradient(after, grads, k) for k in PROJECTED}
    assert_trees_close(actual(after, fields=("velocity",))["velocity"], expected, 1e-5)


@pytest.mark.parametrize(
    "inner",
    [
        optax.adabelief(0.1),
        optax.adamax(0.1),
        optax.adan(0.1),
        optax.amsgrad(0.1),
        optax.contrib.ademamix(0.1),
        optax.nadam(0.1),
        optax.novograd(0.1),
        optax.radam(0.1),
        optax.rmsprop(0.1, centered=True, momentum=0.9),
        optax.yogi(0.1),
        optax.inject_hyperparams(optax.adamw)(0.1),
        optax.MultiSteps(optax.adam(0.1), 2),
        optax.chain(optax.ema(0.9), optax.apply_every(2), optax.scale(-0.1)),
    ],
)
def test_every_moment_of_optax_is_known(inner):
    """Every array of the subspace's shape is found and has a kind."""
    view = MatrixView.build("", (6, 10))
    projection = Projection(view, rows=True, rank=RANK)
    state = jax.eval_shape(inner.init, {"w": jnp.zeros((RANK, 10))})
    found = moments.find(state, [(jax.tree_util.DictKey("w"),)], [projection], "rotate")
    shapes = [x.shape for x in jax.tree.leaves(state)]
    assert [m.index for m in found] == [i for i, s in enumerate(shapes) if s == (RANK, 10)]
    assert found and {m.rank_axis for m in found} == {-2}


SCALE_FREE = {
    "adam": optax.adam(0.1, eps=0.0),
    "adabelief": optax.adabelief(0.1, eps=0.0, eps_root=0.0),
    "adagrad": optax.adagrad(0.1, 0.0, 0.0),
    "adan": optax.adan(0.1, eps=0.0),
    "ademamix": optax.contrib.ademamix(0.1, eps=0.0),
    "amsgrad": optax.amsgrad(0.1, eps=0.0),
    "rmsprop": optax.rmsprop(0.1, eps=0.0),
    "centred rmsprop": optax.rmsprop(0.1, eps=0.0, centered=True),
    "adamax": optax.adamax(0.1, eps=0.0),
}


@pytest.mark.parametrize("name", SCALE_FREE)
def test_an_inner_blind_to_scale_stays_so_over_refreshes(name):
    """A moment taken for one of another power would mix sizes that do not belong together."""
    option = optax_gale.Rotate({"nu": "norm"}) if name == "adamax" else "rotate"
    tx = optax_gale.gale(
        SCALE_FREE[name], RANK, moments=option, range_finder=turned, update_proj_gap=2
    )
    update = jax.jit(tx.update)
    params, results = draw(0), []
    for scale in (1.0, 1024.0):
        state = tx.init(params)
        for step in range(5):
            grads = {k: scale * g for k, g in draw(10 + step).items()}
            updates, state = update(grads, state, params)
        results.append(updates)
    assert_trees_close(results[1], results[0], 1e-4)


def test_what_is_called_like_another_moment_is_refused():
    with pytest.raises(ValueError, match=r"nu\['.*\] is called like a second.*'nu': 'norm'"):
        optax_gale.gale(optax.adamax(0.1), RANK).init(draw(0))
    with pytest.raises(ValueError, match=r"'nu' depends on the gradients"):
        optax_gale.gale(optax.sm3(0.1), RANK).init(draw(0))
    for inner in (optax.adamax(0.1), optax.sm3(0.1)):
        optax_gale.gale(inner, RANK, moments="keep").init(draw(0))


@pytest.mark.parametrize("moments", ["rotate", "reset"])
def test_moments_of_a_refused_refresh_are_untouched(moments):
    """Also with a rounded projector, whose product with itself is not the identity."""
    before, after, _, _ = across_a_refresh(
        optax.adam(0.1), moments, zero="towers", projector_dtype=jnp.bfloat16
    )
    for field, rate in (("mu", 0.9), ("nu", 0.999)):
        old, new = (moments_of(s.inner_state, field)["towers"] for s in (before, after))
        assert_trees_close(new, rate * old, 1e-6)


def test_names_of_parameters_do_not_confuse_the_search():
    """Leaves called like a state's fields, one inside another's name, and a lone array."""
    params = {"mu": jnp.ones((6, 10)), "nest": {"mu": jnp.ones((10, 6))}, "nu": jnp.ones((6, 10))}
    grads = jax.tree.map(lambda x: jnp.cos(jnp.arange(float(x.size))).reshape(x.shape), params)
    for tree, g in ((params, grads), (params["mu"], grads["mu"])):
        tx = optax_gale.gale(
            optax.sgd(0.1, momentum=0.9),
            6,
            side="short",
            moments="rotate",
            range_finder=turned,
        )
        update = jax.jit(functools.partial(tx.update, refresh=True))
        full = optax.sgd(0.1, momentum=0.9)
        state, full_state = tx.init(tree), full.init(tree)
        for _ in range(2):
            updates, state = update(g, state, tree)
            expected, full_state = full.update(g, full_state, tree)
        assert_trees_close(updates, expected, 1e-5)


@pytest.mark.parametrize(("rank", "side"), [(6, "short"), (6, "long"), (4, "short"), (4, "long")])
@pytest.mark.parametrize("shape", [(6, 6), (6, 10)])
def test_factors_know_their_axis(shape, rank, side):
    """Also where R is square, and the shape of a factor says nothing."""
    rows = (shape[0] < shape[1]) if side == "short" else (shape[0] >= shape[1])
    projection = Projection(MatrixView.build("", shape), rows, rank)
    inner = optax.adafactor(
        None, min_dim_size_to_factor=2, multiply_by_parameter_scale=False, clipping_threshold=None
    )
    # Every direction of the subspace has its own size, and so have those of the other side.
    sizes = np.arange(1.0, 1 + rank)[:, None] if rows else np.arange(1.0, 1 + rank)
    r = jnp.broadcast_to(jnp.asarray(sizes, jnp.float32), projection.subspace_shape)
    _, state = inner.update({"w": r}, inner.init({"w": r}), {"w": r})
    found = moments.find(state, [(jax.tree_util.DictKey("w"),)], [projection], "rotate")
    assert len(found) == 2
    for moment in found:
        v = np.asarray(jax.tree.leaves(state)[moment.index])
        differs = v.max() > 1.01 * v.min()
        assert (moment.rank_axis == -1) == differs
        assert (moment.rank_axis is None) == (not differs)


@pytest.mark.parametrize("moments", ["rotate", "reset"])
def test_factors_that_average_over_layers_are_refused(moments):
    """Adafactor factors over the two longest axes, and one may count layers."""
    options = {"min_dim_size_to_factor": 2, "side": "short", "range_finder": turned}
    params = draw(0, {"stack": (8, 6, 10)})
    tx = optax_gale.gale_adafactor(0.1, RANK, moments=moments, **options)
    with pytest.raises(ValueError, match=r"\.v_col\['stack'\] has shape \(4, 10\)") as caught:
        tx.init(params)
    assert "(8, 4, 10), axis 0" in str(caught.value) and "moments='keep'" in str(caught.value)
    for tx in (
        optax_gale.gale_adafactor(0.1, RANK, moments="keep", **options),
        optax_gale.gale_adafactor(
            0.1, RANK, moments=moments, **options | {"min_dim_size_to_factor": 9}
        ),
    ):
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
        chex.assert_tree_all_finite(updates)
