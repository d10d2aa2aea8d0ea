"""On many devices: the numbers of one, parts of the weights, and nothing else sent for the rest."""

import functools
import re
import types
from collections import Counter, defaultdict

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import optax_gale
from examples.flax_llama import cli, data, optimizers, processes, train
from examples.flax_llama.config import (
    DeviceOptions,
    ModelOptions,
    OptimizerOptions,
    TrainConfig,
    TrainingOptions,
)
from examples.flax_llama.data import DataConfig
from examples.flax_llama.layout import Layout, bytes_on_a_device, shaped
from examples.flax_llama.metrics import human_bytes, read_records
from examples.flax_llama.model import Llama, next_token_loss
from examples.flax_llama.sizes import LlamaSize, count_params
from examples.flax_llama.step import first_state, make_train_step, trace_init
from examples.flax_llama.step_memory import batch_shapes
from optax_gale.pallas import dispatch
from optax_gale.pallas.back_project_apply import xla as back_project_apply
from optax_gale.pallas.project_update import xla as project_update

STEPS, GAP = 100, 15
# Matrices larger than whatever has the rank's size, and heads for 8 devices.
WIDE = LlamaSize(304, hidden=64, intermediate=150, layers=2, heads=8, kv_heads=8, padding=10)

pytestmark = [
    pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices"),
    pytest.mark.usefixtures("even"),
]


def numbers_in_memory(size):
    """The parameters, and the padding of three matrices a layer."""
    return count_params(size) + 3 * size.layers * size.hidden * size.padding


@pytest.fixture(autouse=True, scope="module")
def wide():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(conftest.SIZES, "wide", WIDE)
        yield


@pytest.fixture(scope="module")
def losses(corpus_folder, tmp_path_factory):
    """Trains with some options; returns every step's loss, and the last validation's."""

    @functools.cache
    def run(**changes):
        folder = tmp_path_factory.mktemp("run")
        options = conftest.even_options(corpus_folder)
        changes = {"steps": STEPS, "update_proj_gap": GAP, **changes}
        assert cli.main(["train", *conftest.words(options, **changes, out=folder)]) == 0
        records = read_records(folder / "metrics.jsonl")
        found = [r["loss"] for r in records if r["kind"] in ("train", "validation")]
        assert len(found) == STEPS + 1
        return np.array(found)

    return run


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        pytest.param("data=8", {}, marks=pytest.mark.slow),
        pytest.param("fsdp=8", {}, marks=pytest.mark.slow),
        ("data=2,fsdp=2,tensor=2", {}),
        pytest.param("data=2,fsdp=4", {"host_refresh": True}, marks=pytest.mark.slow),
        pytest.param("fsdp=8", {"layerwise": True}, marks=pytest.mark.slow),
        pytest.param("data=2,fsdp=2,tensor=2", {"micro_batches": 2}, marks=pytest.mark.slow),
        pytest.param("data=8", {"average": "projections", "clip_norm": 0}, marks=pytest.mark.slow),
        ("data=8", {"average": "projections", "clip_norm": 0, "layerwise": True}),
    ],
)
def test_the_losses_of_one_device(mesh, options, losses):
    # The order of updates is all that is different layer by layer; a projection is linear.
    same = ("layerwise", "average")
    alone = losses(**{k: v for k, v in options.items() if k not in same})
    np.testing.assert_allclose(losses(mesh=mesh, **options), alone, rtol=1e-4)
    assert alone[-1] < alone[0] - 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "options", "tolerance"),
    [
        # Where another order of adding moves a number over the edge between two codes, it moves by
        # a step of the code: 1/127 of the block's largest, and 1/7 with 4 bits. Weights in 8 bits
        # are rounded at random, and are on such an edge more often.
        ("fsdp=8", {"state_dtype": "int8", "projector_dtype": "int8"}, 1e-3),
        (
            "fsdp=4,tensor=2",
            {
                "state_dtype": "int8",
                "projector_dtype": "int4",
                "param_dtype": "int8",
                "layerwise": True,
                "select": "down",
            },
            2e-2,
        ),
    ],
)
def test_the_losses_of_one_device_in_few_bits(mesh, options, tolerance, losses):
    alone = losses(**options)
    got = losses(mesh=mesh, **options)
    np.testing.assert_allclose(got, alone, rtol=tolerance)
    np.testing.assert_allclose(got[:GAP], alone[:GAP], rtol=tolerance / 10)
    assert alone[-1] < alone[0] - 1


