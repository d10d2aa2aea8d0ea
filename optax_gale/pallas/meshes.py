"""Kernels on a mesh: each device runs one on its part of the matrices, under `jax.shard_map`.

What a device has is known where types say so: on one device, on a mesh with Explicit axes, and
inside a `jax.shard_map`. Under Auto axes the compiler decides, and a kernel would have it gather.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from optax_gale._sharding import shards, spec_of


def mesh_of(x: jax.Array) -> Any:
    """The mesh of an array's type, which has no axes where the type names none."""
    return jax.typeof(x).sharding.mesh


def is_known(x: jax.Array) -> bool:
    """Whether it is known what part of an array a device has."""
    mesh = mesh_of(x)
    if mesh.empty:
        return jax.device_count() == 1
    return all(
        kind != AxisType.Auto or mesh.shape[name] == 1
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    )


def part(x: jax.Array) -> tuple[int, ...]:
    """The shape of what each device has."""
    return tuple(n // shards(x, axis) for axis, n in enumerate(x.shape))


def obstacle(matrix: jax.Array, projector: jax.Array, *, rows: bool, sums: bool) -> str:
    """Why no kernel can serve a stack where it lies; empty if one can.

    Args:
      matrix: ``(*batch, m, n)``.
      projector: ``(*batch, d, r)``.
      rows: whether the rows are projected.
      sums: whether the kernel sums over the projected side.
    """
    if any(jax.typeof(x).manual_axis_type.varying for x in (matrix, projector)):
        return "they vary over axes of a shard_map, which needs check_vma=False for kernels"
    if sums and spec_of(matrix)[-2 if rows else -1] is not None:
        return "the side that is projected is sharded, and devices must add up what they project"
    return ""


class Layout(NamedTuple):
    """How arrays lie, one spec for each stack, so that no device needs another one's.

    Attributes:
      matrices: of ``(*batch, m, n)``, as they lie.
      projectors: of ``(*batch, d, r)``.
      inside: of what is in the subspace, ``(*batch, r, n)`` or ``(*batch, m, r)``.
    """

    matrices: list[P]
    projectors: list[P]
    inside: list[P]

    @classmethod
    def of(cls, matrices: Sequence[jax.Array], rows: Sequence[bool]) -> "Layout":
        """Derives it from the matrices' types."""
        out = cls([], [], [])
        for x, by_rows in zip(matrices, rows, strict=True):
            *batch, m, n = spec_of(x)
            out.matrices.append(P(*batch, m, n))
            out.projectors.append(P(*batch, m if by_rows else n, None))
            out.inside.append(P(*batch, None, n) if by_rows else P(*batch, m, None))
        return out


def on_parts(
    kernel: Callable[..., Any],
    matrices: Sequence[jax.Array],
    rows: Sequence[bool],
    results: Callable[[Layout], Any],
) -> Callable[..., Any]:
    """A kernel that runs on each device's part, where types tell of parts.

    Args:
      kernel: of matrices, projectors, what is in the subspaces, and numbers.
      matrices: the stacks that it will be given, all on one mesh. They stay where they are; of the
        others, what lies otherwise than they do is moved first.
      rows: whether the rows are projected, of each.
      results: from the layout, how the results lie.
    """
    mesh = mesh_of(matrices[0])
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    names = {name for name, kind in kinds if kind == AxisType.Explicit}
    if not names:
        return kernel
    layout = Layout.of(matrices, rows)
    specs = (*layout, P())
    # Kernels cannot declare over which axes their results vary.
    mapped = jax.shard_map(
        kernel,
        mesh=mesh,
        in_specs=specs,
        out_specs=results(layout),
        axis_names=names,
        check_vma=False,
    )

    def place(spec: P, arrays: Any) -> Any:
        return jax.tree.map(lambda x: _placed(x, NamedSharding(mesh, spec)), arrays)

    return lambda *arguments: mapped(*jax.tree.map(place, specs, arguments))


def _placed(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    spec = tuple(sharding.spec)
    return x if spec_of(x) == spec + (None,) * (x.ndim - len(spec)) else reshard(x, sharding)
