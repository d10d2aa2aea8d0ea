"""The parts of a run: prefetching, metrics, the meter, validation, pictures."""

import functools
import json
import math

import chex
import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import optax_gale
from examples.flax_llama import step
from examples.flax_llama.errors import UserError
from examples.flax_llama.memory import Breakdown
from examples.flax_llama.meter import DivergedError, Meter
from examples.flax_llama.metrics import (
    Display,
    MetricsLog,
    human_bytes,
    peak_memory,
    read_records,
    replace_text,
)
from examples.flax_llama.model import Llama, next_token_loss
from examples.flax_llama.plots import Curves, plot_comparison, plot_run
from examples.flax_llama.prefetch import Prefetch
from examples.flax_llama.step import Evaluation, make_evaluate


class Counting:
    """An iterator like Grain's."""

    def __init__(self, end):
        self.at, self.end = 0, end

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == self.end:
            raise OSError("the data is gone")
        self.at += 1
        return {"tokens": np.array(self.at)}

    def get_state(self):
        return {"at": self.at}


def test_prefetch_knows_the_position_of_what_it_handed_out():
    prefetch = Prefetch(Counting(100), depth=8)
    assert prefetch.position == {"at": 0}
    for expected in (1, 2, 3):
        assert int(next(prefetch)["tokens"]) == expected
        assert prefetch.position == {"at": expected}
    prefetch.close()


def test_prefetch_hands_errors_over():
    prefetch = Prefetch(Counting(1))
    next(prefetch)
    with pytest.raises(OSError, match="the data is gone"):
        next(prefetch)
    prefetch.close()


