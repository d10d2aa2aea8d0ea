"""Averages over the devices of a mapped axis."""

from typing import Any

import jax

AxisName = str | tuple[str, ...] | None


def averaged(x: Any, axis_name: AxisName) -> Any:
    """A tree of arrays, averaged over mapped axes; as it is if there are none."""
    return x if axis_name is None else jax.lax.pmean(x, axis_name)


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