# --- What is printed, and what lies where ---


def printed(capsys, options, folder, **changes):
    """What a run of one step prints."""
    kept = {k: v for k, v in options.items() if k not in ("rank", "select")}
    changes = {"optimizer": "sgd", "momentum": 0.9, "steps": 1, **changes}
    assert cli.main(["train", *conftest.words(kept, **changes, out=folder)]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_mesh_memory_and_traffic_are_printed(corpus_folder, tmp_path, capsys):
    options = conftest.even_options(corpus_folder)
    out = printed(capsys, options, tmp_path / "data", mesh="data=8")
    assert "Mesh: data 8, fsdp 1, tensor 1; 8 × cpu." in out
    size = 4 * numbers_in_memory(conftest.EVEN)
    assert f"holds {human_bytes(size)} of weights and {human_bytes(size + 4)} of the opt" in out
    sent = re.search(r"needs [\d.]+ KiB in a step, and sends ([\d.]+) KiB in one\.", out)
    # All gradients are summed, in a ring; besides them only numbers like the loss.
    assert float(sent[1]) == pytest.approx(2 * size * 7 / 8 / 1024, rel=1e-3)
    assert "Not divisible" not in out

    out = printed(capsys, options, tmp_path / "fsdp", mesh="fsdp=8")
    norms = 4 * conftest.EVEN.hidden * (2 * conftest.EVEN.layers + 1)
    assert f"holds {human_bytes((size - norms) // 8 + norms)} of weights" in out


def test_what_cannot_be_divided_is_held_in_full_and_named(nano, tmp_path, capsys):
    out = printed(capsys, nano, tmp_path, mesh="tensor=8")
    assert "Not divisible by the mesh, and held in full: embed/embedding, lm_head/kernel." in out
    # The matrix is a neighbour of those that can be.
    made = Layout.of({"data": 1, "fsdp": 1, "tensor": 8})
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32)
              for name, shape in (("lm_head", (16, 300)), ("query", (2, 16, 16)))}  # fmt: skip
    parts = jax.tree.map(lambda x, where: where.shard_shape(x.shape), shapes, made.weights(shapes))
    assert parts == {"lm_head": (16, 300), "query": (2, 16, 2)}


def test_without_tensor_the_side_that_is_not_projected_is_divided():
    kernels = lambda **shapes: {
        name: jax.ShapeDtypeStruct((2, *shape), jnp.float32) for name, shape in shapes.items()
    }

    def specs(side, **layers):
        layout = Layout.of({"data": 1, "fsdp": 2, "tensor": 1}, side=side)
        where = layout.weights({"layers": kernels(**layers), **kernels(lm_head=(64, 320))})
        assert tuple(where.pop("lm_head").spec) == rows
        return {name: tuple(x.spec) for name, x in where["layers"].items()}

    rows, columns = (None, "fsdp", None), (None, None, "fsdp")
    shapes = {"out": (64, 64), "gate": (64, 160), "down": (160, 64)}
    assert specs("short", **shapes) == {"out": rows, "gate": columns, "down": rows}
    assert specs("long", **shapes) == {"out": columns, "gate": rows, "down": columns}
    # A width that cannot be divided; the other side can.
    wide = 5461
    assert specs("short", gate=(64, wide), down=(wide, 64)) == {"gate": rows, "down": columns}


