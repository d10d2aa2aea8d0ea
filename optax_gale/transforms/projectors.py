"""Refreshing the projectors, and the moments with them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_gale._averages import all_there
from optax_gale.transforms import moments as moments_lib
from optax_gale.transforms import range_finders, refresh, shardings, storage, trees
from optax_gale.transforms.matrices import Projection
from optax_gale.transforms.options import Options
from optax_gale.transforms.subspace import MatrixLeaf

_TOGETHER = 2**26  # bytes of projectors and moments turned at once, unless one leaf has more


def plan(
    options: Options,
    tree: Any,
    leaves: Sequence[trees.Leaf],
    projections: Sequence[Projection | None],
) -> tuple[refresh.Together | refresh.Staggered, list[Any]] | None:
    """The schedule of the projected leaves and the gap of each; None if there are none.

    Raises:
      TypeError: if a gap is not a whole number.
      ValueError: if a gap is less than 1, or the schedule cannot serve the gaps.
    """
    gaps = []
    lengths = []
    all_gaps = trees.per_leaf("update_proj_gap", options.update_proj_gap, tree, leaves)
    for leaf, gap, projection in zip(leaves, all_gaps, projections, strict=True):
        if projection is not None:
            gaps.append(refresh.check_gap(gap, f" of '{leaf.path}'" if leaf.path else ""))
            lengths.append(projection.view.batch_shape[0] if projection.view.batch_axes else 1)
    if not gaps:
        return None
    if options.refresh_schedule == "staggered":
        return refresh.Staggered(gaps, lengths), gaps
    return refresh.Together(gaps), gaps


def refreshed(
    options: Options,
    schedule: tuple[refresh.Together | refresh.Staggered, list[Any]] | None,
    matrices: Sequence[MatrixLeaf | None],
    projectors: Sequence[Any],
    moments: "InnerMoments",
    count: jax.Array,
    asked: bool | None,
    allowed: jax.Array | None = None,
) -> tuple[list[Any], Any]:
    """Refreshes what is due.

    Args:
      options: the options.
      schedule: who is refreshed when.
      matrices: the gradients, None for leaves that are not projected.
      projectors: the projectors in use, as they are stored.
      moments: the inner's moments.
      count: steps taken, int32.
      asked: the caller's choice, or None.
      allowed: whether anything may be refreshed; None for True.

    Returns:
      The projectors, stored alike, and the inner's state in their bases.
    """
    if schedule is None:
        return list(projectors), moments.state
    planned, gaps = schedule
    where = [i for i, matrix in enumerate(matrices) if matrix is not None]
    gradients = {i: matrix for i, matrix in enumerate(matrices) if matrix is not None}
    current = [projectors[i] for i in where]

    def keep():
        return current, moments.values

    def refresh_unit(unit: refresh.Unit, step: jax.Array, masked: bool):
        size = unit.size if unit.size is not None and unit.slots > 1 else None
        start: Any = None  # of the slice of a stack that is refreshed, if it is not the whole
        requests, turns, parts = [], [], []
        for position in unit.leaves:
            leaf, p = where[position], current[position]
            g = gradients[leaf].g
            if size is not None:
                due = planned.slot(unit, step) * size
                # A stack spread over devices cannot be sliced: all of it is computed, and masked.
                arrays = (g, *jax.tree.leaves(p))
                if not any((shardings.explicit_spec(x) or [None])[0] for x in arrays):
                    # The last slice is as long as the others: it reaches back to fit.
                    start = jnp.minimum(due, p.shape[0] - size)
                    g, p = _sliced((g, p), start, size)
            key = trees.fold_in_path(options.key(), gradients[leaf].path)
            projection = gradients[leaf].projection
            key = jax.random.fold_in(key, step)
            parts.append(p)
            requests.append(
                range_finders.Request(g, projection.rows, projection.rank, key, storage.value(p))
            )
            turn: Any = True
            if masked:
                turn = planned.due(position, step, gaps[position])
            if size is not None:
                place = jnp.arange(p.shape[0]) + (0 if start is None else start)
                turn = turn & (place >= due) & (place < due + size)
            turns.append(turn)
        found = _find(options, requests)
        new_projectors, accepted = {}, {}
        for position, turn, part, (new, usable) in zip(
            unit.leaves, turns, parts, found, strict=True
        ):
            if size is not None:
                turn = shardings.match(turn, usable[(slice(None),) + (0,) * (usable.ndim - 1)])
                turn = turn.reshape(-1, *(1,) * (usable.ndim - 1))
            new_projectors[position] = storage.quantized_as(part, new)
            accepted[position] = usable & turn
        return _turned(moments, where, current, new_projectors, accepted, start)

    new, values = refresh.run(planned, count, asked, keep, refresh_unit, allowed)
    out = list(projectors)
    for i, p in zip(where, new, strict=True):
        out[i] = p
    return out, moments.replaced(values)


def _turned(
    moments: "InnerMoments",
    where: Sequence[int],
    projectors: Sequence[Any],
    new: Mapping[int, Any],
    accepted: Mapping[int, jax.Array],
    start: jax.Array | None,
) -> tuple[list[Any], list[Any]]:
    """Takes new projectors over, and the moments into their bases.

    Args:
      moments: the inner's moments.
      where: the projected leaves' positions among all.
      projectors: of the projected leaves, as they are stored.
      new: those that are refreshed, by their positions among the projected leaves.
      accepted: which of their matrices ``(*batch,)`` are.
      start: of the slice of a stack that is refreshed, if it is not the whole.

    Returns:
      The projectors, and the moments.
    """
    out, values = list(projectors), list(moments.values)
    rates = functools.cache(moments.decay_rates)
    changed = {p: (out[p], *(values[k] for k in moments.of_leaf(where[p]))) for p in new}
    for number, group in enumerate(_in_groups(changed)):
        if number:
            # One group after another: what turning the moments needs, it needs once.
            new, out, values = all_there((dict(new), out, values))
        bases = {}
        for position in group:
            old, of_new = out[position], new[position]
            if start is not None:
                old = _sliced(old, start, of_new.shape[0])
            # The moments are turned by what is stored, which is what their gradients met.
            bases[where[position]] = storage.value(old), storage.value(of_new)
        carried = moments.carried(bases, start, values, rates)
        for position in group:
            mine = [k for k in moments.of_leaf(where[position]) if k in carried]
            # A refresh that would not leave finite moments is refused. The test also puts every
            # reading of the old arrays before their writing, so that they are updated in place;
            # otherwise compilers copy them, and in every step, refresh or not.
            taken = accepted[position]
            for k in mine:
                size_of = jnp.abs(carried[k].astype(jnp.float32))
                taken &= jnp.isfinite(jnp.sum(size_of, tuple(range(taken.ndim, size_of.ndim))))
            out[position] = _replaced(out[position], new[position], taken, start)
            for k in mine:
                turned = storage.quantized_anew(values[k], carried[k])
                values[k] = _replaced(values[k], turned, taken, start)
    return out, values


def _in_groups(changed: Mapping[int, tuple[Any, ...]]) -> list[list[int]]:
    """Leaves that are turned together: many small ones, or a large one.

    Args:
      changed: what is changed of each.
    """
    groups: list[list[int]] = []
    room = 0
    for position, arrays in changed.items():
        needed = sum(map(storage.nbytes, arrays))
        if not groups or needed > room:
            groups.append([])
            room = _TOGETHER
        groups[-1].append(position)
        room -= needed
    return groups


def _sliced(tree: Any, start: jax.Array, size: int) -> Any:
    """A slice along the first axis of every array."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), tree)


