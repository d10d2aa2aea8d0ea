"""Where `optax.contrib.galore` falls short: every observation about it, as a test passed here.

Two of them are tested elsewhere, where there is more to see: the numbers on Explicit meshes, and
the shardings that `nnx.Optimizer` gives the state (`test_frameworks`). The equality with it, with
exact SVDs and kept moments, is in `tests/transforms/test_trajectories.py`.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_gale

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Exact SVDs compile in no time, and do not depend on a leaf's path. The side is the other's.
_svd: dict[str, Any] = {"rank": 2, "update_proj_gap": 3, "side": "long", "range_finder": "svd"}


def _params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "kernel": jax.random.normal(keys[0], (8, 6)),
        "bias": jax.random.normal(keys[1], (6,)),
    }


def _gradients(params, step):
    return jax.tree.map(lambda p: p + 0.3 * jnp.sin(37.0 * p + step), params)


def _stepper(tx):
    @jax.jit
    def step(params, state, k):
        updates, state = tx.update(_gradients(params, k), state, params)
        return optax.apply_updates(params, updates), state

    return step


def _train(tx, params, steps=5):
    state, step = tx.init(params), _stepper(tx)
    for k in range(steps):
        params, state = step(params, state, k)
    return params, state


# --- Batch axes -----


def test_layers_stacked_on_any_axis_are_projected_one_by_one():
    tx = optax_gale.gale_adamw(0.1, **_svd)
    layers = {str(i): jax.random.normal(jax.random.key(i), (8, 6)) for i in range(3)}
    wanted, _ = _train(tx, layers)
    wanted = jnp.stack(list(wanted.values()))

    stacked = jnp.stack(list(layers.values()))
    got, state = _train(tx, stacked)
    assert state.projector.shape == (3, 8, 2)
    assert state.inner_state[0].mu.shape == (3, 2, 6)
    chex.assert_trees_all_close(got, wanted, atol=1e-4)

    # The layer axis in the middle, and the columns as two axes: (8, layers, 2, 3).
    numbers = optax_gale.GaleDimensionNumbers(reduction_axis=0, output_axis=(2, 3))
    tx = optax_gale.gale_adamw(0.1, **_svd, weight_dimension_numbers=numbers)
    got, state = _train(tx, stacked.transpose(1, 0, 2).reshape(8, 3, 2, 3))
    assert state.projector.shape == (3, 8, 2)
    chex.assert_trees_all_close(got.reshape(8, 3, 6).transpose(1, 0, 2), wanted, atol=1e-4)


@pytest.mark.parametrize(
    "make", [optax.contrib.MuonDimensionNumbers, optax.contrib.GaLoreDimensionNumbers]
)
def test_optax_dimension_numbers_are_taken_as_they_are(make):
    numbers = {"w": make(reduction_axis=1, output_axis=(2, 3)), "v": None}
    tx = optax_gale.gale_adamw(0.1, **_svd, weight_dimension_numbers=numbers)
    shapes = {"w": jnp.zeros((5, 8, 2, 6)), "v": jnp.zeros((8, 6))}
    state = jax.eval_shape(tx.init, shapes)
    assert state.projector["w"].shape == (5, 12, 2)
    assert state.projector["v"] == optax.MaskedNode()


# --- Meshes -----


def _mesh(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(getattr(AxisType, kind),) * 2)


@pytest.mark.parametrize("spec", [P("data", None), P(None, "model"), P("data", "model")], ids=str)
@pytest.mark.parametrize("range_finder", ["svd", "gale", "gale_approx", "warm", "random"])
def test_any_sharded_matrix_on_an_explicit_mesh(spec, range_finder):
    """Types are enough: an Explicit mesh refuses while tracing. Numbers: `test_frameworks`."""
    tx = optax_gale.gale_adamw(0.1, 2, range_finder=range_finder)
    mesh = _mesh("Explicit")
    with jax.set_mesh(mesh):
        w = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=NamedSharding(mesh, spec))
        updates, _ = jax.eval_shape(lambda w: tx.update(w, tx.init(w), w), w)
        assert updates.sharding.spec == spec


def test_no_rank_axis_is_sharded():
    """`map_params` cannot tell a moment of rank r from one of the parameter's shape; the way round
    is `state_partition_specs`."""
    tx = optax_gale.gale_adamw(0.1, **_svd, residual="fira")
    params = {**_params(), "stack": jax.random.normal(jax.random.key(7), (4, 6, 8))}
    specs = {"kernel": P("data", "model"), "bias": P("model"), "stack": P("data", None, "model")}

    with pytest.raises(ValueError):  # there is no array where a leaf is not projected
        optax.tree.map_params(tx, lambda _, spec: spec, tx.init(params), specs)

    state_specs = optax_gale.state_partition_specs(tx, params, specs)
    assert state_specs.projector["kernel"] == P("data", None)
    assert state_specs.inner_state[0].mu["kernel"] == P(None, "model")
    assert state_specs.inner_state[0].nu["stack"] == P("data", None, None)
    assert state_specs.inner_state[0].mu["bias"] == P("model")
    assert state_specs.residual["stack"] == P("data")

    mesh = _mesh("Auto")
    place = lambda tree: jax.tree.map(lambda spec: NamedSharding(mesh, spec), tree)
    state = jax.jit(tx.init, out_shardings=place(state_specs))(params)
    chex.assert_trees_all_equal_structs(state, state_specs)
    shardings = (place(specs), place(state_specs))
    step = jax.jit(_stepper(tx), in_shardings=(*shardings, None), out_shardings=shardings)
    sharded = step(*step(params, state, 0), 1)
    wanted = _train(tx, params, steps=2)
    chex.assert_trees_all_close(jax.device_get(sharded), jax.device_get(wanted), atol=1e-4)


# --- Checkpoints -----


def test_orbax_saves_the_state_and_restores_it_bit_for_bit_in_mid_gap(tmp_path):
    tx = optax_gale.chain(
        optax.clip_by_global_norm(1.0),
        optax_gale.gale_project(2, update_proj_gap=3, residual="fira"),
        optax.scale_by_adam(),
        optax.scale_by_learning_rate(0.1),
    )
    step, params = _stepper(tx), _params()
    state = tx.init(params)
    history = []
    for k in range(8):
        history.append((params, state))
        params, state = step(params, state, k)

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", history[4])
        checkpointer.wait_until_finished()
        shapes = jax.eval_shape(lambda: (_params(), tx.init(_params())))
        restored = checkpointer.restore(tmp_path / "state", shapes)
    chex.assert_trees_all_equal(restored, history[4])
    assert jax.tree.structure(restored) == jax.tree.structure(history[4])
    for k in range(4, 8):  # over the refresh at step 6
        restored = step(*restored, k)
    chex.assert_trees_all_equal(restored, (params, state))


# --- Gradient accumulation -----


class _Counting:
    """A range finder that gives fixed axes, and counts how often it runs."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, *, rank, key, previous):
        def count():
            self.calls += 1

        jax.debug.callback(count)
        return jnp.broadcast_to(jnp.eye(x.shape[-2], rank, -1), previous.shape)


