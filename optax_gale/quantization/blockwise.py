"""Arrays quantised in blocks, each with a scale of its own."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_gale import _sharding
from optax_gale.quantization import packing
from optax_gale.quantization.codes import CODES, Code, CodeName, neighbour

BLOCK_SIZE = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """An array ``(..., n)`` in a few bits an element; see `quantize`.

    It is a pytree of two arrays: it goes through `jax.jit`, `jax.vmap` over leading axes and
    checkpoints, and can be sharded as the array that it stands for. On a mesh with Explicit axes,
    scales are not sharded along the last axis, nor are bytes whose halves would be on two devices.

    Attributes:
      codes: places in the code, ``(..., n)`` uint8 or int8; for ``"int4"`` two to a byte,
        ``(..., ceil(n / 2))`` uint8.
      scales: what the blocks were divided by, ``(..., ceil(n / block_size))`` float32.
      code: name of the code; static.
      block_size: elements of a block along the last axis; static.
      length: n; static.
      dtype: name of the dtype of the array; static.
    """

    codes: Any
    scales: Any
    code: CodeName = dataclasses.field(metadata={"static": True})
    block_size: int = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return (*self.codes.shape[:-1], self.length)

    @property
    def ndim(self) -> int:
        """Number of its axes."""
        return len(self.codes.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in (self.codes, self.scales))


def quantized_nbytes(shape: tuple[int, ...], code: CodeName, block_size: int = BLOCK_SIZE) -> int:
    """Bytes that an array of a shape would take, codes and scales.

    Raises:
      TypeError: if ``block_size`` is no int.
      ValueError: if the shape has no axis, or ``code`` is unknown or ``block_size`` out of range.

    Example:
      >>> from optax_gale.quantization import quantized_nbytes
      >>> quantized_nbytes((128, 1024), "int8")
      133120
    """
    _check_code(code)
    block_size = checked_block_size(block_size)
    if not isinstance(shape, Sequence) or not shape:
        raise ValueError(f"`shape` must be a tuple of at least one length, got {shape!r}.")
    *batch, n = shape
    return math.prod(batch) * (-(-n * CODES[code].bits // 8) + 4 * -(-n // block_size))


def checked_block_size(block_size: Any) -> int:
    """A block size as an int; raises TypeError or ValueError unless it is one of at least 1."""
    if not isinstance(block_size, (int, np.integer)) or isinstance(block_size, bool):
        raise TypeError(f"`block_size` must be an int, got {block_size!r}. Use 256 if unsure.")
    if block_size < 1:
        raise ValueError(f"`block_size` must be at least 1, got {block_size}. Use 256 if unsure.")
    return int(block_size)


def _check_code(code: Any) -> None:
    if not isinstance(code, str) or code not in CODES:
        raise ValueError(f"`code` must be one of {tuple(CODES)}, got {code!r}.")


def _check_key(key: Any) -> None:
    dtype, ndim = getattr(key, "dtype", None), getattr(key, "ndim", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and ndim == 0
    if not is_typed and not (dtype == jnp.uint32 and ndim == 1):
        given = repr(key) if dtype is None else f"{dtype} {key.shape}"
        raise TypeError(f"`key` must be None or one PRNG key (jax.random.key(0)), got {given}.")


def quantize(
    x: jax.Array,
    code: CodeName = "dynamic",
    *,
    block_size: int = BLOCK_SIZE,
    key: jax.Array | None = None,
) -> Quantized:
    r"""Quantises an array in blocks along its last axis.

    Every block is divided by its largest absolute value, and each quotient stored as the place of
    the nearest number of the code. For ``"dynamic"``, which has 1 but not -1, the divisor has the
    sign of the number that is largest: so that one is exact, whatever its sign, and an average that
    is stored again and again does not shrink. Blocks do not cross rows; the last one of a row may
    be shorter.
    A block of zeros stays zero. One that holds NaN or an infinity, or a negative number where the
    code has none, becomes NaN as a whole: what is wrong stays visible, and within its block.

    Args:
      x: floating-point array ``(..., n)`` with at least one axis, not empty.
      code: ``"dynamic"``, 8 bits for numbers of any sign over seven decades, the finest for large
        ones; ``"dynamic_unsigned"``, the same for numbers that are not negative, of which no
        positive one is rounded to zero (in blocks whose largest is above 4e-32, where 3.25e-7 of it
        is a number of float32); ``"int8"`` and ``"int4"``, evenly spaced, the latter packed
        two to a byte.
      block_size: elements of a block.
      key: None to round to the nearest; or a key for stochastic rounding, whose mean is x (except
        at the ends of the code: of the smallest positive numbers of ``"dynamic_unsigned"``, and of
        those within 1 % of the largest of a block of ``"dynamic"`` that have the other sign).

    Returns:
      The quantised array.

    Raises:
      TypeError: if x is not of floating point, ``block_size`` no int, or ``key`` no key.
      ValueError: if x has no axis or no elements, or ``code`` or ``block_size`` is unknown or out
        of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_gale.quantization import dequantize, quantize
      >>> x = jnp.linspace(-1.0, 1.0, 1000).reshape(2, 500)
      >>> q = quantize(x, "int8")
      >>> q.codes.shape, q.scales.shape
      ((2, 500), (2, 2))
      >>> bool(jnp.max(jnp.abs(dequantize(q) - x)) <= 0.5 / 127 + 1e-6)
      True

    References:
      Dettmers et al., `8-bit Optimizers via Block-wise Quantization
      <https://arxiv.org/abs/2110.02861>`_, 2022.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must be of floating point, got {x.dtype} {x.shape}.")
    if not x.ndim or not x.size:
        raise ValueError(f"`x` must have an axis and an element, got shape {x.shape}.")
    _check_code(code)
    if key is not None:
        _check_key(key)
    return _quantized(x, key, code, checked_block_size(block_size))


