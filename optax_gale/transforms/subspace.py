"""Into the subspace of a weight, and back."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_gale import pallas
from optax_gale.transforms import selection, shardings, storage, trees
from optax_gale.transforms.matrices import MatrixView, Projection
from optax_gale.transforms.options import Options

PROJECTOR_BLOCK_SIZE = 128


class MatrixLeaf(NamedTuple):
    """The gradient of a projected leaf, as a stack of matrices.

    Attributes:
      path: the leaf's path.
      projection: how it is projected.
      g: the gradient, ``(*batch, m, n)``.
    """

    path: str
    projection: Projection
    g: jax.Array


def matrices(
    options: Options, updates: Any, leaves: Sequence[trees.Leaf], projectors: Sequence[Any]
) -> list[MatrixLeaf | None]:
    """Sees gradients as matrices; which ones, and with what rank, the state's projectors say.

    Raises:
      ValueError: if a gradient does not fit its projector.
    """
    numbers = selection.dimension_numbers_of(options.weight_dimension_numbers, updates, leaves)
    out: list[MatrixLeaf | None] = []
    for leaf, spec, p in zip(leaves, numbers, projectors, strict=True):
        if trees.is_nothing(p):
            out.append(None)
            continue
        view = MatrixView.build(leaf.path, leaf.value.shape, spec)
        rows = selection.project_rows(view.m, view.n, options.side)
        projection = Projection(view, rows, p.shape[-1])
        if p.shape != projection.projector_shape:
            raise ValueError(
                f"The gradient of '{leaf.path}' has shape {leaf.value.shape}, for which the "
                f"projector has shape {projection.projector_shape}, but the state's has "
                f"{p.shape}: the state was made for other parameters or another `side`."
            )
        out.append(MatrixLeaf(leaf.path, projection, view.to_matrix(leaf.value)))
    return out


def check_sharding(leaf: trees.Leaf, projection: Projection) -> None:
    """Raises ValueError where merging a weight's axes would move it between devices."""
    spec = shardings.explicit_spec(leaf.value)
    if spec is None:
        return
    for axes in (projection.view.row_axes, projection.view.column_axes):
        later = [axis for axis in axes[1:] if spec[axis] is not None and leaf.value.shape[axis] > 1]
        if later:
            raise ValueError(
                f"'{leaf.path}' (shape {leaf.value.shape}) is sharded as {spec} on a mesh with "
                f"Explicit axes, and its axes {axes} are merged into one side of a matrix, of "
                f"which only the first can be sharded. Shard axis {axes[0]} instead of "
                f"{later[0]} (heads instead of head_dim)."
            )


def proxy(options: Options, leaf: trees.Leaf, projection: Projection | None) -> Any:
    """What the inner's `init` sees for a parameter: zeros in the subspace, or the parameter."""
    if projection is None:
        return trees.rebox(leaf.box, _as_state(options, leaf.value))
    dtype = leaf.value.dtype if options.inner_dtype is None else options.inner_dtype
    zeros = jnp.zeros(projection.subspace_shape, dtype)
    return _boxed(leaf, zeros, projection.subspace_names)


def first_projector(options: Options, leaf: trees.Leaf, projection: Projection) -> Any:
    """The projector before the first refresh."""
    code, shape = options.projector_code, projection.projector_shape
    if code is not None and not storage.shrinks(shape, jnp.float32, code, PROJECTOR_BLOCK_SIZE):
        return _boxed(leaf, projection.eye(jnp.float32), projection.projector_names)
    p = projection.eye(options.projector_dtype if code is None else jnp.float32)
    boxed = _boxed(leaf, p, projection.projector_names)
    return boxed if code is None else storage.quantized(boxed, code, PROJECTOR_BLOCK_SIZE)


def first_residual(leaf: trees.Leaf, projection: Projection) -> Any:
    """The residual's memory before the first step."""
    zeros = jnp.zeros(projection.view.batch_shape, jnp.float32)
    return _boxed(leaf, zeros, projection.batch_names)


def _boxed(leaf: trees.Leaf, x: jax.Array, derive: Callable[[Sequence[Any]], Sequence[Any]]) -> Any:
    """Gives an array the box, the axis names and the sharding that follow from its parameter's."""
    names = trees.box_names(leaf.box)
    x = shardings.place_like(x, leaf.value, derive)
    return trees.rebox(leaf.box, x, None if names is None else derive(names))


def project(
    options: Options, leaf: trees.Leaf, matrix: MatrixLeaf | None, p: Any, weight: Any
) -> Any:
    """What the inner's `update` sees for a gradient: ``P^T G`` or ``G P``, or the gradient."""
    if matrix is None:
        return trees.rebox(leaf.box, _as_state(options, leaf.value))
    r = pallas.project(matrix.g, p, rows=matrix.projection.rows)
    dtype = subspace_dtype(options, leaf, weight)
    names = trees.box_names(leaf.box)
    derived = None if names is None else matrix.projection.subspace_names(names)
    return trees.rebox(leaf.box, r.astype(dtype), derived)


def as_inner_param(options: Options, weight: Any) -> Any:
    """A full-rank parameter as the inner sees it."""
    return _as_state(options, weight)


def subspace_dtype(options: Options, leaf: trees.Leaf, weight: Any) -> Any:
    """The dtype in which the inner sees a projected gradient."""
    if options.inner_dtype is not None:
        return options.inner_dtype
    return leaf.value.dtype if weight is None else weight.dtype


def _as_state(options: Options, x: Any) -> Any:
    if options.inner_dtype is None or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, options.inner_dtype)
    return x.astype(options.inner_dtype)