def test_multi_steps_finds_the_range_once_a_refresh_when_the_host_says_where():
    """`MultiSteps` runs its inner in every micro-step and throws three results of four away. Told
    `refresh=False` in those, the range finder runs only where its result is used."""
    find, params = _Counting(), _params()
    gale = optax_gale.gale_adamw(0.1, 2, update_proj_gap=2, range_finder=find)
    tx = optax.MultiSteps(gale, every_k_schedule=4)
    update = jax.jit(tx.update, static_argnames="refresh")
    state = tx.init(params)
    for k in range(12):  # steps 0, 1, 2; refreshes at 0 and 2
        last = k % 4 == 3
        _, state = update(_gradients(params, k), state, params, refresh=None if last else False)
        jax.effects_barrier()
        assert find.calls == (k >= 3) + (k >= 11)
    assert update._cache_size() == 2


def test_multi_steps_inside_accumulates_in_the_subspace():
    """As an inner, `MultiSteps` needs r n numbers instead of m n, and the range finder still runs
    once a refresh. The gap counts micro-steps then."""
    find, params = _Counting(), _params()
    options = {"rank": 2, "side": "long", "range_finder": find, "update_proj_gap": 8}
    inside = optax_gale.gale(optax.MultiSteps(optax.adamw(0.1), 4), **options)
    outside = optax.MultiSteps(optax_gale.gale(optax.adamw(0.1), **options), 4)
    got, wanted = _train(inside, params, 4), _train(outside, params, 4)
    assert got[1].inner_state.acc_grads["kernel"].shape == (2, 6)
    assert np.abs(got[0]["kernel"] - params["kernel"]).max() > 0.01
    chex.assert_trees_all_close(got[0], wanted[0], atol=1e-4)
    find.calls = 0
    _train(inside, params, 9)
    jax.effects_barrier()
    assert find.calls == 2


def test_accumulate_outside_keeps_no_full_size_accumulator():
    tx = optax_gale.accumulate(optax_gale.gale_adamw(0.1, **_svd), every_k_schedule=4)
    shapes = {x.shape for x in jax.tree.leaves(jax.eval_shape(tx.init, _params()))}
    assert (8, 6) not in shapes


