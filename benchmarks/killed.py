"""Kills one of the processes that train together, at random moments, and starts them again.

The command fails if a checkpoint cannot be read, if the others wait for the one that is gone, or if
the job does not end with the very loss of a run that nothing has disturbed.

    python -m benchmarks.killed --times 10
"""

import dataclasses
import random
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tyro
from rich.console import Console

from benchmarks.environment import store
from benchmarks.groups import Group
from examples.flax_llama import cli, data
from examples.flax_llama.checkpoint import Checkpoints
from examples.flax_llama.config import TrainConfig
from examples.flax_llama.errors import UserError
from examples.flax_llama.metrics import read_records
from examples.flax_llama.parsing import parse
from examples.flax_llama.sizes import SIZES, LlamaSize
from examples.flax_llama.tables import markdown
from examples.flax_llama.train import Trainer

_SMALL = LlamaSize(304, hidden=16, intermediate=32, layers=2, heads=2, kv_heads=2)
_CHILD = """
import sys
from benchmarks import killed
sys.exit(killed.train(sys.argv[1:]))
"""
_MOST = 300  # seconds that a run may take to begin or to end
_LOST_AFTER = 10
_WAITED = 90  # seconds after which survivors must have ended

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """What to do, and how often."""

    times: int = 10
    """How often to kill."""
    seed: int = 0
    """Of the moments, and of who is killed."""
    processes: int = 2
    """How many train together."""
    steps: int = 200
    """Of a run."""
    every: int = 20
    """Steps between checkpoints."""
    out: Path = Path("benchmarks/results")
    """Where the results go."""


def train(words: list[str]) -> int:
    """The example's command, which knows the small model too."""
    SIZES["small"] = _SMALL
    return cli.main(words)


class Job:
    """Runs of one training, each in a folder of its own."""

    def __init__(self, config: Config, folder: Path):
        self.config, self.folder = config, folder
        draw = random.Random(0)
        words = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(20)]
        text = " ".join(draw.choices(words, k=4000))
        (folder / "text").mkdir()
        (folder / "text" / "text.txt").write_text(text)
        self.options = {
            **{"size": "small", "dtype": "float32", "optimizer": "gale_adamw", "rank": 4},
            **{"source": "text", "path": folder / "text", "cache-dir": folder / "cache"},
            **{"vocab-size": _SMALL.vocab_size, "sequence-length": 16, "batch-size": 8},
            **{"steps": config.steps, "checkpoint-every": config.every, "eval-every": 0},
            **{"update-proj-gap": 30, "state-dtype": "int8", "log-every": 5},
            **{"tensorboard": False, "progress": False},
        }
        self.environment = {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def words(self, out: Path) -> list[str]:
        """The command line of a run."""
        named = [word for k, v in self.options.items() for word in (f"--{k}", str(v))]
        return [*named, "--out", str(out)]

    def start(self, out: Path) -> Group:
        """Starts the processes."""
        count = self.config.processes
        more = ["--mesh", f"fsdp={count}", "--lost-after", str(_LOST_AFTER)]
        words = ["train", *self.words(out), *more]
        return Group(count, _CHILD, words, environment=self.environment)

    def finish(self, out: Path) -> tuple[float, float]:
        """Trains to the end; returns the last validation loss, and the seconds of the training."""
        with self.start(out) as group:
            begun = self.wait_for_training(group, out)
            ended = group.wait(_MOST)
            seconds = time.monotonic() - begun
        for number, (status, _, error) in enumerate(ended):
            if status:
                raise SystemExit(f"process {number} ended with {status}: {error[-2000:]}")
        losses = [r["loss"] for r in records(out) if r["kind"] == "validation"]
        return losses[-1], seconds

    def wait_for_training(self, group: Group, out: Path) -> float:
        """Waits for this run's first step; returns when that was."""
        path, deadline = out / "metrics.jsonl", time.monotonic() + _MOST
        before = path.stat().st_ino if path.exists() else None
        while not path.exists() or path.stat().st_ino == before or not records(out):
            if not group.running or time.monotonic() > deadline:
                ended = [e for e in group.wait(_MOST) if e.status]
                if not ended:  # it was all done
                    break
                raise SystemExit(f"training did not begin: {ended[0].error[-2000:]}")
            time.sleep(0.05)
        return time.monotonic()

    def disturb(self, out: Path, moment: float, number: int) -> Row | None:
        """Kills a process so many seconds after the first step; tells what is left.

        None if one had ended by then.
        """
        with self.start(out) as group:
            begun = self.wait_for_training(group, out)
            time.sleep(max(0.0, begun + moment - time.monotonic()))
            if not group.running:
                return None
            group.kill(number)
            killed = time.monotonic()
            ended = group.wait(_WAITED)
            waited = time.monotonic() - killed
        for i, (status, _, error) in enumerate(ended):
            if not status or not any(s.startswith("error: process") for s in error.splitlines()):
                raise SystemExit(f"process {i} ended with {status}, and said: {error[-2000:]}")
        return {
            "killed_at_step": max(r["step"] for r in records(out)),
            "others_ended_after": waited,
            "checkpoints": self.read_all(out),
        }

    def read_all(self, out: Path) -> list[int]:
        """Reads every checkpoint, each to the last array; returns their steps."""
        config: TrainConfig = parse(
            TrainConfig,
            self.words(out),
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
        )
        trainer = Trainer(config, data.load(config.data), Console(quiet=True))
        Checkpoints(out, trainer.identity(), keep=2).close()  # clears away what was not completed
        options = ocp.CheckpointManagerOptions(read_only=True)
        restore = ocp.args.Composite(state=ocp.args.StandardRestore(trainer.shapes))
        with ocp.CheckpointManager(out / "checkpoints", options=options) as manager:
            steps = sorted(manager.all_steps())
            for step in steps:
                state = manager.restore(step, args=restore)["state"]
                arrays = [
                    x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)
                ]
                if int(state.step) != step or not all(jnp.isfinite(x).all() for x in arrays):
                    raise SystemExit(f"the checkpoint of step {step} in {out} is corrupt")
        return steps


