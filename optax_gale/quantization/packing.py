"""Two numbers of 4 bits in a byte."""

import jax
import jax.numpy as jnp


def pack(x: jax.Array) -> jax.Array:
    """Packs pairs of neighbours along the last axis into bytes, the first one in the low half.

    Args:
      x: integers in [-8, 7], ``(..., n)``.

    Returns:
      ``(..., ceil(n / 2))``, uint8; an odd row ends with a half of zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_gale.quantization import pack, unpack
      >>> packed = pack(jnp.array([1, -1, 7]))
      >>> packed.tolist(), unpack(packed, 3).tolist()
      ([241, 7], [1, -1, 7])
    """
    if x.shape[-1] % 2:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)])
    halves = (x & 15).astype(jnp.uint8)
    return halves[..., 0::2] | (halves[..., 1::2] << 4)


def unpack(x: jax.Array, length: int) -> jax.Array:
    """Undoes `pack`.

    Args:
      x: bytes, ``(..., ceil(length / 2))``.
      length: n, of the last axis.

    Returns:
      ``(..., length)``, int8.
    """
    halves = jnp.stack([x & 15, x >> 4], axis=-1).astype(jnp.int8)
    halves = halves.reshape(*x.shape[:-1], 2 * x.shape[-1])[..., :length]
    return (halves ^ 8) - 8  # the sign from the fourth bit
