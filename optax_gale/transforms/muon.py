"""Momentum orthogonalised in the subspace."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_gale import linalg
from optax_gale.transforms import shardings

# Quintic Newton-Schulz coefficients of Muon: steepest at zero, singular values end in [0.7, 1.2].
MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class ScaleByOrthogonalizedMomentumState(NamedTuple):
    """State of `scale_by_orthogonalized_momentum`.

    Attributes:
      mu: running momentum, a tree like the gradients.
    """

    mu: Any


def newton_schulz(
    x: jax.Array,
    steps: int = 5,
    coefficients: Sequence[float] = MUON_COEFFICIENTS,
    eps: float = 1e-7,
) -> jax.Array:
    r"""Replaces singular values by about 1: ``U S V^T`` becomes close to ``U V^T``.

    ``X <- a X + b (X X^T) X + c (X X^T)^2 X`` on the shorter side, from ``X / ||X||_F``.

    Args:
      x: matrices ``(*batch, m, n)``; half precision is multiplied as such, with float32 sums.
      steps: iterations.
      coefficients: a, b, c.
      eps: added to the norm.

    Returns:
      Matrices of x's shape and dtype; zero stays zero.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_gale.transforms.muon import newton_schulz
      >>> x = jax.random.normal(jax.random.key(0), (8, 32))
      >>> singular_values = jnp.linalg.svd(newton_schulz(x), compute_uv=False)
      >>> bool(jnp.all((singular_values > 0.6) & (singular_values < 1.3)))
      True

    References:
      Jordan et al., `Muon: An optimizer for hidden layers in neural networks
      <https://kellerjordan.github.io/posts/muon/>`_, 2024.
    """
    a, b, c = coefficients
    dtype = x.dtype
    wide = x.shape[-2] <= x.shape[-1]
    gram = "...rn,...sn->...rs" if wide else "...mr,...ms->...rs"
    apply = "...rs,...sn->...rn" if wide else "...ms,...sr->...mr"
    x = x.astype(jnp.float32)
    x = x / (jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True)) + eps)
    x = x.astype(dtype)

    def iterate(_, x):
        g = linalg.einsum(gram, x, x).astype(dtype)
        p = b * g + c * linalg.einsum("...rs,...st->...rt", g, g).astype(dtype)
        moved = linalg.einsum(apply, p, x) if wide else linalg.einsum(apply, x, p)
        return shardings.match((a * x + moved).astype(dtype), x)

    return jax.lax.fori_loop(0, steps, iterate, x)


def scale_by_orthogonalized_momentum(
    beta: jax.typing.ArrayLike = 0.95,
    *,
    nesterov: bool = True,
    ns_steps: int = 5,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Muon's update: the momentum with its singular values replaced by 1.

    ``M <- beta M + (1 - beta) G``, and the update is ``orthogonalize(beta M + (1 - beta) G)`` with
    ``nesterov``, or ``orthogonalize(M)``. The last two axes of every leaf are its matrix. In the
    subspace of `gale` that matrix is r by n, so its Gram matrix is only r by r.

    Args:
      beta: decay rate of the momentum.
      nesterov: whether to look one step ahead.
      ns_steps: Newton-Schulz iterations.
      mu_dtype: dtype of the momentum; None for the parameters'.

    Returns:
      A transformation for trees whose leaves have at least two axes.

    Raises:
      ValueError: from `init`, if a leaf has fewer than two axes.

    Example:
      >>> import optax, optax_gale
      >>> tx = optax_gale.gale(
      ...     optax.chain(
      ...         optax_gale.scale_by_orthogonalized_momentum(),
      ...         optax.scale_by_learning_rate(0.02),
      ...     ),
      ...     rank=32,
      ...     full_rank=optax.adam(1e-3),
      ... )

    References:
      Jordan et al., `Muon: An optimizer for hidden layers in neural networks
      <https://kellerjordan.github.io/posts/muon/>`_, 2024; Ahn et al., `Dion: Distributed
      Orthonormalized Updates <https://arxiv.org/abs/2504.05295>`_, 2025.
    """

    def init(params):
        for path, x in jax.tree_util.tree_flatten_with_path(params)[0]:
            if len(x.shape) < 2:
                raise ValueError(
                    "scale_by_orthogonalized_momentum needs matrices, but the parameter "
                    f"'{jax.tree_util.keystr(path, simple=True, separator='/')}' has shape "
                    f"{tuple(x.shape)}. Give such leaves another optimizer: gale(..., full_rank="
                    "optax.adam(...))."
                )
        return ScaleByOrthogonalizedMomentumState(mu=optax.tree.zeros_like(params, dtype=mu_dtype))

    def update(updates, state, params=None):
        del params
        blend = lambda old, new: (beta * old + (1 - beta) * new).astype(old.dtype)
        mu = jax.tree.map(blend, state.mu, updates)
        ahead = jax.tree.map(blend, mu, updates) if nesterov else mu
        out = jax.tree.map(lambda m, g: newton_schulz(m, ns_steps).astype(g.dtype), ahead, updates)
        return out, ScaleByOrthogonalizedMomentumState(mu=mu)

    return optax.GradientTransformation(init, update)
