"""Tables of the stored measurements of `benchmarks.step`."""

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.arms import ADAMW, ARMS, CONTRIB, GALE, GAP, KEPT, TORCH, XLA_FORMS
from benchmarks.gpu.store import Row, provenance
from examples.flax_llama.tables import markdown as table

_NONE = "–"
_GIB = 2**30
_SIZES = ("60m", "130m", "350m", "1b", "7b", "13b")
_BF16 = "AdamW, bf16 states"
_STAGGERED = "GALE, staggered"


class Measured:
    """The measurements, looked up."""

    def __init__(self, rows: Sequence[Row]):
        """Takes stored rows."""
        self._rows = rows

    def row(self, part: str, size: str, rank: int | None, arm: str) -> Row | None:
        """A measurement; an arm that has no rank is found under any."""
        for r in self._rows:
            same = (r["part"], r["size"], r["arm"]) == (part, size, arm)
            if same and r.get("rank") in (rank, None) and "error" not in r:
                return r
        return None

    def value(
        self, part: str, size: str, rank: int | None, arm: str, field: str = "ms"
    ) -> float | None:
        """One of its numbers."""
        row = self.row(part, size, rank, arm)
        return None if row is None else row.get(field)

    def cases(self, *parts: str) -> list[tuple[str, int]]:
        """Models and ranks that were measured."""
        found = {
            (r["size"], r["rank"])
            for r in self._rows
            if r["part"] in parts and r.get("rank") is not None
        }
        order = {size: i for i, size in enumerate(_SIZES)}
        return sorted(found, key=lambda case: (order.get(case[0], -1), case[1]))

    def errors(self) -> list[Row]:
        """What could not be measured."""
        return [r for r in self._rows if "error" in r]

    def best_xla(self, size: str, rank: int, arm: str = GALE) -> float | None:
        """The fastest plain-XLA form of what an arm computes."""
        times = [self.value("ordinary", size, rank, form) for form in XLA_FORMS[arm]]
        return min((t for t in times if t is not None), default=None)

    def average(self, size: str, rank: int, arm: str) -> float | None:
        """Milliseconds of a step averaged over a gap, of which one step refreshes."""
        step = self.value("ordinary", size, rank, arm)
        if arm in (CONTRIB, TORCH):
            whole = self.value("ordinary", size, rank, arm, "refresh_step_ms")
            extra = _minus(whole, step) if whole else self.value("svd", size, None, arm)
        elif arm == GALE:
            extra = _minus(self.value("refresh", size, rank, GALE), step)
        else:
            return step
        return None if step is None or extra is None else step + extra / GAP


def line(key: Row, found: Row) -> str:
    """A measurement in one line."""
    name = " ".join(str(x) for x in key.values() if x is not None)
    if "error" in found:
        return f"{name}: {found['error']}"
    numbers = ("ms", "floor_ms", "peak_bytes", "orthogonality", "p50_ms", "p99_ms", "max_ms")
    return f"{name}: " + ", ".join(f"{x} {found[x]:.4g}" for x in numbers if x in found)


def markdown(rows: Sequence[Row], runs: Sequence[Row]) -> str:
    """All tables."""
    measured = Measured(rows)
    used = [run for i, run in enumerate(runs) if any(row["run"] == i for row in rows)]
    sections = [
        "# The optimizer step on all projected matrices of LLaMA",
        provenance(used),
        "bfloat16 weights and gradients, random; milliseconds, the median of many; weights and "
        "state donated. The floor is max(bytes / copy bandwidth, operations / matrix rate), both "
        "measured in the same run, each input read once and each output written once.",
        *_titled("Goals", targets(measured)),
        *_ordinary(measured),
        *_titled("Refresh of all matrices", refreshes(measured)),
        *_titled(f"A step, averaged over a gap of {GAP}", averages(measured)),
        *_titled("Single steps, on the host's clock", spreads(measured)),
        *_profiles(rows),
        *_footnotes(measured, rows),
    ]
    return "\n\n".join(sections)


def _titled(title: str, text: str | None) -> list[str]:
    return [f"## {title}", text] if text else []


def _name(size: str, rank: int) -> str:
    return f"LLaMA-{size.upper()}, r = {rank}"


# Ordinary steps -----------------------------------------------------------------------------------


def _ordinary(measured: Measured) -> list[str]:
    sections = []
    for size, rank in measured.cases("ordinary"):
        text = ordinary(measured, size, rank)
        sections += _titled(f"Ordinary step, {_name(size, rank)}", text)
    return sections


