"""Small factorisations: Cholesky factors and their inverses, block by block.

Nearly all of it is matrix products. What is left is the factorisation of blocks, for which there is
a kernel: solvers take several launches a block, and small ones at that.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_gale._products import einsum
from optax_gale._sharding import spec_of
from optax_gale.pallas import dispatch, meshes
from optax_gale.pallas.cholesky_and_inverse import xla
from optax_gale.pallas.dispatch import Implementation, Problem

Times = Callable[[jax.Array, jax.Array], jax.Array]

_NAME = "cholesky_and_inverse"
LARGEST = 128  # that a kernel can serve: one more and it has more entries than a program registers


def float32_times(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns ``A B``, rounded as float32 arithmetic rounds."""
    return einsum("...ij,...jk->...ik", a, b)


def cholesky_and_inverse(
    a: jax.Array, times: Times = float32_times, *, implementation: Implementation | None = None
) -> tuple[jax.Array, jax.Array]:
    """Factors symmetric matrices ``A = L Lᵀ``, and inverts the factors.

    The inverse is as accurate as substitution if the condition number is moderate; products with
    it are then many times as fast as triangular solves.

    Args:
      a: ``(*batch, k, k)``, symmetric, in float32, or in float64, which XLA serves.
      times: multiplies blocks, ``(*batch, i, j)`` and ``(*batch, j, k)``; its rounding is that of
        the result.
      implementation: who serves blocks: None for the fastest that was measured, ``"xla"``, or
        ``"triton"`` (with `jax-triton`).

    Returns:
      Lower triangular ``L`` and ``L⁻¹``, ``(*batch, k, k)``. If a matrix is not positive definite,
      neither of its own is finite.

    Raises:
      TypeError: if ``a`` is no array of float32 or float64.
      ValueError: if its last two axes differ, its type shards it, ``implementation`` is unknown, or
        (`UnsupportedError`) cannot serve.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_gale.pallas import cholesky_and_inverse
      >>> lower, inverse = cholesky_and_inverse(jnp.array([[4.0, 2.0], [2.0, 2.0]]))
      >>> lower.tolist(), inverse.tolist()
      ([[2.0, 0.0], [1.0, 1.0]], [[0.5, 0.0], [-0.5, 1.0]])

    References:
      Golub, Van Loan, Matrix Computations, 4th edition, 2013, 4.2 and 3.2: Cholesky's factors by
      blocks, and elimination.
    """
    a = jnp.asarray(a)
    return _Blocks(a, times, implementation).factor_and_inverse(a)


def cholesky(
    a: jax.Array, times: Times = float32_times, *, implementation: Implementation | None = None
) -> jax.Array:
    """The factors alone: see `cholesky_and_inverse`."""
    return _Blocks(a, times, implementation).factor(a)


def choose(a: jax.Array, implementation: Implementation | None = None) -> Implementation:
    """Decides who serves the blocks of matrices; raises as `cholesky_and_inverse` does."""
    return dispatch.choose(problem(a), implementation)


def problem(a: Any) -> Problem:
    """What decides which implementation is fastest: blocks as large as a kernel can serve."""
    *batch, k, _ = a.shape
    k = min(k, LARGEST)
    alike = (_NAME, 1, math.prod(batch), k, k, k, True, jnp.dtype(a.dtype).name)
    return Problem(*alike, _obstacle(a), meshes.is_known(a))


def _obstacle(a: jax.Array) -> str:
    """Why no kernel can serve matrices; empty if one can."""
    if a.dtype != jnp.float32:
        return "it takes float32 only"
    if not a.size:
        return "there is nothing to do"
    return meshes.obstacle(a, a, rows=True, sums=True)


def _check(a: jax.Array) -> None:
    if a.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"a must be of float32 or float64, got {a.dtype}.")
    if a.ndim < 2 or a.shape[-1] != a.shape[-2]:
        raise ValueError(f"a must be (*batch, k, k), got shape {a.shape}.")
    if any(spec_of(a)):
        raise ValueError(
            f"a must be whole on every device, got the sharding {jax.typeof(a).sharding.spec}. "
            "Call it within jax.shard_map, for the matrices that each device has."
        )


class _Blocks:
    """The recursion, which ends where an implementation can serve."""

    def __init__(self, a: jax.Array, times: Times, implementation: Implementation | None):
        _check(a)
        name = choose(a, implementation)
        backend = dispatch.backend(_NAME, name)
        self._times, self._largest = times, backend.LARGEST
        self._solve: Callable[..., tuple[jax.Array, jax.Array]] = backend.cholesky_and_inverse
        if name != "xla":
            self._solve = functools.partial(dispatch.run, self._solve, xla.cholesky_and_inverse)

    def factor(self, a: jax.Array) -> jax.Array:
        if a.shape[-1] <= self._largest:
            return self._solve(a)[0]
        l11, _, l21, rest = self._first_half(a)
        return _lower_blocks(l11, l21, self.factor(rest))

    def factor_and_inverse(self, a: jax.Array) -> tuple[jax.Array, jax.Array]:
        if a.shape[-1] <= self._largest:
            return self._solve(a)
        l11, x11, l21, rest = self._first_half(a)
        l22, x22 = self.factor_and_inverse(rest)
        x21 = -self._times(x22, self._times(l21, x11))
        return _lower_blocks(l11, l21, l22), _lower_blocks(x11, x21, x22)

    def _first_half(self, a: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Factors the first half: its factor, that one's inverse, what is below it, what is left.

        The inverse turns the triangular solve for the block below into a product.
        """
        half = self._largest * (-(-a.shape[-1] // self._largest) // 2)
        l11, x11 = self.factor_and_inverse(a[..., :half, :half])
        l21 = self._times(a[..., half:, :half], _transpose(x11))
        return l11, x11, l21, a[..., half:, half:] - self._times(l21, _transpose(l21))


def _lower_blocks(x11: jax.Array, x21: jax.Array, x22: jax.Array) -> jax.Array:
    upper = jnp.concatenate([x11, jnp.zeros_like(_transpose(x21))], axis=-1)
    return jnp.concatenate([upper, jnp.concatenate([x21, x22], axis=-1)], axis=-2)


def _transpose(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)
