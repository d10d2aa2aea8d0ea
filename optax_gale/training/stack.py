"""An optimizer's state and its parameters, layer by layer of a stack.

A layer is a slice of length 1, not an element: dimension numbers and batch axes keep their meaning,
and a state its structure. Leaves that take no part are replaced by ``optax.MaskedNode``, as in
``optax.masked``.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from optax_gale._averages import all_there
from optax_gale.transforms import shardings, storage, trees


def take(tree: Any, layer: jax.Array) -> Any:
    """A layer of every array, as a slice."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, layer, 1), tree)


def take_all_first(tree: Any, layer: jax.Array) -> Any:
    """`take`, of everything before any of it is used.

    So what is `put` back cannot precede a reading of what it replaces; compilers, which would
    otherwise have to copy whole stacks, can do it in place.
    """
    return all_there(take(tree, layer))


def put(tree: Any, layers: Any, layer: jax.Array) -> Any:
    """Replaces a layer of every array."""
    replace = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), layer, 0)
    return jax.tree.map(replace, tree, layers)


class Parameters:
    """Where the stacked leaves of a parameter tree are.

    Attributes:
      length: number of layers.
      is_stacked: for every leaf, whether it has a leading axis of layers.
    """

    def __init__(self, params: Any, keys: tuple[str, ...]):
        """Finds the leaves that ``keys`` lead to.

        Raises:
          ValueError: if they do not have a leading axis of one length, or one that is sharded.
        """
        found = jax.tree_util.tree_flatten_with_path(params, is_leaf=storage.is_stored)
        entries, self._treedef = found[0], cast(Any, found[1])
        self.key_paths = [path for path, _ in entries]
        self.paths = [jax.tree_util.keystr(p, simple=True, separator="/") for p in self.key_paths]
        self.is_stacked = [_names(path)[: len(keys)] == keys for path in self.key_paths]
        layers = "/".join(keys)
        lengths = {
            path: jnp.shape(storage.unboxed(x))[:1]
            for path, (_, x), is_stacked in zip(self.paths, entries, self.is_stacked, strict=True)
            if is_stacked
        }
        if len(set(lengths.values())) != 1 or () in lengths.values():
            raise ValueError(
                f"The parameters in '{layers}' must have a leading axis of one length, the number "
                f"of layers; the leading axes are {lengths}."
            )
        for path, (_, x), is_stacked in zip(self.paths, entries, self.is_stacked, strict=True):
            spec = shardings.explicit_spec(trees.unbox(x)) if is_stacked else None
            if spec is not None and spec[0] is not None:
                raise ValueError(
                    f"'{path}' is sharded along its axis of layers ({spec}), by its type: layers "
                    "cannot be taken one by one from an Explicit mesh. Shard another axis."
                )
        (self.length,) = next(iter(lengths.values()))
        if not self.length:
            raise ValueError(f"The parameters in '{layers}' have no layers: {lengths}.")

    def leaves(self, tree: Any) -> list[Any]:
        """Leaves of a whole tree, in their boxes."""
        return self._treedef.flatten_up_to(tree)

    def stacked(self, tree: Any) -> list[Any]:
        """The stacked leaves of a whole tree."""
        return [x for x, yes in zip(self.leaves(tree), self.is_stacked, strict=True) if yes]

    def others_by_path(self, tree: Any) -> list[Any]:
        """The other leaves, from a tree without the stacked ones, which may sort its keys anew."""
        found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=storage.is_stored)
        by_path = {_names(path): x for path, x in found}
        places = zip(self.key_paths, self.is_stacked, strict=True)
        return [by_path[_names(path)] for path, is_stacked in places if not is_stacked]

    def others(self, tree: Any) -> list[Any]:
        """The other leaves of a whole tree."""
        return [x for x, yes in zip(self.leaves(tree), self.is_stacked, strict=True) if not yes]

    @property
    def stacked_paths(self) -> list[str]:
        """Paths of the stacked leaves."""
        return [x for x, yes in zip(self.paths, self.is_stacked, strict=True) if yes]

    @property
    def other_paths(self) -> list[str]:
        """Paths of the other leaves."""
        return [x for x, yes in zip(self.paths, self.is_stacked, strict=True) if not yes]

    def whole(self, stacked: Sequence[Any], others: Sequence[Any]) -> Any:
        """The tree of some leaves."""
        pick = {True: iter(stacked), False: iter(others)}
        return self._treedef.unflatten([next(pick[yes]) for yes in self.is_stacked])

    def of_layer(self, stacked: Sequence[Any]) -> Any:
        """The tree with stacked leaves only."""
        return self.whole(stacked, [optax.MaskedNode()] * self.is_stacked.count(False))

    def of_others(self, others: Sequence[Any]) -> Any:
        """The tree without them."""
        return self.whole([optax.MaskedNode()] * self.is_stacked.count(True), others)


