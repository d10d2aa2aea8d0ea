"""The same training with several optimizers: one table, one picture."""

import dataclasses
import json
import math
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from examples.flax_llama import data, optimizers, plots
from examples.flax_llama.config import CompareConfig, OptimizerOptions, TrainConfig, differences
from examples.flax_llama.errors import UserError
from examples.flax_llama.meter import DivergedError
from examples.flax_llama.metrics import human_bytes, replace_text
from examples.flax_llama.parsing import parse
from examples.flax_llama.tables import aligned, markdown
from examples.flax_llama.train import Trainer, check, locked

_HEADER = (
    *("arm", "optimizer", "learning rate", "validation loss", "perplexity"),
    *("tokens/s", "optimizer state", "seconds"),
)


# What the comparison itself keeps beside the folders of its runs.
_RESERVED = {
    *("lock", "comparison.png", "results.json", "results.md"),
    *("results.json.partial", "results.md.partial"),
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One line of the comparison: an optimizer and its options, one set a learning rate."""

    name: str
    optimizer: str
    options: tuple[OptimizerOptions, ...]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of the comparison, as ``results.json`` holds it.

    Attributes:
      arm: the arm that it belongs to.
      optimizer: its optimizer.
      learning_rate: its peak learning rate.
      identity: everything that determines its numbers.
      loss: validation loss after the last step; None where it diverged, as the rest.
      perplexity: its exponential.
      tokens_per_second: training speed.
      seconds: training time.
      optimizer_bytes: size of the optimizer's state.
      remark: why there is no loss.
    """

    arm: str
    optimizer: str
    learning_rate: float
    identity: dict[str, Any]
    optimizer_bytes: int
    loss: float | None = None
    perplexity: float | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    remark: str = ""

    @property
    def rank(self) -> float:
        """Sorts trials from the best to those that diverged."""
        return math.inf if self.loss is None else self.loss

    def row(self) -> list[str]:
        """Its line in the table."""
        return [
            self.arm,
            self.optimizer,
            f"{self.learning_rate:g}",
            "diverged" if self.loss is None else f"{self.loss:.4f}",
            "" if self.perplexity is None else f"{self.perplexity:.2f}",
            "" if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f}",
            human_bytes(self.optimizer_bytes),
            "" if self.seconds is None else f"{self.seconds:.1f}",
        ]


class Results:
    """The trials that have been run, in ``results.json``, which is rewritten after each of them."""

    def __init__(self, folder: Path):
        """Reads what is there."""
        self._path = folder / "results.json"
        self.trials: dict[str, Trial] = {}
        if self._path.exists():
            try:
                stored = json.loads(self._path.read_text())
                self.trials = {name: Trial(**fields) for name, fields in stored.items()}
                for trial in self.trials.values():
                    dict(trial.identity)  # raises if it is no mapping
            except (ValueError, TypeError, AttributeError) as error:
                raise UserError(f"{self._path} is not readable: {error}; delete it") from error

    def holds(self, name: str, identity: dict[str, Any]) -> bool:
        """Whether a trial has been run.

        Raises:
          UserError: if it has, but with other settings.
        """
        if name not in self.trials:
            return False
        found = differences(identity, self.trials[name].identity)
        if found:
            raise UserError(
                f"{self._path} holds other results of {name}: {'; '.join(found)}. Choose another "
                "--out, or another name for the arm"
            )
        return True

    def add(self, name: str, trial: Trial) -> None:
        """Stores a trial."""
        self.trials[name] = trial
        text = json.dumps({k: dataclasses.asdict(t) for k, t in self.trials.items()}, indent=2)
        replace_text(self._path, text)


def run(config: CompareConfig, console: Console | None = None) -> dict[str, Trial]:
    """Runs the trials that have not been run yet, and writes tables and picture.

    Args:
      config: the options.
      console: where to report.

    Returns:
      The best trial of every arm, by its folder's name.

    Raises:
      UserError: for anything that the person at the terminal can put right.
    """
    console = console or Console()
    config.check()
    runs = [(arm, trial) for arm in parse_arms(config) for trial in _trials(config, arm)]
    _check_folders([trial.folder.name for _, trial in runs])
    for _, trial in runs:
        check(trial)
    corpus = data.load(config.data)
    with locked(config.out):
        results = Results(config.out)
        # All of them before the first one runs: what is wrong should show at once.
        trials = {
            trial.folder.name: (arm, Trainer(trial, corpus, console, details=False))
            for arm, trial in runs
        }
        done = {name: results.holds(name, t.identity()) for name, (_, t) in trials.items()}
        for name, (arm, trainer) in trials.items():
            console.rule(Text(f"{name} (done before)" if done[name] else name))
            if not done[name]:
                results.add(name, _run_trial(arm, trainer))
                _write_tables(config.out, results, trials)
        table = _write_tables(config.out, results, trials)
        console.print(table, highlight=False, markup=False, soft_wrap=True)
        best = _best(results, trials)
        shown = {trial.arm: name for name, trial in best.items()}
        plots.plot_comparison(
            config.out / "comparison.png",
            {
                arm: plots.Curves.read(config.out / name / "metrics.jsonl")
                for arm, name in shown.items()
            },
            {arm: trials[name][1].memory for arm, name in shown.items()},
        )
    return best