# --- Hyperparameters and other arguments -----


def test_inject_hyperparams_without_naming_anything_static():
    tx = optax.inject_hyperparams(optax_gale.gale_adamw)(0.1, rank=2, range_finder="svd")
    params = _params()
    state = tx.init(params)
    assert state.inner_state.projector["kernel"].shape == (6, 2)
    assert {"rank", "learning_rate", "update_proj_gap", "b1"} <= set(state.hyperparams)
    updates, _ = jax.jit(tx.update)(params, state, params)
    wanted, _ = _train(optax_gale.gale_adamw(0.1, **_svd), params, 0)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, wanted)


def test_extra_arguments_reach_the_inner_and_are_optional():
    seen = []

    def update(updates, state, params=None, *, value=None, **extra_args):
        del params
        seen.append((value, sorted(extra_args)))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx, params = optax_gale.gale(inner, **_svd), _params()
    state = tx.init(params)
    del seen[:]
    tx.update(params, state, params, value=3.0, grad=params)
    assert {(3.0, ("grad",))} == {(value, tuple(extra)) for value, extra in seen}
    tx.update(params, state, params)
    assert seen[-1] == (None, [])
    plain = optax_gale.gale(optax.scale_by_adam(), **_svd)
    plain.update(params, plain.init(params), params, value=3.0)


# --- Inners -----


@pytest.mark.parametrize(
    "inner",
    [
        optax.adamw(0.1),
        optax.nadamw(0.1),
        optax.lion(0.1),
        optax.adafactor(0.1, multiply_by_parameter_scale=False),
        optax.chain(optax.scale_by_rms(), optax.add_decayed_weights(0.1), optax.scale(-0.1)),
        optax.partition({"a": optax.adamw(0.1), "b": optax.sgd(0.1)}, {"kernel": "a", "bias": "b"}),
        optax.masked(optax.adamw(0.1), {"kernel": True, "bias": False}),
    ],
    ids=["adamw", "nadamw", "lion", "adafactor", "chain", "partition", "masked"],
)
def test_inners_with_decoupled_weight_decay(inner):
    params = _params()
    tx = optax_gale.gale(inner, **_svd)
    shapes = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p)[0], params)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, params)


@pytest.mark.parametrize(
    ("inner", "state"),
    [
        (optax.lamb(0.1), "ScaleByAdamState"),
        (optax.lars(0.1), "TraceState"),
        (optax.adafactor(0.1), "FactoredState"),
        (optax.contrib.schedule_free(optax.sgd(0.1), 0.1), "ScheduleFreeState"),
        (optax.contrib.prodigy(0.1), "ProdigyState"),
        (optax.contrib.dog(0.1), "DoGState"),
        (optax.chain(optax.adamw(0.1), optax.contrib.dog(0.1)), "DoGState"),
    ],
    ids=["lamb", "lars", "adafactor", "schedule_free", "prodigy", "dog", "chain"],
)
@pytest.mark.parametrize("form", ["gale", "chain"])
def test_inners_that_need_the_whole_weight_are_refused_by_name(inner, state, form):
    if form == "gale":
        tx = optax_gale.gale(inner, **_svd)
    else:
        tx = optax_gale.chain(optax_gale.gale_project(**_svd), inner)
    with pytest.raises(ValueError, match=rf"{state}.*(outside|instead)"):
        tx.init(_params())


# --- Trees -----


def test_none_leaves_and_shapes_and_dimension_trees_under_partition():
    numbers = {"frozen": None, "kernel": optax_gale.GaleDimensionNumbers(), "conv": None}
    tx = optax.partition(
        {
            "gale": optax_gale.gale_adamw(0.1, **_svd, weight_dimension_numbers=numbers),
            "frozen": optax.set_to_zero(),
        },
        {"frozen": "frozen", "kernel": "gale", "conv": "gale"},
    )
    params = {"frozen": jnp.ones((8, 6)), "kernel": _params()["kernel"], "conv": None}
    shapes = jax.eval_shape(lambda: params)
    state = tx.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(shapes), state)
    updates, new_state = jax.jit(tx.update)(params, state, params)
    assert updates["conv"] is None and np.all(updates["frozen"] == 0)
    assert np.linalg.matrix_rank(updates["kernel"], tol=1e-3) >= 2
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


