"""Weights in 8 bits: what holds them, and what they stand for."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_gale.quantization import BLOCK_SIZE
from optax_gale.quantization.blockwise import checked_block_size
from optax_gale.transforms import selection, storage, trees
from optax_gale.transforms.selection import Select


def quantize_weights(params: Any, *, select: Select = None, block_size: int = BLOCK_SIZE) -> Any:
    r"""Puts weight matrices into 8 bits, for training with `layerwise`.

    A weight becomes a `quantization.Quantized`: a byte an element, evenly spaced, in blocks along
    the last axis, each with a float32 scale. `layerwise` computes with what it stands for, one
    layer at a time, and rounds new weights at random, right on average, so that updates smaller
    than the distance of two numbers are not lost.

    Args:
      params: parameters, of floating point.
      select: which leaves; as in `gale`. None: the matrices that it projects by default, so that
        embeddings, the head, norms and biases stay as they are.
      block_size: elements that share a scale.

    Returns:
      A tree like ``params``, leaves that were chosen quantised. Weights that would not shrink stay.

    Raises:
      TypeError: if ``block_size`` is no int.
      ValueError: if it is less than 1.

    Example:
      >>> import jax, jax.numpy as jnp, optax_gale
      >>> params = {"embed": jnp.ones((100, 512)), "layers": {"up": jnp.ones((4, 512, 1024))}}
      >>> q = optax_gale.quantize_weights(params)
      >>> q["layers"]["up"].codes.dtype, q["layers"]["up"].scales.shape, q["embed"].dtype
      (dtype('int8'), (4, 512, 4), dtype('float32'))
      >>> optax_gale.dequantize_weights(q)["layers"]["up"].shape
      (4, 512, 1024)

    References:
      Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024, section 3.4.
    """
    block_size = checked_block_size(block_size)
    leaves, treedef = trees.flatten(params)
    boxed = treedef.flatten_up_to(params)
    chosen = selection.choose(
        params, leaves, rank=1, side="short", select=select, weight_dimension_numbers=None
    )
    out = []
    for leaf, x, choice in zip(leaves, boxed, chosen, strict=True):
        shrinks = choice.projection is not None and storage.shrinks(
            leaf.value.shape, leaf.value.dtype, "int8", block_size
        )
        out.append(storage.quantized(x, "int8", block_size) if shrinks else x)
    return treedef.unflatten(out)


def dequantize_weights(params: Any, dtype: Any = None) -> Any:
    """The weights that quantised ones stand for.

    Args:
      params: a tree with `quantization.Quantized` leaves among others.
      dtype: of those; None for that of the arrays that were quantised.

    Returns:
      The tree with arrays in their places, in the boxes that they had.

    Raises:
      TypeError: if ``dtype`` is no floating type.
    """
    value = lambda x: (
        storage.boxed_value(x, storage.value(x, dtype)) if storage.is_quantized(x) else x
    )
    return jax.tree.map(value, params, is_leaf=storage.is_stored)


def any_quantized(params: Any) -> bool:
    """Whether a tree has quantised leaves."""
    return any(map(storage.is_quantized, jax.tree.leaves(params, is_leaf=storage.is_stored)))


def like(old: Sequence[Any], new: Sequence[Any], paths: Sequence[str], key: Any) -> list[Any]:
    """New weights, stored as the old ones are; those in 8 bits are rounded at random."""
    out = []
    for x, y, path in zip(old, new, paths, strict=True):
        if storage.is_quantized(x):
            own = trees.fold_in_path(key, path)
            value = trees.unbox(y).astype(jnp.float32)
            q = storage.quantized_as(storage.unboxed(x), value, own)
            y = storage.boxed_as(x, dataclasses.replace(q, dtype=x.dtype))
        out.append(y)
    return out
