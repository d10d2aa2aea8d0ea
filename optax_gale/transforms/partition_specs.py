"""Shardings of the optimizer's state from those of the parameters."""

import dataclasses
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from optax_gale.transforms import trees


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _SpecBox:
    """A box whose axis names are mesh axes; every transformation carries it along."""

    value: Any
    names: tuple[Any, ...] = dataclasses.field(metadata={"static": True})

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, value: Any) -> "_SpecBox":
        return dataclasses.replace(self, value=value)

    def replace(self, **changes: Any) -> "_SpecBox":
        return dataclasses.replace(self, **changes)

    def specs(self) -> Any:
        """The spec of every array in the box that still has the axes that the names are of.

        There is one array, none (``optax.MaskedNode``), or what a transformation has cut it into.
        """
        whole = lambda x: x.ndim == len(self.names)
        return jax.tree.map(
            lambda x: PartitionSpec(*self.names) if whole(x) else PartitionSpec(), self.value
        )


def state_partition_specs(tx: optax.GradientTransformation, params: Any, param_specs: Any) -> Any:
    """Derives a `PartitionSpec` for every array of an optimizer's state.

    Moments and projectors keep the mesh axes of the weight's axes that they still have; the rank
    axis is not sharded. ``optax.tree.map_params`` cannot do this: it takes every array that belongs
    to a parameter for one of the parameter's shape.

    Args:
      tx: any Optax transformation, with or without a `gale` inside.
      params: the parameters or their shapes; boxes are looked through.
      param_specs: a `PartitionSpec` or `NamedSharding` for every parameter, or a prefix tree.

    Returns:
      A tree like ``tx.init(params)`` with a `PartitionSpec` for every array.

    Raises:
      ValueError: if ``param_specs`` is not a prefix of ``params``, or a spec is longer than its
        parameter has axes.

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
    """
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
        shape = jax.ShapeDtypeStruct(leaf.value.shape, leaf.value.dtype)
        boxes.append(_SpecBox(shape, names))
    state = jax.eval_shape(tx.init, treedef.unflatten(boxes))
    return jax.tree.map(
        lambda x: x.specs() if isinstance(x, _SpecBox) else PartitionSpec(),
        state,
        is_leaf=lambda x: isinstance(x, _SpecBox),
    )
