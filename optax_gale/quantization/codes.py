"""Codes of 8 and 4 bits for numbers in [-1, 1].

A code is a finite set of numbers in ascending order; a number is stored as the place of the nearest
of them. Both directions are arithmetic on the elements, without a table, so that they fuse with
what is around them and keep any sharding.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from optax_gale import _sharding

CodeName = Literal["dynamic", "dynamic_unsigned", "int8", "int4"]

_DECADES = 7  # bits of the exponent at most: powers of ten from 1e-6 to 1


def dynamic_map(*, signed: bool = True) -> np.ndarray:
    r"""The 256 numbers of dynamic (tree) quantisation, ascending.

    A code word is a sign bit, some zeros, a one, and a fraction: e zeros fewer make the number ten
    times larger, and what is left of the word divides [0.1, 1] evenly. So the decade that ends at
    ``10^(e - 6)``, for ``e = 0 ... 6``, has ``2^e`` numbers of each sign, the middles of as many
    equal parts of ``[0.1, 1] 10^(e - 6)``. Without negative numbers the sign's bit goes to the
    fraction: ``2^(e + 1)`` numbers. To these 254 come 0 and 1; -1 is not among them.

    Args:
      signed: with negative numbers, for first moments; or without, for second ones.

    Returns:
      ``(256,)``, float64.

    Example:
      >>> from optax_gale.quantization import dynamic_map
      >>> numbers = dynamic_map(signed=False)
      >>> numbers[[0, 1, -1]].tolist()
      [0.0, 3.25e-07, 1.0]

    References:
      Dettmers, `8-Bit Approximations for Parallelism in Deep Learning
      <https://arxiv.org/abs/1511.04561>`_, 2016; Dettmers et al., `8-bit Optimizers via Block-wise
      Quantization <https://arxiv.org/abs/2110.02861>`_, 2022, sections 1.3 and 2.2.
    """
    positive = []
    for e in range(_DECADES):
        edges = np.linspace(0.1, 1.0, 2 ** (e if signed else e + 1) + 1)
        positive.append(10.0 ** (e + 1 - _DECADES) * (edges[:-1] + edges[1:]) / 2)
    numbers = np.concatenate(positive)
    negative = -numbers[::-1] if signed else numbers[:0]
    return np.concatenate([negative, [0.0], numbers, [1.0]])


@dataclass(frozen=True)
class Code:
    """A code.

    Attributes:
      bits: of a place; of 4, two are packed into a byte.
      lowest: the first place.
      highest: the last place.
      encode: places, int32, of the numbers nearest to float32 ones.
      decode: the numbers, float32, at int32 places.
      floor: None, or what no positive number is rounded below. A second moment of zero beside a
        first moment that is not would make the step explode: ``m / (sqrt(0) + eps)``.
      has_negative: whether there are negative numbers.
      signed_scale: whether blocks are divided by a number that may be negative: the code has 1 but
        not -1.
    """

    bits: int
    lowest: int
    highest: int
    encode: Callable[[jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]
    floor: float | None = None
    has_negative: bool = True
    signed_scale: bool = False


class _Dynamic:
    """Arithmetic of the dynamic map's numbers from zero up: the k-th of them.

    With s = 1 where the sign's bit belongs to the fraction, and else 0, ``k + s`` is the code word
    as it is read: its leading one stands at bit ``e + s`` of decade e, and the fraction follows.
    """

    def __init__(self, shift: int):
        numbers = dynamic_map(signed=not shift)
        numbers = numbers[np.searchsorted(numbers, 0.0) :]
        self.shift, self.last = shift, len(numbers) - 1
        self.floor = float(numbers[1])
        self.counts = [2 ** (e + shift) for e in range(_DECADES)]
        firsts = [count - shift for count in self.counts]
        # From where on a number is nearer to the decade's first than to what is before it.
        self.starts = [(numbers[k - 1] + numbers[k]) / 2 for k in (*firsts, self.last)]

    def encode(self, x: jax.Array) -> jax.Array:
        gain = offset = count = jnp.zeros_like(x)
        for e, number in enumerate(self.counts):
            inside = x >= self.starts[e]
            gain = jnp.where(inside, number * 10.0 ** (_DECADES - e) / 9, gain)
            offset = jnp.where(inside, number / 9, offset)
            count = jnp.where(inside, number, count)
        place = count + jnp.clip(jnp.floor(x * gain - offset), 0, jnp.maximum(count - 1, 0))
        place = jnp.where(count > 0, place - self.shift, 0)
        return jnp.where(x >= self.starts[-1], self.last, place).astype(jnp.int32)

    def decode(self, place: jax.Array) -> jax.Array:
        word = place + self.shift
        leading, unit = jnp.zeros_like(place), jnp.zeros(place.shape, jnp.float32)
        for e, count in enumerate(self.counts):
            inside = word >= count
            leading = jnp.where(inside, count, leading)
            unit = jnp.where(inside, np.float32(10.0 ** (e - _DECADES) / (2 * count)), unit)
        # The middle of the part, as a whole number of units: rounded once, alike everywhere.
        middle = (18 * word - 16 * leading + 9).astype(jnp.float32)
        return jnp.where(place == self.last, 1.0, middle * unit)


def _signed_dynamic() -> Code:
    numbers = _Dynamic(shift=0)
    zero = numbers.last - 1  # the place of 0: there is no -1

    def encode(x: jax.Array) -> jax.Array:
        place = numbers.encode(jnp.abs(x))
        return jnp.where(x < 0, jnp.maximum(zero - place, 0), zero + place)

    def decode(place: jax.Array) -> jax.Array:
        size = numbers.decode(jnp.abs(place - zero))
        return jnp.where(place < zero, -size, size)

    return Code(8, 0, zero + numbers.last, encode, decode, signed_scale=True)


def _unsigned_dynamic() -> Code:
    numbers = _Dynamic(shift=1)
    return Code(
        8,
        0,
        numbers.last,
        numbers.encode,
        numbers.decode,
        numbers.floor,
        has_negative=False,
    )


def _linear(bits: int) -> Code:
    """Evenly spaced, with zero, one and minus one among them: an identity matrix stays one."""
    last = 2 ** (bits - 1) - 1
    return Code(
        bits,
        -last,
        last,
        lambda x: jnp.clip(jnp.round(x * last), -last, last).astype(jnp.int32),
        lambda place: place.astype(jnp.float32) / last,
    )


CODES: Mapping[str, Code] = MappingProxyType(
    {
        "dynamic": _signed_dynamic(),
        "dynamic_unsigned": _unsigned_dynamic(),
        "int8": _linear(8),
        "int4": _linear(4),
    }
)


def neighbour(code: Code, x: jax.Array, key: jax.Array) -> jax.Array:
    """Places of one of the two numbers around each x, at random, so that their mean is x.

    Numbers outside the code go to its ends.
    """
    nearest = code.encode(x)
    below = jnp.clip(nearest - (code.decode(nearest) > x), code.lowest, code.highest - 1)
    low, high = code.decode(below), code.decode(below + 1)
    return below + (_sharding.uniform(key, x) < (x - low) / (high - low))
