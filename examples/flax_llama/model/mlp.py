"""The gated feed-forward network."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from examples.flax_llama.model.linear import Linear


class MLP(nn.Module):
    """SwiGLU: ``(silu(x W_gate) * (x W_up)) W_down`` (Shazeer 2020, https://arxiv.org/abs/2002.05202).

    Args:
        hidden: Width of the input and of the result, D.
        intermediate: Width inside, F.
        dtype: Dtype of the products.
        param_dtype: Dtype of the weights.
        padding: Entries beside F that the matrices have. They start as zeros, take no part
            whatever becomes of them, and have no gradient.
    """

    hidden: int
    intermediate: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    padding: int = 0

    def setup(self) -> None:
        """Makes the three matrices."""
        width, dtypes = self.intermediate + self.padding, (self.dtype, self.param_dtype)
        self.gate = Linear(self.hidden, width, *dtypes, padding=(0, self.padding))
        self.up = Linear(self.hidden, width, *dtypes, padding=(0, self.padding))
        self.down = Linear(width, self.hidden, *dtypes, padding=(self.padding, 0))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``x (..., D)`` to ``(..., D)``."""
        inside = jax.nn.silu(self.gate(x)) * self.up(x)
        if self.padding:  # whatever an optimizer made of the zeros
            # The backward pass makes the mask again; it would keep every layer's.
            cut = jax.checkpoint(_cut, prevent_cse=False, static_argnums=1)
            inside = cut(inside, self.intermediate)
        return self.down(inside)


def _cut(x: jax.Array, width: int) -> jax.Array:
    column = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    return jnp.where(column < width, x, 0)
