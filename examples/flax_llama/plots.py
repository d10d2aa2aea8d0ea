"""The pictures of a run and of a comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from examples.flax_llama.metrics import CURVES, read_records, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from examples.flax_llama.memory import Breakdown
    from optax_gale import StepMemoryReport

_MIB = 2**20
_STEP_PARTS = {"other": "other state", "work_space": "work space"}
_SMOOTHED = 0.03  # of all steps: the window of the training loss's running mean


class Curves(NamedTuple):
    """What a run's records say about its losses.

    Attributes:
      steps: steps ``1..N``.
      seconds: training time at each.
      losses: training loss at each.
      validation_steps: steps after which it was validated.
      validation_losses: the losses then.
    """

    steps: np.ndarray
    seconds: np.ndarray
    losses: np.ndarray
    validation_steps: np.ndarray
    validation_losses: np.ndarray

    @classmethod
    def read(cls, path: Path) -> "Curves":
        """Reads ``metrics.jsonl``. Times between two reports are interpolated."""
        columns: dict[str, list[tuple[float, float]]] = {kind: [] for kind in CURVES}
        for record in read_records(path):
            columns[record["kind"]].append((record["step"], record[CURVES[record["kind"]]]))
        train, speed, validation = (
            np.asarray(rows, dtype=np.float64).reshape(-1, 2).T for rows in columns.values()
        )
        seconds = np.interp(train[0], [0.0, *speed[0]], [0.0, *speed[1]])
        return cls(train[0], seconds, train[1], validation[0], validation[1])

    @property
    def smooth(self) -> np.ndarray:
        """Mean of the last few training losses at each step."""
        window = max(1, round(_SMOOTHED * len(self.losses)))
        sums = np.cumsum(np.concatenate([[0.0], self.losses]))
        last = np.arange(1, len(sums))
        first = np.maximum(last - window, 0)
        return (sums[last] - sums[first]) / (last - first)


def plot_run(path: Path, curves: Curves, parts: "Breakdown") -> None:
    """Draws the loss of a run, and where its memory goes, to a PNG."""
    figure, (loss, memory) = _figure(width_ratios=(3, 2))
    loss.plot(curves.steps, curves.losses, color="C0", alpha=0.25, linewidth=0.8)
    loss.plot(curves.steps, curves.smooth, color="C0", label="training")
    loss.plot(
        curves.validation_steps, curves.validation_losses, "o-", color="C1", label="validation"
    )
    loss.set(xlabel="step", ylabel="loss (nats a token)")
    loss.legend()
    _bars(memory, {kind: {"": n} for kind, n in parts._asdict().items()})
    memory.set(title="memory besides activations", ylabel="MiB")
    _save(figure, path)


def plot_comparison(
    path: Path, curves: Mapping[str, Curves], parts: Mapping[str, "Breakdown"]
) -> None:
    """Draws loss against steps, loss against time and optimizer memory of several runs."""
    figure, (by_step, by_time, memory) = _figure(width_ratios=(1, 1, 1))
    for name, curve in curves.items():
        by_step.plot(curve.steps, curve.smooth, label=_plain(name))
        by_time.plot(curve.seconds, curve.smooth, label=_plain(name))
    by_step.set(xlabel="step", ylabel="training loss (nats a token)")
    by_time.set(xlabel="seconds of training")
    # The first steps, where every run falls from the same height, would flatten the rest.
    tops = [curve.smooth[len(curve.smooth) // 10] for curve in curves.values() if len(curve.steps)]
    for axes in (by_step, by_time) if tops else ():
        axes.set_ylim(top=max(tops))
    by_step.legend()
    _bars(
        memory,
        {
            name: {"moments": part.moments, "projectors": part.projectors}
            for name, part in parts.items()
        },
    )
    memory.set(title="optimizer state", ylabel="MiB")
    memory.legend()
    _save(figure, path)


def plot_step_memory(path: Path, reports: Mapping[str, "StepMemoryReport"]) -> None:
    """Draws where the memory of a training step goes: a bar an optimizer, a line for the budget."""
    figure, axes = _figure(width_ratios=(2,))
    figure.set_size_inches(10, 1.8 + 0.6 * len(reports))
    budgets = {report.budget for report in reports.values() if report.budget is not None}
    scale, unit = (_MIB, "MiB")
    if max([report.peak for report in reports.values()], default=0) >= 1024 * _MIB:
        scale, unit = (1024 * _MIB, "GiB")
    names = list(reports)
    left = np.zeros(len(names))
    for part in next(iter(reports.values())).parts() if reports else ():
        width = np.array([reports[name].parts()[part] for name in names]) / scale
        if width.any():
            axes.barh(range(len(names)), width, left=left, label=_STEP_PARTS.get(part, part))
        left += width
    for i, total in enumerate(left):
        axes.text(total, i, f" {total:.1f}", va="center")
    for budget in budgets:
        axes.axvline(budget / scale, color="black", linestyle="--", label="budget")
    axes.set_yticks(range(len(names)), map(_plain, names))
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set(xlabel=unit, title="memory of a training step")
    figure.legend(loc="outside right upper")
    _save(figure, path, option="--picture")


def _figure(width_ratios: Sequence[float]) -> Any:
    # Not pyplot: it would look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(width_ratios), 4), layout="constrained")
    return figure, figure.subplots(1, len(width_ratios), width_ratios=width_ratios)


def _bars(axes: "Axes", stacks: Mapping[str, Mapping[str, int]]) -> None:
    """One bar a stack, its parts on top of each other, labelled with the total."""
    names = list(stacks)
    bottom = np.zeros(len(names))
    for part in stacks[names[0]] if names else ():
        height = np.array([stacks[name][part] for name in names]) / _MIB
        axes.bar(range(len(names)), height, bottom=bottom, label=part)
        bottom += height
    for i, total in enumerate(bottom):
        axes.text(i, total, f"{total:.1f}", ha="center", va="bottom")
    axes.set_xticks(range(len(names)), map(_plain, names), rotation=20)


def _plain(name: str) -> str:
    """A name as it is: between dollars Matplotlib would read it as a formula."""
    return name.replace("$", r"\$")


def _save(figure: "Figure", path: Path, option: str = "--out") -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with writing(path, option):
        figure.savefig(path, dpi=120)
