"""What is trained, on what mesh, and what each device holds of it: exact, from shapes alone."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType

from benchmarks.gpu.arms import adamw, float32_states, gale
from examples.flax_llama.config import MESH_AXES, DeviceOptions
from examples.flax_llama.errors import UserError
from examples.flax_llama.layout import Layout, bytes_on_a_device
from examples.flax_llama.model import AttentionBackend, Llama
from examples.flax_llama.optimizers import DATA
from examples.flax_llama.sizes import SIZES, LlamaSize
from examples.flax_llama.step import TrainState, trace_init

LLAMAS: dict[str, LlamaSize] = {
    **SIZES,
    "70b": LlamaSize(128256, 8192, 28672, 80, 64, 8, max_length=8192, rope_theta=5e5),
    "405b": LlamaSize(128256, 16384, 53248, 126, 128, 8, max_length=8192, rope_theta=5e5),
}
"""The example's sizes and the two large ones of Llama 3 (Grattafiori et al. 2024,
https://arxiv.org/abs/2407.21783)."""


class Optimizer(NamedTuple):
    """An optimizer of the plan.

    Attributes:
      label: for tables.
      make: the transformation.
      rank: of its projectors; 0: of full rank.
      state_bytes: bytes of a projected gradient's number, where devices average them.
    """

    label: str
    make: Callable[[], optax.GradientTransformation]
    rank: int = 0
    state_bytes: int = 4


def adamw_of(dtype: str) -> Optimizer:
    """AdamW with moments in float32, or in bfloat16 beside weights of the same dtype."""
    if dtype == "float32":
        return Optimizer("AdamW, f32 moments", lambda: float32_states(adamw()))
    return Optimizer("AdamW, bf16 moments", adamw)


def gale_of(rank: int, dtype: str, **options: Any) -> Optimizer:
    """GALE-AdamW with moments and projectors in a dtype."""
    short = {"float32": "f32", "bfloat16": "bf16", "int8": "8-bit"}[dtype]
    make = functools.partial(gale, rank, state_dtype=dtype, projector_dtype=dtype, **options)
    return Optimizer(f"GALE, r = {rank}, {short}", make, rank, 2 if dtype == "bfloat16" else 4)


@dataclasses.dataclass(frozen=True)
class Setup:
    """A training step.

    Attributes:
      llama: the model's shape.
      mesh: devices along each of the example's axes.
      optimizer: the optimizer.
      tokens: of a step that one row of devices takes: those that share the work on a sequence.
      length: tokens a sequence.
      dtype: of the weights.
      compute: bytes of a number of the residual stream.
      remat: whether layers are computed again in the backward pass.
      chunks: parts in which logits are computed.
      attention: which attention.
      average: whether devices average projections, or gradients.
    """

    llama: LlamaSize
    mesh: Mapping[str, int]
    optimizer: Optimizer
    tokens: int = 4096
    length: int = 4096
    dtype: str = "bfloat16"
    compute: int = 2
    remat: bool = True
    chunks: int = 1
    attention: AttentionBackend = "cudnn"
    average: bool = False

    def __post_init__(self) -> None:
        """Refuses what the example would.

        Raises:
          UserError: if an option makes no sense, or two do not go together.
        """
        if self.tokens < 1 or self.length < 1 or self.tokens % self.length:
            raise UserError(
                f"--tokens must be a multiple of --length, got {self.tokens} and {self.length}"
            )
        if self.chunks < 1 or self.length % self.chunks:
            raise UserError(f"--chunks must divide --length {self.length}, got {self.chunks}")
        if not 0 <= self.optimizer.rank <= self.llama.hidden:
            raise UserError(
                f"--rank must be 1 to {self.llama.hidden}, the width of the model, got "
                f"{self.optimizer.rank}"
            )
        if self.average and (self.devices != self.mesh[DATA] or not self.optimizer.rank):
            raise UserError("averaged projections are for GALE on a mesh of data alone")

    @property
    def axes(self) -> tuple[int, int, int]:
        """Devices along data, fsdp and tensor."""
        data, fsdp, tensor = (self.mesh[axis] for axis in MESH_AXES)
        return data, fsdp, tensor

    @property
    def devices(self) -> int:
        """All devices."""
        data, fsdp, tensor = self.axes
        return data * fsdp * tensor

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight."""
        return jnp.dtype(self.dtype).itemsize


def mesh_of(text: str) -> dict[str, int]:
    """Devices along each axis, of text such as ``data=2,fsdp=4``; of none: one device.

    Example:
      >>> mesh_of("fsdp=4")
      {'data': 1, 'fsdp': 4, 'tensor': 1}
    """
    return DeviceOptions(mesh=text or f"{DATA}=1").axes() or {}


def mesh_text(mesh: Mapping[str, int]) -> str:
    """The mesh as ``--mesh`` has it.

    Example:
      >>> mesh_text(mesh_of("fsdp=4,tensor=1"))
      'fsdp=4'
    """
    return ",".join(f"{axis}={n}" for axis, n in mesh.items() if n > 1) or f"{DATA}=1"


class Held(NamedTuple):
    """Bytes that a device holds from step to step.

    Attributes:
      weights: of its part of the weights.
      moments: of its part of the optimizer's state, but projectors.
      projectors: of its part of them.
    """

    weights: int
    moments: int
    projectors: int


def layout_of(setup: Setup) -> Layout:
    """The example's layout, of devices that need not be there."""
    return _layout(setup.optimizer, setup.axes)