def test_embeddings_and_the_head_are_not_projected_unless_asked_for():
    names = ["embed_tokens", "wte", "tok_embeddings", "lm_head", "output_head", "head", "logits"]
    params = {name: {"kernel": jnp.ones((8, 6))} for name in [*names, "attention", "mlp"]}
    projector = jax.eval_shape(optax_gale.gale_adamw(0.1, 2).init, params).projector
    is_projected = lambda name: not isinstance(projector[name]["kernel"], optax.MaskedNode)
    assert [name for name in params if is_projected(name)] == ["attention", "mlp"]
    tx = optax_gale.gale_adamw(0.1, 2, select=lambda path, _: "head" in path)
    projector = jax.eval_shape(tx.init, params).projector
    assert [name for name in params if is_projected(name)] == ["lm_head", "output_head", "head"]


# --- Projectors -----


@pytest.mark.parametrize("range_finder", ["svd", "gale"])
def test_bf16_gradients_give_an_orthonormal_f32_projector(range_finder):
    tx = optax_gale.gale_adamw(0.1, 4, range_finder=range_finder)
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 6), jnp.bfloat16)}
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    p = state.projector["kernel"]
    assert p.dtype == jnp.float32 and updates["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(p.T @ p, np.eye(4), atol=1e-5)


def test_a_zero_gradient_at_a_refresh_keeps_the_basis_and_the_moments():
    tx, params = optax_gale.gale_adamw(0.1, **_svd), _params()
    _, state = _train(tx, params, 3)
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, after = jax.jit(tx.update)(zeros, state, params)  # the refresh at step 3
    chex.assert_trees_all_equal(after.projector, state.projector)
    old, new = state.inner_state[0], after.inner_state[0]
    chex.assert_trees_all_close(new.mu["kernel"], 0.9 * old.mu["kernel"], atol=1e-6)
    # At the very first refresh there is nothing to keep: a fixed orthonormal basis.
    _, first = jax.jit(tx.update)(zeros, tx.init(params), params)
    np.testing.assert_array_equal(first.projector["kernel"], np.eye(8, 2))


# --- vmap -----


def _primitives(jaxpr, inside=False):
    """Names of the primitives of a program, and whether they are inside a conditional."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, inside
        deeper = inside or eqn.primitive.name == "cond"
        for value in jax.tree.leaves(list(eqn.params.values())):
            sub = getattr(value, "jaxpr", value)
            if hasattr(sub, "eqns"):
                yield from _primitives(sub, deeper)


def _lanes():
    params = jax.tree.map(lambda p: jnp.stack([p, 2 * jnp.cos(p), 0.5 - p]), _params())
    tx = optax_gale.gale_adamw(0.1, **{**_svd, "update_proj_gap": 2})
    return tx, params, jax.vmap(tx.init)(params)


def test_vmap_keeps_one_real_conditional():
    tx, params, state = _lanes()
    found = list(_primitives(jax.make_jaxpr(jax.vmap(tx.update))(params, state, params).jaxpr))
    assert [inside for name, inside in found if name == "cond"] == [False]
    assert {inside for name, inside in found if name == "svd"} == {True}


@pytest.mark.parametrize("start", [(0, 0, 0), (0, 1, 1), (1, 1, 1)], ids=["in", "out", "between"])
def test_vmap_gives_every_lane_its_own_result(start):
    """Lanes at the same step, and lanes that are not in step."""
    tx, params, state = _lanes()
    both = jax.jit(lambda p, s: jax.vmap(tx.update)(_gradients(p, 0), s, p))
    one = functools.partial(jax.jit(tx.update))
    lane = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    _, state = both(params, state)  # moments and projectors that are not trivial
    state = state._replace(count=jnp.asarray(start, jnp.int32))
    got = both(params, state)
    for i in range(3):
        wanted = one(_gradients(lane(params, i), 0), lane(state, i), lane(params, i))
        chex.assert_trees_all_close(lane(got, i), wanted, atol=1e-4, rtol=1e-4)


# --- Moments at a refresh -----


@pytest.mark.parametrize("moments", ["rotate", "keep", "reset"])
def test_moments_at_a_refresh(moments):
    """The first moment, seen in the full space, is what the new subspace holds of the old one."""
    tx = optax_gale.gale_adamw(0.1, **_svd, moments=moments)
    params = _params()
    params, before = _train(tx, params, 3)
    grads = jax.tree.map(lambda p: jnp.roll(p, 1, 0), _gradients(params, 3))
    _, after = jax.jit(tx.update)(grads, before, params)
    old, new = before.projector["kernel"], after.projector["kernel"]
    assert np.abs(old - new).max() > 0.1
    mean, got = (state.inner_state[0].mu["kernel"] for state in (before, after))
    carried = {"rotate": new.T @ (old @ mean), "keep": mean, "reset": jnp.zeros_like(mean)}
    wanted = 0.9 * carried[moments] + 0.1 * new.T @ grads["kernel"]
    np.testing.assert_allclose(got, wanted, atol=1e-4)
