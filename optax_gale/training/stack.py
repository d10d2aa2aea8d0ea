"""An optimizer's state and its parameters, layer by layer of a stack.

A layer is a slice of length 1, not an element: dimension numbers and batch axes keep their meaning,
and a state its structure. Leaves that take no part are replaced by ``optax.MaskedNode``, as in
``optax.masked``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from optax_gale.transforms import dataflow, storage, trees


def take(tree: Any, layer: jax.Array) -> Any:
    """A layer of every array, as a slice."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, layer, 1), tree)


def take_all_first(tree: Any, layer: jax.Array) -> Any:
    """`take`, of everything before any of it is used.

    So what is `put` back cannot precede a reading of what it replaces; compilers, which would
    otherwise have to copy whole stacks, can do it in place.
    """
    return jax.lax.optimization_barrier(take(tree, layer))


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

    def __init__(self, params: Any, layers: str):
        """Finds the leaves below the path ``layers``.

        Raises:
          ValueError: if they do not have a leading axis of one length.
        """
        found = jax.tree_util.tree_flatten_with_path(params, is_leaf=storage.is_stored)
        entries, self._treedef = found[0], cast(Any, found[1])
        self.key_paths = [path for path, _ in entries]
        self.paths = [jax.tree_util.keystr(p, simple=True, separator="/") for p in self.key_paths]
        self.is_stacked = [path.startswith(layers + "/") for path in self.paths]
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
        (self.length,) = next(iter(lengths.values()))
        if not self.length:
            raise ValueError(f"The parameters in '{layers}' have no layers: {lengths}.")

    def leaves(self, tree: Any) -> list[Any]:
        """Leaves of a whole tree, in their boxes."""
        return self._treedef.flatten_up_to(tree)

    def stacked(self, tree: Any) -> list[Any]:
        """The stacked leaves of a whole tree."""
        return [x for x, yes in zip(self.leaves(tree), self.is_stacked, strict=True) if yes]

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

    An array belongs to the leaf whose place in the parameters ends its own path. Its kind is
    ``"layer"``, one entry a layer of a stacked leaf; ``"stack"``, one for a whole stacked leaf,
    such as a placeholder; ``"other"``, of a leaf that is not stacked; ``"all"``, of no leaf, such
    as a step counter.
    """

    LAYER = ("layer", "stack", "all")
    OTHERS = ("other", "all")

    def __init__(self, state: Any, parameters: Parameters):
        """Sorts the arrays of ``state``."""
        entries, treedef = jax.tree_util.tree_flatten_with_path(state, is_leaf=storage.is_stored)
        self._treedef: Any = treedef
        self._kinds = [_kind(path, x, parameters) for path, x in entries]
        self._names = [jax.tree_util.keystr(path) for path, _ in entries]

    def parts(self, state: Any) -> dict[str, list[Any]]:
        """The arrays of a whole state, by kind."""
        return self._sorted(self._kinds, self._treedef.flatten_up_to(state))

    def names(self, kind: str) -> list[str]:
        """Where in the state the arrays of a kind are."""
        return [name for name, k in zip(self._names, self._kinds, strict=True) if k == kind]

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


def _kind(path: tuple[Any, ...], x: Any, parameters: Parameters) -> str:
    longest_first = sorted(enumerate(parameters.key_paths), key=lambda pair: -len(pair[1]))
    owner = next((i for i, end in longest_first if trees.endswith(path, end)), None)
    if owner is None:
        return "all"
    if not parameters.is_stacked[owner]:
        return "other"
    lengths = {a.shape[:1] for a in jax.tree.leaves(x)}
    return "layer" if lengths == {(parameters.length,)} else "stack"


def check_separable(
    tx: optax.GradientTransformationExtraArgs, params: Any, state: Any, parameters: Parameters
) -> None:
    """Raises ValueError unless every leaf's update depends on that leaf's gradient alone.

    The program is read, not run, with stacks of a single layer.
    """
    layout = State(state, parameters)
    whole = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    first = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), tree
    )
    parts = {k: (first if k == "layer" else whole)(x) for k, x in layout.parts(state).items()}
    small_state = layout.whole(parts, tuple(parts))
    small = parameters.whole(first(parameters.stacked(params)), whole(parameters.others(params)))
    numbers = list(range(len(parameters.paths)))

    def step(grads: Any, state: Any, params: Any) -> Any:
        # Without the refresh, in which matrices may share a call though they do not mix.
        layer = jnp.zeros((), jnp.int32)
        updates, new = tx.update(grads, state, params, refresh=False, layer=layer)
        after = layout.parts(new)
        _check_shapes(layout, parts, after)
        return parameters.leaves(updates), after["stack"], after["all"]

    watched = [*numbers, *[None] * (len(jax.tree.leaves(small_state)) + len(numbers))]
    found = dataflow.sources(step, (small, small_state, small), watched)
    for i, on in enumerate(found[: len(numbers)]):
        if on - {i}:
            other = parameters.paths[min(on - {i})]
            raise ValueError(
                f"The update of '{parameters.paths[i]}' depends on the gradient of '{other}', but "
                "layer by layer no two gradients exist at once. Take a transformation that mixes "
                "leaves out of the optimizer: for clipping by the global norm there is `clip_norm`."
            )
    shared = [*layout.names("stack"), *layout.names("all")]
    for name, on in zip(shared, found[len(numbers) :], strict=True):
        if on:
            raise ValueError(
                f"The optimizer's state{name} depends on the gradient of "
                f"'{parameters.paths[min(on)]}' and is not kept layer by layer, so layers cannot "
                "take their steps one after another. Use a transformation that keeps it for every "
                "matrix, or put it outside of `layerwise`."
            )


def _check_shapes(layout: State, before: Any, after: Any) -> None:
    for kind, arrays in before.items():
        for name, x, y in zip(layout.names(kind), arrays, after[kind], strict=True):
            shapes = [[a.shape for a in jax.tree.leaves(tree)] for tree in (x, y)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"The optimizer's state{name} has shape {shapes[0][0]} for a single layer, but "
                    f"its update makes {shapes[1][0]}: it treats the axis of layers as one of the "
                    "weight's own. Use a transformation that treats the layers of a stack alike."
                )
