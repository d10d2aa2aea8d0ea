"""For Hopper: copies in bulk run ahead of the tensor cores, and the weight is read meanwhile."""

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

refusal = mosaic.refusal

_CONSUMERS = 2


class Plan(NamedTuple):
    """How the work is cut.

    Attributes:
      block_m: rows of a tile of the weight.
      block_n: columns of a tile.
      block_k: how much of the rank one slot holds.
      slots: slots for the left operand, and for the right one unless it is resident.
      weight_slots: slots for tiles of the weight.
      resident: whether a thread block keeps a panel of the right operand for a run of tiles.
      run: tiles below one another that a thread block takes in a row.
      split_rows: whether the two warpgroups share a tile's rows, or its columns.
      blocks: how many thread blocks; None for one on each multiprocessor.
      auto_barriers: whether the compiler guards every access to shared memory.
    """

    block_m: int
    block_n: int
    block_k: int
    slots: int
    weight_slots: int
    resident: bool
    run: int
    split_rows: bool
    blocks: int | None = None
    auto_barriers: bool = True


def plan_for(problem: Problem) -> Plan:
    """A plan for problems like this one."""
    rank = -(-problem.rank // WIDTH) * WIDTH
    matrices = problem.leaves * problem.batch
    if rank <= 128:
        columns = 256 if matrices * problem.m * problem.n >= 2**25 else 128
        return Plan(64, columns, rank, 2, 4, resident=True, run=8, split_rows=False)
    if rank <= 256:
        return Plan(64, 128, rank, 2, 4, resident=True, run=8, split_rows=False)
    return Plan(128, 256, 64, 3, 1, resident=False, run=1, split_rows=True)


def back_project_apply(
    weights: Sequence[jax.Array],
    projectors: Sequence[jax.Array],
    updates: Sequence[jax.Array],
    scalars: Sequence[Sequence[jax.Array]],
    *,
    rows: Sequence[bool],
    plan: Plan | None = None,
    interpret: Any = None,
) -> list[jax.Array]:
    """See `optax_gale.pallas.back_project_apply`; ``scalars`` are scale and decay.

    ``plan`` overrides the tiling, ``interpret`` runs the kernel on a CPU.
    """
    out: dict[int, jax.Array] = {}
    scalars = one_for_each(scalars, len(weights))
    for where in mosaic.launches("back_project_apply", weights, projectors, rows):
        pairs = [scalars[i] for i in where]
        new = _launch(
            [weights[i] for i in where],
            [projectors[i] for i in where],
            [updates[i] for i in where],
            jnp.stack([jnp.stack([jnp.float32(x) for x in pair]) for pair in pairs]),
            rows=rows[where[0]],
            plan=plan,
            interpret=interpret,
        )
        out |= zip(where, new, strict=True)
    return [out[i] for i in range(len(weights))]


def _launch(
    weights: Sequence[jax.Array],
    projectors: Sequence[jax.Array],
    updates: Sequence[jax.Array],
    numbers: jax.Array,
    *,
    rows: bool,
    plan: Plan | None,
    interpret: Any,
) -> list[jax.Array]:
    problem = Problem.of("back_project_apply", weights, projectors, rows=rows)
    dtype = weights[0].dtype
    w = [mosaic.stacked(x) for x in weights]
    p = [mosaic.stacked(x.astype(dtype)) for x in projectors]
    u = [mosaic.stacked(x.astype(dtype)) for x in updates]
    left, right = (p, u) if rows else (u, p)
    kernel = _Kernel(problem, plan or plan_for(problem), bool(interpret))
    refs = mosaic.references(w)
    mosaic.launch(
        kernel.body,
        [numbers, *left, *right, *refs],
        name="back_project_apply",
        scratch=kernel.scratch(),
        blocks=kernel.blocks,
        warpgroups=_CONSUMERS + 1,
        interpret=interpret,
        auto_barriers=kernel.plan.auto_barriers,
    )
    return [jax.freeze(x).reshape(old.shape) for x, old in zip(refs, weights, strict=True)]


class _Unit(NamedTuple):
    """A run of tiles below one another.

    Attributes:
      leaf: which leaf it belongs to.
      matrix: which matrix of it.
      row: the first row.
      column: the first column.
      tiles: how many tiles.
    """

    leaf: Any
    matrix: Any
    row: Any
    column: Any
    tiles: Any


class _Kernel:
    """The weight plus a left operand ``(m, r)`` times a right one.

    The right one is ``(r, n)`` where the rows are projected, else ``(n, r)``.
    """

    def __init__(self, problem: Problem, plan: Plan, interpret: bool):
        self.problem, self.plan, self.interpret = problem, plan, interpret
        m, n, rank = problem.m, problem.n, problem.rank
        self.dtype = jnp.dtype(problem.dtype)
        self.steps = -(-rank // plan.block_k)
        self.depth = plan.block_k // WIDTH
        # The right operand's blocks are as wide as the tile where no ragged edge forbids.
        tiled = problem.rows and mosaic.fits_tiles(rank, n) and not n % plan.block_n
        self.width = plan.block_n if tiled else WIDTH
        self.tile_rows = -(-m // plan.block_m)
        self.panels = -(-n // plan.block_n)
        self.runs = -(-self.tile_rows // plan.run)
        self.units = problem.leaves * problem.batch * self.panels * self.runs
        self.blocks = min(plan.blocks or mosaic.multiprocessors(), self.units)
        self.rows = plan.block_m // (_CONSUMERS if plan.split_rows else 1)
        self.columns = plan.block_n // (1 if plan.split_rows else _CONSUMERS)

    def scratch(self) -> dict[str, Any]:
        """Types of the shared memory and the barriers."""
        plan, depth = self.plan, self.depth
        right_slots = self.steps if plan.resident else plan.slots
        right = [plan.block_n, WIDTH]
        if self.problem.rows:
            right = [plan.block_n // self.width, WIDTH, self.width]
        columns = plan.block_n // WIDTH
        right_copies = self._right_copies()
        left_copies = depth + (0 if plan.resident else right_copies)

        def memory(*shape):
            return mosaic.block_type(shape, self.dtype, interpret=self.interpret)

        return {
            "left": memory(plan.slots, depth, plan.block_m, WIDTH),
            "right": memory(right_slots, depth, *right),
            "weight": memory(plan.weight_slots, columns, plan.block_m, WIDTH),
            "operand_ring": mosaic.barriers(plan.slots, copies=left_copies, consumers=_CONSUMERS),
            "weight_ring": mosaic.barriers(plan.weight_slots, copies=columns, consumers=_CONSUMERS),
            "panel_ring": mosaic.barriers(
                1, copies=right_copies * self.steps if plan.resident else 1, consumers=_CONSUMERS
            ),
        }

    def _right_copies(self) -> int:
        return self.depth * (self.plan.block_n // self.width if self.problem.rows else 1)

    def body(self, numbers: Any, *args: Any) -> None:
        """The kernel."""
        *refs, scratch = args
        leaves = self.problem.leaves
        self.numbers = numbers
        self.left, self.right, self.weights = (
            refs[i * leaves : (i + 1) * leaves] for i in range(3)
        )
        self.left_blocks, self.right_blocks, self.weight_blocks = (
            mosaic.both_views(scratch[name], interpret=self.interpret)
            for name in ("left", "right", "weight")
        )
        self.operand_ring = Ring(self.plan.slots, **scratch["operand_ring"])
        self.weight_ring = Ring(self.plan.weight_slots, **scratch["weight_ring"])
        self.panel_ring = Ring(1, **scratch["panel_ring"])
        mosaic.roles(_CONSUMERS, self.consume, self.produce)

    def unit(self, index: Any) -> _Unit:
        """Where a unit of work lies."""
        plan = self.plan
        run, index = lax.rem(index, self.runs), lax.div(index, self.runs)
        panel, index = lax.rem(index, self.panels), lax.div(index, self.panels)
        batch = self.problem.batch
        first = run * plan.run
        tiles = lax.min(self.tile_rows - first, plan.run)
        leaf, matrix = lax.div(index, batch), lax.rem(index, batch)
        return _Unit(leaf, matrix, first * plan.block_m, panel * plan.block_n, tiles)

    def produce(self) -> None:
        """Fills the slots, as far ahead as there are free ones."""
        plan = self.plan
        # The panel goes behind the first tiles: it waits for the panel before, they need not. Not
        # behind one whose slot is freed only by a tile that needs the panel.
        panel_after = max(0, min(plan.slots // self.steps - 1, plan.weight_slots - 2))
        weight_after = min(plan.slots, self.steps - 1) if plan.weight_slots == 1 else 0

        def work(turn, index, step):
            unit = self.unit(index)

            def tile(i, step):
                row = unit.row + i * plan.block_m

                @pl.loop(0, self.steps)
                def _(k):
                    @pl.when(k == weight_after)
                    def _():
                        self.fetch_weight(unit, row, step)

                    self.fetch_operands(unit, row, k, step * self.steps + k)

                if plan.resident:
                    last = lax.min(unit.tiles - 1, panel_after)

                    @pl.when(i == last)
                    def _():
                        self.fetch_panel(unit, turn)

                return step + 1

            return lax.fori_loop(0, unit.tiles, tile, step)

        turns, tiles = mosaic.persistent(self.units, self.blocks, work, jnp.int32(0))
        self.operand_ring.drain(tiles * self.steps)
        self.weight_ring.drain(tiles)
        if plan.resident:
            self.panel_ring.drain(turns)

    def fetch_weight(self, unit: _Unit, row: Any, step: Any) -> None:
        """Fetches a tile of the weight."""
        ring, plan = self.weight_ring, self.plan
        ring.wait_free(step)

        def fetch(weight):
            for j in range(plan.block_n // WIDTH):
                columns = pl.ds(unit.column + j * WIDTH, WIDTH)
                plgpu.copy_gmem_to_smem(
                    weight.at[unit.matrix, pl.ds(row, plan.block_m), columns],
                    self.weight_blocks.rows.at[ring.slot(step), j],
                    ring.arrivals(step),
                )

        mosaic.select(unit.leaf, fetch, self.weights)

    def fetch_operands(self, unit: _Unit, row: Any, k: Any, step: Any) -> None:
        """Fetches a slice of the left operand, and of the right one unless it is resident."""
        ring, plan = self.operand_ring, self.plan
        ring.wait_free(step)
        slot, barrier = ring.slot(step), ring.arrivals(step)

        def fetch(operands):
            left, right = operands
            for d in range(self.depth):
                rank = pl.ds(k * plan.block_k + d * WIDTH, WIDTH)
                source = left.at[unit.matrix, pl.ds(row, plan.block_m), rank]
                plgpu.copy_gmem_to_smem(source, self.left_blocks.rows.at[slot, d], barrier)
            if not plan.resident:
                self.fetch_right(right, unit, k, slot, barrier)

        mosaic.select(unit.leaf, fetch, list(zip(self.left, self.right, strict=True)))

    def fetch_panel(self, unit: _Unit, turn: Any) -> None:
        """Fetches a panel of the right operand."""
        self.panel_ring.wait_free(turn)
        barrier = self.panel_ring.arrivals(turn)

        def fetch(right):
            @pl.loop(0, self.steps)
            def _(k):
                self.fetch_right(right, unit, k, k, barrier)

        mosaic.select(unit.leaf, fetch, self.right)

    def fetch_right(self, right: Any, unit: _Unit, k: Any, slot: Any, barrier: Any) -> None:
        """Fetches a slice of the right operand."""
        plan, blocks = self.plan, self.right_blocks.rows
        for d in range(self.depth):
            rank = pl.ds(k * plan.block_k + d * WIDTH, WIDTH)
            if not self.problem.rows:
                columns = pl.ds(unit.column, plan.block_n)
                source = right.at[unit.matrix, columns, rank]
                plgpu.copy_gmem_to_smem(source, blocks.at[slot, d], barrier)
                continue
            for j in range(plan.block_n // self.width):
                columns = pl.ds(unit.column + j * self.width, self.width)
                source = right.at[unit.matrix, rank, columns]
                plgpu.copy_gmem_to_smem(source, blocks.at[slot, d, j], barrier)

    def consume(self, warpgroup: Any) -> None:
        """Multiplies, and updates the weight."""
        plan = self.plan
        row = warpgroup * self.rows if plan.split_rows else 0
        column = 0 if plan.split_rows else warpgroup * self.columns

        def work(turn, index, step):
            unit = self.unit(index)
            scale, decay = self.numbers[unit.leaf, 0], self.numbers[unit.leaf, 1]
            if plan.resident:
                self.panel_ring.wait_filled(turn)

            def tile(i, step):
                product = pl.run_scoped(
                    lambda acc: self.multiply(acc, step, row, column),
                    plgpu.ACC((self.rows, self.columns), jnp.float32),
                )
                if plan.resident:

                    @pl.when(i == unit.tiles - 1)
                    def _():
                        self.panel_ring.free(turn)

                self.weight_ring.wait_filled(step)
                self.apply(product, scale, decay, step, row, column)
                self.store(unit, unit.row + i * plan.block_m, step, row, column)
                return step + 1

            return lax.fori_loop(0, unit.tiles, tile, step)

        _, tiles = mosaic.persistent(self.units, self.blocks, work, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)
        if self.weight_ring.slots > 1:
            self.weight_ring.free(tiles - 1)

    def multiply(self, acc: Any, tile: Any, row: Any, column: Any) -> Any:
        """The product for a warpgroup's part of a tile."""
        plan, ring = self.plan, self.operand_ring
        pieces = 1 if not self.problem.rows else max(1, self.columns // self.width)
        width = self.columns // pieces

        @pl.loop(0, self.steps)
        def _(k):
            step = tile * self.steps + k
            ring.wait_filled(step)
            slot = ring.slot(step)
            for d in range(self.depth):
                left = self.left_blocks.tiles.at[slot, d, pl.ds(row, self.rows)]
                for j in range(pieces):
                    right = self.right_tile(k if plan.resident else slot, d, j, column)
                    plgpu.wgmma(acc.at[:, j * width : (j + 1) * width], left, right)
            # The products of the step before are done.
            plgpu.wgmma_wait(self.depth * pieces)

            @pl.when(k > 0)
            def _():
                ring.free(step - 1)

        plgpu.wgmma_wait(0)
        ring.free((tile + 1) * self.steps - 1)
        return acc[...]

    def right_tile(self, slot: Any, d: int, j: int, column: Any) -> Any:
        """A piece of the right operand, ``(WIDTH, columns)``."""
        tiles = self.right_blocks.tiles
        if not self.problem.rows:
            return tiles.at[slot, d, pl.ds(column, self.columns)].transpose((1, 0))
        if self.width == WIDTH:
            first = mosaic.blocks_before(column)
            return tiles.at[slot, d, first + j]
        return tiles.at[slot, d, 0, :, pl.ds(column, self.columns)]

    def apply(self, product: Any, scale: Any, decay: Any, step: Any, row: Any, column: Any) -> None:
        """Updates a warpgroup's part of a tile of the weight, in shared memory."""
        slot = self.weight_ring.slot(step)
        first = mosaic.blocks_before(column)
        for j in range(self.columns // WIDTH):
            block = self.weight_blocks.tiles.at[slot, first + j, pl.ds(row, self.rows)]
            old = block[...].astype(jnp.float32)
            change = decay * old + scale * product[:, j * WIDTH : (j + 1) * WIDTH]
            block[...] = (old + change).astype(self.dtype)

    def store(self, unit: _Unit, tile_row: Any, step: Any, row: Any, column: Any) -> None:
        """Writes a warpgroup's part of a tile back, and frees the slot before."""
        ring = self.weight_ring
        slot = ring.slot(step)
        first = mosaic.blocks_before(column)
        plgpu.commit_smem()

        def write(weight):
            for j in range(self.columns // WIDTH):
                columns = pl.ds(unit.column + column + j * WIDTH, WIDTH)
                plgpu.copy_smem_to_gmem(
                    self.weight_blocks.rows.at[slot, first + j, pl.ds(row, self.rows)],
                    weight.at[unit.matrix, pl.ds(tile_row + row, self.rows), columns],
                    commit_group=False,
                )

        mosaic.select(unit.leaf, write, self.weights)
        plgpu.commit_smem_to_gmem_group()
        if ring.slots == 1:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            ring.free(step)
            return
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)

        @pl.when(step > 0)
        def _():
            ring.free(step - 1)