def parse_arms(config: CompareConfig) -> list[Arm]:
    """Reads ``--optimizers`` and ``--arm``.

    An arm's own options win over those given for all, of which it takes the ones that it has.

    Raises:
      UserError: if there is no arm, a name twice, or an option that nobody has.
    """
    specs = [
        {"name": name, "optimizer": name} for name in filter(None, config.optimizers.split(","))
    ]
    specs += [_parse_arm(text) for text in config.arm]
    if not specs:
        raise UserError("nothing to compare: give --optimizers adamw,gale_adamw or --arm")
    names = [spec.setdefault("name", spec["optimizer"]) for spec in specs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"two arms are called '{twice}'; give one of them another name=")
    shared = optimizers.narrowed(config.optimization, [spec["optimizer"] for spec in specs])
    return [_arm(spec, options) for spec, options in zip(specs, shared, strict=True)]


def _parse_arm(text: str) -> dict[str, str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--arm '{text}': {error}") from error
    for word in words:
        if not word.partition("=")[2]:
            raise UserError(f"--arm '{text}': expected NAME=VALUE, got '{word}'")
    spec: dict[str, str] = {}
    for key, _, value in (word.partition("=") for word in words):
        option = "learning_rate" if key == "lr" else key.replace("-", "_")
        if option in spec:
            raise UserError(f"--arm '{text}': {option}= is given twice; leave one of them out")
        spec[option] = value
    if "optimizer" not in spec:
        raise UserError(f"--arm '{text}': optimizer= is missing")
    return spec


def _arm(spec: dict[str, str], shared: OptimizerOptions) -> Arm:
    name, optimizer = spec["name"], spec["optimizer"]
    if "/" in name or name.startswith("."):
        raise UserError(
            f"arm '{name}': its name becomes a folder's; leave out '/' and a leading '.'"
        )
    own = {k: v for k, v in spec.items() if k not in ("name", "optimizer", "learning_rate")}
    try:
        optimizers.check_options(optimizer, own)
    except UserError as error:
        raise UserError(f"arm '{name}': {error}") from error
    arguments = [word for key, value in own.items() for word in (f"--{key}", value)]
    sets: list[OptimizerOptions] = []
    rates = spec["learning_rate"].split(",") if "learning_rate" in spec else []
    if not all(rates):
        raise UserError(f"arm '{name}': a learning rate is missing beside a comma of lr=")
    for rate in rates or [""]:
        rate_arguments = ["--learning_rate", rate] if rate else []
        try:
            sets.append(parse(OptimizerOptions, [*arguments, *rate_arguments], default=shared))
        except UserError as error:
            raise UserError(f"arm '{name}': {error}") from error
    return Arm(name, optimizer, tuple(sets))


def _trials(config: CompareConfig, arm: Arm) -> list[TrainConfig]:
    """The runs of an arm, each in a folder of its own."""
    return [
        TrainConfig(
            optimizer=arm.optimizer,
            out=config.out
            / (f"{arm.name}-lr{o.learning_rate:g}" if len(arm.options) > 1 else arm.name),
            optimization=o,
            training=config.training,
            model=config.model,
            data=config.data,
            output=config.output,
        )
        for o in arm.options
    ]


def _check_folders(names: list[str]) -> None:
    """Refuses runs that would be kept in one place: the later would replace the earlier."""
    for i, name in enumerate(names):
        if name in _RESERVED:
            raise UserError(f"arm '{name}': the comparison keeps a file there; choose another")
        if name in names[:i]:
            raise UserError(
                f"two runs would be kept in the folder '{name}': learning rates of an arm must "
                "differ in their first 6 digits, and arms in their names; change lr= or name="
            )


def _run_trial(arm: Arm, trainer: Trainer) -> Trial:
    trial = Trial(
        arm.name,
        arm.optimizer,
        trainer.settings["learning_rate"],
        trainer.identity(),
        trainer.memory.optimizer,
    )
    try:
        with locked(trainer.config.folder):
            result = trainer.run()
    except DivergedError as error:
        trainer.console.print(str(error), style="red", highlight=False, markup=False)
        return dataclasses.replace(trial, remark=str(error))
    return dataclasses.replace(
        trial,
        loss=result.loss,
        perplexity=result.perplexity,
        tokens_per_second=result.tokens_per_second,
        seconds=result.seconds,
    )


def _best(results: Results, names: Iterable[str]) -> dict[str, Trial]:
    """The best trial of every arm among those called ``names``."""
    best: dict[str, str] = {}
    for name in names:
        if name in results.trials:
            arm = results.trials[name].arm
            if arm not in best or results.trials[name].rank < results.trials[best[arm]].rank:
                best[arm] = name
    return {name: results.trials[name] for name in best.values()}


def _write_tables(folder: Path, results: Results, names: Iterable[str]) -> str:
    """Writes ``results.md``, and returns the arms' table for the terminal."""
    rows = [trial.row() for trial in _best(results, names).values()]
    every = [results.trials[name] for name in names if name in results.trials]
    parts = [markdown(_HEADER, rows)]
    if len(every) > len(rows):
        parts += ["Every learning rate:", markdown(_HEADER, [trial.row() for trial in every])]
    parts += [
        f"{trial.arm}, {trial.learning_rate:g}: {t}." for trial in every if (t := trial.remark)
    ]
    replace_text(folder / "results.md", "\n\n".join(parts) + "\n")
    return aligned(_HEADER, rows)
