"""Singular value decomposition of tall matrices through their small triangular part."""

import jax
import jax.numpy as jnp

from optax_gale._products import einsum, working_dtype
from optax_gale.linalg.orthonormalize import (
    is_finite,
    normalize_columns,
    or_identity,
    orthonormalize,
)


def tall_svd(b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the thin SVD of tall matrices, with errors relative to the largest singular value.

    ``B = W R`` with orthonormal ``W``, then the SVD of the ``k x k`` matrix ``R``. The eigenvalues
    of ``BᵀB`` would be cheaper, and lose whatever is below ``sqrt(eps)`` of the largest.

    Args:
        b: ``(*batch, n, k)`` with ``k <= n``.

    Returns:
        ``u (*batch, n, k)``, ``s (*batch, k)`` in decreasing order and ``vh (*batch, k, k)``. A
        matrix that is not finite gives orthonormal factors and NaN for its singular values.
    """
    b = b.astype(working_dtype(b))
    w = orthonormalize(b)
    _, usable = normalize_columns(b)
    largest = jnp.max(jnp.abs(b), axis=(-2, -1), keepdims=True)
    scale = jnp.where(usable, largest, 1)
    r = einsum("...nk,...nl->...kl", w, b / scale)
    usable = is_finite(r)
    u, s, vh = jnp.linalg.svd(or_identity(r, usable))
    s = jnp.where(usable[..., 0], s * scale[..., 0], jnp.nan)
    return einsum("...nk,...kl->...nl", w, u), s, vh
