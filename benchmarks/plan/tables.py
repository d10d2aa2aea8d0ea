"""What the model says, in tables."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.gpu.arms import GAP
from benchmarks.plan.checks import Row
from benchmarks.plan.memory import memory
from benchmarks.plan.setups import (
    LLAMAS,
    Optimizer,
    Setup,
    adamw_of,
    gale_of,
    mesh_of,
    mesh_text,
)
from benchmarks.plan.traffic import traffic
from examples.flax_llama.optimizers import DATA
from examples.flax_llama.sizes import LlamaSize, count_params
from examples.flax_llama.tables import markdown

GIB = 2**30

ROOM = {"80 GB": 80767614976, "141 GB": 142606336000}
"""Bytes that the allocator had of an H100 and of an H200 in `benchmarks.training_memory`: 95 %."""

RANKS: Mapping[str, tuple[int, ...]] = {"7b": (128, 1024), "70b": (256, 2048), "405b": (512, 4096)}
"""A thirty-second of the width, and a quarter."""

MESHES: Mapping[str, tuple[str, ...]] = {
    "7b": ("data=8", "fsdp=8", "data=8,fsdp=8", "data=32,fsdp=8", "data=128,fsdp=8"),
    "70b": (
        *("fsdp=8", "tensor=8", "fsdp=64", "fsdp=8,tensor=8"),
        *("data=4,fsdp=64", "data=4,fsdp=8,tensor=8", "data=16,fsdp=64", "data=16,fsdp=8,tensor=8"),
    ),
    "405b": (
        *("tensor=8", "fsdp=64", "fsdp=8,tensor=8", "fsdp=256", "fsdp=32,tensor=8"),
        *("data=4,fsdp=256", "data=4,fsdp=32,tensor=8"),
    ),
}

AVERAGED = (8, 64, 256, 1024)
"""Devices along data that average projections."""


def grid() -> list[tuple[str, Setup]]:
    """Every prediction: name of the model, and the step."""
    found = []
    for name, meshes in MESHES.items():
        low = [gale_of(rank, dtype) for rank in RANKS[name] for dtype in ("bfloat16", "int8")]
        for mesh in meshes:
            for optimizer in (adamw_of("float32"), adamw_of("bfloat16"), *low):
                found.append((name, Setup(LLAMAS[name], mesh_of(mesh), optimizer)))
    return found


def predicted(name: str, setup: Setup) -> Row:
    """What the model says of a step."""
    need, sent = memory(setup), traffic(setup)
    data, fsdp, _ = setup.axes
    return {
        "size": name,
        "devices": setup.devices,
        "mesh": mesh_text(setup.mesh),
        "tokens_a_step": setup.tokens * data * fsdp,
        "optimizer": setup.optimizer.label + (", averaged" if setup.average else ""),
        **need.held._asdict(),
        "gradients": need.gradients,
        "activations": need.activations,
        "work": need.work,
        "total": need.total,
        "moment": need.moment,
        "sent": sent.sent,
        "sent_at_least": sent.least,
        "sent_along_data": sent.along(DATA),
        "refresh_sent": sent.refresh,
    }


def averaged() -> list[Row]:
    """Traffic of LLaMA-7B on meshes of data alone, with gradients averaged and with projections."""
    rows = []
    for devices in AVERAGED:
        mesh = mesh_of(f"{DATA}={devices}")
        arms: list[tuple[Optimizer, bool]] = [(adamw_of("bfloat16"), False)]
        arms += [(gale_of(rank, "bfloat16"), True) for rank in RANKS["7b"]]
        for optimizer, average in arms:
            setup = Setup(LLAMAS["7b"], mesh, optimizer, average=average)
            rows.append(predicted("7b", setup))
    return rows


# Lines --------------------------------------------------------------------------------------------


def gib(size: float) -> str:
    """GiB.

    Example:
      >>> gib(3 * 2**29), gib(2**40)
      ('1.50', '1,024')
    """
    value = size / GIB
    return f"{value:.2f}" if value < 10 else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def fits(total: float) -> str:
    """The smallest of the GPUs that the step fits."""
    return next((name for name, room in ROOM.items() if total <= room), "no")


def details(rows: Iterable[Row]) -> str:
    """Every part of every prediction."""
    parts = ("weights", "moments", "projectors", "gradients", "activations", "work", "total")
    header = ["model", "GPUs", "mesh", "optimizer", *parts, "fits", "sent at least", "sent at most"]
    header += ["of it along data", "a refresh adds"]
    lines = [
        [
            *(row["size"].upper(), str(row["devices"]), row["mesh"], row["optimizer"]),
            *(gib(row[part]) for part in parts),
            fits(row["total"]),
            *(gib(row[key]) for key in ("sent_at_least", "sent")),
            *(gib(row[key]) for key in ("sent_along_data", "refresh_sent")),
        ]
        for row in rows
    ]
    return markdown(header, lines)


def by_optimizer(rows: Sequence[Row], cell: Any) -> str:
    """Meshes down, optimizers across, of one model."""
    names = list(dict.fromkeys(row["optimizer"] for row in rows))
    cells = {(row["mesh"], row["optimizer"]): cell(row) for row in rows}
    places = {row["mesh"]: row for row in rows}
    lines = [
        [
            *(str(row["devices"]), mesh, f"{row['tokens_a_step'] / 1024:,.0f}"),
            *(cells[mesh, name] for name in names),
        ]
        for mesh, row in places.items()
    ]
    return markdown(["GPUs", "mesh", "Ki tokens", *names], lines)


def need_and_state(row: Row) -> str:
    """The peak, in bold where an 80 GB GPU has it, and of it the state."""
    total, state = gib(row["total"]), gib(row["moments"] + row["projectors"])
    which = {"80 GB": f"**{total}**", "141 GB": total, "no": f"*{total}*"}[fits(row["total"])]
    return f"{which} ({state})"


def sent(row: Row) -> str:
    """What is sent at least, and of it what goes along data alone."""
    return f"{gib(row['sent_at_least'])} ({gib(row['sent_along_data'])})"


def averages(rows: Sequence[Row]) -> str:
    """What averaging projections saves."""
    lines = []
    for row in rows:
        whole = next(r for r in rows if r["devices"] == row["devices"])["sent"]
        mean = row["sent"] + row["refresh_sent"] / GAP
        lines.append(
            [
                *(str(row["devices"]), row["optimizer"], gib(row["sent"])),
                gib(row["sent"] + row["refresh_sent"]) if row["refresh_sent"] else "–",
                *(gib(mean), f"{mean / whole:.3f}"),
            ]
        )
    header = ["GPUs", "optimizer", "an ordinary step, GiB", "a step that refreshes, GiB"]
    return markdown([*header, f"mean over a gap of {GAP}, GiB", "of AdamW's"], lines)


def programs(rows: Iterable[Row]) -> str:
    """The model beside compiled programs."""
    lines = [
        [
            *(row["mesh"], row["optimizer"], str(row["tokens"]), "yes" if row["remat"] else "no"),
            *(str(row["chunks"]), "a refresh" if row["refresh"] else "ordinary"),
            *(f"{row[key] / 1e6:.3f}" for key in ("sent", "predicted_sent")),
            *(f"{row[key]:+.2%}" for key in ("sent_error", "held_error")),
        ]
        for row in rows
    ]
    header = ["mesh", "optimizer", "tokens a row", "recomputed", "parts of the loss", "step"]
    header += ["sent, MB", "the model", "difference", "of what is held"]
    return markdown(header, lines)


def peaks(rows: Iterable[Row]) -> str:
    """The model beside measured peaks."""
    lines = [
        [
            *(row["case"], f"{row['measured'] / GIB:.2f}", f"{row['predicted'] / GIB:.2f}"),
            *(f"{row['error']:+.1%}", row["moment"]),
        ]
        for row in rows
    ]
    return markdown(["", "peak, GiB", "the model", "difference", "fullest"], lines)


def on_meshes(rows: Sequence[Row]) -> str:
    """The model beside what was measured on several GPUs, if anything was."""
    if not rows:
        return "No measurement on several GPUs is stored yet."
    header = ["", "peak, GiB", "the model", "difference", "sent, GiB", "the model: at least"]
    header += ["at most", "a refresh, GiB", "the model: at most"]
    value = lambda row, key: gib(row[key]) if row.get(key) is not None else "–"
    lines = [
        [
            *(row["case"], value(row, "measured"), value(row, "predicted")),
            f"{row['error']:+.1%}" if "error" in row else "–",
            *(value(row, key) for key in ("sent", "least", "predicted_sent", "refresh_sent")),
            value(row, "predicted_refresh_sent") if row.get("refresh_sent") is not None else "–",
        ]
        for row in rows
    ]
    return markdown(header, lines)


def shapes(names: Iterable[str]) -> str:
    """The shapes of the models."""
    fields = ("hidden", "intermediate", "layers", "heads", "kv_heads", "vocab_size")
    sizes: dict[str, LlamaSize] = {name: LLAMAS[name] for name in names}
    lines = [
        [name.upper(), f"{count_params(size) / 1e9:.2f}"]
        + [f"{dataclasses.asdict(size)[field]:,}" for field in fields]
        for name, size in sizes.items()
    ]
    header = ["model", "parameters, 10⁹", "hidden", "intermediate", "layers", "heads"]
    return markdown([*header, "key-value heads", "vocabulary"], lines)
