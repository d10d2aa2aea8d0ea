"""Products on bfloat16 tensor cores, of matrices that hold more than bfloat16 does.

A float32 number is the sum of three bfloat16 ones, and of two up to 2⁻¹⁷ of its size. Products of
bfloat16 numbers are exact in float32, so a float32 product is a few of them, at many times the
speed of float32 arithmetic.

References:
    Henry, Tang, Heinecke, `Leveraging the bfloat16 artificial intelligence datatype for
    higher-precision computations <https://arxiv.org/abs/1904.06376>`_, 2019.
"""

import jax
import jax.numpy as jnp
from jax import lax

from optax_gale import _sharding
from optax_gale._products import einsum

GRAM = "...mi,...mj->...ij"
TIMES = "...mi,...ij->...mj"


def rounded(x: jax.Array) -> jax.Array:
    """Returns float32 ``x`` in bfloat16, in a way that makes everyone read the rounded numbers.

    Of a mere cast, compilers may give those who cast back what was there before.
    """
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7).astype(jnp.bfloat16)


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns two bfloat16 arrays whose sum is float32 ``x``, up to 2⁻¹⁷ of each entry."""
    high = rounded(x)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def half_product(
    subscripts: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype | type = jnp.float32
) -> jax.Array:
    """Contracts half-precision arrays with sums in float32, rounded to ``dtype`` at the end."""
    if a.dtype == jnp.bfloat16:
        # Asked of the product itself: a cast after it would write and read float32.
        return jnp.einsum(subscripts, a, b, preferred_element_type=dtype)
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32).astype(dtype)


def half_times_split(y: jax.Array, x: jax.Array) -> jax.Array:
    """Returns ``Y X`` in float32 for bfloat16 ``Y`` and float32 ``X``, rounded to 2⁻¹⁷ of it."""
    high, low = split(x)
    return half_product(TIMES, y, high) + half_product(TIMES, y, low)


def split_times(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns ``A B`` of float32 matrices, with errors of about 2⁻¹⁷ of ``|A| |B|``."""
    return _long_product(TIMES, a, b, -1, -2)


def split_gram(a: jax.Array) -> jax.Array:
    """Returns ``AᵀA`` of float32 matrices, with errors of about 2⁻¹⁷ of ``|Aᵀ| |A|``."""
    high, low = split(a)
    mixed = half_product(GRAM, high, low)
    return half_product(GRAM, high, high) + (mixed + jnp.swapaxes(mixed, -1, -2))


def split_einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    r"""Contracts two float32 arrays at the speed of tensor cores; errors are below 2⁻¹⁵ |A| |B|.

    On an NVIDIA GPU, float32 operands are split into two bfloat16 parts each, and three of the four
    products of parts are summed in float32; the fourth is below the error. Everywhere else, and for
    other dtypes or operands sharded over Explicit mesh axes, it is `einsum`.

    Args:
        subscripts: explicit einsum subscripts of two operands that share one contracted axis, with
            the batch axes before it, such as ``"...rs,...sn->...rn"``.
        a: floating-point array.
        b: floating-point array.

    Returns:
        The contraction, float32 or float64.

    Raises:
        TypeError: an operand is complex.
        ValueError: ``subscripts`` lacks ``->``, or contracts not just one axis.

    Example:
        >>> import jax.numpy as jnp
        >>> from optax_gale.linalg import split_einsum
        >>> split_einsum("rs,sn->rn", jnp.ones((2, 3)), jnp.ones((3, 4))).tolist()[0]
        [3.0, 3.0, 3.0, 3.0]

    References:
        Henry, Tang, Heinecke, `Leveraging the bfloat16 artificial intelligence datatype for
        higher-precision computations <https://arxiv.org/abs/1904.06376>`_, 2019.
    """
    parts = subscripts.replace("->", ",").split(",") if "->" in subscripts else []
    left, right, result = parts if len(parts) == 3 else [""] * 3
    summed = (set(left) & set(right)) - set(result) - {"."}
    if len(summed) != 1:
        raise ValueError(
            "subscripts must name the result and contract one axis, as in '...rs,...sn->...rn'; "
            f"got {subscripts!r}."
        )
    is_float32 = a.dtype == b.dtype == jnp.float32
    if not (is_fast() and is_float32) or any(any(_sharding.spec_of(x)) for x in (a, b)):
        return einsum(subscripts, a, b)
    if jax.device_count() > 1:  # where the axis may be spread over devices, unseen
        (a_high, a_low), (b_high, b_low) = split(a), split(b)
        mixed = half_product(subscripts, a_high, b_low) + half_product(subscripts, a_low, b_high)
        return half_product(subscripts, a_high, b_high) + mixed
    axis = summed.pop()
    return _long_product(
        subscripts, a, b, left.index(axis) - len(left), right.index(axis) - len(right)
    )


def _long_product(subscripts: str, a: jax.Array, b: jax.Array, i: int, j: int) -> jax.Array:
    """One product over a longer axis: its three parts are added up where they are computed."""
    (a_high, a_low), (b_high, b_low) = split(a), split(b)
    return half_product(
        subscripts,
        jnp.concatenate([a_high, a_low, a_high], axis=i),
        jnp.concatenate([b_high, b_high, b_low], axis=j),
    )


def is_fast() -> bool:
    """Whether the device has tensor cores for bfloat16: an NVIDIA GPU from Ampere on."""
    device = jax.devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return False
    return float(getattr(device, "compute_capability", 0)) >= 8
