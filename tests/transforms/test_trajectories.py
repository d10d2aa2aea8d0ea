"""Whole trajectories against the same equations in float64 NumPy, and against GaLore."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import optax_gale

from .reference import (
    Adam,
    Problem,
    assert_trees_close,
    fixed_sketch,
    fixed_sketch_numpy,
    last,
    lift,
    moments_of,
    project,
)

SHAPES = {"wide": (10, 18), "tall": (18, 10), "square": (12, 12), "stack": (3, 10, 18), "b": (7,)}
RANK, GAP, LR, DECAY = 4, 7, 2e-2, 0.1


def projects_rows(shape, side):
    m, n = shape[-2:]
    return m < n if side == "short" else m >= n


def formula(shapes, *, side, rank=RANK, gap=GAP, lr=LR, decay=DECAY, scale=1.0, projector=None):
    """The step of `gale` with AdamW: ``W <- W - lr (scale P Adam(P^T G) + decay W)``."""
    adams = {name: Adam() for name in shapes}
    bases = {}

    def update(name, step, w, g):
        shape = shapes[name]
        if len(shape) < 2:
            return -lr * (adams[name](g) + decay * w)
        rows = projects_rows(shape, side)
        if step % gap == 0:
            x = g if rows else np.swapaxes(g, -1, -2)
            bases[name] = fixed_sketch_numpy(x, rank)
        p = bases[name] if projector is None else projector(name, step)
        u = adams[name](project(p, g, rows))
        return -lr * (scale * lift(p, u, rows) + decay * w)

    return update


@pytest.mark.parametrize("side", ["short", "long"])
def test_chain_with_adamw_follows_the_formula(side):
    problem = Problem(SHAPES, steps=50)
    tx = optax_gale.chain(
        optax_gale.gale_project(
            RANK, update_proj_gap=GAP, side=side, moments="keep", range_finder=fixed_sketch
        ),
        optax.adamw(LR, weight_decay=DECAY),
    )
    params, state = last(problem.run(tx))
    expected = problem.run_numpy(formula(SHAPES, side=side))
    assert_trees_close(params, expected, 1e-5)
    assert_trees_close(problem.moved(params), problem.moved(expected), 1e-5)

    low_rank = {
        "short": {"wide": (4, 18), "tall": (18, 4), "square": (12, 4), "stack": (3, 4, 18)},
        "long": {"wide": (10, 4), "tall": (4, 10), "square": (4, 12), "stack": (3, 10, 4)},
    }[side]
    for name in ("mu", "nu"):
        moments = jax.tree.map(jnp.shape, moments_of(state, name), is_leaf=lambda x: False)
        assert moments == {**low_rank, "b": (7,)}
    full_size = set(SHAPES.values()) - {(7,)}
    assert not full_size & {x.shape for x in jax.tree.leaves(state)}


def test_the_chain_that_people_write_follows_the_formula():
    """With every default, and matrices large enough for them."""
    shapes = {"wide": (160, 256), "tall": (256, 160), "square": (192, 192), "b": (160,)}
    problem = Problem(shapes, steps=50)
    tx = optax_gale.chain(optax_gale.gale_project(rank=128), optax.adamw(LR, weight_decay=DECAY))
    params, state = last(problem.run(tx))
    bases = {k: np.asarray(p, np.float64) for k, p in state[0].projector.items() if k != "b"}
    expected = problem.run_numpy(
        formula(shapes, side="short", rank=128, projector=lambda name, step: bases[name])
    )
    assert_trees_close(params, expected, 1e-5)
    assert_trees_close(problem.moved(params), problem.moved(expected), 2e-5)
    low_rank = {"wide": (128, 256), "tall": (256, 128), "square": (192, 128), "b": (160,)}
    for name in ("mu", "nu"):
        assert {k: m.shape for k, m in moments_of(state, name).items()} == low_rank


def test_sketched_projectors_and_named_axes_follow_the_formula():
    """NumPy takes P from the state; the rest of the step is its own."""
    shapes = {"heads": (12, 3, 2, 4), "scan": (10, 3, 18)}
    numbers = {
        "heads": optax_gale.GaleDimensionNumbers(reduction_axis=0, output_axis=(2, 3)),
        "scan": optax_gale.GaleDimensionNumbers(reduction_axis=-1, output_axis=0),
    }
    to_matrix = {
        "heads": lambda x: x.transpose(1, 0, 2, 3).reshape(3, 12, 8),
        "scan": lambda x: x.transpose(1, 2, 0),
    }
    from_matrix = {
        "heads": lambda x: x.reshape(3, 12, 2, 4).transpose(1, 0, 2, 3),
        "scan": lambda x: x.transpose(2, 0, 1),
    }
    problem = Problem(shapes, steps=50, seed=1)
    tx = optax_gale.chain(
        optax_gale.gale_project(
            RANK,
            update_proj_gap=GAP,
            side="short",
            moments="keep",
            scale=0.5,
            weight_dimension_numbers=numbers,
        ),
        optax.adamw(LR, weight_decay=DECAY),
    )
    trajectory = list(problem.run(tx))
    params, _ = trajectory[-1]
    states = [
        jax.tree.map(lambda x: np.asarray(x, np.float64), state[0].projector)
        for _, state in trajectory
    ]
    adams = {name: Adam() for name in shapes}

    def update(name, step, w, g):
        g, w = to_matrix[name](g), to_matrix[name](w)
        p = states[step][name]
        u = adams[name](project(p, g, rows=False))  # every matrix here has fewer columns
        return from_matrix[name](-LR * (0.5 * lift(p, u, rows=False) + DECAY * w))

    expected = problem.run_numpy(update)
    assert_trees_close(problem.moved(params), problem.moved(expected), 1e-5)
    assert {k: p.shape for k, p in states[0].items()} == {
        "heads": (3, 8, 4),
        "scan": (3, 10, 4),
    }
    for step, projector in enumerate(states):
        for name, p in projector.items():
            np.testing.assert_allclose(
                np.swapaxes(p, -1, -2) @ p, np.broadcast_to(np.eye(4), (*p.shape[:-2], 4, 4)),
                atol=1e-5,
            )  # fmt: skip
            if step:
                changed = not np.array_equal(p, states[step - 1][name])
                assert changed == (step % GAP == 0)


def test_gale_is_the_chain_and_the_alias():
    problem = Problem({"stack": (3, 10, 18), "b": (7,)}, steps=10, seed=2)
    options = {"update_proj_gap": 4, "range_finder": fixed_sketch}
    wrapped = optax_gale.gale(optax.adamw(LR, weight_decay=DECAY), RANK, **options)
    alias = optax_gale.gale_adamw(LR, RANK, weight_decay=DECAY, **options)
    chained = optax_gale.chain(
        optax_gale.gale_project(RANK, **options),
        optax.scale_by_adam(),
        optax.add_decayed_weights(DECAY),
        optax.scale_by_learning_rate(LR),
    )
    expected = last(problem.run(wrapped))[0]
    for tx in (alias, chained):
        assert_trees_close(last(problem.run(tx))[0], expected, 1e-6)


def test_plain_optax_chain_trains_and_warns_once():
    problem = Problem({"kernel": (16, 12), "bias": (7,)}, steps=300, noise=0.01)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        tx = optax.chain(
            optax_gale.gale_project(rank=4, update_proj_gap=5), optax.adamw(LR, weight_decay=0.0)
        )
        params, state = last(problem.run(tx))
        tx.init(params)
    record = [w for w in record if issubclass(w.category, optax_gale.GaleProjectWarning)]
    assert len(record) == 1
    message = str(record[0].message)
    assert "optax_gale.chain" in message and "optax.chain" in message and "full size" in message
    assert {k: m.shape for k, m in moments_of(state, "mu").items()} == {
        "kernel": (16, 12),
        "bias": (7,),
    }
    distance = lambda tree: sum(
        np.sum((np.asarray(tree[k]) - problem.target[k]) ** 2) for k in problem.target
    )
    assert distance(params) < 0.01 * distance(problem.params)


def test_plain_optax_chain_computes_the_projected_gradient():
    g = np.random.default_rng(0).normal(size=(16, 12)).astype(np.float32)
    with pytest.warns(optax_gale.GaleProjectWarning):
        tx = optax_gale.gale_project(rank=4, scale=0.5, side="short")
        state = tx.init({"kernel": g, "bias": g[0]})
    updates, state = tx.update({"kernel": jnp.asarray(g), "bias": jnp.asarray(g[0])}, state)
    p = np.asarray(state.projector["kernel"], np.float64)
    assert_trees_close(updates, {"kernel": 0.5 * g @ p @ p.T, "bias": g[0]}, 1e-6)


def test_equals_optax_contrib_galore():
    shapes = {"tall": (20, 12), "wide": (12, 20), "square": (12, 12), "vector": (7,)}
    problem = Problem(shapes, steps=30, seed=3)
    theirs = optax.contrib.galore(
        LR, rank=RANK, update_proj_gap=GAP, scale=0.25, weight_decay=DECAY
    )
    ours = optax_gale.gale(
        optax.adamw(LR, weight_decay=DECAY),
        RANK,
        update_proj_gap=GAP,
        scale=0.25,
        range_finder="svd",
        side="long",
        moments="keep",
    )
    for (expected, _), (params, _) in zip(problem.run(theirs), problem.run(ours), strict=True):
        assert_trees_close(params, expected, 1e-4)
        assert_trees_close(problem.moved(params), problem.moved(expected), 1e-4)


class GaloreTorchAdamW:
    """galore-torch's AdamW: epsilon outside the bias correction, decay after the step."""

    def __init__(self, lr, decay, scale, b1=0.9, b2=0.999, eps=1e-6):
        self.lr, self.decay, self.scale = lr, decay, scale
        self.b1, self.b2, self.eps = b1, b2, eps
        self.m = self.v = 0.0
        self.t = 0

    def __call__(self, w, g, p, rows):
        r = project(p, g, rows)
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * r
        self.v = self.b2 * self.v + (1 - self.b2) * r**2
        step_size = self.lr * np.sqrt(1 - self.b2**self.t) / (1 - self.b1**self.t)
        w = w - step_size * self.scale * lift(p, self.m / (np.sqrt(self.v) + self.eps), rows)
        return w - self.lr * self.decay * w


