"""Where the memory of a whole training step goes, from shapes and from the compiled program."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from optax_gale.training import liveness, programs
from optax_gale.training.budgets import parse_bytes
from optax_gale.transforms import memory, storage

PARTS = (
    "weights",
    "moments",
    "projectors",
    "other",
    "inputs",
    "results",
    "gradients",
    "activations",
    "work_space",
)
# Of the temporaries, the least that sums over shapes must come to, and the inverse of the most.
_NEAR = 0.75

_LABELS = {
    "other": "other state",
    "results": "results that replace nothing",
    "work_space": "work space",
}


@dataclass(frozen=True)
class StepMemoryReport:
    """Memory of a training step on each device, in bytes; ``print`` it for a table.

    The parts add up to the peak. The peak and the parts that come from arguments and results are
    exact: the arrays that the caller holds, and what the compiled program allocates beside them.
    How the temporaries divide into ``gradients``, ``activations`` and ``work_space`` is an
    estimate: what lies in them at the moment when they are fullest, told apart by the names of
    the operations that made it.

    Attributes:
      weights: the parameters.
      moments: state that belongs to a parameter, projectors excluded.
      projectors: the projectors.
      other: state that belongs to no parameter (step counters and the like).
      inputs: all other arguments, such as the batch.
      results: results that do not take the place of a donated argument: losses and metrics, and
        new weights and states where the old ones are not donated.
      gradients: what the backward pass made and the optimizer reads. Gradients that are not alive
        yet, or no longer, are not in it. Sums of gradients over several passes count as such where
        they are added up under ``jax.named_scope("gradients")``.
      activations: what the forward pass made, or the backward pass made again.
      work_space: the rest of the temporaries: gradients on their way back through the layers, the
        optimizer's intermediate results, scratch memory of libraries, gaps between buffers. All
        temporaries, where the program does not say more (``told_apart`` is then False).
      told_apart: whether the temporaries could be told apart.
      copied: how much of ``results`` has shape and dtype of weights and states.
      platform: what the step was compiled for, ``"cpu"`` or ``"gpu"``.
      budget: what there is, or None where that was not said.
    """

    weights: int
    moments: int
    projectors: int
    other: int
    inputs: int
    results: int
    gradients: int
    activations: int
    work_space: int
    told_apart: bool
    copied: int
    platform: str
    budget: int | None = None

    @property
    def state(self) -> int:
        """Bytes of the whole optimizer state."""
        return self.moments + self.projectors + self.other

    @property
    def temporaries(self) -> int:
        """Bytes that only the step itself needs."""
        return self.gradients + self.activations + self.work_space

    @property
    def peak(self) -> int:
        """Bytes that the step needs at once, arguments included."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """The parts of the peak, by the names of the attributes."""
        return {name: getattr(self, name) for name in PARTS}

    def fits(self, budget: int | float | str | None = None) -> bool:
        """Whether the step fits into a budget of memory.

        Args:
          budget: bytes a device, or a string such as ``"24GiB"`` or ``"24GB"``; by default the one
            that the report was made with.

        Raises:
          ValueError: if there is no budget, or it is not one.
        """
        limit = self.budget if budget is None else parse_bytes(budget)
        if limit is None:
            raise ValueError("the report was made without a `budget`; give one to `fits`")
        return self.peak <= limit

    def __str__(self) -> str:
        """A table of the parts, the verdict on the budget, and what to know about the numbers."""
        named = [(_LABELS.get(name, name), size) for name, size in self.parts().items()]
        rows = [
            (label, memory.human_bytes(size), f"{size / self.peak:.1%}" if self.peak else "-")
            for label, size in [*named, ("peak", self.peak)]
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            f"{label.ljust(widths[0])}  {size.rjust(widths[1])}  {share.rjust(widths[2])}"
            for label, size, share in rows
        ]
        lines.insert(-1, "-" * len(lines[0]))
        if self.budget is not None:
            spare = self.budget - self.peak
            verdict = f"yes, {memory.human_bytes(spare)} to spare"
            if spare < 0:
                verdict = f"no, {memory.human_bytes(-spare)} too much"
            lines.append(f"fits in {memory.human_bytes(self.budget)}: {verdict}")
        return "\n".join([*lines, *self.notes()])

    def notes(self) -> list[str]:
        """What to know about the numbers, a line each."""
        notes = []
        if self.copied:
            notes.append(
                f"not donated: {memory.human_bytes(self.copied)} of new weights and states lie "
                "beside the old ones; jit the step with donate_argnums"
            )
        if self.told_apart:
            notes.append(
                "estimated: which temporaries are gradients, activations and work space, when they "
                "are fullest"
            )
        else:
            notes.append(
                f"work space: all temporaries; the program for {self.platform} does not say which "
                "are gradients and activations"
            )
        if self.platform == "cpu":
            notes.append("compiled for cpu: temporaries of another device's program differ")
        return notes


def step_memory_report(
    step: Any,
    *args: Any,
    where: Callable[..., tuple[Any, Any]] | None = None,
    budget: int | float | str | None = None,
    **kwargs: Any,
) -> StepMemoryReport:
    """Reports where the memory of one training step goes, and whether there is enough.

    The step is compiled and not run. No array is allocated: arguments may be anything with
    ``shape`` and ``dtype``, such as the result of `jax.eval_shape`. Compile on the kind of device
    that will train, since the temporaries are those of the compiled program.

    Arrays that are neither arguments nor results, such as the next batch, are not in the report,
    nor is what lies outside of JAX's pool of memory (on a GPU the driver's context, the program's
    code and constants, some hundred MB). JAX takes 75 % of a GPU's memory for the pool unless
    ``XLA_PYTHON_CLIENT_MEM_FRACTION`` says otherwise: that is the budget.

    Args:
      step: a function of `jax.jit`, or what its ``lower`` or ``lower(...).compile()`` return.
      *args: the step's arguments, arrays or shapes. None with a lowered or compiled step.
      where: ``where(*args, **kwargs) -> (params, opt_state)`` finds both among the step's
        arguments, static ones left out. By default they are the first two. For a step of one
        ``state``: ``lambda state, batch: (state.params, state.opt_state)``.
      budget: bytes a device, or a string such as ``"24GiB"`` or ``"24GB"``.
      **kwargs: the step's keyword arguments.

    Returns:
      The report; of one device, where the arguments are sharded over several.

    Raises:
      TypeError: if ``step`` is not jitted, or is compiled and given arguments.
      ValueError: if the budget is none, or ``where`` is not given and there are fewer than two
        arguments.
      NotImplementedError: if the backend does not say what memory a program needs.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_gale
      >>> tx = optax_gale.gale_adamw(1e-3, rank=8)
      >>> def loss(params, x):
      ...     return jnp.mean(jnp.tanh(x @ params["w"]) ** 2)
      >>> def step(params, state, x):
      ...     grads = jax.grad(loss)(params, x)
      ...     return optax_gale.update_and_apply(tx, grads, state, params)
      >>> step = jax.jit(step, donate_argnums=(0, 1))
      >>> params = {"w": jax.ShapeDtypeStruct((64, 256), jnp.float32)}
      >>> state = jax.eval_shape(tx.init, params)
      >>> x = jax.ShapeDtypeStruct((512, 64), jnp.float32)
      >>> report = optax_gale.step_memory_report(step, params, state, x, budget="1GB")
      >>> report.weights, report.projectors, report.inputs
      (65536, 2048, 131072)
      >>> report.fits()
      True
      >>> print(report)  # doctest: +SKIP
    """
    limit = None if budget is None else parse_bytes(budget)
    compiled = programs.compiled(step, args, kwargs)
    stats = compiled.memory_analysis()
    if stats is None:
        raise NotImplementedError("this backend does not say what memory a compiled program needs")
    shapes, unused = _per_device(compiled)
    params, opt_state = _found(where, *shapes)
    moments, projectors, other = memory.owned(opt_state, params)
    weights, state = storage.nbytes(params), storage.nbytes(opt_state)
    # The program's own number, which knows of padding.
    arguments = stats.argument_size_in_bytes + unused
    results = max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
    temporaries = stats.temp_size_in_bytes
    alive = _fullest(compiled, temporaries)
    gradients, activations = (alive.gradients, alive.activations) if alive else (0, 0)
    return StepMemoryReport(
        weights=weights,
        moments=sum(moments),
        projectors=sum(projectors),
        other=other,
        inputs=max(0, arguments - weights - state),
        results=results,
        gradients=gradients,
        activations=activations,
        work_space=temporaries - gradients - activations,
        told_apart=alive is not None,
        copied=min(results, _copied(compiled, (params, opt_state), stats.alias_size_in_bytes)),
        platform=_platform(compiled),
        budget=limit,
    )


def _fullest(compiled: Any, temporaries: int) -> liveness.Fullest | None:
    """What lies in the temporaries when they are fullest, or None where it cannot be told."""
    program = programs.read(compiled)
    try:
        found = None if program is None else liveness.fullest(program)
    except (IndexError, KeyError):  # a kind of program that is put together in another way
        return None
    if found is None or program is None:
        return None
    if program.is_placed:
        return found if found.total <= temporaries else None
    # Without places, sums are near the truth, or say nothing.
    if not _NEAR * temporaries <= found.total <= temporaries / _NEAR:
        return None
    share = min(1.0, temporaries / max(found.total, 1))
    return liveness.Fullest(*(int(size * share) for size in found))


def _per_device(compiled: Any) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], int]:
    """What one device holds of every argument, and the bytes that the program does not use.

    The arguments are shapes, of ``args`` and ``kwargs``, static ones left out.
    """
    infos, shardings = compiled.args_info, compiled.input_shardings
    shapes = jax.tree.map(_shard, infos, shardings)
    # An argument that the program does not use has the sharding None.
    unused = jax.tree.map(lambda x, s: storage.nbytes(x) if s is None else 0, shapes, shardings)
    return shapes, sum(jax.tree.leaves(unused))


def _shard(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
    if (getattr(sharding, "memory_kind", None) or "").endswith("host"):
        shape = (0, *shape[1:])  # not in the device's memory
    return jax.ShapeDtypeStruct(shape, x.dtype)


def _found(
    where: Callable[..., tuple[Any, Any]] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    if where is not None:
        return where(*args, **kwargs)
    if len(args) < 2:
        raise ValueError(
            "the step's first two arguments must be parameters and optimizer state, or `where` "
            f"must find them: got {len(args)} arguments"
        )
    return args[0], args[1]


def _copied(compiled: Any, state: Any, aliased: int) -> int:
    """Bytes of results that could replace an array of the state and do not."""
    count = lambda tree: Counter((x.shape, x.dtype) for x in jax.tree.leaves(tree))
    results = [_shard(x, x.sharding) for x in jax.tree.leaves(compiled.out_info)]
    replaceable = count(results) & count(state)
    size = sum(n * math.prod(shape) * dt.itemsize for (shape, dt), n in replaceable.items())
    return max(0, size - aliased)


def _platform(compiled: Any) -> str:
    for sharding in jax.tree.leaves((compiled.output_shardings, compiled.input_shardings)):
        for device in sharding.device_set:
            return device.platform
    return jax.default_backend()
