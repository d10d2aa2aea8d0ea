"""Which device holds what: one mesh, and the shardings of everything that training carries."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_gale
from examples.flax_llama.config import MESH_AXES
from examples.flax_llama.errors import UserError
from optax_gale.quantization import Quantized

_ROWS = ("data", "fsdp")  # what a batch's sequences are spread over

_Axes = str | tuple[str, ...] | None

# Of a matrix, without the axis of the layers: the side that reads the residual stream over "fsdp",
# the side inside a layer over "tensor" (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053).
# Without "tensor" see `Layout._ideal`.
_SPECS: Mapping[str, tuple[_Axes, ...]] = {
    **dict.fromkeys(("query", "key", "value", "gate", "up", "lm_head"), ("fsdp", "tensor")),
    **dict.fromkeys(("out", "down"), ("tensor", "fsdp")),
    "embed": (("tensor", "fsdp"), None),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and what lies where on it.

    Axes: ``data``, whose devices hold the same weights; ``fsdp``, whose devices share weights and
    the optimizer's state, and gather a layer when they need it; ``tensor``, whose devices share the
    work on every matrix. Sequences are spread over the first two.

    Attributes:
      mesh: of all devices.
      side: of layers' matrices that the optimizer projects, if it does.
      kernels: whether the optimizer's step can be in kernels.
    """

    mesh: Mesh
    side: Literal["short", "long"] = "short"
    kernels: bool = False

    @classmethod
    def of(cls, sizes: Mapping[str, int], **options: Any) -> "Layout":
        """Makes the mesh of so many devices along each axis.

        Args:
          sizes: of the axes.
          **options: the other attributes.

        Raises:
          UserError: if there are not as many devices.
        """
        wanted, there = math.prod(sizes.values()), jax.device_count()
        text = ",".join(f"{axis}={n}" for axis, n in sizes.items())
        if wanted > there or (wanted < there and jax.process_count() > 1):
            raise UserError(f"--mesh {text} is of {wanted} devices, and there are {there}")
        types = (AxisType.Auto,) * len(MESH_AXES)
        devices = jax.devices()[:wanted]
        return cls(
            jax.make_mesh(tuple(sizes.values()), MESH_AXES, types, devices=devices), **options
        )

    @property
    def rows(self) -> int:
        """Parts into which a batch's sequences fall."""
        return self._devices(_ROWS)

    def _devices(self, axes: _Axes) -> int:
        return math.prod(self.mesh.shape[axis] for axis in _names(axes))

    @property
    def whole(self) -> NamedSharding:
        """Of what every device holds a copy of."""
        return self._sharding()

    @property
    def batch(self) -> NamedSharding:
        """Of arrays ``(B, ...)``: of tokens, and of the residual stream."""
        return self._sharding(_ROWS)

    def weights(self, params: Any) -> Any:
        """A sharding for every weight, which may be in 8 bits."""
        return jax.tree_util.tree_map_with_path(
            self._weight, params, is_leaf=lambda x: isinstance(x, Quantized)
        )

    def _weight(self, path: tuple[Any, ...], x: Any) -> Any:
        spec = self._ideal(path, x.shape)
        spec = (None,) * (x.ndim - len(spec)) + spec if spec else ()
        # JAX spreads an axis over devices only in equal parts.
        fitting = [
            axes if n % self._devices(axes) == 0 else None
            for axes, n in zip(spec, x.shape, strict=False)
        ]
        if not isinstance(x, Quantized):
            return self._sharding(*fitting)
        # The scales of a row's blocks stay together.
        codes, scales = self._sharding(*fitting), self._sharding(*fitting[:-1])
        return dataclasses.replace(x, codes=codes, scales=scales)

    def state(self, init: Any, params: Any) -> Any:
        """A sharding for every array of an optimizer's state.

        Args:
          init: makes the state from weights.
          params: the shapes of the weights.
        """
        by_types = self.lets_kernels_serve(init, params)
        return self._state(init, params, None if by_types else self.mesh)

    def lets_kernels_serve(self, init: Any, params: Any) -> bool:
        """Whether the state lies where types say, which is what lets kernels serve.

        They make no updates of a stack's size. If that saves more, projectors may be whole.
        """
        if not self.kernels:
            return False
        plain = jax.eval_shape(optax_gale.dequantize_weights, params)
        sizes = jax.tree.map(_shard_bytes, plain, self.weights(plain))
        updates = [
            size
            for path, size in jax.tree_util.tree_flatten_with_path(sizes)[0]
            if any(getattr(key, "key", None) == "layers" for key in path)
        ]
        state = jax.eval_shape(init, params)
        by_types, shared = (
            bytes_on_a_device(state, self._state(init, params, mesh)) for mesh in (None, self.mesh)
        )
        return by_types - shared <= max(updates, default=0)

    def _state(self, init: Any, params: Any, mesh: Mesh | None) -> Any:
        """The state's shardings: with a mesh nothing is whole that its devices could share."""
        plain = jax.eval_shape(optax_gale.dequantize_weights, params)
        tx = optax.GradientTransformation(init, _never)
        specs = optax_gale.state_partition_specs(tx, plain, self.weights(plain), mesh)
        return jax.tree.map(
            functools.partial(NamedSharding, self.mesh), specs, is_leaf=lambda x: isinstance(x, P)
        )

    def unspread(self, params: Any) -> list[str]:
        """Paths of matrices of which an axis cannot be divided as it should be."""
        plain = jax.eval_shape(optax_gale.dequantize_weights, params)
        found = []
        for path, x in jax.tree_util.tree_flatten_with_path(plain)[0]:
            here = {name for axes in self._weight(path, x).spec for name in _names(axes)}
            ideal = {name for axes in self._ideal(path, x.shape) for name in _names(axes)}
            if any(self.mesh.shape[name] > 1 for name in ideal - here):
                found.append(jax.tree_util.keystr(path, simple=True, separator="/"))
        return found

    def _ideal(self, path: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[_Axes, ...]:
        """How a weight's last axes are to be spread; nothing of a vector's.

        Any side of a layer's matrix will do for "fsdp". On the one that is not projected, each
        device projects its part of a gradient by itself.
        """
        names = [str(getattr(key, "key", key)) for key in path]
        name = next((name for name in names if name in _SPECS), None)
        if name is None:
            return ()
        if "layers" not in names or self.mesh.shape["tensor"] > 1:
            return _SPECS[name]
        # A square's columns are its shorter side, as the library sees it.
        rows = (shape[-2] >= shape[-1]) == (self.side == "short")
        if shape[-2 if rows else -1] % self.mesh.shape["fsdp"]:
            rows = not rows
        return ("fsdp", None) if rows else (None, "fsdp")

    def own_rows(self, batch_size: int) -> list[int] | None:
        """Numbers of a batch's sequences that this process must have; None if they are all."""
        found = set[int]()
        for index in self.batch.addressable_devices_indices_map((batch_size, 1)).values():
            assert index is not None
            found |= {*range(*index[0].indices(batch_size))}
        return None if len(found) == batch_size else sorted(found)

    def place(
        self, batch: Mapping[str, Any], batch_size: int, rows: list[int] | None = None
    ) -> dict[str, jax.Array]:
        """Puts a batch's arrays on the devices.

        Args:
          batch: arrays ``(len(rows), T)``.
          batch_size: sequences of the whole batch.
          rows: numbers of those that the arrays hold; None for all.
        """
        where = range(batch_size) if rows is None else rows

        def part(x: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = index[0].indices(batch_size)
            begin = where.index(first)
            return x[begin : begin + last - first, *index[1:]]

        return {
            name: jax.make_array_from_callback(
                (batch_size, *x.shape[1:]), self.batch, functools.partial(part, np.asarray(x))
            )
            for name, x in batch.items()
        }

    def _sharding(self, *spec: Any) -> NamedSharding:
        # An axis of one device is left out: it would only stand in the way of reading.
        return NamedSharding(self.mesh, P(*(self._some(axis) for axis in spec)))

    def _some(self, axes: _Axes) -> _Axes:
        kept = tuple(name for name in _names(axes) if self.mesh.shape[name] > 1)
        return kept[0] if len(kept) == 1 else kept or None

    def describe(self) -> str:
        """The mesh in words."""
        shape = ", ".join(f"{axis} {n}" for axis, n in self.mesh.shape.items())
        kind = self.mesh.devices.flat[0].device_kind
        text = f"Mesh: {shape}; {self.mesh.size} × {kind}"
        processes = jax.process_count()
        return f"{text} in {processes} processes." if processes > 1 else f"{text}."


def _names(axes: _Axes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("only the shapes of the state are asked for")


def bytes_on_a_device(tree: Any, shardings: Any) -> int:
    """Bytes of a tree's arrays that one device holds: of the one that holds most."""
    sizes = jax.tree.map(_shard_bytes, tree, shardings)
    return sum(jax.tree.leaves(sizes))


def _shard_bytes(x: Any, sharding: NamedSharding) -> int:
    return math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize


def shaped(tree: Any, shardings: Any) -> Any:
    """Shapes of arrays, with where they lie."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings
    )