def test_projectors_are_whole_where_kernels_save_more():
    """A kernel makes no update of a stack, of which the largest is the measure."""
    axes = {"data": 1, "fsdp": 4, "tensor": 1}
    shapes = {"layers": {"gate": (8, 64, 160)}, "lm_head": (64, 4096)}
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes, is_leaf=lambda x: isinstance(x, tuple),
    )  # fmt: skip
    select = {"layers": {"gate": True}, "lm_head": False}
    whole, shared = (None, None), (None, "fsdp")
    for kernels, rank, spec in ((True, 8, whole), (True, 60, shared), (False, 8, shared)):
        layout = Layout.of(axes, kernels=kernels)
        tx = optax_gale.gale_adamw(1e-3, rank, select=select)
        state = layout.state(tx.init, params)
        assert tuple(state.projector["layers"]["gate"].spec)[:2] == spec
        assert tuple(state.inner_state[0].mu["layers"]["gate"].spec) == (None, None, "fsdp")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"host_refresh": True}, True),
        ({}, False),
        ({"host_refresh": True, "layerwise": True}, False),
    ],
    ids=str,
)
def test_kernels_can_serve_where_the_host_refreshes_whole_models(options, expected):
    config = TrainConfig(training=TrainingOptions(**options), devices=DeviceOptions(mesh="fsdp=8"))
    assert train.layout_of(config, {"side": "long"}) == Layout.of(
        {"data": 1, "fsdp": 8, "tensor": 1}, side="long", kernels=expected
    )


class Compiled:
    """The compiled steps of `WIDE` on a mesh, of a run that the host refreshes."""

    def __init__(self, mesh, corpus_folder, average="gradients", **options):
        config = TrainConfig(
            optimizer="gale_adamw",
            optimization=OptimizerOptions(rank=4, refresh_schedule="together", **options),
            training=TrainingOptions(batch_size=8, average=average, host_refresh=True),
            model=ModelOptions(size="wide", dtype="float32"),
            data=DataConfig(
                source="text",
                path=corpus_folder,
                cache_dir=corpus_folder / "cache",
                vocab_size=WIDE.vocab_size,
                sequence_length=16,
            ),
            devices=DeviceOptions(mesh=mesh),
        )
        self.trainer = train.Trainer(config, data.load(config.data), Console(quiet=True))
        self.layout = self.trainer.layout
        shapes = batch_shapes((8, 16))
        self.batch = shaped(shapes, dict.fromkeys(shapes, self.layout.batch))
        self.step = functools.cache(self._step)

    @functools.cached_property
    def model_alone(self):
        """The traffic of the forward and backward pass: gradients lie as the weights do."""
        t = self.trainer
        loss = lambda params, batch: next_token_loss(t.model, params, batch)[0]
        where = (self.layout.whole, t.shardings.params)
        both = jax.jit(jax.value_and_grad(loss), out_shardings=where)
        return optax_gale.traffic_report(both, t.shapes.params, self.batch)

    def _step(self, refresh):
        t = self.trainer
        rate = optimizers.schedule(1e-2, t.config.training)
        shardings = (t.shardings, self.layout.whole)
        step = make_train_step(t.model, t.tx, rate, 1, t.walk, shardings)
        return step.lower(t.shapes, self.batch, refresh=refresh).compile()


@pytest.fixture(scope="module")
def compiled(corpus_folder):
    @functools.cache
    def make(mesh, **options):
        return Compiled(mesh, corpus_folder, **options)

    return make


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


PROJECTED = "query|gate|down"  # a matrix of every shape and layout


def large(report):
    """What is sent in arrays of at least a matrix's size, and how often."""
    found = Counter()
    for c in report.collectives:
        for n in c.elements:
            # A device's part of an exchange is counted as the whole array.
            whole = {"all-to-all": c.group, "collective-permute": 8}.get(c.kind, 1)
            if n * whole >= WIDE.hidden**2:
                found[c.kind, n] += c.times
    return found


@pytest.mark.parametrize("refresh", [True, False], ids=["refresh", "between refreshes"])
@pytest.mark.parametrize(
    "mesh",
    [
        *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("fsdp=8", "tensor=8")),
        "data=2,fsdp=4",
        "fsdp=4,tensor=2",
        "data=2,fsdp=2,tensor=2",
    ],
)
def test_for_the_optimizer_nothing_of_a_matrixs_size_is_sent(mesh, refresh, compiled):
    made = compiled(mesh, select=PROJECTED)
    report = optax_gale.traffic_report(made.step(refresh))
    assert large(report) == large(made.model_alone) != Counter()