class State:
    """Which arrays of an optimizer's state are whose.

    An array belongs to a leaf if it stands at the leaf's place in a tree like the parameters. Its
    kind is ``"layer"``, one entry a layer of a stacked leaf; ``"stack"``, one for a whole stacked
    leaf, such as a placeholder; ``"other"``, of a leaf that is not stacked; ``"all"``, of no leaf,
    such as a step counter.
    """

    LAYER = ("layer", "stack", "all")
    OTHERS = ("other", "all")

    def __init__(self, state: Any, parameters: Parameters):
        """Sorts the arrays of ``state``."""
        entries, treedef = jax.tree_util.tree_flatten_with_path(state, is_leaf=storage.is_stored)
        self._treedef: Any = treedef
        self._names = [jax.tree_util.keystr(path) for path, _ in entries]
        self.owners = owners([path for path, _ in entries], parameters.key_paths)
        self._kinds = [
            _kind(x, owner, parameters) for (_, x), owner in zip(entries, self.owners, strict=True)
        ]

    def parts(self, state: Any) -> dict[str, list[Any]]:
        """The arrays of a whole state, by kind."""
        return self._sorted(self._kinds, self._treedef.flatten_up_to(state))

    def of_kind(self, kind: str) -> list[tuple[str, int | None]]:
        """Where in the state the arrays of a kind are, and the leaves that they belong to."""
        rows = zip(self._names, self.owners, self._kinds, strict=True)
        return [(name, owner) for name, owner, k in rows if k == kind]

    def whole(self, parts: Mapping[str, Sequence[Any]], kinds: Sequence[str]) -> Any:
        """The state that has arrays of some kinds only."""
        pick = {kind: iter(parts[kind]) for kind in kinds}
        return self._treedef.unflatten(
            [next(pick[kind]) if kind in pick else optax.MaskedNode() for kind in self._kinds]
        )

    def parts_of(self, state: Any, kinds: Sequence[str]) -> dict[str, list[Any]]:
        """The arrays of such a state, by kind."""
        entries = jax.tree.leaves(state, is_leaf=storage.is_stored)
        return self._sorted([kind for kind in self._kinds if kind in kinds], entries)

    @staticmethod
    def _sorted(kinds: Sequence[str], entries: Sequence[Any]) -> dict[str, list[Any]]:
        parts: dict[str, list[Any]] = {"layer": [], "stack": [], "other": [], "all": []}
        for kind, x in zip(kinds, entries, strict=True):
            parts[kind].append(x)
        return parts


def owners(
    paths: Sequence[tuple[Any, ...]], key_paths: Sequence[tuple[Any, ...]]
) -> list[int | None]:
    """The leaf that each array of a state belongs to.

    What precedes a leaf's place must lead to a tree like the parameters: all arrays below it are at
    places of leaves. A hyperparameter that is named like a parameter is none of its.
    """
    places = {path: i for i, path in enumerate(key_paths)}
    below: Counter[Any] = Counter()
    placed: Counter[Any] = Counter()
    for path in paths:
        for i in range(len(path)):
            below[path[:i]] += 1
            placed[path[:i]] += path[i:] in places
    found: list[int | None] = []
    for path in paths:
        fitting = [i for i in range(len(path)) if placed[path[:i]] == below[path[:i]]]
        found.append(places[path[fitting[0] :]] if fitting else None)
    return found


def _kind(x: Any, owner: int | None, parameters: Parameters) -> str:
    if owner is None:
        return "all"
    if not parameters.is_stacked[owner]:
        return "other"
    lengths = {a.shape[:1] for a in jax.tree.leaves(x)}
    return "layer" if lengths == {(parameters.length,)} else "stack"


def own_key(x: Any, layer: jax.Array) -> Any:
    """Of a PRNG key that layers share, one for a layer; anything else as it is."""
    dtype = getattr(x, "dtype", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not is_typed and not (dtype == jnp.uint32 and x.shape == (2,)):
        return x
    return jax.random.fold_in(x, layer)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The entries of a key path, by name."""
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)
