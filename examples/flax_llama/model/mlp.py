"""The gated feed-forward network."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from examples.flax_llama.model.linear import Linear, aligned


class MLP(nn.Module):
    """SwiGLU: ``(silu(x W_gate) * (x W_up)) W_down`` (Shazeer 2020, https://arxiv.org/abs/2002.05202).

    Args:
        hidden: Width of the input and of the result, D.
        intermediate: Width inside, F.
        dtype: Dtype of the products.
        param_dtype: Dtype of the weights.
        align: Whether to compute with the next width whose rows are aligned, the rest zeros. Where
            devices share F, that would move weights between them.
    """

    hidden: int
    intermediate: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    align: bool = True

    def setup(self) -> None:
        """Makes the three matrices."""
        hidden, inside, dtypes = self.hidden, self.intermediate, (self.dtype, self.param_dtype)
        width = aligned(inside, self.dtype) if self.align else inside
        self.gate = Linear(hidden, inside, *dtypes, computed=(hidden, width))
        self.up = Linear(hidden, inside, *dtypes, computed=(hidden, width))
        self.down = Linear(inside, hidden, *dtypes, computed=(width, hidden))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``x (..., D)`` to ``(..., D)``."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
