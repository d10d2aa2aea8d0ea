"""A LLaMA in Flax Linen, one component a file; read ``llama.py`` first."""

from examples.flax_llama.model.attention import Attention, AttentionBackend
from examples.flax_llama.model.block import Block
from examples.flax_llama.model.llama import Embedding, Llama
from examples.flax_llama.model.loss import (
    head_loss,
    masked_sum,
    next_token_loss,
    predicted,
    token_losses,
)
from examples.flax_llama.model.mlp import MLP
from examples.flax_llama.model.norm import RMSNorm
from examples.flax_llama.model.rope import apply_rope

__all__ = [
    "MLP",
    "Attention",
    "AttentionBackend",
    "Block",
    "Embedding",
    "Llama",
    "RMSNorm",
    "apply_rope",
    "head_loss",
    "masked_sum",
    "next_token_loss",
    "predicted",
    "token_losses",
]
