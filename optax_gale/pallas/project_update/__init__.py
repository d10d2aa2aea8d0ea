"""The first pass of a step: gradients enter the subspace, where the inner takes its step."""

import functools
from collections.abc import Sequence
from typing import Any

import jax

from optax_gale.pallas import dispatch
from optax_gale.pallas.dispatch import Implementation, Problem
from optax_gale.pallas.elementwise import Elementwise
from optax_gale.pallas.project_update import xla


def project_update(
    gradients: Sequence[jax.Array],
    projectors: Sequence[jax.Array],
    moments: Sequence[Sequence[jax.Array]],
    scalars: Sequence[Sequence[jax.Array]],
    inner: Elementwise,
    *,
    rows: bool,
    update_dtype: Any,
    implementation: Implementation | None = None,
) -> tuple[list[jax.Array], list[tuple[jax.Array, ...]]]:
    r"""Projects gradients and runs an elementwise optimizer on what comes out, in one pass.

    ``R = P^T G`` where the rows are projected, ``R = G P`` where the columns are, in float32; then
    ``U, *moments = inner(R, *moments, *scalars)``. R never stands in memory (in XLA's form it
    does); with donated moments the new ones take their place. Adam's step, for one, is elementwise.

    Args:
      gradients: a group of stacks of one shape and dtype, each ``(*batch, m, n)``.
      projectors: for each ``(*batch, m, r)``, or ``(*batch, n, r)`` where the columns are.
      moments: for each the inner's moments, ``(*batch, r, n)`` or ``(*batch, m, r)``; the same
        number and dtypes for all.
      scalars: for each the inner's scalars, ``()``.
      inner: the optimizer's step. Its first array is R, its outputs are U and the new moments.
      rows: whether the rows are projected.
      update_dtype: dtype of U.
      implementation: None for the fastest that was measured, ``"xla"``, ``"mosaic_gpu"``
        (Hopper), or ``"triton"`` (with `jax-triton`).

    Returns:
      U for every stack, ``(*batch, r, n)`` or ``(*batch, m, r)``, and its new moments. Projectors
      are rounded to half precision where the gradients are.

    Raises:
      ValueError: if ``implementation`` is unknown, or (`UnsupportedError`) cannot serve.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_gale.pallas import Elementwise, project_update
      >>> from optax_gale.pallas.elementwise import Operation
      >>> add = Operation(jax.lax.add_p, (), (0, 1), jnp.dtype("float32"))
      >>> momentum = Elementwise(2, 0, (add,), (2, 2))
      >>> g, p, m = jnp.ones((4, 3)), jnp.eye(4, 2), jnp.ones((2, 3))
      >>> u, new = project_update([g], [p], [[m]], [[]], momentum, rows=True, update_dtype=g.dtype)
      >>> u[0][0].tolist()
      [2.0, 2.0, 2.0]
    """
    chosen = choose(gradients, projectors, rows=rows, implementation=implementation)
    backend = dispatch.backend("project_update", chosen)
    options: dict[str, Any] = {"inner": inner, "rows": rows, "update_dtype": update_dtype}
    moments = [list(x) for x in moments]
    arguments = [list(gradients), list(projectors), moments, dispatch.one_for_all(scalars)]
    by_xla = functools.partial(xla.project_update, **options)
    if chosen == "xla":
        return by_xla(*arguments)
    kernel = functools.partial(backend.project_update, **options)
    out: tuple[list[jax.Array], list[tuple[jax.Array, ...]]] = dispatch.run(
        kernel, by_xla, *arguments
    )
    return out


def choose(
    gradients: Sequence[jax.Array],
    projectors: Sequence[jax.Array],
    *,
    rows: bool,
    implementation: Implementation | None = None,
) -> Implementation:
    """Decides which implementation serves these arrays; raises as `project_update` does."""
    problem = Problem.of("project_update", gradients, projectors, rows=rows)
    return dispatch.choose(problem, implementation)
