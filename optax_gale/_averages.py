"""Averages over the devices of a mapped axis."""

from typing import Any

import jax
import jax.numpy as jnp

AxisName = str | tuple[str, ...] | None


def averaged(x: Any, axis_name: AxisName, dtype: Any = None) -> Any:
    """A tree of arrays, averaged over mapped axes; as it is if there are none.

    With a ``dtype``, what has more bits is rounded to it to be averaged.
    """
    if axis_name is None:
        return x
    if dtype is None:
        return jax.lax.pmean(x, axis_name)

    def one(x: jax.Array) -> jax.Array:
        sent = dtype if x.dtype.itemsize > jnp.dtype(dtype).itemsize else x.dtype
        return jax.lax.pmean(x.astype(sent), axis_name).astype(x.dtype)

    return jax.tree.map(one, x)


def averaged_as(tree: Any, like: Any, axis_name: AxisName) -> Any:
    """A tree of arrays, averaged as those of another one would be.

    What is computed of bfloat16 gradients in float32 is sent in bfloat16, as they would be: half
    the bytes. float16 has too small a range for a projection.
    """
    if axis_name is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)

    def one(x: jax.Array, y: jax.Array) -> jax.Array:
        dtype = y.dtype if y.dtype == jnp.bfloat16 else x.dtype
        return jax.lax.pmean(x.astype(dtype), axis_name).astype(x.dtype)

    pairs = zip(leaves, jax.tree.leaves(like), strict=True)
    return jax.tree.unflatten(treedef, [one(x, y) for x, y in pairs])


def varying(x: Any, axis_name: AxisName) -> Any:
    """A tree of arrays, each device's own along mapped axes, though all are alike.

    Derivatives with respect to it are the device's own too: with respect to what is the same on
    all devices, `jax.shard_map` sums them.
    """
    if axis_name is None:
        return x

    def cast(x: jax.Array) -> jax.Array:
        try:
            return jax.lax.pcast(x, axis_name, to="varying")
        except ValueError:  # it is, or the axis is one of `jax.vmap`, which knows no difference
            return x

    return jax.tree.map(cast, x)


def all_there(tree: Any) -> Any:
    """Arrays of which each is there before anything is computed of any."""
    leaves, treedef = jax.tree.flatten(tree)
    # To JAX 0.10, all that comes out of a barrier varies over devices if anything in it does.
    alike: dict[Any, list[int]] = {}
    for i, x in enumerate(leaves):
        alike.setdefault(getattr(jax.typeof(x), "manual_axis_type", None), []).append(i)
    for places in alike.values():
        through = jax.lax.optimization_barrier([leaves[i] for i in places])
        for i, x in zip(places, through, strict=True):
            leaves[i] = x
    return jax.tree.unflatten(treedef, leaves)


def checked_axis_name(axis_name: Any) -> AxisName:
    """An axis name, or a tuple of them, or None.

    Raises:
      TypeError: if it is something else.
    """
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    is_tuple = isinstance(names, (tuple, list)) and len(names) > 0
    if axis_name is not None and not (is_tuple and all(isinstance(n, str) for n in names)):
        raise TypeError(
            f"`axis_name` must be the name of a mapped axis, a tuple of names, or None, got "
            f"{axis_name!r}."
        )
    return axis_name if axis_name is None or isinstance(axis_name, str) else tuple(axis_name)


def checked_average_dtype(dtype: Any) -> Any:
    """The dtype of averages, or None.

    Raises:
      ValueError: if it is neither bfloat16 nor float32, which alone have the range for them.
    """
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"`average_dtype` must be 'bfloat16', 'float32' or None, got {dtype!r}.")
    return found
