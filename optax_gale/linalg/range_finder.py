"""Orthonormal bases that approximate the range of a matrix."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import layout
from jax.typing import DTypeLike

from optax_gale import _sharding
from optax_gale._averages import (
    AxisName,
    averaged,
    checked_average_dtype,
    checked_axis_name,
    sent_as,
)
from optax_gale._products import einsum, working_dtype
from optax_gale.linalg import _half_range, _split
from optax_gale.linalg._split import half_product
from optax_gale.linalg._tall_svd import tall_svd
from optax_gale.linalg.orthonormalize import (
    OrthonormalizeMethod,
    is_finite,
    normalize_columns,
    or_else,
    or_identity,
    orthonormalize,
)
from optax_gale.linalg.sketch import SketchKind, make_sketch


def range_finder(
    key: jax.Array,
    g: jax.Array,
    rank: int,
    *,
    oversampling: int = 0,
    power_iterations: int = 1,
    sketch: SketchKind = "gaussian",
    start: jax.Array | None = None,
    fallback: jax.Array | None = None,
    sample_fraction: float = 1.0,
    align: bool = False,
    method: OrthonormalizeMethod = "auto",
    axis_name: AxisName = None,
    average_dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Finds an orthonormal ``P`` with ``P Pᵀ G ≈ G``: a randomized range finder.

    With ``k = rank + oversampling`` (at most ``min(m, n)``),

    .. math::
        Y = G\,\Omega, \quad Q = \operatorname{orth}(Y), \quad
        \text{then } Q \leftarrow \operatorname{orth}(G \operatorname{orth}(G^\top Q))
        \text{ for each power iteration,}

    and, if ``k > rank``, Rayleigh-Ritz: ``P = Q V`` with ``V`` the leading left singular vectors of
    ``QᵀG``. The columns of ``P`` are then ordered by decreasing singular value; without
    oversampling the basis of the subspace is arbitrary, unless ``align`` turns it towards the
    singular vectors. In expectation over a Gaussian ``Ω`` and
    without power iterations, for ``p = oversampling >= 2`` and ``Q`` before truncation,

    .. math::
        \mathbb E \lVert G - Q Q^\top G \rVert_F \le
        \Bigl(1 + \tfrac{r}{p - 1}\Bigr)^{1/2} \Bigl(\sum_{j > r} \sigma_j^2\Bigr)^{1/2}.

    Half-precision ``g`` is never copied to float32: what it is multiplied by is rounded to its
    dtype instead, and the sums are float32. The rounding disturbs ``P`` no more than that of ``g``.
    Scale does not matter: entries of 1e-30 and 1e30 are fine in float32 and bfloat16. A matrix that
    is not finite, or whose sketch is zero, gets ``fallback``, and leaves the rest of its batch
    alone.

    Args:
        key: a PRNG key. One ``Ω`` is drawn and shared by all matrices of the batch; ``vmap`` over
            keys to draw one for each.
        g: ``(*batch, m, n)``, of any floating dtype.
        rank: the columns of ``P``, from 1 to ``min(m, n)``.
        oversampling: extra columns of the sketch, 0 or more. It buys accuracy with an SVD of a
            matrix of size ``k``.
        power_iterations: steps of subspace iteration, 0 or more. Each reads ``g`` twice, and raises
            the ratios of the singular values to a power higher by 2.
        sketch: the distribution of ``Ω``, ``"gaussian"`` or ``"rademacher"``.
        start: an old basis ``(*batch, m, r0)`` with ``r0 <= k``, for a warm start: the first ``r0``
            columns of ``Y`` are ``G (Gᵀ start)``, and the others come from a fresh sketch. So do
            those that ``start`` has lost, where ``Gᵀ start`` is zero.
        fallback: a basis ``(*batch, m, rank)``, for matrices whose range cannot be found; None for
            the first columns of the identity.
        sample_fraction: the fraction of the columns of ``g`` that the sketch reads, in (0, 1]. At
            least ``k`` are drawn, without replacement, and shared by the batch. ``start`` and power
            iterations read all of ``g`` in any case. Where Explicit mesh axes shard ``n``, all of
            ``g`` is read here too, against an ``Ω`` whose other rows are zero; where Auto axes do,
            the columns that are drawn travel between devices.
        align: whether to take one step of orthogonal iteration within the subspace,
            ``P ← P orth(TTᵀ)`` with ``T = PᵀY``: it costs a factorisation of ``rank x rank``
            matrices and reads ``g`` no more. Without effect if ``k > rank``, where Rayleigh-Ritz
            goes all the way.
        method: how to orthonormalise; see `orthonormalize`.
        axis_name: mapped axes (of `jax.shard_map` or `jax.vmap`) along which ``g`` differs: finds
            the range of the average, of which only the products are averaged: ``Y``, for each
            power iteration ``Gᵀ Q`` and ``G Z`` too, and with oversampling ``QᵀG``. The key, and
            everything but ``g``, must be the same along them.
        average_dtype: dtype to which products of more bits are rounded where they are averaged,
            ``bfloat16`` or ``float32``; None: bfloat16 for a bfloat16 ``g``, else as they are. In
            bfloat16 those of a float32 ``g`` send half as much; ``P`` is then off by about as much
            as if ``g`` were rounded, and by more the more devices add up. A float64 ``g`` must
            stay within float32's range.

    Returns:
        ``P (*batch, m, rank)``, in float32 or, if ``g`` is float64, in float64.

    Raises:
        TypeError: ``g`` or ``start`` is not a floating-point array.
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from optax_gale.linalg import captured_energy, range_finder
        >>> g = jnp.outer(jnp.arange(1.0, 9.0), jnp.arange(1.0, 6.0))
        >>> p = range_finder(jax.random.key(0), g, rank=1)
        >>> p.shape, round(float(captured_energy(p, g)), 5)
        ((8, 1), 1.0)

    References:
        Halko, Martinsson, Tropp, `Finding structure with randomness
        <https://arxiv.org/abs/0909.4061>`_, 2011, Algorithms 4.1, 4.4 and Theorem 10.5.
    """
    [p] = range_finders(
        [key],
        [g],
        rank,
        oversampling=oversampling,
        power_iterations=power_iterations,
        sketch=sketch,
        sample_fraction=sample_fraction,
        align=align,
        starts=[start],
        fallbacks=[fallback],
        method=method,
        axis_name=axis_name,
        average_dtype=average_dtype,
    )
    return p


