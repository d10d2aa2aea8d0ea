"""The one kind of weight matrix that the model has."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

INIT = nn.initializers.normal(0.02)
"""Every matrix starts as N(0, 0.02²), as LLaMA pretraining codes do."""


class Linear(nn.Module):
    """A matrix without bias, ``kernel (in, out)``: ``x (..., in) -> x @ kernel (..., out)``.

    Args:
        inputs: in.
        features: out.
        dtype: Dtype of the product.
        param_dtype: Dtype of the kernel.
        padding: How many of the last inputs, and of the last features, start as zeros.
    """

    inputs: int
    features: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    padding: tuple[int, int] = (0, 0)

    def setup(self) -> None:
        """Makes the kernel."""
        shape = (self.inputs, self.features)
        self.kernel = self.param("kernel", self._init, shape, self.param_dtype)

    def _init(self, key: jax.Array, shape: tuple[int, int], dtype: DTypeLike) -> jax.Array:
        rows, columns = self.padding
        weights = INIT(key, (shape[0] - rows, shape[1] - columns), dtype)
        return jnp.pad(weights, ((0, rows), (0, columns)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Multiplies ``x (..., in)``; returns ``(..., out)``."""
        return jnp.dot(x.astype(self.dtype), self.kernel.astype(self.dtype))
