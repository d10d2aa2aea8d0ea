"""Kernels on a mesh of 8 devices: each device serves its part, and nothing is sent for it.

What runs in a kernel's place is XLA's form of it, but for one test in Triton's interpreter.
"""

import functools
import importlib.util
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_gale
from optax_gale import pallas
from optax_gale.pallas import dispatch, meshes
from optax_gale.pallas.back_project_apply import xla as back_project_apply
from optax_gale.pallas.project_update import xla as project_update

from .problems import SCALARS, Problem, adam
from .triton_interpreter import install

pytestmark = [
    pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices"),
    pytest.mark.usefixtures("quick_compilation"),
]

RANK = 4


@pytest.fixture
def served(monkeypatch):
    """Stands in for every kernel; the shapes of the matrices that each launch is given."""
    shapes = []

    def backend(kernel, _):
        whole = {"project_update": project_update, "back_project_apply": back_project_apply}
        run = getattr(whole[kernel], kernel)

        def noted(matrices, *arguments, **options):
            shapes.append((kernel, [x.shape for x in matrices]))
            return run(matrices, *arguments, **options)

        return types.SimpleNamespace(refusal=lambda _: None, **{kernel: noted})

    monkeypatch.setattr(dispatch, "backend", backend)
    return shapes


def mesh_of(kind=AxisType.Explicit):
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))


def apply(weights, projectors, updates, *, rows):
    numbers = [jnp.float32(-0.5)] * len(weights), [jnp.float32(-0.1)] * len(weights)
    return pallas.back_project_apply(
        weights, projectors, updates, *numbers, rows=rows, implementation="triton"
    )


def update(gradients, projectors, moments, *, rows):
    scalars = [[jnp.float32(x) for x in SCALARS.values()]] * len(gradients)
    return pallas.project_update(
        gradients, projectors, moments, scalars, adam(),
        rows=rows, update_dtype=jnp.float32, implementation="triton",
    )  # fmt: skip


# Of a stack (4, 64, 32): a spec, and the part of each device.
SPECS = [
    (P(None, "x", "y"), (4, 32, 8)),
    (P("y", None, "x"), (1, 64, 16)),
    (P(None, ("x", "y"), None), (4, 8, 32)),
    (P("x"), (2, 64, 32)),
    (P(), (4, 64, 32)),
]


def laid_out(problem, spec):
    """The arrays of a problem where they belong, given where its matrices lie."""
    batch, m, n = (*spec, None, None, None)[:3]
    low = P(batch, None, n) if problem.rows else P(batch, m, None)
    specs = {
        "weights": spec, "gradients": spec, "moments": low, "updates": low,
        "projectors": P(batch, m if problem.rows else n, None),
    }  # fmt: skip
    put = lambda name: jax.device_put(getattr(problem, name), NamedSharding(mesh_of(), specs[name]))
    return types.SimpleNamespace(**{name: put(name) for name in specs})


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize(("spec", "part"), SPECS, ids=str)
def test_each_device_applies_to_its_part(spec, part, rows, served):
    problem = Problem.draw((4, 64, 32), RANK, rows, leaves=2)
    step = functools.partial(apply, rows=rows)
    expected = step(problem.weights, problem.projectors, problem.updates)
    with jax.set_mesh(mesh_of()):
        x = laid_out(problem, spec)
        arguments = x.weights, x.projectors, x.updates
        program = jax.jit(step).lower(*arguments).compile()
        found = program(*arguments)
    chex.assert_trees_all_close(
        jax.device_get(found), jax.device_get(expected), rtol=1e-5, atol=1e-6
    )
    assert served[-1] == ("back_project_apply", [part] * 2)
    assert optax_gale.traffic_report(program).collectives == ()
    for new, old in zip(found, x.weights, strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, 3)


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize(("spec", "part"), SPECS, ids=str)
def test_each_device_projects_its_part(spec, part, rows, served):
    problem = Problem.draw((4, 64, 32), RANK, rows, leaves=2)
    step = functools.partial(update, rows=rows)
    expected = step(problem.gradients, problem.projectors, problem.moments)
    with jax.set_mesh(mesh_of()):
        x = laid_out(problem, spec)
        arguments = x.gradients, x.projectors, x.moments
        if (*spec, None, None, None)[1 if rows else 2] is not None:
            with pytest.raises(pallas.UnsupportedError, match="must add up what they project"):
                jax.eval_shape(step, *arguments)
            return
        program = jax.jit(step).lower(*arguments).compile()
        found = program(*arguments)
    chex.assert_trees_all_close(
        jax.device_get(found), jax.device_get(expected), rtol=1e-5, atol=1e-6
    )
    assert served[-1] == ("project_update", [part] * 2)
    assert optax_gale.traffic_report(program).collectives == ()
    for new, old in zip(found[1], x.moments, strict=True):
        assert all(
            a.sharding.is_equivalent_to(b.sharding, 3) for a, b in zip(new, old, strict=True)
        )


