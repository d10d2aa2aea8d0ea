"""How close subspaces are to each other, and how much of a matrix they hold."""

import jax
import jax.numpy as jnp

from optax_gale._products import einsum, working_dtype
from optax_gale.linalg._tall_svd import tall_svd
from optax_gale.linalg.orthonormalize import is_finite, or_identity


@jax.jit
def principal_angles(p: jax.Array, q: jax.Array) -> jax.Array:
    r"""Computes the principal angles between the ranges of two orthonormal bases.

    Angles below π/4 come from the sines, the singular values of ``Q - P PᵀQ``, and the others from
    the cosines, those of ``PᵀQ``: small angles are as accurate as large ones, where cosines alone
    could not tell 1e-4 from 0.

    Args:
        p: ``(*batch, m, r)`` with orthonormal columns, of any floating dtype.
        q: ``(*batch, m, s)`` with orthonormal columns.

    Returns:
        ``(*batch, min(r, s))`` angles in radians, the largest first.

    Example:
        >>> import jax.numpy as jnp
        >>> from optax_gale.linalg import principal_angles
        >>> p = jnp.array([[1.0], [0.0]])
        >>> q = jnp.array([[jnp.cos(1e-6)], [jnp.sin(1e-6)]])
        >>> f"{float(principal_angles(p, q)[0]):.2e}"
        '1.00e-06'

    References:
        Knyazev, Argentati, `Principal angles between subspaces in an A-based scalar product
        <https://doi.org/10.1137/S1064827500377332>`_, 2002, Algorithm 3.1. Björck, Golub,
        `Numerical methods for computing angles between linear subspaces
        <https://doi.org/10.1090/S0025-5718-1973-0348991-3>`_, 1973.
    """
    if p.shape[-1] < q.shape[-1]:
        p, q = q, p
    dtype = working_dtype(p, q)
    p, q = p.astype(dtype), q.astype(dtype)
    inner = einsum("...mr,...ms->...rs", p, q)
    # LAPACK hangs on Inf; the sines turn to NaN there.
    cosines = jnp.linalg.svd(or_identity(inner, is_finite(inner)), compute_uv=False)
    _, sines, _ = tall_svd(q - einsum("...mr,...rs->...ms", p, inner))
    sines = jnp.flip(sines, axis=-1)
    angles = jnp.where(
        cosines**2 >= 0.5,
        jnp.arcsin(jnp.minimum(sines, 1)),
        jnp.arccos(jnp.clip(cosines, 0, 1)),
    )
    return jnp.flip(angles, axis=-1)


@jax.jit
def captured_energy(p: jax.Array, g: jax.Array) -> jax.Array:
    r"""Computes the share of a matrix that a subspace holds, :math:`\|P^\top G\|_F^2 / \|G\|_F^2`.

    Args:
        p: ``(*batch, m, r)`` with orthonormal columns.
        g: ``(*batch, m, n)``, of any floating dtype; computed in float32 or better.

    Returns:
        ``(*batch,)``, from 0 to 1 up to rounding, and 0 where ``g`` is zero.

    Example:
        >>> import jax.numpy as jnp
        >>> from optax_gale.linalg import captured_energy
        >>> round(float(captured_energy(jnp.array([[1.0], [0.0]]), jnp.array([[2.0], [1.0]]))), 5)
        0.8
    """
    g = g.astype(working_dtype(p, g))
    largest = jnp.max(jnp.abs(g), axis=(-2, -1), keepdims=True)
    g = g / jnp.where(largest > 0, largest, 1)  # or squares would over- or underflow
    r = einsum("...mr,...mn->...rn", p, g)
    total = jnp.sum(jnp.sum(g * g, axis=-1), axis=-1)
    return jnp.sum(jnp.sum(r * r, axis=-1), axis=-1) / jnp.where(total == 0, 1, total)