def galore_torch_steps(problem, tx, shapes, **hyperparameters):
    """Both trajectories' ends. The SVD's signs are arbitrary, so the reference takes P's."""
    trajectory = list(problem.run(tx))
    projectors = [
        jax.tree.map(lambda x: np.asarray(x, np.float64), state.projector)
        for _, state in trajectory
    ]
    reference = {name: GaloreTorchAdamW(**hyperparameters) for name in shapes}

    def update(name, step, w, g):
        rows = projects_rows(shapes[name], "short")
        p = projectors[step][name]
        if step % GAP == 0:  # P spans the leading singular vectors of the reference's own gradient
            u, _, vh = np.linalg.svd(g)
            leading = (u if rows else vh.T)[:, :RANK]
            np.testing.assert_allclose(p @ p.T, leading @ leading.T, atol=1e-4)
        return reference[name](w, g, p, rows) - w

    return trajectory[-1][0], problem.run_numpy(update)


@pytest.mark.parametrize("exactly", [False, True])
def test_equals_galore_torch(exactly):
    shapes = {"tall": (20, 12), "wide": (12, 20), "square": (12, 12)}
    problem = Problem(shapes, steps=30, seed=4, noise=10.0)
    lr, decay, scale, eps = (1e-2 if exactly else 1e-3), 0.1, 0.25, 1e-6
    options = {"update_proj_gap": GAP, "range_finder": "svd", "side": "short", "moments": "keep"}
    if exactly:
        # Optax adds epsilon to the corrected moment's root, and decays the weight before the step.
        inner = optax.inject_hyperparams(optax.adamw)(
            lr, eps=lambda t: eps / jnp.sqrt(1 - 0.999 ** (t + 1.0)), weight_decay=decay
        )
        tx = optax_gale.gale(inner, RANK, scale=scale * (1 - lr * decay), **options)
    else:
        tx = optax_gale.gale_adamw(lr, RANK, eps=eps, weight_decay=decay, scale=scale, **options)
    params, expected = galore_torch_steps(
        problem, tx, shapes, lr=lr, decay=decay, scale=scale, eps=eps
    )
    assert_trees_close(params, expected, 1e-4)
    if exactly:
        assert_trees_close(problem.moved(params), problem.moved(expected), 1e-4)


