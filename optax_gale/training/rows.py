"""Steps of large leaves, a block of rows at a time.

An optimizer whose states are quantised reads a whole leaf's in float32 before it stores the new
ones: for the embedding of a 7B model, 500 MiB an array. Where the rows of a leaf take their steps
apart from each other, blocks of them can take them one after another.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_gale.pallas import Implementation
from optax_gale.training import stack
from optax_gale.transforms import apply, dataflow, storage
from optax_gale.transforms.shardings import alike

# Elements: of leaves that are worth it, and at most of a block.
LARGE, BLOCK = 2**25, 2**23


def is_large(leaf: Any) -> bool:
    """Whether a leaf is worth being treated by itself."""
    return math.prod(jnp.shape(storage.unboxed(leaf))) >= LARGE


def update_and_apply(
    tx: optax.GradientTransformation,
    grads: Any,
    state: Any,
    params: Any,
    *,
    implementation: Implementation | None = None,
    **extra_args: Any,
) -> tuple[Any, Any]:
    """`optax_gale.update_and_apply` for an optimizer that does not mix leaves.

    Large leaves take their steps in blocks of rows, each with its number as the argument ``layer``,
    if the optimizer keeps rows apart, which is read off its program. Not where JAX sees several
    devices, over which rows may be spread.

    Args:
      tx: the optimizer.
      grads: the gradients; leaves that take no step have ``optax.MaskedNode`` in their place.
      state: its state. What belongs to leaves that take no step stays as it is.
      params: the parameters.
      implementation: as in `update_and_apply`.
      **extra_args: for the transformation's `update`.

    Returns:
      The new parameters and the new state.
    """
    step = _Step(tx, state, params, {**extra_args, "implementation": implementation})
    leaves = step.numbered(params)
    masked = lambda x: isinstance(x, optax.MaskedNode)
    of_grads = {i: g for i, g in step.numbered(grads).items() if not masked(g)}
    arrays = dict(enumerate(jax.tree.leaves(state, is_leaf=storage.is_stored)))
    large = [_LargeLeaf(step, i, leaves[i], g, arrays) for i, g in of_grads.items()]
    large = [leaf for leaf in large if leaf.blocks > 1]
    at_once = [i for i in of_grads if i not in {leaf.number for leaf in large}]
    pick = lambda xs: {i: xs[i] for i in at_once}
    own = {k: arrays[k] for k, owner in enumerate(step.owners) if owner is None or owner in at_once}
    new, found = step(pick(of_grads), own, pick(leaves))
    for leaf in large:
        new[leaf.number], own = leaf.stepped()
        found |= own
    return step.tree({**leaves, **new}), step.state({**arrays, **found})


class _Step:
    """The step of some leaves; leaves and arrays of the state go by their numbers."""

    def __init__(self, tx: Any, state: Any, params: Any, extra_args: dict[str, Any]):
        entries = lambda tree: jax.tree_util.tree_flatten_with_path(tree, is_leaf=storage.is_stored)
        found, treedef = entries(params)
        paths = [path for path, _ in found]
        found, state_treedef = entries(state)
        self._treedef: Any = treedef
        self._state_treedef: Any = state_treedef
        self.owners = stack.owners([path for path, _ in found], paths)
        self._tx, self._extra_args = tx, extra_args

    def __call__(
        self,
        grads: Mapping[int, Any],
        arrays: Mapping[int, Any],
        leaves: Mapping[int, Any],
        **extra_args: Any,
    ) -> tuple[dict[int, Any], dict[int, Any]]:
        """The new leaves and the new arrays."""
        new, state = apply.update_and_apply(
            self._tx,
            self.tree(grads),
            self.state(arrays),
            self.tree(leaves),
            **self._extra_args,
            **extra_args,
        )
        found = jax.tree.leaves(state, is_leaf=storage.is_stored)
        return self.numbered(new, leaves), dict(zip(sorted(arrays), found, strict=True))

    def numbered(self, tree: Any, numbers: Iterable[int] | None = None) -> dict[int, Any]:
        """The leaves of a tree like the parameters."""
        leaves = self._treedef.flatten_up_to(tree)
        return dict(enumerate(leaves)) if numbers is None else {i: leaves[i] for i in numbers}

    def tree(self, leaves: Mapping[int, Any]) -> Any:
        """The tree that has some leaves only."""
        count = self._treedef.num_leaves
        return self._treedef.unflatten([leaves.get(i, optax.MaskedNode()) for i in range(count)])

    def state(self, arrays: Mapping[int, Any]) -> Any:
        """The state that has some arrays only."""
        count = self._state_treedef.num_leaves
        return self._state_treedef.unflatten(
            [arrays.get(k, optax.MaskedNode()) for k in range(count)]
        )


class _LargeLeaf:
    """A leaf that may take its step in blocks of rows.

    Attributes:
      number: of the leaf.
      blocks: how many; 1 if it is not large, or all of its rows are needed at once.
    """

    def __init__(self, step: _Step, number: int, leaf: Any, grad: Any, arrays: Mapping[int, Any]):
        self.number, self._step, self._leaf, self._grad = number, step, leaf, grad
        shape = jnp.shape(storage.unboxed(leaf))
        self._rows = shape[0] if shape else 1
        own = {k: arrays[k] for k, owner in enumerate(step.owners) if owner in (None, number)}
        self._by_row = {k: x for k, x in own.items() if step.owners[k] == number and self._fits(x)}
        self._others = {k: x for k, x in own.items() if k not in self._by_row}
        self.blocks = 1
        if is_large(leaf) and jax.device_count() == 1:
            least = -(-math.prod(shape) // BLOCK)
            self.blocks = next((c for c in range(least, 8 * least) if self._rows % c == 0), 1)
            if not self._keeps_rows_apart():
                self.blocks = 1

    def stepped(self) -> tuple[Any, dict[int, Any]]:
        """The new leaf, and the new arrays that belong to it."""
        length = self._rows // self.blocks

        def block(carried: Any, number: jax.Array) -> tuple[Any, None]:
            leaf, by_row, _ = carried
            take = lambda x: jax.lax.dynamic_slice_in_dim(x, number * length, length)
            put = lambda x, y: jax.lax.dynamic_update_slice_in_dim(
                x, y.astype(x.dtype), number * length, 0
            )
            # All is read before any of it is replaced, so it can be in place.
            given = jax.lax.optimization_barrier(jax.tree.map(take, (self._grad, leaf, by_row)))
            new, changed, others = self._block(given, number)
            # The others are the same for all blocks.
            leaf, by_row = jax.tree.map(put, (leaf, by_row), (new, changed))
            return (leaf, by_row, alike(others, self._others)), None

        begin = (self._leaf, self._by_row, self._others)
        (leaf, by_row, others), _ = jax.lax.scan(block, begin, jnp.arange(self.blocks))
        own = {k: x for k, x in others.items() if self._step.owners[k] == self.number}
        return leaf, {**by_row, **own}

    def _block(self, given: tuple[Any, Any, Any], number: jax.Array) -> tuple[Any, Any, Any]:
        grad, leaf, by_row = given
        i = self.number
        new, found = self._step({i: grad}, {**by_row, **self._others}, {i: leaf}, layer=number)
        pick = lambda keys: {k: found[k] for k in keys}
        return new[i], pick(by_row), pick(self._others)

    def _keeps_rows_apart(self) -> bool:
        length = self._rows // self.blocks
        cut = lambda x: jax.ShapeDtypeStruct((length, *x.shape[1:]), x.dtype)
        given = jax.tree.map(cut, (self._grad, self._leaf, self._by_row))
        block = lambda given: self._block(given, jnp.zeros((), jnp.int32))
        try:  # an optimizer may know what shapes it was made for
            leaf, by_row, _ = jax.eval_shape(block, given)
            if _forms((leaf, by_row)) != _forms(given[1:]):
                return False
            return dataflow.keeps_rows_apart(block, (given,), [True] * len(jax.tree.leaves(given)))
        except (TypeError, ValueError):
            return False

    def _fits(self, x: Any) -> bool:
        return all(a.shape[:1] == (self._rows,) for a in jax.tree.leaves(x))


def _forms(tree: Any) -> list[Any]:
    return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