def test_what_lies_elsewhere_is_moved_and_the_matrix_is_not(served):
    problem = Problem.draw((1, 64, 32), RANK, True)
    with jax.set_mesh(mesh_of()):
        x = laid_out(problem, P())
        weights = jax.device_put(problem.weights, NamedSharding(mesh_of(), P(None, "x", "y")))
        arguments = weights, x.projectors, x.updates
        program = jax.jit(functools.partial(apply, rows=True)).lower(*arguments).compile()
        found = program(*arguments)
    assert served[-1] == ("back_project_apply", [(1, 32, 8)])
    assert found[0].sharding.spec == P(None, "x", "y")
    assert optax_gale.traffic_report(program).largest < 64 * 32
    expected = apply(problem.weights, problem.projectors, problem.updates, rows=True)
    chex.assert_trees_all_close(
        jax.device_get(found), jax.device_get(expected), rtol=1e-5, atol=1e-6
    )


def test_under_vmap_xla_serves(served, monkeypatch):
    problem = Problem.draw((4, 64, 32), RANK, True)
    expected = apply(problem.weights, problem.projectors, problem.updates, rows=True)
    wrong = lambda matrices, *_, **__: [jnp.full_like(x, jnp.nan) for x in matrices]
    kernel = types.SimpleNamespace(refusal=lambda _: None, back_project_apply=wrong)
    monkeypatch.setattr(dispatch, "backend", lambda *_: kernel)
    with jax.set_mesh(mesh_of()):
        x = laid_out(problem, P(None, "x", "y"))
        run = lambda w, p, u: apply([w], [p], [u], rows=True)
        (found,) = jax.jit(jax.vmap(run))(x.weights[0], x.projectors[0], x.updates[0])
    chex.assert_trees_all_close(
        jax.device_get(found), np.asarray(expected[0]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_a_kernel(monkeypatch):
    install(monkeypatch)
    for kernel in ("project_update", "back_project_apply"):
        monkeypatch.setattr(dispatch.backend(kernel, "triton"), "refusal", lambda _: None)
    monkeypatch.setattr(dispatch, "capability", lambda: "9.0")
    problem = Problem.draw((2, 64, 32), RANK, True, leaves=2)
    expected = apply(problem.weights, problem.projectors, problem.updates, rows=True)
    expected = expected, update(problem.gradients, problem.projectors, problem.moments, rows=True)
    with jax.set_mesh(mesh_of()):
        x = laid_out(problem, P("x", None, "y"))
        both = lambda x: (
            apply(x["weights"], x["projectors"], x["updates"], rows=True),
            update(x["gradients"], x["projectors"], x["moments"], rows=True),
        )
        found = jax.jit(both)(vars(x))
    chex.assert_trees_all_close(
        jax.device_get(found), jax.device_get(expected), rtol=1e-5, atol=1e-6
    )


# --- What is known of where arrays lie ---


def known(x):
    return meshes.is_known(x)


def test_where_types_say_nothing_it_is_unknown():
    seen = []
    look = lambda x: seen.append(known(x)) or x
    x = jnp.ones((8, 8))
    jax.jit(look)(x)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of(kind)
        jax.jit(look)(jax.device_put(x, NamedSharding(mesh, P("x"))))
        for check in (True, False):
            each = jax.shard_map(
                look, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=check
            )
            jax.jit(each)(jax.device_put(x, NamedSharding(mesh, P("x"))))
        some = jax.shard_map(look, mesh=mesh, in_specs=P("x"), out_specs=P("x"), axis_names={"x"})
        jax.jit(some)(jax.device_put(x, NamedSharding(mesh, P("x"))))
    # Of no mesh; under Auto and Explicit axes: a jitted function, two shard_maps over all axes, one
    # over some.
    assert seen == [False, *(False, True, True, False), *(True, True, True, True)]


def test_in_a_shard_map_kernels_see_what_is_there(served):
    problem = Problem.draw((64, 32), RANK, True)
    arrays = problem.weights[0], problem.projectors[0], problem.updates[0]
    (expected,) = apply(*([x] for x in arrays), rows=True)
    run = lambda *x: apply(*([y] for y in x), rows=True)[0]
    mesh = mesh_of(AxisType.Auto)
    specs = P("x", "y"), P("x"), P(None, "y")
    mapped = functools.partial(jax.shard_map, run, mesh=mesh, in_specs=specs, out_specs=P("x", "y"))
    found = jax.jit(mapped(check_vma=False))(*arrays)
    assert served[-1] == ("back_project_apply", [(32, 8)])
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(pallas.UnsupportedError, match="needs check_vma=False"):
        jax.jit(mapped()).lower(*arrays)
    same = jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P())  # the types vary over nothing
    chex.assert_trees_all_close(jax.jit(same)(*arrays), expected, rtol=1e-5, atol=1e-6)
    assert served[-1] == ("back_project_apply", [(64, 32)])


# --- Whole steps ---

PARAMS = {"up": (2, 64, 96), "down": (2, 96, 64), "query": (64, 128), "scale": (64,)}
# The side that is projected, the shorter one, is whole on every device.
WHOLE = {"up": P("x", None, "y"), "down": P("x", "y"), "query": P(None, ("x", "y")), "scale": P()}


def steps(shardings, take):
    """Three steps on gradients of their own."""
    tx = optax_gale.gale_adamw(0.1, RANK, update_proj_gap=2, weight_decay=0.01)
    draw = lambda seed: {
        name: jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), shape)
        for i, (name, shape) in enumerate(PARAMS.items())
    }
    place = lambda tree, where: tree if where is None else jax.device_put(tree, where)
    specs = None
    params = draw(0)
    state = tx.init(params)
    if shardings is not None:
        is_spec = lambda x: isinstance(x, P)
        named = lambda tree: jax.tree.map(
            lambda spec: NamedSharding(shardings, spec), tree, is_leaf=is_spec
        )
        specs = optax_gale.state_partition_specs(tx, params, WHOLE)
        state, params = place(state, named(specs)), place(params, named(WHOLE))
    program = jax.jit(functools.partial(take, tx, specs))
    for seed in (1, 2, 3):
        grads = draw(seed)
        params, state = program(
            grads if specs is None else place(grads, named(WHOLE)), state, params
        )
    return jax.device_get((params, state))


