"""Tokens a second of training LLaMA end to end: GALE against AdamW, on one GPU and on meshes.

The example's model and train step, bfloat16 weights, random tokens. A gap's one step that refreshes
is weighted as such. Each case runs in a process of its own that sees as many GPUs as its mesh has:
the allocator's peak is then that case's, and one that fails takes no other with it. Measurements
are stored as they are made, and not repeated on the same commit and kind of device.

    python -m benchmarks.throughput --sizes 350m 1b
    python -m benchmarks.throughput --sizes 1b --meshes data=1 data=2 fsdp=2
    python -m benchmarks.throughput --sizes 7b --rank 128 --meshes data=1 fsdp=2 --global-batch 2 \
        --length 2048 --remat
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import tyro

from benchmarks.environment import MOST_MEMORY, preallocated
from benchmarks.gpu import scaling
from benchmarks.gpu.store import Row, Store, slug
from benchmarks.gpu.training_step import ARMS, CUDNN, Case, devices_of, measure, takes
from examples.flax_llama.errors import UserError
from examples.flax_llama.model import AttentionBackend

NO_GPU = "No GPU here: this benchmark measures one (--anywhere runs it on what there is)."
RANKS = {"tiny": 32, "60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 1024}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train."""

    sizes: tuple[str, ...] = ("350m", "1b")
    """Models."""
    rank: int | None = None
    """Of the projectors; by default each size has its own."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Optimizers. Averaged projections are measured on meshes of several GPUs along data alone."""
    meshes: tuple[str, ...] = ("data=1",)
    """Meshes, each as the example's --mesh; data=1 is one GPU."""
    batch: int = 64
    """Sequences a step on each GPU: a mesh of two takes twice as many (weak scaling). tokens/s are
    those of all GPUs together."""
    global_batch: int | None = None
    """Sequences a step on all GPUs together, in the place of --batch: the same on every mesh, so
    that what each GPU needs can be compared with what one needs for the same step."""
    length: int = 256
    """Tokens a sequence."""
    attention_backend: AttentionBackend = "cudnn"
    """cudnn: the fused kernel of NVIDIA GPUs."""
    remat: bool = False
    """Whether activations are computed again in the backward pass."""
    blocks: int = 5
    """Blocks of steps, of which the median is taken."""
    steps: int = 5
    """Steps a block."""
    link_mib: tuple[int, ...] = (1024, 64)
    """MiB of the arrays with which the link between the GPUs of a mesh is timed."""
    minutes: float | None = None
    """Begins no measurement after so many minutes."""
    case_minutes: float = 8.0
    """After which a case is given up."""
    again: bool = False
    """Measures again what is stored."""
    out: Path = Path("benchmarks/results")
    """Where the results go, and join those that are there."""
    anywhere: bool = False
    """Runs without a GPU too. The numbers then say nothing."""
    here: str | None = None
    """Measures one case, given as JSON, in this process, and prints what it found: how the others
    are started."""


def cases(config: Config) -> list[Case]:
    """What to measure, in order.

    Raises:
      UserError: if there is no such arm, rank or mesh, or a mesh cannot share the global batch.
    """
    for arm in config.arms:
        if arm not in ARMS:
            raise UserError(f"no arm {arm!r}; choose from: {'; '.join(ARMS)}")
    found = []
    for size in config.sizes:
        rank = RANKS.get(size) if config.rank is None else config.rank
        if rank is None:
            raise UserError(f"--rank is needed for the size {size!r}")
        for text in config.meshes:
            devices = devices_of(text)
            mesh = text if devices > 1 else None
            if config.global_batch is not None and config.global_batch % devices:
                raise UserError(
                    f"--global-batch {config.global_batch} cannot be shared by the {devices} "
                    f"devices of --meshes {text}"
                )
            batch = config.batch
            if config.global_batch is not None:
                batch = config.global_batch // devices
            for arm in config.arms:
                if takes(ARMS[arm], mesh):
                    other = config.attention_backend if config.attention_backend != CUDNN else None
                    how = (other, config.blocks, config.steps)
                    remat = config.remat or None
                    found.append(Case(size, rank, arm, batch, config.length, mesh, remat, *how))
    return found


def in_its_own_process(case: Case, seconds: float) -> Row:
    """Measures a case in another process.

    Args:
      case: what to measure.
      seconds: after which it is given up.
    """
    words = ["benchmarks.throughput", "--here", json.dumps(dataclasses.asdict(case))]
    return _last_line(words, case.devices, seconds)


def link_of(devices: int, mib: tuple[int, ...], seconds: float) -> list[Row]:
    """Times the link between devices, in another process; nothing if that fails."""
    words = ["benchmarks.gpu.link", "--devices", str(devices), "--mib", *map(str, mib)]
    found = _last_line(words, devices, seconds)
    if isinstance(found, list):
        return found
    print(f"the link of {devices} devices was not measured: {found['error']}", flush=True)
    return []


def _last_line(words: list[str], devices: int, seconds: float) -> Any:
    """What a module prints in its last line, as JSON; or a row with the error."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", *words],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            env=environment(devices),
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"given up after {seconds:.0f} s"}
    if done.returncode:
        return {"error": f"ended with status {done.returncode}"}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": "ended without a result"}


def environment(devices: int) -> dict[str, str]:
    """The variables of a process that sees so many devices.

    On one GPU the library chooses other kernels than where it sees several, even if only one is
    used.
    """
    if jax.default_backend() != "gpu":
        threads = str(max(32, 4 * devices))  # more than devices: docs/devices.md
        here = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        return {"NPROC": threads, **os.environ, **here}
    everything = ",".join(map(str, range(jax.device_count())))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", everything).split(",")
    variables = preallocated(MOST_MEMORY)
    return {**variables, "CUDA_VISIBLE_DEVICES": ",".join(visible[:devices])}


def main(config: Config) -> None:
    """Measures, stores and tabulates.

    Raises:
      SystemExit: if a mesh cannot be had here.
    """
    if config.here is not None:
        print(json.dumps(measure(Case(**json.loads(config.here)))))
        return
    # This process only asks what there is, and must leave the memory to the others.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if jax.default_backend() != "gpu" and not config.anywhere:
        print(NO_GPU)
        return
    try:
        wanted = cases(config)
    except UserError as error:
        raise SystemExit(str(error)) from error
    for case in wanted:
        if case.devices > jax.device_count():
            raise SystemExit(
                f"--meshes {case.mesh} is of {case.devices} devices, and there are "
                f"{jax.device_count()}"
            )
    _run(config, wanted)


def _run(config: Config, wanted: list[Case]) -> None:
    began = time.monotonic()
    stem = config.out / f"throughput_{slug(jax.devices()[0].device_kind)}"
    store = Store(stem.with_suffix(".json"), scaling.KEY)
    store.start(flags=os.environ.get("XLA_FLAGS"), link=[])
    link = store.runs[-1]["link"]
    tried = {1}  # numbers of devices whose link was timed, or could not be
    for case in wanted:
        key = {field: getattr(case, field) for field in scaling.KEY}
        if not config.again and store.has(**key):
            continue
        if config.minutes is not None and time.monotonic() - began > 60 * config.minutes:
            print(f"{config.minutes:g} minutes are over; run it again to go on")
            break
        seconds = 60 * config.case_minutes
        if case.devices not in tried:
            tried.add(case.devices)
            link += link_of(case.devices, config.link_mib, seconds)
        store.add({**key, **in_its_own_process(case, seconds)})
        text = scaling.text(store.rows, store.runs)
        stem.with_suffix(".md").write_text(text + "\n")
        print(text, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config))
