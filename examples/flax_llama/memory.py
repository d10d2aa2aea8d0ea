"""Where the memory of training goes, from shapes; of a whole step, see `step_memory`."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_gale
from examples.flax_llama import optimizers, plots, step_memory
from examples.flax_llama.config import MemoryConfig
from examples.flax_llama.errors import UserError
from examples.flax_llama.metrics import human_bytes
from examples.flax_llama.model import Llama
from examples.flax_llama.step import Walk, check_backend, trace_init
from examples.flax_llama.tables import aligned


class Breakdown(NamedTuple):
    """Bytes of each kind that training holds, besides activations.

    Attributes:
      weights: the parameters.
      gradients: as many as the weights.
      moments: the optimizer's state without its projectors.
      projectors: the bases of the subspaces.
    """

    weights: int
    gradients: int
    moments: int
    projectors: int

    @property
    def optimizer(self) -> int:
        """The optimizer's whole state."""
        return self.moments + self.projectors


def breakdown(params: Any, opt_state: Any) -> Breakdown:
    """Adds up parameters and an optimizer's state, which may be shapes."""
    in_projectors, elsewhere = 0, 0
    for path, x in jax.tree_util.tree_flatten_with_path(opt_state)[0]:
        if any(getattr(key, "name", None) == "projector" for key in path):
            in_projectors += _bytes(x)
        else:
            elsewhere += _bytes(x)
    weights = sum(map(_bytes, jax.tree.leaves(params)))
    return Breakdown(weights, weights, elsewhere, in_projectors)


def check_projects(name: str, settings: Mapping[str, Any], parts: Breakdown) -> None:
    """Refuses a low-rank optimizer that would have nothing to do.

    Raises:
      UserError: if it projects no weight.
    """
    if "rank" in settings and not parts.projectors:
        raise UserError(
            f"{name} with --rank {settings['rank']} and --select {settings.get('select')} would "
            "project nothing; change one of them"
        )


def _bytes(x: Any) -> int:
    return math.prod(x.shape) * jnp.dtype(x.dtype).itemsize


def report(name: str, tx: optax.GradientTransformation, params: Any) -> str:
    """The table that training starts with: what the optimizer does with each weight, and totals."""
    return f"Memory with {name}:\n{optax_gale.memory_report(tx, params)}"


def run(config: MemoryConfig) -> str:
    """Tabulates weights, gradients and optimizer states of one model for several optimizers.

    With a batch size also the memory of the whole training step, which it compiles.

    Raises:
      UserError: if an option makes no sense, an optimizer or one of its options is unknown, or one
        would project nothing.
    """
    config.check()
    step_memory.check_budget(config.budget)
    size = config.model.shape()
    model = Llama(
        size,
        dtype=jnp.dtype(config.model.dtype),
        param_dtype=jnp.dtype(config.model.float_dtype),
        remat=config.model.remat,
        attention_backend=config.model.attention_backend,
    )
    if config.batch_size is not None:
        check_backend(config.model.attention_backend)
    training = config.training()
    walk = Walk.of(training, config.model)
    names = config.optimizers.split(",")
    rows, reports = [], []
    steps: dict[str, step_memory.StepMemory] = {}
    for name, options in zip(names, optimizers.narrowed(config.optimization, names), strict=True):
        settings = optimizers.resolve(name, options, size, training.steps)
        tx = optimizers.build(name, settings, training)
        with optimizers.refusals(name):
            shapes = trace_init(model, tx, 0, walk).out_info
        parts = breakdown(shapes.params, shapes.opt_state)
        check_projects(name, settings, parts)
        label = f"{name}, rank {settings['rank']}" if "rank" in settings else name
        rows.append([label, *map(human_bytes, (*parts, sum(parts)))])
        if config.details:
            reports.append(report(name, tx, shapes.params))
        if config.batch_size is not None:
            with optimizers.refusals(name):
                steps[label] = step_memory.measure(config, model, tx, shapes, config.batch_size)
    header = ["optimizer", *Breakdown._fields, "total"]
    title = f"LLaMA {config.model.size}, {config.model.param_dtype} weights, no activations"
    text = [*reports, title, aligned(header, rows)]
    if steps:
        text.append(step_memory.table(config, steps))
    if config.picture is not None:
        plots.plot_step_memory(config.picture, {name: step.report for name, step in steps.items()})
    return "\n\n".join(text)
