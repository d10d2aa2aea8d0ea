"""The optimizer step on a GPU: GALE and its rivals, on all projected matrices of LLaMA models.

Every measurement is stored as soon as it is made, and not made again on the same commit and kind of
device, so that a long list can be made in parts: ``--minutes`` ends a part.

    python -m benchmarks.step
    python -m benchmarks.step --cases 7b:128 60m:128 --only ordinary refresh --minutes 8
"""

import dataclasses
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

# torch needs some of the device too; read when JAX starts.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.7")

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.gpu import data, floors, galore, plot, profile, report, shapes, timing
from benchmarks.gpu.arms import (
    ADAMW,
    ARMS,
    CONTRIB,
    FORCED,
    GALE,
    GAP,
    KEPT,
    LEARNING_RATE,
    SCALE,
    TORCH,
    WEIGHT_DECAY,
    Arm,
    gale,
)
from benchmarks.gpu.floors import Ceilings
from benchmarks.gpu.inputs import Inputs
from benchmarks.gpu.shapes import Case
from benchmarks.gpu.store import Row, Store, slug
from examples.flax_llama.sizes import get_size

Part = Literal["ordinary", "refresh", "rivals", "svd", "spread", "profile"]
KEY = ("part", "size", "rank", "arm")
CASES = ("7b:128", "7b:1024", "1b:512", "60m:128", "350m:256", "130m:256")
NO_GPU = "No GPU here: this benchmark measures one (--anywhere runs it on what there is)."

# Bytes a weight of the hungriest arm: weight, gradient and two float32 moments, and some air.
_BYTES_PER_WEIGHT = 13


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    cases: tuple[str, ...] = CASES
    """Models and ranks, the most important first."""
    only: tuple[Part, ...] = ("ordinary", "refresh", "rivals", "svd", "spread")
    """ordinary: steps that keep their projectors. refresh: steps that refresh all, with the
    moments carried over and without. rivals:
    optax.contrib.galore's and galore-torch's ordinary step. svd: what their refresh consists of.
    spread: the times of single steps. profile: the kernels of a step."""
    arms: tuple[str, ...] = tuple(arm for arm in ARMS if arm not in (CONTRIB, *FORCED))
    """Arms of ``ordinary`` and ``profile``."""
    kept: tuple[str, ...] = ("7b:128", "7b:1024")
    """Cases whose ``refresh`` is measured without carrying the moments over, too."""
    spread: tuple[str, ...] = ("1b:512", "350m:256")
    """Cases of ``spread``."""
    spread_steps: int = 400
    """Steps of ``spread``."""
    contrib_layers: int = 2
    """Layers on which optax.contrib.galore is measured where the layers are stacked: it compiles a
    conditional a matrix."""
    loops: int = 20
    """Steps in one program where the weights are less than a gigabyte: steps that may be done
    before Python launches the next."""
    seconds: float = 1.0
    """About how long to measure each."""
    minutes: float | None = None
    """Begins no measurement after so many minutes."""
    again: bool = False
    """Measures again what is stored."""
    out: Path = Path("benchmarks/results")
    """Where the results go, and join those that are there."""
    anywhere: bool = False
    """Runs without a GPU too. The numbers then say nothing."""


