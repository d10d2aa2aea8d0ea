"""The whole model."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from examples.flax_llama.model.attention import AttentionBackend
from examples.flax_llama.model.block import Block, placed
from examples.flax_llama.model.linear import INIT, Linear
from examples.flax_llama.model.norm import RMSNorm
from examples.flax_llama.sizes import LlamaSize


class Embedding(nn.Module):
    """The table of token vectors, ``embedding (V, D)``."""

    size: LlamaSize
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Makes the table."""
        shape = (self.size.vocab_size, self.size.hidden)
        self.embedding = self.param("embedding", INIT, shape, self.param_dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Looks ``tokens (B, T)`` up; returns ``(B, T, D)``.

        In float32 until after the look-up: a frequent token's gradient is a sum of thousands of
        terms, which bfloat16 would stop counting.
        """
        return jnp.take(self.embedding.astype(jnp.float32), tokens, axis=0).astype(self.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits of ``x (B, T, D)`` with the table as LM head."""
        return jnp.einsum("btd,vd->btv", x, self.embedding.astype(self.dtype))


class Llama(nn.Module):
    """A LLaMA language model (Touvron et al. 2023, https://arxiv.org/abs/2302.13971).

    The layers are one ``Block`` scanned over parameters with a leading layer axis, so compilation
    does not grow with depth. The parameters are::

        embed/embedding (V, D)      final_norm/scale (D,)      lm_head/kernel (D, V), unless tied
        layers/attention_norm/scale, layers/mlp_norm/scale     (L, D)
        layers/attention/{query, key, value, out}/kernel       (L, in, out)
        layers/mlp/{gate, up, down}/kernel                     (L, in, out)

    The forward pass in pieces, for whoever walks the layers by hand::

        x = model.apply({"params": params}, tokens, method="embed_tokens")
        for i in range(size.layers):
            x = model.block().apply({"params": jax.tree.map(lambda p: p[i], params["layers"])}, x)
        logits = model.apply({"params": params}, x, method="head")

    Example:
        >>> from examples.flax_llama.sizes import LlamaSize
        >>> model = Llama(LlamaSize(64, hidden=8, intermediate=16, layers=2, heads=2, kv_heads=1))
        >>> tokens = jnp.zeros((1, 4), jnp.int32)
        >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
        >>> jax.jit(model.apply)({"params": params}, tokens).shape
        (1, 4, 64)

    Args:
        size: The model's shape.
        dtype: Dtype of the products, the residual stream and the logits. Norms, rotary positions
            and softmax are float32 whatever it is.
        param_dtype: Dtype of the weights.
        remat: Whether to keep only each layer's input for the backward pass and compute the rest
            again.
        attention_backend: See ``Attention``.
        stream: See ``Block``.
    """

    size: LlamaSize
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False
    attention_backend: AttentionBackend = "xla"
    stream: NamedSharding | None = None

    def block(self) -> Block:
        """An unbound ``Block`` of this model."""
        return Block(*self._of_blocks(), parent=None)

    def _of_blocks(self) -> tuple[Any, ...]:
        dtypes = (self.dtype, self.param_dtype)
        return (self.size, *dtypes, self.attention_backend, self.stream)

    def setup(self) -> None:
        """Makes the four parts."""
        dtypes = (self.dtype, self.param_dtype)
        self.embed = Embedding(self.size, *dtypes)
        self.layers = Block(*self._of_blocks())
        self.final_norm = RMSNorm(self.size.norm_eps, *dtypes)
        if not self.size.tied:
            self.lm_head = Linear(self.size.hidden, self.size.vocab_size, *dtypes)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps ``tokens (B, T)``, int32, to logits ``(B, T, V)`` of the next token."""
        return self.head(self.hidden(tokens))

    def hidden(self, tokens: jax.Array) -> jax.Array:
        """Maps ``tokens (B, T)`` to the residual stream ``(B, T, D)`` after the last layer."""
        length = tokens.shape[1]
        if length > self.size.max_length:
            raise ValueError(
                f"tokens {tokens.shape} are longer than the model's max_length="
                f"{self.size.max_length}; use shorter sequences or raise max_length."
            )
        return self.run_layers(self.embed_tokens(tokens))

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """Maps ``tokens (B, T)`` to the first layer's input ``(B, T, D)``."""
        return placed(self.embed(tokens), self.stream)

    def run_layers(self, x: jax.Array) -> jax.Array:
        """Runs all layers on ``x (B, T, D)``."""

        def layer(block: Block, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return block(x), None

        scan = nn.scan(
            nn.remat(layer, prevent_cse=False) if self.remat else layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.size.layers,
        )
        return scan(self.layers, x, None)[0]

    def head(self, x: jax.Array) -> jax.Array:
        """Maps the residual stream ``x (B, T, D)`` to logits ``(B, T, V)``."""
        x = self.final_norm(x)
        return self.embed.attend(x) if self.size.tied else self.lm_head(x)
