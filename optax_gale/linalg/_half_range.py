"""Range finders for many half-precision matrices at once, in matrix products.

The same subspaces and bases as those of `range_finder.py`, for devices whose half-precision
products are many times as fast as everything else:

* What is as tall as a matrix is bfloat16 until the last product. Rounding it disturbs the subspace
  as rounding the matrix itself does. Each Gram matrix is that of the rounded columns, so that
  orthogonality is not lost.
* Everything else works on ``k x k`` matrices, all of them in one batch: what is alike costs as many
  launches for a model as for a matrix. Even the alignment is found there.
* The last pass adds a small correction, ``Q = H + H (X - I)``, so that what its product loses is
  small against ``H``.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from optax_gale._averages import AxisName, averaged
from optax_gale.linalg._split import (
    GRAM,
    TIMES,
    half_product,
    half_times_split,
    rounded,
    split_gram,
    split_times,
)
from optax_gale.pallas.cholesky_and_inverse import cholesky, cholesky_and_inverse

_EPS = float(jnp.finfo(jnp.float32).eps)
# Products of blocks below this size take no time worth saving.
_SPLIT_FROM = 256
# Rows that one Gram product sums at a time, if they divide.
_GRAM_ROWS = 4096
_MOST_PASSES = 9


def half_ranges(
    ys: Sequence[jax.Array],
    gs: Sequence[jax.Array],
    *,
    power_iterations: int,
    align: bool,
    axis_name: AxisName = None,
) -> list[tuple[jax.Array, jax.Array]]:
    """Finishes range finders from their sketches ``Y = G Ω``.

    Args:
        ys: ``(*batch, m, k)`` each, in bfloat16 or float32.
        gs: ``(*batch, m, n)`` each, all bfloat16 or float16.
        power_iterations: see `range_finder`.
        align: see `range_finder`.
        axis_name: see `range_finder`; ``ys`` are averages already.

    Returns:
        For each of them, ``P (*batch, m, k)`` in float32, and which are usable, ``(*batch, 1, 1)``.
        The others hold anything.
    """
    batch = _Batch(ys)
    # float16 can be squared as it is in float32.
    scales = [_scale(y) if g.dtype == jnp.bfloat16 else None for y, g in zip(ys, gs, strict=True)]
    ys = [
        (y if scale is None else y / scale).astype(jnp.bfloat16)
        for y, scale in zip(ys, scales, strict=True)
    ]
    usable: jax.Array | bool = True
    for _ in range(power_iterations):
        # Rounding a factor mixes the largest directions into all columns, and the product after it
        # makes them larger still. Before the last product that would cost a pass at the end.
        for subscripts, apply in (
            ("...mn,...mk->...nk", _half_times_rounded),
            ("...mn,...nk->...mk", half_times_split),
        ):
            qs, found = _conditioned(batch, ys, scales, apply)
            usable = found & usable
            ys = [
                half_product(subscripts, g, q.astype(g.dtype), jnp.bfloat16)
                for g, q in zip(gs, qs, strict=True)
            ]
            ys = averaged(ys, axis_name)  # in bfloat16, which they are
    ps, found = _orthonormal(batch, ys, align)
    return list(zip(ps, batch.parts(found & usable), strict=True))


class _Batch:
    """Takes the ``k x k`` matrices of several stacks together, and apart."""

    def __init__(self, ys: Sequence[jax.Array]):
        self._shapes = [y.shape[:-2] for y in ys]
        sizes = [math.prod(shape) for shape in self._shapes]
        self._ends = list(itertools.accumulate(sizes))[:-1]

    def join(self, parts: Sequence[jax.Array]) -> jax.Array:
        """Makes ``(total, *rest)`` of ``(*batch, *rest)`` each."""
        flat = [
            x.reshape(-1, *x.shape[len(shape) :])
            for x, shape in zip(parts, self._shapes, strict=True)
        ]
        return jnp.concatenate(flat)

    def parts(self, x: jax.Array) -> list[jax.Array]:
        """Undoes `join`."""
        return [
            part.reshape(*shape, *x.shape[1:])
            for part, shape in zip(jnp.split(x, self._ends), self._shapes, strict=True)
        ]


def _scale(y: jax.Array) -> jax.Array:
    """A power of 2 near the largest entry of each matrix, 1 where there is none."""
    largest = jnp.max(jnp.abs(y.astype(jnp.float32)), axis=(-2, -1), keepdims=True)
    scale = lax.reduce_precision(largest, exponent_bits=8, mantissa_bits=0)
    # False for NaN too.
    return jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1).astype(y.dtype)


def _conditioned(
    batch: _Batch,
    ys: Sequence[jax.Array],
    scales: Sequence[jax.Array | None],
    apply: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[list[jax.Array], jax.Array]:
    """Makes the columns so independent that the next product loses none of them to rounding.

    One shifted pass of CholeskyQR. The results are divided by ``scales``, which undoes
    what the next product multiplies them by.
    """
    gram, lengths, usable = _unit_gram(batch.join([_gram(y) for y in ys]))
    _, inverse = cholesky_and_inverse(_shifted(gram), _split_or_float32)
    factors = batch.parts(_transpose(_or_eye(inverse)) / lengths)
    factors = [
        x if scale is None else x / scale.astype(x.dtype)
        for x, scale in zip(factors, scales, strict=True)
    ]
    return [apply(y, x).astype(jnp.bfloat16) for y, x in zip(ys, factors, strict=True)], usable


def _half_times_rounded(y: jax.Array, x: jax.Array) -> jax.Array:
    return half_product(TIMES, y, x.astype(jnp.bfloat16), jnp.bfloat16)


def _orthonormal(
    batch: _Batch, ys: Sequence[jax.Array], align: bool
) -> tuple[list[jax.Array], jax.Array]:
    """Orthonormalises the columns, and tells of which matrices ``(total, 1, 1)`` it could.

    Every pass multiplies by a factor that it has from a Gram matrix, and measures what comes out.
    One pass is enough for condition numbers up to about 1e3, and each further one takes a factor of
    60 (k = 1024) to 150 (k = 128).
    """
    gram, lengths, usable = _unit_gram(batch.join([_gram(y) for y in ys]))
    factor = (_alignment(gram, lengths) if align else _whitening(gram)) / lengths
    usable_parts = batch.parts(usable)
    noises = [_noise(*y.shape[-2:]) for y in ys]
    eyes = [jnp.eye(y.shape[-2], y.shape[-1]) for y in ys]

    def pass_over(carry):
        hs, factor, _, count = carry
        # Noise of the size of rounding gives a length to the directions that are missing. Matrices
        # that nothing can be made of must not make the others wait.
        hs = [
            rounded(jnp.where(keep, half_times_split(h, x) + noise, eye))
            for h, x, keep, noise, eye in zip(
                hs, batch.parts(factor), usable_parts, noises, eyes, strict=True
            )
        ]
        gram, lengths, _ = _unit_gram(batch.join([_gram(h, exact_lengths=True) for h in hs]))
        # A larger shift if a smaller one was not enough.
        shift = _shift(gram.shape[-1]) * 2.0**count
        _, inverse = cholesky_and_inverse(_shifted(gram, shift))
        far, inverse = _unshifted(inverse, shift)
        return hs, _transpose(_or_eye(inverse)) / lengths, far, count + 1

    # A disjunction takes on whatever the type of `usable` says about devices.
    start = (list(ys), factor, usable | True, jnp.zeros((), jnp.float32))
    hs, factor, far, _ = lax.while_loop(
        lambda carry: jnp.any(carry[2]) & (carry[3] < _MOST_PASSES), pass_over, start
    )
    return [_corrected(h, x) for h, x in zip(hs, batch.parts(factor), strict=True)], usable & ~far


def _corrected(h: jax.Array, x: jax.Array) -> jax.Array:
    """Returns ``H X`` for a factor near the identity.

    The product holds what is beside the diagonal only. Tensor cores cut off what they add, so that
    a sum of terms of which one is large comes out short by up to an ulp a term.
    """
    k = x.shape[-1]
    diagonal = jnp.diagonal(x, axis1=-2, axis2=-1)[..., None, :]
    beside = jnp.where(jnp.eye(k, dtype=bool), 0, x)
    return h.astype(jnp.float32) * diagonal + half_times_split(h, beside)


def _noise(m: int, k: int) -> jax.Array:
    """A fixed Gaussian matrix, as large as the rounding of orthonormal columns to bfloat16."""
    return jax.random.normal(jax.random.key(0), (m, k)) * (2.0**-10 / math.sqrt(m))


def _gram(y: jax.Array, exact_lengths: bool = False) -> jax.Array:
    """Computes ``YᵀY`` of bfloat16 columns.

    Tensor cores cut off what they add. On the diagonal every term is positive, and the sum comes
    out short, by 3e-9 of itself a row on an H200: by more than 1e-5 from 4096 rows. Summing blocks
    of rows bounds that; ``exact_lengths`` replaces the diagonal by float32 sums.
    """
    m, k = y.shape[-2:]
    blocks = _row_blocks(m)
    y = y.reshape(*y.shape[:-2], blocks, m // blocks, k)
    gram = jnp.sum(half_product(GRAM, y, y), axis=-3)
    if not exact_lengths:
        return gram
    squares = jnp.sum(jnp.sum(jnp.square(y.astype(jnp.float32)), axis=-2), axis=-2)
    return jnp.where(jnp.eye(k, dtype=bool), squares[..., None, :], gram)


def _row_blocks(m: int) -> int:
    """The number of blocks of rows: as few as `_GRAM_ROWS` allows, 1 if that does not divide."""
    least = math.ceil(m / _GRAM_ROWS)
    return next((blocks for blocks in range(least, 4 * least + 1) if m % blocks == 0), 1)


def _unit_gram(gram: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scales a Gram matrix to that of unit columns.

    Returns:
        The result, the columns' lengths ``(total, k, 1)`` with 1 in the place of 0, and which
        matrices are finite and not zero, ``(total, 1, 1)``.
    """
    squares = jnp.diagonal(gram, axis1=-2, axis2=-1)[..., None]
    total = jnp.sum(squares, axis=-2, keepdims=True)
    # Shorter columns are rounding, and the inverse of their length might overflow.
    lengths = jnp.sqrt(jnp.where(squares > 1e-20 * total, squares, 1))
    usable = jnp.isfinite(total) & (total >= float(jnp.finfo(jnp.float32).tiny))
    return gram / lengths / _transpose(lengths), lengths, usable