FULL_RANK = {"towers": (3, 10, 6)}


@pytest.mark.parametrize("range_finder", ["gale", "svd", "random", "warm"])
def test_full_rank_momentum_is_the_inner(range_finder):
    """SGD with momentum does not see a rotation, and rotated moments follow every refresh."""
    problem = Problem(FULL_RANK, steps=12, seed=5)
    inner = optax.sgd(LR, momentum=0.9, nesterov=True)
    options = {"side": "short", "moments": "rotate", "range_finder": range_finder}
    tx = optax_gale.gale(inner, 6, update_proj_gap=4, **options)
    expected = last(problem.run(inner))[0]
    params, state = last(problem.run(tx))
    assert {k: p.shape for k, p in state.projector.items()} == {
        k: (*s[:-2], 6, 6) for k, s in FULL_RANK.items()
    }
    assert_trees_close(problem.moved(params), problem.moved(expected), 1e-5)


def test_full_rank_adam_is_adam_in_the_rotated_basis():
    problem = Problem(FULL_RANK, steps=12, seed=6)
    tx = optax_gale.gale(
        optax.adam(LR), 6, side="short", update_proj_gap=100, range_finder=fixed_sketch
    )
    params, state = last(problem.run(tx))
    bases = jax.tree.map(lambda p: np.asarray(p, np.float64), state.projector)
    adams = {name: Adam() for name in FULL_RANK}

    def update(name, step, w, g):
        p, rows = bases[name], projects_rows(FULL_RANK[name], "short")
        return -LR * lift(p, adams[name](project(p, g, rows)), rows)

    for p in bases.values():  # square, so nothing is lost
        np.testing.assert_allclose(
            p @ np.swapaxes(p, -1, -2), np.broadcast_to(np.eye(6), p.shape), atol=1e-5
        )
    expected = problem.run_numpy(update)
    assert_trees_close(problem.moved(params), problem.moved(expected), 1e-5)