def ordinary(measured: Measured, size: str, rank: int) -> str:
    """One row an arm."""
    adamw = measured.value("ordinary", size, rank, ADAMW)
    lines = []
    for arm in (*ARMS, TORCH):
        row = measured.row("ordinary", size, rank, arm)
        if row is None:
            continue
        lines.append(
            [
                arm,
                number(row["ms"]) + _mark(row),
                number(row.get("floor_ms")),
                number(_ratio(row["ms"], row.get("floor_ms"))),
                number(_ratio(adamw, row["ms"])),
                number(_ratio(row.get("bytes"), 1e9 * row["ms"])),
                number(_ratio(row.get("peak_bytes"), _GIB)) + _mark(row),
            ]
        )
    header = ["arm", "ms", "floor", "ms / floor", "AdamW f32 / ms", "TB/s", "peak memory, GiB"]
    return table(header, lines)


# The other tables ---------------------------------------------------------------------------------


def refreshes(measured: Measured) -> str | None:
    """What a refresh costs, beside the SVDs that its projectors replace."""
    lines = []
    for size, rank in measured.cases("refresh"):
        row = measured.row("refresh", size, rank, GALE)
        if row is None:
            continue
        step = measured.value("ordinary", size, rank, GALE)
        projectors = _minus(measured.value("refresh", size, rank, KEPT), step)
        svds = [measured.value("svd", size, None, arm) for arm in (CONTRIB, TORCH)]
        lines.append(
            [
                _name(size, rank),
                number(projectors) + _mark(row),
                number(_minus(row["ms"], step)) + _mark(row),
                number(row["ms"]) + _mark(row),
                f"{row['orthogonality']:.1e}",
                *(number(svd) + ("†" if svd else "") for svd in svds),
                *(number(_ratio(svd, projectors)) for svd in svds),
                number(_ratio(row.get("peak_bytes"), _GIB)),
            ]
        )
    header = ["", "projectors", "and moments", "step with both", "max \\|PᵀP − I\\|"]
    header += ["SVDs, JAX", "SVDs, torch", "JAX / projectors", "torch / projectors"]
    header += ["peak memory, GiB"]
    return table(header, lines) if lines else None


def averages(measured: Measured) -> str | None:
    """(199 ordinary steps + 1 refresh) / 200, of all who can be compared."""
    lines = []
    for size, rank in measured.cases("ordinary"):
        gale = measured.average(size, rank, GALE)
        if gale is None:
            continue
        others = [measured.average(size, rank, arm) for arm in (ADAMW, _BF16, CONTRIB, TORCH)]
        contrib = measured.row("ordinary", size, rank, CONTRIB) or {}
        marks = ["", "", "" if "refresh_step_ms" in contrib else "†", "†"]
        lines.append(
            [
                _name(size, rank),
                number(gale),
                *(number(x) + (mark if x else "") for x, mark in zip(others, marks, strict=True)),
                *(number(_ratio(x, gale)) for x in others),
            ]
        )
    names = [ADAMW, _BF16, CONTRIB, TORCH]
    header = ["", GALE, *names, *(f"{name} / GALE" for name in names)]
    return table(header, lines) if lines else None


def spreads(measured: Measured) -> str | None:
    """Percentiles of the times of single steps."""
    fields = ("p50_ms", "p90_ms", "p99_ms", "max_ms", "mean_ms")
    lines = []
    for size, rank in measured.cases("spread"):
        for arm in (_STAGGERED, "GALE, chosen by the host", "GALE, together", ADAMW):
            row = measured.row("spread", size, rank, arm)
            if row is None:
                continue
            ratio = number(_ratio(row["p99_ms"], row["p50_ms"]))
            lines.append(
                [_name(size, rank), arm, *(number(row[x]) for x in fields), ratio,
                 str(row["steps"])]
            )  # fmt: skip
    header = ["", "arm", "p50", "p90", "p99", "max", "mean", "p99 / p50", "steps"]
    return table(header, lines) if lines else None


def _profiles(rows: Sequence[Row]) -> list[str]:
    sections = []
    for row in rows:
        if row["part"] != "profile" or "error" in row:
            continue
        lines = [
            [f"`{name[:80]}`", number(launches), number(ms)]
            for name, launches, ms in row["kernels"][:12]
        ]
        rank = "" if row["rank"] is None else f", r = {row['rank']}"
        title = f"Kernels of a step, LLaMA-{row['size'].upper()}{rank}, {row['arm']}"
        text = table(["kernel", "launches a step", "ms a step"], lines)
        sections += _titled(title, f"{text}\n\nAll kernels: {number(row['ms'])} ms a step.")
    return sections


# Goals --------------------------------------------------------------------------------------------


def targets(measured: Measured) -> str | None:
    """The project's goals, and what was measured."""
    lines = [*_step_targets(measured), *_refresh_targets(measured), *_average_targets(measured)]
    for size, rank in measured.cases("spread"):
        row = measured.row("spread", size, rank, _STAGGERED)
        if row:
            what = f"p99 / p50 with staggered refresh, {_name(size, rank)}"
            lines.append(_at_most(what, _ratio(row["p99_ms"], row["p50_ms"]), 1.1))
    lines = [x for x in lines if x]
    return table(["what", "goal", "measured", "reached"], lines) if lines else None