def _shift(k: int) -> float:
    """A shift that covers the rounding of a Gram matrix of unit columns, and of its factors."""
    return (2 * k + 64) * _EPS


def _shifted(gram: jax.Array, shift: jax.Array | float | None = None) -> jax.Array:
    k = gram.shape[-1]
    return gram + (_shift(k) if shift is None else shift) * jnp.eye(k, dtype=gram.dtype)


def _whitening(gram: jax.Array) -> jax.Array:
    """Returns the factor ``L⁻ᵀ`` that makes columns with this Gram matrix ``L Lᵀ`` orthonormal."""
    _, inverse = cholesky_and_inverse(_shifted(gram), _split_or_float32)
    return _transpose(_or_eye(inverse))


def _alignment(gram: jax.Array, lengths: jax.Array) -> jax.Array:
    """Returns the factor that makes columns orthonormal and turns them to their singular vectors.

    With ``Y = Q Lᵀ D`` from the Gram matrix ``L Lᵀ`` of unit columns and their lengths ``D``, the
    aligned basis is ``Q V`` where ``V`` orthonormalises ``A = (LᵀD)(LᵀD)ᵀ`` by columns. As
    ``A = C Cᵀ`` with triangular ``C``, ``V`` orthonormalises the columns of ``C`` too, whose
    condition number is the root of that of ``A``. Nothing here is as tall as ``Y``.

    Directions that are a thousandth of the largest are not turned; their alignment is noise.
    """
    lower, inverse = cholesky_and_inverse(_shifted(gram), _split_or_float32)
    whitening = _transpose(_or_eye(inverse))
    a = split_gram(lower * (lengths / jnp.max(lengths, axis=-2, keepdims=True)))
    trace = jnp.trace(a, axis1=-2, axis2=-1)[..., None, None]
    c = cholesky(_shifted(a, 2.0**-20 * trace), _split_or_float32)
    c = c / jnp.sqrt(jnp.sum(c * c, axis=-2, keepdims=True))
    _, inverse = cholesky_and_inverse(_shifted(split_gram(c)), _split_or_float32)
    turned = split_times(whitening, split_times(c, _transpose(inverse)))
    return jnp.where(jnp.all(jnp.isfinite(turned), (-2, -1), keepdims=True), turned, whitening)