def range_finders(
    keys: Sequence[jax.Array],
    gs: Sequence[jax.Array],
    rank: int,
    *,
    oversampling: int = 0,
    power_iterations: int = 1,
    sketch: SketchKind = "gaussian",
    starts: Sequence[jax.Array | None] | None = None,
    fallbacks: Sequence[jax.Array | None] | None = None,
    sample_fraction: float = 1.0,
    align: bool = False,
    method: OrthonormalizeMethod = "auto",
    axis_name: AxisName = None,
    average_dtype: DTypeLike | None = None,
) -> list[jax.Array]:
    r"""Finds the ranges of many stacks of matrices: `range_finder` for each of them.

    On an NVIDIA GPU, half-precision stacks without oversampling are served together, by products of
    bfloat16 matrices: all their small factorisations run in one batch. The bases are orthonormal to
    1e-5 there too; their span is off by about as much as a bfloat16 copy of it would be.

    Args:
        keys: a PRNG key for each stack.
        gs: the stacks, ``(*batch, m, n)``; their shapes and dtypes may differ.
        rank: the columns of every ``P``.
        oversampling: see `range_finder`, as for the other options.
        power_iterations: steps of subspace iteration.
        sketch: the distribution of ``Ω``.
        starts: an old basis for each stack, or None.
        fallbacks: a basis for each stack, for matrices whose range cannot be found, or None.
        sample_fraction: the fraction of the columns that the sketch reads.
        align: whether to turn the bases towards the singular vectors.
        method: how to orthonormalise; any but ``"auto"`` serves one stack after the other.
        axis_name: mapped axes along which matrices differ and are averaged.
        average_dtype: dtype in which products are averaged.

    Returns:
        ``P (*batch, m, rank)`` for each stack.

    Raises:
        TypeError: a matrix or a start is not a floating-point array.
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from optax_gale.linalg import range_finders
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> [p.shape for p in range_finders(keys, [jnp.ones((8, 5)), jnp.ones((3, 6, 7))], rank=2)]
        [(8, 2), (3, 6, 2)]
    """
    if oversampling < 0:
        raise ValueError(f"oversampling must be 0 or more; got {oversampling}.")
    if power_iterations < 0:
        raise ValueError(f"power_iterations must be 0 or more; got {power_iterations}.")
    if not 0 < sample_fraction <= 1:
        raise ValueError(f"sample_fraction must be in (0, 1]; got {sample_fraction}.")
    axis_name = checked_axis_name(axis_name)
    average_dtype = checked_average_dtype(average_dtype)
    none = [None] * len(gs)
    problems = [
        _checked(key, g, start, fallback, rank, rank + oversampling, sample_fraction)
        for key, g, start, fallback in zip(keys, gs, starts or none, fallbacks or none, strict=True)
    ]
    # Served together, their products are in bfloat16.
    wide = axis_name is not None and average_dtype == "float32"
    is_together = [not wide and _served_together(problem, rank, method) for problem in problems]
    together = [problem for problem, yes in zip(problems, is_together, strict=True) if yes]
    found = iter(
        half_range_finders(
            *([problem[i] for problem in together] for i in range(4)),
            rank,
            tuple(problem.samples for problem in together),
            power_iterations,
            sketch,
            align,
            axis_name,
            average_dtype,
        )
        if together
        else []
    )
    return [
        next(found)
        if yes
        else _range_finder(
            *(*problem[:4], rank, *problem[4:], power_iterations, sketch, align, method),
            axis_name,
            average_dtype,
        )
        for problem, yes in zip(problems, is_together, strict=True)
    ]


