"""As XLA compiles it: a matrix product, and one fused pass over the weight."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_gale._products import einsum, operand
from optax_gale._sharding import undivided
from optax_gale.pallas.dispatch import one_for_each


def back_project_apply(
    weights: Sequence[jax.Array],
    projectors: Sequence[jax.Array],
    updates: Sequence[jax.Array],
    scalars: Sequence[Sequence[jax.Array]],
    *,
    rows: Sequence[bool],
) -> list[jax.Array]:
    """See `optax_gale.pallas.back_project_apply`; ``scalars`` are scale and decay."""
    out = []
    scalars = one_for_each(scalars, len(weights))
    for w, p, u, (scale, decay), by_rows in zip(
        weights, projectors, updates, scalars, rows, strict=True
    ):
        wide = w.astype(jnp.promote_types(w.dtype, jnp.float32))
        step = back_project(p, u, rows=by_rows, dtype=w.dtype)
        out.append((wide + decay * wide + scale * step).astype(w.dtype))
    return out


def back_project(p: jax.Array, u: jax.Array, *, rows: bool, dtype: Any) -> jax.Array:
    """``P U`` or ``U P^T`` in float32, from operands fit for weights of ``dtype``."""
    p = undivided(operand(p, dtype), -1)
    u = undivided(operand(u, dtype), -2 if rows else -1)
    if rows:
        return einsum("...dr,...rn->...dn", p, u)
    return einsum("...mr,...dr->...md", u, p)