def _unshifted(inverse: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Takes the shift out of an inverse factor ``X``, and tells for which it is too far to.

    With ``F = X Xᵀ``, the columns ``H Xᵀ`` have the Gram matrix ``I - shift F``, of which
    ``I + shift F / 2`` is the inverse root up to ``(shift F)²``. An eigenvalue of ``F`` is 1 over
    one of the Gram matrix. The sum of their eighth powers bounds the largest: to 10, or to
    ``10 k^(-1/8)`` if all are alike.

    Returns:
        Whether it is too far, ``(total, 1, 1)``, and the corrected inverse factor.
    """
    half = inverse.astype(jnp.bfloat16)
    f = half_product("...ik,...jk->...ij", half, half, jnp.bfloat16)
    power = half_product(TIMES, f, f, jnp.bfloat16)
    power = half_product(TIMES, power, power)
    far = ~(jnp.sum(power * power, axis=(-2, -1), keepdims=True) < 1e8)  # true for NaN
    return far, inverse + shift / 2 * half_product(TIMES, f, half)


def _split_or_float32(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns ``A B``, as accurate as what only conditions needs."""
    if a.shape[-1] >= _SPLIT_FROM:
        return split_times(a, b)
    return jnp.einsum(TIMES, a, b, precision=lax.Precision.HIGHEST)


def _or_eye(x: jax.Array) -> jax.Array:
    finite = jnp.all(jnp.isfinite(x), axis=(-2, -1), keepdims=True)
    return jnp.where(finite, x, jnp.eye(x.shape[-1], dtype=x.dtype))


def _transpose(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)