class _Problem(NamedTuple):
    """One stack, with what its sketch is made of."""

    key: jax.Array
    g: jax.Array
    start: jax.Array | None
    fallback: jax.Array | None
    width: int
    samples: int


def _checked(
    key: jax.Array,
    g: jax.Array,
    start: jax.Array | None,
    fallback: jax.Array | None,
    rank: int,
    width: int,
    sample_fraction: float,
) -> _Problem:
    g = check_matrices(g, rank)
    m, n = g.shape[-2:]
    width = min(width, m, n)
    if start is not None:
        start = jnp.asarray(start)
        if not jnp.issubdtype(start.dtype, jnp.floating):
            raise TypeError(f"start must be a floating-point array; got {start.dtype}.")
        if start.shape[:-1] != g.shape[:-1] or start.shape[-1] > width:
            raise ValueError(
                f"start must be (*batch, m, r0) = {(*g.shape[:-1], 'r0')} with "
                f"r0 <= min(rank + oversampling, m, n) = {width}; got shape {start.shape}."
            )
    if fallback is not None:
        fallback = jnp.asarray(fallback)
        if fallback.shape != (*g.shape[:-1], rank):
            raise ValueError(
                f"fallback must be (*batch, m, rank) = {(*g.shape[:-1], rank)}; got shape "
                f"{fallback.shape}."
            )
    # Rounded first, so that 0.1 * 30 = 3.0000000000000004 makes 3 columns.
    samples = max(math.ceil(round(sample_fraction * n, 6)), width)
    return _Problem(key, g, start, fallback, width, samples)


def _served_together(problem: _Problem, rank: int, method: OrthonormalizeMethod) -> bool:
    """Whether `half_range_finders` can serve a stack, and is faster.

    Decided here and not where a program is lowered, which would then hold both ways.
    """
    g = problem.g
    is_half = g.dtype in (jnp.bfloat16, jnp.float16)
    plain = method == "auto" and problem.width == rank and not any(_sharding.spec_of(g))
    return is_half and plain and _split.is_fast()