def _replaced(whole: Any, new: Any, accepted: jax.Array, start: Any) -> Any:
    """Puts what is new of the accepted matrices ``(*batch,)`` into what is stored, or a slice."""
    return jax.tree.map(lambda x, y: _replaced_array(x, y, accepted, start), whole, new)


def _replaced_array(whole: jax.Array, new: jax.Array, accepted: jax.Array, start: Any) -> jax.Array:
    old = whole
    if start is not None:
        old = jax.lax.dynamic_slice_in_dim(whole, start, new.shape[0])
    accepted = accepted.reshape(accepted.shape + (1,) * (old.ndim - accepted.ndim))
    new = jnp.where(accepted, shardings.match(new, old), old)
    return new if start is None else jax.lax.dynamic_update_slice_in_dim(whole, new, start, 0)


def _find(
    options: Options, requests: Sequence[range_finders.Request]
) -> list[tuple[jax.Array, jax.Array]]:
    """New projectors of every leaf, and which of them ``(*batch,)`` may be used.

    A gradient that is zero or not finite says nothing about its range.
    """
    found = range_finders.resolve(options.range_finder, options.axis_name)(requests)
    return [
        (shardings.match(new.astype(request.previous.dtype), request.previous), usable)
        for request, (new, usable) in zip(requests, found, strict=True)
    ]


