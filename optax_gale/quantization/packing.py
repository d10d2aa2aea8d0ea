"""Two numbers of 4 bits in a byte."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_gale import _sharding


def pack(x: jax.Array) -> jax.Array:
    """Packs pairs of neighbours along the last axis into bytes, the first one in the low half.

    On a mesh with Explicit axes bytes are sharded as x is, but along the last axis only where both
    numbers of each are on one device.

    Args:
      x: integers in [-8, 7], ``(..., n)``.

    Returns:
      ``(..., ceil(n / 2))``, uint8; an odd row ends with a half of zero.

    Raises:
      TypeError: if x holds no integers.
      ValueError: if x has no axis or, where its values are known (not under `jax.jit`), one is out
        of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_gale.quantization import pack, unpack
      >>> packed = pack(jnp.array([1, -1, 7]))
      >>> packed.tolist(), unpack(packed, 3).tolist()
      ([241, 7], [1, -1, 7])
    """
    _check_integers(x, "integers in [-8, 7],", jnp.integer)
    if np.size(x) and not isinstance(x, jax.core.Tracer) and _is_here(x):
        low, high = int(x.min()), int(x.max())
        if low < -8 or high > 7:
            raise ValueError(f"`x` must be integers in [-8, 7], got some from {low} to {high}.")
    if _sharding.is_sharded(x, (-1,)) and x.shape[-1] % (2 * _sharding.shards(x, -1)):
        x = _sharding.replicate(x, (-1,))  # a byte would have its halves on two devices
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

    Raises:
      TypeError: if x holds no bytes (uint8), or ``length`` is no int.
      ValueError: if x has no axis, or one that does not fit ``length``.
    """
    _check_integers(x, "bytes, as `pack` returns them,", jnp.uint8)
    if not isinstance(length, (int, np.integer)) or isinstance(length, bool):
        raise TypeError(f"`length` must be an int, got {length!r}.")
    if length < 0 or -(-length // 2) != x.shape[-1]:
        raise ValueError(
            f"`length` must be what was packed into the {x.shape[-1]} bytes of a row of `x` "
            f"{x.shape}, {max(2 * x.shape[-1] - 1, 0)} or {2 * x.shape[-1]}, got {length}."
        )
    if length % 2:
        x = _sharding.replicate(x, (-1,))  # or the last device would have fewer numbers
    halves = jnp.stack([x & 15, x >> 4], axis=-1).astype(jnp.int8)
    halves = halves.reshape(*x.shape[:-1], 2 * x.shape[-1])[..., :length]
    return (halves ^ 8) - 8  # the sign from the fourth bit


def _is_here(x: Any) -> bool:
    """Whether all of an array is on this process's devices."""
    return getattr(x, "is_fully_addressable", True)


def _check_integers(x: Any, what: str, kind: Any) -> None:
    dtype = getattr(x, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, kind):
        raise TypeError(f"`x` must be an array of {what} got {dtype or type(x).__name__}.")
    if not x.ndim:
        raise ValueError(f"`x` must have an axis, got shape {x.shape}.")
