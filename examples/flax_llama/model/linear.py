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
        computed: Shape ``(in', out')`` of the product that is computed, the kernel's or larger:
            zeros fill up the kernel, ``x`` has ``in'`` entries already, and the result ``out'``.
    """

    inputs: int
    features: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    computed: tuple[int, int] | None = None

    def setup(self) -> None:
        """Makes the kernel."""
        self.kernel = self.param("kernel", INIT, (self.inputs, self.features), self.param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Multiplies ``x (..., in)``; returns ``(..., out)``."""
        x, kernel = x.astype(self.dtype), self.kernel.astype(self.dtype)
        if self.computed is None or self.computed == kernel.shape:
            return jnp.dot(x, kernel)
        # The backward pass fills up once more; it would keep a copy of every layer's kernel.
        return jax.checkpoint(_filled_up_dot, prevent_cse=False, static_argnums=2)(
            x, kernel, self.computed
        )


def _filled_up_dot(x: jax.Array, kernel: jax.Array, shape: tuple[int, int]) -> jax.Array:
    extra = [(0, new - old) for new, old in zip(shape, kernel.shape, strict=True)]
    return jnp.dot(x, jnp.pad(kernel, extra))


def aligned(width: int, dtype: DTypeLike) -> int:
    """The width from ``width`` on whose rows begin at multiples of 16 bytes.

    Others keep tensor cores waiting: of LLaMA-1B's step on an H200, whose MLP has 5461 columns of
    bfloat16, products with those took 156 ms of 250.

    Example:
        >>> aligned(5461, jnp.bfloat16), aligned(11008, jnp.bfloat16)
        (5464, 11008)
    """
    unit = 16 // jnp.dtype(dtype).itemsize
    return -(-width // unit) * unit
