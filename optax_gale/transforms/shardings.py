"""Keeping arrays where they are on a mesh with Explicit axes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from optax_gale._sharding import match as match


def explicit_spec(x: Any) -> tuple[Any, ...] | None:
    """One entry an axis of an array whose mesh has Explicit axes; None for any other array."""
    if not isinstance(x, jax.Array):
        return None
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return tuple(sharding.spec) + (None,) * (x.ndim - len(sharding.spec))


def place_like(x: jax.Array, like: Any, names: Callable[[Sequence[Any]], Sequence[Any]]) -> Any:
    """Shards ``x`` as ``names`` derives it from the axes of ``like``; Explicit meshes only."""
    spec = explicit_spec(like)
    if spec is None:
        return x
    return jax.sharding.reshard(x, PartitionSpec(*names(spec)))


def first_element(x: jax.Array) -> jax.Array:
    """An element, as a scalar, of an array whose elements are all alike; compilers can fold it."""
    if any(explicit_spec(x) or ()):
        return jnp.max(x)  # an axis sharded by its type cannot be sliced down to one element
    return x[(0,) * x.ndim]


def alike(tree: Any, old: Any) -> Any:
    """Arrays with the dtypes and shardings of others, as a loop or a conditional must have them."""

    def like(x: jax.Array, y: jax.Array) -> jax.Array:
        if jnp.issubdtype(y.dtype, jax.dtypes.prng_key):
            return x
        return match(jnp.asarray(x, y.dtype), y)

    return jax.tree.map(like, tree, old)
