"""Both kernels against their references: XLA's form on any machine, the others on a GPU."""

import functools
import importlib.util
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.flax_llama.sizes import SIZES
from optax_gale import pallas
from optax_gale.pallas import dispatch

from .problems import (
    SCALARS,
    Problem,
    adam,
    adam_numpy,
    back_project_apply_reference,
    error,
    project_update_reference,
)

# On a GPU, tests look at the compiled programs.
pytestmark = (
    [] if jax.default_backend() == "gpu" else [pytest.mark.usefixtures("quick_compilation")]
)

# (shape, rank, leaves): matrices of the LLaMA sizes, and shapes that divide by nothing.
LLAMA = [
    shape
    for name, rank, leaves in (("60m", 128, 3), ("350m", 256, 1), ("1b", 512, 1), ("7b", 128, 1))
    for size in [SIZES[name]]
    for shape in (
        ((size.hidden, size.hidden), rank, leaves),
        ((2, size.hidden, size.intermediate), rank, leaves),
        ((2, size.intermediate, size.hidden), rank, 1),
    )
]
ODD = [((3, 129, 257), 16, 2), ((1, 2, 40, 72), 8, 1), ((250, 130), 64, 5), ((66, 34), 33, 1)]
TOLERANCE = {"bfloat16": 4e-3, "float16": 6e-4, "float32": 2e-6}
# Tensor cores cut off what they add: sums come out short by this much of themselves a term.
CUT_OFF = 1.2e-9


def apply(problem, implementation, scale=-0.5, decay=-0.01):
    leaves = len(problem.weights)
    return pallas.back_project_apply(
        problem.weights,
        problem.projectors,
        problem.updates,
        [jnp.float32(scale)] * leaves,
        [jnp.float32(decay)] * leaves,
        rows=problem.rows,
        implementation=implementation,
    )


def update(problem, implementation):
    leaves = len(problem.weights)
    return pallas.project_update(
        problem.gradients,
        problem.projectors,
        problem.moments,
        [[jnp.float32(x) for x in SCALARS.values()]] * leaves,
        adam(),
        rows=problem.rows,
        update_dtype=problem.weights[0].dtype,
        implementation=implementation,
    )


def check(problem, implementation):
    """Both kernels under jit against float64; memory that they get is poisoned first."""
    dtype = problem.weights[0].dtype.name
    refusal = None
    try:
        programs = [jax.jit(f, static_argnums=1) for f in (apply, update)]
        for f in programs:
            f.lower(problem, implementation)
    except pallas.UnsupportedError as unsupported:
        refusal = str(unsupported)
    if refusal is not None:
        assert "cannot serve" in refusal
        pytest.skip(refusal)
    jax.block_until_ready([jnp.full_like(x, jnp.nan) for x in (*problem.weights, *problem.updates)])
    expected = back_project_apply_reference(
        *(problem.weights, problem.projectors, problem.updates),
        [-0.5] * len(problem.weights),
        [-0.01] * len(problem.weights),
        rows=problem.rows,
    )
    for found, reference in zip(programs[0](problem, implementation), expected, strict=True):
        assert found.dtype == dtype
        assert error(found, reference) < TOLERANCE[dtype]
    jax.block_until_ready([jnp.full_like(x, jnp.nan) for x in problem.updates])
    updates, moments = programs[1](problem, implementation)
    references = project_update_reference(
        *(problem.gradients, problem.projectors, problem.moments),
        [list(SCALARS.values())] * len(problem.weights),
        adam_numpy,
        rows=problem.rows,
    )
    for found, reference in zip(updates, references[0], strict=True):
        assert found.dtype == dtype
        assert error(found, reference) < TOLERANCE[dtype]
    terms = problem.projectors[0].shape[-2]
    for found, reference in zip(moments, references[1], strict=True):
        for x, y in zip(found, reference, strict=True):
            assert error(x, y) < TOLERANCE[x.dtype.name] + CUT_OFF * terms
    return programs


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "rank", "leaves"), ODD, ids=str)
def test_xla(shape, rank, leaves, dtype, rows):
    rank = min(rank, *shape[-2:])
    check(Problem.draw(shape, rank, rows, leaves=leaves, dtype=jnp.dtype(dtype)), "xla")


def test_bfloat16_moments_and_scalars_of_each_leaf():
    problem = Problem.draw((24, 40), 8, True, leaves=2, state=jnp.bfloat16)
    check(problem, "xla")


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu", "triton"])
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize(("shape", "rank", "leaves"), [*LLAMA, *ODD], ids=str)
def test_on_a_gpu(shape, rank, leaves, rows, implementation):
    rank = min(rank, *shape[-2:])
    problem = Problem.draw(shape, rank, rows, leaves=leaves, dtype=jnp.bfloat16)
    for program in check(problem, implementation):
        text = program.lower(problem, implementation).compile().as_text()
        marks = {"mosaic_gpu": "mosaic_gpu", "triton": "triton_kernel_call"}
        for name, mark in marks.items():
            assert (mark in text) == (name == implementation)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
