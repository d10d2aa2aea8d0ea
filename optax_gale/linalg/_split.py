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

GRAM = "...mi,...mj->...ij"
TIMES = "...mi,...ij->...mj"


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns two bfloat16 arrays whose sum is float32 ``x``, up to 2⁻¹⁷ of each entry."""
    # Not a cast to bfloat16 and back, which compilers may take for the identity.
    high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


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
    (a_high, a_low), (b_high, b_low) = split(a), split(b)
    # One product over a longer axis: its three parts are added up where they are computed.
    return half_product(
        TIMES,
        jnp.concatenate([a_high, a_low, a_high], axis=-1),
        jnp.concatenate([b_high, b_high, b_low], axis=-2),
    )


def split_gram(a: jax.Array) -> jax.Array:
    """Returns ``AᵀA`` of float32 matrices, with errors of about 2⁻¹⁷ of ``|Aᵀ| |A|``."""
    high, low = split(a)
    mixed = half_product(GRAM, high, low)
    return half_product(GRAM, high, high) + (mixed + jnp.swapaxes(mixed, -1, -2))
