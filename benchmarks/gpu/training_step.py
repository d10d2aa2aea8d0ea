"""A training step of LLaMA with one optimizer on one mesh: its memory, traffic and time."""

import dataclasses
import functools
import statistics
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_gale
from benchmarks.gpu import timing
from benchmarks.gpu.arms import ADAMW, GALE, GAP, LEARNING_RATE, adamw, float32_states, gale
from benchmarks.gpu.store import Row
from examples.flax_llama.config import DeviceOptions
from examples.flax_llama.layout import Layout, shaped
from examples.flax_llama.model import AttentionBackend, Llama
from examples.flax_llama.optimizers import DATA
from examples.flax_llama.sizes import get_size
from examples.flax_llama.step import TrainState, Walk, first_state, make_train_step, trace_init
from examples.flax_llama.step_memory import batch_shapes

AVERAGED = "GALE, averaged projections"
CUDNN: AttentionBackend = "cudnn"


class Arm(NamedTuple):
    """An optimizer.

    Attributes:
      make: the optimizer of a rank.
      refreshes: whether the host chooses steps that refresh.
      averages: whether it averages what devices along data have computed, and nothing else does.
    """

    make: Callable[[int], optax.GradientTransformation]
    refreshes: bool = False
    averages: bool = False


ARMS: dict[str, Arm] = {
    ADAMW: Arm(lambda _: float32_states(adamw())),
    GALE: Arm(gale, refreshes=True),
    "AdamW, bf16 states": Arm(lambda _: adamw()),
    AVERAGED: Arm(functools.partial(gale, axis_name=DATA), refreshes=True, averages=True),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What to measure.

    Attributes:
      size: of the model.
      rank: of the projectors.
      arm: the optimizer.
      batch: sequences a device.
      length: tokens a sequence.
      mesh: as the example's ``--mesh``; None for one device.
      remat: whether activations are computed again in the backward pass; None if not.
      attention_backend: of the model; None for cuDNN's.
      blocks: blocks of steps, of which the median is taken.
      steps: steps a block.
    """

    size: str
    rank: int
    arm: str
    batch: int
    length: int
    mesh: str | None = None
    remat: bool | None = None
    attention_backend: AttentionBackend | None = None
    blocks: int = 5
    steps: int = 5

    @property
    def devices(self) -> int:
        """How many the mesh has."""
        return devices_of(self.mesh)

    @property
    def width(self) -> int:
        """Of the MLP in memory, which is padded."""
        return get_size(self.size).padded_intermediate


def devices_of(mesh: str | None) -> int:
    """How many devices a mesh has.

    Raises:
      UserError: if it does not read like one.
    """
    axes = DeviceOptions(mesh=mesh).axes() or {}
    return int(np.prod(list(axes.values()), dtype=int))


def takes(arm: Arm, mesh: str | None) -> bool:
    """Whether an arm makes sense on a mesh: averaging does on several devices along data alone."""
    axes = DeviceOptions(mesh=mesh).axes() or {}
    return not arm.averages or 1 < axes.get(DATA, 1) == devices_of(mesh)


class _Step(NamedTuple):
    """A step that is ready to be compiled.

    Attributes:
      compile: makes the program of keyword arguments.
      first_state: makes the first state, where it lies from then on.
      layout: what lies where.
    """

    compile: Callable[..., Any]
    first_state: Callable[[], TrainState]
    layout: Layout


def measure(case: Case) -> Row:
    """Compiles a step, reports on it, and times it.

    Returns:
      What was found. If something failed, also an ``error``, beside what was found before.
    """
    row: Row = {}
    try:
        for found in _findings(case):
            row |= found
    except Exception as error:  # what was found is worth keeping
        traceback.print_exc()
        text = (str(error).splitlines() or [""])[0][:200]
        row["error"] = f"{type(error).__name__}: {text}"
    return row


def _findings(case: Case) -> Iterator[Row]:
    arm = ARMS[case.arm]
    kinds: dict[str, dict[str, Any]] = {"ordinary": {}}
    if arm.refreshes:  # first, or the ordinary steps have no projectors
        kinds = {"refresh": {"refresh": True}, "ordinary": {"refresh": False}}
    step = _step(case, arm)
    # Before anything is allocated: the compiler's trials would come on top of it.
    programs = {kind: step.compile(**options) for kind, options in kinds.items()}
    for kind, program in programs.items():
        yield {
            f"{kind}_peak_bytes": timing.peak_bytes(program),
            f"{kind}_sent": _sent(program) if case.devices > 1 else {},
        }
    before = _allocated()
    state, batch = step.first_state(), _batch(case, step.layout)
    times: dict[str, float] = {}
    for kind, program in programs.items():
        run = functools.partial(_next, program, batch)
        times[kind], state = _seconds_a_step(run, state, case)
        yield {f"{kind}_ms": 1e3 * times[kind]}
    ordinary = times["ordinary"]
    seconds = ordinary + (times.get("refresh", ordinary) - ordinary) / GAP
    yield {"ms": 1e3 * seconds}
    yield {"tokens_per_second": case.batch * case.devices * case.length / seconds}
    yield _allocators_peak(before, _allocated())


def _step(case: Case, arm: Arm) -> _Step:
    axes = DeviceOptions(mesh=case.mesh).axes() or {"data": 1, "fsdp": 1, "tensor": 1}
    layout = Layout.of(axes, kernels=arm.refreshes)
    model = Llama(
        get_size(case.size),
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
        remat=bool(case.remat),
        attention_backend=case.attention_backend or CUDNN,
        stream=None if arm.averages or case.devices == 1 else layout.batch,
    )
    tx = optax.with_extra_args_support(arm.make(case.rank))
    walk = Walk(mesh=layout.mesh if arm.averages else None)
    shapes = trace_init(model, tx, 0, walk).out_info
    batch = (case.batch * case.devices, case.length)
    compiled, where = compiled_on(layout, model, tx, walk, shapes, batch)
    return _Step(compiled, lambda: first_state(model, tx, 0, walk, where), layout)


def compiled_on(
    layout: Layout,
    model: Llama,
    tx: optax.GradientTransformationExtraArgs,
    walk: Walk,
    shapes: TrainState,
    batch: tuple[int, int],
    chunks: int = 1,
) -> tuple[Callable[..., Any], TrainState]:
    """The example's step on a mesh, from shapes alone.

    Args:
      layout: what lies where.
      model: the model.
      tx: the optimizer.
      walk: how a step goes through batch and layers.
      shapes: of the state.
      batch: sequences of the whole batch, and their tokens.
      chunks: parts in which logits are computed.

    Returns:
      What makes the program of keyword arguments, and where the state lies.
    """
    where: Any = TrainState(
        layout.whole,  # type: ignore[arg-type]
        layout.weights(shapes.params),
        layout.state(functools.partial(walk.init, tx), shapes.params),
    )
    schedule = optax.constant_schedule(LEARNING_RATE)
    step = make_train_step(model, tx, schedule, chunks, walk, (where, layout.whole))
    tokens = batch_shapes(batch)
    arguments = shaped(shapes, where), shaped(tokens, dict.fromkeys(tokens, layout.batch))
    return lambda **options: step.lower(*arguments, **options).compile(), where


def _batch(case: Case, layout: Layout) -> dict[str, jax.Array]:
    """Random tokens, spread over the mesh."""
    sequences = case.batch * case.devices
    tokens = np.random.default_rng(1).integers(
        get_size(case.size).vocab_size, size=(sequences, case.length), dtype=np.int32
    )
    return layout.place({"tokens": tokens, "mask": np.ones_like(tokens, dtype=bool)}, sequences)


def _next(program: Any, batch: Any, state: Any) -> Any:
    return program(state, batch)[0]


def _seconds_a_step(run: Callable[[Any], Any], state: Any, case: Case) -> tuple[float, Any]:
    """Median seconds of a step over blocks of steps, and the last state."""
    state = jax.block_until_ready(run(run(state)))
    times = []
    for _ in range(case.blocks):
        start = time.perf_counter()
        for _ in range(case.steps):
            state = run(state)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - start) / case.steps)
    return statistics.median(times), state


def _sent(program: Any) -> dict[str, float]:
    """Bytes that each device sends in a step, by the kind of collective."""
    sent: dict[str, float] = defaultdict(float)
    for collective in optax_gale.traffic_report(program).collectives:
        if not collective.in_branch:
            sent[collective.kind] += collective.sent
    return dict(sent)


def _allocated() -> list[Mapping[str, int]]:
    """The allocator's counts, of each device; of those that count."""
    return [counts for device in jax.local_devices() if (counts := device.memory_stats())]


def _allocators_peak(before: list[Mapping[str, int]], after: list[Mapping[str, int]]) -> Row:
    """What was in use at most, on the device that used most; empty if compiling needed more."""
    peaks = [
        late["peak_bytes_in_use"] - early["bytes_in_use"]
        for early, late in zip(before, after, strict=True)
        if late["peak_bytes_in_use"] > early["peak_bytes_in_use"]
    ]
    return {"allocated_peak_bytes": max(peaks)} if peaks else {}