def _layout(optimizer: Optimizer, axes: tuple[int, int, int]) -> Layout:
    types = (AxisType.Auto,) * len(MESH_AXES)
    mesh: Any = AbstractMesh(axes, MESH_AXES, axis_types=types)
    return Layout(mesh, kernels=bool(optimizer.rank))


def shapes_of(setup: Setup) -> tuple[TrainState, optax.GradientTransformation]:
    """Shapes of weights and state, and the optimizer that makes the state."""
    return _traced(model_of(setup), setup.optimizer)


@functools.lru_cache(maxsize=64)
def _traced(model: Llama, optimizer: Optimizer) -> tuple[TrainState, Any]:
    tx = optimizer.make()
    return trace_init(model, tx, 0).out_info, tx


def model_of(setup: Setup, **options: Any) -> Llama:
    """The model, which needs no device as long as nothing is run."""
    dtypes = {"dtype": jnp.bfloat16 if setup.compute == 2 else jnp.float32}
    return Llama(
        setup.llama, **dtypes, param_dtype=jnp.dtype(setup.dtype), remat=setup.remat, **options
    )


def held(setup: Setup) -> Held:
    """What a device holds, by the example's own layout.

    Raises:
      UserError: if the mesh does not divide a matrix as the layout would have it.
    """
    shapes, tx = shapes_of(setup)
    layout = layout_of(setup)
    unspread = layout.unspread(shapes.params)
    if unspread:
        raise UserError(
            f"--mesh {mesh_text(setup.mesh)} does not divide {', '.join(unspread)}, which the plan "
            "does not model; choose another"
        )
    moments = projectors = 0
    where = jax.tree.leaves(layout.state(tx.init, shapes.params))
    paths = jax.tree_util.tree_flatten_with_path(shapes.opt_state)[0]
    for (path, x), sharding in zip(paths, where, strict=True):
        size = bytes_on_a_device([x], [sharding])
        if any(getattr(key, "name", None) == "projector" for key in path):
            projectors += size
        else:
            moments += size
    weights = bytes_on_a_device(shapes.params, layout.weights(shapes.params))
    return Held(weights, moments, projectors)


def kernels_serve(setup: Setup) -> bool:
    """Whether the optimizer's step is in kernels, on GPUs for which there are some."""
    return _kernels_serve(model_of(setup), setup.optimizer, setup.axes)


@functools.lru_cache(maxsize=256)
def _kernels_serve(model: Llama, optimizer: Optimizer, axes: tuple[int, int, int]) -> bool:
    shapes, tx = _traced(model, optimizer)
    return _layout(optimizer, axes).lets_kernels_serve(tx.init, shapes.params)


class Matrices(NamedTuple):
    """Matrices of one name in all layers.

    Attributes:
      name: of the layer's part.
      rows: m.
      columns: n.
      fsdp_rows: whether fsdp shares the rows and tensor the columns, or the other way round, where
        there are both.
    """

    name: str
    rows: int
    columns: int
    fsdp_rows: bool = True

    @property
    def numbers(self) -> int:
        """Of one matrix."""
        return self.rows * self.columns

    def projected(self, rank: int) -> int:
        """Numbers of one projected gradient: the shorter side becomes the rank."""
        return rank * max(self.rows, self.columns)

    def projector(self, rank: int) -> int:
        """Numbers of one projector."""
        return rank * min(self.rows, self.columns)

    def reduced_over(self, axes: tuple[int, int, int]) -> str | None:
        """The axis that shares the projected side, if one does: columns, unless rows are shorter.

        Without tensor, fsdp shares the other side if it can.
        """
        _, fsdp, tensor = axes
        if tensor == 1:
            return "fsdp" if max(self.rows, self.columns) % fsdp else None
        return "fsdp" if (self.rows < self.columns) == self.fsdp_rows else "tensor"


def matrices(llama: LlamaSize) -> list[Matrices]:
    """The matrices of a layer, as `Layout` spreads them."""
    d, f, kv = llama.hidden, llama.padded_intermediate, llama.kv_heads * llama.head_dim
    return [
        Matrices("query", d, d),
        Matrices("key", d, kv),
        Matrices("value", d, kv),
        Matrices("out", d, d, fsdp_rows=False),
        Matrices("gate", d, f),
        Matrices("up", d, f),
        Matrices("down", f, d, fsdp_rows=False),
    ]
