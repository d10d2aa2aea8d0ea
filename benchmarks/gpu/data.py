"""Random inputs, made on the device: nothing is ever timed on zeros."""

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "positive"))
def _normal(seed: jax.Array, scale: Any, *, shape: Any, dtype: Any, positive: bool) -> jax.Array:
    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        x = scale * jax.random.normal(key, shape, jnp.float32)
        return (jnp.abs(x) + 0.1 * scale if positive else x).astype(dtype)

    key = jax.random.key(seed, impl="rbg")  # in no time, where threefry would take longest of all
    if len(shape) < 3:
        return draw(key, shape)
    # A matrix at a time: the generator's float32 never stands in memory whole.
    keys = jax.random.split(key, shape[0])
    return jax.lax.map(lambda k: draw(k, shape[1:]), keys)


def normal(x: Any, seed: int, scale: float = 1.0, positive: bool = False) -> jax.Array:
    """Normal numbers of an array's shape and dtype; their absolute values if ``positive``."""
    return _normal(seed, scale, shape=tuple(x.shape), dtype=jnp.dtype(x.dtype), positive=positive)


def normal_tree(shapes: Tree, seed: int, scale: float = 1.0) -> Tree:
    """Normal numbers of the shapes and dtypes of a tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: normal(x, _seed(seed, path), scale), shapes
    )


def state(shapes: Tree, seed: int) -> Tree:
    """An optimizer's state as if in mid-training: steps taken, moments, near-orthogonal bases."""

    def leaf(path: Any, x: Any) -> jax.Array:
        names = [getattr(key, "name", None) for key in path]
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.ones(x.shape, x.dtype)
        scale = x.shape[-2] ** -0.5 if "projector" in names and x.ndim > 1 else 1.0
        return normal(x, _seed(seed, path), scale, positive="nu" in names)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def _seed(seed: int, path: Any) -> int:
    return zlib.crc32(f"{seed} {jax.tree_util.keystr(path)}".encode()) >> 1