def test_metrics_after_the_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "step": step, "loss": 1.0}) for step in (1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"kind": "train", "st')  # a kill in the middle of a line
    log = MetricsLog(tmp_path, step=2, tensorboard=False)
    log.write("train", 3, {"loss": 5.0})
    log.close()
    assert [(r["step"], r["loss"]) for r in read_records(path)] == [(1, 1.0), (2, 1.0), (3, 5.0)]


@pytest.mark.parametrize(
    "line",
    [
        *(b"\xff", b"3", b"{", b"[]", b'{"kind": "train"}', b'{"kind": "other", "step": 1}'),
        *(b'{"kind": "train", "step": 1}', b'{"kind": "train", "step": "1", "loss": 2.0}'),
    ],
)
def test_what_is_not_a_record_is_named(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "train", "step": 1, "loss": 2.0}\n' + line + b"\n")
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: not a record"):
        MetricsLog(tmp_path, step=2, tensorboard=False)
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: not a record"):
        Curves.read(path)


def make_meter(folder):
    log = MetricsLog(folder, step=0, tensorboard=False)
    display = Display(Console(quiet=True), steps=9, start=0, bar=True)
    meter = Meter(log, display, step=0, tokens_per_step=10, seconds=0.0)
    meter.run()
    return meter


def scalars(loss):
    values = {"loss": loss, "grad_norm": 1.0, "learning_rate": 0.1}
    return {key: jnp.float32(value) for key, value in values.items()}


def test_meter_leaves_the_last_step_for_later(tmp_path):
    meter = make_meter(tmp_path)
    for loss in (3.0, 2.0, 1.0):
        meter.add(scalars(loss))
    meter.report(leave=1)
    path = tmp_path / "metrics.jsonl"
    assert [(r["kind"], r["step"]) for r in read_records(path)] == [
        ("train", 1),
        ("train", 2),
        ("speed", 2),
    ]
    meter.report()
    losses = [r["loss"] for r in read_records(path) if r["kind"] == "train"]
    assert losses == [3.0, 2.0, 1.0]
    assert meter.seconds > 0


def test_meter_names_the_step_that_diverged(tmp_path):
    meter = make_meter(tmp_path)
    meter.add(scalars(1.0))
    meter.add(scalars(math.nan))
    with pytest.raises(DivergedError, match="at step 2"):
        meter.report()


def test_validation_counts_tokens_not_batches():
    model = Llama(conftest.NANO)
    tokens = jax.random.randint(jax.random.key(0), (4, 8), 0, 300)
    params = jax.jit(model.init)(jax.random.key(1), tokens)["params"]
    mask = jnp.arange(8)[None, :] < jnp.array([[8], [3], [5], [0]])  # the last row only fills up
    batches = [
        {"tokens": tokens[:2], "mask": mask[:2]},
        {"tokens": tokens[2:], "mask": mask[2:]},
    ]
    evaluation = make_evaluate(model)(params, batches)
    whole = jax.jit(functools.partial(next_token_loss, model))
    total, count = whole(params, {"tokens": tokens, "mask": mask})
    assert evaluation.tokens == int(count) == 7 + 2 + 4
    assert evaluation.loss == pytest.approx(float(total / count), rel=1e-6)
    assert evaluation.perplexity == pytest.approx(math.exp(evaluation.loss))
    assert Evaluation(1e9, 1).perplexity == math.inf


def test_curves_interpolate_time(tmp_path):
    rows = [{"kind": "train", "step": s, "loss": float(s)} for s in (1, 2, 3, 4)]
    rows += [{"kind": "speed", "step": s, "seconds": 3.0 * s} for s in (2, 4)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    curves = Curves.read(tmp_path / "m.jsonl")
    np.testing.assert_allclose(curves.seconds, [3.0, 6.0, 9.0, 12.0])
    np.testing.assert_allclose(curves.smooth, curves.losses)
    assert len(curves.validation_steps) == 0


def test_names_are_not_formulas(tmp_path):
    curves = Curves(*(np.ones(3) for _ in Curves._fields))
    for name in (r"$\frac$", "$a", r"\$b$"):
        parts = {name: Breakdown(4, 4, 8, 0)}
        plot_comparison(tmp_path / "names.png", {name: curves}, parts)
    assert (tmp_path / "names.png").exists()


def test_a_full_disk_is_told_with_the_file(tmp_path):
    curves = Curves(*(np.ones(3) for _ in Curves._fields))
    with conftest.small_files(100):
        with pytest.raises(UserError, match=r"cannot write .*result.json: File too large; make"):
            replace_text(tmp_path / "result.json", "x" * 1000)
        with pytest.raises(UserError, match=r"cannot write .*report.png: File too large; make"):
            plot_run(tmp_path / "report.png", curves, Breakdown(4, 4, 8, 0))


def test_memory_is_counted():
    assert peak_memory() > 2**20
    assert human_bytes(1536) == "1.50 KiB"
    assert human_bytes(5 * 2**40) == "5120.00 GiB"


@pytest.mark.parametrize("piece", [2000, step._PIECE])
@pytest.mark.quick("134217728")
def test_the_first_state_is_the_same_made_in_pieces(piece, monkeypatch):
    monkeypatch.setattr(step, "_PIECE", piece)
    model = Llama(conftest.NANO, param_dtype=jnp.bfloat16)
    tx = optax_gale.gale_adamw(0.1, 4, state_dtype="int8", projector_dtype="int4")
    arguments = (model, tx, 3, step.Walk(layerwise=True, clip_norm=1.0, clip="previous"))
    wanted = step.trace_init(*arguments).lower().compile()()
    found = step.first_state(*arguments)
    chex.assert_trees_all_equal(found, wanted, strict=True)
    assert len({x.unsafe_buffer_pointer() for x in jax.tree.leaves(found)}) == len(
        jax.tree.leaves(found)
    )  # to be donated


def test_pieces_are_small_and_what_is_not_in_layers_comes_first():
    shapes = {
        "embed": jax.ShapeDtypeStruct((2**27,), jnp.bfloat16),
        "layers": [jax.ShapeDtypeStruct((2**25,), jnp.bfloat16)] * 3,
        "lm_head": jax.ShapeDtypeStruct((2**4,), jnp.bfloat16),
    }
    paths, _ = jax.tree_util.tree_flatten_with_path(shapes)
    assert step._pieces(paths) == [[0], [4, 1], [2, 3]]