def _step_targets(measured: Measured) -> list[list[str]]:
    lines = []
    goals = {("7b", 128): 1.35, ("7b", 1024): 1.5, ("1b", 512): 2.0}
    faster = {("7b", 128): 2.5, ("7b", 1024): 1.0, ("60m", 128): 1.0}
    for size, rank in measured.cases("ordinary"):
        row, what = measured.row("ordinary", size, rank, GALE), f"step, {_name(size, rank)}"
        if row is None:
            continue
        if (size, rank) in goals:
            over = _ratio(row["ms"], row.get("floor_ms"))
            lines.append(_at_most(f"{what}: ms / floor", over, goals[size, rank]))
        if (size, rank) in faster:
            gain = _ratio(measured.value("ordinary", size, rank, ADAMW), row["ms"])
            lines.append(_at_least(f"{what}: AdamW / GALE", gain, faster[size, rank]))
        if (size, rank) == ("60m", 128):
            lines.append(_at_most(f"{what}: ms", row["ms"], 0.15))
        gain = _ratio(measured.best_xla(size, rank), row["ms"])
        goal = 1.3 if (size, rank) == ("7b", 128) else 1.0
        lines.append(_at_least(f"{what}: best plain XLA / GALE", gain, goal))
    return lines


def _refresh_targets(measured: Measured) -> list[list[str]]:
    lines = []
    for size, rank in measured.cases("refresh"):
        row = measured.row("refresh", size, rank, GALE)
        if row is None:
            continue
        what = f"refresh, {_name(size, rank)}"
        goal = {("7b", 128): 20.0, ("7b", 1024): 200.0}.get((size, rank))
        if goal is not None:
            step = measured.value("ordinary", size, rank, GALE)
            took = _minus(measured.value("refresh", size, rank, KEPT), step)
            lines.append(_at_most(f"{what}: ms for the projectors", took, goal))
        lines.append(_at_most(f"{what}: max \\|PᵀP − I\\|", row["orthogonality"], 1e-5))
    return lines


def _average_targets(measured: Measured) -> list[list[str]]:
    lines = []
    for size, rank in measured.cases("ordinary"):
        gale = measured.average(size, rank, GALE)
        what = f"average over a gap, {_name(size, rank)}"
        for arm, goal in ((CONTRIB, 50.0), (TORCH, 50.0), (ADAMW, 1.0)):
            gain = _ratio(measured.average(size, rank, arm), gale)
            lines.append(_at_least(f"{what}: {arm} / GALE", gain, goal))
    return lines


def _at_most(what: str, value: float | None, goal: float) -> list[str]:
    return _verdict(what, f"≤ {goal:g}", value, value is not None and value <= goal)


def _at_least(what: str, value: float | None, goal: float) -> list[str]:
    return _verdict(what, f"≥ {goal:g}", value, value is not None and value >= goal)


def _verdict(what: str, goal: str, value: float | None, reached: bool) -> list[str]:
    return [] if value is None else [what, goal, number(value), "yes" if reached else "**no**"]


# Details ------------------------------------------------------------------------------------------


def number(x: float | None) -> str:
    """Three digits or more, without exponents where they are not needed.

    Example:
      >>> number(0.41234), number(12345.6), number(0.0000021)
      ('0.412', '12346', '2.1e-06')
    """
    if x is None:
        return _NONE
    if x == 0 or abs(x) >= 100:
        return f"{x:.0f}"
    return f"{x:.1e}" if abs(x) < 1e-3 else f"{x:.3g}"


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _mark(row: Row) -> str:
    return "†" if row.get("layers") != row.get("of_layers") else ""


def _footnotes(measured: Measured, rows: Sequence[Row]) -> list[str]:
    notes = [
        "† extrapolated: measured on some of the layers, or one matrix of every shape, and "
        "multiplied by their number."
    ]
    shares: dict[tuple[Any, ...], None] = {}
    for row in rows:
        if row.get("layers") != row.get("of_layers"):
            shares[row["size"], row["arm"], row["layers"], row["of_layers"]] = None
    for size, arm, layers, of_layers in shares:
        notes.append(f"LLaMA-{size.upper()}, {arm}: {layers} of {of_layers} layers.")
    if any(r["arm"] == CONTRIB for r in rows):
        notes.append(
            f"{CONTRIB}: every matrix a parameter; states and projector bfloat16, like the weights."
        )
    if any(r["arm"] == TORCH for r in rows):
        notes.append(
            f"{TORCH}: its AdamW written from the paper's equations, matrix by matrix and eagerly; "
            "states and projector bfloat16, like the gradients."
        )
    if len({row["run"] for row in rows}) > 1:
        notes.append("The measurements come from several runs on the same kind of device.")
    for row in measured.errors():
        rank = "" if row.get("rank") is None else f", r = {row['rank']}"
        what = f"{row['part']}, LLaMA-{row['size'].upper()}{rank}, {row['arm']}"
        notes.append(f"Not measured: {what}: {row['error']}")
    return ["\n".join(f"* {note}" for note in notes)]
