"""The gated feed-forward network."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from examples.flax_llama.model.linear import linear


class MLP(nn.Module):
    """SwiGLU: ``(silu(x W_gate) * (x W_up)) W_down`` (Shazeer 2020, https://arxiv.org/abs/2002.05202).

    Args:
        hidden: Width of the input and of the result, D.
        intermediate: Width inside, F.
        dtype: Dtype of the products.
        param_dtype: Dtype of the weights.
    """

    hidden: int
    intermediate: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Makes the three matrices."""
        self.gate = linear(self.intermediate, self.dtype, self.param_dtype)
        self.up = linear(self.intermediate, self.dtype, self.param_dtype)
        self.down = linear(self.hidden, self.dtype, self.param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``x (..., D)`` to ``(..., D)``."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
