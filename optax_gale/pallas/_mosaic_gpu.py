"""What the Mosaic GPU kernels share: blocks in shared memory, barriers, warpgroups with roles."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from optax_gale.pallas.dispatch import Problem, capability, problems

# Earlier versions of JAX cannot discharge references inside `custom_vmap`.
IS_RECENT = jax.__version_info__ >= (0, 11)
# Rows of a block: the most that one swizzled row holds.
ROW_BYTES = 128
# Columns of a block of half precision.
WIDTH = 64
# Leaves of a launch: each takes a few copy descriptors, and the time to compile the launch grows
# with the square of their number.
_MAX_LEAVES = 8
# Copy descriptors need rows that start at multiples of this.
_ALIGNMENT_BYTES = 16
_PRODUCER_REGISTERS = 40
_SM_REGISTERS = 65536
_WARPGROUP = 128


def launches(
    kernel: str, matrices: Sequence[Any], projectors: Sequence[Any], rows: Sequence[bool]
) -> list[list[int]]:
    """Which stacks a launch serves: stacks that are alike, and not too many."""
    return [
        where[i : i + _MAX_LEAVES]
        for _, where in problems(kernel, matrices, projectors, rows)
        for i in range(0, len(where), _MAX_LEAVES)
    ]


def refusal(problem: Problem) -> str | None:
    """Why no kernel of this backend can serve a problem; None if one can."""
    architecture = capability()
    if not architecture.startswith("9."):
        found = f"this one's is {architecture}" if architecture else "there is none"
        return f"it needs an NVIDIA GPU of compute capability 9 (Hopper), and {found}"
    if not IS_RECENT:
        return f"it needs JAX 0.11 or later, and this is {jax.__version__}"
    return shape_refusal(problem)


def shape_refusal(problem: Problem) -> str | None:
    """Why no kernel of this backend could serve a problem on any device; None if one could."""
    if problem.dtype not in ("bfloat16", "float16"):
        return "it multiplies bfloat16 and float16 only"
    multiple = _ALIGNMENT_BYTES // jnp.dtype(problem.dtype).itemsize
    for name, value in (("rank", problem.rank), ("number of columns", problem.n)):
        if value % multiple:
            return f"rows must be multiples of {_ALIGNMENT_BYTES} bytes, and the {name} is {value}"
    return None


def multiprocessors() -> int:
    """How many thread blocks run at a time where each fills a multiprocessor."""
    return int(getattr(jax.devices()[0], "core_count", None) or 132)


class Blocks(NamedTuple):
    """Blocks of matrices in shared memory, ``(..., rows, columns)``, seen in two ways.

    Attributes:
      rows: as bulk copies see them: plain swizzled rows, so that a copy may start anywhere in a
        matrix and reach beyond its edges.
      tiles: as tensor cores and registers see them: the same bytes as tiles of 8 rows.
    """

    rows: Any
    tiles: Any


def block_type(shape: Sequence[int], dtype: Any, *, interpret: bool) -> Any:
    """Memory for blocks; columns are at most `ROW_BYTES` wide, or multiples of that.

    The wider ones are tiles for copies too, which must then stay clear of ragged edges.
    """
    itemsize = jnp.dtype(dtype).itemsize
    width = min(shape[-1], ROW_BYTES // itemsize)
    swizzle = plgpu.SwizzleTransform(width * itemsize)
    tiling = plgpu.TilingTransform((8, width))
    tiles = plgpu.SMEM(tuple(shape), dtype, transforms=(tiling, swizzle))
    # The interpreter takes the members of a union for separate memory.
    if interpret or shape[-1] > width:
        return tiles
    return plgpu.RefUnion(tiles, plgpu.SMEM(tuple(shape), dtype, transforms=(swizzle,)))


def both_views(memory: Any, *, interpret: bool) -> Blocks:
    """The two views of memory of a `block_type`."""
    if interpret or memory.dtype != jnp.int8:
        return Blocks(memory, memory)
    tiles, rows = memory
    return Blocks(rows, tiles)


def fits_tiles(rows: int, columns: int) -> bool:
    """Whether tiles of half precision cover a matrix without ragged edges."""
    return rows % 8 == 0 and columns % WIDTH == 0


def blocks_before(column: Any) -> Any:
    """How many blocks of half precision lie before a column."""
    return column // WIDTH if isinstance(column, int) else lax.div(column, WIDTH)


def select(index: Any, run: Callable[[Any], None], choices: Sequence[Any]) -> None:
    """Runs ``run(choices[index])``."""
    if len(choices) == 1:
        run(choices[0])
    else:
        lax.switch(index, [functools.partial(run, choice) for choice in choices])


class Ring(NamedTuple):
    """Slots that producers fill and consumers free, in order.

    Attributes:
      slots: how many.
      filled: barriers of the slots that were filled.
      freed: barriers of the slots that were freed.
      first: index of the first barrier.
    """

    slots: int
    filled: Any
    freed: Any
    first: Any = 0

    def slot(self, step: Any) -> Any:
        """The slot that serves a step."""
        return lax.rem(step, self.slots)

    def arrivals(self, step: Any) -> Any:
        """The barrier that copies of a step arrive at."""
        return self.filled.at[self.first + self.slot(step)]

    def wait_free(self, step: Any) -> None:
        """Waits, as a producer, until the slot of a step may be filled."""

        @pl.when(step >= self.slots)
        def _():
            plgpu.barrier_wait(self.freed.at[self.first + self.slot(step)])

    def wait_filled(self, step: Any) -> None:
        """Waits, as a consumer, until the slot of a step was filled."""
        plgpu.barrier_wait(self.arrivals(step))

    def free(self, step: Any) -> None:
        """Frees, as a consumer, the slot of a step."""
        plgpu.barrier_arrive(self.freed.at[self.first + self.slot(step)])

    def drain(self, steps: Any) -> None:
        """Waits, as a producer, until all slots are free after so many steps."""
        for slot in range(self.slots):

            @pl.when(steps > slot)
            def _(slot=slot):
                plgpu.barrier_wait(self.freed.at[self.first + slot])


def barriers(slots: int, *, copies: int, consumers: int, rings: int = 1) -> dict[str, Any]:
    """Memory for the barriers of rings whose slots are filled by several copies."""
    number = slots * rings
    return {
        "filled": plgpu.Barrier(num_arrivals=copies, num_barriers=number),
        "freed": plgpu.Barrier(num_arrivals=consumers, num_barriers=number),
    }


def persistent(
    units: int, blocks: int, body: Callable[[Any, Any, Any], Any], carry: Any
) -> tuple[Any, Any]:
    """Runs ``carry = body(turn, unit, carry)`` for every unit that falls to this thread block.

    Returns:
      How many units those were, and the last carry.
    """
    block = lax.axis_index("block")
    turns = lax.div(units - block + (blocks - 1), blocks)
    carry = lax.fori_loop(
        0, turns, lambda turn, carry: body(turn, block + turn * blocks, carry), carry
    )
    return turns, carry


def consumer_registers(warpgroups: int, producers: int) -> int:
    """Registers of a thread of the warpgroups that compute."""
    left = _SM_REGISTERS // _WARPGROUP - producers * _PRODUCER_REGISTERS
    return min(left // (warpgroups - producers) // 8 * 8, 240)


def roles(consumers: int, consume: Callable[[Any], None], *produce: Callable[[], None]) -> None:
    """Splits the warpgroups of a thread block into those that compute and one for each producer."""
    warpgroup = lax.axis_index("warpgroup")
    registers = consumer_registers(consumers + len(produce), len(produce))

    def compute() -> None:
        plgpu.set_max_registers(registers, action="increase")
        consume(warpgroup)

    def supply(producer: Callable[[], None]) -> None:
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        producer()

    # One branching: the assembler minds the registers of roles only if they are its branches.
    role = lax.max(warpgroup - (consumers - 1), 0)
    lax.switch(role, [compute, *(functools.partial(supply, x) for x in produce)])


def launch(
    body: Callable[..., None],
    operands: Sequence[Any],
    *,
    name: str,
    scratch: Any,
    outputs: Sequence[Any] = (),
    blocks: int,
    warpgroups: int,
    interpret: Any = None,
    auto_barriers: bool = True,
) -> Any:
    """Launches a kernel.

    Args:
      body: called with the operands, the outputs and the scratch memory. References among the
        operands are updated in place.
      operands: arrays and references.
      name: of the kernel.
      scratch: types of shared memory and barriers.
      outputs: types of the outputs.
      blocks: how many thread blocks.
      warpgroups: how many warpgroups in each.
      interpret: parameters of the interpreter, to run on a CPU.
      auto_barriers: whether the compiler guards every access to shared memory.

    Returns:
      The outputs.
    """

    def scoped(*refs: Any) -> None:
        pl.run_scoped(functools.partial(body, *refs), scratch, collective_axes="warpgroup")

    mesh = plgpu.Mesh(
        grid=(blocks,), grid_names=("block",), num_threads=warpgroups, thread_name="warpgroup"
    )
    # Explicit transforms of shared memory need the semantics of lanes.
    params = plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=not auto_barriers
    )
    kernel = pl.kernel(
        scoped,
        out_type=list(outputs),
        mesh=mesh,
        compiler_params=params,
        interpret=interpret or False,
        name=name,
    )
    return kernel(*operands)


def output(shape: Sequence[int], dtype: Any, *, like: jax.Array) -> jax.ShapeDtypeStruct:
    """The type of an output that is the same on all devices of a shard_map, as its inputs are."""
    kind = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(tuple(shape), dtype, manual_axis_type=kind)


def stacked(x: jax.Array) -> jax.Array:
    """Merges the batch axes of a stack of matrices into one."""
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def references(arrays: Sequence[jax.Array]) -> list[Any]:
    """References through which a kernel updates arrays in place."""
    return [jax.new_ref(x) for x in arrays]
