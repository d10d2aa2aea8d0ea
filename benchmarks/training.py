"""Validation losses of optimizers trained side by side, over learning rates and seeds.

Runs the example's ``compare`` with the arms of a suite. Every finished run is stored, runs that are
stored are not repeated, and ``--only`` and ``--rates`` pick some, so that a long suite can be made
in parts and on several machines. Prints a Markdown table and stores it with the numbers.

    python -m benchmarks.training --suite tiny --seeds 0 1 2
    python -m benchmarks.training --suite 60m --train train.u16.xz --validation val.u16.xz
"""

import dataclasses
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks.environment import describe
from examples.flax_llama import compare
from examples.flax_llama.config import CompareConfig, ModelOptions, OutputOptions, TrainingOptions
from examples.flax_llama.data import DataConfig
from examples.flax_llama.tables import markdown

# An arm: its options, in whose absence the example's defaults hold (side=long for tiny, but for
# GaLore), and its learning rates.
_LOW_RANK = (1e-2, 2e-2, 4e-2)
_TUNED = (*_LOW_RANK, 8e-2)
TINY: dict[str, tuple[str, tuple[float, ...]]] = {
    "AdamW": ("optimizer=adamw", (1e-3, 2e-3, 4e-3)),
    "optax.contrib.galore": ("optimizer=optax_galore", _TUNED),
    "GaLore": ("optimizer=galore", _LOW_RANK),
    "GALE": ("optimizer=gale_adamw", _TUNED),
    "GALE, side short": ("optimizer=gale_adamw side=short", _LOW_RANK),
    "GALE, moments kept": ("optimizer=gale_adamw moments=keep", _LOW_RANK),
    "GALE, moments reset": ("optimizer=gale_adamw moments=reset", _LOW_RANK),
    "GALE, no power iteration": ("optimizer=gale_adamw power_iterations=0", _LOW_RANK),
    "GALE, two power iterations": ("optimizer=gale_adamw power_iterations=2", _LOW_RANK),
    "GALE, SVD": ("optimizer=gale_adamw range_finder=svd", _LOW_RANK),
    "GALE, warm start": ("optimizer=gale_adamw range_finder=warm", _LOW_RANK),
    "GALE, random subspace": ("optimizer=gale_adamw range_finder=random", _LOW_RANK),
    "GALE, Fira": ("optimizer=gale_adamw residual=fira", _LOW_RANK),
    "GALE, staggered": ("optimizer=gale_adamw refresh_schedule=staggered", _LOW_RANK),
    "GALE, not aligned": ("optimizer=gale_adamw align=False", _LOW_RANK),
    "GALE, not aligned, side short": ("optimizer=gale_adamw align=False side=short", _LOW_RANK),
    "GALE, not aligned, moments kept": ("optimizer=gale_adamw align=False moments=keep", _LOW_RANK),
    "GALE, not aligned, Fira": ("optimizer=gale_adamw align=False residual=fira", _LOW_RANK),
    "GALE-Muon": ("optimizer=gale_muon", (5e-3, 1e-2, 2e-2)),
    "Muon": ("optimizer=muon", (5e-3, 1e-2, 2e-2)),
}
LLAMA_60M: dict[str, tuple[str, tuple[float, ...]]] = {
    "AdamW": ("optimizer=adamw", (1e-3, 2e-3, 3e-3)),
    "GaLore": ("optimizer=galore", (5e-3, 1e-2, 2e-2)),
    "optax.contrib.galore": ("optimizer=optax_galore", (1e-2,)),
    "GALE": ("optimizer=gale_adamw side=short", (5e-3, 1e-2, 2e-2)),
    "GALE, moments kept": ("optimizer=gale_adamw side=short moments=keep", (1e-2,)),
    "GALE, side long": ("optimizer=gale_adamw side=long", (5e-3, 1e-2, 2e-2)),
    "GALE, Fira": ("optimizer=gale_adamw side=short residual=fira", (5e-3, 1e-2, 2e-2)),
    "GALE, not aligned, moments kept": (
        "optimizer=gale_adamw align=False side=short moments=keep",
        (1e-2,),
    ),
    "GALE, not aligned, Fira": (
        "optimizer=gale_adamw align=False side=short residual=fira",
        (1e-2,),
    ),
    "GALE, not aligned, moments kept, Fira": (
        "optimizer=gale_adamw align=False side=short moments=keep residual=fira",
        (1e-2,),
    ),
    "GALE-Muon": ("optimizer=gale_muon side=short", (1e-2, 2e-2, 4e-2)),
    "GALE-Muon, not aligned, moments kept": (
        "optimizer=gale_muon align=False side=short moments=keep",
        (2e-2,),
    ),
    "Muon": ("optimizer=muon", (1e-2, 2e-2, 4e-2)),
}
SUITES = {"tiny": TINY, "60m": LLAMA_60M}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train."""

    suite: Literal["tiny", "60m"] = "tiny"
    """tiny: the default example. 60m: LLaMA-60M, 800 steps of 512 sequences of token ids."""
    only: tuple[str, ...] = ()
    """Arms to run; all by default."""
    rates: tuple[float, ...] = ()
    """Of their learning rates, those to run; all by default."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of weights and data order; every run is made with each."""
    train: Path | None = None
    """60m: token ids to train on."""
    validation: Path | None = None
    """60m: token ids to validate on."""
    attention_backend: Literal["xla", "cudnn"] = "xla"
    """cudnn: the fused kernel of NVIDIA GPUs."""
    loss_chunks: int = 1
    """60m: parts in which logits are made: less memory, the same loss but for rounding."""
    runs: Path = Path("runs/benchmark")
    """Where the runs are kept."""
    out: Path = Path("benchmarks/results")
    """Where the results go, and join those that are there."""


