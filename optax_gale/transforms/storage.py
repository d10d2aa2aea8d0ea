"""How an array of a state is kept: as it is, in a Flax box, or quantised.

A quantised array of a boxed parameter holds the boxes inside: codes and scales are arrays with axis
names of their own, since only the codes have the array's last axis.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from optax_gale.quantization import Quantized, dequantize, quantize, quantized_nbytes
from optax_gale.quantization.codes import CodeName
from optax_gale.transforms import trees


def is_quantized(x: Any) -> bool:
    """True for a quantised array."""
    return isinstance(x, Quantized)


def is_stored(x: Any) -> bool:
    """True for what holds one array of a state, and is a pytree itself."""
    return is_quantized(x) or trees.is_box(x)


def unboxed(stored: Any) -> Any:
    """What is stored, without boxes: an array, or a quantised one."""
    if is_quantized(stored):
        codes, scales = trees.unbox(stored.codes), trees.unbox(stored.scales)
        return dataclasses.replace(stored, codes=codes, scales=scales)
    return trees.unbox(stored)


def value(stored: Any, dtype: Any = None) -> Any:
    """The array; a quantised one in its own dtype or in another."""
    x = unboxed(stored)
    return dequantize(x, dtype) if is_quantized(x) else x


def boxed_value(stored: Any, x: Any = None) -> Any:
    """The array of what is stored, or another, in the box that it would have unquantised."""
    x = value(stored) if x is None else x
    box = stored.codes if is_quantized(stored) else stored
    return trees.rebox(box, x) if trees.is_box(box) else x


def shrinks(shape: tuple[int, ...], dtype: Any, code: CodeName, block_size: int) -> bool:
    """Whether an array takes less memory quantised: of short rows, the scales may take more."""
    return quantized_nbytes(shape, code, block_size) < math.prod(shape) * jnp.dtype(dtype).itemsize


def quantized(boxed: Any, code: CodeName, block_size: int) -> Quantized:
    """Quantises an array that a state begins with, in a box or not."""
    q = quantize(_computed(trees.unbox(boxed)), code, block_size=block_size)
    if not trees.is_box(boxed):
        return q
    names = trees.box_names(boxed)
    # Which devices have a block's elements does not say which have its scale.
    of_scales = None if names is None else (*names[:-1], None)
    return dataclasses.replace(
        q, codes=trees.rebox(boxed, q.codes), scales=trees.rebox(boxed, q.scales, of_scales)
    )


def quantized_as(old: Any, x: jax.Array, key: jax.Array | None = None) -> Any:
    """Another array, quantised as the old one without its boxes is; as it is, if that is not."""
    return quantize(x, old.code, block_size=old.block_size, key=key) if is_quantized(old) else x


def quantized_anew(old: Any, x: jax.Array) -> Any:
    """`quantized_as` for an array that may be a constant."""
    return quantized_as(old, _computed(x)) if is_quantized(old) else x


def _computed(x: jax.Array) -> jax.Array:
    """Hides a constant: compilers would quantise its zeros one by one, at length."""
    return jax.lax.optimization_barrier(x)


def boxed_as(old: Any, new: Any) -> Any:
    """What is stored without boxes, in the boxes of the old."""
    if is_quantized(old):
        codes, scales = boxed_as(old.codes, new.codes), boxed_as(old.scales, new.scales)
        return dataclasses.replace(new, codes=codes, scales=scales)
    return trees.rebox(old, new) if trees.is_box(old) else new


def nbytes(stored: Any) -> int:
    """Bytes of the arrays."""
    # Of keys too, which NumPy does not know.
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(stored))
