"""Random test matrices for sketching the range of a matrix."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

SketchKind = Literal["gaussian", "rademacher"]


def gaussian(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
    r"""Draws a Gaussian test matrix, :math:`\Omega_{ij} \sim \mathcal N(0, 1)`.

    Args:
        key: a PRNG key.
        shape: the shape of the result.
        dtype: a floating-point dtype; half precision is drawn in that precision.

    Returns:
        The matrix.

    Example:
        >>> import jax
        >>> from optax_gale.linalg import gaussian
        >>> gaussian(jax.random.key(0), (100, 8)).shape
        (100, 8)

    References:
        Halko, Martinsson, Tropp, `Finding structure with randomness
        <https://arxiv.org/abs/0909.4061>`_, 2011, section 4.1.
    """
    return jax.random.normal(key, shape, dtype)


def rademacher(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
    r"""Draws a matrix of independent signs, :math:`\Omega_{ij} \in \{-1, +1\}`.

    Cheaper to draw than a Gaussian and exact in every dtype. Its bounds hold with slightly larger
    constants, and a single column can miss a direction that has only a few entries.

    Args:
        key: a PRNG key.
        shape: the shape of the result.
        dtype: a floating-point dtype.

    Returns:
        The matrix.

    Example:
        >>> import jax
        >>> from optax_gale.linalg import rademacher
        >>> abs(rademacher(jax.random.key(0), (2, 2))).tolist()
        [[1.0, 1.0], [1.0, 1.0]]

    References:
        Achlioptas, `Database-friendly random projections
        <https://doi.org/10.1016/S0022-0000(03)00025-4>`_, 2003.
    """
    return jax.random.rademacher(key, shape, dtype)


def make_sketch(
    kind: SketchKind, key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Draws a test matrix of the kind that is named.

    Args:
        kind: ``"gaussian"`` or ``"rademacher"``.
        key: a PRNG key.
        shape: the shape of the result.
        dtype: a floating-point dtype.

    Returns:
        The matrix.

    Raises:
        ValueError: ``kind`` is unknown.

    Example:
        >>> import jax
        >>> from optax_gale.linalg import make_sketch
        >>> make_sketch("rademacher", jax.random.key(0), (4, 2)).shape
        (4, 2)
    """
    if kind == "gaussian":
        return gaussian(key, shape, dtype)
    if kind == "rademacher":
        return rademacher(key, shape, dtype)
    raise ValueError(f"sketch must be 'gaussian' or 'rademacher'; got {kind!r}.")
