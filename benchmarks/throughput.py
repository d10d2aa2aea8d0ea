"""Tokens a second of training LLaMA end to end: GALE against AdamW at the same batch.

The example's model and train step, bfloat16 weights, random tokens. A gap's one step that refreshes
is weighted as such. Measurements are stored as they are made, and not repeated on the same commit
and kind of device.

    python -m benchmarks.throughput --sizes 350m 1b
"""

import dataclasses
import functools
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro

from benchmarks.gpu import timing
from benchmarks.gpu.arms import ADAMW, GALE, GAP, LEARNING_RATE, adamw, float32_states, gale
from benchmarks.gpu.report import number
from benchmarks.gpu.store import Row, Store, provenance, slug
from examples.flax_llama.model import Llama
from examples.flax_llama.sizes import get_size
from examples.flax_llama.step import first_state, make_train_step
from examples.flax_llama.tables import markdown

KEY = ("size", "rank", "arm", "batch", "length")
NO_GPU = "No GPU here: this benchmark measures one (--anywhere runs it on what there is)."
RANKS = {"tiny": 32, "60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 1024}
_GIB = 2**30


class Arm(NamedTuple):
    """An optimizer.

    Attributes:
      make: the optimizer of a rank.
      refreshes: whether the host chooses steps that refresh.
    """

    make: Callable[[int], optax.GradientTransformation]
    refreshes: bool = False


ARMS: dict[str, Arm] = {
    ADAMW: Arm(lambda _: float32_states(adamw())),
    GALE: Arm(gale, refreshes=True),
    "AdamW, bf16 states": Arm(lambda _: adamw()),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train."""

    sizes: tuple[str, ...] = ("350m", "1b")
    """Models."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Optimizers."""
    batch: int = 64
    """Sequences a step."""
    length: int = 256
    """Tokens a sequence."""
    attention_backend: Literal["xla", "cudnn"] = "cudnn"
    """cudnn: the fused kernel of NVIDIA GPUs."""
    remat: bool = False
    """Whether activations are computed again in the backward pass."""
    blocks: int = 5
    """Blocks of steps, of which the median is taken."""
    steps: int = 5
    """Steps a block."""
    minutes: float | None = None
    """Begins no measurement after so many minutes."""
    again: bool = False
    """Measures again what is stored."""
    out: Path = Path("benchmarks/results")
    """Where the results go, and join those that are there."""
    anywhere: bool = False
    """Runs without a GPU too. The numbers then say nothing."""


def measure(config: Config, size: str, arm: Arm) -> Row:
    """Times training steps."""
    model = Llama(
        get_size(size),
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
        remat=config.remat,
        attention_backend=config.attention_backend,
    )
    tx = optax.with_extra_args_support(arm.make(RANKS[size]))
    state = first_state(model, tx, seed=0)
    step = make_train_step(model, tx, optax.constant_schedule(LEARNING_RATE))
    tokens = jax.random.randint(
        jax.random.key(1), (config.batch, config.length), 0, model.size.vocab_size, jnp.int32
    )
    batch = {"tokens": tokens, "mask": jnp.ones_like(tokens, dtype=bool)}
    kinds: dict[str, dict[str, Any]] = {"ordinary": {}}
    if arm.refreshes:  # first, or the ordinary steps have no projectors
        kinds = {"refresh": {"refresh": True}, "ordinary": {"refresh": False}}
    row: Row = {}
    for kind, options in kinds.items():
        program = step.lower(state, batch, **options).compile()
        seconds, state = blocks(functools.partial(_next, program, batch), state, config)
        row[f"{kind}_ms"] = 1e3 * seconds
        row[f"{kind}_peak_bytes"] = timing.peak_bytes(program)
    ordinary = row["ordinary_ms"]
    refresh = row.get("refresh_ms", ordinary)
    row["ms"] = ordinary + (refresh - ordinary) / GAP
    row["tokens_per_second"] = config.batch * config.length / (row["ms"] / 1e3)
    return row


def _next(program: Any, batch: Any, state: Any) -> Any:
    return program(state, batch)[0]


def blocks(run: Callable[[Any], Any], state: Any, config: Config) -> tuple[float, Any]:
    """Median seconds of a step over blocks of steps, and the last state."""
    state = jax.block_until_ready(run(run(state)))
    times = []
    for _ in range(config.blocks):
        start = time.perf_counter()
        for _ in range(config.steps):
            state = run(state)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - start) / config.steps)
    return statistics.median(times), state


def table(rows: list[Row]) -> str:
    """One row an arm."""
    lines = []
    for row in rows:
        if "error" in row:
            continue
        key = {**row, "arm": ADAMW}
        same = lambda r, key=key: all(r[field] == key[field] for field in KEY) and "error" not in r
        adamw = next((r["tokens_per_second"] for r in rows if same(r)), None)
        gain = None if adamw is None else row["tokens_per_second"] / adamw
        lines.append(
            [
                f"LLaMA-{row['size'].upper()}, {row['batch']} × {row['length']}",
                row["arm"] + (f", r = {row['rank']}" if row["arm"] == GALE else ""),
                number(row["ordinary_ms"]),
                number(row.get("refresh_ms")),
                number(row["tokens_per_second"]),
                "–" if gain is None else f"{gain:.3f}",
                number((row["ordinary_peak_bytes"] or 0) / _GIB),
            ]
        )
    header = ["", "optimizer", "ordinary step, ms", "step that refreshes, ms"]
    header += ["tokens/s", "of AdamW's", "peak memory, GiB"]
    return markdown(header, lines)


def main(config: Config) -> None:
    """Measures, stores and tabulates."""
    if jax.default_backend() != "gpu" and not config.anywhere:
        print(NO_GPU)
        return
    began = time.monotonic()
    stem = config.out / f"throughput_{slug(jax.devices()[0].device_kind)}"
    store = Store(stem.with_suffix(".json"), KEY)
    store.start()
    for size in config.sizes:
        for name in config.arms:
            key = {"size": size, "rank": RANKS[size], "arm": name}
            key |= {"batch": config.batch, "length": config.length}
            if not config.again and store.has(**key):
                continue
            if config.minutes is not None and time.monotonic() - began > 60 * config.minutes:
                print(f"{config.minutes:g} minutes are over; run it again to go on")
                break
            try:
                found = measure(config, size, ARMS[name])
            except Exception as error:  # one that fails must not take the others with it
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            store.add({**key, **found})
            text = f"{provenance(store.runs)}\n\n{table(store.rows)}"
            stem.with_suffix(".md").write_text(text + "\n")
            print(text, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config))
