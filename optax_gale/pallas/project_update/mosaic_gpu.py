"""For Hopper: the gradient enters the subspace on tensor cores, and the inner runs on registers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from optax_gale.pallas import _mosaic_gpu as mosaic
from optax_gale.pallas._mosaic_gpu import WIDTH, Ring
from optax_gale.pallas.dispatch import Problem, one_for_each
from optax_gale.pallas.elementwise import Elementwise
from optax_gale.pallas.project_update._lowerable import lowerable

refusal = mosaic.refusal

_CONSUMERS = 2
# Wider products would need more registers than four warpgroups have to begin with.
_MAX_COLUMNS = 128
# The inner's arrays pass through shared memory in pieces of this shape.
_PIECE_ROWS, _PIECE_COLUMNS = 64, 32


class Plan(NamedTuple):
    """How the work is cut.

    Attributes:
      block_m: rows of a tile of R.
      block_n: columns of a tile.
      block_k: how much of the contracted side one slot holds.
      slots: slots for both operands.
      piece_slots: slots of each warpgroup for pieces of the inner's arrays.
      split_rows: whether the two warpgroups share a tile's rows, or its columns.
      blocks: how many thread blocks; None for one on each multiprocessor.
      auto_barriers: whether the compiler guards every access to shared memory.
    """

    block_m: int
    block_n: int
    block_k: int
    slots: int
    piece_slots: int
    split_rows: bool
    blocks: int | None = None
    auto_barriers: bool = True


def plan_for(problem: Problem) -> Plan:
    """A plan for problems like this one."""
    matrices = problem.leaves * problem.batch
    side = problem.n if problem.rows else problem.m
    tall = not problem.rows and problem.rank <= 128
    large = Plan(256, 128, 64, 3, 2, True) if tall else Plan(128, 256, 64, 3, 2, True)
    tiles = matrices * -(-side // 256) * -(-problem.rank // 128)
    if tiles >= 100:
        return large
    if 2 * tiles >= 100:
        return Plan(128, 128, 64, 4, 2, True)
    return Plan(64, 128, 64, 6, 2, False)


def project_update(
    gradients: Sequence[jax.Array],
    projectors: Sequence[jax.Array],
    moments: Sequence[Sequence[jax.Array]],
    scalars: Sequence[Sequence[jax.Array]],
    inner: Elementwise,
    *,
    rows: Sequence[bool],
    update_dtype: Any,
    plan: Plan | None = None,
    interpret: Any = None,
) -> tuple[list[jax.Array], list[tuple[jax.Array, ...]]]:
    """See `optax_gale.pallas.project_update`.

    ``plan`` overrides the tiling, ``interpret`` runs the kernel on a CPU.
    """
    scalars = one_for_each(scalars, len(gradients))
    updates: dict[int, jax.Array] = {}
    new: dict[int, tuple[jax.Array, ...]] = {}
    for where in mosaic.launches("project_update", gradients, projectors, rows):
        u, m = _launch(
            [gradients[i] for i in where],
            [projectors[i] for i in where],
            [moments[i] for i in where],
            [scalars[i] for i in where],
            inner,
            rows=rows[where[0]],
            update_dtype=update_dtype,
            plan=plan,
            interpret=interpret,
        )
        updates |= zip(where, u, strict=True)
        new |= zip(where, m, strict=True)
    order = range(len(gradients))
    return [updates[i] for i in order], [new[i] for i in order]


def _launch(
    gradients: Sequence[jax.Array],
    projectors: Sequence[jax.Array],
    moments: Sequence[Sequence[jax.Array]],
    scalars: Sequence[Sequence[jax.Array]],
    inner: Elementwise,
    *,
    rows: bool,
    update_dtype: Any,
    plan: Plan | None,
    interpret: Any,
) -> tuple[list[jax.Array], list[tuple[jax.Array, ...]]]:
    problem = Problem.of("project_update", gradients, projectors, rows=rows)
    dtype = gradients[0].dtype
    g = [mosaic.stacked(x) for x in gradients]
    p = [mosaic.stacked(x.astype(dtype)) for x in projectors]
    left, right = (p, g) if rows else (g, p)
    inner, numbers = lowerable(inner, scalars)
    dtypes = [update_dtype, *(x.dtype for x in moments[0])]
    kernel = _Kernel(problem, plan or plan_for(problem), inner, dtypes, bool(interpret))
    refs = mosaic.references([mosaic.stacked(x) for old in moments for x in old])
    shape = (problem.batch, *kernel.shape)
    updates = mosaic.launch(
        kernel.body,
        [numbers, *left, *right, *refs],
        name="project_update",
        scratch=kernel.scratch(),
        outputs=[mosaic.output(shape, update_dtype, like=x) for x in g],
        blocks=kernel.blocks,
        warpgroups=kernel.warpgroups,
        interpret=interpret,
        auto_barriers=kernel.plan.auto_barriers,
    )
    batch = gradients[0].shape[:-2]
    arrays = iter([jax.freeze(x).reshape(*batch, *kernel.shape) for x in refs])
    new = [tuple(next(arrays) for _ in old) for old in moments]
    return [x.reshape(*batch, *kernel.shape) for x in updates], new


class _Tile(NamedTuple):
    """A tile of R.

    Attributes:
      leaf: which leaf it belongs to.
      matrix: which matrix of it.
      row: its first row.
      column: its first column.
    """

    leaf: Any
    matrix: Any
    row: Any
    column: Any


class _Kernel:
    """A left operand times a right one ``(k, n)``, and the inner on the product.

    The left one is the transpose of ``(k, m)`` where the rows are projected, else ``(m, k)``; the
    product, R, is ``(m, n)``.
    """

    def __init__(
        self,
        problem: Problem,
        plan: Plan,
        inner: Elementwise,
        dtypes: Sequence[Any],
        interpret: bool,
    ):
        self.problem, self.plan, self.inner, self.interpret = problem, plan, inner, interpret
        self.dtype = jnp.dtype(problem.dtype)
        self.dtypes = [jnp.dtype(x) for x in dtypes]
        m, n, rank = problem.m, problem.n, problem.rank
        self.shape = (rank, n) if problem.rows else (m, rank)
        contracted = m if problem.rows else n
        self.steps = -(-contracted // plan.block_k)
        self.depth = plan.block_k // WIDTH
        # The right operand's blocks are as wide as the tile where no ragged edge forbids.
        columns = self.shape[1]
        tiled = mosaic.fits_tiles(contracted, columns) and not columns % plan.block_n
        self.width = plan.block_n if tiled else WIDTH
        self.tile_rows = -(-self.shape[0] // plan.block_m)
        self.tile_columns = -(-columns // plan.block_n)
        self.tiles = problem.leaves * problem.batch * self.tile_rows * self.tile_columns
        self.blocks = min(plan.blocks or mosaic.multiprocessors(), self.tiles)
        self.rows = plan.block_m // (_CONSUMERS if plan.split_rows else 1)
        self.columns = plan.block_n // (1 if plan.split_rows else _CONSUMERS)
        self.moments = len(self.dtypes) - 1
        self.warpgroups = _CONSUMERS + (2 if self.moments else 1)
        self.pieces = [
            (i, j)
            for i in range(0, self.rows, _PIECE_ROWS)
            for j in range(0, self.columns, _PIECE_COLUMNS)
        ]

    def scratch(self) -> dict[str, Any]:
        """Types of the shared memory and the barriers."""
        plan = self.plan
        left = (self.depth, plan.block_m, WIDTH)
        if self.problem.rows:
            left = (plan.block_m // WIDTH, plan.block_k, WIDTH)
        right = (plan.block_n // self.width, plan.block_k, self.width)
        piece = (_CONSUMERS * plan.piece_slots, _PIECE_ROWS, _PIECE_COLUMNS)

        def memory(shape, dtype):
            return mosaic.block_type(shape, dtype, interpret=self.interpret)

        return {
            "left": memory((plan.slots, *left), self.dtype),
            "right": memory((plan.slots, *right), self.dtype),
            "pieces": [memory(piece, dtype) for dtype in self.dtypes],
            "operand_ring": mosaic.barriers(
                plan.slots, copies=left[0] + right[0], consumers=_CONSUMERS
            ),
            "piece_ring": mosaic.barriers(
                plan.piece_slots, copies=max(self.moments, 1), consumers=1, rings=_CONSUMERS
            ),
        }

    def body(self, numbers: Any, *args: Any) -> None:
        """The kernel."""
        *refs, scratch = args
        leaves = self.problem.leaves
        self.numbers = numbers
        self.left, self.right = refs[:leaves], refs[leaves : 2 * leaves]
        moments, updates = refs[2 * leaves : -leaves], refs[-leaves:]
        # For each leaf U, and its moments.
        self.arrays = [
            [u, *moments[i * self.moments : (i + 1) * self.moments]] for i, u in enumerate(updates)
        ]
        self.left_blocks, self.right_blocks, *self.piece_blocks = (
            mosaic.both_views(memory, interpret=self.interpret)
            for memory in (scratch["left"], scratch["right"], *scratch["pieces"])
        )
        self.operand_ring = Ring(self.plan.slots, **scratch["operand_ring"])
        slots = self.plan.piece_slots
        self.piece_ring = lambda warpgroup: Ring(
            slots, **scratch["piece_ring"], first=warpgroup * slots
        )
        producers = [self.produce_operands]
        if self.moments:
            producers.append(self.produce_moments)
        mosaic.roles(_CONSUMERS, self.consume, *producers)

    def tile(self, index: Any) -> _Tile:
        """Where a tile lies; those that read the same part of the gradient follow one another."""
        plan = self.plan
        if self.problem.rows:
            i, index = lax.rem(index, self.tile_rows), lax.div(index, self.tile_rows)
            j, index = lax.rem(index, self.tile_columns), lax.div(index, self.tile_columns)
        else:
            j, index = lax.rem(index, self.tile_columns), lax.div(index, self.tile_columns)
            i, index = lax.rem(index, self.tile_rows), lax.div(index, self.tile_rows)
        batch = self.problem.batch
        leaf, matrix = lax.div(index, batch), lax.rem(index, batch)
        return _Tile(leaf, matrix, i * plan.block_m, j * plan.block_n)

    def offsets(self, warpgroup: Any) -> tuple[Any, Any]:
        """Where a warpgroup's part of a tile begins."""
        if self.plan.split_rows:
            return warpgroup * self.rows, 0
        return 0, warpgroup * self.columns

    def produce_operands(self) -> None:
        """Fills the slots of the operands, as far ahead as there are free ones."""

        def work(turn, index, step):
            tile = self.tile(index)

            def fetch(k, step):
                self.fetch_operands(tile, k * self.plan.block_k, step)
                return step + 1

            return lax.fori_loop(0, self.steps, fetch, step)

        _, steps = mosaic.persistent(self.tiles, self.blocks, work, jnp.int32(0))
        self.operand_ring.drain(steps)

    def fetch_operands(self, tile: _Tile, k: Any, step: Any) -> None:
        """Fetches a slice of both operands."""
        ring, plan = self.operand_ring, self.plan
        ring.wait_free(step)
        slot, barrier = ring.slot(step), ring.arrivals(step)

        def fetch(operands):
            left, right = operands
            for d in range(self.left_blocks.rows.shape[1]):
                if self.problem.rows:
                    window = pl.ds(k, plan.block_k), pl.ds(tile.row + d * WIDTH, WIDTH)
                else:
                    window = pl.ds(tile.row, plan.block_m), pl.ds(k + d * WIDTH, WIDTH)
                source = left.at[tile.matrix, *window]
                plgpu.copy_gmem_to_smem(source, self.left_blocks.rows.at[slot, d], barrier)
            for j in range(plan.block_n // self.width):
                columns = pl.ds(tile.column + j * self.width, self.width)
                source = right.at[tile.matrix, pl.ds(k, plan.block_k), columns]
                plgpu.copy_gmem_to_smem(source, self.right_blocks.rows.at[slot, j], barrier)

        mosaic.select(tile.leaf, fetch, list(zip(self.left, self.right, strict=True)))

    def produce_moments(self) -> None:
        """Fills the slots of the moments, as far ahead as there are free ones."""

        def work(turn, index, step):
            tile = self.tile(index)
            for i, j in self.pieces:
                for warpgroup in range(_CONSUMERS):
                    self.fetch_moments(tile, i, j, warpgroup, step)
                step = step + 1
            return step

        _, steps = mosaic.persistent(self.tiles, self.blocks, work, jnp.int32(0))
        for warpgroup in range(_CONSUMERS):
            self.piece_ring(warpgroup).drain(steps)

    def window(self, tile: _Tile, i: int, j: int, warpgroup: Any) -> tuple[Any, ...]:
        """Where a piece lies in the inner's arrays."""
        row, column = self.offsets(warpgroup)
        rows = pl.ds(tile.row + (row + i), _PIECE_ROWS)
        return tile.matrix, rows, pl.ds(tile.column + (column + j), _PIECE_COLUMNS)

    def fetch_moments(self, tile: _Tile, i: int, j: int, warpgroup: int, step: Any) -> None:
        """Fetches a piece of the moments."""
        ring = self.piece_ring(warpgroup)
        ring.wait_free(step)
        slot = ring.first + ring.slot(step)

        def fetch(arrays):
            for moment, blocks in zip(arrays[1:], self.piece_blocks[1:], strict=True):
                source = moment.at[self.window(tile, i, j, warpgroup)]
                plgpu.copy_gmem_to_smem(source, blocks.rows.at[slot], ring.arrivals(step))

        mosaic.select(tile.leaf, fetch, self.arrays)

    def consume(self, warpgroup: Any) -> None:
        """Multiplies, and runs the inner."""
        row, column = self.offsets(warpgroup)
        ring = self.piece_ring(warpgroup)

        def work(turn, index, step):
            tile = self.tile(index)
            product = pl.run_scoped(
                lambda acc: self.multiply(acc, turn * self.steps, row, column),
                plgpu.ACC((self.rows, self.columns), jnp.float32),
            )
            scalars = [self.numbers[tile.leaf, i] for i in range(self.inner.scalars)]
            for i, j in self.pieces:
                piece = product[i : i + _PIECE_ROWS, j : j + _PIECE_COLUMNS]
                self.run_inner(piece, scalars, ring, step)
                self.store(tile, i, j, warpgroup, ring, step)
                step = step + 1
            return step

        _, steps = mosaic.persistent(self.tiles, self.blocks, work, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)
        if self.moments:
            ring.free(steps - 1)

    def multiply(self, acc: Any, first: Any, row: Any, column: Any) -> Any:
        """The product for a warpgroup's part of a tile."""
        ring = self.operand_ring
        width = min(self.columns, self.width, _MAX_COLUMNS)
        pieces = self.columns // width

        @pl.loop(0, self.steps)
        def _(k):
            step = first + k
            ring.wait_filled(step)
            slot = ring.slot(step)
            for d in range(self.depth):
                for j in range(pieces):
                    right = self.right_tile(slot, d, column, j * width, width)
                    for rows, left in self.left_tiles(slot, d, row):
                        plgpu.wgmma(acc.at[rows, j * width : (j + 1) * width], left, right)
            # The products of the step before are done.
            plgpu.wgmma_wait(self.depth * pieces * len(self.left_tiles(slot, 0, row)))

            @pl.when(k > 0)
            def _():
                ring.free(step - 1)

        plgpu.wgmma_wait(0)
        ring.free(first + self.steps - 1)
        return acc[...]

    def left_tiles(self, slot: Any, d: int, row: Any) -> list[tuple[slice, Any]]:
        """Pieces of the left operand, ``(rows, WIDTH)``, and the rows that they are."""
        tiles = self.left_blocks.tiles
        if not self.problem.rows:
            return [(slice(0, self.rows), tiles.at[slot, d, pl.ds(row, self.rows)])]
        first = mosaic.blocks_before(row)
        return [
            (
                slice(i * WIDTH, (i + 1) * WIDTH),
                tiles.at[slot, first + i, pl.ds(d * WIDTH, WIDTH)].transpose((1, 0)),
            )
            for i in range(self.rows // WIDTH)
        ]

    def right_tile(self, slot: Any, d: int, column: Any, offset: int, width: int) -> Any:
        """A piece of the right operand, ``(WIDTH, width)``."""
        tiles, rows = self.right_blocks.tiles, pl.ds(d * WIDTH, WIDTH)
        if self.width == WIDTH:
            return tiles.at[slot, mosaic.blocks_before(column) + offset // WIDTH, rows]
        return tiles.at[slot, 0, rows, pl.ds(column + offset, width)]

    def run_inner(self, piece: Any, scalars: Sequence[Any], ring: Ring, step: Any) -> None:
        """Runs the inner on a piece of R, in shared memory but for R."""
        slot = ring.first + ring.slot(step)
        if self.moments:
            ring.wait_filled(step)
        moments = [blocks.tiles[slot] for blocks in self.piece_blocks[1:]]
        results = self.inner([piece, *moments], scalars)
        for blocks, result, dtype in zip(self.piece_blocks, results, self.dtypes, strict=True):
            blocks.tiles[slot] = result.astype(dtype)

    def store(self, tile: _Tile, i: int, j: int, warpgroup: Any, ring: Ring, step: Any) -> None:
        """Writes a piece of U and of the moments, and frees the slot before."""
        slot = ring.first + ring.slot(step)
        plgpu.commit_smem()

        def write(arrays):
            for array, blocks in zip(arrays, self.piece_blocks, strict=True):
                target = array.at[self.window(tile, i, j, warpgroup)]
                plgpu.copy_smem_to_gmem(blocks.rows.at[slot], target, commit_group=False)

        mosaic.select(tile.leaf, write, self.arrays)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        if self.moments:

            @pl.when(step > 0)
            def _():
                ring.free(step - 1)
