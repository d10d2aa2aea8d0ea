"""Averages over the devices of a mapped axis."""

from typing import Any

import jax
import jax.numpy as jnp

AxisName = str | tuple[str, ...] | None


def averaged(tree: Any, axis_name: AxisName, dtype: Any = None) -> Any:
    """A tree of arrays, averaged over mapped axes; as it is if there are none.

    With a ``dtype``, arrays of more bits are rounded to it first.
    """
    if axis_name is None:
        return tree
    if dtype is None:
        return jax.lax.pmean(tree, axis_name)  # one collective for all
    return jax.tree.map(lambda x: _mean(x, axis_name, dtype), tree)


def averaged_as(tree: Any, like: Any, axis_name: AxisName) -> Any:
    """A tree of arrays, averaged as those of another one would be: see `sent_as`."""
    if axis_name is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    pairs = zip(leaves, jax.tree.leaves(like), strict=True)
    return jax.tree.unflatten(treedef, [_mean(x, axis_name, sent_as(y.dtype)) for x, y in pairs])


def sent_as(dtype: Any) -> Any:
    """The dtype in which what is computed of gradients of a dtype is averaged; None: as it is.

    What is computed of bfloat16 gradients in float32 is sent in bfloat16, as they would be: half
    the bytes. float16 has too small a range for a projection.
    """
    return jnp.bfloat16 if dtype == jnp.bfloat16 else None


def _mean(x: jax.Array, axis_name: AxisName, dtype: Any) -> jax.Array:
    narrower = dtype is not None and jnp.dtype(dtype).itemsize < x.dtype.itemsize
    return jax.lax.pmean(x.astype(dtype) if narrower else x, axis_name).astype(x.dtype)


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


def checked_average_dtype(dtype: Any) -> str | None:
    """The name of the dtype in which averages are made, or None.

    Raises:
      ValueError: if it is neither bfloat16 nor float32. (float16 has too small a range.)
    """
    for found in (jnp.bfloat16, jnp.float32):
        names = (found, found.dtype, found.dtype.type, found.dtype.name)
        if any(isinstance(dtype, type(name)) and dtype == name for name in names):
            return str(found.dtype.name)
    if dtype is None:
        return None
    raise ValueError(
        f"`average_dtype`, in which devices average sketches, must be 'bfloat16', 'float32', or "
        f"None for as they are computed; got {dtype!r}."
    )
