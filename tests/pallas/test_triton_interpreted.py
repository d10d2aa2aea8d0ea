"""The Triton kernels against their references, on a CPU, in Triton's interpreter.

It has no bfloat16 products; float16 takes the same way through the kernels.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from optax_gale.pallas import dispatch
from optax_gale.pallas.back_project_apply import triton as back_project_apply
from optax_gale.pallas.project_update import triton as project_update

from .problems import Problem
from .test_kernels import check, check_mixed
from .triton_interpreter import install

Apply, Update = back_project_apply.Tile, project_update.Tile

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(jax.default_backend() == "gpu", reason="the kernels run on the GPU itself"),
]


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        for module in (back_project_apply, project_update):
            patch.setattr(module, "refusal", lambda problem: None)
        patch.setattr(dispatch, "capability", lambda: "9.0")
        yield


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_leaves_of_several_shapes(dtype):
    check_mixed("triton", dtype)


# Of rows that start anywhere, in classes and without, ranks that divide by nothing, and several
# tiles each way.
SHAPES = [((2, 40, 33), 8, 2), ((37, 53), 16, 1), ((1, 2, 40, 72), 20, 1), ((150, 200), 40, 1)]


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize(("shape", "rank", "leaves"), SHAPES, ids=str)
def test_odd_shapes(shape, rank, leaves, rows):
    check(Problem.draw(shape, rank, rows, leaves=leaves, dtype=jnp.float16), "triton")


TILES = [
    (Apply(32, 64, 32, 4, 2, 2), Update(32, 16, 16, 4, 2, 2)),
    (Apply(16, 32, 16, 4, 2), Update(64, 32, 32, 4, 2, 4)),
]


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("shape", [(2, 72, 80), (80, 45)], ids=str)
@pytest.mark.parametrize("tiles", TILES, ids=["walking", "in steps"])
@pytest.mark.quick("walking-(2, 72, 80)-rows", "in steps-(80, 45)-columns")
def test_tiles(tiles, shape, rows, monkeypatch):
    for module, tile in zip((back_project_apply, project_update), tiles, strict=True):
        monkeypatch.setattr(module, "choose_tile", lambda *_, tile=tile: tile)
    check(Problem.draw(shape, 32, rows, dtype=jnp.float16), "triton")


def test_projectors_of_large_stacks_are_rounded_before(monkeypatch):
    small = functools.partial(Problem.draw, (3, 24, 40), 8, True, dtype=jnp.float16)
    problem = small()
    wide = Problem(
        problem.weights, problem.gradients, [p.astype(jnp.float32) for p in problem.projectors],
        problem.moments, problem.updates, True,
    )  # fmt: skip
    check(wide, "triton")
    monkeypatch.setattr(back_project_apply._triton, "_WORTH_A_LAUNCH", 1)
    check(wide, "triton")
