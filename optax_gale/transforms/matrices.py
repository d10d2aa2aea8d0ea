"""Seeing a parameter as a stack of matrices, and as a matrix in a subspace."""

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class GaleDimensionNumbers(NamedTuple):
    """Which axes of a weight are the rows and which the columns of its matrices.

    The axes not named are batch axes, wherever they stand, as in
    ``optax.contrib.MuonDimensionNumbers``; that class and ``optax.contrib.GaLoreDimensionNumbers``
    are accepted in its place.

    Attributes:
      reduction_axis: axis or axes that make the rows (m).
      output_axis: axis or axes that make the columns (n).

    Example:
      >>> import jax.numpy as jnp, optax, optax_gale
      >>> w = jnp.ones((4, 64, 8, 16))  # (layers, d_model, heads, head_dim)
      >>> numbers = optax_gale.GaleDimensionNumbers(reduction_axis=1, output_axis=(2, 3))
      >>> tx = optax_gale.gale(optax.adam(1e-3), 8, weight_dimension_numbers=numbers)
      >>> tx.init(w).projector.shape
      (4, 64, 8)
    """

    reduction_axis: int | Sequence[int] = 0
    output_axis: int | Sequence[int] = 1


def is_dimension_numbers(x: Any) -> bool:
    """True for this library's, Muon's and GaLore's dimension numbers."""
    return hasattr(x, "reduction_axis") and hasattr(x, "output_axis")


@dataclass(frozen=True)
class MatrixView:
    """A weight seen as a stack of matrices ``(*batch, m, n)``.

    Attributes:
      shape: the weight's shape.
      batch_axes: axes of the weight that count matrices.
      row_axes: axes of the weight that make the rows.
      column_axes: axes of the weight that make the columns.
    """

    shape: tuple[int, ...]
    batch_axes: tuple[int, ...]
    row_axes: tuple[int, ...]
    column_axes: tuple[int, ...]

    @classmethod
    def build(cls, path: str, shape: Sequence[int], numbers: Any = None) -> "MatrixView":
        """Makes the view of a weight; without numbers the last two axes are the matrix.

        Raises:
          ValueError: if an axis is out of range or named twice, or one of the sides has no axis.
        """
        shape = tuple(shape)
        ndim = len(shape)
        if numbers is None:
            return cls(shape, tuple(range(ndim - 2)), (ndim - 2,), (ndim - 1,))
        rows = _axes(path, shape, "reduction_axis", numbers.reduction_axis)
        columns = _axes(path, shape, "output_axis", numbers.output_axis)
        if len(set(rows + columns)) != len(rows) + len(columns):
            raise ValueError(
                f"Dimension numbers of '{path}' (shape {shape}) name an axis twice: "
                f"reduction_axis={numbers.reduction_axis}, output_axis={numbers.output_axis}. "
                "Each axis is a row axis, a column axis, or a batch axis (not named)."
            )
        batch = tuple(axis for axis in range(ndim) if axis not in rows + columns)
        return cls(shape, batch, rows, columns)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the stack."""
        return tuple(self.shape[axis] for axis in self.batch_axes)

    @property
    def m(self) -> int:
        """Number of rows."""
        return math.prod(self.shape[axis] for axis in self.row_axes)

    @property
    def n(self) -> int:
        """Number of columns."""
        return math.prod(self.shape[axis] for axis in self.column_axes)

    def to_matrix(self, x: jax.Array) -> jax.Array:
        """``shape`` to ``(*batch, m, n)``."""
        order = self.batch_axes + self.row_axes + self.column_axes
        if order != tuple(range(len(self.shape))):
            x = x.transpose(order)
        return x.reshape(*self.batch_shape, self.m, self.n)

    def from_matrix(self, x: jax.Array) -> jax.Array:
        """``(*batch, m, n)`` back to ``shape``."""
        order = self.batch_axes + self.row_axes + self.column_axes
        x = x.reshape(tuple(self.shape[axis] for axis in order))
        if order == tuple(range(len(self.shape))):
            return x
        return x.transpose(tuple(order.index(axis) for axis in range(len(self.shape))))


def _axes(path: str, shape: tuple[int, ...], name: str, axes: Any) -> tuple[int, ...]:
    ndim = len(shape)
    try:
        axes = tuple(map(operator.index, axes if isinstance(axes, Iterable) else (axes,)))
    except TypeError as error:
        raise TypeError(
            f"Dimension numbers of '{path}' (shape {shape}): {name}={axes!r} must be an int or a "
            "sequence of ints."
        ) from error
    if not axes or any(not -ndim <= axis < ndim for axis in axes):
        raise ValueError(
            f"Dimension numbers of '{path}' (shape {shape}): {name}={axes} must name at least one "
            f"of its {ndim} axes."
        )
    return tuple(axis % ndim for axis in axes)


@dataclass(frozen=True)
class Projection:
    """A weight, the side of it that is projected, and the rank.

    Attributes:
      view: the weight as a stack of matrices.
      rows: True if the rows are projected (``R = P^T G``), False for columns (``R = G P``).
      rank: columns of the projector.
    """

    view: MatrixView
    rows: bool
    rank: int

    @property
    def projector_shape(self) -> tuple[int, ...]:
        """``(*batch, d, r)``, d the projected side."""
        return (*self.view.batch_shape, self.view.m if self.rows else self.view.n, self.rank)

    @property
    def subspace_shape(self) -> tuple[int, ...]:
        """Shape of R: ``(*batch, r, n)``, or ``(*batch, m, r)`` when the columns are projected."""
        matrix = (self.rank, self.view.n) if self.rows else (self.view.m, self.rank)
        return (*self.view.batch_shape, *matrix)

    @property
    def rank_axis(self) -> int:
        """The axis of R that counts subspace directions."""
        return -2 if self.rows else -1

    def eye(self, dtype: Any) -> jax.Array:
        """A fixed orthonormal projector: the first r unit vectors."""
        d, r = self.projector_shape[-2:]
        return jnp.broadcast_to(jnp.eye(d, r, dtype=dtype), self.projector_shape)

    def batch_names(self, names: Sequence[Any]) -> tuple[Any, ...]:
        """Axis names of one number a matrix, from the weight's."""
        return tuple(names[axis] for axis in self.view.batch_axes)

    def projector_names(self, names: Sequence[Any]) -> tuple[Any, ...]:
        """Axis names of P from the weight's: the projected axis keeps its name."""
        kept = self.view.row_axes if self.rows else self.view.column_axes
        return (*(names[axis] for axis in self.view.batch_axes), _merge(names, kept), None)

    def subspace_names(self, names: Sequence[Any]) -> tuple[Any, ...]:
        """Axis names of R from the weight's: the rank axis has none."""
        kept = _merge(names, self.view.column_axes if self.rows else self.view.row_axes)
        matrix = (None, kept) if self.rows else (kept, None)
        return (*(names[axis] for axis in self.view.batch_axes), *matrix)


def _merge(names: Sequence[Any], axes: tuple[int, ...]) -> Any:
    """The name of several axes flattened into one: it is split as its leading axes are."""
    leading: list[Any] = []
    for axis in axes:
        if names[axis] is None:
            break
        leading.extend(names[axis] if isinstance(names[axis], tuple) else (names[axis],))
    if not leading:
        return None
    return leading[0] if len(leading) == 1 else tuple(leading)
