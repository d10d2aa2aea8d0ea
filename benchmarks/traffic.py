"""What data parallelism sends: AdamW's gradients against GALE's projections, from whole steps.

The optimizer's step on all projected matrices of a model, on simulated devices each of which has
float32 gradients of its own. Nothing is run or allocated: the programs are traced for the real
shapes, and what they average is counted. Compiled, they must average as many numbers
(`optax_gale.traffic_report`); their bytes would not do, for CPUs average bfloat16 in float32.

    python -m benchmarks.traffic --size 1b --rank 512
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_gale
from benchmarks.environment import store
from benchmarks.gpu.shapes import parameters
from examples.flax_llama.sizes import get_size
from examples.flax_llama.tables import markdown
from optax_gale import Sketch

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile."""

    size: str = "1b"
    """Model."""
    rank: int = 512
    """Of the projectors."""
    devices: int = 8
    """Simulated devices that average."""
    out: Path = Path("benchmarks/results")
    """Where the results go."""


def step(tx: Any, mesh: Any, refresh: bool | None, averages: bool) -> Callable[..., Any]:
    """A step on each device's own gradients, which ``tx`` averages, or JAX does."""

    def take(params: Any, state: Any, grads: Any) -> Any:
        grads = jax.tree.map(lambda x: x[0], grads)
        if not averages:
            grads = jax.lax.pmean(grads, "data")
        extra: dict[str, Any] = {} if refresh is None else {"refresh": refresh}
        return optax_gale.update_and_apply(tx, grads, state, params, **extra)

    return jax.shard_map(take, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())


def reduced(config: Config, tx: Any, refresh: bool | None, averages: bool) -> int:
    """Bytes of the arrays that are averaged in a step.

    Of the program as it was traced: XLA for CPUs averages bfloat16 in float32. How many numbers
    those are, the compiled program must say too.
    """
    mesh = jax.make_mesh((config.devices,), ("data",), (AxisType.Auto,))
    weights = parameters(config.size, stacked=True, dtype=jnp.float32)
    state = jax.eval_shape(tx.init, weights)
    own = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (config.devices, *x.shape), x.dtype, sharding=NamedSharding(mesh, P("data"))
        ),
        weights,
    )
    program = jax.jit(step(tx, mesh, refresh, averages), donate_argnums=(0, 1))
    arrays = averaged_arrays(program.trace(weights, state, own).jaxpr)
    report = optax_gale.traffic_report(program, weights, state, own)
    traced = sum(math.prod(x.shape) for x in arrays)
    compiled = sum(sum(c.elements) * c.times for c in report.collectives)
    if traced != compiled:
        raise RuntimeError(f"{traced} numbers are averaged as traced, {compiled} as compiled")
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


def averaged_arrays(program: Any) -> list[Any]:
    """The arrays, shapes and dtypes, that a traced program sums over devices and then uses.

    Loops are not followed: nothing is averaged in one here.
    """
    found = []
    used = {id(x) for x in program.outvars}
    for equation in reversed(program.eqns):
        if not any(id(x) in used for x in equation.outvars):
            continue
        used |= {id(x) for x in equation.invars}
        if equation.primitive.name.startswith("psum"):
            found += [x.aval for x in equation.invars]
        parts = jax.tree.leaves(equation.params, is_leaf=lambda x: _program_of(x) is not None)
        for inner in filter(None, map(_program_of, parts)):
            found += averaged_arrays(inner)
    return found


def _program_of(x: Any) -> Any:
    """The traced program that a parameter of an equation is, if it is one."""
    x = getattr(x, "jaxpr", x)
    return x if hasattr(x, "eqns") else None


def main(config: Config) -> None:
    """Compiles, tabulates and stores."""
    options: dict[str, Any] = {"axis_name": "data", "update_proj_gap": 200}
    gale = lambda **more: optax_gale.gale_adamw(1e-3, config.rank, **options, **more)
    plain, halved = Sketch(power_iterations=0), Sketch(average_dtype="bfloat16")
    arms: dict[str, tuple[Any, bool | None, bool]] = {
        "AdamW": (optax.adamw(1e-3), None, False),
        "GALE": (gale(), False, True),
        "GALE, a refresh, no power iteration": (gale(range_finder=plain), True, True),
        "GALE, a refresh": (gale(), True, True),
        "GALE, a refresh, sketches in bfloat16": (gale(range_finder=halved), True, True),
    }
    share = config.rank / get_size(config.size).hidden
    sizes = {name: reduced(config, *arm) for name, arm in arms.items()}
    whole = sizes["AdamW"]
    lines = [
        [name, f"{size / _MIB:,.1f}", f"{size / whole:.4f}", f"{size / whole / share:.3f}"]
        for name, size in sizes.items()
    ]
    title = (
        f"LLaMA-{config.size.upper()}, r = {config.rank}, float32 weights and gradients: what "
        f"{config.devices} devices average of all projected matrices; r / min(m, n) is {share:g}."
    )
    header = ["", "MiB a step", "of AdamW's", "of r / min(m, n) of AdamW's"]
    text = [title, "", markdown(header, lines)]
    stem = config.out / f"traffic_{config.size}"
    store(stem, text, config=dataclasses.asdict(config), bytes=sizes)
    print("\n".join(text))


if __name__ == "__main__":
    chosen = tyro.cli(Config)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", chosen.devices)
    main(chosen)
