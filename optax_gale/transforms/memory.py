"""Where the memory goes, from shapes alone."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from optax_gale.transforms import selection, storage, trees


@dataclass(frozen=True)
class LeafMemory:
    """Memory of one parameter, in bytes.

    Attributes:
      path: its path.
      shape: its shape.
      decision: how its gradient reaches the optimizer, and why.
      weights: of the parameter itself.
      moments: of the optimizer's state that belongs to it, projector excluded.
      projectors: of its projector.
    """

    path: str
    shape: tuple[int, ...]
    decision: str
    weights: int
    moments: int
    projectors: int


@dataclass(frozen=True)
class MemoryReport:
    """Memory of weights and optimizer state, leaf by leaf; ``print`` it for a table.

    Attributes:
      leaves: one entry a parameter.
      other: bytes of state that belongs to no parameter (step counters and the like).
    """

    leaves: tuple[LeafMemory, ...]
    other: int

    @property
    def weights(self) -> int:
        """Bytes of all parameters."""
        return sum(leaf.weights for leaf in self.leaves)

    @property
    def moments(self) -> int:
        """Bytes of all state that belongs to a parameter, projectors excluded."""
        return sum(leaf.moments for leaf in self.leaves)

    @property
    def projectors(self) -> int:
        """Bytes of all projectors."""
        return sum(leaf.projectors for leaf in self.leaves)

    @property
    def state(self) -> int:
        """Bytes of the whole optimizer state: what ``init`` would allocate."""
        return self.moments + self.projectors + self.other

    @property
    def total(self) -> int:
        """Bytes of parameters and state."""
        return self.weights + self.state

    def __str__(self) -> str:
        """A table: parameters of one shape and decision that differ in a number share a row."""
        header = ("parameter", "shape", "optimizer sees", "weights", "moments", "projector")
        rows: list[tuple[str, ...]] = [header]
        for leaves in _grouped(self.leaves):
            first = leaves[0]
            name = first.path if len(leaves) == 1 else f"{len(leaves)} x {_pattern(first.path)}"
            rows.append(
                (
                    name or "(the parameter)",
                    " x ".join(map(str, first.shape)) or "scalar",
                    first.decision,
                    *(
                        human_bytes(sum(getattr(leaf, column) for leaf in leaves))
                        for column in ("weights", "moments", "projectors")
                    ),
                )
            )
        rows.append(
            (
                "total",
                "",
                "",
                human_bytes(self.weights),
                human_bytes(self.moments),
                human_bytes(self.projectors),
            )
        )
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 3 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        rule = "-" * max(map(len, lines))
        lines[1:1] = [rule]
        lines.insert(-1, rule)
        full = 2 * self.weights
        share = f", {self.state / full:.1%} of AdamW's {human_bytes(full)}" if full else ""
        lines.append(
            f"optimizer state {human_bytes(self.state)}{share}; "
            f"with weights {human_bytes(self.total)}"
        )
        return "\n".join(lines)


def memory_report(tx: optax.GradientTransformation, params: Any) -> MemoryReport:
    """Reports the memory of parameters and optimizer state, and what was decided for each leaf.

    Nothing is allocated: ``params`` may hold arrays or anything with ``shape`` and ``dtype``, such
    as the result of `jax.eval_shape`. The bytes are those of the arrays that ``tx.init(params)``
    would make. AdamW, for comparison, has two moments of the parameters' dtype.

    Args:
      tx: any Optax transformation, with or without a `gale` inside.
      params: the parameters or their shapes.

    Returns:
      The report.

    Raises:
      ValueError: what ``tx.init`` raises.

    Example:
      >>> import jax, jax.numpy as jnp, optax_gale
      >>> shapes = {
      ...     "embed": jax.ShapeDtypeStruct((32000, 512), jnp.float32),
      ...     "kernel": jax.ShapeDtypeStruct((512, 1376), jnp.float32),
      ... }
      >>> report = optax_gale.memory_report(optax_gale.gale_adamw(1e-3, rank=128), shapes)
      >>> report.projectors == 4 * 512 * 128
      True
      >>> print(report)  # doctest: +SKIP
    """
    weights = [
        storage.nbytes(jax.tree.map(_shape_of, x))
        for x in jax.tree.leaves(params, is_leaf=storage.is_stored)
    ]
    params = _as_seen(params)
    with selection.recorded_choices() as recorded:
        # A function of its own, since a cached trace would record nothing.
        state = jax.eval_shape(lambda p: tx.init(p), params)
    leaves, _ = trees.flatten(params)
    decisions = {choice.path: _describe(choice) for choices in recorded for choice in choices}
    moments, projectors, other = owned(state, params)
    return MemoryReport(
        tuple(
            LeafMemory(
                leaf.path,
                tuple(leaf.value.shape),
                decisions.get(leaf.path, "full rank"),
                w,
                m,
                p,
            )
            for leaf, w, m, p in zip(leaves, weights, moments, projectors, strict=True)
        ),
        other,
    )


def owned(state: Any, params: Any) -> tuple[list[int], list[int], int]:
    """Finds the parameter that each array of an optimizer's state belongs to.

    Args:
      state: the state, or its shapes.
      params: the parameters, or their shapes.

    Returns:
      Bytes of every parameter's state without its projector, bytes of its projector, both in the
      order of ``trees.flatten(params)``, and bytes that belong to no parameter.
    """
    params = _as_seen(params)
    leaves, _ = trees.flatten(params)
    paths = trees.key_paths(params)
    longest_first = sorted(range(len(paths)), key=lambda i: -len(paths[i]))
    moments, projectors, other = [0] * len(leaves), [0] * len(leaves), 0
    for path, x in jax.tree_util.tree_flatten_with_path(state, is_leaf=storage.is_stored)[0]:
        size = storage.nbytes(x)
        owner = next((i for i in longest_first if trees.endswith(path, paths[i])), None)
        if owner is None or (not np.shape(storage.unboxed(x)) and leaves[owner].value.shape):
            other += size
        elif any(
            getattr(key, "name", None) == "projector"
            for key in path[: len(path) - len(paths[owner])]
        ):
            projectors[owner] += size
        else:
            moments[owner] += size
    return moments, projectors, other


def _as_seen(params: Any) -> Any:
    """Shapes of the parameters as an optimizer sees them: float32 where they are in 8 bits."""

    def shape(x: Any) -> Any:
        if storage.is_quantized(x):
            return jax.ShapeDtypeStruct(storage.unboxed(x).shape, jax.numpy.float32)
        return _shape_of(x)

    return jax.tree.map(shape, params, is_leaf=storage.is_quantized)


def _shape_of(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(x), jax.numpy.result_type(x))


def _describe(choice: selection.Choice) -> str:
    if choice.projection is None:
        return f"full rank: {choice.reason}"
    view = choice.projection.view
    count = math.prod(view.batch_shape)
    side = "rows" if choice.projection.rows else "columns"
    stack = f" of {count} matrices" if view.batch_axes else ""
    return f"rank {choice.projection.rank} of {view.m} x {view.n}, by {side}{stack}"


def _pattern(path: str) -> str:
    return re.sub(r"\d+", "*", path)


def _grouped(leaves: Iterable[LeafMemory]) -> list[Sequence[LeafMemory]]:
    groups: dict[Any, list[LeafMemory]] = {}
    for leaf in leaves:
        groups.setdefault((_pattern(leaf.path), leaf.shape, leaf.decision), []).append(leaf)
    return list(groups.values())


def human_bytes(size: float) -> str:
    """``1536`` becomes ``1.5 KiB``, and nothing a dash."""
    if size == 0:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
