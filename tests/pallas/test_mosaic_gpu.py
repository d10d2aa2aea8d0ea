"""The Mosaic GPU kernels on a CPU: interpreted, and compiled as far as that goes without a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_gale import pallas
from optax_gale.pallas import _mosaic_gpu, dispatch
from optax_gale.pallas.back_project_apply import mosaic_gpu as back_project_apply
from optax_gale.pallas.dispatch import UnsupportedError
from optax_gale.pallas.elementwise import Constant, Elementwise, Operation
from optax_gale.pallas.project_update import mosaic_gpu as project_update
from optax_gale.pallas.project_update._lowerable import lowerable

from .problems import (
    SCALARS,
    Problem,
    adam,
    adam_numpy,
    back_project_apply_reference,
    error,
    project_update_reference,
)

Apply, Update = back_project_apply.Plan, project_update.Plan
# Two thread blocks, so that each has several tiles and slots come round.
RESIDENT = Apply(64, 128, 64, 2, 2, resident=True, run=2, split_rows=False, blocks=2)
STREAMED = Apply(128, 128, 64, 2, 1, resident=False, run=1, split_rows=True, blocks=2)
DEEP = Apply(64, 128, 128, 2, 3, resident=True, run=1, split_rows=False, blocks=1)
BY_ROWS = Update(128, 64, 64, 2, 2, split_rows=True, blocks=2)
BY_COLUMNS = Update(64, 128, 64, 2, 2, split_rows=False, blocks=2)
TOLERANCE = {"bfloat16": 4e-3, "float16": 6e-4, "float32": 2e-6}

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason="the interpreter of this JAX knows neither references nor transposed operands",
)


def interpreter():
    return plgpu.InterpretGPUParams()


def check_apply(problem, plan):
    leaves = len(problem.weights)
    scales, decays = ([c * (i + 1) for i in range(leaves)] for c in (-0.5, -0.01))
    new = back_project_apply.back_project_apply(
        problem.weights,
        problem.projectors,
        problem.updates,
        [[jnp.float32(x) for x in pair] for pair in zip(scales, decays, strict=True)],
        rows=[problem.rows] * len(problem.weights),
        plan=plan,
        interpret=interpreter(),
    )
    expected = back_project_apply_reference(
        problem.weights, problem.projectors, problem.updates, scales, decays, rows=problem.rows
    )
    for x, y in zip(new, expected, strict=True):
        assert x.dtype == problem.weights[0].dtype
        assert x.shape == y.shape
        assert error(x, y) < TOLERANCE[x.dtype.name]


def check_update(problem, plan, inner=None, inner_numpy=adam_numpy, update_dtype=jnp.float32):
    scalars = [[jnp.float32(x) for x in SCALARS.values()]] * len(problem.weights)
    arrays = problem.gradients, problem.projectors, problem.moments, scalars
    updates, new = project_update.project_update(
        *arrays,
        inner or adam(),
        rows=[problem.rows] * len(problem.weights),
        update_dtype=update_dtype,
        plan=plan,
        interpret=interpreter(),
    )
    expected = project_update_reference(*arrays, inner_numpy, rows=problem.rows)
    for u, moments, (v, others) in zip(updates, new, zip(*expected, strict=True), strict=True):
        assert u.dtype == update_dtype
        for x, y in zip([u, *moments], [v, *others], strict=True):
            assert x.shape == y.shape
            assert error(x, y) < TOLERANCE[x.dtype.name]


@interpreted
@pytest.mark.parametrize(
    ("plan", "rank"), [(RESIDENT, 64), (RESIDENT, 128), (STREAMED, 128), (DEEP, 128)]
)
@pytest.mark.parametrize("rows", [True, False])
def test_back_project_apply(rows, plan, rank):
    check_apply(Problem.draw((2, 256, 128), rank, rows, dtype=jnp.bfloat16), plan)


@interpreted
@pytest.mark.parametrize("plan", [BY_ROWS, BY_COLUMNS])
@pytest.mark.parametrize("rows", [True, False])
def test_project_update(rows, plan):
    check_update(Problem.draw((2, 128, 192), 128, rows, dtype=jnp.bfloat16), plan)


@interpreted
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize(("shape", "rank"), [((100, 136), 64), ((67, 72), 24)])
def test_ragged_edges(shape, rank, rows):
    problem = Problem.draw(shape, rank, rows, dtype=jnp.bfloat16)
    check_apply(problem, RESIDENT)
    check_apply(problem, STREAMED)
    check_update(problem, BY_COLUMNS)


@interpreted
@pytest.mark.parametrize("rows", [True, False])
def test_groups_of_leaves(rows, monkeypatch):
    monkeypatch.setattr(_mosaic_gpu, "_MAX_LEAVES", 2)
    problem = Problem.draw((64, 128), 64, rows, leaves=3, dtype=jnp.bfloat16)
    check_apply(problem, RESIDENT)
    check_update(problem, BY_COLUMNS)


@interpreted
def test_batch_axes():
    problem = Problem.draw((1, 2, 64, 64), 64, True, dtype=jnp.bfloat16)
    check_apply(problem, RESIDENT)
    check_update(problem, BY_COLUMNS)


@interpreted
def test_dtypes():
    problem = Problem.draw((64, 128), 64, True, dtype=jnp.float16, state="bfloat16")
    check_apply(problem, RESIDENT)
    check_update(problem, BY_COLUMNS, update_dtype=jnp.float16)


@interpreted
def test_projector_is_rounded_like_the_matrices():
    problem = Problem.draw((64, 128), 64, True, dtype=jnp.bfloat16)
    wide = [p.astype(jnp.float32) for p in problem.projectors]
    check_apply(Problem(**{**vars(problem), "projectors": wide}), RESIDENT)


@interpreted
def test_inner_without_moments():
    problem = Problem.draw((64, 128), 64, True, dtype=jnp.bfloat16)
    problem = Problem(**{**vars(problem), "moments": [()]})
    f32 = jnp.dtype("float32")
    rate = Operation(jax.lax.mul_p, (), (0, 3), f32)
    inner = Elementwise(1, len(SCALARS), (rate,), (4,))
    last = list(SCALARS.values())[-1]
    check_update(problem, BY_COLUMNS, inner, lambda r, *_: (r * np.float32(last),))


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize(
    ("shape", "rank", "leaves"),
    [((2, 512, 512), 128, 1), ((5464, 2048), 1024, 1), ((1000, 2736), 200, 2)],
)
def test_lowers_for_cuda_in_place(shape, rank, leaves, rows):
    problem = Problem.draw((1, 8, 8), 8, rows, leaves=leaves, dtype=jnp.bfloat16)
    *batch, m, n = shape
    half = lambda *shape: jax.ShapeDtypeStruct((*batch, *shape), jnp.bfloat16)
    inner = (rank, n) if rows else (m, rank)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    matrices = [half(m, n) for _ in problem.weights]
    projectors = [half(m if rows else n, rank) for _ in problem.weights]
    states = [[jax.ShapeDtypeStruct((*batch, *inner), jnp.float32)] * 2 for _ in problem.weights]
    scalars = [[scalar] * len(SCALARS) for _ in problem.weights]

    def lower(function, *args, donated):
        traced = jax.jit(function, donate_argnums=donated).trace(*args)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    text = lower(
        functools.partial(back_project_apply.back_project_apply, rows=[rows] * leaves),
        *(matrices, projectors, [half(*inner) for _ in matrices]),
        [[scalar] * 2 for _ in matrices],
        donated=0,
    )
    assert text.count("@mosaic_gpu_v2") == 1
    assert text.count("output_operand_alias<") == leaves
    assert text.count("tf.aliasing_output") == leaves
    step = functools.partial(
        project_update.project_update, inner=adam(), rows=[rows] * leaves, update_dtype=jnp.bfloat16
    )
    text = lower(step, matrices, projectors, states, scalars, donated=2)
    assert text.count("@mosaic_gpu_v2") == 1
    assert text.count("output_operand_alias<") == 2 * leaves
    assert text.count("tf.aliasing_output") == 2 * leaves


def problem_of(**changes):
    fine = dispatch.Problem("back_project_apply", 1, 2, 512, 512, 128, True, "bfloat16")
    return fine._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "bfloat16 and float16 only"),
        ({"n": 5461}, "number of columns is 5461"),
        ({"rank": 33}, "rank is 33"),
    ],
)
def test_refuses_shapes(changes, reason, monkeypatch):
    monkeypatch.setattr(_mosaic_gpu, "capability", lambda: "9.0")
    monkeypatch.setattr(_mosaic_gpu, "IS_RECENT", True)
    assert project_update.refusal(problem_of()) is None
    assert reason in project_update.refusal(problem_of(**changes))
    assert reason in back_project_apply.refusal(problem_of(**changes))


@pytest.mark.parametrize(("architecture", "reason"), [("8.0", "is 8.0"), ("", "there is none")])
def test_refuses_devices(architecture, reason, monkeypatch):
    monkeypatch.setattr(_mosaic_gpu, "capability", lambda: architecture)
    assert reason in back_project_apply.refusal(problem_of())


def test_refuses_a_jax_that_cannot_run_it(monkeypatch):
    monkeypatch.setattr(_mosaic_gpu, "capability", lambda: "9.0")
    monkeypatch.setattr(_mosaic_gpu, "IS_RECENT", False)
    assert "needs JAX 0.11" in back_project_apply.refusal(problem_of())


def test_scalars_are_computed_ahead():
    f32 = jnp.dtype("float32")
    power = Operation(jax.lax.pow_p, (), (1, 2), f32)
    scaled = Operation(jax.lax.mul_p, (), (0, 3), f32)
    program = Elementwise(1, 2, (power, scaled), (4,))
    left, numbers = lowerable(program, [[jnp.float32(2), jnp.float32(x)] for x in (3, 4)])
    assert (left.arrays, left.scalars, len(left.operations)) == (1, 1, 1)
    assert numbers.tolist() == [[8], [16]]
    assert left([jnp.ones(2)], [numbers[0, 0]])[0].tolist() == [8, 8]


@pytest.mark.parametrize("x", [0.0, 2.0, np.inf])
def test_square_root(x):
    f32 = jnp.dtype("float32")
    root = Operation(jax.lax.sqrt_p, (("accuracy", None),), (0,), f32)
    left, _ = lowerable(Elementwise(1, 0, (root,), (1,)), [[]])
    np.testing.assert_allclose(left([jnp.full(2, x)], [])[0], np.sqrt(np.float32(x)), rtol=1e-6)


def test_refuses_what_the_compiler_lacks():
    f32 = jnp.dtype("float32")
    power = Operation(jax.lax.pow_p, (), (0, Constant(0.5, f32)), f32)
    with pytest.raises(UnsupportedError, match="'pow'"):
        lowerable(Elementwise(1, 0, (power,), (1,)), [[]])


@pytest.mark.skipif(not _mosaic_gpu.IS_RECENT, reason="needs JAX 0.11")
@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("where", ["explicit", "shard_map", "shard_map of what all have"])
def test_lowers_for_cuda_on_a_mesh(where, monkeypatch):
    """Each device launches a kernel on its part, in place."""
    monkeypatch.setattr(_mosaic_gpu, "capability", lambda: "9.0")
    kind = AxisType.Explicit if where == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))

    def array(shape, spec, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    side, inside = P("x", None, None), P("x", None, "y")
    arrays = {
        "matrix": array((2, 512, 2048), inside),
        "projector": array((2, 512, 128), side),
        "moments": (array((2, 128, 2048), inside, jnp.float32),) * 2,
        "update": array((2, 128, 2048), inside),
    }
    number = jnp.float32(-0.1)

    def both(arrays):
        new = pallas.back_project_apply(
            [arrays["matrix"]], [arrays["projector"]], [arrays["update"]], [number], [number],
            rows=True, implementation="mosaic_gpu",
        )  # fmt: skip
        moments = pallas.project_update(
            [arrays["matrix"]], [arrays["projector"]], [arrays["moments"]], [[number] * 3], adam(),
            rows=True, update_dtype=jnp.bfloat16, implementation="mosaic_gpu",
        )  # fmt: skip
        return new, moments

    if where == "shard_map":
        specs = {"matrix": inside, "projector": side, "moments": inside, "update": inside}
        out = inside, inside
        both = jax.shard_map(both, mesh=mesh, in_specs=(specs,), out_specs=out, check_vma=False)
    elif where != "explicit":
        both = jax.shard_map(both, mesh=mesh, in_specs=P(), out_specs=P())
    with jax.set_mesh(mesh):
        text = jax.jit(both).trace(arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 2
    assert text.count("output_operand_alias<") == 3
