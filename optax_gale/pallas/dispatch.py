"""Which implementation serves a problem: a measured table, and what each backend can do."""

import functools
import importlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from optax_gale.pallas import meshes

Implementation = Literal["xla", "mosaic_gpu", "triton"]
_BUSY = 2**27
IMPLEMENTATIONS: tuple[Implementation, ...] = ("xla", "mosaic_gpu", "triton")


class UnsupportedError(ValueError):
    """An implementation was asked for that cannot serve the problem."""


class Problem(NamedTuple):
    """What decides which implementation is fastest.

    Attributes:
      kernel: name of the kernel.
      leaves: how many stacks are served together.
      batch: matrices in one of them, that a device has, as all that follows.
      m: rows of a matrix.
      n: columns of a matrix.
      rank: rank of the projectors.
      rows: whether the rows are projected.
      dtype: of the matrices.
      obstacle: why no kernel can serve it where it lies; empty if one can.
      is_known: whether it is known what part a device has.
    """

    kernel: str
    leaves: int
    batch: int
    m: int
    n: int
    rank: int
    rows: bool
    dtype: str
    obstacle: str = ""
    is_known: bool = True

    @classmethod
    def of(cls, kernel: str, matrices: Any, projectors: Any, *, rows: bool) -> "Problem":
        """Describes a group of stacks ``(*batch, m, n)`` with projectors ``(*batch, d, r)``."""
        *batch, m, n = meshes.part(matrices[0])
        rank = projectors[0].shape[-1]
        dtype = jnp.dtype(matrices[0].dtype).name
        sums = kernel == "project_update"
        obstacle = meshes.obstacle(matrices[0], projectors[0], rows=rows, sums=sums)
        alike = (kernel, len(matrices), math.prod(batch), m, n, rank, rows, dtype)
        return cls(*alike, obstacle, meshes.is_known(matrices[0]))


def for_each(rows: bool | Sequence[bool], matrices: Sequence[Any]) -> list[bool]:
    """Whether rows are projected, for each of the stacks."""
    return [rows] * len(matrices) if isinstance(rows, bool) else list(rows)


def problems(
    kernel: str, matrices: Sequence[Any], projectors: Sequence[Any], rows: Sequence[bool]
) -> list[tuple[Problem, list[int]]]:
    """The problems that stacks make, and where the stacks of each are: those that are alike."""
    found: dict[tuple[Problem, Any], list[int]] = defaultdict(list)
    for i, (matrix, projector, by_rows) in enumerate(zip(matrices, projectors, rows, strict=True)):
        problem = Problem.of(kernel, [matrix], [projector], rows=by_rows)
        found[problem, meshes.part(matrix)].append(i)
    return [(problem._replace(leaves=len(where)), where) for (problem, _), where in found.items()]


def choose_each(
    kernel: str,
    matrices: Sequence[Any],
    projectors: Sequence[Any],
    rows: Sequence[bool],
    asked: Implementation | None,
) -> list[Implementation]:
    """Decides who serves each stack; raises as `choose` does."""
    chosen: list[Implementation] = ["xla"] * len(matrices)
    for problem, where in problems(kernel, matrices, projectors, rows):
        name = choose(problem, asked)
        for i in where:
            chosen[i] = name
    return chosen


def served_together(
    chosen: Sequence[Implementation], matrices: Sequence[Any]
) -> list[tuple[Implementation, list[int]]]:
    """The implementations, and which stacks each serves at once: those on one mesh."""
    found: dict[tuple[Implementation, Any], list[int]] = defaultdict(list)
    for i, (name, matrix) in enumerate(zip(chosen, matrices, strict=True)):
        found[name, meshes.mesh_of(matrix)].append(i)
    return [(name, where) for (name, _), where in found.items()]


def choose(problem: Problem, asked: Implementation | None) -> Implementation:
    """Decides who serves a problem.

    Args:
      problem: the problem.
      asked: the implementation that must serve it, or None for the fastest.

    Returns:
      The implementation.

    Raises:
      ValueError: if ``asked`` is no implementation.
      UnsupportedError: if it cannot serve the problem.
    """
    check_implementation(asked)
    if asked is not None:
        reason = refusal(problem, asked)
        if reason is not None:
            raise UnsupportedError(
                f"{problem.kernel}: implementation={asked!r} cannot serve {_words(problem)}: "
                f"{reason}. Leave `implementation` out, or use 'xla'."
            )
        return asked
    if jax.default_backend() != "gpu" or not problem.is_known:
        return "xla"
    ranked = fastest_first(problem, capability())
    return next((name for name in ranked if refusal(problem, name) is None), "xla")


