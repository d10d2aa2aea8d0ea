"""`memory_report` and `state_partition_specs`: both work on shapes, and agree with `init`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_gale


def shapes(dtype=jnp.bfloat16, layers=3, d=48, f=96, vocabulary=200):
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
    return {
        "embed": {"embedding": struct(vocabulary, d)},
        "layers": {
            "query": {"kernel": struct(layers, d, d)},
            "up": {"kernel": struct(layers, d, f)},
            "norm": {"scale": struct(layers, d)},
        },
        "lm_head": {"kernel": struct(d, vocabulary)},
    }


def made(tree):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), tree)


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


TRANSFORMATIONS = {
    "adamw": optax.adamw(1e-3),
    "gale_adamw": optax_gale.gale_adamw(1e-3, 8),
    "long, f32 states, bf16 projector": optax_gale.gale_adamw(
        1e-3, 8, side="long", state_dtype=jnp.float32, projector_dtype=jnp.bfloat16
    ),
    "fira": optax_gale.gale_adamw(1e-3, 8, residual="fira"),
    "muon": optax_gale.gale_muon(1e-3, 8),
    "adafactor": optax_gale.gale_adafactor(1e-3, 8, min_dim_size_to_factor=8),
    "chain": optax_gale.chain(
        optax.clip_by_global_norm(1.0), optax_gale.gale_project(8), optax.adamw(1e-3)
    ),
    "injected": optax.inject_hyperparams(optax_gale.gale_lion, static_args="rank")(1e-3, rank=8),
    "int8 states, int4 projector": optax_gale.gale_adamw(
        1e-3, 8, state_dtype="int8", projector_dtype="int4"
    ),
    "quantised": optax_gale.quantize_states(optax.adamw(1e-3), min_size=100),
    "partition": optax.partition(
        {"a": optax_gale.gale_adamw(1e-3, 8), "b": optax.sgd(1e-3, momentum=0.9)},
        {"embed": "b", "layers": "a", "lm_head": "b"},
    ),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_report_counts_the_bytes_that_init_makes(name, dtype):
    tx, params = TRANSFORMATIONS[name], made(shapes(dtype))
    report = optax_gale.memory_report(tx, shapes(dtype))
    assert report.state == nbytes(tx.init(params))
    assert report.weights == nbytes(params)
    assert report.total == report.state + report.weights
    assert report == optax_gale.memory_report(tx, params)


def test_report_tells_projectors_from_moments():
    report = optax_gale.memory_report(optax_gale.gale_adamw(1e-3, 8, side="short"), shapes())
    leaves = {leaf.path: leaf for leaf in report.leaves}
    up = leaves["layers/up/kernel"]
    assert up.projectors == 4 * 3 * 48 * 8
    assert up.moments == 2 * 2 * 3 * 96 * 8
    assert report.projectors == sum(leaf.projectors for leaf in report.leaves)
    assert leaves["lm_head/kernel"].projectors == 0
    assert report.other == 8  # two step counters


@pytest.mark.parametrize(
    ("path", "decision"),
    [
        ("embed/embedding", "full rank: 'embed' names an embedding, head, norm or bias"),
        ("layers/up/kernel", "rank 40 of 48 x 96, by rows of 3 matrices"),
        ("layers/query/kernel", "rank 40 of 48 x 48, by columns of 3 matrices"),
        ("layers/thin/kernel", "full rank: min(m, n) = 12 is less than the rank, 40"),
        ("layers/bias", "full rank: 'bias' names an embedding, head, norm or bias"),
        ("layers/gain", "full rank: a vector"),
    ],
)
def test_report_says_what_was_decided_and_why(path, decision):
    params = shapes()
    params["layers"]["thin"] = {"kernel": jax.ShapeDtypeStruct((3, 12, 48), jnp.bfloat16)}
    params["layers"]["bias"] = jax.ShapeDtypeStruct((3, 48), jnp.bfloat16)
    params["layers"]["gain"] = jax.ShapeDtypeStruct((48,), jnp.bfloat16)
    tx = optax.chain(optax.clip(1.0), optax_gale.gale_adamw(1e-3, 40, side="short"))
    for _ in range(2):  # a cached trace must not lose the decisions
        report = optax_gale.memory_report(tx, params)
        assert {leaf.path: leaf.decision for leaf in report.leaves}[path].startswith(decision)


def test_table_groups_layers_and_adds_up():
    unstacked = {
        f"layers_{i}": {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32)} for i in range(4)
    }
    text = str(optax_gale.memory_report(optax_gale.gale_adamw(1e-3, 8), unstacked))
    assert "4 x layers_*/kernel" in text
    assert "rank 8 of 64 x 64, by columns" in text
    assert "64.0 KiB" in text  # the weights
    assert "optimizer state 24.0 KiB, 18.8% of AdamW's 128.0 KiB" in text
    assert max(map(len, text.splitlines())) < 120


def test_report_of_nothing():
    report = optax_gale.memory_report(optax_gale.gale_adamw(1e-3), {})
    assert report.weights == report.moments == report.projectors == 0
    assert str(report)


SPECS = {
    "embed": {"embedding": P("model", None)},
    "layers": {
        "query": {"kernel": P(None, "data", "model")},
        "up": {"kernel": P(None, "data", "model")},
        "norm": {"scale": P()},
    },
    "lm_head": {"kernel": P(None, "model")},
}


def test_specs_keep_surviving_axes_and_leave_the_rank_axis_alone():
    tx = optax_gale.gale_adamw(1e-3, 8, side="short")
    specs = optax_gale.state_partition_specs(tx, shapes(), SPECS)
    # up is 48 x 96: rows are projected; query is square: columns are.
    assert specs.projector["layers"]["up"]["kernel"] == P(None, "data", None)
    assert specs.projector["layers"]["query"]["kernel"] == P(None, "model", None)
    mu = specs.inner_state[0].mu
    assert mu["layers"]["up"]["kernel"] == P(None, None, "model")
    assert mu["layers"]["query"]["kernel"] == P(None, "data", None)
    assert mu["embed"]["embedding"] == P("model", None)
    assert specs.count == P()


def test_on_a_mesh_what_all_devices_would_have_is_shared():
    mesh = AbstractMesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
    tx = optax_gale.gale_adamw(1e-3, 8, side="short")
    specs = optax_gale.state_partition_specs(tx, shapes(), SPECS, mesh)
    mu = specs.inner_state[0].mu
    # To the side that is kept, or where that has an axis, to the rank; never to the layers.
    assert mu["layers"]["up"]["kernel"] == P(None, "data", "model")
    assert specs.projector["layers"]["up"]["kernel"] == P(None, "data", "model")
    assert mu["embed"]["embedding"] == P("model", None)  # has lost nothing
    by_one = {"w": jax.ShapeDtypeStruct((2, 32, 64), jnp.float32)}
    specs = optax_gale.state_partition_specs(tx, by_one, P(None, "data", None), mesh)
    assert specs.inner_state[0].mu["w"] == P(None, None, "data")
    assert specs.projector["w"] == P(None, "data", None)
    # What a mesh axis does not divide stays whole.
    odd = {"w": jax.ShapeDtypeStruct((2, 32, 67), jnp.float32)}
    odd_rank = optax_gale.gale_adamw(1e-3, 7, side="short")
    specs = optax_gale.state_partition_specs(odd_rank, odd, P(None, "data", None), mesh)
    assert specs.inner_state[0].mu["w"] == P(None, None, None)


@pytest.mark.parametrize(
    ("columns", "spec"), [(1024, P(None, "data")), (3584 // 2, P("data", None)), (1000, P("data"))]
)
def test_codes_and_scales_are_shared_in_whole_blocks(columns, spec):
    """Of 4, 7 and nearly 4 blocks of 256 columns; else the rank is shared."""
    mesh = AbstractMesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
    tx = optax_gale.gale_adamw(1e-3, 8, side="short", state_dtype="int8")
    weight = {"w": jax.ShapeDtypeStruct((64, columns), jnp.float32)}
    specs = optax_gale.state_partition_specs(tx, weight, P("data", None), mesh)
    mu = specs.inner_state.inner_state[0].mu["w"]
    wanted = P(*spec, *[None] * (2 - len(spec)))
    assert (mu.codes, mu.scales) == (wanted, wanted)


def test_what_the_compiler_is_to_decide_it_decides():
    params = {"w": jax.ShapeDtypeStruct((32, 64), jnp.float32)}
    tx = optax_gale.gale_adamw(1e-3, 8, side="short")
    for mesh in (None, AbstractMesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)):
        specs = optax_gale.state_partition_specs(tx, params, P(P.UNCONSTRAINED, None), mesh)
        assert specs.projector["w"] == P(P.UNCONSTRAINED, None)


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_specs_fit_every_array_of_the_state(name, shared):
    tx = TRANSFORMATIONS[name]
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    specs = optax_gale.state_partition_specs(tx, shapes(), SPECS, mesh if shared else None)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    state = jax.jit(tx.init, out_shardings=shardings)(made(shapes()))
    for x, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)


def test_specs_of_what_is_masked_or_cut():
    """Whatever a state makes of a weight: nothing, or several arrays."""
    cut = lambda tree: jax.tree.map(lambda x: list(x), tree)
    parts = optax.GradientTransformation(lambda p: optax.adam(0.1).init(cut(p)), lambda *_: None)
    mask = lambda params: {"up": True, "down": False}
    params = {name: jax.ShapeDtypeStruct((2, 8, 16), jnp.float32) for name in ("up", "down")}
    for tx in (parts, optax.masked(optax.adam(0.1), mask), optax.masked(parts, mask)):
        specs = optax_gale.state_partition_specs(tx, params, P(None, "data", "model"))
        state = jax.eval_shape(tx.init, params)
        assert jax.tree.structure(specs) == jax.tree.structure(state)
        mu = getattr(specs, "inner_state", specs)[0].mu
        assert mu["up"] in (P(None, "data", "model"), [P(), P()])


def test_specs_of_merged_axes():
    params = {"w": jax.ShapeDtypeStruct((2, 32, 4, 16), jnp.float32)}
    numbers = optax_gale.GaleDimensionNumbers(1, (2, 3))
    tx = optax_gale.gale_adamw(1e-3, 8, side="short", weight_dimension_numbers=numbers)
    for heads, merged in (("model", "model"), (None, None)):
        specs = optax_gale.state_partition_specs(tx, params, {"w": P(None, "data", heads, None)})
        assert specs.projector["w"] == P(None, "data", None)
        assert specs.inner_state[0].mu["w"] == P(None, None, merged)


def test_specs_look_through_boxes_and_prefixes():
    boxed = {"w": nn.Partitioned(jax.ShapeDtypeStruct((32, 64), jnp.float32), names=("a", "b"))}
    tx = optax_gale.gale_adamw(1e-3, 8, side="short")
    specs = optax_gale.state_partition_specs(tx, boxed, P("data", "model"))
    assert specs.projector["w"] == P("data", None)


def test_specs_that_do_not_fit_are_refused():
    params = {"w": jax.ShapeDtypeStruct((32, 64), jnp.float32)}
    tx = optax_gale.gale_adamw(1e-3, 8)
    with pytest.raises(ValueError, match=r"'w'.*longer than the 2 axes"):
        optax_gale.state_partition_specs(tx, params, P("data", None, "model"))
    with pytest.raises(ValueError, match="param_specs"):
        optax_gale.state_partition_specs(tx, params, {"w": P(), "x": P()})
    mesh = AbstractMesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
    with pytest.raises(ValueError, match=r"'w'.*no axis 'fsdp'.*data, model"):
        optax_gale.state_partition_specs(tx, params, P("fsdp"), mesh)
    explicit = AbstractMesh((4,), ("data",), (AxisType.Explicit,))
    with pytest.raises(ValueError, match="must have Auto axes"):
        optax_gale.state_partition_specs(tx, params, P("data"), explicit)


def test_report_of_a_state_with_keys():
    report = optax_gale.memory_report(optax.noisy_sgd(0.1), {"w": jnp.ones((4, 4))})
    assert report.other > 0 and "other" not in str(report.leaves)


def test_a_parameter_may_be_called_projector():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Params:
        projector: jax.Array

    report = optax_gale.memory_report(optax.adamw(0.1), Params(jnp.ones((4, 4))))
    assert (report.projectors, report.moments) == (0, 2 * 4 * 16)


def test_weights_in_8_bits():
    """They take the bytes of their codes and scales; to the optimizer they are float32."""
    params = {"layers": {"up": jax.ShapeDtypeStruct((2, 512, 1024), jnp.bfloat16)}}
    small = jax.eval_shape(optax_gale.quantize_weights, params)
    tx = optax_gale.gale_adamw(1e-3, 128)
    (leaf,) = optax_gale.memory_report(tx, small).leaves
    assert leaf.path == "layers/up" and leaf.weights == 2 * 512 * 1024 + 4 * 2 * 512 * 4
    wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params)
    (wanted,) = optax_gale.memory_report(tx, wide).leaves
    assert (leaf.moments, leaf.projectors) == (wanted.moments, wanted.projectors)
