"""How much of a gradient's energy each range finder captures, and what it costs.

Trains a LLaMA with AdamW, stops at some steps, and compares the projectors that every range finder
takes from the gradients there with the SVD's: ``||P^T G||^2 / ||G||^2`` over all projected
matrices, as a share of the best possible. Prints a Markdown table and stores it with the numbers.

    python -m benchmarks.range_finders --size tiny --out benchmarks/results
"""

import dataclasses
import functools
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import optax_gale
from benchmarks.environment import describe, store
from examples.flax_llama import data
from examples.flax_llama.data import DataConfig
from examples.flax_llama.model import Llama, next_token_loss
from examples.flax_llama.sizes import get_size
from optax_gale import linalg
from optax_gale.transforms.selection import Side, project_rows

SIDE: Side = "short"  # the library's default


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    size: str = "tiny"
    """Model size."""
    at: tuple[int, ...] = (1, 50, 200)
    """Steps whose gradients are looked at."""
    batch_size: int = 16
    """Sequences a step."""
    learning_rate: float = 2e-3
    """AdamW's learning rate."""
    dtype: str = "bfloat16"
    """Compute dtype."""
    repeats: int = 10
    """Timed runs of every range finder."""
    out: Path = Path("benchmarks/results")
    """Where the results go."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The text."""


def sketches() -> dict[str, optax_gale.Sketch | str]:
    """The range finders of the table."""
    table: dict[str, optax_gale.Sketch | str] = {"svd": "svd", "random": "random"}
    for power_iterations in (0, 1, 2):
        for oversampling in (0, 8, 32):
            table[f"sketch, p={oversampling}, q={power_iterations}"] = optax_gale.Sketch(
                oversampling=oversampling, power_iterations=power_iterations
            )
    table["sketch, p=0, q=1, not aligned"] = optax_gale.Sketch(align=False)
    table["sketch of 1/4 of G, p=0, q=0"] = optax_gale.Sketch(
        power_iterations=0, sample_fraction=0.25
    )
    table["sketch of 1/4 of G, p=0, q=1"] = optax_gale.Sketch(sample_fraction=0.25)
    table["Rademacher sketch, p=0, q=1"] = optax_gale.Sketch(sketch="rademacher")
    table["warm start, q=1"] = optax_gale.Sketch(warm_start=True)
    return table


def gradients(config: Config) -> dict[int, dict[str, np.ndarray]]:
    """Gradients of the matrices, stacked ``(layers, m, n)``, at the asked steps of a training."""
    corpus = data.load(config.data)
    size = dataclasses.replace(get_size(config.size), vocab_size=corpus.vocab_size)
    model = Llama(size, dtype=jnp.dtype(config.dtype), param_dtype=jnp.float32)
    params = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    last = max(config.at)
    warmup = max(last // 10, 1)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.linear_schedule(0.0, config.learning_rate, warmup), weight_decay=0.0),
    )
    state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        def loss_fn(p):
            total, count = next_token_loss(model, p, batch)
            return total / count

        grads = jax.grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, grads

    found = {}
    batches = data.train_batches(corpus, config.batch_size, 0)
    for i in range(1, last + 1):
        params, state, grads = step(params, state, next(batches))
        if i in config.at:
            leaves = jax.tree_util.tree_flatten_with_path(grads["layers"])[0]
            found[i] = {
                jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(g)
                for path, g in leaves
                if g.ndim == 3
            }
    return found


def measure(
    finder: Any, at: dict[int, dict[str, np.ndarray]], rank: int, repeats: int
) -> tuple[dict[int, float], float]:
    """Captured energy at every step, and the median seconds of one refresh of all matrices."""
    choose = optax_gale.gale(
        optax.identity(), rank, update_proj_gap=1, side=SIDE, range_finder=finder, select=True
    )

    @jax.jit
    def refresh(grads, state):
        return choose.update(grads, state, refresh=True)[1]

    @jax.jit
    def energy(grads, state):
        parts = []
        for name, g in grads.items():
            p = state.projector[name]
            x = g if project_rows(g.shape[-2], g.shape[-1], SIDE) else g.mT
            parts.append(
                (jnp.sum(linalg.captured_energy(p, x) * jnp.sum(g * g, (-2, -1))), jnp.sum(g * g))
            )
        return sum(a for a, _ in parts) / sum(b for _, b in parts)

    energies, times = {}, []
    state = choose.init(next(iter(at.values())))
    for i, grads in at.items():
        on_device = jax.device_put(grads)
        state = refresh(on_device, state)
        energies[i] = float(energy(on_device, state))
    for _ in range(repeats if finder != "svd" else 1):
        start = time.perf_counter()
        jax.block_until_ready(refresh(on_device, state))
        times.append(time.perf_counter() - start)
    return energies, statistics.median(times)


def main(config: Config) -> None:
    """Measures and stores."""
    size = get_size(config.size)
    rank = size.hidden // 4
    at = gradients(config)
    rows: dict[str, dict[str, Any]] = {}
    for name, finder in sketches().items():
        energies, seconds = measure(finder, at, rank, config.repeats)
        rows[name] = {"energy": energies, "milliseconds": 1e3 * seconds}
        print(name, rows[name], flush=True)
    best = rows["svd"]["energy"]
    steps = sorted(best)
    lines = [
        f"LLaMA {config.size}, rank {rank}, {describe()['device']}.",
        "",
        "| range finder | " + " | ".join(f"step {i}" for i in steps) + " | refresh, ms |",
        "|---|" + "---|" * (len(steps) + 1),
    ]
    for name, row in rows.items():
        shares = [
            f"{row['energy'][i]:.4f} of \\|\\|G\\|\\|²"
            if name == "svd"
            else f"{row['energy'][i] / best[i]:.4f}"
            for i in steps
        ]
        lines.append(f"| {name} | " + " | ".join(shares) + f" | {row['milliseconds']:.2f} |")
    store(
        config.out / f"range_finders_{config.size}",
        lines,
        config=dataclasses.asdict(config),
        rows=rows,
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Config))