class InnerMoments:
    """The arrays of the inner's state that follow the subspace."""

    def __init__(
        self,
        option: moments_lib.Moments,
        inner_state: Any,
        leaf_paths: Sequence[tuple[Any, ...]],
        projections: Sequence[Projection | None],
        advance: Callable[[Any], Any],
        count: jax.Array,
    ):
        """Finds the moments.

        Args:
          option: the `moments` option.
          inner_state: the inner's state.
          leaf_paths: key paths of the parameters.
          projections: how they are projected.
          advance: the inner's state after one step with a gradient of zero.
          count: steps averaged so far.
        """
        self.state = inner_state
        self._option, self._advance, self._count = option, advance, count
        self._found = moments_lib.find(inner_state, leaf_paths, projections, option)
        self._leaves, self._treedef = _flatten(inner_state)
        self.values = [storage.unboxed(self._leaves[moment.index]) for moment in self._found]

    def replaced(self, values: Sequence[Any]) -> Any:
        """The inner's state with other moments, stored as they are given."""
        if not self._found:
            return self.state
        leaves = list(self._leaves)
        for moment, value in zip(self._found, values, strict=True):
            put = storage.boxed_as if storage.is_quantized(value) else storage.boxed_value
            leaves[moment.index] = put(leaves[moment.index], value)
        return jax.tree.unflatten(self._treedef, leaves)

    def of_leaf(self, leaf: int) -> list[int]:
        """The moments of a parameter, by their places among `values`."""
        return [k for k, moment in enumerate(self._found) if moment.leaf == leaf]

    def carried(
        self,
        bases: Mapping[int, Any],
        start: jax.Array | None,
        values: Sequence[Any],
        rates: Callable[[], Sequence[jax.Array]],
    ) -> dict[int, jax.Array]:
        """The moments that change, in new bases; with ``start``, of the slice that bases are of.

        Args:
          bases: for every refreshed leaf its old and new projectors.
          start: where the slice begins, or None.
          values: of the moments.
          rates: `decay_rates`.
        """
        values = list(values)
        if start is not None:
            for k, moment in enumerate(self._found):
                if moment.leaf in bases:
                    values[k] = _sliced(values[k], start, bases[moment.leaf][0].shape[0])
        arrays = [
            storage.value(x) if moment.leaf in bases else x
            for x, moment in zip(values, self._found, strict=True)
        ]
        return moments_lib.carry(self._option, self._found, arrays, bases, rates, self._count)

    def decay_rates(self) -> list[jax.Array]:
        """How much of every moment survives a step: the derivative of its update.

        By itself, that is: one derivative a kind, since a second moment's update may read the
        first one.
        """

        def step(values):
            leaves, _ = _flatten(self._advance(self.replaced(values)))
            return [leaves[moment.index] for moment in self._found]

        # Half precision would round a second moment's 0.999 to 1.
        kinds = [moment.kind for moment in self._found]
        wide = [
            value.astype(jnp.float32) if kind == "second" else value
            for kind, value in zip(kinds, map(storage.value, self.values), strict=True)
        ]
        _, linear = jax.linearize(step, wide)
        rates = [jnp.zeros(())] * len(kinds)
        for kind in ("first", "second"):
            ones = [jnp.full_like(v, float(k == kind)) for k, v in zip(kinds, wide, strict=True)]
            for i, tangent in enumerate(linear(ones)):
                if kinds[i] == kind:
                    rate = shardings.first_element(tangent).astype(jnp.float32)
                    rates[i] = jnp.clip(rate, 0.0, 1.0)
        return rates


def _flatten(state: Any) -> tuple[list[Any], Any]:
    """The arrays of a state, quantised ones whole."""
    return jax.tree.flatten(state, is_leaf=storage.is_quantized)


def inner_of(
    inner: optax.GradientTransformation,
    full_rank: optax.GradientTransformation | None,
    treedef: Any,
    projected: Sequence[bool],
) -> optax.GradientTransformationExtraArgs:
    """The transformation that runs on the subspaces and on the leaves left at full rank."""
    if full_rank is None:
        return optax.with_extra_args_support(inner)
    labels = treedef.unflatten(["subspace" if p else "full_rank" for p in projected])
    return optax.partition({"subspace": inner, "full_rank": full_rank}, labels)