@functools.partial(jax.jit, static_argnums=range(4, 11))
def half_range_finders(
    keys: Sequence[jax.Array],
    gs: Sequence[jax.Array],
    starts: Sequence[jax.Array | None],
    fallbacks: Sequence[jax.Array | None],
    rank: int,
    samples: tuple[int, ...],
    power_iterations: int,
    sketch: SketchKind,
    align: bool,
    axis_name: AxisName = None,
    average_dtype: Any = None,
) -> list[jax.Array]:
    """`range_finders` of half-precision stacks, by `_half_range`, on any device."""
    product = functools.partial(half_product, dtype=jnp.bfloat16)
    ys = [
        _first_sketch(
            *(key, g, start, rank, size, sketch),
            _average_of(g, axis_name, average_dtype),
            product,
        )
        for key, g, start, size in zip(keys, gs, starts, samples, strict=True)
    ]
    found = _half_range.half_ranges(
        ys, gs, power_iterations=power_iterations, align=align, axis_name=axis_name
    )
    return [
        or_identity(q, usable) if fallback is None else or_else(q, usable, fallback)
        for (q, usable), fallback in zip(found, fallbacks, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=range(4, 13))
def _range_finder(
    key: jax.Array,
    g: jax.Array,
    start: jax.Array | None,
    fallback: jax.Array | None,
    rank: int,
    width: int,
    samples: int,
    power_iterations: int,
    sketch: SketchKind,
    align: bool,
    method: OrthonormalizeMethod,
    axis_name: AxisName,
    average_dtype: Any,
) -> jax.Array:
    average = _average_of(g, axis_name, average_dtype)
    y = _first_sketch(key, g, start, width, samples, sketch, average)
    _, usable = normalize_columns(y)
    q = orthonormalize(y, method)
    for _ in range(power_iterations):
        z = orthonormalize(average(_transposed_times(g, q)), method)
        y = average(_times(g, z))
        q = orthonormalize(y, method)
    if width > rank:
        _, _, vh = tall_svd(average(_transposed_times(g, q)))
        q = einsum("...mk,...rk->...mr", q, vh[..., :rank, :])
    elif align:
        largest = jnp.max(jnp.abs(y), axis=(-2, -1), keepdims=True)
        t = einsum("...mk,...ml->...kl", q, y / jnp.where(largest > 0, largest, 1))
        q = einsum("...mk,...kl->...ml", q, orthonormalize(einsum("...kl,...jl->...kj", t, t)))
    return q if fallback is None else or_else(q, usable, fallback)


def _average_of(
    g: jax.Array, axis_name: AxisName, average_dtype: Any
) -> Callable[[jax.Array], jax.Array]:
    """How products with ``g`` are averaged."""
    dtype = average_dtype or sent_as(g.dtype)
    return functools.partial(averaged, axis_name=axis_name, dtype=dtype)


def _first_sketch(
    key: jax.Array,
    g: jax.Array,
    start: jax.Array | None,
    width: int,
    samples: int,
    sketch: SketchKind,
    average: Callable[[jax.Array], jax.Array],
    product: Callable[..., jax.Array] = einsum,
) -> jax.Array:
    """Returns ``Y``: what ``start`` makes of ``g``, and as many random columns as are missing."""
    parts = []
    missing = width
    if start is not None:
        # Unit columns: the product with G cannot overflow, and old singular vectors stay
        # well-conditioned however fast their singular values decay.
        z, _ = normalize_columns(average(_transposed_times(g, start)))
        key, key_lost = jax.random.split(key)
        fresh = make_sketch(sketch, key_lost, z.shape[-2:], z.dtype) / math.sqrt(g.shape[-1])
        lost = jnp.sum(z * z, axis=-2, keepdims=True) == 0
        parts.append(_times(g, z + lost * fresh))
        missing -= start.shape[-1]
    if missing:
        parts.append(_sketched(key, g, missing, samples, sketch, product))
    # The columns of both parts at once.
    return average(jnp.concatenate(parts, axis=-1))


def _sketched(
    key: jax.Array,
    g: jax.Array,
    width: int,
    samples: int,
    kind: SketchKind,
    product: Callable[..., jax.Array],
) -> jax.Array:
    n = g.shape[-1]
    key_sketch, key_columns = jax.random.split(key)
    omega = make_sketch(kind, key_sketch, (samples, width), _factor_dtype(g))
    if samples < n:
        columns = jax.random.choice(key_columns, n, (samples,), replace=False)
        if _sharding.is_sharded(g, [-1]):
            omega = jnp.zeros((n, width), omega.dtype).at[columns].set(omega)
        else:
            g = jnp.take(g, columns, axis=-1)
    # One for each matrix: with one for all, compilers multiply all rows of a stack at once, for
    # which they copy matrices that are transposed.
    omega = jnp.broadcast_to(omega, (*g.shape[:-2], *omega.shape))
    return product("...mn,...nk->...mk", g, omega)


def _factor_dtype(g: jax.Array) -> jnp.dtype:
    """The dtype in which ``g`` can be multiplied without being copied."""
    return g.dtype if g.dtype.itemsize == 2 else working_dtype(g)


def _times(g: jax.Array, x: jax.Array) -> jax.Array:
    return einsum("...mn,...nk->...mk", g, x.astype(_factor_dtype(g)))


def _transposed_times(g: jax.Array, x: jax.Array) -> jax.Array:
    return einsum("...mn,...mk->...nk", g, x.astype(_factor_dtype(g)))


def svd_range(g: jax.Array, rank: int, side: Literal["left", "right"] = "left") -> jax.Array:
    r"""Takes the leading singular vectors of ``G = U Σ Vᵀ``, GaLore's projector.

    Exactly the first columns of the factors of ``jnp.linalg.svd(g, full_matrices=False)``, signs
    included. On a mesh with Explicit axes every device gathers whole matrices for it, and on a GPU
    it is slower than `range_finder` by orders of magnitude.

    Args:
        g: ``(*batch, m, n)``, of any floating dtype; decomposed in float32 (float64 if it is that).
        rank: the number of vectors, from 1 to ``min(m, n)``.
        side: ``"left"`` for columns of ``U``, ``"right"`` for columns of ``V``.

    Returns:
        ``(*batch, m, rank)`` for the left side, ``(*batch, n, rank)`` for the right one. A matrix
        that is not finite gets the first columns of the identity.

    Raises:
        TypeError: ``g`` is not a floating-point array.
        ValueError: ``rank`` or ``side`` is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from optax_gale.linalg import svd_range
        >>> abs(svd_range(jnp.diag(jnp.array([1.0, 3.0, 2.0])), rank=1)).ravel().tolist()
        [0.0, 1.0, 0.0]

    References:
        Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, Algorithm 2.
    """
    g = check_matrices(g, rank)
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right'; got {side!r}.")
    return _svd_range(g, rank, side)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _svd_range(g: jax.Array, rank: int, side: str) -> jax.Array:
    g = _sharding.replicate(g.astype(working_dtype(g)), [-2, -1])
    usable = is_finite(g)
    u, _, vh = jnp.linalg.svd(or_identity(g, usable), full_matrices=False)  # Inf hangs LAPACK
    p = u[..., :rank] if side == "left" else jnp.swapaxes(vh[..., :rank, :], -2, -1)
    p = or_identity(p, usable)
    if jax.default_backend() != "gpu":
        return p
    # Solvers return columns one after another. A loop over layers would take that over for the
    # projectors of all, and copy them before and after. (`jax.export` refuses the constraint.)
    rows = layout.Layout(major_to_minor=tuple(range(p.ndim)))
    return layout.with_layout_constraint(p, rows)


def random_range(key: jax.Array, m: int, rank: int, batch_shape: tuple[int, ...] = ()) -> jax.Array:
    r"""Draws subspaces uniformly at random: orthonormalised Gaussian matrices.

    Args:
        key: a PRNG key.
        m: the dimension of the space.
        rank: the dimension of the subspaces, from 1 to ``m``.
        batch_shape: how many to draw, independently of each other.

    Returns:
        ``(*batch_shape, m, rank)`` in float32.

    Raises:
        ValueError: ``rank`` is out of range.

    Example:
        >>> import jax
        >>> from optax_gale.linalg import random_range
        >>> random_range(jax.random.key(0), 16, 4, (2,)).shape
        (2, 16, 4)

    References:
        Hao, Cao, Mou, `Flora <https://arxiv.org/abs/2402.03293>`_, 2024.
    """
    if not 1 <= rank <= m:
        raise ValueError(f"rank must be from 1 to m = {m}; got {rank}.")
    return orthonormalize(make_sketch("gaussian", key, (*batch_shape, m, rank)))


def check_matrices(g: jax.Array, rank: int) -> jax.Array:
    """Returns ``g`` as an array, or raises if it has no ``rank`` singular triplets to find."""
    g = jnp.asarray(g)
    if not jnp.issubdtype(g.dtype, jnp.floating):
        raise TypeError(f"g must be a floating-point array; got {g.dtype}.")
    if g.ndim < 2:
        raise ValueError(f"g must be (*batch, m, n); got shape {g.shape}.")
    if not 1 <= rank <= min(g.shape[-2:]):
        raise ValueError(
            f"rank must be from 1 to min(m, n) = {min(g.shape[-2:])} for g of shape {g.shape}; "
            f"got {rank}."
        )
    return g
