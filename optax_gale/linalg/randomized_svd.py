"""Truncated singular value decompositions by sketching."""

import functools

import jax
import jax.numpy as jnp

from optax_gale._products import einsum, working_dtype
from optax_gale.linalg._tall_svd import tall_svd
from optax_gale.linalg.range_finder import check_matrices, range_finder


def randomized_svd(
    key: jax.Array,
    g: jax.Array,
    rank: int,
    *,
    oversampling: int = 8,
    power_iterations: int = 1,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""Approximates the leading singular triplets, :math:`G \approx U \Sigma V^\top`.

    ``Q`` of ``rank + oversampling`` columns comes from `range_finder`; the SVD of ``QᵀG``, cut to
    ``rank``, gives the factors. Signs are arbitrary.

    Args:
        key: a PRNG key; one sketch is shared by the batch.
        g: ``(*batch, m, n)``, of any floating dtype; computed in float32 (float64 if it is that).
        rank: the number of triplets, from 1 to ``min(m, n)``.
        oversampling: extra columns of the sketch, 0 or more.
        power_iterations: steps of subspace iteration, 0 or more.

    Returns:
        ``U (*batch, m, rank)``, ``s (*batch, rank)`` in decreasing order, ``Vh (*batch, rank, n)``.
        A matrix that is not finite gives orthonormal ``U`` and ``Vh`` and NaN in ``s``.

    Raises:
        TypeError: ``g`` is not a floating-point array.
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from optax_gale.linalg import randomized_svd
        >>> g = jnp.diag(jnp.arange(1.0, 31.0) ** -2)
        >>> u, s, vh = randomized_svd(jax.random.key(0), g, rank=2)
        >>> [round(x, 2) for x in s.tolist()]
        [1.0, 0.25]

    References:
        Halko, Martinsson, Tropp, `Finding structure with randomness
        <https://arxiv.org/abs/0909.4061>`_, 2011, Algorithm 5.1.
    """
    g = check_matrices(g, rank)
    if oversampling < 0:
        raise ValueError(f"oversampling must be 0 or more; got {oversampling}.")
    return _randomized_svd(key, g, rank, min(rank + oversampling, *g.shape[-2:]), power_iterations)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _randomized_svd(
    key: jax.Array, g: jax.Array, rank: int, width: int, power_iterations: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    g = g.astype(working_dtype(g))
    q = range_finder(key, g, width, power_iterations=power_iterations)
    # The transpose of B = QᵀG is the tall one: Bᵀ = v diag(s) uh.
    v, s, uh = tall_svd(einsum("...mn,...mk->...nk", g, q))
    u = einsum("...mk,...rk->...mr", q, uh[..., :rank, :])
    return u, s[..., :rank], jnp.swapaxes(v[..., :rank], -2, -1)