def test_random_shapes_on_a_gpu(implementation):
    rng = np.random.default_rng(0)
    served = 0
    for seed in range(12):
        m, n = (int(8 * rng.integers(8, 160)) for _ in range(2))
        rank = int(rng.choice([16, 64, 128, 256]))
        batch, leaves = (int(x) for x in rng.integers(1, 4, 2))
        rank, rows = min(rank, m, n), bool(rng.integers(2))
        draw = functools.partial(Problem.draw, leaves=leaves, dtype=jnp.bfloat16, seed=seed)
        problem = draw((batch, m, n), rank, rows)
        try:
            check(problem, implementation)
            served += 1
        except pytest.skip.Exception:
            continue
    assert served


@pytest.mark.gpu
def test_nothing_of_the_weights_size_is_made():
    """The update of a weight never stands in memory."""
    problem = Problem.draw((4, 2048, 2048), 128, True, dtype=jnp.bfloat16)
    for implementation in ("mosaic_gpu", "triton"):
        try:
            compiled = (
                jax.jit(apply, static_argnums=1, donate_argnums=0)
                .lower(problem, implementation)
                .compile()
            )
        except pallas.UnsupportedError:
            continue
        assert compiled.memory_analysis().temp_size_in_bytes < problem.weights[0].nbytes // 4


def test_what_cannot_be_served_is_refused_with_the_reason():
    problem = Problem.draw((8, 6), 2, True)
    for implementation in ("mosaic_gpu", "triton"):
        if jax.default_backend() == "gpu":
            continue
        for run in (apply, update):
            with pytest.raises(pallas.UnsupportedError, match=f"'{implementation}' cannot serve"):
                run(problem, implementation)
    with pytest.raises(ValueError, match="must be None or one of"):
        apply(problem, "cuda")


def entry(times, architecture="9.0", **changes):
    problem = dict(
        kernel="k", leaves=1, batch=8, m=4096, n=4096, rank=128, rows=True, dtype="bfloat16"
    )
    return {
        "architecture": architecture, "device": "", "problem": problem | changes, "times_ms": times
    }  # fmt: skip


def test_the_table_of_measurements_decides(monkeypatch):
    table = [
        entry({"xla": 2.0, "triton": 1.0}),
        entry({"xla": 1.0, "triton": 2.0}, rank=1024),
        entry({"xla": 1.0, "mosaic_gpu": 0.5}, rows=False),
        entry({"xla": 2.0, "mosaic_gpu": 1.0}, architecture="8.0"),
    ]
    monkeypatch.setattr(dispatch, "_table", lambda: table)
    ask = lambda architecture="9.0", **changes: dispatch.fastest_first(
        dispatch.Problem(**entry({}, **changes)["problem"]), architecture
    )[0]
    assert ask() == "triton"
    assert ask(rank=256) == "triton"  # the nearer one
    assert ask(rank=768) == "xla"
    assert ask(rows=False) == "mosaic_gpu"
    assert ask("8.0") == "mosaic_gpu"
    assert ask(batch=64) == "triton"  # eight keep a GPU busy
    more = {"xla": 2.0, "triton": 1.0, "mosaic_gpu": 0.5}
    monkeypatch.setattr(dispatch, "_table", lambda: [*table, entry(more, batch=16)])
    assert ask() == "triton"  # measured on this very problem
    assert ask(batch=64) == "mosaic_gpu"  # both are as near, and more was measured
    monkeypatch.setattr(dispatch, "_table", lambda: table)
    for unlike in (
        {"dtype": "float32"},
        {"kernel": "other"},
        {"n": 4095},
        {"m": 512},
        {"batch": 1},
    ):
        assert ask(**unlike) == "xla"
    assert ask("10.0") == "xla"


def test_where_it_is_known_what_a_gpu_has_the_table_is_asked(monkeypatch):
    problem = dispatch.Problem(**entry({})["problem"])
    refused = {"mosaic_gpu": "too old"}
    monkeypatch.setattr(
        dispatch, "backend",
        lambda _, name: types.SimpleNamespace(refusal=lambda _: refused.get(name)),
    )  # fmt: skip
    times = {"xla": 2.0, "triton": 1.0, "mosaic_gpu": 0.5}
    monkeypatch.setattr(dispatch, "_table", lambda: [entry(times)])
    monkeypatch.setattr(dispatch, "capability", lambda: "9.0")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert dispatch.choose(problem, None) == "triton"
    in_the_way = problem._replace(obstacle="they lie elsewhere")
    assert dispatch.choose(in_the_way, None) == "xla"
    with pytest.raises(pallas.UnsupportedError, match="they lie elsewhere"):
        dispatch.choose(in_the_way, "triton")
    with pytest.raises(pallas.UnsupportedError, match="too old"):
        dispatch.choose(problem, "mosaic_gpu")
    refused["triton"] = "no triton"
    assert dispatch.choose(problem, None) == "xla"
    del refused["mosaic_gpu"]
    assert dispatch.choose(problem, None) == "mosaic_gpu"  # the next best that is there
    assert dispatch.choose(problem._replace(is_known=False), None) == "xla"


