"""Matrix products whose precision does not depend on the device."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_gale import _sharding


def einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
    r"""Contracts arrays in float32 or better, without copying half-precision operands.

    Operands that are all bfloat16 (or all float16) are multiplied as they are and accumulated in
    float32: each product is exact, so nothing is lost and tensor cores are used. Anything else is
    promoted to float32, or to float64 where an operand is float64, and multiplied at
    ``Precision.HIGHEST``: the default of recent GPUs would round float32 to TF32.

    On a mesh with Explicit axes, a result keeps the sharding of the operands' dimensions, and
    contracted dimensions are summed over the devices that share them.

    Args:
        subscripts: explicit einsum subscripts, such as ``"...mn,nk->...mk"``.
        *operands: floating-point arrays.

    Returns:
        The contraction, float32 or float64.

    Raises:
        TypeError: an operand is complex.
        ValueError: ``subscripts`` lacks ``->``.

    Example:
        >>> import jax.numpy as jnp
        >>> from optax_gale.linalg import einsum
        >>> x = jnp.ones((2, 3, 4), jnp.bfloat16)
        >>> y = einsum("...mn,nk->...mk", x, jnp.ones((4, 5), jnp.bfloat16))
        >>> y.shape, y.dtype
        ((2, 3, 5), dtype('float32'))
    """
    if "->" not in subscripts:
        raise ValueError(f"subscripts must name the result, as in 'mn,nk->mk'; got {subscripts!r}.")
    arrays = [jnp.asarray(x) for x in operands]
    dtypes = {x.dtype for x in arrays}
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        raise TypeError(f"operands must be real; got {', '.join(str(x.dtype) for x in arrays)}.")
    if dtypes == {jnp.dtype(jnp.bfloat16)} or dtypes == {jnp.dtype(jnp.float16)}:
        precision, accumulator = None, jnp.float32
    else:
        precision = jax.lax.Precision.HIGHEST
        accumulator = working_dtype(*arrays)
        arrays = [x.astype(accumulator) for x in arrays]
    arrays, out_sharding = _sharding.einsum_layout(subscripts, arrays)
    return jnp.einsum(
        subscripts,
        *arrays,
        precision=precision,
        preferred_element_type=accumulator,
        out_sharding=out_sharding,
    )


def working_dtype(*arrays: jax.Array) -> jnp.dtype:
    """Returns float64 where any of ``arrays`` is float64, else float32."""
    is_double = any(x.dtype == jnp.float64 for x in arrays)
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


def operand(x: jax.Array, like: Any) -> jax.Array:
    """Casts to half precision where the other operand is: tensor cores want both alike."""
    return x.astype(like) if jnp.dtype(like).itemsize < 4 else x


def operand_dtype(like: Any) -> Any:
    """The dtype in which `operand` leaves a float32 array."""
    return like if jnp.dtype(like).itemsize < 4 else jnp.float32
