"""The second pass of a step: the update leaves the subspace and is applied, in place."""

import functools
from collections.abc import Sequence
from typing import Any

import jax

from optax_gale.pallas import dispatch, meshes
from optax_gale.pallas.back_project_apply import xla
from optax_gale.pallas.dispatch import Implementation


def back_project_apply(
    weights: Sequence[jax.Array],
    projectors: Sequence[jax.Array],
    updates: Sequence[jax.Array],
    scales: Sequence[jax.Array],
    decays: Sequence[jax.Array],
    *,
    rows: bool | Sequence[bool],
    implementation: Implementation | None = None,
) -> list[jax.Array]:
    r"""Applies low-rank updates to weights: ``W <- W + decay W + scale P U``.

    ``P U`` where the rows are projected, ``U P^T`` where the columns are. It never stands in memory
    (in XLA's form it does); sums are float32 and rounded once. With donated weights the result
    takes their place.

    Args:
      weights: stacks ``(*batch, m, n)``. Shapes may differ; those that are alike are served
        together. Dtypes are the same for all, as are those of the other arrays.
      projectors: for each ``(*batch, m, r)``, or ``(*batch, n, r)`` where the columns are.
      updates: for each ``(*batch, r, n)``, or ``(*batch, m, r)``.
      scales: for each a float32 scalar.
      decays: for each a float32 scalar, such as ``-lr * weight_decay``.
      rows: whether the rows are projected, of all or of each.
      implementation: None for the fastest that was measured, ``"xla"``, ``"mosaic_gpu"``
        (Hopper), or ``"triton"`` (with `jax-triton`).

    Returns:
      The new weights. Half-precision weights are updated from operands of their dtype.

    Raises:
      ValueError: if ``implementation`` is unknown, or (`UnsupportedError`) cannot serve.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_gale.pallas import back_project_apply
      >>> w, p, u = jnp.ones((4, 3)), jnp.eye(4, 2), jnp.ones((2, 3))
      >>> (new,) = back_project_apply([w], [p], [u], [-0.5], [0.0], rows=True)
      >>> new[:, 0].tolist()
      [0.5, 0.5, 1.0, 1.0]
    """
    sides = dispatch.for_each(rows, weights)
    chosen = dispatch.choose_each("back_project_apply", weights, projectors, sides, implementation)
    new: dict[int, jax.Array] = {}
    for name, where in dispatch.served_together(chosen, weights):
        arguments: list[Any] = [[x[i] for i in where] for x in (weights, projectors, updates)]
        arguments.append(dispatch.one_for_all([(scales[i], decays[i]) for i in where]))
        by_rows = [sides[i] for i in where]
        by_xla = functools.partial(xla.back_project_apply, rows=by_rows)
        if name == "xla":
            out = by_xla(*arguments)
        else:
            backend = dispatch.backend("back_project_apply", name)
            kernel = meshes.on_parts(
                functools.partial(backend.back_project_apply, rows=by_rows),
                arguments[0],
                by_rows,
                lambda lies: lies.matrices,
            )
            out = dispatch.run(kernel, by_xla, *arguments)
        new |= zip(where, out, strict=True)
    return [new[i] for i in range(len(chosen))]
