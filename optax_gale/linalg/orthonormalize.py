"""Orthonormal bases for the columns of tall matrices.

Everything but the Householder method is built from Gram products, Cholesky factorisations of
``k x k`` matrices and triangular solves. Those run at the speed of matrix products, in batches, and
on matrices whose rows are spread over devices.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from optax_gale import _sharding
from optax_gale._products import einsum, working_dtype

OrthonormalizeMethod = Literal["auto", "randomized_cholesky_qr", "householder", "cholesky_qr2"]
_METHODS = ("auto", "randomized_cholesky_qr", "householder", "cholesky_qr2")

# Rows that one Gram product sums at a time; see `_gram`.
_GRAM_BLOCK = 256


def orthonormalize(y: jax.Array, method: OrthonormalizeMethod = "auto") -> jax.Array:
    r"""Computes an orthonormal basis ``Q`` of the range of ``Y``, for any ``Y``.

    ``QᵀQ = I`` to 1e-5 (typically 5e-7) in float32 whatever the condition number and scale, and the
    range of ``Q`` holds every direction of ``Y`` above rounding, as accurately as Householder's QR
    does. Directions below it, a zero column say, are replaced by arbitrary ones orthogonal to the
    rest. A matrix that is zero or not finite gives ``eye(m, k)`` and leaves the others of its batch
    alone. ``Q`` depends on ``Y`` continuously, and is ``Y`` up to rounding where ``Y`` is
    orthonormal already: ``Y = Q R`` with a positive diagonal in ``R`` (except for ``householder``,
    whose signs are LAPACK's).

    The methods:

    * ``"auto"``: shifted CholeskyQR. A shift keeps the Gram matrix positive definite, and passes
      are repeated until every direction above rounding has length 1 (3 passes for k = 128, 4 for
      1024, one or two more for a square matrix); a pass without shift ends it.
    * ``"randomized_cholesky_qr"``: the shifted passes run on a Gaussian sketch ``S Y`` of
      ``2k + 16`` rows, whose triangular factor conditions ``Y`` itself; two passes over ``Y``
      follow. As safe, as accurate, and no less work: a dense sketch costs what it saves.
      Where the sketch would have more than half the rows of ``Y`` this is ``"auto"``.
    * ``"householder"``: ``jnp.linalg.qr`` (and one CholeskyQR pass, since LAPACK's own rounding can
      exceed 1e-5). Slow on a GPU; on a mesh with Explicit axes it gathers the rows of ``Y``.
    * ``"cholesky_qr2"``: two plain CholeskyQR passes, the least work there is. **Unsafe**: it
      squares the condition number, loses orthogonality from about 1e3, and gives NaN from about
      1e4 (always, for matrices that are rank-deficient).

    Args:
        y: ``(*batch, m, k)`` with ``k <= m``, of any floating dtype.
        method: see above.

    Returns:
        ``(*batch, m, k)`` in float32, or in float64 if ``y`` is float64.

    Raises:
        TypeError: ``y`` is not a floating-point array.
        ValueError: ``y`` has more columns than rows, or ``method`` is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> from optax_gale.linalg import orthonormalize
        >>> y = jnp.array([[1e-20, 1e-20], [0.0, 1e-28], [0.0, 0.0]])
        >>> q = orthonormalize(y)
        >>> bool(jnp.abs(q.T @ q - jnp.eye(2)).max() < 1e-5)
        True

    References:
        Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa, `Shifted Cholesky QR for computing the QR
        factorization of ill-conditioned matrices <https://arxiv.org/abs/1809.11085>`_, 2020,
        Algorithm 4.2. Higgins, Szyld, Boman, Yamazaki, `Analysis of randomized Householder-Cholesky
        QR factorization with multisketching <https://arxiv.org/abs/2309.05868>`_, 2023. Balabanov,
        Grigori, `Randomized Gram-Schmidt process <https://arxiv.org/abs/2011.05090>`_, 2022.
    """
    if method not in _METHODS:
        raise ValueError(f"method must be one of {_METHODS}; got {method!r}.")
    y = jnp.asarray(y)
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise TypeError(f"y must be a floating-point array; got {y.dtype}.")
    if y.ndim < 2 or y.shape[-1] > y.shape[-2]:
        raise ValueError(
            f"y must be (*batch, m, k) with k <= m, since {y.shape[-1:]} columns of length "
            f"{y.shape[-2:-1]} cannot all be orthogonal; got shape {y.shape}."
        )
    if y.shape[-1] == 0:
        return y.astype(working_dtype(y))
    return _orthonormalize(y, method)


@functools.partial(jax.jit, static_argnames="method")
def _orthonormalize(y: jax.Array, method: OrthonormalizeMethod) -> jax.Array:
    m, k = y.shape[-2:]
    y = _sharding.replicate(y, [-2, -1] if method == "householder" else [-1])
    y, usable = normalize_columns(y.astype(working_dtype(y)))
    if method == "householder":
        q = _finish(_sharding.per_matrix(lambda x: jnp.linalg.qr(x)[0], y))
    elif method == "cholesky_qr2":
        q = _finish(_solve(y, _cholesky(y)))
    elif method == "randomized_cholesky_qr" and 2 * _sketch_rows(k) <= m:
        q = _precondition(_complete(y))
        q = _finish(_solve(q, _cholesky(q, _relative_shift(k, y.dtype))))
    else:
        # A loop, not its unrolled passes: programs are a third as long, and as quick to compile.
        q = jax.lax.fori_loop(
            0,
            _shifted_passes(m, k, y.dtype),
            lambda _, q: _solve(q, _cholesky(q, _relative_shift(k, y.dtype))),
            _complete(y),
        )
        q = _finish(q)
    if method == "cholesky_qr2":  # whose failures stay visible
        return or_identity(q, usable)
    return or_identity(q, usable & is_finite(q))


def or_identity(q: jax.Array, usable: jax.Array) -> jax.Array:
    """Replaces the matrices that are not ``usable (*batch, 1, 1)`` by ``eye(m, k)``."""
    m, k = q.shape[-2:]
    return or_else(q, usable, jnp.broadcast_to(jnp.eye(m, k, dtype=q.dtype), q.shape))


def or_else(q: jax.Array, usable: jax.Array, fallback: jax.Array) -> jax.Array:
    """Replaces the matrices that are not ``usable (*batch, 1, 1)`` by those of ``fallback``."""
    # Sums and disjunctions take on the sharding of q, which `where` wants of all three.
    zeros = jnp.zeros_like(q)
    return jnp.where(usable | zeros.astype(bool), q, zeros + fallback.astype(q.dtype))


def is_finite(x: jax.Array) -> jax.Array:
    """Tells which matrices are finite, ``(*batch, 1, 1)``."""
    # Entry by entry, not by the maximum: that of NaN has been -inf under jit on CPU.
    return jnp.all(jnp.isfinite(x), axis=(-2, -1), keepdims=True)


def normalize_columns(y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scales columns to unit length, and tells which matrices are finite and not zero.

    Scaling columns leaves their span alone, makes squares safe at any scale, and undoes a bad
    scaling of the columns against each other at no cost. Subnormal columns count as zero, which is
    what most devices take them for.
    """
    largest = jnp.max(jnp.abs(y), axis=-2, keepdims=True)
    y = y / jnp.where(largest >= jnp.finfo(y.dtype).tiny, largest, 1)
    # The maximum of a column with NaN can be anything; its sum of squares cannot.
    square = jnp.sum(y * y, axis=-2, keepdims=True)
    y = y / jnp.where(square >= 1, jnp.sqrt(square), 1)
    total = jnp.sum(square, axis=-1, keepdims=True)
    return y, jnp.isfinite(total) & (total >= 1)


def _complete(y: jax.Array) -> jax.Array:
    """Adds a fixed Gaussian perturbation of the size of rounding.

    It gives every direction that ``y`` lacks a length which the shifted passes can raise to 1, and
    changes the others as little as rounding does.
    """
    m, k = y.shape[-2:]
    noise = jax.random.normal(jax.random.key(0), (m, k), y.dtype)
    return y + jnp.broadcast_to(noise * (jnp.finfo(y.dtype).eps / math.sqrt(m)), y.shape)


def _sketch_rows(k: int) -> int:
    return 2 * k + 16


def _precondition(y: jax.Array) -> jax.Array:
    """Makes ``y`` well-conditioned by the triangular factor of its sketch."""
    m, k = y.shape[-2:]
    rows = _sketch_rows(k)
    s = jax.random.normal(jax.random.key(1), (rows, m), y.dtype) / math.sqrt(rows)
    z = einsum("sm,...mk->...sk", s, y)
    zeros = jnp.zeros_like(z[..., :k, :])  # has the sharding of the batch axes
    factor = zeros + jnp.broadcast_to(jnp.eye(k, dtype=y.dtype), zeros.shape)

    def shifted_pass(_: jax.Array, carry: tuple[jax.Array, jax.Array]):
        z, factor = carry
        lower = _cholesky(z, _relative_shift(k, y.dtype))
        return _solve(z, lower), einsum("...ij,...jk->...ik", factor, lower)

    _, factor = jax.lax.fori_loop(0, _shifted_passes(m, k, y.dtype), shifted_pass, (z, factor))
    return _solve(y, factor)


def _shifted_passes(m: int, k: int, dtype: jnp.dtype) -> int:
    """Counts the passes that take what `_complete` adds to length 1.

    The smallest singular value of the perturbation is at least ``eps (1 - sqrt(k / m))``, or about
    ``eps / m`` for a square matrix, of which a hundredth is allowed for (Rudelson and Vershynin,
    Non-asymptotic theory of random matrices, 2010). A pass divides it by the root of the shift.
    """
    smallest = float(jnp.finfo(dtype).eps) * max(1 - math.sqrt(k / m), 0.01 / m)
    gain = 1 / math.sqrt(_relative_shift(k, dtype) * k)
    return math.ceil(math.log(0.25 / smallest) / math.log(gain))


def _relative_shift(k: int, dtype: jnp.dtype) -> float:
    """Returns the shift over the mean diagonal of the Gram matrix.

    It covers the rounding of the Gram product, of the order of ``sqrt(k) eps``, and of its Cholesky
    factorisation. Failures were seen below an eighth of it.
    """
    return (2 * k + 64) / k * float(jnp.finfo(dtype).eps)


def _cholesky(y: jax.Array, shift: float = 0.0) -> jax.Array:
    """Returns the lower triangular ``L`` with ``L Lᵀ = YᵀY + shift trace(YᵀY) I``."""
    gram = _gram(y)
    if shift:
        trace = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
        eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
        gram = gram + shift * trace * eye
    return _sharding.per_matrix(lambda x: jax.lax.linalg.cholesky(x, symmetrize_input=False), gram)


def _gram(y: jax.Array) -> jax.Array:
    """Computes ``YᵀY`` block by block of rows.

    A single product may add all ``m`` squares one after the other in float32, which for columns of
    one sign errs by far more than the shift covers. The blocks together are no larger than ``y``.
    Rows that are spread over devices form blocks already.
    """
    m, k = y.shape[-2:]
    blocks = math.ceil(m / max(_GRAM_BLOCK, k))
    if blocks == 1 or _sharding.is_sharded(y, [-2]):
        return einsum("...mi,...mj->...ij", y, y)
    rows = math.ceil(m / blocks)
    padding = [(0, 0)] * (y.ndim - 2) + [(0, blocks * rows - m), (0, 0)]
    y = jnp.pad(y, padding).reshape(*y.shape[:-2], blocks, rows, k)
    return jnp.sum(einsum("...bmi,...bmj->...bij", y, y), axis=-3)


def _solve(y: jax.Array, lower: jax.Array) -> jax.Array:
    """Returns ``Y L⁻ᵀ`` by substitution: row by row backward stable, as an inverse is not."""
    return jax.lax.linalg.triangular_solve(lower, y, left_side=False, lower=True, transpose_a=True)


def _finish(q: jax.Array) -> jax.Array:
    """Makes nearly orthonormal columns orthonormal: a last CholeskyQR pass.

    Its factor is close to the identity, so it can be inverted safely, and the result comes out of a
    matrix product, row-major, not in the layout of a solver.
    """
    lower = _cholesky(q)
    eye = jnp.broadcast_to(jnp.eye(lower.shape[-1], dtype=q.dtype), lower.shape)
    inverse = _solve(jnp.zeros_like(lower) + eye, lower)
    return einsum("...mi,...ij->...mj", q, inverse)
