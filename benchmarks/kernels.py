"""The kernels of `optax_gale.pallas` on the groups of leaves of LLaMA models.

Every implementation that can serve is timed on every group, and its result compared with XLA's.
Measurements are stored as they are made, and not repeated on the same commit and kind of device.
``--write-dispatch`` writes the table by which the library chooses.

    python -m benchmarks.kernels --write-dispatch
"""

import dataclasses
import json
import time
import traceback
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import tyro

import optax_gale.pallas
from benchmarks.gpu import timing
from benchmarks.gpu.floors import Ceilings
from benchmarks.gpu.kernels import Task, tasks
from benchmarks.gpu.report import number
from benchmarks.gpu.shapes import Case
from benchmarks.gpu.store import Row, Store, provenance, slug
from examples.flax_llama.tables import markdown
from optax_gale.pallas import UnsupportedError, dispatch
from optax_gale.pallas.dispatch import IMPLEMENTATIONS

Kernel = Literal["project_update", "back_project_apply", "cholesky_and_inverse"]
KEY = ("kernel", "leaves", "batch", "m", "n", "rank", "rows", "dtype", "implementation")
_PROJECT = ("project_update", "back_project_apply")
TABLE = Path(optax_gale.pallas.__file__).parent / "measured.json"
NO_GPU = "No GPU here: this benchmark measures one (--anywhere runs it on what there is)."
_TOLERANCE = 2e-2  # of a result in bfloat16; a wrong one is off by about 1
_SMALL, _LOOPS = 1e9, 20  # who moves fewer bytes may be done before Python launches the next


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    cases: tuple[str, ...] = ("7b:128", "7b:1024", "1b:512", "60m:128", "350m:256", "130m:256")
    """Models and ranks, whose groups of leaves are the problems."""
    sides: tuple[Literal["short", "long"], ...] = ("long", "short")
    """Which sides are projected."""
    kernels: tuple[Kernel, ...] = get_args(Kernel)
    """Kernels."""
    implementations: tuple[Literal["xla", "mosaic_gpu", "triton"], ...] = IMPLEMENTATIONS
    """What to measure; XLA is needed for the comparison."""
    seconds: float = 0.3
    """About how long to measure each."""
    minutes: float | None = None
    """Begins no measurement after so many minutes."""
    again: bool = False
    """Measures again what is stored."""
    write_dispatch: bool = False
    """Writes the library's dispatch table, and a copy beside the results."""
    table: Path = TABLE
    """That table."""
    out: Path = Path("benchmarks/results")
    """Where the results go, and join those that are there."""
    anywhere: bool = False
    """Runs without a GPU too. The numbers then say nothing."""


def measure(task: Task, implementation: Any, expected: Any, seconds: float) -> tuple[Row, Any]:
    """Times an implementation and compares its first result.

    Args:
      task: the kernel on a problem.
      implementation: who serves it.
      expected: XLA's result, or None if this is XLA.
      seconds: about how long to measure.

    Returns:
      The measurement, and the result.
    """
    carry, fixed = task.inputs()
    loops = _LOOPS if task.work.bytes < _SMALL else 1
    program = timing.compiled(task.step(implementation), carry, fixed, loops=loops)
    first = jax.block_until_ready(program.run(carry, fixed))
    error = None if expected is None else float(difference(first, expected))
    found, _ = timing.measure(program, jax.tree.map(jnp.copy, first), fixed, seconds=seconds)
    row = {"ms": 1e3 * found.median, "p10_ms": 1e3 * found.p10, "p90_ms": 1e3 * found.p90}
    return {**row, "loops": loops, "error_to_xla": error, "peak_bytes": program.peak}, first


@jax.jit
def difference(actual: Any, expected: Any) -> jax.Array:
    """Largest ``||actual - expected|| / ||expected||`` of a tree's leaves."""

    def norm(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32))))

    def leaf(a: jax.Array, b: jax.Array) -> jax.Array:
        return norm(a.astype(jnp.float32) - b.astype(jnp.float32)) / norm(b)

    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(leaf, actual, expected))))


def run(config: Config, store: Store, ceilings: Ceilings) -> None:
    """Takes all measurements that are asked for and not stored yet."""
    began = time.monotonic()
    cases = [Case.parse(text) for text in config.cases]
    for task in tasks(cases, list(config.sides)):
        if task.problem.kernel not in config.kernels:
            continue
        if config.minutes is not None and time.monotonic() - began > 60 * config.minutes:
            print(f"{config.minutes:g} minutes are over; run it again to go on")
            return
        _one(config, store, ceilings, task)