def check_implementation(asked: Any) -> None:
    """Raises ValueError unless ``asked`` is None or an implementation."""
    if asked is not None and asked not in IMPLEMENTATIONS:
        raise ValueError(
            f"`implementation` must be None or one of {IMPLEMENTATIONS}, got {asked!r}."
        )


def refusal(problem: Problem, name: Implementation) -> str | None:
    """Why an implementation cannot serve a problem; None if it can."""
    if name == "xla":
        return None
    if problem.obstacle:
        return problem.obstacle
    try:
        module = backend(problem.kernel, name)
    except ModuleNotFoundError as error:
        if error.name == f"optax_gale.pallas.{problem.kernel}.{name}":
            return "there is no such kernel"
        return f"this JAX does not have what it needs ({error})"
    except ImportError as error:
        return f"this JAX does not have what it needs ({error})"
    reason: str | None = module.refusal(problem)
    return reason


def backend(kernel: str, name: Implementation) -> Any:
    """The module of a kernel's implementation, imported when it is wanted."""
    return importlib.import_module(f"optax_gale.pallas.{kernel}.{name}")


def run(kernel: Callable[..., Any], xla: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a kernel, and under `jax.vmap`, for which kernels have no rule, XLA's form of it."""

    @custom_vmap
    def call(*arguments: Any) -> Any:
        return kernel(*arguments)

    @call.def_vmap
    def _(axis_size: int, in_batched: Any, *arguments: Any) -> Any:
        axes = jax.tree.map(lambda batched: 0 if batched else None, tuple(in_batched))
        out = jax.vmap(xla, in_axes=axes, axis_size=axis_size)(*arguments)
        return out, jax.tree.map(lambda _: True, out)

    return call(*arguments)


def one_for_all(scalars: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Scalars of the leaves of a group; those of the first alone where all have the very same.

    To be asked before `run`, where every argument becomes a value of its own.
    """
    rows = [list(row) for row in scalars]
    same = all(x is y for row in rows[1:] for x, y in zip(row, rows[0], strict=True))
    return rows[:1] if same else rows


def one_for_each(scalars: Sequence[Any], leaves: int) -> list[Any]:
    """Undoes `one_for_all`."""
    return list(scalars) * leaves if len(scalars) < leaves else list(scalars)


def _words(problem: Problem) -> str:
    matrices = f"{problem.leaves} x {problem.batch} {problem.dtype} matrices"
    sizes = f"{matrices} of {problem.m} x {problem.n}"
    if problem.rank == problem.m == problem.n:
        return sizes
    side = "rows" if problem.rows else "columns"
    return f"{sizes}, {side} projected to rank {problem.rank}"


def capability() -> str:
    """Compute capability of the GPU, such as ``"9.0"``; empty where there is none."""
    if jax.default_backend() != "gpu":
        return ""
    return str(getattr(jax.devices()[0], "compute_capability", ""))


def fastest_first(problem: Problem, architecture: str) -> list[Implementation]:
    """The implementations that were measured on the problem nearest to this one, by their times.

    XLA alone where nothing like it was measured: another architecture, dtype or orientation, or a
    problem more than four times as large or small in one of its dimensions. Of others that are as
    near, the one on which more implementations were measured counts.
    """
    best, shortest = None, (True, math.inf, 0)
    for entry in _table():
        if entry["architecture"] != architecture:
            continue
        measured = Problem(**entry["problem"])
        alike = ("kernel", "dtype", "rows")
        if any(getattr(measured, name) != getattr(problem, name) for name in alike):
            continue
        # Alignment decides whether rows can be copied in bulk.
        if (measured.n % 8 == 0) != (problem.n % 8 == 0):
            continue
        pairs = [(getattr(measured, x), getattr(problem, x)) for x in ("m", "n", "rank")]
        pairs.append((_load(measured), _load(problem)))
        steps = [abs(math.log2(a / b)) for a, b in pairs]
        another = measured != problem._replace(obstacle="", is_known=True)
        nearness = (another, sum(steps), -len(entry["times_ms"]))
        if max(steps) <= 2 and nearness < shortest:
            best, shortest = entry["times_ms"], nearness
    times: dict[Implementation, float] = best or {"xla": 0.0}
    return sorted(times, key=lambda name: times[name])


def _load(problem: Problem) -> int:
    """Elements of all matrices, up to where a GPU is busy and the time grows in proportion."""
    return min(problem.leaves * problem.batch * problem.m * problem.n, _BUSY)


@functools.cache
def _table() -> list[dict[str, Any]]:
    text = resources.files("optax_gale.pallas").joinpath("measured.json").read_text()
    return list(json.loads(text)["entries"])
