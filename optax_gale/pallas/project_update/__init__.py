"""The first pass of a step: gradients enter the subspace, where the inner takes its step."""

import functools
from collections.abc import Sequence
from typing import Any

import jax

from optax_gale.pallas import dispatch, meshes
from optax_gale.pallas.dispatch import Implementation
from optax_gale.pallas.elementwise import Elementwise
from optax_gale.pallas.project_update import xla


def project_update(
    gradients: Sequence[jax.Array],
    projectors: Sequence[jax.Array],
    moments: Sequence[Sequence[jax.Array]],
    scalars: Sequence[Sequence[jax.Array]],
    inner: Elementwise,
    *,
    rows: bool | Sequence[bool],
    update_dtype: Any,
    implementation: Implementation | None = None,
) -> tuple[list[jax.Array], list[tuple[jax.Array, ...]]]:
    r"""Projects gradients and runs an elementwise optimizer on what comes out, in one pass.

    ``R = P^T G`` where the rows are projected, ``R = G P`` where the columns are, in float32; then
    ``U, *moments = inner(R, *moments, *scalars)``. R never stands in memory (in XLA's form it
    does); with donated moments the new ones take their place. Adam's step, for one, is elementwise.

    Args:
      gradients: stacks ``(*batch, m, n)``. Shapes may differ; those that are alike are served
        together. Dtypes are the same for all, as are those of the other arrays.
      projectors: for each ``(*batch, m, r)``, or ``(*batch, n, r)`` where the columns are.
      moments: for each the inner's moments, ``(*batch, r, n)`` or ``(*batch, m, r)``; the same
        number and dtypes for all.
      scalars: for each the inner's scalars, ``()``.
      inner: the optimizer's step. Its first array is R, its outputs are U and the new moments.
      rows: whether the rows are projected, of all or of each.
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
    sides = dispatch.for_each(rows, gradients)
    chosen = choose(gradients, projectors, rows=rows, implementation=implementation)
    updates: dict[int, jax.Array] = {}
    new: dict[int, tuple[jax.Array, ...]] = {}
    for name, where in dispatch.served_together(chosen, gradients):
        arguments: list[Any] = [
            [gradients[i] for i in where],
            [projectors[i] for i in where],
            [list(moments[i]) for i in where],
            dispatch.one_for_all([scalars[i] for i in where]),
        ]
        by_rows = [sides[i] for i in where]
        options = {"inner": inner, "update_dtype": update_dtype, "rows": by_rows}
        by_xla = functools.partial(xla.project_update, **options)
        if name == "xla":
            out = by_xla(*arguments)
        else:
            backend = dispatch.backend("project_update", name)
            kernel = meshes.on_parts(
                functools.partial(backend.project_update, **options),
                arguments[0],
                by_rows,
                lambda lies: (lies.inside, lies.inside),
            )
            out = dispatch.run(kernel, by_xla, *arguments)
        updates |= zip(where, out[0], strict=True)
        new |= zip(where, out[1], strict=True)
    order = range(len(chosen))
    return [updates[i] for i in order], [new[i] for i in order]


def choose(
    gradients: Sequence[jax.Array],
    projectors: Sequence[jax.Array],
    *,
    rows: bool | Sequence[bool],
    implementation: Implementation | None = None,
) -> list[Implementation]:
    """Decides who serves each stack; raises as `project_update` does."""
    sides = dispatch.for_each(rows, gradients)
    return dispatch.choose_each("project_update", gradients, projectors, sides, implementation)
