"""Time on the device, and memory."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import data
from benchmarks.gpu.floors import Ceilings

Step = Callable[[Any, Any], Any]  # (carry, fixed) -> carry


class Timing(NamedTuple):
    """Seconds a step.

    Attributes:
      median: over blocks of steps.
      p10: a tenth of the blocks were faster.
      p90: a tenth were slower.
      steps: steps timed.
    """

    median: float
    p10: float
    p90: float
    steps: int


class Program(NamedTuple):
    """A compiled step.

    Attributes:
      run: ``(carry, fixed) -> carry``; the carry is donated.
      steps: steps in one call.
      peak: bytes that it needs at once, its arguments included; None if the compiler does not say.
    """

    run: Step
    steps: int
    peak: int | None


def compiled(step: Step, carry: Any, fixed: Any, *, loops: int = 1) -> Program:
    """Compiles a step for arguments, or for their shapes.

    Args:
      step: the step.
      carry: what it changes.
      fixed: what it only reads.
      loops: steps a call. Steps shorter than the time in which Python can launch them are looped
        within one program, as they would run within a training step.
    """

    def call(carry: Any, fixed: Any) -> Any:
        if loops == 1:
            return step(carry, fixed)

        def body(_: Any, carry: Any) -> Any:
            # Tied to the carry, or work on what is fixed could be done once, before the loop.
            return step(*jax.lax.optimization_barrier((carry, fixed)))

        return jax.lax.fori_loop(0, loops, body, carry)

    program = jax.jit(call, donate_argnums=0).lower(carry, fixed).compile()
    return Program(program, loops, peak_bytes(program))


def peak_bytes(program: Any) -> int | None:
    """Bytes that a compiled program needs at once: arguments, results and temporaries."""
    stats = program.memory_analysis()
    if stats is None:
        return None
    arguments, results = stats.argument_size_in_bytes, stats.output_size_in_bytes
    return int(arguments + results + stats.temp_size_in_bytes - stats.alias_size_in_bytes)


def measure(
    program: Program, carry: Any, fixed: Any, *, seconds: float = 1.0, blocks: int = 20
) -> tuple[Timing, Any]:
    """Times a step, launched back to back in blocks so that the device never waits for Python.

    Args:
      program: the step.
      carry: its first argument, which is used up.
      fixed: its second.
      seconds: about how long to measure.
      blocks: about how many blocks to take the median of; at least 5.

    Returns:
      The times, and the carry after the last step.
    """
    carry = jax.block_until_ready(program.run(carry, fixed))
    start = time.perf_counter()
    carry = jax.block_until_ready(program.run(carry, fixed))
    once = time.perf_counter() - start
    count = max(5, min(blocks, int(seconds / once)))
    calls = max(1, min(1000, round(seconds / count / once)))
    times = []
    for _ in range(count):
        start = time.perf_counter()
        for _ in range(calls):
            carry = program.run(carry, fixed)
        jax.block_until_ready(carry)
        times.append((time.perf_counter() - start) / (calls * program.steps))
    p10, p90 = np.percentile(times, [10, 90])
    timing = Timing(statistics.median(times), float(p10), float(p90), count * calls * program.steps)
    return timing, carry


def each_step(
    choose: Callable[[int], Step], carry: Any, fixed: Any, steps: int
) -> tuple[list[float], Any]:
    """Seconds of every single step, on the host's clock, the host waiting for each.

    Args:
      choose: which compiled step to run at a step.
      carry: the first one's argument, which is used up.
      fixed: their second argument.
      steps: how many.

    Returns:
      The times, and the carry after the last step.
    """
    times = []
    gc.collect()
    gc.disable()  # a collection in a step would be timed with it
    try:
        for i in range(steps):
            run = choose(i)
            start = time.perf_counter()
            carry = jax.block_until_ready(run(carry, fixed))
            times.append(time.perf_counter() - start)
    finally:
        gc.enable()
    return times, carry


def ceilings(copied: int = 2**31, side: int = 8192) -> Ceilings:
    """Measures the two rates that no step can beat.

    Args:
      copied: bytes to copy.
      side: of the square matrices to multiply.
    """
    copy_seconds = _copy_seconds(copied)
    matrix = jax.ShapeDtypeStruct((side, side), jnp.bfloat16)
    x, y = data.normal(matrix, 1), data.normal(matrix, 2)
    product = jax.jit(jnp.matmul).lower(x, y).compile()
    return Ceilings(2 * copied / copy_seconds, 2 * side**3 / repeated(lambda: product(x, y), 10))


def _copy_seconds(copied: int) -> float:
    numbers = data.normal(jax.ShapeDtypeStruct((copied // 4,), jnp.float32), 0)
    copy = jax.jit(lambda x: -x).lower(numbers).compile()
    return repeated(lambda: copy(numbers), 10)


def repeated(launch: Callable[[], Any], calls: int, blocks: int = 10) -> float:
    """Median seconds of a call whose results are dropped."""
    jax.block_until_ready(launch())
    times = []
    for _ in range(blocks):
        start = time.perf_counter()
        for _ in range(calls):
            out = launch()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)
