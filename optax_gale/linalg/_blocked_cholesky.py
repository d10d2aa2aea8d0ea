"""Cholesky factors and their inverses, nearly all of it in matrix products."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from optax_gale._products import einsum

# Blocks of this size are left to the device's solvers, which for small matrices of a large batch
# are as fast as products: on an H200, 224 matrices of 128 x 128 took 0.35 ms with blocks of 32,
# 0.59 with 64 and 0.68 with 128 (nothing but solvers).
_SOLVED = 32

Times = Callable[[jax.Array, jax.Array], jax.Array]


def float32_times(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns ``A B``, rounded as float32 arithmetic rounds."""
    return einsum("...ij,...jk->...ik", a, b)


def cholesky(a: jax.Array, times: Times = float32_times) -> jax.Array:
    """Returns lower triangular ``L`` with ``L Lᵀ = A``; NaN where ``A`` is not positive definite.

    Args:
        a: ``(*batch, k, k)``, symmetric, in float32.
        times: multiplies blocks; its rounding is that of the result.

    Returns:
        ``L (*batch, k, k)``.
    """
    if a.shape[-1] <= _SOLVED:
        return lax.linalg.cholesky(a, symmetrize_input=False)
    l11, _, l21, rest = _first_half(a, times)
    return _lower_blocks(l11, l21, cholesky(rest, times))


def cholesky_and_inverse(a: jax.Array, times: Times = float32_times) -> tuple[jax.Array, jax.Array]:
    """Returns what `cholesky` does, and the inverse of it.

    The inverse is as accurate as substitution if the condition number is moderate; products with
    it are then many times as fast as triangular solves.
    """
    k = a.shape[-1]
    if k <= _SOLVED:
        lower = lax.linalg.cholesky(a, symmetrize_input=False)
        eye = jnp.broadcast_to(jnp.eye(k, dtype=a.dtype), a.shape)
        return lower, lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)
    l11, x11, l21, rest = _first_half(a, times)
    l22, x22 = cholesky_and_inverse(rest, times)
    return (
        _lower_blocks(l11, l21, l22),
        _lower_blocks(x11, -times(x22, times(l21, x11)), x22),
    )


def _first_half(a: jax.Array, times: Times) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Factors the first half: its factor, that one's inverse, what is below it, what is left.

    The inverse turns the triangular solve for the block below into a product.
    """
    half = _SOLVED * (-(-a.shape[-1] // _SOLVED) // 2)
    l11, x11 = cholesky_and_inverse(a[..., :half, :half], times)
    l21 = times(a[..., half:, :half], _transpose(x11))
    return l11, x11, l21, a[..., half:, half:] - times(l21, _transpose(l21))


def _lower_blocks(x11: jax.Array, x21: jax.Array, x22: jax.Array) -> jax.Array:
    upper = jnp.concatenate([x11, jnp.zeros_like(_transpose(x21))], axis=-1)
    return jnp.concatenate([upper, jnp.concatenate([x21, x22], axis=-1)], axis=-2)


def _transpose(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)
