"""Root-mean-square normalisation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class RMSNorm(nn.Module):
    """Scales every vector to unit root mean square, then by a learned ``scale``.

    ``y = x / sqrt(mean(x²) + eps) * scale``, in float32 whatever the input is
    (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467).

    Args:
        eps: Keeps the division finite where ``x`` is zero.
        dtype: Dtype of the result.
        param_dtype: Dtype of ``scale``.
    """

    eps: float = 1e-6
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises ``x (..., D)`` over its last axis."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        y = x * jax.lax.rsqrt(mean_square + self.eps)
        return jnp.einsum("...d,d->...d", y, scale.astype(jnp.float32)).astype(self.dtype)
