"""As XLA compiles it: a matrix product, and one fused pass over the moments."""

from collections.abc import Sequence
from typing import Any

import jax

from optax_gale._products import einsum, operand, working_dtype
from optax_gale._sharding import divided_once, undivided
from optax_gale.pallas.dispatch import one_for_each
from optax_gale.pallas.elementwise import Elementwise


def project_update(
    gradients: Sequence[jax.Array],
    projectors: Sequence[jax.Array],
    moments: Sequence[Sequence[jax.Array]],
    scalars: Sequence[Sequence[jax.Array]],
    inner: Elementwise,
    *,
    rows: Sequence[bool],
    update_dtype: Any,
) -> tuple[list[jax.Array], list[tuple[jax.Array, ...]]]:
    """See `optax_gale.pallas.project_update`."""
    updates, new = [], []
    scalars = one_for_each(scalars, len(gradients))
    for g, p, old, numbers, by_rows in zip(
        gradients, projectors, moments, scalars, rows, strict=True
    ):
        u, *changed = inner([project(g, p, rows=by_rows), *old], numbers)
        updates.append(u.astype(update_dtype))
        new.append(tuple(x.astype(o.dtype) for x, o in zip(changed, old, strict=True)))
    return updates, new


def project(g: jax.Array, p: jax.Array, *, rows: bool) -> jax.Array:
    """``P^T G`` or ``G P`` in float32."""
    p = undivided(operand(p, g.dtype), -1)
    if jax.default_backend() == "cpu":
        # As CPUs do by themselves, only that jaxlib 0.10 fails on some products of one matrix.
        g, p = g.astype(working_dtype(g)), p.astype(working_dtype(g))
    if rows:
        return divided_once(undivided(einsum("...dr,...dn->...rn", p, g), -2))
    return divided_once(undivided(einsum("...md,...dr->...mr", g, p), -1))
