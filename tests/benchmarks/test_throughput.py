"""What the benchmark of training steps measures, at sizes where times say nothing."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from benchmarks import throughput
from benchmarks.gpu import link, scaling, training_step
from benchmarks.gpu.arms import ADAMW, GALE
from benchmarks.gpu.store import Store
from benchmarks.gpu.training_step import AVERAGED, Case
from examples.flax_llama.errors import UserError
from examples.flax_llama.sizes import SIZES, LlamaSize

NANO = LlamaSize(64, hidden=16, intermediate=24, layers=2, heads=2, kv_heads=2)
CASE = Case("nano", 4, ADAMW, batch=2, length=8, attention_backend="xla", blocks=1, steps=1)
ON_CPU = pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
TWO = pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")


@pytest.fixture
def nano(monkeypatch):
    monkeypatch.setitem(SIZES, "nano", NANO)
    monkeypatch.setitem(throughput.RANKS, "nano", 4)


@pytest.fixture
def config(nano, tmp_path):
    return throughput.Config(
        sizes=("nano",), arms=(ADAMW, GALE), batch=2, length=8, blocks=1, steps=1,
        attention_backend="xla", link_mib=(1,), out=tmp_path, anywhere=True,
    )  # fmt: skip


@pytest.fixture
def in_this_process(monkeypatch):
    """Other processes would not know the model."""
    monkeypatch.setattr(
        throughput, "in_its_own_process", lambda case, _: training_step.measure(case)
    )


def stored(config):
    (file,) = config.out.glob("throughput_*.json")
    return json.loads(file.read_text()), file.with_suffix(".md").read_text()


# --- A case -----


def test_one_device_trains(config, in_this_process, quick_compilation):
    throughput.main(config)
    record, text = stored(config)
    adamw, gale = record["rows"]
    assert adamw["tokens_per_second"] == pytest.approx(16e3 / adamw["ordinary_ms"])
    mean = (199 * gale["ordinary_ms"] + gale["refresh_ms"]) / 200
    assert gale["tokens_per_second"] == pytest.approx(16e3 / mean)
    assert (
        adamw["mesh"] is None and adamw["ordinary_sent"] == {} and record["runs"][0]["link"] == []
    )
    assert "GALE, r = 4" in text and "Several devices" not in text


@TWO
def test_a_mesh_trains_on_as_many_sequences_a_device(nano, quick_compilation):
    row = training_step.measure(dataclasses.replace(CASE, mesh="fsdp=2"))
    assert row["tokens_per_second"] == pytest.approx(2 * 16e3 / row["ms"])
    assert "all-gather" in row["ordinary_sent"]


@TWO
@pytest.mark.slow
def test_averaged_projections_send_less(nano, quick_compilation):
    adamw = dataclasses.replace(CASE, mesh="data=2")
    averaged = training_step.measure(dataclasses.replace(adamw, arm=AVERAGED))
    sent = [sum(averaged[f"{kind}_sent"].values()) for kind in ("ordinary", "refresh")]
    assert {*averaged["ordinary_sent"]} == {"all-reduce"}
    assert sent[0] < sum(training_step.measure(adamw)["ordinary_sent"].values())
    assert sent[0] < sent[1]


def test_a_case_that_fails_keeps_its_plan(nano, monkeypatch, quick_compilation):
    def fail(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand more")

    monkeypatch.setattr(training_step, "first_state", fail)
    row = training_step.measure(CASE)
    assert row["error"] == "RuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert row["ordinary_peak_bytes"] > 0 and "ms" not in row


def test_the_allocators_peak_is_the_cases_own():
    counts = lambda peak, held: {"peak_bytes_in_use": peak, "bytes_in_use": held}
    peak = training_step._allocators_peak
    assert peak([counts(50, 10)] * 2, [counts(90, 10), counts(95, 10)]) == {
        "allocated_peak_bytes": 85
    }
    assert peak([counts(50, 10)], [counts(50, 10)]) == {}  # compiling needed more
    assert peak([], []) == {}


# --- The command -----


def test_meshes_and_batches_make_the_cases(config):
    arms = (ADAMW, GALE, AVERAGED)
    config = dataclasses.replace(config, arms=arms, meshes=("data=1", "data=2", "fsdp=2"))
    found = [(case.mesh, case.arm, case.batch) for case in throughput.cases(config)]
    pairs = [(None, 2), ("data=2", 2), ("fsdp=2", 2)]
    every = [(mesh, arm, batch) for mesh, batch in pairs for arm in arms]
    assert found == [c for c in every if c[1] != AVERAGED or c[0] == "data=2"]
    shared = throughput.cases(dataclasses.replace(config, global_batch=4, rank=3, remat=True))
    assert {(case.mesh, case.batch) for case in shared} == {(None, 4), ("data=2", 2), ("fsdp=2", 2)}
    assert {(case.rank, case.remat) for case in shared} == {(3, True)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meshes": ("fsdp=2",), "global_batch": 3}, "--global-batch 3 cannot be shared by the 2"),
        ({"arms": ("GALLE",)}, "no arm 'GALLE'; choose from: AdamW, f32 states; GALE; "),
        ({"sizes": ("13b",)}, "--rank is needed for the size '13b'"),
    ],
)
def test_options_that_make_no_sense(changes, message, config):
    with pytest.raises(UserError, match=message):
        throughput.cases(dataclasses.replace(config, **changes))


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("data=512", f"--meshes data=512 is of 512 devices, and there are {jax.device_count()}"),
        ("date=2", "must read like data=2"),
    ],
)
def test_a_mesh_that_cannot_be_had_is_one_line(mesh, message, config):
    with pytest.raises(SystemExit, match=message):
        throughput.main(dataclasses.replace(config, meshes=("data=1", mesh)))
    assert not [*config.out.iterdir()]


@ON_CPU
def test_a_case_runs_in_its_own_process(config, capsys):
    config = dataclasses.replace(config, sizes=("tiny",), arms=(ADAMW,), meshes=("data=2",))
    throughput.main(config)
    record, text = stored(config)
    (row,), (run,) = record["rows"], record["runs"]
    assert row["mesh"] == "data=2" and row["tokens_per_second"] > 0
    assert [r["collective"] for r in run["link"]] == ["all-reduce", "all-gather", "reduce-scatter"]
    assert "Several devices" in text and "| all-reduce | 2 | 1 |" in text
    capsys.readouterr()
    throughput.main(config)
    assert capsys.readouterr().out == ""  # it is not measured twice


def test_a_process_that_ends_badly_is_a_row(monkeypatch):
    def run(*_, timeout, **__):
        if timeout == 1.0:
            raise throughput.subprocess.TimeoutExpired("", timeout)
        return SimpleNamespace(returncode=-9, stdout="")

    kept = {name: getattr(throughput.subprocess, name) for name in ("TimeoutExpired", "PIPE")}
    monkeypatch.setattr(throughput, "subprocess", SimpleNamespace(run=run, **kept))
    assert throughput.in_its_own_process(CASE, 1.0) == {"error": "given up after 1 s"}
    assert throughput.in_its_own_process(CASE, 2.0) == {"error": "ended with status -9"}
    assert throughput.link_of(2, (1,), 2.0) == []


def test_a_process_sees_as_many_gpus_as_its_mesh_has(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    seen = [throughput.environment(n)["CUDA_VISIBLE_DEVICES"] for n in (1, 2)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    seen += [throughput.environment(n)["CUDA_VISIBLE_DEVICES"] for n in (1, 2)]
    assert seen == ["0", "0,1", "5", "5,3"]


# --- The tables -----


def row(arm, mesh=None, **found):
    key = {"size": "1b", "rank": 512, "arm": arm, "batch": 4, "length": 256, "run": 0}
    return {**key, "mesh": mesh, "remat": None, **found}


def timed(ms, tokens, peak=100, **more):
    return {
        "ordinary_ms": ms,
        "ms": ms,
        "tokens_per_second": tokens,
        "ordinary_peak_bytes": peak,
    } | more


def test_a_mesh_is_compared_with_one_device():
    here = [{"devices": 2, "mib": 64, "collective": "all-reduce", "bytes_per_second": 5.0}]
    here += [{"devices": 2, "mib": 1024, "collective": c, "bytes_per_second": rate}
             for c, rate in (("all-reduce", 100.0), ("all-gather", 50.0))]  # fmt: skip
    alone = row(GALE, **timed(1000.0, 10.0))
    whole = row(GALE, batch=8, error="out of memory", ordinary_peak_bytes=200)
    sent = {"ordinary_sent": {"all-reduce": 20.0}, "refresh_sent": {"all-to-all": 20.0}}
    many = row(AVERAGED, "data=2", **timed(1100.0, 18.0, peak=90, refresh_peak_bytes=110, **sent))
    rows = [alone, whole, many]
    found = scaling.scaling(many, rows, here)
    assert found.speed_up == 1.8 and found.memory == 0.55
    # 0.2 s on the link in an ordinary step; 0.4 s in one of 200, at the slowest rate.
    assert found.without_overlap == pytest.approx(2 / (1 + 0.2 + 0.2 / 200))
    assert scaling.scaling(many, rows, []).without_overlap is None
    assert scaling.scaling(many, [many], here) == (None, None, None)
    failed = row(GALE, "data=2", error="x", ordinary_peak_bytes=100, ordinary_sent={})
    assert scaling.scaling(failed, [*rows, failed], here) == (None, 2.0, 0.5)


def test_rows_of_before_there_were_meshes_are_those_of_one_device(tmp_path):
    known = row(ADAMW, size="350m", batch=64, **timed(100.0, 163e3))
    old = {k: v for k, v in known.items() if k not in ("mesh", "remat", "attention_backend")}
    run = {"device": "x", "jax": "1", "optax": "1", "commit": ""}
    file = tmp_path / "stored.json"
    file.write_text(json.dumps({"runs": [run], "rows": [old]}))
    store = Store(file, scaling.KEY)
    assert store.get(**{f: known.get(f) for f in scaling.KEY}) == old
    assert "| LLaMA-350M, 64 × 256 | AdamW, f32 states |" in scaling.text(store.rows, store.runs)


def test_what_is_stored_of_several_devices_can_be_tabulated():
    path = Path(__file__).parents[2] / "benchmarks/results/throughput_nvidia-h200.json"
    record = json.loads(path.read_text())
    text = scaling.text(record["rows"], record["runs"])
    assert text + "\n" == path.with_suffix(".md").read_text()
    assert "## Several devices" in text


def test_the_tables_say_what_failed():
    run = {"device": "x", "jax": "1", "optax": "1", "commit": "", "flags": "--xla_a=1"}
    rows = [row(ADAMW, "fsdp=2", error="out of memory", remat=True, ordinary_peak_bytes=2**30)]
    text = scaling.text(rows, [run])
    assert "* LLaMA-1B, 4 × 256, recomputed, fsdp=2, AdamW, f32 states: out of memory" in text
    assert "XLA_FLAGS --xla_a=1" in text


# --- The link -----


@TWO
@pytest.mark.parametrize("collective", ["all-reduce", "all-gather", "reduce-scatter"])
def test_a_collective_sends_what_the_ring_does(collective):
    found = link.measure(2, 1, collective)
    # On a CPU bfloat16 is added up in float32.
    widths = (1, 2) if jax.default_backend() == "cpu" else (1,)
    part = 2 if collective == "all-reduce" else 1
    assert found["sent"] in [part * width * 2**19 for width in widths]
    assert found["bytes_per_second"] == pytest.approx(1e3 * found["sent"] / found["ms"])


def test_the_link_needs_devices():
    with pytest.raises(SystemExit, match="--devices must be from 2"):
        link.main(link.Config(devices=1))
