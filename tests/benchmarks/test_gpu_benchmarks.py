"""What the GPU benchmarks compute and print, on a CPU and at sizes where times say nothing."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_gale
from benchmarks import kernels, step, step_memory, throughput, traffic
from benchmarks.gpu import arms, data, galore, plot, profile, report, shapes, timing
from benchmarks.gpu import kernels as problems
from benchmarks.gpu.floors import Ceilings, Work, ordinary_step
from benchmarks.gpu.shapes import Case, Group
from benchmarks.gpu.store import Store
from examples.flax_llama import optimizers
from examples.flax_llama.sizes import SIZES, LlamaSize, count_params
from optax_gale.pallas import dispatch
from optax_gale.pallas.dispatch import Problem
from optax_gale.training.memory import PARTS

NANO = LlamaSize(64, hidden=16, intermediate=24, layers=2, heads=2, kv_heads=2)
ON_CPU = pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")


@pytest.fixture
def nano(monkeypatch):
    monkeypatch.setitem(SIZES, "nano", NANO)
    return Case("nano", 4)


# --- Shapes, bytes and operations -----


def test_the_matrices_of_a_model_come_from_its_one_table():
    assert shapes.counts("7b") == {(4096, 4096): 128, (4096, 11008): 64, (11008, 4096): 32}
    assert shapes.groups(Case("1b", 512)) == [
        Group(4, 24, 2048, 2048), Group(1, 24, 5461, 2048), Group(2, 24, 2048, 5461),
    ]  # fmt: skip
    assert shapes.groups(Case("1b", 512), padded=True)[1] == Group(1, 24, 5504, 2048)
    assert shapes.groups(Case("60m", 128)) == [
        Group(32, 1, 512, 512), Group(8, 1, 1376, 512), Group(16, 1, 512, 1376),
    ]  # fmt: skip
    assert len(shapes.parameters("60m", stacked=False)) == 56


def test_a_model_that_does_not_fit_is_measured_on_some_of_its_layers():
    weights = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert shapes.layers_that_fit("7b", 13, 13 * weights) == 32
    assert shapes.layers_that_fit("7b", 13, 13 * weights - 1) == 16
    assert shapes.layers_that_fit("7b", 13, 13 * weights // 4) == 8
    assert shapes.layers_that_fit("7b", 13, None) == 32


def test_the_floor_counts_what_a_step_reads_and_writes():
    weights = {"w": jax.ShapeDtypeStruct((3, 8, 6), jnp.bfloat16)}  # 144 numbers, 288 bytes
    tx = arms.gale(2, side="long")
    # Moments 2 x (3, 2, 6) and projector (3, 8, 2) in float32, two counters of 4 bytes.
    moments, projector, counters = 2 * 144, 192, 8
    assert ordinary_step(weights, weights, jax.eval_shape(tx.init, weights)) == Work(
        bytes=2 * 288 + 288 + 2 * (moments + counters) + projector,
        flops=2 * (2 * 144 * 2),
    )
    adamw = arms.ARMS[arms.ADAMW].make(0)
    state = jax.eval_shape(adamw.init, weights)
    assert {x.dtype.name for x in jax.tree.leaves(state) if x.shape} == {"float32"}
    assert ordinary_step(weights, weights, state) == Work(3 * 288 + 2 * (2 * 576 + 4), 0)


def test_the_floor_is_the_longer_of_moving_and_computing():
    ceilings = Ceilings(bandwidth=100.0, matrix_rate=1000.0)
    assert Work(bytes=50, flops=100).floor(ceilings) == 0.5
    assert Work(bytes=50, flops=2000).floor(ceilings) == 2.0


def test_a_kernels_work(nano):
    shape = problems.Shape(Group(2, 3, 8, 6), rank=2, rows=True)
    # G (3, 8, 6) bf16 and P (3, 8, 2) f32 in, two f32 moments (3, 2, 6) through, U bf16 out.
    first = problems.project_update(shape)
    assert first.work == Work(2 * (288 + 192 + 2 * 2 * 144 + 72), 2 * (2 * 144 * 2))
    second = problems.back_project_apply(shape)
    assert second.work == Work(2 * (2 * 288 + 192 + 72), 2 * (2 * 144 * 2))
    known = len(jax.devices()) == 1
    assert first.problem == Problem(
        "project_update", 2, 3, 8, 6, 2, True, "bfloat16", is_known=known
    )
    sides = [(s.group.m, s.group.n, s.rows) for s in problems.shapes_of([nano], ["long", "short"])]
    assert sides == [
        (16, 16, True), (16, 16, False), (24, 16, True), (24, 16, False),
        (16, 24, False), (16, 24, True),
    ]  # fmt: skip
    tasks = list(problems.tasks([nano, Case("nano", 6)], ["long"]))
    factored = [t for t in tasks if t.problem.kernel == "cholesky_and_inverse"]
    assert len(tasks) - len(factored) == 2 * 2 * 3
    # All matrices, a layer's, and one, of either rank.
    assert [(t.problem.batch, t.problem.m) for t in factored] == [
        (batch, rank) for rank in (nano.rank, 6) for batch in (14, 7, 1)
    ]
    assert factored[0].work == Work(3 * 14 * 4 * nano.rank**2, 14 * 2 * nano.rank**3 // 3)
    _, (a,) = factored[0].inputs()
    assert (np.linalg.eigvalsh(a) > 0.5).all()


# --- The arms -----


def test_random_states_look_like_mid_training():
    weights = {"a/kernel": jax.ShapeDtypeStruct((2, 64, 32), jnp.bfloat16)}
    tx = arms.gale(4)
    state = data.state(jax.eval_shape(tx.init, weights), seed=0)
    assert jax.tree.structure(state) == jax.tree.structure(jax.eval_shape(tx.init, weights))
    assert state.count == 1
    p, nu = state.projector["a/kernel"], state.inner_state[0].nu["a/kernel"]
    assert jnp.all(nu > 0)
    np.testing.assert_allclose(jnp.sum(p * p, -2), 1.0, atol=0.8)
    assert len(np.unique(p)) > 0.99 * p.size


@pytest.mark.parametrize("name", [name for name in arms.ARMS if name not in arms.FORCED])
@pytest.mark.quick("GALE", "AdamW, f32 states")
def test_every_arm_takes_a_step_of_the_right_kind(name, nano, quick_compilation):
    arm = arms.ARMS[name]
    weights = shapes.parameters(nano.size, stacked=name != arms.CONTRIB)
    tx = arm.make(nano.rank)
    state = jax.eval_shape(tx.init, weights)
    carry = (data.normal_tree(weights, 0), data.state(state, 1))
    before = jax.tree.map(jnp.copy, carry)
    grads = data.normal_tree(weights, 2)
    program = timing.compiled(arm.step(tx), carry, grads, loops=2)
    params, state = program.run(carry, grads)
    changed = lambda a, b: jax.tree.leaves(jax.tree.map(lambda x, y: bool(jnp.any(x != y)), a, b))
    assert all(changed(params, before[0]))
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16"}
    if arm.low_rank:
        same = lambda tree: [p for _, p in step.floors.projectors(tree)]
        assert same(state) and not any(changed(same(state), same(before[1])))
    dtype = "bfloat16" if name in (arms.CONTRIB, "AdamW, bf16 states") else "float32"
    moments = [x for x in jax.tree.leaves(state) if x.ndim and x.size > 16]
    assert dtype in {x.dtype.name for x in moments}


def test_the_paper_s_formula_is_the_librarys_galore_mode():
    rng = np.random.default_rng(0)
    found = {}
    lr, decay, scale, rank = 1e-3, 0.1, 0.25, 3
    tx = optax_gale.gale_adamw(
        lr, rank, eps=1e-6, weight_decay=decay, scale=scale, range_finder="svd", side="short",
        moments="keep",
    )  # fmt: skip
    settings = galore.Settings(rank, lr, decay, scale, gap=200)
    for name, shape in {"tall": (12, 7), "wide": (7, 12), "square": (8, 8)}.items():
        w, *grads = rng.normal(size=(7, *shape))
        optimizer, found[name] = galore.GaloreAdamW(settings, galore.NumpyOps), w.copy()
        params = {"w": jnp.asarray(w, jnp.float32)}
        state = tx.init(params)
        for g in grads:
            optimizer.step(found[name], g)
            updates, state = tx.update({"w": jnp.asarray(g, jnp.float32)}, state, params)
            params = optax.apply_updates(params, updates)
        moved = np.asarray(params["w"], np.float64) - w
        # The formula decays after the step and adds epsilon elsewhere: a thousandth of the way.
        np.testing.assert_allclose(found[name] - w, moved, atol=2e-3 * np.abs(moved).max())


def test_the_formula_refreshes_once_a_gap():
    rng = np.random.default_rng(1)
    optimizer = galore.GaloreAdamW(galore.Settings(2, 1e-3, 0.0, 1.0, gap=3), galore.NumpyOps)
    w, seen = rng.normal(size=(6, 5)), []
    for _ in range(7):
        optimizer.step(w, rng.normal(size=(6, 5)))
        seen.append(optimizer.projector)
    same = [a is b for a, b in itertools.pairwise(seen)]
    assert same == [True, True, False, True, True, False]


def test_torch_runs_the_same_formula():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    settings = galore.Settings(3, 1e-2, 0.1, 0.25, gap=10)
    for shape in ((9, 6), (6, 9)):
        w, *grads = rng.normal(size=(6, *shape))
        ours, theirs = w.copy(), torch.tensor(w)
        one, other = (galore.GaloreAdamW(settings, x) for x in (galore.NumpyOps, galore.TorchOps))
        for g in grads:
            one.step(ours, g)
            other.step(theirs, torch.tensor(g))
        # The SVD runs in float32 there.
        np.testing.assert_allclose(theirs.numpy(), ours, atol=1e-5)
    weights = [jnp.ones((2, 16, 8)), jnp.ones((8, 16))]
    times, peak = galore.ordinary_times(weights, weights, settings, seconds=0.01, device="cpu")
    assert min(times) > 0 and peak == 4 * 3 * 128
    assert jnp.all(weights[0] == 1)  # torch steps on copies


# --- Timing -----


def test_a_loop_takes_its_steps_and_does_the_work_in_each():
    count = timing.compiled(lambda carry, x: carry + x, jnp.zeros(()), jnp.ones(()), loops=7)
    assert count.run(jnp.zeros(()), jnp.ones(())) == 7
    found, carry = timing.measure(count, jnp.zeros(()), jnp.ones(()), seconds=0.01)
    assert carry >= found.steps and found.steps % 7 == 0
    assert 0 < found.p10 <= found.median <= found.p90


def test_single_steps_run_what_is_chosen():
    calls = []

    def choose(i):
        calls.append(i)
        return lambda carry, fixed: carry + fixed

    times, carry = timing.each_step(choose, jnp.zeros(()), jnp.ones(()), 5)
    assert calls == list(range(5)) and len(times) == 5 and carry == 5


def test_kernels_are_summed_over_the_streams_of_a_trace():
    def node(name, **fields):
        return type("Node", (), {"name": name, **fields})

    event = lambda name, ns: node(name, duration_ns=ns)
    lines = [
        node("Stream #1", events=[event("gemm", 5.0), event("copy", 1.0)]),
        node("Stream #2", events=[event("gemm", 7.0)]),
        node("XLA Ops", events=[event("gemm", 12.0)]),
    ]
    trace = node("", planes=[node("/device:GPU:0", lines=lines), node("/host:CPU", lines=lines)])
    assert profile.device_time(trace) == {"gemm": (2, 12.0), "copy": (1, 1.0)}


# --- Storing and reporting -----


def test_the_store_keeps_what_was_measured_and_knows_when_to_measure_again(tmp_path, monkeypatch):
    path = tmp_path / "a" / "step.json"
    monkeypatch.setenv("OPTAX_GALE_COMMIT", "one")
    store = Store(path, ("part", "size"))
    store.start(bandwidth=1e12, matrix_rate=1e14)
    store.add({"part": "x", "size": "7b", "ms": 1.0})
    store.add({"part": "y", "size": "7b", "error": "out of memory"})
    again = Store(path, ("part", "size"))
    again.start()
    assert again.has(part="x", size="7b")
    assert not again.has(part="y", size="7b") and not again.has(part="x", size="1b")
    monkeypatch.setenv("OPTAX_GALE_COMMIT", "two")
    later = Store(path, ("part", "size"))
    later.start()
    assert not later.has(part="x", size="7b")
    later.add({"part": "x", "size": "7b", "ms": 2.0})
    stored = json.loads(path.read_text())
    commits = [stored["runs"][r["run"]]["commit"] for r in stored["rows"]]
    assert commits == ["one", "two"]
    assert [(r["part"], r.get("ms")) for r in stored["rows"]] == [("y", None), ("x", 2.0)]


def _rows():
    whole = {"size": "7b", "layers": 32, "of_layers": 32, "run": 0}
    some = {**whole, "layers": 2}
    step = {"part": "ordinary", "rank": 128}
    svd = {"part": "svd", "size": "7b", "run": 0}
    return [
        {**whole, **step, "arm": "GALE", "ms": 10.0, "floor_ms": 8.0, "bytes": 3.2e10,
         "peak_bytes": 2**34},
        {**whole, **step, "arm": "AdamW, f32 states", "rank": None, "ms": 30.0, "floor_ms": 20.0},
        {**whole, **step, "arm": "GALE, XLA", "ms": 14.0},
        {**whole, **step, "arm": "GALE, XLA, two calls", "ms": 12.0},
        {**whole, **step, "arm": "GALE, triton", "error": "Boom: no"},
        {**some, **step, "arm": "optax.contrib.galore", "ms": 100.0},
        {**whole, **step, "arm": "galore-torch", "ms": 50.0},
        {**whole, "part": "refresh", "rank": 128, "arm": "GALE", "ms": 26.0,
         "orthogonality": 3e-7},
        {**whole, "part": "refresh", "rank": 128, "arm": "GALE, moments kept", "ms": 22.0,
         "orthogonality": 3e-7},
        {**svd, "arm": "optax.contrib.galore", "ms": 300_000.0},
        {**svd, "arm": "galore-torch", "ms": 200_000.0},
        {**whole, "part": "spread", "rank": 128, "arm": "GALE, staggered", "p50_ms": 10.0,
         "p90_ms": 10.5, "p99_ms": 12.0, "max_ms": 13.0, "mean_ms": 10.1, "steps": 400,
         "times_ms": [10.0, 12.0]},
    ]  # fmt: skip


def test_averages_are_over_a_gap_of_200():
    measured = report.Measured(_rows())
    assert measured.average("7b", 128, "GALE") == pytest.approx((199 * 10 + 26) / 200)
    assert measured.average("7b", 128, "AdamW, f32 states") == 30.0
    assert measured.average("7b", 128, "optax.contrib.galore") == pytest.approx(100 + 1500)
    assert measured.average("7b", 128, "galore-torch") == pytest.approx(50 + 1000)
    assert measured.best_xla("7b", 128) == 12.0
    whole = [{**r, "refresh_step_ms": 500.0} if r["arm"] == "optax.contrib.galore" else r
             for r in _rows()]  # fmt: skip
    average = report.Measured(whole).average("7b", 128, "optax.contrib.galore")
    assert average == pytest.approx((199 * 100 + 500) / 200)


def test_the_tables(tmp_path):
    run = {"device": "NVIDIA H200", "jax": "0.11.2", "optax": "0.2.8", "commit": "abc",
           "torch": "2.11.0", "bandwidth": 4.3e12, "matrix_rate": 7.8e14}  # fmt: skip
    text = report.markdown(_rows(), [run])
    for line in (
        "NVIDIA H200, JAX 0.11.2, Optax 0.2.8, torch 2.11.0, commit abc, copies 4.30 TB/s, "
        "bfloat16 products 780 TFLOP/s.",
        "| GALE | 10 | 8 | 1.25 | 3 | 3.2 | 16 |",
        "| optax.contrib.galore | 100† | – | – | 0.3 | – | –† |",
        "| step, LLaMA-7B, r = 128: ms / floor | ≤ 1.35 | 1.25 | yes |",
        "| step, LLaMA-7B, r = 128: best plain XLA / GALE | ≥ 1.3 | 1.2 | **no** |",
        "| refresh, LLaMA-7B, r = 128: ms for the projectors | ≤ 20 | 12 | yes |",
        "| average over a gap, LLaMA-7B, r = 128: galore-torch / GALE | ≥ 50 | 104 | yes |",
        "| p99 / p50 with staggered refresh, LLaMA-7B, r = 128 | ≤ 1.1 | 1.2 | **no** |",
        "| LLaMA-7B, r = 128 | 12 | 16 | 26 | 3.0e-07 | 300000† | 200000† | 25000 | 16667 | – |",
        "* LLaMA-7B, optax.contrib.galore: 2 of 32 layers.",
        "* Not measured: ordinary, LLaMA-7B, r = 128, GALE, triton: Boom: no",
    ):
        assert line in text.splitlines()
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.M):  # every row as long as its header
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    plot.draw(tmp_path / "step.png", _rows())
    assert (tmp_path / "step.png").stat().st_size > 10_000


def test_tables_of_next_to_nothing():
    run = {"device": "x", "jax": "1", "optax": "1", "commit": ""}
    rows = [{"part": "ordinary", "size": "7b", "rank": 128, "arm": "GALE", "error": "e", "run": 0}]
    text = report.markdown(rows, [run])
    assert "commit unknown" in text and "Not measured" in text


# --- The commands -----


@ON_CPU
@pytest.mark.parametrize(
    "command", [step, kernels, throughput, step_memory], ids=lambda c: c.__name__
)
def test_without_a_gpu_a_command_says_so(command, capsys, tmp_path):
    command.main(command.Config(out=tmp_path / "results"))
    assert capsys.readouterr().out == command.NO_GPU + "\n"
    assert not (tmp_path / "results").exists()


@ON_CPU
def test_without_a_gpu_the_process_exits_cleanly():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.step"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [step.NO_GPU]


@pytest.mark.slow
def test_the_steps_benchmark_measures_once_and_goes_on_where_it_stopped(
    nano, tmp_path, capsys, quick_compilation, monkeypatch
):
    monkeypatch.setattr(step.galore, "has_torch", lambda: False)
    config = step.Config(
        cases=("nano:4",),
        only=("ordinary", "refresh", "rivals", "svd"),
        kept=("nano:4",),
        arms=("GALE", "AdamW, f32 states"),
        seconds=0.01,
        out=tmp_path,
        anywhere=True,
    )
    step.main(dataclasses.replace(config, minutes=0.0))
    assert "0 minutes are over" in capsys.readouterr().out
    step.main(config)
    (stored,) = tmp_path.glob("step_*.json")
    first = json.loads(stored.read_text())
    rows = {(r["part"], r["arm"]): r for r in first["rows"]}
    assert set(rows) == {
        ("ordinary", "GALE"), ("ordinary", "AdamW, f32 states"), ("refresh", "GALE"),
        ("refresh", "GALE, moments kept"),
        ("ordinary", "optax.contrib.galore"), ("svd", "optax.contrib.galore"),
    }  # fmt: skip
    assert not any("error" in r for r in rows.values())
    assert all(r["ms"] > 0 for r in rows.values())
    assert rows["refresh", "GALE"]["orthogonality"] < 1e-5
    assert rows["ordinary", "optax.contrib.galore"]["refresh_step_ms"] > 0  # all layers
    assert sum(r["count"] for r in rows["svd", "optax.contrib.galore"]["shapes"]) == 14
    assert rows["ordinary", "AdamW, f32 states"]["rank"] is None
    capsys.readouterr()
    step.main(config)
    assert "[" not in capsys.readouterr().out.split("#")[0]  # nothing is measured twice
    assert json.loads(stored.read_text())["rows"] == first["rows"]
    assert stored.with_suffix(".md").exists() and stored.with_suffix(".png").exists()


def test_an_arm_that_fails_leaves_the_others_alone(nano, tmp_path, monkeypatch, quick_compilation):
    def broken(rank):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setitem(arms.ARMS, "GALE", arms.Arm(broken, in_place=True))
    config = step.Config(
        cases=("nano:4",), only=("ordinary",), arms=("GALE", "AdamW, f32 states"), seconds=0.01,
        out=tmp_path, anywhere=True,
    )  # fmt: skip
    step.main(config)
    (stored,) = tmp_path.glob("step_*.json")
    rows = {r["arm"]: r for r in json.loads(stored.read_text())["rows"]}
    assert rows["GALE"]["error"] == "RuntimeError: out of memory"
    assert rows["AdamW, f32 states"]["ms"] > 0


@pytest.mark.slow
def test_single_steps_with_refreshes_chosen_by_the_host(nano, tmp_path, quick_compilation):
    config = step.Config(spread_steps=12, out=tmp_path, anywhere=True)
    bench = step.Bench(config, Store(tmp_path / "x.json", step.KEY), Ceilings(1e12, 1e14))
    row = bench.spread(nano, "GALE, chosen by the host")
    assert row["steps"] == len(row["times_ms"]) == 12
    assert 0 < row["p50_ms"] <= row["p99_ms"] <= row["max_ms"]


def test_the_kernels_benchmark_writes_the_table_that_the_dispatch_reads(
    nano, tmp_path, quick_compilation, monkeypatch
):
    table = tmp_path / "measured.json"
    old = {"architecture": "9.9", "device": "x", "times_ms": {"xla": 1.0},
           "problem": {"kernel": "project_update", "leaves": 1, "batch": 1, "m": 8, "n": 8,
                       "rank": 2, "rows": True, "dtype": "bfloat16"}}  # fmt: skip
    table.write_text(json.dumps({"entries": [old]}))
    config = kernels.Config(
        cases=("nano:4",), sides=("long",), implementations=("xla",), seconds=0.01,
        write_dispatch=True, table=table, out=tmp_path / "out", anywhere=True,
    )  # fmt: skip
    kernels.main(config)
    entries = json.loads(table.read_text())["entries"]
    assert old in entries and len(entries) == 1 + 2 * 3 + 3
    assert json.loads((tmp_path / "out" / "measured.json").read_text())["entries"] == entries
    monkeypatch.setattr(dispatch, "_table", lambda: [{**e, "architecture": "9.0"} for e in entries])
    (problem,) = {
        Problem(**e["problem"]) for e in entries
        if e["problem"]["kernel"] == "project_update" and e["problem"]["m"] == 24
    }  # fmt: skip
    assert problem == Problem("project_update", 1, 2, 24, 16, 4, True, "bfloat16")
    assert dispatch.fastest_first(problem, "9.0")[0] == "xla"


def test_the_dispatch_table_holds_valid_times_and_replaces_old_ones():
    problem = {"kernel": "project_update", "leaves": 1, "batch": 2, "m": 64, "n": 32, "rank": 8,
               "rows": True, "dtype": "bfloat16"}  # fmt: skip
    row = lambda name, **fields: {**problem, "implementation": name, "floor_ms": 1.0, **fields}
    rows = [
        row("xla", ms=2.0, error_to_xla=None),
        row("triton", ms=1.5, error_to_xla=4e-3),
        row("mosaic_gpu", ms=0.5, error_to_xla=float("nan")),
    ]
    (entry,) = kernels.entries(rows, "9.0", "H200")
    assert entry["times_ms"] == {"xla": 2.0, "triton": 1.5}
    assert kernels.table(rows).splitlines()[-1] == (
        "| project_update | 1 × 2 × 64 × 32 | rows to 8 | 1 | 2 | 0.5, wrong | **1.5** | triton |"
    )
    older = {**entry, "device": "H100", "times_ms": {"xla": 3.0}}
    other = {**entry, "architecture": "8.0"}
    assert kernels.merged([older, other], [entry]) == [other, entry]
    refused = [row("xla", ms=2.0, error_to_xla=None), row("triton", refused="no")]
    assert kernels.entries(refused, "9.0", "H200")[0]["times_ms"] == {"xla": 2.0}
    assert kernels.entries([row("triton", ms=1.0, error_to_xla=0.0)], "9.0", "H200") == []


# --- The memory of a step -----


def test_the_memory_benchmark_reports_on_the_step_it_takes(nano, monkeypatch, quick_compilation):
    case = step_memory.Case("nano", "adamw", 2, length=8)
    row = step_memory.measure(case)
    assert row["predicted"] == sum(row[part] for part in PARTS)
    assert row["weights"] == 2 * count_params(SIZES["nano"])
    assert row["inputs"] == 2 * 8 * 5 + 4
    assert ("measured" in row) == (jax.default_backend() == "gpu")


def test_the_peak_is_what_came_on_top(monkeypatch):
    parts = dict.fromkeys(PARTS, 0) | {"weights": 100}
    report = optax_gale.StepMemoryReport(
        **parts, told_apart=True, copied=0, platform="gpu", budget=None
    )
    before = {"peak_bytes_in_use": 50, "bytes_in_use": 10}
    row = step_memory.compared(report, before, {"peak_bytes_in_use": 135, "bytes_in_use": 10})
    assert row["measured"] == 125 and row["difference"] == pytest.approx(-0.2)
    void = step_memory.compared(report, before, {"peak_bytes_in_use": 50, "bytes_in_use": 10})
    assert "compiling needed more" in void["error"] and "measured" not in void
    assert "measured" not in step_memory.compared(report, {}, {})


def test_the_memory_benchmark_stores_and_fails_where_it_is_off(tmp_path, capsys, monkeypatch):
    parts = dict.fromkeys(PARTS, 2**28)
    off = {"60m, GALE, f32": 1.0, "60m, AdamW, f32": 1.04, "350m, GALE": 1.06}

    def measured(name, share):
        assert share == 0.95
        if name not in off:
            return {"error": "RuntimeError: no memory"}
        predicted = sum(parts.values())
        row = {**parts, "predicted": predicted, "measured": round(predicted / off[name])}
        return {**row, "difference": off[name] - 1, "told_apart": True}

    monkeypatch.setattr(step_memory, "in_its_own_process", measured)
    run = lambda *cases: step_memory.main(
        step_memory.Config(cases=cases, out=tmp_path, anywhere=True)
    )
    run("60m, GALE, f32", "60m, AdamW, f32")
    (stored,) = tmp_path.glob("step_memory_*.json")
    record = json.loads(stored.read_text())
    assert [row["case"] for row in record["rows"]] == ["60m, GALE, f32", "60m, AdamW, f32"]
    assert record["environment"]["jax"] == jax.__version__
    text = stored.with_suffix(".md").read_text()
    line = "| 60m, GALE, f32 | 64 × 256 | 1.00 | 0.25 | 0.25 | 0.25 | 2.25 | 2.25 | +0.0% |"
    assert line in text.splitlines()
    with pytest.raises(SystemExit, match="off by more than 5%: 350m, GALE; 350m, AdamW"):
        run("60m, GALE, f32", "350m, GALE", "350m, AdamW")
    assert "* Not measured: 350m, AdamW: RuntimeError: no memory" in capsys.readouterr().out


def test_every_case_can_be_built():
    for case in step_memory.CASES.values():
        assert optimizers.recipe_of(case.optimizer) and case.size in SIZES
        assert case.length % case.chunks == 0


@ON_CPU
def test_a_case_that_fails_in_its_process_is_told():
    assert "no such case" in step_memory.in_its_own_process("no such case")["error"]


# --- Traffic -----


@pytest.mark.slow
@pytest.mark.usefixtures("nano", "quick_compilation")
def test_devices_average_projections_in_the_place_of_gradients(tmp_path, capsys):
    traffic.main(traffic.Config(size="nano", rank=4, devices=2, out=tmp_path))
    sent = json.loads((tmp_path / "traffic_nano.json").read_text())["bytes"]
    matrices = list(shapes.matrices("nano").values())
    assert sent["AdamW"] == 4 * sum(layers * m * n for layers, m, n in matrices)
    projections = 4 * 4 * sum(layers * max(m, n) for layers, m, n in matrices)
    sketches = 4 * 4 * sum(layers * min(m, n) for layers, m, n in matrices)
    assert sent["GALE"] == projections
    assert sent["GALE, a refresh, no power iteration"] == projections + sketches
    assert sent["GALE, a refresh"] == 2 * (projections + sketches)
    halved = sent["GALE, a refresh, sketches in bfloat16"]
    assert halved == projections + (projections + 2 * sketches) // 2
    assert "of AdamW's" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("nano", "quick_compilation")
def test_what_is_counted_must_be_what_is_compiled(monkeypatch):
    monkeypatch.setattr(traffic, "averaged_arrays", lambda program: [])
    with pytest.raises(RuntimeError, match=r"^0 numbers are averaged as traced, \d+ as compiled$"):
        traffic.reduced(
            traffic.Config(size="nano", rank=4, devices=2), optax.adamw(1e-3), None, False
        )
