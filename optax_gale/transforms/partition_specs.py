"""Shardings of the optimizer's state from those of the parameters."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_gale.quantization import Quantized
from optax_gale.transforms import trees


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _SpecBox:
    """A box whose axis names are mesh axes; every transformation carries it along.

    Attributes:
      value: the array.
      names: the mesh axes of each of its axes.
      all: the mesh axes of the parameter, in order.
    """

    value: Any
    names: tuple[Any, ...] = dataclasses.field(metadata={"static": True})
    all: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, value: Any) -> "_SpecBox":
        return dataclasses.replace(self, value=value)

    def replace(self, **changes: Any) -> "_SpecBox":
        return dataclasses.replace(self, **changes)

    def specs(self, sizes: Mapping[str, int]) -> Any:
        """The spec of every array in the box that still has the axes that the names are of.

        There is one array, none (``optax.MaskedNode``), or what a transformation has cut it into.
        """
        return jax.tree.map(lambda x: _specs([self], [x.shape], sizes)[0], self.value)


def _specs(
    boxes: Sequence[_SpecBox],
    shapes: Sequence[tuple[int, ...]],
    sizes: Mapping[str, int],
    whole: bool = True,
) -> list[PartitionSpec]:
    """The specs of arrays that are cut alike: one array, or codes and their scales.

    The last axis is cut only if its blocks are ``whole``: where devices have parts of blocks,
    compilers gather them all.
    """
    found = [list(box.names) for box in boxes]
    if any(len(shape) != len(names) for shape, names in zip(shapes, found, strict=True)):
        return [PartitionSpec() for _ in boxes]
    # The longer side of a matrix is not the rank. Where it is shared already it stays so: for two
    # axes on one side, compilers exchange parts of gradients.
    sides = sorted(range(len(shapes[0]))[-2:], key=lambda i: -shapes[0][i])
    sides = [side for side in sides if whole or side < len(shapes[0]) - 1]
    for axis in boxes[0].all:
        if axis in _names_of(found[0]) or sizes.get(axis, 1) == 1:
            continue
        for side in sides:
            fits = all(shape[side] % sizes[axis] == 0 for shape in shapes)
            if fits and all(names[side] is None for names in found):
                for names in found:
                    names[side] = axis
                break
    return [PartitionSpec(*names) for names in found]


def _names_of(entries: Iterable[Any]) -> list[str]:
    """The mesh axes in the entries of a spec."""
    return [
        name
        for entry in entries
        if entry not in (None, PartitionSpec.UNCONSTRAINED)
        for name in ((entry,) if isinstance(entry, str) else entry)
    ]


def state_partition_specs(
    tx: optax.GradientTransformation, params: Any, param_specs: Any, mesh: Any = None
) -> Any:
    """Derives a `PartitionSpec` for every array of an optimizer's state.

    Moments and projectors keep the mesh axes of the weight's axes that they still have; the rank
    axis is not sharded. The devices along a mesh axis that is lost so would each have the whole of
    them: moments of a weight that FSDP shards along its projected side, say. With ``mesh`` they
    share them: the mesh axis goes to the side that is left, or to the rank where that side has one.
    A step then scatters the sums of projections and gathers the inner's updates. That sends as much
    as sums that all devices get, if the compiler scatters (XLA for CPUs does not, and half as much
    again is sent). Compile such a step under `jax.set_mesh`: only where the mesh is
    known can the compiler be told never to spread the rank in products, of which it would add up
    parts of the weight's size.

    ``optax.tree.map_params`` cannot do any of this: it takes every array that belongs to a
    parameter for one of the parameter's shape.

    Args:
      tx: any Optax transformation, with or without a `gale` inside.
      params: the parameters or their shapes; boxes are looked through.
      param_specs: a `PartitionSpec` or `NamedSharding` for every parameter, or a prefix tree.
      mesh: a mesh with Auto axes, if its devices are to share what they would all have. Not for a
        step that `jax.sharding.explicit_axes` runs: types do not let the rank be shared.

    Returns:
      A tree like ``tx.init(params)`` with a `PartitionSpec` for every array.

    Raises:
      ValueError: if ``param_specs`` is not a prefix of ``params``, a spec is longer than its
        parameter has axes or names an axis that ``mesh`` has not, or ``mesh`` has Explicit axes, on
        which the state lies where the parameters' types put it.

    Example:
      >>> import jax, jax.numpy as jnp, optax_gale
      >>> from jax.sharding import PartitionSpec as P
      >>> params = {"kernel": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}
      >>> tx = optax_gale.gale_adamw(1e-3, rank=64)
      >>> specs = optax_gale.state_partition_specs(tx, params, {"kernel": P("data", "model")})
      >>> specs.projector["kernel"] == P("data", None)
      True
      >>> specs.inner_state[0].mu["kernel"] == P(None, "model")
      True
      >>> auto = jax.sharding.AxisType.Auto
      >>> mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"), (auto, auto))
      >>> specs = optax_gale.state_partition_specs(tx, params, {"kernel": P("data", "model")}, mesh)
      >>> specs.projector["kernel"] == P("data", "model")
      True
      >>> specs.inner_state[0].mu["kernel"] == P("data", "model")
      True
    """
    sizes = _sizes(mesh)
    leaves, treedef = trees.flatten(params)
    is_spec = lambda x: isinstance(x, (PartitionSpec, NamedSharding))
    specs = trees.broadcast_prefix("param_specs", param_specs, params, is_spec)
    boxes = []
    for leaf, spec in zip(leaves, specs, strict=True):
        names = () if spec is None else tuple(getattr(spec, "spec", spec))
        if len(names) > leaf.value.ndim:
            raise ValueError(
                f"`param_specs` of '{leaf.path}' is {spec}, longer than the {leaf.value.ndim} axes "
                f"of its shape {tuple(leaf.value.shape)}."
            )
        names += (None,) * (leaf.value.ndim - len(names))
        unknown = [name for name in _names_of(names) if mesh is not None and name not in sizes]
        if unknown:
            raise ValueError(
                f"`param_specs` of '{leaf.path}' is {spec}, but `mesh` has no axis {unknown[0]!r}: "
                f"its axes are {', '.join(sizes)}."
            )
        shape = jax.ShapeDtypeStruct(leaf.value.shape, leaf.value.dtype)
        boxes.append(_SpecBox(shape, names, tuple(_names_of(names))))
    state = jax.eval_shape(tx.init, treedef.unflatten(boxes))

    def specs_of(x: Any) -> Any:
        if not isinstance(x, Quantized):
            return x.specs(sizes) if isinstance(x, _SpecBox) else PartitionSpec()
        if not isinstance(x.codes, _SpecBox):
            return jax.tree.map(lambda _: PartitionSpec(), x)
        parts = (x.codes, x.scales)
        shapes, whole = [part.value.shape for part in parts], x.length % x.block_size == 0
        codes, scales = _specs(parts, shapes, sizes, whole)
        return dataclasses.replace(x, codes=codes, scales=scales)

    return jax.tree.map(specs_of, state, is_leaf=lambda x: isinstance(x, (_SpecBox, Quantized)))


def _sizes(mesh: Any) -> dict[str, int]:
    """Devices along each axis of a mesh; nothing without one."""
    if mesh is None:
        return {}
    if AxisType.Explicit in mesh.axis_types:
        raise ValueError(
            f"`mesh` must have Auto axes, got {mesh.axis_types}: on Explicit axes the state lies "
            "where the parameters' types put it. Leave `mesh` out."
        )
    return dict(mesh.shape)
