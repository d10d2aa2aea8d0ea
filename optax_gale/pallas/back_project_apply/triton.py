"""With Triton, on Ampere and later: the weight is read while the product runs.

A short product (small rank) is bound by memory: a program keeps one panel of the right operand and
walks down the weight, the next tiles under way while it multiplies. A long one is bound by
arithmetic: a program computes one tile, and reads its weight first.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from optax_gale.pallas import _triton, dispatch
from optax_gale.pallas._triton import refusal
from optax_gale.pallas.dispatch import Problem

__all__ = ["Tile", "back_project_apply", "choose_tile", "refusal"]


class Tile(NamedTuple):
    """How the work is cut up.

    Attributes:
      rows: of the weight, in one tile.
      columns: of the weight, in one tile.
      depth: of the product, in one step; no less than the rank where a program walks.
      warps: of a program.
      stages: steps, or tiles of a panel, under way at once.
      walk: tiles that a program takes, one below the other; 0 for one tile in steps.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    walk: int = 0


def choose_tile(problem: Problem, capability: tuple[int, int]) -> Tile:
    """A tile for a problem on a GPU of a compute capability."""
    if problem.dtype == "float32":
        return Tile(64, 64, 32, 4, 2)
    few = problem.leaves * problem.batch * problem.m * problem.n < 2**24
    if _triton.is_small(problem):  # parts of one launch have the same warps and stages
        return Tile(64, 64, 32, 4, 4)
    if capability < (9, 0):
        return Tile(128, 64, 32, 4, 3) if few else Tile(128, 128, 32, 8, 3)
    if problem.rank > 128:
        return Tile(128, 256, 64, 8, 4)
    if few:
        return Tile(64, 64, 64, 4, 3)
    return Tile(64, 256, max(16, _triton.power_of_two(problem.rank)), 4, 3, 16)


def back_project_apply(
    weights: Sequence[jax.Array],
    projectors: Sequence[jax.Array],
    updates: Sequence[jax.Array],
    scalars: Sequence[Sequence[jax.Array]],
    *,
    rows: Sequence[bool],
    tile: Tile | None = None,
) -> list[jax.Array]:
    """See `optax_gale.pallas.back_project_apply`; ``tile`` overrides the chosen one.

    ``scalars`` are scale and decay.
    """
    found = dispatch.problems("back_project_apply", weights, projectors, rows)
    parts = [
        _part(
            problem,
            tile or choose_tile(problem, _triton.capability()),
            [weights[i] for i in where],
            [projectors[i] for i in where],
            [updates[i] for i in where],
            [scalars[i] for i in where] if len(scalars) > 1 else scalars,
        )
        for problem, where in found
    ]
    new: dict[int, jax.Array] = {}
    for (_, where), out in zip(found, _triton.call("back_project_apply", parts), strict=True):
        new |= zip(where, out["weight"], strict=True)
    return [new[i] for i in range(len(weights))]


def _part(
    problem: Problem,
    tile: Tile,
    weights: Sequence[jax.Array],
    projectors: Sequence[jax.Array],
    updates: Sequence[jax.Array],
    scalars: Sequence[Sequence[jax.Array]],
) -> _triton.Part:
    """The work on leaves that are alike."""
    updates = [u.astype(problem.dtype) for u in updates]
    transposed = not problem.rows
    if problem.rows and problem.n % _triton.vector(problem.dtype):
        # Its rows are not aligned, its columns are, and it is small beside the weight.
        updates, transposed = [u.mT for u in updates], True
    tall, wide, programs = _tiles(problem, tile)
    return _triton.Part(
        body=_body(problem._replace(leaves=1), tile, transposed, tall, wide),
        programs=programs,
        inputs={"projector": _triton.rounded(projectors, problem), "update": updates},
        donated={"weight": weights},
        fresh={},
        scalars=scalars,
        warps=tile.warps,
        stages=tile.stages,
        alone=not _triton.is_small(problem),
    )


