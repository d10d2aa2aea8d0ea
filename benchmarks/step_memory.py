"""The memory of training steps on a GPU: what `optax_gale.step_memory_report` says, and the peak.

Every case trains two steps of LLaMA in a process of its own, so that the peak that the allocator
remembers is that step's. The command fails if a report is more than 5 % off.

    python -m benchmarks.step_memory
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro

import optax_gale
from benchmarks.environment import MOST_MEMORY, preallocated, store
from benchmarks.gpu.store import Row, slug
from examples.flax_llama import optimizers
from examples.flax_llama.config import FloatName, OptimizerOptions, TrainingOptions
from examples.flax_llama.model import AttentionBackend, Llama
from examples.flax_llama.sizes import get_size
from examples.flax_llama.step import make_train_step, trace_init
from examples.flax_llama.step_memory import batch_shapes
from examples.flax_llama.tables import markdown
from optax_gale import StepMemoryReport

NO_GPU = "No GPU here: this benchmark measures one (--anywhere runs it on what there is)."
TOLERANCE = 0.05
_GIB = 2**30
_STEPS = 2  # the second takes what the first made


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step: the options of the example that it takes."""

    size: str
    optimizer: str
    batch: int
    length: int = 256
    param_dtype: FloatName = "bfloat16"
    remat: bool = False
    chunks: int = 1
    attention: AttentionBackend = "xla"


CASES = {
    "60m, AdamW, f32": Case("60m", "adamw", 64, param_dtype="float32"),
    "60m, GALE, f32": Case("60m", "gale_adamw", 64, param_dtype="float32"),
    "60m, GALE, small batch": Case("60m", "gale_adamw", 1),
    "350m, AdamW": Case("350m", "adamw", 32, attention="cudnn"),
    "350m, GALE": Case("350m", "gale_adamw", 32, attention="cudnn"),
    "350m, GALE, long": Case("350m", "gale_adamw", 8, length=1024, chunks=8),
    "1b, AdamW, recomputed": Case("1b", "adamw", 32, remat=True, chunks=4),
    "1b, GALE, recomputed": Case("1b", "gale_adamw", 32, remat=True, chunks=4),
    "1b, GALE-Muon, recomputed": Case("1b", "gale_muon", 16, remat=True),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    cases: tuple[str, ...] = tuple(CASES)
    """Cases."""
    share: float = MOST_MEMORY
    """Of the device's memory: less where several run beside each other."""
    out: Path = Path("benchmarks/results")
    """Where the results go."""
    anywhere: bool = False
    """Runs without a GPU too, where there is a report but no peak."""
    here: str | None = None
    """Measures one case in this process and prints it as JSON: how the others are started."""


def measure(case: Case) -> Row:
    """Compiles a step, reports on it, takes it, and looks at the allocator's peak."""
    model = Llama(
        get_size(case.size),
        dtype=jnp.bfloat16,
        param_dtype=jnp.dtype(case.param_dtype),
        remat=case.remat,
        attention_backend=case.attention,
    )
    training = TrainingOptions()
    settings = optimizers.resolve(case.optimizer, OptimizerOptions(), model.size, training.steps)
    tx = optimizers.build(case.optimizer, settings, training)
    shapes = trace_init(model, tx, seed=0).out_info
    batch = batch_shapes((case.batch, case.length))
    step = make_train_step(model, tx, optax.constant_schedule(1e-3), case.chunks)
    # Before anything is allocated, or the compiler's trials would come on top of it.
    program = step.lower(shapes, batch).compile()
    report = optax_gale.step_memory_report(
        program, where=lambda state, batch: (state.params, state.opt_state)
    )
    before = statistics()
    # Array by array: the program that draws the weights can need more than the step.
    state, tokens = jax.tree.map(_made, (shapes, batch))
    for _ in range(_STEPS):
        state, _ = program(state, tokens)
    jax.block_until_ready(state)
    return compared(report, before, statistics())


def _made(x: jax.ShapeDtypeStruct) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), x.shape)
    return jnp.zeros(x.shape, x.dtype)


def statistics() -> dict[str, int]:
    """What the allocator of the device says; nothing on a CPU."""
    return jax.local_devices()[0].memory_stats() or {}


def compared(report: StepMemoryReport, before: Row, after: Row) -> Row:
    """The report beside the peak.

    Args:
      report: the report.
      before: the allocator's statistics once the step is compiled.
      after: its statistics when the step was taken.
    """
    row: Row = {**report.parts(), "predicted": report.peak, "told_apart": report.told_apart}
    row["device"] = jax.devices()[0].device_kind
    if not after:
        return row
    if after["peak_bytes_in_use"] <= before["peak_bytes_in_use"]:
        return {**row, "error": "compiling needed more memory than the step: no peak of the step"}
    row["measured"] = after["peak_bytes_in_use"] - before["bytes_in_use"]
    row["difference"] = row["predicted"] / row["measured"] - 1
    return row


def in_its_own_process(name: str, share: float = MOST_MEMORY) -> Row:
    """Measures a case in another process."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.step_memory", "--here", name],
        capture_output=True,
        text=True,
        check=False,
        env=preallocated(share),
    )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return {"error": (done.stderr.strip().splitlines() or ["it was killed"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[Row]) -> list[str]:
    """The lines of a table: one row a case, GiB."""
    header = ["case", "sequences", "weights and states", "gradients", "activations", "work space"]
    header += ["predicted", "measured", "difference"]
    lines = []
    for row in rows:
        if "error" in row:
            continue
        case = Case(**row["options"])
        held = sum(row[part] for part in ("weights", "moments", "projectors", "other"))
        sizes = (held, row["gradients"], row["activations"], row["work_space"], row["predicted"])
        difference = row.get("difference")
        lines.append(
            [
                row["case"],
                f"{case.batch} × {case.length}",
                *(f"{size / _GIB:.2f}" for size in sizes),
                f"{row['measured'] / _GIB:.2f}" if "measured" in row else "–",
                "–" if difference is None else f"{difference:+.1%}",
            ]
        )
    errors = [f"* Not measured: {row['case']}: {row['error']}" for row in rows if "error" in row]
    return [markdown(header, lines), *(["", *errors] if errors else [])]


def main(config: Config) -> None:
    """Measures, stores and tabulates.

    Raises:
      SystemExit: if a report is too far off, or a case failed.
    """
    if config.here is not None:
        print(json.dumps(measure(CASES[config.here])))
        return
    # This process only asks what the device is, and must leave its memory to the others.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if jax.default_backend() != "gpu" and not config.anywhere:
        print(NO_GPU)
        return
    rows: list[Row] = []
    for name in config.cases:
        options: dict[str, Any] = dataclasses.asdict(CASES[name])
        rows.append({"case": name, "options": options, **in_its_own_process(name, config.share)})
        stem = config.out / f"step_memory_{slug(jax.devices()[0].device_kind)}"
        lines = ["Memory of a training step, GiB.", "", *table(rows)]
        store(stem, lines, tolerance=TOLERANCE, rows=rows)
        print("\n".join(lines), flush=True)
    bad = [r["case"] for r in rows if "error" in r or abs(r.get("difference", 0.0)) > TOLERANCE]
    if bad:
        raise SystemExit(f"failed, or off by more than {TOLERANCE:.0%}: {'; '.join(bad)}")


if __name__ == "__main__":
    main(tyro.cli(Config))
