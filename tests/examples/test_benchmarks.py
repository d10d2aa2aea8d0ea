"""What the benchmarks measure, on problems small enough for every run of the tests."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import optax_gale
from benchmarks import memory, projector_precision, range_finders, training
from examples.flax_llama import compare
from examples.flax_llama.data import DataConfig
from examples.flax_llama.model import Llama
from examples.flax_llama.sizes import get_size

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.slow
def test_the_sketch_captures_what_the_svd_does_of_a_training_models_gradients(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(page.read_text() for page in sorted(DOCS.glob("*.md"))))
    data = DataConfig(
        source="text", path=text, vocab_size=512, sequence_length=64, cache_dir=tmp_path / "cache"
    )
    config = range_finders.Config(at=(1, 12), batch_size=4, data=data)
    at = range_finders.gradients(config)
    assert set(at) == {1, 12}
    rank = get_size("tiny").hidden // 4
    best, _ = range_finders.measure("svd", at, rank, repeats=1)
    default, _ = range_finders.measure("gale", at, rank, repeats=1)
    random, _ = range_finders.measure("random", at, rank, repeats=1)
    for step in at:
        assert 0.98 * best[step] <= default[step] <= best[step] * (1 + 1e-5)
        assert random[step] < 0.5 * best[step]  # or the gradients say nothing


def test_fewer_bits_of_a_projector_cost_what_they_cost():
    rows = {row["dtype"]: row for row in projector_precision.measure(64, 96, 16, 0.7)}
    off = [rows[name]["orthogonality"] for name in ("float32", "bfloat16", "int8", "int4")]
    assert off == sorted(off) and off[0] < 1e-5 and off[2] < 0.02 and off[3] < 0.3
    assert rows["int8"]["energy"] > 0.9995 and 0.97 < rows["int4"]["energy"] < 0.999


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.quick("bfloat16")
def test_the_report_on_7b_counts_what_init_would_make(dtype):
    model = Llama(get_size("7b"), dtype=dtype, param_dtype=dtype)
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    for tx in memory.optimizers((128, 1024), jnp.dtype(dtype)).values():
        report = optax_gale.memory_report(tx, params)
        arrays = jax.tree.leaves(jax.eval_shape(tx.init, params))
        assert report.state == sum(x.size * x.dtype.itemsize for x in arrays)
        assert report.weights == 6_738_415_616 * jnp.dtype(dtype).itemsize


@pytest.mark.parametrize("suite", list(training.SUITES))
def test_every_run_can_be_parsed_and_has_a_folder_of_its_own(suite):
    config = training.Config(suite=suite, train=Path("a.npy"), validation=Path("b.npy"))
    planned = training.planned(config)
    assert {arm for _, arm, _ in planned} == set(training.SUITES[suite])
    runs = [compare.parse_arms(training.comparison(config, *run))[0] for run in planned]
    assert len({run.name for run in runs}) == len(planned)
    assert [run.options[0].learning_rate for run in runs] == [rate for _, _, rate in planned]


def test_the_table_takes_means_over_seeds_and_marks_the_best():
    run = lambda arm, rate, seed, loss: {
        "arm": arm, "learning_rate": rate, "seed": seed, "loss": loss, "optimizer_bytes": 2**20,
    }  # fmt: skip
    runs = [
        *(run("AdamW", 1e-3, seed, loss) for seed, loss in enumerate((4.0, 5.0))),
        *(run("AdamW", 2e-3, seed, loss) for seed, loss in enumerate((3.0, None))),
        run("GALE", 2e-3, 0, 4.25),
    ]
    assert training.table("tiny", runs).splitlines()[2:] == [
        "| AdamW | **4.500 ± 0.500** | diverged | 1.00 |",
        "| GALE |  | **4.250** | 1.00 |",
    ]
