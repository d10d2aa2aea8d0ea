"""One layer of the model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from examples.flax_llama.model.attention import Attention, AttentionBackend
from examples.flax_llama.model.mlp import MLP
from examples.flax_llama.model.norm import RMSNorm
from examples.flax_llama.sizes import LlamaSize


class Block(nn.Module):
    """Attention, then the MLP, each on a normalised input and added to the residual stream.

    Usable alone on the parameters of one layer, ``jax.tree.map(lambda p: p[i], params["layers"])``.

    Args:
        size: The model's shape.
        dtype: Dtype of the products and of the residual stream.
        param_dtype: Dtype of the weights.
        attention_backend: See ``Attention``.
        stream: How the residual stream is spread over devices; None: as it comes.
    """

    size: LlamaSize
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    attention_backend: AttentionBackend = "xla"
    stream: NamedSharding | None = None

    def setup(self) -> None:
        """Makes the two halves and their norms."""
        size, dtypes = self.size, (self.dtype, self.param_dtype)
        self.attention_norm = RMSNorm(size.norm_eps, *dtypes)
        self.attention = Attention(size, *dtypes, self.attention_backend)
        self.mlp_norm = RMSNorm(size.norm_eps, *dtypes)
        self.mlp = MLP(size.hidden, size.intermediate, *dtypes, padding=size.padding)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps the residual stream ``x (B, T, D)`` to the next layer's."""
        x = placed(x + self.attention(self.attention_norm(x)), self.stream)
        return placed(x + self.mlp(self.mlp_norm(x)), self.stream)


def placed(x: jax.Array, where: NamedSharding | None) -> jax.Array:
    """Spreads an array over devices as it is said, if it is."""
    return x if where is None else jax.lax.with_sharding_constraint(x, where)