def _tiles(problem: Problem, tile: Tile) -> tuple[int, int, int]:
    """Rows and columns of tiles in a class of rows, and the programs that serve a leaf."""
    period, vector = _triton.alignment(problem.m, problem.n, problem.dtype)
    tall = -(-problem.m // period // tile.rows)
    # Moved to a boundary, a row may reach into one more tile.
    wide = -(-(problem.n + (vector - 1 if period > 1 else 0)) // tile.columns)
    walks = -(-tall // (tile.walk or 1))
    return tall, wide, problem.batch * period * walks * wide


@functools.cache
def _body(problem: Problem, tile: Tile, transposed: bool, tall: int, wide: int) -> Any:
    """What a program does, for `_triton.call`."""
    import triton.language as tl

    jit = _triton.jit_for(problem, tile, transposed, tall, wide)
    period, vector = _triton.alignment(problem.m, problem.n, problem.dtype)
    BY_ROWS = tl.constexpr(problem.rows)
    M, N, R = (tl.constexpr(x) for x in (problem.m, problem.n, problem.rank))
    BM, BN, BK = (tl.constexpr(x) for x in tile[:3])
    PERIOD, VECTOR, WALK = (tl.constexpr(x) for x in (period, vector, tile.walk))
    STAGES, WIDE, TRANSPOSED = (tl.constexpr(x) for x in (tile.stages, wide, transposed))
    ROWS = tl.constexpr(problem.m // period)
    # Rows of tiles in all, those whose programs run together, and in a class.
    TALL, GROUP, DOWN = (tl.constexpr(x) for x in (period * tall, 8, tall))
    WALKS = tl.constexpr(period * -(-tall // (tile.walk or 1)))
    EVEN_M, EVEN_N = (
        tl.constexpr(ROWS % tile.rows == 0),
        tl.constexpr(problem.n % tile.columns == 0),
    )
    EVEN_R = tl.constexpr(problem.rank % tile.depth == 0)

    @jit
    def factors(projector, update):
        if BY_ROWS:
            return projector, update
        else:
            return update, projector

    @jit
    def load_left(left, row, k):
        cells = left + row[:, None] * R + k[None, :]
        if EVEN_R:
            return tl.load(cells)
        else:
            return tl.load(cells, mask=(k < R)[None, :], other=0.0)

    @jit
    def load_right(right, column, k):
        # Columns outside the matrix give anything: they are not stored.
        if TRANSPOSED:
            near = tl.minimum(tl.maximum(column, 0), N - 1)
            cells = right + k[:, None] + near[None, :] * R
            if EVEN_R:
                return tl.load(cells)
            else:
                return tl.load(cells, mask=(k < R)[:, None], other=0.0)
        else:
            cells = right + k[:, None] * N + column[None, :]
            if EVEN_R and EVEN_N:
                return tl.load(cells)
            else:
                return tl.load(cells, mask=(k < R)[:, None] & (column < N)[None, :], other=0.0)

    @jit
    def load_weight(cells, row, j, shift):
        if PERIOD == 1 and EVEN_M and EVEN_N:
            return tl.load(cells)
        else:
            place = j * BN + tl.arange(0, BN)
            # Full vectors, which hold some of the neighbours' elements at the ends of a row.
            end = tl.cdiv(shift + N, VECTOR) * VECTOR
            return tl.load(cells, mask=(row < ROWS)[:, None] & (place < end)[None, :])

    @jit
    def store_weight(cells, old, step, scale, decay, row, j, shift):
        wide = old.to(tl.float32)
        new = (wide + decay * wide + scale * step).to(old.dtype)
        place = j * BN + tl.arange(0, BN)
        if PERIOD == 1 and EVEN_M and EVEN_N:
            tl.store(cells, new)
        elif PERIOD == 1:
            tl.store(cells, new, mask=(row < ROWS)[:, None] & (place < N)[None, :])
        else:
            start = tl.cdiv(shift, VECTOR) * VECTOR
            end = (shift + N) // VECTOR * VECTOR
            full = (place >= start) & (place < end)
            tl.store(cells, new, mask=(row < ROWS)[:, None] & full[None, :])
            # The ends of a row share vectors with its neighbours, which other programs write.
            if (j * BN < start) | (j * BN + BN > end):
                rest = (place >= shift) & (place < shift + N) & ~full
                tl.store(cells, new, mask=(row < ROWS)[:, None] & rest[None, :])

    @jit
    def one_tile(projector, update, results, numbers, program):
        left, right = factors(projector, update)
        matrix = (program // (TALL * WIDE)).to(tl.int64)
        # Programs that run together share operands: go through groups of rows of tiles.
        tile = program % (TALL * WIDE)
        above = tile // (GROUP * WIDE) * GROUP
        height = tl.minimum(TALL - above, GROUP)
        i = above + tile % (GROUP * WIDE) % height
        j = tile % (GROUP * WIDE) // height

        scale = tl.load(numbers)
        decay = tl.load(numbers + 1)
        phase = i % PERIOD
        top = i // PERIOD * BM
        lead = phase * N // VECTOR * VECTOR
        shift = phase * N - lead
        row = top + tl.arange(0, BM)
        place = j * BN + tl.arange(0, BN)
        weight = results[0] + matrix * (M * N) + top.to(tl.int64) * (PERIOD * N) + lead + j * BN
        cells = weight + tl.arange(0, BM)[:, None] * (PERIOD * N) + tl.arange(0, BN)[None, :]
        old = load_weight(cells, row, j, shift)

        left += matrix * (M * R)
        right += matrix * (N * R)
        left_row = phase + (row if EVEN_M else tl.minimum(row, ROWS - 1)) * PERIOD
        column = place if PERIOD == 1 else place - shift
        step = tl.zeros((BM, BN), tl.float32)
        for start in range(0, R, BK):
            k = start + tl.arange(0, BK)
            a = load_left(left, left_row, k).to(old.dtype)
            b = load_right(right, column, k).to(old.dtype)
            step = tl.dot(a, b, step, input_precision="ieee")
        store_weight(cells, old, step, scale, decay, row, j, shift)

    @jit
    def one_panel(projector, update, results, numbers, program):
        left, right = factors(projector, update)
        matrix = (program // (WALKS * WIDE)).to(tl.int64)
        walk = program % (WALKS * WIDE) // WIDE
        j = program % (WALKS * WIDE) % WIDE

        scale = tl.load(numbers)
        decay = tl.load(numbers + 1)
        phase = walk % PERIOD
        first = walk // PERIOD * WALK
        lead = phase * N // VECTOR * VECTOR
        shift = phase * N - lead
        place = j * BN + tl.arange(0, BN)
        column = place if PERIOD == 1 else place - shift
        left += matrix * (M * R)
        weight = results[0] + matrix * (M * N) + lead + j * BN
        offsets = tl.arange(0, BM)[:, None] * (PERIOD * N) + tl.arange(0, BN)[None, :]
        k = tl.arange(0, BK)
        panel = load_right(right + matrix * (N * R), column, k).to(results[0].dtype.element_ty)
        for i in tl.range(first, tl.minimum(first + WALK, DOWN), num_stages=STAGES):
            row = i * BM + tl.arange(0, BM)
            cells = weight + tl.cast(i * BM, tl.int64) * (PERIOD * N) + offsets
            old = load_weight(cells, row, j, shift)
            left_row = phase + (row if EVEN_M else tl.minimum(row, ROWS - 1)) * PERIOD
            a = load_left(left, left_row, k).to(old.dtype)
            step = tl.dot(a, panel, input_precision="ieee")
            store_weight(cells, old, step, scale, decay, row, j, shift)

    return one_panel if tile.walk else one_tile
