"""The memory and the speed of training LLaMA layer by layer, on one GPU.

Every case is a command line of the example, run in a process of its own: under a limit of the
allocator, in which it must finish, and, where the peak is asked for, without one. What was measured
on the same commit and kind of device is not measured again, and everything is stored as soon as it
is there, so that it can be made in parts.

    python -m benchmarks.training_memory --train train.u16.xz --validation val.u16.xz --minutes 9
    python -m benchmarks.training_memory --train train.u16.xz --validation val.u16.xz \
        --only "60m, float32 states" "60m, 8-bit states"
"""

import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro

from benchmarks.environment import MOST_MEMORY, preallocated
from benchmarks.gpu.store import Row, Store, provenance, slug
from benchmarks.memory_cases import (
    ADAMW,
    BIG,
    BIG_4,
    CASES,
    KEPT_SPEED,
    LAYERS_SPEED,
    LONG,
    PEAK_STEPS,
    REMAT_SPEED,
    SMALL,
    SMALL_MODEL,
    SMALL_MODEL_8,
    SMALL_MODEL_LAYERS,
    SMALLEST,
    THIRTEEN,
    WHOLE_SPEED,
    Options,
    RunName,
)
from benchmarks.memory_plot import draw
from examples.flax_llama.metrics import device_memory, read_records
from examples.flax_llama.tables import markdown

NO_GPU = "No GPU here: this benchmark measures one (--dry True tries everything on a tiny model)."
GIB = 2**30
KEY = ("case", "allocator")

_LIMIT_TOLERANCE = 1.01  # the allocator rounds its limit


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, and on what."""

    train: Path | None = None
    """Token ids to train on, as the example's --source tokens reads them."""
    validation: Path | None = None
    """Token ids to validate on."""
    only: tuple[str, ...] = ()
    """Cases to run; all by default."""
    minutes: float | None = None
    """Begins no run after so many minutes, and gives up one that lasts longer."""
    share: float = MOST_MEMORY
    """Of the device's memory, for runs without a limit: less where several run beside each other,
    as they can if no speed is asked for."""
    again: bool = False
    """Runs again what is stored."""
    dry: bool = False
    """Trains a tiny model for three steps in the place of every case, wherever this is. The numbers
    then say nothing."""
    runs: Path = Path("runs/training_memory")
    """Where the runs and their compiled programs are kept."""
    out: Path = Path("benchmarks/results")
    """Where the results go, and join those that are there."""


# A run ------------------------------------------------------------------------------------------

_DRY: Options = {
    **{
        "size": "tiny",
        "rank": 16,
        "select": "down",
        "batch-size": 2,
        "sequence-length": 16,
        "loss-chunks": 1,
    },
    **{"attention-backend": "xla", "update-proj-gap": 2, "validation-limit": 2, "vocab-size": 64},
    "param-dtype": "float32",  # not every product of bfloat16 runs on a CPU
}


def command(config: Config, name: str, run: RunName, folder: Path) -> list[str]:
    """The command line of a run."""
    case = CASES[name]
    steps = PEAK_STEPS if run == "free" and "limited" in case.runs else case.steps
    options: dict[str, Any] = {
        "source": "tokens",
        "path": config.train,
        "validation-path": config.validation,
        "vocab-size": 32000,
        "log-every": 5,
        **case.options,
        "steps": steps,
    }
    if config.dry:
        low_rank = options["optimizer"] != "adamw"
        tiny = {
            k: v
            for k, v in _DRY.items()
            if low_rank or k not in ("rank", "select", "update-proj-gap")
        }
        options |= {**tiny, "steps": 3, "log-every": 1}
    options |= {
        **{"checkpoint-every": 0, "eval-every": 0, "tensorboard": False, "progress": False},
        **{"overwrite": True, "out": folder},
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "examples.flax_llama", "train", *words]