@pytest.fixture
def served(monkeypatch):
    """Stands in for every kernel; the shapes of the matrices that each is given."""
    forms = {"project_update": project_update, "back_project_apply": back_project_apply}
    given = defaultdict(set)

    def backend(kernel, _):
        def run(matrices, *arguments, **options):
            given[kernel] |= {x.shape for x in matrices}
            return getattr(forms[kernel], kernel)(matrices, *arguments, **options)

        return types.SimpleNamespace(refusal=lambda _: None, **{kernel: run})

    monkeypatch.setattr(dispatch, "backend", backend)
    monkeypatch.setattr(dispatch, "fastest_first", lambda *_: ["triton"])
    # Of that module alone, which asks before it chooses.
    monkeypatch.setattr(dispatch, "jax", _Gpu())
    return given


class _Gpu:
    """JAX on a machine with a GPU, if it is asked."""

    def __getattr__(self, name):
        return (lambda: "gpu") if name == "default_backend" else getattr(jax, name)


BOTH = ("project_update", "back_project_apply")


@pytest.mark.parametrize(
    ("mesh", "refresh", "kernels", "parts"),
    [
        ("data=2,fsdp=4", False, BOTH, {(2, 64, 16), (2, 16, 160), (2, 160, 16)}),
        ("data=8", False, BOTH, {(2, 64, 64), (2, 64, 160), (2, 160, 64)}),
        # Devices add up what they project.
        ("fsdp=4,tensor=2", False, BOTH[1:], {(2, 16, 32), (2, 16, 80), (2, 80, 16)}),
        # The step after the refresh.
        ("data=2,fsdp=4", True, BOTH, {(2, 64, 16), (2, 16, 160), (2, 160, 16)}),
    ],
)
def test_kernels_serve_the_parts_of_matrices(mesh, refresh, kernels, parts, compiled, served):
    made = compiled(mesh, select=PROJECTED)
    made.step.__wrapped__(refresh)  # compiled anew
    assert served == dict.fromkeys(kernels, parts)


