"""The picture of `benchmarks.training_memory`: its peaks beside published ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_GIB = 2**30

# LLaMA-7B on one GPU, in the units of the sources, which write GB or G.
PUBLISHED = {
    "GaLore, r = 1024, 8 bits, layer by layer": 22.8,
    "GaLore, its authors' talk": 18.0,
    "Q-GaLore, 8-bit weights": 15.3,
    "Q-APOLLO-Mini, 8-bit weights (less than)": 12.0,
}


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draws a bar for each peak of LLaMA-7B, ours and the published, to a PNG.

    Args:
      path: the file.
      rows: the measurements; those without a peak are left out.
    """
    # Not pyplot: it would look for a display.
    from matplotlib.figure import Figure

    ours = [
        (row["case"].removeprefix("7b, "), row["peak_bytes"] / _GIB, "optax_gale")
        for row in rows
        if row["case"].startswith("7b") and row["allocator"] == "free" and row.get("peak_bytes")
    ]
    published = [(name, peak, "published") for name, peak in PUBLISHED.items()]
    bars = sorted([*ours, *published], key=lambda bar: -bar[1])
    figure = Figure(figsize=(9, 1 + 0.35 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for kind, color in {"optax_gale": "tab:blue", "published": "lightgray"}.items():
        at = [i for i, bar in enumerate(bars) if bar[2] == kind]
        if at:
            drawn = axes.barh(at, [bars[i][1] for i in at], color=color, label=kind)
            axes.bar_label(drawn, fmt="%.1f", padding=3)
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars])
    axes.set(title="training LLaMA-7B", xlabel="peak memory, GiB (published: as published)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1)  # for the numbers
    figure.legend(loc="outside lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
