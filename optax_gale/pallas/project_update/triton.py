"""With Triton, on Ampere and later: the inner runs on a tile of R while registers hold it."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_gale.pallas import _triton, dispatch
from optax_gale.pallas._triton import refusal
from optax_gale.pallas.dispatch import Problem
from optax_gale.pallas.elementwise import Elementwise
from optax_gale.pallas.project_update import epilogue

__all__ = ["Tile", "choose_tile", "project_update", "refusal"]


class Tile(NamedTuple):
    """How the work is cut up.

    Attributes:
      side: of the side that is kept, in one tile of R.
      rank: of the rank, in one tile of R.
      depth: of the projected side, in one step.
      warps: of a program.
      stages: steps under way at once.
      parts: in how many parts a tile of R is finished, since moments need registers too.
    """

    side: int
    rank: int
    depth: int
    warps: int
    stages: int
    parts: int = 1


def choose_tile(problem: Problem, capability: tuple[int, int]) -> Tile:
    """A tile for a problem on a GPU of a compute capability."""
    rank = min(128, max(16, _triton.power_of_two(problem.rank)))
    if problem.dtype == "float32":
        return Tile(64, min(64, rank), 32, 4, 2)
    if _triton.is_small(problem):  # parts of one launch have the same warps and stages
        return Tile(64, min(64, rank), 32, 4, 4)
    kept = problem.n if problem.rows else problem.m
    matrices = problem.leaves * problem.batch * -(-problem.rank // rank)
    # The widest tile that gives every multiprocessor a program or two: each reads all of P.
    sides = (256, 128, 64, 32) if capability >= (9, 0) else (128, 64, 32)
    side = next((s for s in sides if matrices * -(-kept // s) >= 240), 32)
    depth, stages = (64, 4) if capability >= (9, 0) else (32, 3)
    warps = 8 if side * rank >= 256 * 128 or (capability < (9, 0) and side == 128) else 4
    return Tile(side, rank, depth, warps, stages, 8 if side * rank >= 128 * 32 * warps else 1)


def project_update(
    gradients: Sequence[jax.Array],
    projectors: Sequence[jax.Array],
    moments: Sequence[Sequence[jax.Array]],
    scalars: Sequence[Sequence[jax.Array]],
    inner: Elementwise,
    *,
    rows: Sequence[bool],
    update_dtype: Any,
    tile: Tile | None = None,
) -> tuple[list[jax.Array], list[tuple[jax.Array, ...]]]:
    """See `optax_gale.pallas.project_update`; ``tile`` overrides the chosen one."""
    found = dispatch.problems("project_update", gradients, projectors, rows)
    parts = [
        _part(
            problem,
            tile or choose_tile(problem, _triton.capability()),
            [gradients[i] for i in where],
            [projectors[i] for i in where],
            [moments[i] for i in where],
            [scalars[i] for i in where] if len(scalars) > 1 else scalars,
            inner,
            update_dtype,
        )
        for problem, where in found
    ]
    updates: dict[int, jax.Array] = {}
    new: dict[int, tuple[jax.Array, ...]] = {}
    for (_, where), out in zip(found, _triton.call("project_update", parts), strict=True):
        changed = [out[name] for name in _moment_names(moments)]
        updates |= zip(where, out["update"], strict=True)
        new |= {i: tuple(x[k] for x in changed) for k, i in enumerate(where)}
    order = range(len(gradients))
    return [updates[i] for i in order], [new[i] for i in order]


def _moment_names(moments: Sequence[Sequence[jax.Array]]) -> list[str]:
    return [f"moment{k}" for k in range(len(moments[0]))]


def _part(
    problem: Problem,
    tile: Tile,
    gradients: Sequence[jax.Array],
    projectors: Sequence[jax.Array],
    moments: Sequence[Sequence[jax.Array]],
    scalars: Sequence[Sequence[jax.Array]],
    inner: Elementwise,
    update_dtype: Any,
) -> _triton.Part:
    """The work on leaves that are alike."""
    *batch, m, n = gradients[0].shape
    shape = (*batch, problem.rank, n) if problem.rows else (*batch, m, problem.rank)
    numbers = [jnp.asarray(x).dtype for x in scalars[0]]
    dtypes = (jnp.float32, *(x.dtype for x in moments[0]), *numbers)
    vector, stride = _triton.vector(problem.dtype), n
    if problem.rows and n % vector:
        # Rows that start anywhere are copied element by element, and every program would; a copy
        # whose rows are aligned costs one pass.
        stride = -(-n // vector) * vector
        gradients = [_padded(g, stride) for g in gradients]
    tall, wide, programs = _tiles(problem, tile)
    body = _body(
        problem._replace(leaves=1),
        tile,
        tall,
        wide,
        stride,
        epilogue.inner_source(inner, dtypes),
        epilogue.finish_source(inner, numbers),
    )
    names = _moment_names(moments)
    return _triton.Part(
        body=body,
        programs=programs,
        inputs={
            "projector": _triton.rounded(projectors, problem),
            "gradient": gradients,
        },
        donated={name: [x[k] for x in moments] for k, name in enumerate(names)},
        fresh={"update": [jax.ShapeDtypeStruct(shape, update_dtype) for _ in gradients]},
        scalars=scalars,
        warps=tile.warps,
        stages=tile.stages,
        alone=not _triton.is_small(problem),
    )


def _padded(g: jax.Array, length: int) -> jax.Array:
    """Zeros behind the rows, up to a length."""
    return jnp.pad(g, [(0, 0)] * (g.ndim - 1) + [(0, length - g.shape[-1])])


def _tiles(problem: Problem, tile: Tile) -> tuple[int, int, int]:
    """Tiles along the kept side and along the rank, and the programs that serve a leaf."""
    period = 1 if problem.rows else _triton.alignment(problem.m, problem.n, problem.dtype)[0]
    kept = problem.n if problem.rows else problem.m
    tall = period * -(-kept // period // tile.side)
    wide = -(-problem.rank // tile.rank)
    return tall, wide, problem.batch * tall * wide


@functools.cache
def _body(
    problem: Problem,
    tile: Tile,
    tall: int,
    wide: int,
    stride: int,
    inner_source: str,
    finish_source: str,
) -> Any:
    """What a program does, for `_triton.call`."""
    import triton.language as tl
    from triton.language.extra import libdevice

    jit = _triton.jit_for(problem, tile, tall, wide, stride, inner_source, finish_source)
    period, vector = _triton.alignment(problem.m, problem.n, problem.dtype)
    M, N, R = (tl.constexpr(x) for x in (problem.m, problem.n, problem.rank))
    SIDE, RANK, DEPTH = (tl.constexpr(x) for x in tile[:3])
    PERIOD, VECTOR, PARTS = (tl.constexpr(x) for x in (period, vector, tile.parts))
    STRIDE = tl.constexpr(stride)  # of the gradient's rows
    TALL, WIDE, ROWS = (tl.constexpr(x) for x in (tall, wide, problem.m // period))
    LINES = RANK if problem.rows else SIDE
    EVEN_R = tl.constexpr(problem.rank % tile.rank == 0)
    EVEN_M = tl.constexpr(problem.m // period % tile.side == 0)
    EVEN_N = tl.constexpr(problem.n % tile.side == 0)
    EVEN = tl.constexpr((EVEN_N if problem.rows else EVEN_M) and EVEN_R)
    inner = _triton.compiled("inner", inner_source, {"libdevice": libdevice})
    finish = _triton.compiled("finish", finish_source, {"inner": inner})

    @jit
    def finish_parts(
        part,
        base,
        line,
        lines,
        first,
        end,
        numbers,
        results,
        PLACES: tl.constexpr,
        LEFT: tl.constexpr,
    ):
        # Halves of a row stay in the registers that hold them.
        if LEFT == 1:
            place = first + tl.arange(0, PLACES)
            offsets = line[:, None] + place[None, :]
            if EVEN:
                finish(part, base, offsets, None, numbers, results)
            else:
                mask = lines[:, None] & (place < end)[None, :]
                finish(part, base, offsets, mask, numbers, results)
        else:
            HALF: tl.constexpr = PLACES // 2
            MORE: tl.constexpr = LEFT // 2
            a, b = part.reshape(LINES, 2, HALF).trans(0, 2, 1).split()
            finish_parts(a, base, line, lines, first, end, numbers, results, HALF, MORE)
            finish_parts(b, base, line, lines, first + HALF, end, numbers, results, HALF, MORE)

    @jit
    def project_rows(projector, gradient, results, numbers, program):
        # Tiles that read the same columns of G run together.
        matrix = (program // (TALL * WIDE)).to(tl.int64)
        i = program % (TALL * WIDE) % WIDE
        j = program % (TALL * WIDE) // WIDE
        r = i * RANK + tl.arange(0, RANK)
        column = j * SIDE + tl.arange(0, SIDE)
        k = tl.arange(0, DEPTH)
        p_cells = projector + matrix * (M * R) + r[:, None] + k[None, :] * R
        g_cells = gradient + matrix * (M * STRIDE) + k[:, None] * STRIDE + column[None, :]
        p_mask = None if EVEN_R else (r < R)[:, None]
        # Up to the end of the last vector: columns outside the matrix are not stored.
        g_mask = None if EVEN_N else (column < STRIDE)[None, :]
        tile = tl.zeros((RANK, SIDE), tl.float32)
        for _ in range(0, M // DEPTH):
            g = tl.load(g_cells, mask=g_mask)
            p = tl.load(p_cells, mask=p_mask).to(g.dtype)
            tile = tl.dot(p, g, tile, input_precision="ieee")
            p_cells += DEPTH * R
            g_cells += DEPTH * STRIDE
        if M % DEPTH != 0:
            rest = k < M % DEPTH
            g = tl.load(g_cells, mask=rest[:, None] & (column < STRIDE)[None, :], other=0.0)
            p = tl.load(p_cells, mask=(r < R)[:, None] & rest[None, :], other=0.0).to(g.dtype)
            tile = tl.dot(p, g, tile, input_precision="ieee")

        base = matrix * (R * N) + i.to(tl.int64) * (RANK * N)
        line = tl.arange(0, RANK) * N
        finish_parts(tile, base, line, r < R, j * SIDE, N, numbers, results, SIDE, PARTS)

    @jit
    def edge_step(tile, p_cells, g_cells, r, step, shift):
        # Full vectors of G hold elements of the neighbouring rows too, which must not count.
        place = step * DEPTH + tl.arange(0, DEPTH)
        column = place - shift
        inside = (column >= 0) & (column < N)
        p_mask = inside[:, None] & (r < R)[None, :]
        p = tl.load(p_cells + column.to(tl.int64)[:, None] * R, mask=p_mask, other=0.0)
        g_mask = (place < tl.cdiv(shift + N, VECTOR) * VECTOR)[None, :]
        g = tl.load(g_cells + place[None, :], mask=g_mask, other=0.0)
        g = tl.where(inside[None, :], g, 0.0)
        return tl.dot(g, p.to(g.dtype), tile, input_precision="ieee")

    @jit
    def project_columns(projector, gradient, results, numbers, program):
        matrix = (program // (TALL * WIDE)).to(tl.int64)
        j = program % (TALL * WIDE) % WIDE
        i = program % (TALL * WIDE) // WIDE
        phase = i % PERIOD
        top = i // PERIOD * SIDE
        lead = phase * N // VECTOR * VECTOR
        shift = phase * N - lead
        line = tl.arange(0, SIDE)
        near = line if EVEN_M else tl.minimum(line, ROWS - 1 - top)
        r = j * RANK + tl.arange(0, RANK)
        p_cells = projector + matrix * (N * R) + r[None, :]
        p_mask = None if EVEN_R else (r < R)[None, :]
        g_cells = gradient + matrix * (M * N) + top.to(tl.int64) * (PERIOD * N) + lead
        g_cells += near[:, None] * (PERIOD * N)
        tile = tl.zeros((SIDE, RANK), tl.float32)

        # A row of G may begin and end within a step.
        first = 0 if PERIOD == 1 else 1
        last = N // DEPTH if PERIOD == 1 else tl.maximum((shift + N) // DEPTH, 1)
        if PERIOD != 1:
            tile = edge_step(tile, p_cells, g_cells, r, 0, shift)
        k = tl.arange(0, DEPTH)
        ps = p_cells + (k + first * DEPTH - shift)[:, None] * R
        gs = g_cells + first * DEPTH + k[None, :]
        for _ in range(first, last):
            g = tl.load(gs)
            p = tl.load(ps, mask=p_mask).to(g.dtype)
            tile = tl.dot(g, p, tile, input_precision="ieee")
            ps += DEPTH * R
            gs += DEPTH
        if PERIOD != 1 or N % DEPTH != 0:
            tile = edge_step(tile, p_cells, g_cells, r, last, shift)

        base = matrix * (M * R) + (phase + top * PERIOD).to(tl.int64) * R
        lines = top + line < ROWS
        finish_parts(
            tile, base, line * (PERIOD * R), lines, j * RANK, R, numbers, results, RANK, PARTS
        )

    return project_rows if problem.rows else project_columns
