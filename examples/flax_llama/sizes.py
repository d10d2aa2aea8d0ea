"""The shapes of the LLaMA models."""

import dataclasses

from examples.flax_llama.errors import UserError


@dataclasses.dataclass(frozen=True)
class LlamaSize:
    """The shape of one LLaMA.

    Example:
        >>> dataclasses.replace(SIZES["tiny"], kv_heads=2).head_dim
        32

    Args:
        vocab_size: Number of token ids, V.
        hidden: Width of the residual stream, D.
        intermediate: Width of the MLP, F.
        layers: Number of blocks, L.
        heads: Number of query heads, H; must divide ``hidden``.
        kv_heads: Number of key and value heads; must divide ``heads``. Fewer than ``heads`` is
            grouped-query attention (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245).
        max_length: Longest sequence that the model accepts.
        rope_theta: Base of the rotary embedding's wavelengths.
        norm_eps: Added to the mean square inside RMSNorm.
        tied: Whether the LM head shares the embedding's weights.
        padding: Entries that the MLP has in memory beside its F, so that rows are aligned and can
            be shared by devices. They start as zeros, take no part, and count as no parameters.

    Raises:
        UserError: If a number is not positive, ``padding`` is negative, or one number does not
            divide the other as said above.
    """

    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    max_length: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tied: bool = False
    padding: int = 0

    def __post_init__(self) -> None:
        """Checks that the numbers fit together."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("tied", "padding") and not value > 0:
                raise UserError(f"{field.name} must be positive, got {value}.")
        if self.padding < 0:
            raise UserError(f"padding must not be negative, got {self.padding}.")
        if self.hidden % self.heads:
            raise UserError(f"heads={self.heads} must divide hidden={self.hidden}.")
        if self.heads % self.kv_heads:
            raise UserError(f"kv_heads={self.kv_heads} must divide heads={self.heads}.")
        if self.head_dim % 2:
            raise UserError(
                f"hidden / heads = {self.head_dim} must be even: rotary embeddings turn pairs."
            )

    @property
    def head_dim(self) -> int:
        """Width of one head, K."""
        return self.hidden // self.heads

    @property
    def padded_intermediate(self) -> int:
        """Width of the MLP in memory."""
        return self.intermediate + self.padding


def _size(
    hidden: int,
    intermediate: int,
    heads: int,
    layers: int,
    vocab: int = 32000,
    padding: int = 0,
) -> LlamaSize:
    return LlamaSize(vocab, hidden, intermediate, layers, heads, kv_heads=heads, padding=padding)


SIZES: dict[str, LlamaSize] = {
    "tiny": _size(128, 344, 4, 4, vocab=4096),
    "60m": _size(512, 1376, 8, 8),
    "130m": _size(768, 2048, 12, 12),
    "350m": _size(1024, 2736, 16, 24),
    # Products with rows that begin at any address took 156 ms of the step's 250 on an H200; and
    # what is padded to a multiple of 64 is aligned on each of eight devices, too.
    "1b": _size(2048, 5461, 32, 24, padding=43),
    "7b": _size(4096, 11008, 32, 32),
    "13b": _size(5120, 13824, 40, 40),
}
"""The sizes of GaLore's tables (Zhao et al. 2024, https://arxiv.org/abs/2403.03507), and ``tiny``,
which trains on a CPU; its vocabulary is the default tokenizer's."""


def get_size(name: str) -> LlamaSize:
    """Looks a size up by its name.

    Example:
        >>> get_size("60m").hidden
        512

    Raises:
        UserError: If there is no such size.
    """
    try:
        return SIZES[name]
    except KeyError:
        raise UserError(f"unknown model size {name!r}; choose from {', '.join(SIZES)}.") from None


def count_params(size: LlamaSize) -> int:
    """Counts the parameters of ``size``: embeddings, blocks, final norm and LM head.

    Example:
        >>> count_params(SIZES["60m"])
        58073600
    """
    kv_width = size.kv_heads * size.head_dim
    attention = 2 * size.hidden * size.hidden + 2 * size.hidden * kv_width
    mlp = 3 * size.hidden * size.intermediate
    norms = 2 * size.hidden
    embeddings = size.vocab_size * size.hidden * (1 if size.tied else 2)
    return embeddings + size.layers * (attention + mlp + norms) + size.hidden