def records(out: Path) -> list[Row]:
    """What a run has written so far."""
    return [r for r in read_records(out / "metrics.jsonl") if r["kind"] != "speed"]


def table(rows: list[Row], undisturbed: float) -> list[str]:
    """The lines of a table: one row a run."""
    header = ["run", "killed after step", "process", "others ended after, s", "checkpoint found"]
    lines = [
        [
            str(row["run"]),
            str(row.get("killed_at_step", "–")),
            str(row["process"]),
            f"{row['others_ended_after']:.1f}" if "others_ended_after" in row else "–",
            str(max(row.get("checkpoints", ()), default="none")),
            f"{row['loss']:.6f}" if "loss" in row else "–",
            "yes" if row.get("loss") == undisturbed else f"no {row.get('error', '')[:200]}".strip(),
        ]
        for row in rows
    ]
    return markdown([*header, "final loss", "the same"], lines).splitlines()


def main(config: Config) -> None:
    """Kills, starts again, stores and tabulates.

    Raises:
      SystemExit: if a final loss differs, a checkpoint is corrupt, or a process does not end well.
    """
    SIZES["small"] = _SMALL
    draw, rows = random.Random(config.seed), list[Row]()
    with tempfile.TemporaryDirectory() as folder:
        job = Job(config, Path(folder))
        job.finish(job.folder / "first")  # which compiles
        undisturbed, seconds = job.finish(job.folder / "undisturbed")
        for run in range(1, config.times + 1):
            out = job.folder / str(run)
            # Training ends a little before the process does.
            moment, number = draw.uniform(0, 0.7 * seconds), draw.randrange(config.processes)
            row: Row = {"run": run, "moment": moment, "process": number}
            rows.append(row)
            try:
                while (found := job.disturb(out, row["moment"], number)) is None:
                    shutil.rmtree(out)
                    row["moment"] /= 2
                row |= found
                row["loss"], _ = job.finish(out)
            except (SystemExit, subprocess.TimeoutExpired, UserError) as error:
                row["error"] = " ".join(str(error).split())
            lines = [
                f"LLaMA of {_SMALL.layers} layers, {config.steps} steps, a checkpoint every "
                f"{config.every}, {config.processes} processes; one of them killed (SIGKILL), all "
                f"started again. Final loss of the run that nothing disturbed: {undisturbed:.6f}.",
                "",
                *table(rows, undisturbed),
            ]
            about = {"config": dataclasses.asdict(config), "undisturbed": undisturbed}
            store(config.out / "killed", lines, **about, rows=rows)
            print(lines[-1], flush=True)
    print("\n".join(lines))
    bad = [row["run"] for row in rows if row.get("loss") != undisturbed]
    if bad:
        raise SystemExit(f"failed, or another final loss than {undisturbed}: runs {bad}")


if __name__ == "__main__":
    main(tyro.cli(Config))
