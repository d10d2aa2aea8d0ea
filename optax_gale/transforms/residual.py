"""What the subspace drops: the `residual` option."""

from typing import Literal

import jax
import jax.numpy as jnp

from optax_gale import linalg

Residual = None | Literal["fira"]

GROWTH_LIMIT = 1.01


def fira(
    g: jax.Array,
    p: jax.Array,
    r: jax.Array,
    u: jax.Array,
    previous: jax.Array,
    *,
    rows: bool,
    direction: jax.Array | float,
) -> tuple[jax.Array, jax.Array]:
    r"""Fira's term: the dropped part of the gradient, scaled like the part that was kept.

    With ``S = G - P R``, every column (row, when columns are projected) of S is scaled by
    ``||U_i|| / ||R_i||``, the ratio of the inner's update to its input. The scaled S may grow,
    relative to U, by at most 1 % a step. Fira limits its absolute norm; the ratio is the same for
    an Adam of steady norm, and does not confuse a rising learning rate inside U with a spike.

    Args:
      g: gradient, ``(*batch, m, n)``.
      p: projector, ``(*batch, d, r)``.
      r: projected gradient R.
      u: the inner's update, shaped like R.
      previous: ``||scaled S|| / ||U||`` of the last step, ``(*batch,)`` float32; 0 at first.
      rows: whether rows are projected.
      direction: sign of U along R.

    Returns:
      The term, ``(*batch, m, n)`` float32, and this step's ratio.

    References:
      Chen et al., `Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?
      <https://arxiv.org/abs/2410.01623>`_, 2024, equations 5 to 8.
    """
    r, u = r.astype(jnp.float32), u.astype(jnp.float32)
    axis = -2 if rows else -1
    norm = lambda x, axes: jnp.sqrt(jnp.sum(x * x, axis=axes, keepdims=True))
    kept = norm(r, axis)
    factor = jnp.where(kept > 0, norm(u, axis) / jnp.where(kept > 0, kept, 1.0), 0.0)
    back = "...dr,...rn->...dn" if rows else "...mr,...dr->...md"
    inside = linalg.einsum(back, p, r) if rows else linalg.einsum(back, r, p)
    scaled = factor * (g.astype(jnp.float32) - inside)
    whole = norm(u, (-2, -1))
    ratio = jnp.where(whole > 0, norm(scaled, (-2, -1)) / jnp.where(whole > 0, whole, 1.0), 0.0)
    previous = previous[..., None, None]
    limited = jnp.where(previous > 0, jnp.minimum(ratio, GROWTH_LIMIT * previous), ratio)
    shrink = jnp.where(ratio > 0, limited / jnp.where(ratio > 0, ratio, 1.0), 0.0)
    # A step that stands still (zero update or gradient) leaves the memory of the last one.
    remembered = jnp.where(limited > 0, limited, previous)
    return direction * shrink * scaled, remembered[..., 0, 0]