def slug(arm: str) -> str:
    """An arm's name as a folder's."""
    return re.sub(r"\W+", "-", arm.lower())


def comparison(config: Config, seed: int, arm: str, rate: float) -> CompareConfig:
    """The options of ``compare`` for one run."""
    spec = f"name={slug(arm)}-lr{rate:g} {SUITES[config.suite][arm][0]} lr={rate}"
    shared: dict[str, Any] = {
        "arm": (spec,),
        "out": config.runs / config.suite / f"seed{seed}",
        "output": OutputOptions(checkpoint_every=0, eval_every=0, tensorboard=False),
    }
    if config.suite == "tiny":
        return CompareConfig(
            **shared,
            training=TrainingOptions(seed=seed),
            model=ModelOptions(attention_backend=config.attention_backend),
        )
    return CompareConfig(
        **shared,
        training=TrainingOptions(steps=800, batch_size=512, seed=seed),
        model=ModelOptions(
            size="60m",
            attention_backend=config.attention_backend,
            loss_chunks=config.loss_chunks,
        ),
        data=DataConfig(
            source="tokens",
            path=config.train,
            validation_path=config.validation,
            vocab_size=32000,
        ),
    )


def planned(config: Config) -> list[tuple[int, str, float]]:
    """Seed, arm and learning rate of every run."""
    arms = config.only or tuple(SUITES[config.suite])
    return [
        (seed, arm, rate)
        for seed in config.seeds
        for arm in arms
        for rate in SUITES[config.suite][arm][1]
        if not config.rates or rate in config.rates
    ]


def table(suite: str, runs: list[dict[str, Any]]) -> str:
    """One row an arm: the mean over seeds at every learning rate, the best in bold."""
    losses: dict[str, dict[float, list[float | None]]] = defaultdict(lambda: defaultdict(list))
    memory = {}
    for run in runs:
        losses[run["arm"]][run["learning_rate"]].append(run["loss"])
        memory[run["arm"]] = run["optimizer_bytes"]
    rates = sorted({rate for arm in losses.values() for rate in arm})
    rows = []
    for arm in (a for a in SUITES[suite] if a in losses):
        cells = {rate: _summary(values) for rate, values in losses[arm].items()}
        best = min(cells, key=lambda rate: cells[rate][0])
        texts = [cells[rate][1] if rate in cells else "" for rate in rates]
        texts[rates.index(best)] = f"**{cells[best][1]}**"
        rows.append([arm, *texts, f"{memory[arm] / 2**20:.2f}"])
    return markdown(["optimizer", *(f"{rate:g}" for rate in rates), "state, MiB"], rows)


def _summary(losses: list[float | None]) -> tuple[float, str]:
    """A number to sort by, and the mean with half the range over seeds."""
    found = [loss for loss in losses if loss is not None]
    if len(found) < len(losses):
        return float("inf"), "diverged"
    mean = statistics.mean(found)
    spread = (max(found) - min(found)) / 2
    return mean, f"{mean:.3f}" + (f" ± {spread:.3f}" if len(found) > 1 else "")


def main(config: Config) -> None:
    """Trains and stores."""
    config.out.mkdir(parents=True, exist_ok=True)
    stem = config.out / f"training_{config.suite}"
    stored = stem.with_suffix(".json")
    runs = json.loads(stored.read_text())["runs"] if stored.exists() else []
    environment = describe()
    done = {(run["seed"], run["arm"], run["learning_rate"]) for run in runs}
    for seed, arm, rate in planned(config):
        if (seed, arm, rate) in done:
            continue
        (trial,) = compare.run(comparison(config, seed, arm, rate)).values()
        fields = dataclasses.asdict(trial)
        settings = {**fields.pop("identity"), "environment": environment}
        runs.append({**fields, "arm": arm, "seed": seed, "settings": settings})
        stored.write_text(json.dumps({"runs": runs}, indent=1, default=str) + "\n")
        text = table(config.suite, runs)
        stem.with_suffix(".md").write_text(text + "\n")
        print(text, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config))
