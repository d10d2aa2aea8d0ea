"""Tables of the stored measurements of `benchmarks.throughput`, on one device and on meshes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.gpu.arms import ADAMW, GALE, GAP
from benchmarks.gpu.link import bandwidth
from benchmarks.gpu.link import table as link_table
from benchmarks.gpu.report import number
from benchmarks.gpu.store import Row, provenance
from benchmarks.gpu.training_step import AVERAGED, devices_of
from examples.flax_llama.sizes import LlamaSize, get_size
from examples.flax_llama.tables import markdown

KEY = ("size", "width", "rank", "arm", "batch", "length", "mesh", "remat", "attention_backend")
_ADAPTED = (GALE, AVERAGED)  # arms in which the rank matters
_GIB, _MIB = 2**30, 2**20


class Scaling(NamedTuple):
    """A measurement on several devices beside the one on one device.

    Attributes:
      speed_up: tokens a second over one device's, with as many sequences a device.
      without_overlap: what that would be if nothing were computed while something is sent, at the
        measured bandwidth.
      memory: the compiler's plan over one device's that takes the whole batch.
    """

    speed_up: float | None
    without_overlap: float | None
    memory: float | None


def scaling(row: Row, rows: Sequence[Row], link: Sequence[Row]) -> Scaling:
    """Compares a measurement on several devices.

    Args:
      row: the measurement.
      rows: all of them.
      link: collectives that were timed in the run that made it.
    """
    devices = devices_of(row["mesh"])
    # On one device there is nothing to average.
    alone = {"mesh": None, "arm": GALE if row["arm"] == AVERAGED else row["arm"]}
    same_share = _find(rows, {**row, **alone})
    same_batch = _find(rows, {**row, **alone, "batch": row["batch"] * devices}, failed=True)
    speed_up = without = memory = None
    if same_share and "error" not in row:
        speed_up = row["tokens_per_second"] / same_share["tokens_per_second"]
    if same_share:
        without = _without_overlap(row, same_share["ms"] / 1e3, link, devices)
    if same_batch and peak(row) and peak(same_batch):
        memory = peak(row) / peak(same_batch)
    return Scaling(speed_up, without, memory)


def _without_overlap(row: Row, alone: float, link: Sequence[Row], devices: int) -> float | None:
    """The speed-up if each step took the seconds of one device and those of the link."""
    ordinary = _seconds_on_the_link(row.get("ordinary_sent", {}), link, devices)
    refresh = _seconds_on_the_link(row.get("refresh_sent", {}), link, devices)
    if ordinary is None or refresh is None:
        return None
    extra = (refresh - ordinary) / GAP if "refresh_sent" in row else 0.0
    return devices * alone / (alone + ordinary + extra)


def _seconds_on_the_link(
    sent: Mapping[str, float], link: Sequence[Row], devices: int
) -> float | None:
    rates = {kind: bandwidth(link, devices, kind) for kind in sent}
    if any(rate is None for rate in rates.values()):
        return None
    return sum(sent[kind] / rate for kind, rate in rates.items() if rate)


def peak(row: Row) -> int:
    """Bytes that the compiler plans on each device, of the step that needs most; 0 if unknown."""
    return max(row.get(f"{kind}_peak_bytes") or 0 for kind in ("ordinary", "refresh"))


def _find(rows: Sequence[Row], key: Row, *, failed: bool = False) -> Row | None:
    """The measurement of a key; one that failed only if that will do."""
    for row in rows:
        if all(row.get(field) == key.get(field) for field in KEY):
            return row if failed or "error" not in row else None
    return None


def text(rows: Sequence[Row], runs: Sequence[Row]) -> str:
    """All that was measured."""
    links = {run: runs[run].get("link") or [] for run in sorted({row["run"] for row in rows})}
    sections = [provenance([*runs]), speeds(rows)]
    if any(row.get("mesh") for row in rows):
        sections += ["## Several devices", scalings(rows, links)]
    if any(links.values()):
        sections += ["## The link", *map(link_table, filter(None, links.values()))]
    errors = [f"* {_name(row)}, {row['arm']}: {row['error']}" for row in rows if "error" in row]
    if errors:
        sections += ["Not measured:", "\n".join(errors)]
    return "\n\n".join(sections)


def speeds(rows: Sequence[Row]) -> str:
    """One row an arm."""
    lines = []
    for row in rows:
        if "error" in row:
            continue
        adamw = _find(rows, {**row, "arm": ADAMW})
        gain = None if adamw is None else row["tokens_per_second"] / adamw["tokens_per_second"]
        lines.append(
            [
                _name(row),
                _arm(row),
                number(row["ordinary_ms"]),
                number(row.get("refresh_ms")),
                number(row["tokens_per_second"]),
                "–" if gain is None else f"{gain:.3f}",
                number(peak(row) / _GIB),
                _gib(row.get("allocated_peak_bytes")),
            ]
        )
    header = ["sequences a GPU × tokens", "optimizer", "ordinary step, ms"]
    header += ["step that refreshes, ms", "tokens/s", "of AdamW's"]
    header += ["peak memory, GiB a GPU", "the allocator's"]
    return markdown(header, lines)


def scalings(rows: Sequence[Row], links: Mapping[int, Sequence[Row]]) -> str:
    """One row an arm on a mesh; of arms that failed, what is known without running them."""
    lines = []
    for row in rows:
        if not row.get("mesh") or not peak(row):
            continue
        found = scaling(row, rows, links[row["run"]])
        lines.append(
            [
                _name(row),
                _arm(row),
                *(_ratio(x) for x in (found.speed_up, found.without_overlap)),
                *(_mib(row.get(f"{kind}_sent")) for kind in ("ordinary", "refresh")),
                _ratio(found.memory),
            ]
        )
    header = ["sequences a GPU × tokens", "optimizer", "speed-up", "without overlap"]
    header += ["MiB sent a step", "in one that refreshes", "peak, of one GPU's"]
    return markdown(header, lines)


def shape_of(row: Row) -> LlamaSize:
    """The model's shape, padded as it was when it was measured."""
    size = get_size(row["size"])
    width = row.get("width", size.padded_intermediate)
    return dataclasses.replace(size, padding=width - size.intermediate)


def another_width(row: Row) -> list[str]:
    """What tells the model from today's of its size; nothing if it is that."""
    shape = shape_of(row)
    known = shape == get_size(row["size"])
    return [] if known else [f"an MLP of {shape.padded_intermediate}"]


def _name(row: Row) -> str:
    parts = [f"LLaMA-{row['size'].upper()}, {row['batch']} × {row['length']}"]
    parts += another_width(row)
    parts += ["recomputed"] if row.get("remat") else []
    parts += ["XLA's attention"] if row.get("attention_backend") else []
    parts += [row["mesh"]] if row.get("mesh") else []
    return ", ".join(parts)


def _arm(row: Row) -> str:
    return row["arm"] + (f", r = {row['rank']}" if row["arm"] in _ADAPTED else "")


def _ratio(x: float | None) -> str:
    return "–" if x is None else f"{x:.3f}"


def _gib(size: int | None) -> str:
    return "–" if size is None else number(size / _GIB)


def _mib(sent: Mapping[str, float] | None) -> str:
    return "–" if sent is None else f"{sum(sent.values()) / _MIB:,.0f}"
