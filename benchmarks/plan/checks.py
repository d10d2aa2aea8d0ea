"""The model against programs that are compiled here, and against what was measured."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

import optax_gale
from benchmarks.gpu import scaling
from benchmarks.gpu.arms import ADAMW, GALE
from benchmarks.gpu.training_step import AVERAGED, compiled_on
from benchmarks.memory_cases import CASES
from benchmarks.plan.memory import LAYER_WORK, memory
from benchmarks.plan.setups import (
    LLAMAS,
    Optimizer,
    Setup,
    adamw_of,
    gale_of,
    held,
    mesh_of,
    mesh_text,
    model_of,
    shapes_of,
)
from benchmarks.plan.traffic import traffic
from examples.flax_llama import optimizers
from examples.flax_llama.config import OptimizerOptions, TrainingOptions
from examples.flax_llama.layout import Layout
from examples.flax_llama.optimizers import DATA
from examples.flax_llama.sizes import LlamaSize
from examples.flax_llama.step import Walk

SMALL = LlamaSize(1216, hidden=128, intermediate=352, layers=3, heads=8, kv_heads=8)
GROUPED = dataclasses.replace(SMALL, kv_heads=4)
RANK = 16
_LENGTH = 256  # of the sequences of the stored trainings

Row = dict[str, Any]


# Programs -----------------------------------------------------------------------------------------


def small(mesh: str, optimizer: Optimizer, tokens: int = 32, **options: Any) -> Setup:
    """A step that is compiled in seconds, in float32: CPUs add bfloat16 up in float32."""
    common = {"tokens": tokens, "length": tokens, "dtype": "float32", "compute": 4}
    return Setup(
        options.pop("llama", SMALL),
        mesh_of(mesh),
        optimizer,
        **{**common, "attention": "xla", **options},
    )


def programs() -> list[Setup]:
    """Steps on simulated devices: along every axis, and with both ways to look tokens up."""
    adam, low = adamw_of("float32"), gale_of(RANK, "float32")
    averaged = low._replace(make=gale_of(RANK, "float32", axis_name=DATA).make)
    return [
        small("data=8", adam),
        small("fsdp=8", adam, remat=False),
        small("fsdp=8", adam, 512),
        small("fsdp=8", adam, 64, chunks=4),
        small("tensor=8", adam, 256),
        small("data=2,fsdp=4", adam),
        small("data=2,fsdp=4", adam, 512),
        small("data=2,fsdp=2,tensor=2", adam, llama=GROUPED),
        small("data=2,fsdp=2,tensor=2", adam, 256, llama=GROUPED),
        small("fsdp=4,tensor=2", adam),
        small("fsdp=4,tensor=2", adam, 512, llama=GROUPED),
        small("fsdp=8", low, 512, llama=GROUPED),
        small("data=2,fsdp=4", low, 512, llama=GROUPED),
        small("tensor=4", low, 256, llama=GROUPED),
        small("data=2,fsdp=2,tensor=2", low, llama=GROUPED),
        small("fsdp=4,tensor=2", low, 256, llama=GROUPED),
        small("data=8", averaged, average=True, llama=GROUPED),
    ]


def compiled(setup: Setup, refresh: bool | None = None) -> Any:
    """The example's step on devices that are there, with all that it carries where it belongs."""
    layout = Layout.of(setup.mesh, kernels=bool(setup.optimizer.rank))
    walk = Walk(mesh=layout.mesh if setup.average else None)
    shapes, tx = shapes_of(setup)
    stream = None if setup.average or setup.devices == 1 else layout.batch
    model, tx = model_of(setup, stream=stream), optax.with_extra_args_support(tx)
    data, fsdp, _ = setup.axes
    batch = (setup.tokens // setup.length * data * fsdp, setup.length)
    program, _ = compiled_on(layout, model, tx, walk, shapes, batch, setup.chunks)
    return program(**({} if refresh is None else {"refresh": refresh}))


def against_program(
    setup: Setup, refreshes: Iterable[bool | None] = (False, True)
) -> Iterator[Row]:
    """What the model says of a step beside what its program does.

    Args:
      setup: the step.
      refreshes: of one with projectors, whether it refreshes them, for each row.
    """
    foreseen = traffic(setup)
    for refresh in refreshes if setup.optimizer.rank else (None,):
        program = compiled(setup, refresh)
        sent = foreseen.sent + (foreseen.refresh if refresh else 0)
        found = optax_gale.traffic_report(program).sent
        arguments = program.memory_analysis().argument_size_in_bytes
        yield {
            "mesh": mesh_text(setup.mesh),
            "optimizer": setup.optimizer.label + (", averaged" if setup.average else ""),
            "tokens": setup.tokens,
            "remat": setup.remat,
            "chunks": setup.chunks,
            "refresh": bool(refresh),
            "sent": found,
            "predicted_sent": sent,
            "sent_error": sent / found - 1,
            # The batch and the count of steps are arguments too.
            "held": arguments,
            "predicted_held": sum(held(setup)),
            "held_error": sum(held(setup)) / arguments - 1,
        }


# Stored measurements ------------------------------------------------------------------------------


class Measured(NamedTuple):
    """A peak that was measured.

    Attributes:
      name: what of.
      setup: the step.
      peak: bytes.
    """

    name: str
    setup: Setup
    peak: int

    def row(self, layer_work: float = LAYER_WORK) -> Row:
        """The peak beside the model's."""
        foreseen = memory(self.setup, layer_work)
        return {
            "case": self.name,
            "moment": foreseen.moment,
            "measured": self.peak,
            "predicted": foreseen.total,
            "error": foreseen.total / self.peak - 1,
        }


def peaks(results: Path) -> list[Measured]:
    """The stored peaks of ordinary steps on one GPU: not layer by layer, which has no gradients."""
    found = [*_of_steps(results), *_of_trainings(results), *_of_throughput(results)]
    return list({(m.name, m.peak): m for m in found}.values())


def fitted(measured: Iterable[Measured]) -> float:
    """The `LAYER_WORK` with which the mean relative error is the smallest, to a tenth."""
    measured = list(measured)
    mean = lambda work: sum(abs(m.row(work)["error"]) for m in measured)
    return min((i / 10 for i in range(10, 31)), key=mean)


def _rows(results: Path, pattern: str) -> Iterator[tuple[str, Row]]:
    """Rows of measurements that succeeded, and the device that they were made on."""
    for path in sorted(results.glob(pattern)):
        record = json.loads(path.read_text())
        for row in record["rows"]:
            if "error" not in row:
                runs = record.get("runs")
                run = runs[row["run"]] if runs else record["environment"]
                yield run["device"].removeprefix("NVIDIA "), row


def _example(name: str, options: Mapping[str, Any], size: LlamaSize) -> Optimizer:
    """An optimizer of the example's table."""
    training = TrainingOptions()
    settings = optimizers.resolve(name, OptimizerOptions(**options), size, training.steps)
    make = lambda: optimizers.build(name, settings, training)
    return Optimizer(name, make, settings.get("rank", 0))


def _of_steps(results: Path) -> Iterator[Measured]:
    for device, row in _rows(results, "step_memory_*.json"):
        o = row["options"]
        llama = LLAMAS[o["size"]]
        setup = Setup(
            llama,
            mesh_of(""),
            _example(o["optimizer"], {}, llama),
            tokens=o["batch"] * o["length"],
            length=o["length"],
            dtype=o["param_dtype"],
            remat=o["remat"],
            chunks=o["chunks"],
            attention=o["attention"],
        )
        # The compiler's plan: one of the allocators grew, and counted its gaps.
        yield Measured(f"{row['case']} ({device})", setup, row["predicted"])


def _of_trainings(results: Path) -> Iterator[Measured]:
    names = ("rank", "state_dtype", "projector_dtype")
    for device, row in _rows(results, "training_memory_*.json"):
        options = {k.replace("-", "_"): v for k, v in CASES[row["case"]].options.items()}
        if options.get("layerwise") or row.get("peak_bytes") is None:
            continue
        llama = LLAMAS[options["size"]]
        own = {k: v for k, v in options.items() if k in names}
        length = options.get("sequence_length", _LENGTH)
        setup = Setup(
            llama,
            mesh_of(""),
            _example(options["optimizer"], own, llama),
            tokens=options["batch_size"] * length,
            length=length,
            dtype=options.get("param_dtype", "float32"),
            remat=options.get("remat", False),
            chunks=options["loss_chunks"],
            attention=options["attention_backend"],
        )
        yield Measured(f"{row['case']} ({device})", setup, row["peak_bytes"])


def _of_throughput(results: Path) -> Iterator[Measured]:
    for name, row, setup in throughputs(results):
        if setup.devices == 1 and row.get("ordinary_peak_bytes"):
            yield Measured(name, setup, row["ordinary_peak_bytes"])


def throughputs(results: Path) -> Iterator[tuple[str, Row, Setup]]:
    """The stored rows of `benchmarks.throughput`, whatever mesh they are of."""
    for device, row in _rows(results, "throughput_*.json"):
        mesh = mesh_of(row.get("mesh") or "")
        arms = {
            ADAMW: adamw_of("float32"),
            "AdamW, bf16 states": adamw_of("bfloat16"),
            GALE: gale_of(row["rank"], "float32"),
            AVERAGED: gale_of(row["rank"], "float32", axis_name=DATA),
        }
        if row["arm"] not in arms:
            continue
        setup = Setup(
            scaling.shape_of(row),
            mesh,
            arms[row["arm"]],
            # A batch is that of a device.
            tokens=row["batch"] * row["length"] * mesh["tensor"],
            length=row["length"],
            remat=bool(row.get("remat")),
            attention=row.get("attention_backend") or "cudnn",
            average=row["arm"] == AVERAGED,
        )
        batch = f"{row['batch']} × {row['length']}"
        text = ", ".join([row["size"], row["arm"], batch, *scaling.another_width(row)])
        yield f"{text} ({device}, {mesh_text(mesh)})", row, setup


def meshes(results: Path) -> list[Row]:
    """The stored rows of several GPUs beside the model: peaks, and what was sent."""
    found = []
    for name, stored, setup in throughputs(results):
        if setup.devices == 1:
            continue
        foreseen = traffic(setup)
        row: Row = {"case": name, "least": foreseen.least, "predicted_sent": foreseen.sent}
        if stored.get("ordinary_peak_bytes"):
            row |= Measured(name, setup, stored["ordinary_peak_bytes"]).row()
        row["sent"] = _sent(stored, "ordinary")
        row["refresh_sent"] = _sent(stored, "refresh")
        row["predicted_refresh_sent"] = foreseen.sent + foreseen.refresh
        found.append(row)
    return found


def _sent(row: Row, kind: str) -> float | None:
    """Bytes sent in a step, which are stored by the kind of collective."""
    sent = row.get(f"{kind}_sent")
    return None if sent is None else sum(sent.values())


def simulate(devices: int = 8) -> None:
    """Makes devices of this CPU; before anything runs on one."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
