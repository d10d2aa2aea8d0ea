"""Rotary position embeddings."""

import jax
import jax.numpy as jnp


def apply_rope(x: jax.Array, theta: float = 10000.0) -> jax.Array:
    """Turns each pair of features by an angle proportional to the token's position.

    Feature ``i`` is paired with feature ``i + K/2`` (the "rotate half" layout of LLaMA checkpoints
    in Hugging Face's format), and turned by ``t · theta^(-2i/K)`` at position ``t``. Queries and
    keys turned so have inner products that depend on the distance of their positions alone
    (Su et al. 2021, https://arxiv.org/abs/2104.09864). Computed in float32.

    Args:
        x: Queries or keys, ``(B, T, H, K)`` with K even.
        theta: Base of the wavelengths.

    Returns:
        The turned ``x``, same shape and dtype.
    """
    _, length, _, head_dim = x.shape
    half = head_dim // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.einsum("t,k->tk", jnp.arange(length, dtype=jnp.float32), frequencies)
    cos, sin = jnp.cos(angles)[None, :, None, :], jnp.sin(angles)[None, :, None, :]
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)