class Bench:
    """Takes measurements and stores them."""

    def __init__(self, config: Config, store: Store, ceilings: Ceilings):
        """Starts the clock."""
        self.config, self.store, self.ceilings = config, store, ceilings
        self._began = time.monotonic()
        self._inputs: Inputs | None = None

    def run(self) -> None:
        """Takes all measurements that are asked for and not stored yet."""
        for key, job in self._jobs():
            if not self.config.again and self.store.has(**key):
                continue
            if self._late():
                print(f"{self.config.minutes:g} minutes are over; run it again to go on")
                return
            self._take(key, job)

    def _late(self) -> bool:
        minutes = self.config.minutes
        return minutes is not None and time.monotonic() - self._began > 60 * minutes

    def _take(self, key: Row, job: Callable[[], Row]) -> None:
        began = time.monotonic()
        try:
            found = job()
        except Exception as error:  # an arm that fails must not take the others with it
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        self.store.add({**key, **found})
        took = time.monotonic() - began
        print(f"[{time.monotonic() - self._began:4.0f} s, {took:3.0f}]", report.line(key, found))

    def _jobs(self) -> Iterator[tuple[Row, Callable[[], Row]]]:
        """Key and measurement, the most important first."""
        cases = [Case.parse(text) for text in self.config.cases]
        first, rest = cases[:4], cases[4:]
        spread = [Case.parse(text) for text in self.config.spread]
        for part in (first, rest):
            for case in part:
                yield from self._case_jobs(case)
            for case in part:
                yield from self._rival_jobs(case)
            if "spread" in self.config.only:
                now, spread = spread[:1], spread[1:]
                for case in now if part is first else [*now, *spread]:
                    yield from self._spread_jobs(case)

    def _case_jobs(self, case: Case) -> Iterator[tuple[Row, Callable[[], Row]]]:
        key = {"size": case.size, "rank": case.rank}
        for part, job in (("ordinary", self.ordinary), ("profile", self.profile)):
            for name in self.config.arms if part in self.config.only else ():
                arm = ARMS[name]
                mine = {**key, "rank": case.rank if arm.low_rank else None}
                yield {"part": part, **mine, "arm": name}, _bound(job, case, arm)
        if "refresh" in self.config.only:
            kept = case in map(Case.parse, self.config.kept)
            for name in (GALE, KEPT) if kept else (GALE,):
                row = {"part": "refresh", **key, "arm": name}
                yield row, _bound(self.refresh, case, ARMS[name])

    def _rival_jobs(self, case: Case) -> Iterator[tuple[Row, Callable[[], Row]]]:
        key = {"size": case.size, "rank": case.rank}
        torch = galore.has_torch()
        if "rivals" in self.config.only:
            yield {"part": "ordinary", **key, "arm": CONTRIB}, _bound(self.contrib, case)
            if torch:
                yield {"part": "ordinary", **key, "arm": TORCH}, _bound(self.torch, case)
        if "svd" in self.config.only:
            key = {"part": "svd", "size": case.size}
            yield {**key, "arm": CONTRIB}, _bound(self.svd, case, _jax_svd)
            if torch:
                yield {**key, "arm": TORCH}, _bound(self.svd, case, galore.svd_seconds)

    def _spread_jobs(self, case: Case) -> Iterator[tuple[Row, Callable[[], Row]]]:
        for name in SPREADS:
            rank = None if name == ADAMW else case.rank
            key = {"part": "spread", "size": case.size, "rank": rank, "arm": name}
            yield key, _bound(self.spread, case, name)

    # Measurements ---------------------------------------------------------------------------------

    def ordinary(self, case: Case, arm: Arm) -> Row:
        """A step that keeps its projectors."""
        inputs, tx = self.inputs(case), arm.make(case.rank)
        state = jax.eval_shape(tx.init, inputs.shapes)
        work = floors.ordinary_step(inputs.shapes, inputs.grads, state)
        carry = (inputs.take(), data.state(state, seed=2))
        loops = self._loops(inputs)
        program = timing.compiled(arm.step(tx), carry, inputs.grads, loops=loops)
        found, (params, state) = self._measure(program, carry, inputs.grads)
        inputs.give(params)
        return self._scaled(inputs, found, work, program.peak)

    def contrib(self, case: Case) -> Row:
        """`optax.contrib.galore`, which wants matrices: a parameter each."""
        layers = get_size(case.size).layers
        if case.stacked:
            layers = min(layers, self.config.contrib_layers)
        inputs, tx = Inputs(case.size, layers, stacked=False), ARMS[CONTRIB].make(case.rank)
        shapes_of_state = jax.eval_shape(tx.init, inputs.shapes)
        work = floors.ordinary_step(inputs.shapes, inputs.grads, shapes_of_state)
        carry = (inputs.take(), data.state(shapes_of_state, seed=2))
        program = timing.compiled(ARMS[CONTRIB].step(tx), carry, inputs.grads)
        # Their count decides; it stands behind a refresh here, and must not come to the next.
        steps = max(5, min(20, GAP // 8))
        times = []
        for _ in range(5):
            carry = (carry[0], data.state(shapes_of_state, seed=2))
            jax.block_until_ready(carry)
            start = time.perf_counter()
            for _ in range(steps):
                carry = program.run(carry, inputs.grads)
            jax.block_until_ready(carry)
            times.append((time.perf_counter() - start) / steps)
        row = self._scaled(inputs, _summary(times), work, program.peak)
        if layers < get_size(case.size).layers:
            return row
        params, state = carry
        due = jax.tree.map(lambda x: x * 0 if x.ndim == 0 else x, state)
        start = time.perf_counter()
        jax.block_until_ready(program.run((params, due), inputs.grads))
        return {**row, "refresh_step_ms": 1e3 * (time.perf_counter() - start)}

    def torch(self, case: Case) -> Row:
        """galore-torch's AdamW on the arrays that JAX holds."""
        inputs = self.inputs(case)
        settings = galore.Settings(case.rank, LEARNING_RATE, WEIGHT_DECAY, SCALE, GAP)
        times, peak = galore.ordinary_times(*inputs.copies(), settings, seconds=self.config.seconds)
        return self._scaled(inputs, _summary(times), None, peak)

    def refresh(self, case: Case, arm: Arm) -> Row:
        """A step that refreshes all projectors, and how orthonormal they are then."""
        inputs, tx = self.inputs(case), arm.make(case.rank)
        carry = (inputs.take(), data.state(jax.eval_shape(tx.init, inputs.shapes), seed=2))
        loops = min(5, self._loops(inputs))
        program = timing.compiled(arm.step(tx, refresh=True), carry, inputs.grads, loops=loops)
        found, (params, state) = self._measure(program, carry, inputs.grads)
        inputs.give(params)
        errors = [_orthogonality(p) for _, p in floors.projectors(state)]
        row = self._scaled(inputs, found, None, program.peak)
        return {**row, "orthogonality": max(float(e) for e in errors)}

    def svd(self, case: Case, seconds: Callable[[Any, int], float]) -> Row:
        """An SVD of one matrix of every shape, times their number."""
        repeats = 1 if get_size(case.size).hidden > 2048 else 3
        rows = []
        for (m, n), count in shapes.counts(case.size).items():
            g = data.normal(jax.ShapeDtypeStruct((m, n), jnp.bfloat16), seed=3)
            rows.append({"m": m, "n": n, "count": count, "ms": 1e3 * seconds(g, repeats)})
        return {"ms": sum(row["ms"] * row["count"] for row in rows), "shapes": rows}

    def spread(self, case: Case, name: str) -> Row:
        """The times of single steps, from the second on."""
        inputs = self.inputs(case)
        tx, programs = SPREADS[name](case.rank)
        params = inputs.take()
        carry = jax.block_until_ready((params, jax.jit(tx.init)(params)))
        compiled = [timing.compiled(step, carry, inputs.grads).run for step in programs]
        warm = 1 + 5
        times, (params, _) = timing.each_step(
            lambda i: compiled[0 if i % GAP == 0 else -1],  # where the host chooses
            carry,
            inputs.grads,
            warm + self.config.spread_steps,
        )
        inputs.give(params)
        times = times[warm:]
        p50, p90, p99 = (1e3 * float(x) for x in np.percentile(times, [50, 90, 99]))
        return {
            "p50_ms": p50,
            "p90_ms": p90,
            "p99_ms": p99,
            "max_ms": 1e3 * max(times),
            "mean_ms": 1e3 * statistics.mean(times),
            "steps": len(times),
            "layers": inputs.layers,
            "of_layers": get_size(case.size).layers,
            "times_ms": [round(1e3 * t, 5) for t in times],
        }

    def profile(self, case: Case, arm: Arm) -> Row:
        """The kernels of a step that keeps its projectors."""
        inputs, tx = self.inputs(case), arm.make(case.rank)
        carry = (inputs.take(), data.state(jax.eval_shape(tx.init, inputs.shapes), seed=2))
        program = timing.compiled(arm.step(tx), carry, inputs.grads)
        found, (params, _) = profile.kernels(program, carry, inputs.grads)
        inputs.give(params)
        scale = get_size(case.size).layers / inputs.layers
        return {
            "ms": scale * sum(ms for *_, ms in found),
            "kernels": [[name[:120], launches, scale * ms] for name, launches, ms in found[:25]],
        }

    # What they share ------------------------------------------------------------------------------

    def inputs(self, case: Case) -> Inputs:
        """Weights and gradients; of one size at a time."""
        if self._inputs is None or self._inputs.size != case.size:
            self._inputs = None  # before there are others
            limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
            layers = shapes.layers_that_fit(case.size, _BYTES_PER_WEIGHT, limit)
            self._inputs = Inputs(case.size, layers, stacked=case.stacked)
        return self._inputs

    def _loops(self, inputs: Inputs) -> int:
        return self.config.loops if floors.nbytes(inputs.shapes) < 1e9 else 1

    def _measure(self, program: timing.Program, carry: Any, fixed: Any) -> tuple[Row, Any]:
        found, carry = timing.measure(program, carry, fixed, seconds=self.config.seconds)
        row = {"ms": 1e3 * found.median, "p10_ms": 1e3 * found.p10, "p90_ms": 1e3 * found.p90}
        return {**row, "steps": found.steps, "loops": program.steps}, carry

    def _scaled(
        self, inputs: Inputs, found: Row, work: floors.Work | None, peak: int | None
    ) -> Row:
        """A measurement on some of the layers, made one on all; the numbers say so."""
        of_layers = get_size(inputs.size).layers
        scale = of_layers / inputs.layers
        row = {k: scale * v if k.endswith("ms") else v for k, v in found.items()}
        row |= {"layers": inputs.layers, "of_layers": of_layers}
        if work is not None:
            row |= {"bytes": round(scale * work.bytes), "flops": round(scale * work.flops)}
            row["floor_ms"] = 1e3 * scale * work.floor(self.ceilings)
        if peak is not None:
            row["peak_bytes"] = round(scale * peak)
        return row


def _bound(job: Callable[..., Row], *args: Any) -> Callable[[], Row]:
    return lambda: job(*args)


def _summary(times: list[float]) -> Row:
    p10, p90 = (1e3 * float(x) for x in np.percentile(times, [10, 90]))
    return {"ms": 1e3 * statistics.median(times), "p10_ms": p10, "p90_ms": p90}


def _jax_svd(g: jax.Array, repeats: int) -> float:
    """Median seconds of the SVD that `optax.contrib.galore` takes of a matrix."""

    def leading(g: jax.Array) -> jax.Array:
        u, _, vh = jnp.linalg.svd(g.astype(jnp.float32), full_matrices=False)
        return u if g.shape[0] >= g.shape[1] else vh

    jax.block_until_ready(jax.jit(leading)(g[:64, :64]))  # the library's own start
    run = jax.jit(leading).lower(g).compile()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(g))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@jax.jit
def _orthogonality(p: jax.Array) -> jax.Array:
    """Largest entry of ``|P^T P - I|``."""
    p = p.astype(jnp.float32)
    gram = jnp.einsum("...dr,...ds->...rs", p, p, precision="highest")
    return jnp.max(jnp.abs(gram - jnp.eye(p.shape[-1])))


def _device_chosen(**options: Any) -> Callable[[int], tuple[Any, list[timing.Step]]]:
    def make(rank: int) -> tuple[Any, list[timing.Step]]:
        tx = gale(rank, **options)
        return tx, [ARMS[GALE].step(tx, refresh=None)]

    return make


def _host_chosen(rank: int) -> tuple[Any, list[timing.Step]]:
    tx = gale(rank)
    return tx, [ARMS[GALE].step(tx, refresh=refresh) for refresh in (True, False)]


def _adamw(rank: int) -> tuple[Any, list[timing.Step]]:
    tx = ARMS[ADAMW].make(rank)
    return tx, [ARMS[ADAMW].step(tx)]


SPREADS: dict[str, Callable[[int], tuple[Any, list[timing.Step]]]] = {
    "GALE, staggered": _device_chosen(refresh_schedule="staggered"),
    "GALE, together": _device_chosen(),
    "GALE, chosen by the host": _host_chosen,
    ADAMW: _adamw,
}


def main(config: Config) -> None:
    """Measures, stores, tabulates and draws."""
    if jax.default_backend() != "gpu" and not config.anywhere:
        print(NO_GPU)
        return
    stem = config.out / f"step_{slug(jax.devices()[0].device_kind)}"
    store = Store(stem.with_suffix(".json"), KEY)
    ceilings = timing.ceilings() if not config.anywhere else timing.ceilings(2**24, 256)
    store.start(**ceilings._asdict())
    try:
        Bench(config, store, ceilings).run()
    finally:
        if store.rows:
            text = report.markdown(store.rows, store.runs)
            stem.with_suffix(".md").write_text(text + "\n")
            plot.draw(stem.with_suffix(".png"), store.rows)
            print(text)


if __name__ == "__main__":
    main(tyro.cli(Config))
