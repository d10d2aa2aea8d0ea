"""The command line: every prediction with its checks, or one step."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.environment import store
from benchmarks.plan import checks, tables
from benchmarks.plan.memory import LAYER_WORK
from benchmarks.plan.setups import LLAMAS, Optimizer, Setup, adamw_of, gale_of, mesh_of
from examples.flax_llama.errors import UserError
from examples.flax_llama.optimizers import DATA


@dataclasses.dataclass(frozen=True)
class Config:
    """What to predict."""

    size: str | None = None
    """One model, of which a prediction is printed; by default all tables are made and stored."""
    mesh: str = "fsdp=8"
    """Devices along each axis, as the example's --mesh."""
    optimizer: Literal["adamw", "gale"] = "gale"
    """Optimizer."""
    rank: int | None = None
    """Of GALE's projectors; by default a quarter of the width."""
    state: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    """Dtype of the moments and projectors."""
    tokens: int = 4096
    """Tokens a step for each row of devices, which are those along tensor."""
    length: int = 4096
    """Tokens a sequence."""
    remat: bool = True
    """Whether layers are computed again in the backward pass."""
    chunks: int = 1
    """Parts in which logits are computed."""
    average: bool = False
    """Averages projections in the place of gradients."""
    out: Path = Path("benchmarks/results")
    """Where the results are, and go."""


def setup_of(config: Config) -> Setup:
    """The step that the options describe.

    Raises:
      UserError: if they make no sense.
    """
    if config.size not in LLAMAS:
        raise UserError(f"unknown model {config.size!r}; choose from {', '.join(LLAMAS)}")
    llama = LLAMAS[config.size]
    return Setup(
        llama,
        mesh_of(config.mesh),
        _optimizer(config, llama.hidden),
        tokens=config.tokens,
        length=config.length,
        remat=config.remat,
        chunks=config.chunks,
        average=config.average,
    )


def _optimizer(config: Config, width: int) -> Optimizer:
    if config.optimizer == "gale":
        rank = width // 4 if config.rank is None else config.rank
        if rank < 1:
            raise UserError(f"--rank must be at least 1, got {rank}")
        return gale_of(rank, config.state, **({"axis_name": DATA} if config.average else {}))
    if config.rank is not None or config.state == "int8":
        raise UserError("--rank and --state int8 are for --optimizer gale")
    return adamw_of(config.state)


def everything(config: Config) -> list[str]:
    """Checks, predicts, stores."""
    programs = [row for setup in checks.programs() for row in checks.against_program(setup)]
    measured = checks.peaks(config.out)
    peaks = [one.row() for one in measured]
    on_meshes = checks.meshes(config.out)
    rows = [tables.predicted(*one) for one in tables.grid()]
    averaged = tables.averaged()
    work = checks.fitted(measured) if measured else None
    title = "bfloat16 weights, layers recomputed, cuDNN attention, 4096 tokens a row of devices."
    lines = [f"GiB a device. {title}", "", tables.shapes(tables.MESHES)]
    for name in tables.MESHES:
        of_model = [row for row in rows if row["size"] == name]
        heading = f"LLaMA-{name.upper()}"
        lines += ["", f"{heading}: peak, and of it the optimizer's state", ""]
        lines += [tables.by_optimizer(of_model, tables.need_and_state)]
        lines += ["", f"{heading}: sent in a step at least, and of it along data alone", ""]
        lines += [tables.by_optimizer(of_model, tables.sent)]
    lines += ["", "LLaMA-7B, averaged projections: sent", "", tables.averages(averaged)]
    lines += ["", "Compiled programs", "", tables.programs(programs)]
    lines += ["", "Peaks of one GPU", "", tables.peaks(peaks)]
    if work is not None:
        lines += ["", f"Work of a layer: {LAYER_WORK:g} in the model, {work:g} by the mean error."]
    lines += ["", "Several GPUs", "", tables.on_meshes(on_meshes)]
    lines += ["", "Every part", "", tables.details(rows)]
    store(
        config.out / "plan",
        lines,
        predictions=rows,
        averaged=averaged,
        programs=programs,
        peaks=peaks,
        meshes=on_meshes,
        fitted_layer_work=work,
    )
    return lines


def main(config: Config) -> None:
    """Predicts one step, or everything.

    Raises:
      SystemExit: if an option makes no sense.
    """
    try:
        if config.size is not None:
            lines = [tables.details([tables.predicted(config.size, setup_of(config))])]
        else:
            lines = everything(config)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    print("\n".join(lines))


if __name__ == "__main__":
    os.environ.setdefault("NPROC", "32")  # more threads than devices: docs/devices.md
    checks.simulate()
    main(tyro.cli(Config, args=sys.argv[1:]))
