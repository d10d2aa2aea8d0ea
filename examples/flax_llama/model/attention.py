"""Causal self-attention with rotary positions and optional grouped-query heads."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from examples.flax_llama.model.linear import Linear
from examples.flax_llama.model.rope import apply_rope
from examples.flax_llama.sizes import LlamaSize

AttentionBackend = Literal["xla", "cudnn"]


class Attention(nn.Module):
    """Multi-head attention over the tokens up to and including each position.

    ``softmax(Q Kᵀ / sqrt(K) + causal mask) V`` for each head, the softmax in float32. With fewer
    key/value heads than query heads, consecutive query heads share one.

    Padding needs no mask as long as it follows the text: no token attends to a later one.

    Args:
        size: The model's shape.
        dtype: Dtype of the products.
        param_dtype: Dtype of the weights.
        backend: ``"xla"``, or ``"cudnn"`` for the fused kernel (GPU, 16-bit ``dtype``).
    """

    size: LlamaSize
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    backend: AttentionBackend = "xla"

    def setup(self) -> None:
        """Makes the four projections."""
        hidden, dtypes = self.size.hidden, (self.dtype, self.param_dtype)
        kv_width = self.size.kv_heads * self.size.head_dim
        self.query = Linear(hidden, hidden, *dtypes)
        self.key = Linear(hidden, kv_width, *dtypes)
        self.value = Linear(hidden, kv_width, *dtypes)
        self.out = Linear(hidden, hidden, *dtypes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Attends within ``x (B, T, D)``; returns ``(B, T, D)``."""
        batch, length, _ = x.shape
        q, k, v = (
            project(x).reshape(batch, length, -1, self.size.head_dim)
            for project in (self.query, self.key, self.value)
        )
        q, k = apply_rope(q, self.size.rope_theta), apply_rope(k, self.size.rope_theta)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=self.backend)
        return self.out(mixed.reshape(batch, length, -1))