# One program also where nothing else is compiled: operation by operation, it is some dozens.
@functools.partial(jax.jit, static_argnames=("code", "block_size"))
def _quantized(x: jax.Array, key: jax.Array | None, code: CodeName, block_size: int) -> Quantized:
    chosen, wide = CODES[code], x.astype(jnp.float32)
    scales = _scales(wide, block_size, chosen)
    spread = _spread(scales, block_size, wide)
    divides = jnp.abs(spread) > 0  # also false of NaN
    quotients = jnp.where(divides, wide / jnp.where(divides, spread, 1.0), 0.0)
    if chosen.floor is not None:
        # Of x, not of the quotient, which may underflow.
        quotients = jnp.where(wide > 0, jnp.maximum(quotients, chosen.floor), 0.0)
    places = chosen.encode(quotients) if key is None else neighbour(chosen, quotients, key)
    byte = jnp.int8 if chosen.lowest < 0 else jnp.uint8
    codes = packing.pack(places) if chosen.bits == 4 else places.astype(byte)
    return Quantized(codes, scales, code, block_size, x.shape[-1], str(x.dtype))


def dequantize(q: Quantized, dtype: Any = None) -> jax.Array:
    """The array that a quantised one stands for.

    Args:
      q: the quantised array.
      dtype: of the result; None for that of the array that was quantised.

    Returns:
      ``(..., n)``.

    Raises:
      TypeError: if q is no quantised array, or ``dtype`` no floating type.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_gale.quantization import dequantize, quantize
      >>> dequantize(quantize(jnp.eye(3), "int4")).tolist()
      [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    if not isinstance(q, Quantized):
        raise TypeError(
            f"`q` must be a Quantized, what `quantize` returns, got {type(q).__name__}."
        )
    try:
        found = jnp.dtype(q.dtype if dtype is None else dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise TypeError(f"`dtype` must be None or a floating type, got {dtype!r}.")
    return _dequantized(q, found)


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantized(q: Quantized, dtype: Any) -> jax.Array:
    code = CODES[q.code]
    places = packing.unpack(q.codes, q.length) if code.bits == 4 else q.codes
    values = code.decode(places.astype(jnp.int32))
    return (values * _spread(q.scales, q.block_size, values)).astype(dtype)


def _scales(x: jax.Array, block_size: int, code: Code) -> jax.Array:
    """The largest absolute value of every block, with its sign or not.

    NaN where a block holds what the code has no number for.
    """
    count, rest = -(-x.shape[-1] // block_size), -x.shape[-1] % block_size
    if _sharding.is_sharded(x, (-1,)) and (rest or count % _sharding.shards(x, -1)):
        x = _sharding.replicate(x, (-1,))  # a block would have parts on several devices
    if rest:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rest)])
    blocks = x.reshape(*x.shape[:-1], count, block_size)
    # Whether comparisons see NaN differs between devices.
    is_known = jnp.isfinite(blocks)
    if not code.has_negative:
        is_known &= blocks >= 0
    if code.signed_scale:
        high, low = jnp.max(blocks, axis=-1), jnp.min(blocks, axis=-1)
        largest = jnp.where(high >= -low, high, low)
    else:
        largest = jnp.max(jnp.abs(blocks), axis=-1)
    largest = jnp.where(jnp.all(is_known, axis=-1), largest, jnp.nan)
    return _sharding.replicate(largest, (-1,))


def _spread(scales: jax.Array, block_size: int, like: jax.Array) -> jax.Array:
    """The scale of every element, laid out over devices as an array is."""
    *batch, count = scales.shape
    spread = jnp.broadcast_to(scales[..., None], (*batch, count, block_size))
    spread = spread.reshape(*batch, count * block_size)[..., : like.shape[-1]]
    return _sharding.match(spread, like)