@pytest.mark.parametrize(
    "scale",
    [
        {"wide": 0.25, "tall": 3.0, "b": 7.0},
        lambda path, leaf: {"wide": 0.25, "tall": 3.0, "b": 7.0}[path],
    ],
    ids=["tree", "callable"],
)
def test_scale_per_leaf(scale):
    """It multiplies the projected update, neither the decay nor leaves at full rank."""
    shapes = {name: SHAPES[name] for name in ("wide", "tall", "b")}
    problem = Problem(shapes, steps=3, seed=7)
    options = {"side": "short", "moments": "keep", "range_finder": fixed_sketch}
    tx = optax_gale.gale_adamw(
        LR, RANK, weight_decay=DECAY, scale=scale, update_proj_gap=2, **options
    )
    per_leaf = {"wide": 0.25, "tall": 3.0, "b": 1.0}
    updates = {name: formula(shapes, side="short", gap=2, scale=per_leaf[name]) for name in shapes}
    expected = problem.run_numpy(lambda name, *args: updates[name](name, *args))
    assert_trees_close(problem.moved(last(problem.run(tx))[0]), problem.moved(expected), 1e-5)


def test_schedule_in_the_chain_and_clipping_before_the_projection():
    shapes = {name: SHAPES[name] for name in ("wide", "tall", "b")}
    problem = Problem(shapes, steps=20, seed=8, noise=3.0)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.05, 5, 20)
    tx = optax_gale.chain(
        optax.clip_by_global_norm(0.5),
        optax_gale.gale_project(
            RANK, update_proj_gap=GAP, side="short", moments="keep", range_finder=fixed_sketch
        ),
        optax.scale_by_adam(eps=0.1),  # so large that the size of gradients matters
        optax.scale_by_schedule(schedule),
        optax.scale(-1.0),
    )
    params, _ = last(problem.run(tx))

    adams = {name: Adam(eps=0.1) for name in shapes}
    bases = {}
    expected = {k: w.astype(np.float64) for k, w in problem.params.items()}
    for step in range(problem.steps):
        grads = problem.grads(expected, step)
        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        for name, g in grads.items():
            g = g * min(1.0, 0.5 / norm)
            if len(shapes[name]) < 2:
                u = adams[name](g)
            else:
                rows = projects_rows(shapes[name], "short")
                if step % GAP == 0:
                    bases[name] = fixed_sketch_numpy(g if rows else g.T, RANK)
                u = lift(bases[name], adams[name](project(bases[name], g, rows)), rows)
            expected[name] = expected[name] - float(schedule(step)) * u
    assert_trees_close(params, expected, 1e-5)
    assert_trees_close(problem.moved(params), problem.moved(expected), 5e-5)


def test_chain_without_a_projection_is_optax_chain():
    problem = Problem(SHAPES, steps=3)
    stages = lambda: (optax.clip_by_global_norm(1.0), optax.adamw(LR))
    ours, theirs = optax_gale.chain(*stages()), optax.chain(*stages())
    chex.assert_trees_all_equal(last(problem.run(ours)), last(problem.run(theirs)))


@pytest.mark.parametrize("before", [(), (optax.scale(2.0),)], ids=["alone", "after a stage"])
def test_chain_may_end_in_the_projection(before):
    """A subspace that ends there: the projected gradient, at the weight's shape."""
    problem = Problem(SHAPES, steps=1)
    grads = jax.tree.map(jnp.asarray, problem.grads(problem.params, 0))
    tx = optax_gale.chain(*before, optax_gale.gale_project(RANK, range_finder=fixed_sketch))
    alone = optax_gale.gale(optax.identity(), RANK, range_finder=fixed_sketch)
    updates, _ = tx.update(grads, tx.init(grads), grads)
    expected, _ = alone.update(grads, alone.init(grads), grads)
    factor = 2.0 if before else 1.0
    assert_trees_close(updates, jax.tree.map(lambda x: factor * np.asarray(x), expected), 1e-5)
    empty = optax_gale.chain()
    chex.assert_trees_all_equal(empty.update(grads, empty.init(grads))[0], grads)


def test_chain_refuses_a_second_projection():
    with pytest.raises(ValueError, match=r"one gale_project, got 2 \(arguments \[0, 2\]\)"):
        optax_gale.chain(
            optax_gale.gale_project(4), optax.scale_by_adam(), optax_gale.gale_project(8)
        )
