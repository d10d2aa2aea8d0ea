"""When projectors are refreshed, and the one conditional that does it."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

RefreshSchedule = Literal["together", "staggered"]

_KEEP, _ALL = 0, 1  # branches that every schedule has
_MAX_GAPS = 4


@dataclass(frozen=True)
class Unit:
    """What one branch of the conditional refreshes.

    Attributes:
      leaves: positions of the leaves.
      size: matrices a refresh along the first batch axis, if the one leaf is refreshed in slices.
      slots: number of slices.
    """

    leaves: tuple[int, ...]
    size: int | None = None
    slots: int = 1


def check_gap(gap: Any, where: str = "") -> Any:
    """Returns ``gap`` as an int, or as it is if it is traced.

    Raises:
      TypeError: if it is not a whole number of steps.
      ValueError: if it is less than 1.
    """
    if isinstance(gap, jax.core.Tracer):
        return gap
    value = np.asarray(gap)  # of a concrete array also where other things are traced
    if value.dtype == bool or not np.issubdtype(value.dtype, np.integer) or value.ndim:
        raise TypeError(f"`update_proj_gap`{where} must be an int, got {gap!r}.")
    if value < 1:
        raise ValueError(f"`update_proj_gap`{where} must be at least 1, got {gap}.")
    return int(value)


class Together:
    """All leaves with the same gap are refreshed in the same step: ``step % gap == 0``."""

    def __init__(self, gaps: Sequence[Any]):
        """Groups leaves by gap; ``gaps`` holds one for every projected leaf."""
        if any(isinstance(gap, jax.core.Tracer) for gap in gaps):
            if any(gap is not gaps[0] for gap in gaps):
                raise ValueError(
                    "`update_proj_gap` must be one number for the whole tree where it is traced; "
                    "several gaps must be Python ints."
                )
            self.gaps: list[Any] = [gaps[0]]
            patterns: list[tuple[bool, ...]] = [(True,)]
            members = [tuple(range(len(gaps)))]
        else:
            self.gaps = sorted(set(gaps))
            if len(self.gaps) > _MAX_GAPS:
                raise ValueError(
                    f"`update_proj_gap` may take at most {_MAX_GAPS} different values in one tree "
                    f"(every combination is compiled), got {self.gaps}."
                )
            patterns = _patterns(self.gaps)
            members = [
                tuple(i for i, gap in enumerate(gaps) if gap == value) for value in self.gaps
            ]
        self.units = [
            Unit(tuple(sorted(sum((m for m, due in zip(members, p, strict=True) if due), ()))))
            for p in patterns
        ]
        # Which branch serves which combination of gaps, as a table indexed by its bits.
        self._branch = [0] * (1 << len(self.gaps))
        for branch, pattern in enumerate(patterns, start=_ALL):
            self._branch[sum(due << bit for bit, due in enumerate(pattern))] = branch

    def branch(self, count: jax.Array) -> jax.Array:
        """The branch to run at a step."""
        bits = sum((count % gap == 0).astype(jnp.int32) << b for b, gap in enumerate(self.gaps))
        return jnp.asarray(self._branch, jnp.int32)[bits]

    def slot(self, unit: Unit, count: jax.Array) -> jax.Array:
        """The slice of a unit that is due."""
        del unit
        return jnp.zeros_like(count)

    def due(self, leaf: int, count: jax.Array, gap: Any) -> jax.Array:
        """Whether a leaf is due at a step, for batches of states that are not in step."""
        del leaf
        return count % gap == 0


def _patterns(gaps: Sequence[int]) -> list[tuple[bool, ...]]:
    """Which combinations of gaps ever fall due together, all of them first."""
    subsets = itertools.chain.from_iterable(
        itertools.combinations(gaps, k) for k in range(len(gaps), 0, -1)
    )
    steps = (math.lcm(*subset) for subset in subsets)
    return list(dict.fromkeys(tuple(step % gap == 0 for gap in gaps) for step in steps))


class Staggered:
    """The first step refreshes everything; then the matrices take turns over the gap."""

    def __init__(self, gaps: Sequence[Any], lengths: Sequence[int]):
        """Plans the turns.

        Args:
          gaps: the gap of every projected leaf; they must agree.
          lengths: matrices of every leaf along its first batch axis (1 if it has none).
        """
        if any(isinstance(gap, jax.core.Tracer) for gap in gaps) or len(set(gaps)) > 1:
            raise ValueError(
                "refresh_schedule='staggered' needs one `update_proj_gap`, a Python int, for the "
                f"whole tree, got {sorted(set(map(str, gaps)))}. Use 'together' for several gaps."
            )
        self.gap = gaps[0]
        count = len(lengths)
        if count > self.gap:
            turns = [Unit(tuple(range(i, count, self.gap))) for i in range(self.gap)]
        else:
            size = 1
            while sum(-(-length // size) for length in lengths) > self.gap:
                size += 1
            turns = [
                Unit((i,), min(size, length), -(-length // size))
                for i, length in enumerate(lengths)
            ]
        self.units = [Unit(tuple(range(count))), *turns]
        # Every turn's step within the gap, spread evenly; `_turn[step]` is (branch, slot).
        order = [(b, s) for b, unit in enumerate(turns, _ALL + 1) for s in range(unit.slots)]
        self._branches, self._slots = [_KEEP] * self.gap, [0] * self.gap
        for k, (branch, slot) in enumerate(order):
            step = (k * self.gap) // len(order)
            self._branches[step], self._slots[step] = branch, slot

    def branch(self, count: jax.Array) -> jax.Array:
        """The branch to run at a step."""
        turn = jnp.asarray(self._branches, jnp.int32)[count % self.gap]
        return jnp.where(count == 0, _ALL, turn)

    def slot(self, unit: Unit, count: jax.Array) -> jax.Array:
        """The slice of a unit that is due."""
        del unit
        return jnp.asarray(self._slots, jnp.int32)[count % self.gap]

    def due(self, leaf: int, count: jax.Array, gap: Any) -> jax.Array:
        """Whether any matrix of a leaf is due, for batches of states that are not in step."""
        del gap
        mine = [b for b, unit in enumerate(self.units, _ALL) if leaf in unit.leaves]
        return jnp.isin(self.branch(count), jnp.asarray(mine))


def run(
    schedule: Together | Staggered,
    count: jax.Array,
    refresh: bool | None,
    keep: Callable[[], Any],
    refresh_unit: Callable[[Unit, jax.Array, bool], Any],
    allowed: jax.Array | None = None,
) -> Any:
    """Refreshes what is due: one conditional, or none when the caller decides.

    Args:
      schedule: who is refreshed when.
      count: the step, int32.
      refresh: True refreshes everything, False nothing, None asks the schedule.
      keep: gives what stands.
      refresh_unit: gives what stands after refreshing a unit's given slice; its last argument says
        whether leaves that are not due must be left alone.
      allowed: whether anything may be refreshed, a boolean; None for True.

    Returns:
      What ``keep`` or ``refresh_unit`` gave.
    """
    everything = schedule.units[0]
    whole = functools.partial(refresh_unit, everything, count, False)
    if refresh is False:
        return keep()
    if refresh is True:
        return whole() if allowed is None else jax.lax.cond(allowed, whole, keep)
    branches: list[Callable[[], Any]] = [
        keep,
        functools.partial(refresh_unit, everything, count, True),
    ]
    branches += [functools.partial(refresh_unit, unit, count, False) for unit in schedule.units[1:]]
    branch = schedule.branch(count)
    if allowed is not None:
        branch = jnp.where(allowed, branch, _KEEP)
    return jax.lax.switch(_same_for_all(branch), branches)


@custom_vmap
def _same_for_all(branch: jax.Array) -> jax.Array:
    """Keeps the branch a scalar under `vmap`, where `switch` would run every branch always."""
    return branch


@_same_for_all.def_vmap
def _(axis_size, in_batched, branch):
    del axis_size
    if not in_batched[0]:
        return branch, False
    # States that are not in step: the branch that masks what is not due, if anything is.
    mixed = jnp.where(jnp.all(branch == _KEEP), _KEEP, _ALL)
    return jnp.where(jnp.all(branch == branch[0]), branch[0], mixed), False