@pytest.mark.parametrize("mesh", ["data=1", "data=8"])
def test_one_device_is_told_nothing(mesh, compiled, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("told")

    made = compiled(mesh, select="query")
    monkeypatch.setattr(jax.sharding, "explicit_axes", refuse)
    if mesh == "data=1":
        made.step.__wrapped__(False)
        return
    with pytest.raises(AssertionError, match="told"):
        made.step.__wrapped__(False)


@pytest.mark.parametrize("options", [{"residual": "fira"}, {"moments": "reset"}], ids=str)
def test_what_an_optimizer_asks_of_its_inner_is_of_no_mesh(options, compiled):
    made = compiled("data=2,fsdp=4", select=PROJECTED, **options)
    report = optax_gale.traffic_report(made.step(False))
    assert large(report) == large(made.model_alone) != Counter()


def test_devices_that_average_projections_send_less(compiled):
    """Of query, gate and down projections of rank 4; of all else the gradients."""
    whole = numbers_in_memory(WIDE)
    less = whole - 2 * (64 * 64 + 2 * 64 * 160) + 2 * 4 * (64 + 2 * 160)
    for average, numbers in (("gradients", whole), ("projections", less)):
        made = compiled("data=8", select=PROJECTED, average=average)
        sent = optax_gale.traffic_report(made.step(False)).sent
        # In a ring, 4 bytes a number; and norms, the loss and the like.
        assert sent == pytest.approx(4 * numbers * 2 * 7 / 8, rel=0.02)


def test_on_other_devices_their_parts_are_clipped_otherwise(compiled):
    meshes = ("data=8", "data=4")
    with_whole, with_own = (
        [compiled(mesh, select="down", average=average).trainer.identity() for mesh in meshes]
        for average in ("gradients", "projections")
    )
    assert with_whole[0] == with_whole[1] and with_own[0] != with_own[1]


@pytest.mark.parametrize("name", optimizers.RECIPES)
def test_every_optimizers_state_is_spread(name, compiled):
    layout = compiled("fsdp=4,tensor=2", select=PROJECTED).layout
    settings = optimizers.resolve(name, OptimizerOptions(), WIDE, 100)
    tx = optimizers.build(name, settings, TrainingOptions(steps=100))
    state = trace_init(Llama(WIDE), tx, 0).out_info
    where = layout.state(tx.init, state.params)
    assert jax.tree.structure(where) == jax.tree.structure(state.opt_state)
    share = bytes_on_a_device(state.opt_state, where) / nbytes(state.opt_state)
    # optax.contrib.galore gets every matrix of a stack by itself, which nobody can follow.
    assert share < (1 if name == "optax_galore" else 0.5)


def test_that_could_have_been_seen(compiled):
    made = compiled("fsdp=4,tensor=2", select="query", range_finder="svd")
    report = optax_gale.traffic_report(made.step(True))
    assert large(report) - large(made.model_alone)


def test_each_device_has_a_part_of_the_weights_and_of_the_state(compiled):
    made = compiled("fsdp=4,tensor=2", select=PROJECTED)
    t = made.trainer
    state = first_state(t.model, t.tx, 0, t.walk, t.shardings)
    ones = {name: np.ones((8, 16), x.dtype) for name, x in made.batch.items()}
    state, _ = made.step(True)(state, made.layout.place(ones, 8))
    parts = {
        "/".join(key.key for key in path): {shard.data.shape for shard in x.addressable_shards}
        for path, x in jax.tree_util.tree_flatten_with_path(state.params)[0]
    }
    assert parts["layers/attention/query/kernel"] == {(2, 64 // 4, 64 // 2)}
    assert parts["layers/mlp/gate/kernel"] == {(2, 64 // 4, 160 // 2)}
    assert parts["layers/mlp/down/kernel"] == {(2, 160 // 2, 64 // 4)}
    assert parts["embed/embedding"] == {(304 // 8, 64)}
    assert parts["final_norm/scale"] == {(64,)}
    for tree, where in ((state.params, t.shardings.params), (state.opt_state, t.shardings[2])):
        leaves = jax.tree.leaves(tree)
        first = sum(x.addressable_shards[0].data.nbytes for x in leaves)
        assert first == bytes_on_a_device(tree, where) < sum(x.nbytes for x in leaves) / 6


# --- Options that make no sense ---


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        *((f"--mesh {mesh}", "--mesh must read like data=2,fsdp=4,tensor=1, each axis at most once")
          for mesh in ("8", "data", "data=0", "data=-1", "data=two", "date=2", "data=2,data=4",
                       "data=2,", "data=2=2")),
        ("--mesh data=8,fsdp=2", "--mesh data=8,fsdp=2,tensor=1 is of 16 devices, and there are 8"),
        ("--mesh data=3", "--mesh spreads the 8 sequences of a micro-batch over 3 devices"),
        ("--mesh data=2,fsdp=4 --micro-batches 2", "the 4 sequences of a micro-batch over 8"),
        ("--lost-after 0", "--lost-after must be at least 1, got 0"),
        ("--processes 2", "--processes goes with --coordinator HOST:PORT"),
        ("--process-id 0", "--process-id goes with --coordinator HOST:PORT"),
        ("--coordinator auto --processes 2", "--processes goes with --coordinator HOST:PORT"),
        ("--coordinator h:1", "--coordinator h:1 needs --processes"),
        ("--coordinator h:1 --processes 2", "--coordinator h:1 needs --process-id"),
        ("--coordinator h:1 --process-id 1", "--coordinator h:1 needs --processes"),
        *((f"--coordinator {c} --processes 2 --process-id 0",
           f"--coordinator must be HOST:PORT or auto, got '{c}'")
          for c in ("h", "h:", ":1", "h:0", "h:65536", "h:one", "h:-1")),
        ("--average projections --optimizer adamw", "projections: adamw projects nothing"),
        ("--average projections --mesh data=2,fsdp=2", "is for a --mesh of data alone"),
        ("--coordinator h:1 --processes 0 --process-id 0", "--processes must be at least 1, got 0"),
        ("--coordinator h:1 --processes 2 --process-id 2", "--process-id must be 0 to 1, got 2"),
        ("--coordinator h:1 --processes 2 --process-id -1", "--process-id must be 0 to 1, got -1"),
    ],
)  # fmt: skip
def test_one_clear_line(words, expected, capsys, tmp_path, monkeypatch):
    left = []
    monkeypatch.setattr(processes, "leave", left.append)  # it would end this process
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and expected in error and error.count("\n") == 1
    assert left == ([2] if "--coordinator" in words else [])
    assert not any(tmp_path.iterdir())
