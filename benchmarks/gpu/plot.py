"""The picture of `benchmarks.step`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.arms import ADAMW, CONTRIB, GALE, GAP, TORCH
from benchmarks.gpu.report import Measured
from benchmarks.gpu.store import Row

_WIDTH = 0.8


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Draws ordinary steps, averages over a gap, and single steps, to a PNG."""
    # Not pyplot: it would look for a display.
    from matplotlib.figure import Figure

    measured = Measured(rows)
    figure = Figure(figsize=(16, 4.5), layout="constrained")
    ordinary, average, single = figure.subplots(1, 3)
    cases = measured.cases("ordinary")
    labels = [f"{size.upper()}\nr = {rank}" for size, rank in cases]
    arms = {arm: [measured.value("ordinary", *case, arm) for case in cases]
            for arm in (GALE, ADAMW)}  # fmt: skip
    floors = [measured.value("ordinary", *case, GALE, "floor_ms") for case in cases]
    best = [measured.best_xla(*case) for case in cases]
    _bars(ordinary, labels, {"floor": floors, GALE: arms[GALE], "GALE, best plain XLA": best,
                             ADAMW: arms[ADAMW]})  # fmt: skip
    ordinary.set(title="ordinary step", ylabel="ms")
    names = (GALE, ADAMW, CONTRIB, TORCH)
    _bars(average, labels, {n: [measured.average(*case, n) for case in cases] for n in names})
    average.set(title=f"step averaged over a gap of {GAP}", ylabel="ms")
    _single(single, [r for r in rows if r["part"] == "spread" and "times_ms" in r])
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _bars(axes: Any, labels: Sequence[str], groups: dict[str, list[float | None]]) -> None:
    """Groups of bars, on a logarithmic scale."""
    width = _WIDTH / len(groups)
    for k, (name, heights) in enumerate(groups.items()):
        at = [i + (k + 0.5) * width - _WIDTH / 2 for i in range(len(labels))]
        known = [(x, h) for x, h in zip(at, heights, strict=True) if h]
        if known:
            axes.bar([x for x, _ in known], [h for _, h in known], width, label=name)
    axes.set_xticks(range(len(labels)), labels)
    if axes.containers:
        axes.set_yscale("log")
        axes.legend()


def _single(axes: Any, rows: Sequence[Row]) -> None:
    """The times of single steps of the first model that has them."""
    for row in rows:
        if row["size"] == rows[0]["size"]:
            axes.plot(row["times_ms"], linewidth=0.8, label=row["arm"])
    if rows:
        axes.set(title=f"single steps, LLaMA-{rows[0]['size'].upper()}", xlabel="step", ylabel="ms")
        axes.set_yscale("log")
        axes.legend()