def environment(config: Config, limit: float | None, total: int | None) -> dict[str, str]:
    """The variables of a run's process.

    Args:
      config: the options.
      limit: GiB that the allocator may have; None for nearly all.
      total: the device's memory in bytes; None where there is no GPU.
    """
    share = None
    if total is not None:
        share = config.share if limit is None else limit * GIB / total
    variables = preallocated(share)
    # A run without the limit finds what the limited one compiled.
    variables.setdefault("JAX_COMPILATION_CACHE_DIR", str((config.runs / "compiled").absolute()))
    return variables


def train(config: Config, name: str, run: RunName, total: int | None, seconds: float) -> Row:
    """Trains in another process, and reads what it left.

    Args:
      config: the options.
      name: of the case.
      run: which of its runs.
      total: the device's memory in bytes; None where there is no GPU.
      seconds: after which it is given up.
    """
    case = CASES[name]
    limit = case.limit if run == "limited" else None
    folder = config.runs / f"{slug(name)}-{run}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)  # one left by another commit is no result
    words = command(config, name, run, folder)
    log = folder / "log.txt"
    began = time.monotonic()
    with log.open("w") as file:
        try:
            done = subprocess.run(
                words,
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=seconds,
                env=environment(config, limit, total),
            )
        except subprocess.TimeoutExpired:
            return {"error": f"given up after {seconds:.0f} s"}
    wall = time.monotonic() - began
    if done.returncode or not (folder / "result.json").exists():
        lines = log.read_text(errors="replace").strip().splitlines() or ["it left no message"]
        told = next((line for line in lines if line.startswith("error: ")), lines[-1])
        return {"error": f"status {done.returncode}: {told[:300]}", "wall_s": wall}
    row = {"command": words[3:], "wall_s": wall, "limit_gib": limit, **read(folder)}
    if limit is not None and total is not None:
        allowed = row["limit_bytes"]
        if allowed is None or allowed > _LIMIT_TOLERANCE * limit * GIB:
            row["error"] = f"the allocator's limit was {allowed} bytes, not {limit:g} GiB"
    return row


