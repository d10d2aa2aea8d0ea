"""With Triton, on Ampere and later: one program factors and inverts a whole small matrix."""

import functools
from typing import Any

import jax

from optax_gale.pallas import _triton
from optax_gale.pallas.cholesky_and_inverse import LARGEST
from optax_gale.pallas.dispatch import Problem

# Rows that are eliminated, two at a time, before products with all others. On an H200, one matrix
# of 128 x 128 takes 0.097 ms, and 224 of them 0.15; one row at a time 0.11 and 0.17, then with
# blocks of 32 0.15 and 0.23, with 8 warps 0.14 and 0.23.
_BLOCK, _WARPS = 16, 4


def refusal(problem: Problem) -> str | None:
    """Why Triton cannot serve a problem; None if it can."""
    if problem.m > LARGEST:
        return f"a program can factor {LARGEST} columns at most"
    return _triton.refusal(problem)


def cholesky_and_inverse(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See `optax_gale.pallas.cholesky_and_inverse`; ``a`` has at most `LARGEST` columns."""
    shape = jax.ShapeDtypeStruct(a.shape, a.dtype)
    part = _triton.Part(
        body=_body(a.shape[-1], _BLOCK),
        programs=a.size // a.shape[-1] ** 2,
        inputs={"matrix": [a]},
        donated={},
        fresh={"factor": [shape], "inverse": [shape]},
        scalars=[[]],
        warps=_WARPS,
        stages=1,
        alone=True,
    )
    (found,) = _triton.call("cholesky_and_inverse", [part])
    return found["factor"][0], found["inverse"][0]


@functools.cache
def _body(size: int, most: int) -> Any:
    """What a program does, for `_triton.call`."""
    import triton.language as tl

    width = max(16, _triton.power_of_two(size))
    block = min(most, width)
    jit = _triton.jit_for(size, width, block)
    SIZE, WIDTH, BLOCK, BLOCKS = (tl.constexpr(x) for x in (size, width, block, -(-size // block)))

    @jit
    def eliminated(block):
        # Rows of [A | I] are subtracted from those below until it is [L^T | L^-1]: two at a time,
        # for what takes the time is to tell all threads of a row.
        row = tl.arange(0, BLOCK)
        place = tl.arange(0, 2 * BLOCK)
        for step in range(0, BLOCK, 2):
            one = row == step
            two = row == step + 1
            first = tl.sum(tl.where(one[:, None], block, 0.0), axis=0)
            second = tl.sum(tl.where(two[:, None], block, 0.0), axis=0)
            left = tl.sum(tl.where(place[None, :] == step, block, 0.0), axis=1)
            right = tl.sum(tl.where(place[None, :] == step + 1, block, 0.0), axis=1)
            # Of rows, which every warp has.
            pivot = tl.sum(tl.where(place == step, first, 0.0), axis=0)
            beside = tl.sum(tl.where(place == step + 1, first, 0.0), axis=0)
            corner = tl.sum(tl.where(place == step + 1, second, 0.0), axis=0)
            scale = tl.where(pivot > 0, 1.0 / tl.sqrt(pivot), float("nan"))
            beside = beside * scale
            corner = corner - beside * beside
            other = tl.where(corner > 0, 1.0 / tl.sqrt(corner), float("nan"))
            first = first * scale
            second = (second - beside * first) * other
            left = left * scale
            right = (right - beside * left) * other
            left = tl.where(row > step + 1, left, 0.0)
            right = tl.where(row > step + 1, right, 0.0)
            block = block - left[:, None] * first[None, :] - right[:, None] * second[None, :]
            block = tl.where(one[:, None], first[None, :], block)
            block = tl.where(two[:, None], second[None, :], block)
        return block

    @jit
    def factor_and_invert(matrix, results, numbers, program):
        start = program.to(tl.int64) * (SIZE * SIZE)
        a, lower, inverse = matrix + start, results[0] + start, results[1] + start
        line = tl.arange(0, BLOCK)
        every = tl.arange(0, WIDTH)
        eye = tl.where(line[:, None] == line[None, :], 1.0, 0.0)
        for i in range(0, BLOCKS):
            here = i * BLOCK + line
            inside = here < SIZE
            square = inside[:, None] & inside[None, :]
            tall = (every < SIZE)[:, None] & inside[None, :]
            wide = inside[:, None] & (every < SIZE)[None, :]
            # What is left of A in these rows and columns, and of I, as blocks before are done with.
            corner = tl.load(a + here[:, None] * SIZE + here[None, :], mask=square, other=0.0)
            corner = tl.where(square, corner, eye)
            below = tl.load(a + every[:, None] * SIZE + here[None, :], mask=tall, other=0.0)
            rows = tl.where(every[None, :] == here[:, None], 1.0, 0.0)
            for j in range(0, i):
                there = j * BLOCK + line
                at = here[:, None] * SIZE + there[None, :]
                beside = tl.load(lower + at, mask=inside[:, None], other=0.0)
                at = there[:, None] * SIZE + every[None, :]
                above = tl.load(inverse + at, mask=(every < SIZE)[None, :], other=0.0)
                at = every[:, None] * SIZE + there[None, :]
                before = tl.load(lower + at, mask=(every < SIZE)[:, None], other=0.0)
                turned = tl.trans(beside)
                corner -= tl.dot(beside, turned, input_precision="ieee")
                rows -= tl.dot(beside, above, input_precision="ieee")
                below -= tl.dot(before, turned, input_precision="ieee")

            both = tl.join(corner, eye).trans(0, 2, 1).reshape(BLOCK, 2 * BLOCK)
            both = eliminated(both)
            upper, inverted = both.reshape(BLOCK, 2, BLOCK).trans(0, 2, 1).split()
            rows = tl.dot(inverted, rows, input_precision="ieee")
            below = tl.dot(below, tl.trans(inverted), input_precision="ieee")
            upper = tl.where(line[:, None] <= line[None, :], upper, 0.0)
            tl.store(lower + here[None, :] * SIZE + here[:, None], upper, mask=square)
            last = (i + 1) * BLOCK
            below = tl.where((every >= last)[:, None], below, 0.0)
            others = ((every < i * BLOCK) | (every >= last))[:, None]
            tl.store(lower + every[:, None] * SIZE + here[None, :], below, mask=tall & others)
            tl.store(inverse + here[:, None] * SIZE + every[None, :], rows, mask=wide)
            tl.debug_barrier()  # the next blocks read what was stored

    return factor_and_invert
