"""Where the time of a step goes: the device's kernels, from a trace."""

import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax

from benchmarks.gpu.timing import Program


def kernels(
    program: Program, carry: Any, fixed: Any, calls: int = 5
) -> tuple[list[tuple[str, float, float]], Any]:
    """Traces some calls.

    Args:
      program: the step.
      carry: its first argument, which is used up.
      fixed: its second.
      calls: how many calls to trace.

    Returns:
      Name, launches a step and milliseconds a step of every kernel, the longest first, and the
      carry after the last step.
    """
    carry = jax.block_until_ready(program.run(carry, fixed))
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = options.host_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(calls):
                carry = program.run(carry, fixed)
            jax.block_until_ready(carry)
        (trace,) = Path(folder).rglob("*.xplane.pb")
        found = device_time(jax.profiler.ProfileData.from_file(str(trace)))
    steps = calls * program.steps
    rows = [(name, n / steps, ns / steps / 1e6) for name, (n, ns) in found.items()]
    return sorted(rows, key=lambda row: -row[2]), carry


def device_time(trace: Any) -> dict[str, tuple[int, float]]:
    """Launches and nanoseconds of every kernel and copy in a trace."""
    found: dict[str, list[float]] = defaultdict(list)
    for plane in trace.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):  # the others sum these up once more
                continue
            for event in line.events:
                found[event.name].append(event.duration_ns)
    return {name: (len(times), sum(times)) for name, times in found.items()}