def read(folder: Path) -> Row:
    """What a finished run has to show."""
    result, memory = (
        json.loads((folder / name).read_text()) for name in ("result.json", "memory.json")
    )
    records = list(read_records(folder / "metrics.jsonl"))
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    quarter = max(1, len(losses) // 4)
    first, last = statistics.mean(losses[:quarter]), statistics.mean(losses[-quarter:])
    settings = result["settings"]
    tokens = settings["--batch-size"] * settings["--sequence-length"]
    held, weights = memory["first_state_bytes"], memory["weights_bytes"]
    return {
        "device": memory["device"],
        "steps": len(losses),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "first_quarter_loss": first,
        "last_quarter_loss": last,
        "falls": last < first,
        "validation_loss": result["loss"],
        "tokens_per_second": _speed(records, tokens),
        "weights_bytes": weights,
        "state_bytes": result["optimizer_bytes"],  # from shapes
        "measured_state_bytes": None if held is None else held - weights,
        "peak_bytes": memory["peak_bytes"],
        "limit_bytes": memory["limit_bytes"],
    }


def _speed(records: list[Row], tokens: int) -> float | None:
    """Tokens a second from the first report to the last: the first step loads what it runs."""
    reports = [r for r in records if r["kind"] == "speed"]
    if len(reports) < 2:
        return None
    first, last = reports[0], reports[-1]
    return (last["step"] - first["step"]) * tokens / (last["seconds"] - first["seconds"])


# What must hold -----------------------------------------------------------------------------------

Rows = Mapping[tuple[str, RunName], Row]


class Check(NamedTuple):
    """Something that must hold.

    Attributes:
      what: is measured.
      wanted: of it.
      found: number and verdict from the rows of finished runs.
    """

    what: str
    wanted: str
    found: Callable[[Rows], tuple[str, bool]]


def _trains(rows: Rows, name: str) -> tuple[str, bool]:
    row = rows[name, "limited"]
    text = f"{row['steps']} steps, {row['first_loss']:.2f} to {row['last_loss']:.2f}"
    return text, row["falls"] and row["steps"] == CASES[name].steps


def _peak(rows: Rows, name: str, most: float) -> tuple[str, bool]:
    # A limit does not lower the peak: the run without one is there to show that.
    row = rows.get((name, "free")) or rows[name, "limited"]
    peak = row["peak_bytes"] / GIB
    return f"{peak:.2f} GiB", peak <= most


def _state(rows: Rows, name: str) -> tuple[str, bool]:
    ours, theirs = (rows[case, "free"]["measured_state_bytes"] for case in (name, ADAMW))
    return f"{1 - ours / theirs:.1%} less, {ours / GIB:.2f} GiB", 1 - ours / theirs >= 0.825


def _faster(rows: Rows, name: str, rival: str) -> tuple[str, bool]:
    ours, theirs = (rows[case, "free"]["tokens_per_second"] for case in (name, rival))
    return f"{ours / theirs:.3f}, {ours:,.0f} tokens/s", ours / theirs >= 0.95


def _alike(rows: Rows, name: str, other: str) -> tuple[str, bool]:
    losses = [rows[case, "free"]["validation_loss"] for case in (name, other)]
    return f"{losses[0]:.4f}, {losses[1]:.4f}", abs(losses[0] - losses[1]) <= 0.01


def _peak_check(name: str, most: float) -> Check:
    found = functools.partial(_peak, name=name, most=most)
    return Check(f"{name}: peak", f"at most {most:g} GiB", found)


CHECKS = (
    Check(f"{BIG}: within 24 GiB", "trains, the loss falls", lambda rows: _trains(rows, BIG)),
    _peak_check(BIG, 19.5),
    _peak_check(LONG, 16.0),
    _peak_check(SMALL, 14.5),
    _peak_check(SMALLEST, 10.0),
    Check(
        f"{THIRTEEN}: within 32 GiB", "trains, the loss falls", lambda rows: _trains(rows, THIRTEEN)
    ),
    Check(f"{BIG}: state", "82.5 % less than AdamW's", lambda rows: _state(rows, BIG)),
    Check(f"{BIG_4}: state", "82.5 % less than AdamW's", lambda rows: _state(rows, BIG_4)),
    _peak_check(BIG_4, 19.5),
    Check(
        f"{LAYERS_SPEED}: speed",
        "0.95 of the ordinary step's, layers recomputed",
        lambda rows: _faster(rows, LAYERS_SPEED, REMAT_SPEED),
    ),
    Check(
        f"{LAYERS_SPEED}: speed",
        "0.95 of the ordinary step's, all kept",
        lambda rows: _faster(rows, LAYERS_SPEED, WHOLE_SPEED),
    ),
    Check(
        f"{KEPT_SPEED}: speed",
        "0.95 of the ordinary step's, all kept",
        lambda rows: _faster(rows, KEPT_SPEED, WHOLE_SPEED),
    ),
    Check(
        "60m: validation loss, 8-bit and float32 states",
        "within 0.01",
        lambda rows: _alike(rows, SMALL_MODEL_8, SMALL_MODEL),
    ),
    Check(
        "60m: validation loss, layer by layer and ordinary",
        "within 0.01",
        lambda rows: _alike(rows, SMALL_MODEL_LAYERS, SMALL_MODEL),
    ),
)


# Tables -------------------------------------------------------------------------------------------


def tables(rows: list[Row]) -> str:
    """What must hold, one row a check; what was measured, one row a run; what was not, and why."""
    finished: Rows = {(row["case"], row["allocator"]): row for row in rows if "error" not in row}
    checks = []
    for check in CHECKS:
        try:
            text, holds = check.found(finished)
        except (KeyError, TypeError):  # not run yet, or where the device does not count
            checks.append([check.what, check.wanted, "–", "–"])
        else:
            checks.append([check.what, check.wanted, text, "yes" if holds else "**no**"])
    names = list(CASES)
    runs = [
        [
            row["case"],
            "–" if row["limit_gib"] is None else f"{row['limit_gib']:g}",
            _gib(row["peak_bytes"]),
            _gib(row["weights_bytes"]),
            _gib(row["measured_state_bytes"] or row["state_bytes"]),
            str(row["steps"]),
            f"{row['first_loss']:.3f}",
            f"{row['last_loss']:.3f}",
            f"{row['validation_loss']:.4f}",
            "–" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}",
        ]
        for row in sorted(
            (row for row in finished.values() if row["case"] in CASES),
            key=lambda row: names.index(row["case"]),
        )
    ]
    header = ["run", "limit", "peak", "weights", "states", "steps", "first loss", "last loss"]
    parts = [
        markdown(["what", "must be", "is", "holds"], checks),
        "Memory in GiB:",
        markdown([*header, "validation loss", "tokens/s"], runs),
    ]
    errors = [f"* {r['case']}, {r['allocator']}: {r['error']}" for r in rows if "error" in r]
    return "\n\n".join([*parts, *(["Not measured:", "\n".join(errors)] if errors else [])])


