"""The memory of a whole training step, from the program that it is compiled to."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_gale
from examples.flax_llama.config import MemoryConfig
from examples.flax_llama.errors import UserError
from examples.flax_llama.metrics import human_bytes
from examples.flax_llama.model import Llama
from examples.flax_llama.step import WHOLE, TrainState, Walk, make_train_step
from examples.flax_llama.tables import aligned
from optax_gale import LargestBatch, StepMemoryReport

# Columns of the table: attributes of a report, added up.
_COLUMNS = {
    "weights": ("weights",),
    "moments": ("moments",),
    "projectors": ("projectors",),
    "gradients": ("gradients",),
    "activations": ("activations",),
    "work space": ("work_space",),
    "rest": ("other", "inputs", "results"),
    "peak": ("peak",),
}


class StepMemory(NamedTuple):
    """What is known about the step of one optimizer.

    Attributes:
      report: of the batch size that was asked for.
      largest: the largest batch that fits, or None where no budget was given.
    """

    report: StepMemoryReport
    largest: LargestBatch | None


def measure(
    config: MemoryConfig,
    model: Llama,
    tx: optax.GradientTransformationExtraArgs,
    state: TrainState,
    batch_size: int,
) -> StepMemory:
    """Compiles the training step of a batch, and of as many others as the budget's answer takes.

    Args:
      config: the options.
      model: the model.
      tx: the optimizer.
      state: the shapes of what training carries.
      batch_size: sequences a step.
    """
    reports: dict[int, StepMemoryReport] = {}

    def report_of(n: int) -> StepMemoryReport:
        if n not in reports:
            reports[n] = step_report(
                model,
                tx,
                state,
                (n, config.sequence_length),
                loss_chunks=config.model.loss_chunks,
                budget=config.budget,
                walk=Walk.of(config.training(n), config.model),
            )
        return reports[n]

    report = report_of(batch_size)
    if config.budget is None:
        return StepMemory(report, None)
    largest = optax_gale.largest_batch(
        report_of, config.budget, start=batch_size, multiple=config.micro_batches
    )
    return StepMemory(report, largest)


def step_report(
    model: Llama,
    tx: optax.GradientTransformationExtraArgs,
    state: TrainState,
    shape: tuple[int, int],
    *,
    loss_chunks: int = 1,
    budget: str | None = None,
    walk: Walk = WHOLE,
) -> StepMemoryReport:
    """Reports on the step that `train` would run.

    Args:
      model: the model.
      tx: the optimizer.
      state: the shapes of what training carries.
      shape: sequences a step and tokens a sequence.
      loss_chunks: in how many pieces the logits are computed.
      budget: memory of the device.
      walk: how the step goes through the batch and the layers.
    """
    return optax_gale.step_memory_report(
        make_train_step(model, tx, optax.constant_schedule(0.0), loss_chunks, walk),
        state,
        batch_shapes(shape),
        where=lambda state, batch: (state.params, state.opt_state),
        budget=budget,
    )


def batch_shapes(shape: tuple[int, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch, of sequences and tokens."""
    return {
        "tokens": jax.ShapeDtypeStruct(shape, jnp.int32),
        "mask": jax.ShapeDtypeStruct(shape, jnp.bool_),
    }


def table(config: MemoryConfig, found: Mapping[str, StepMemory]) -> str:
    """One row an optimizer, and what to know about the numbers."""
    header = ["optimizer", *_COLUMNS]
    if config.budget is not None:
        header += [f"fits in {config.budget}", "largest batch"]
    rows = []
    for name, (report, largest) in found.items():
        sizes = [
            human_bytes(sum(getattr(report, part) for part in parts)) for parts in _COLUMNS.values()
        ]
        row = [name, *sizes]
        if largest is not None:
            row += ["yes" if report.fits() else "no", str(largest.size or "none")]
        rows.append(row)
    title = (
        f"One step of LLaMA {config.model.size} with {config.batch_size} sequences of "
        f"{config.sequence_length} tokens, {config.model.param_dtype} weights"
    )
    notes = dict.fromkeys(note for name in found for note in found[name].report.notes())
    return "\n\n".join([title, aligned(header, rows), "\n".join(notes)])


def check_budget(budget: str | None) -> None:
    """Refuses what is no amount of memory, before anything is compiled.

    Raises:
      UserError: if it is none.
    """
    try:
        if budget is not None:
            optax_gale.training.parse_bytes(budget)
    except ValueError as error:
        raise UserError(f"--budget: {error}") from error