def _one(config: Config, store: Store, ceilings: Ceilings, work: Task) -> None:
    key = {field: getattr(work.problem, field) for field in KEY[:-1]}
    names = config.implementations
    if not config.again and all(store.has(**key, implementation=name) for name in names):
        return
    expected = None
    for name in sorted(names, key=lambda name: name != "xla"):
        facts = {"floor_ms": 1e3 * work.work.floor(ceilings), **work.work._asdict()}
        try:
            found, result = measure(work, name, expected, config.seconds)
            expected = result if name == "xla" else expected
        except UnsupportedError as error:
            found = {"refused": str(error).split(": ")[-1][:200]}
        except Exception as error:  # one that fails must not take the others with it
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        store.add({**key, "implementation": name, **facts, **found})
        print(*key.values(), name, found.get("ms") or found, flush=True)


def table(rows: list[Row]) -> str:
    """One row a problem."""
    lines = []
    for problem, of_problem in _by_problem(rows).items():
        kernel, leaves, batch, m, n, rank, by_rows, _ = problem
        floor = next(iter(of_problem.values()))["floor_ms"]
        times = valid_times(of_problem)
        cells = [_cell(of_problem.get(name), times) for name in IMPLEMENTATIONS]
        best = min(times, key=lambda name: times[name]) if times else "–"
        side = f"{'rows' if by_rows else 'columns'} to {rank}" if kernel in _PROJECT else "–"
        lines.append([kernel, f"{leaves} × {batch} × {m} × {n}", side, number(floor), *cells, best])
    header = ["kernel", "leaves × matrices", "projected", "floor, ms", *IMPLEMENTATIONS, "chosen"]
    return markdown(header, lines)


def _by_problem(rows: list[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        problem = tuple(row[field] for field in KEY[:-1])
        found.setdefault(problem, {})[row["implementation"]] = row
    return found


def valid_times(of_problem: dict[str, Row]) -> dict[str, float]:
    """Milliseconds of the implementations that served, and computed what XLA does."""
    return {
        name: row["ms"] for name, row in of_problem.items() if "ms" in row and not _is_wrong(row)
    }


def _is_wrong(row: Row) -> bool:
    error = row.get("error_to_xla")
    return error is not None and not error <= _TOLERANCE


def _cell(row: Row | None, times: dict[str, float]) -> str:
    if row is None or "refused" in row:
        return "–"
    if "error" in row:
        return "failed"
    if _is_wrong(row):
        return f"{number(row['ms'])}, wrong"
    text = number(row["ms"])
    return f"**{text}**" if row["ms"] == min(times.values()) else text


def entries(rows: list[Row], architecture: str, device: str) -> list[dict[str, Any]]:
    """Entries of the dispatch table; problems on which XLA was measured."""
    found = []
    for problem, of_problem in _by_problem(rows).items():
        times = {name: round(ms, 5) for name, ms in valid_times(of_problem).items()}
        if "xla" in times:
            fields = dict(zip(KEY[:-1], problem, strict=True))
            entry = {"architecture": architecture, "device": device, "problem": fields}
            found.append({**entry, "times_ms": times})
    return found


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The dispatch table with new entries, which replace those of the same problem."""
    identity = lambda entry: (entry["architecture"], *entry["problem"].values())
    table = {identity(entry): entry for entry in [*old, *new]}
    return [table[k] for k in sorted(table, key=str)]


def write_table(paths: list[Path], new: list[dict[str, Any]]) -> None:
    """Adds entries to the first table, and writes it to all paths."""
    old = json.loads(paths[0].read_text())["entries"] if paths[0].exists() else []
    lines = ",\n".join(json.dumps(entry) for entry in merged(old, new))
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"entries": [\n{lines}\n]}}\n')


def main(config: Config) -> None:
    """Measures, stores and tabulates."""
    if jax.default_backend() != "gpu" and not config.anywhere:
        print(NO_GPU)
        return
    device = jax.devices()[0].device_kind
    stem = config.out / f"kernels_{slug(device)}"
    store = Store(stem.with_suffix(".json"), KEY)
    ceilings = timing.ceilings() if not config.anywhere else timing.ceilings(2**24, 256)
    store.start(**ceilings._asdict())
    try:
        run(config, store, ceilings)
    finally:
        if store.rows:
            text = f"{provenance(store.runs)}\n\n{table(store.rows)}"
            stem.with_suffix(".md").write_text(text + "\n")
            print(text)
            if config.write_dispatch:
                new = entries(store.rows, dispatch.capability(), device)
                write_table([config.table, config.out / "measured.json"], new)


if __name__ == "__main__":
    main(tyro.cli(Config))