def _gib(size: int | None) -> str:
    return "–" if size is None else f"{size / GIB:.2f}"


# All of them --------------------------------------------------------------------------------------


def total_memory() -> int | None:
    """Bytes of the GPU's memory; None where there is none."""
    # This process only asks, and must leave the memory to the others.
    os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)
    os.environ["XLA_CLIENT_MEM_FRACTION"] = "1.0"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    return device_memory()["bytes_limit"] if jax.default_backend() == "gpu" else None


def refusal(config: Config, name: str, total: int | None) -> str | None:
    """Why a case cannot be tried here."""
    if config.dry or total is None:
        return None
    case, has = CASES[name], total / GIB
    if case.needs > (config.share if case.limit is None else MOST_MEMORY) * has:
        return f"skipped: needs {case.needs:g} GiB, and this GPU has {has:.0f}"
    return None


def check(config: Config) -> None:
    """Raises SystemExit at the first option that makes no sense."""
    for name in config.only:
        if name not in CASES:
            raise SystemExit(f"no case {name!r}; choose from: {'; '.join(CASES)}")
    for option in ("train", "validation"):
        path = getattr(config, option)
        if path is None or not path.exists():
            raise SystemExit(f"--{option} must be a file of token ids, got {path}")


def main(config: Config) -> None:
    """Runs, stores and tabulates.

    Raises:
      SystemExit: if an option makes no sense, or a run failed.
    """
    total = total_memory()
    if total is None and not config.dry:
        print(NO_GPU)
        return
    check(config)
    began = time.monotonic()
    where = "dry" if config.dry else slug(jax.devices()[0].device_kind)
    stem = config.out / f"training_memory_{where}"
    store = Store(stem.with_suffix(".json"), KEY)
    store.start(memory_bytes=total)
    failed = []
    for name, run in [(n, r) for n in config.only or CASES for r in CASES[n].runs]:
        if not config.again and store.has(case=name, allocator=run):
            continue
        left = float("inf") if config.minutes is None else 60 * config.minutes
        left -= time.monotonic() - began
        if left <= 0:
            print(f"{config.minutes:g} minutes are over; run it again to go on")
            break
        print(f"{name}, {run}", flush=True)
        reason = refusal(config, name, total)
        seconds = min(left, CASES[name].seconds)
        row = {"error": reason} if reason else train(config, name, run, total, seconds)
        failed += [f"{name}, {run}"] if "error" in row else []
        store.add({"case": name, "allocator": run, **row})
        text = f"{provenance(store.runs)}\n\n{tables(store.rows)}"
        stem.with_suffix(".md").write_text(text + "\n")
        draw(stem.with_suffix(".png"), store.rows)
        print(text, flush=True)
    if failed:
        raise SystemExit(f"not measured: {'; '.join(failed)}")


if __name__ == "__main__":
    main(tyro.cli(Config, config=(tyro.conf.FlagConversionOff,)))