def forced(tx, _, grads, state, params):
    return optax_gale.update_and_apply(tx, grads, state, params, implementation="triton")


def with_explicit_axes(tx, specs, grads, state, params):
    step = functools.partial(forced, tx, None)
    return jax.sharding.explicit_axes(step, in_sharding=(WHOLE, specs, WHOLE))(grads, state, params)


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_a_step_of_an_optimizer(kind, served):
    plain = steps(None, lambda tx, _, *x: optax_gale.update_and_apply(tx, *x))
    mesh = mesh_of(getattr(AxisType, kind))
    with jax.set_mesh(mesh):
        found = steps(mesh, forced if kind == "Explicit" else with_explicit_axes)
    chex.assert_trees_all_close(found, plain, rtol=2e-4, atol=2e-5)
    parts = [(1, 64, 24), (1, 24, 64), (64, 16)]
    assert {kernel for kernel, _ in served} == {"project_update", "back_project_apply"}
    assert all(sorted(shapes) == sorted(parts) for _, shapes in served)


def test_what_nobody_forces_chooses_by_the_part(served, monkeypatch):
    """The table is asked for what a device has; what only XLA can serve goes to XLA."""
    asked = []
    fastest = lambda problem, _: asked.append(problem) or ["triton", "xla"]
    monkeypatch.setattr(dispatch, "fastest_first", fastest)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    shape = jax.ShapeDtypeStruct((64, 96), jnp.float32)
    tx = optax_gale.gale(optax.adam(0.1), RANK)
    state = jax.eval_shape(tx.init, shape)
    with jax.set_mesh(mesh_of()):
        for spec, kernels in (
            (P(None, "y"), ["project_update", "back_project_apply"]),
            (P("x", "y"), ["back_project_apply"]),
        ):
            asked.clear(), served.clear()
            x = jax.ShapeDtypeStruct((64, 96), jnp.float32, sharding=NamedSharding(mesh_of(), spec))
            specs = optax_gale.state_partition_specs(tx, x, spec)
            there = jax.tree.map(
                lambda s, spec: jax.ShapeDtypeStruct(
                    s.shape, s.dtype, sharding=NamedSharding(mesh_of(), spec)
                ),
                state, specs,
            )  # fmt: skip
            step = lambda *x: optax_gale.update_and_apply(tx, *x, refresh=False)
            jax.eval_shape(step, x, there, x)
            assert [kernel for kernel, _ in served] == kernels
            assert {(p.m, p.n) for p in asked} == {(64 if spec[0] is None else 32, 24)}
