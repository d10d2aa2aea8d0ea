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

from optax_gale.transforms import dataflow, shardings, storage, trees


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
        self.owners = _owners([path for path, _ in entries], parameters.key_paths)
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


def _owners(
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
    owners: list[int | None] = []
    for path in paths:
        fitting = [i for i in range(len(path)) if placed[path[:i]] == below[path[:i]]]
        owners.append(places[path[fitting[0] :]] if fitting else None)
    return owners


def _kind(x: Any, owner: int | None, parameters: Parameters) -> str:
    if owner is None:
        return "all"
    if not parameters.is_stacked[owner]:
        return "other"
    lengths = {a.shape[:1] for a in jax.tree.leaves(x)}
    return "layer" if lengths == {(parameters.length,)} else "stack"


def check_separable(
    tx: optax.GradientTransformationExtraArgs,
    params: Any,
    state: Any,
    parameters: Parameters,
    extra_args: Mapping[str, Any],
) -> None:
    """Raises ValueError unless every leaf's step depends on that leaf alone.

    The program is read, not run, with stacks of a single layer.
    """
    layout = State(state, parameters)
    parts = layout.parts(state)
    _check_fits(layout, parts, params, parameters)
    whole = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    first = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), tree
    )
    parts = {k: (first if k == "layer" else whole)(x) for k, x in parts.items()}
    small = parameters.whole(first(parameters.stacked(params)), whole(parameters.others(params)))
    numbers = list(range(len(parameters.paths)))

    def step(grads: Any, params: Any, parts: Any) -> Any:
        # Without the refresh, in which matrices may share a call though they do not mix.
        asked = {**extra_args, "refresh": False, "layer": jnp.zeros((), jnp.int32)}
        state = layout.whole(parts, tuple(parts))
        updates, new = tx.update(grads, state, params, **asked)
        after = layout.parts(new)
        _check_shapes(layout, parts, after)
        return parameters.leaves(updates), after

    # Of whom an array is; nobody's are those that layers share.
    owned = [
        owner if kind in ("layer", "other") else None
        for kind in sorted(parts)
        for x, (_, owner) in zip(parts[kind], layout.of_kind(kind), strict=True)
        for _ in jax.tree.leaves(x)
    ]
    try:
        found = dataflow.sources(step, (small, small, parts), [*numbers, *numbers, *owned])
    except _Refused:
        raise
    except Exception as error:
        raise ValueError(
            f"The optimizer does not take the step of a single layer: {error}. The state must come "
            "from `init` with these parameters, and the optimizer must treat the layers of a stack "
            "alike, without reshaping or rearranging leaves."
        ) from error
    _check_sources(layout, parts, parameters, found)


class _Refused(ValueError):
    """An error that says all that there is to say."""


def _check_sources(
    layout: State, parts: Any, parameters: Parameters, found: Sequence[frozenset[int]]
) -> None:
    count = len(parameters.paths)
    for i, on in enumerate(found[:count]):
        if on - {i}:
            raise _Refused(_mixes(f"The update of '{parameters.paths[i]}'", on - {i}, parameters))
    outputs = iter(found[count:])
    for kind in sorted(parts):
        for x, (name, owner) in zip(parts[kind], layout.of_kind(kind), strict=True):
            on = frozenset().union(*(next(outputs) for _ in jax.tree.leaves(x)))
            if kind in ("layer", "other") and on - {owner}:
                raise _Refused(_mixes(f"The optimizer's state{name}", on - {owner}, parameters))
            if kind in ("stack", "all") and on:
                raise _Refused(
                    f"The optimizer's state{name} depends on '{parameters.paths[min(on)]}' and is "
                    "not kept layer by layer, so layers cannot take their steps one after another. "
                    "Use a transformation that keeps it for every matrix, or put it outside of "
                    "`layerwise`."
                )


def _mixes(what: str, others: frozenset[int], parameters: Parameters) -> str:
    return (
        f"{what} depends on '{parameters.paths[min(others)]}', but layer by layer no two gradients "
        "exist at once. Take a transformation that mixes leaves out of the optimizer: for clipping "
        "by the global norm there is `clip_norm`."
    )


def _check_fits(layout: State, parts: Any, params: Any, parameters: Parameters) -> None:
    leaves = parameters.leaves(params)
    for kind in ("layer", "stack"):
        for x, (name, owner) in zip(parts[kind], layout.of_kind(kind), strict=True):
            assert owner is not None
            shape, leaf = jnp.shape(storage.unboxed(x)), jnp.shape(storage.unboxed(leaves[owner]))
            path = parameters.paths[owner]
            if kind == "stack" and len(shape) == len(leaf) and shape[1:] == leaf[1:]:
                raise _Refused(
                    f"The optimizer's state{name} has shape {shape} for '{path}' of shape {leaf}: "
                    "it was made for another number of layers. The state must come from `init` "
                    "with these parameters."
                )
            if ".projector" in name and len(shape) < 3:
                raise _Refused(
                    f"'{path}' of shape {leaf} is projected as one matrix, with the axis of layers "
                    "as one of its sides. Leave it at full rank (`select`, or a rank of None), or "
                    "say with `weight_dimension_numbers` which axes are its own."
                )


def _check_shapes(layout: State, before: Any, after: Any) -> None:
    for kind, arrays in before.items():
        rows = zip(layout.of_kind(kind), arrays, after[kind], strict=True)
        for (name, _), x, y in rows:
            shapes = [[a.shape for a in jax.tree.leaves(tree)] for tree in (x, y)]
            if shapes[0] != shapes[1]:
                raise _Refused(
                    f"The optimizer's state{name} has shape {shapes[0][0]} for a single layer, but "
                    f"its update makes {shapes[1][0]}: it treats the axis of layers as one of the "
                    "weight's own. Use a transformation that treats the layers of a stack alike."
                )


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