def test_the_stored_table_is_well_formed():
    for row in dispatch._table():
        problem = dispatch.Problem(**row["problem"])
        assert importlib.util.find_spec(f"optax_gale.pallas.{problem.kernel}.xla")
        assert set(row["times_ms"]) <= set(dispatch.IMPLEMENTATIONS)
        assert "xla" in row["times_ms"]
        assert all(t > 0 for t in row["times_ms"].values())
        fastest = min(row["times_ms"], key=row["times_ms"].get)
        assert dispatch.fastest_first(problem, row["architecture"])[0] == fastest


def test_under_vmap_xla_serves():
    xla = lambda x, scale: [scale * y for y in x]
    kernel = lambda x, scale: [jnp.full_like(y, jnp.nan) for y in x]
    run = lambda x, scale: dispatch.run(kernel, xla, [x], scale)
    assert jnp.isnan(run(jnp.ones(2), jnp.float32(2))[0]).all()
    found = jax.vmap(run, in_axes=(0, None))(jnp.arange(6.0).reshape(3, 2), jnp.float32(2))
    np.testing.assert_array_equal(found[0], 2 * np.arange(6.0).reshape(3, 2))
    problem = Problem.draw((3, 24, 40), 8, True)
    batched = jax.vmap(lambda p: apply(p, None))(problem)
    for x, y in zip(batched, apply(problem, None), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_backends_are_imported_when_they_are_wanted():
    program = (
        "import sys, optax_gale;"
        "names = [m for m in sys.modules if m.startswith('optax_gale.pallas.')];"
        "assert names and not [m for m in names if m.endswith(('.mosaic_gpu', '.triton'))]"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    problem = dispatch.Problem(**entry({})["problem"])  # of a kernel that nobody has
    assert "does not have what it needs" in dispatch.refusal(problem, "triton")


def test_scalars_that_leaves_share_are_one_set():
    x, y = jnp.float32(1), jnp.float32(1)
    assert len(dispatch.one_for_all([(x, y), (x, y)])) == 1
    assert len(dispatch.one_for_all([(x, y), (y, y)])) == 2
    assert dispatch.one_for_each([[x]], 3) == [[x]] * 3
    assert dispatch.one_for_each([[x], [y]], 2) == [[x], [y]]
    assert dispatch.one_for_all([[], []]) == [[]]


MIXED = [((40, 56), 8, True, 3), ((56, 40), 8, False, 2), ((2, 24, 33), 16, True, 1)]


def mixed(dtype):
    """Leaves of several shapes and sides, in an order that keeps none of them together."""
    problems = [
        Problem.draw(shape, rank, rows, leaves=leaves, dtype=dtype, seed=seed)
        for seed, (shape, rank, rows, leaves) in enumerate(MIXED)
    ]
    names = ("weights", "gradients", "projectors", "moments", "updates")
    arrays = {name: [x for p in problems for x in getattr(p, name)] for name in names}
    rows = [p.rows for p in problems for _ in p.weights]
    order = np.random.default_rng(0).permutation(len(rows))
    return {name: [xs[i] for i in order] for name, xs in arrays.items()}, [rows[i] for i in order]


def check_mixed(implementation, dtype):
    x, rows = mixed(dtype)
    leaves = len(rows)
    scales = [jnp.float32(-0.5 - i) for i in range(leaves)]
    decays = [jnp.float32(-0.01)] * leaves
    scalars = [[jnp.float32(x) for x in SCALARS.values()]] * leaves

    @jax.jit
    def both(x):
        new = pallas.back_project_apply(
            *(x["weights"], x["projectors"], x["updates"], scales, decays),
            rows=rows,
            implementation=implementation,
        )
        return new, pallas.project_update(
            *(x["gradients"], x["projectors"], x["moments"], scalars, adam()),
            rows=rows,
            update_dtype=dtype,
            implementation=implementation,
        )

    new, (updates, moments) = both(x)
    for i in range(leaves):
        one = {name: [xs[i]] for name, xs in x.items()}
        (expected,) = back_project_apply_reference(
            *(one["weights"], one["projectors"], one["updates"], [scales[i]], [decays[i]]),
            rows=rows[i],
        )
        assert error(new[i], expected) < TOLERANCE[jnp.dtype(dtype).name]
        (update,), (changed,) = project_update_reference(
            *(one["gradients"], one["projectors"], one["moments"], [scalars[i]], adam_numpy),
            rows=rows[i],
        )
        assert error(updates[i], update) < TOLERANCE[jnp.dtype(dtype).name]
        for found, reference in zip(moments[i], changed, strict=True):
            assert error(found, reference) < TOLERANCE["float32"]
    return both.lower(x).compile().as_text()


def test_leaves_of_several_shapes():
    check_mixed("xla", jnp.float32)
    check_mixed(None, jnp.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_small_leaves_of_several_shapes_share_two_launches_on_a_gpu(dtype):
    text = check_mixed("triton", dtype)
    calls = [line for line in text.splitlines() if "custom-call(" in line]
    assert sum("triton_kernel_call" in line for line in calls) == 2
