"""Parameter trees: leaves with names, boxed or not, and per-leaf options.

A *box* is what Flax wraps around an array to carry the names of its axes: Linen's
``nn.Partitioned`` or an NNX ``Variable``. Boxes are leaves here, so that an array and its names
travel together, and are recognised by their protocol: this module never imports Flax.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax


class Leaf(NamedTuple):
    """One array of a parameter tree.

    Attributes:
      path: the leaf's place in the tree, keys joined by ``/``.
      value: the array, or anything with ``shape`` and ``dtype``.
      box: the Flax box that held the array, or None.
    """

    path: str
    value: Any
    box: Any


def is_box(x: Any) -> bool:
    """True for Linen's ``AxisMetadata`` boxes and for NNX variables."""
    if isinstance(x, type):
        return False
    return hasattr(x, "replace_boxed") or (hasattr(x, "get_metadata") and hasattr(x, "get_value"))


def unbox(x: Any) -> Any:
    """The array inside a box; anything else as it is."""
    if not is_box(x):
        return x
    return x.unbox() if hasattr(x, "replace_boxed") else x.get_value()


def box_names(box: Any) -> tuple[Any, ...] | None:
    """The names of a box's axes, or None where it has none."""
    if box is None:
        return None
    names = box.names if hasattr(box, "names") else box.get_metadata().get("out_sharding")
    return None if names is None else tuple(names)


def rebox(box: Any, value: Any, names: Sequence[Any] | None = None) -> Any:
    """Puts ``value`` into a copy of ``box``, with other axis names where they are given."""
    if box is None:
        return value
    if names is None or box_names(box) is None:
        return box.replace_boxed(value) if hasattr(box, "replace_boxed") else box.replace(value)
    if hasattr(box, "replace_boxed"):
        return box.replace(value=value, names=tuple(names))
    return box.replace(value, out_sharding=tuple(names))


def flatten(tree: Any) -> tuple[list[Leaf], Any]:
    """Flattens a tree into named leaves; ``None`` and ``optax.MaskedNode`` hold no leaf."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)
    return [
        Leaf(
            jax.tree_util.keystr(path, simple=True, separator="/"),
            _as_array(unbox(x)),
            x if is_box(x) else None,
        )
        for path, x in leaves
    ], treedef


def flatten_like(treedef: Any, name: str, tree: Any, of: str) -> list[Any]:
    """What stands in a tree at the places of another one's leaves.

    Args:
      treedef: the other tree's structure.
      name: what the tree is called, for the error.
      tree: the tree.
      of: what the other tree is called.

    Raises:
      ValueError: if the tree has another structure.
    """
    try:
        return treedef.flatten_up_to(tree)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`{name}` does not have the structure of the {of}: {jax.tree.structure(tree)} "
            f"against {treedef}. Gradients, parameters, and the parameters that `init` made the "
            "state for must be trees of one structure."
        ) from error


def check_updates(updates: Any, params: Any) -> None:
    """Raises ValueError unless updates have the structure and the shapes of the parameters."""
    leaves, treedef = flatten(params)
    for leaf, update in zip(
        leaves, flatten_like(treedef, "updates", updates, "parameters"), strict=True
    ):
        if not is_nothing(update) and np.shape(unbox(update)) != leaf.value.shape:
            raise ValueError(
                f"The update of '{leaf.path}' has shape {np.shape(unbox(update))}, but the "
                f"parameter has shape {leaf.value.shape}. Pass gradients of these parameters."
            )


def _as_array(x: Any) -> Any:
    """A Python number as an array, which JAX takes it for; anything else as it is."""
    return x if hasattr(x, "shape") else np.asarray(x, jax.dtypes.canonicalize_dtype(type(x)))


def is_nothing(x: Any) -> bool:
    """True for the two ways Optax leaves a place of a tree empty."""
    return x is None or isinstance(x, optax.MaskedNode)


class _Opaque:
    """Keeps a per-leaf option from being taken for a tree of its own."""

    def __init__(self, value: Any):
        self.value = value


def broadcast_prefix(
    name: str, prefix: Any, tree: Any, is_option: Callable[[Any], bool] = lambda _: False
) -> list[Any]:
    """Spreads a prefix tree of options over the leaves of ``tree``.

    Args:
      name: the option's name, for the error.
      prefix: a tree of options whose structure is a prefix of ``tree``'s. ``None`` and
        ``optax.MaskedNode`` count as options.
      tree: the parameters.
      is_option: recognises an option that is a pytree itself (such as dimension numbers).

    Returns:
      The option of every leaf of ``flatten(tree)``, in that order.

    Raises:
      ValueError: if ``prefix`` is not a prefix of ``tree``.
    """

    def spread(option: Any, subtree: Any) -> Any:
        return jax.tree.map(lambda _: _Opaque(option), subtree, is_leaf=is_box)

    try:
        spread_tree = jax.tree.map(
            spread, prefix, tree, is_leaf=lambda x: is_nothing(x) or is_option(x)
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"`{name}` must be a single value, a callable, or a tree whose structure is a prefix "
            f"of the parameters': got {jax.tree.structure(prefix)} for parameters "
            f"{jax.tree.structure(tree, is_leaf=is_box)}."
        ) from error
    return [x.value for x in jax.tree.leaves(spread_tree, is_leaf=lambda x: isinstance(x, _Opaque))]


def per_leaf(name: str, option: Any, tree: Any, leaves: Sequence[Leaf]) -> list[Any]:
    """Resolves an option given as one value, as a callable of (path, leaf), or as a prefix tree."""
    if isinstance(option, (int, float, str, np.number, np.ndarray, jax.Array)) or option is None:
        return [option] * len(leaves)
    if callable(option):
        return [option(leaf.path, leaf.value) for leaf in leaves]
    return broadcast_prefix(name, option, tree)


def fold_in_path(key: jax.Array, path: str) -> jax.Array:
    """A key for what a place in a tree draws, alike wherever the place is the same."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def key_paths(tree: Any) -> list[tuple[Any, ...]]:
    """The key path of every leaf of ``flatten(tree)``."""
    return [path for path, _ in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)[0]]


def endswith(path: tuple[Any, ...], suffix: tuple[Any, ...]) -> bool:
    """Whether a key path of an optimizer's state leads to a parameter's place in a tree."""
    return not suffix or path[len(path) - len(suffix) :] == suffix
