"""Which leaves are projected, on which axes, with what rank; and what bad options say."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import linen as nn
from flax import nnx

import optax_gale
from optax_gale import GaleDimensionNumbers
from optax_gale.transforms import selection, trees

RANK = 4


def shapes(**leaves):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}


def make(rank=RANK, **options):
    return optax_gale.gale(optax.sgd(0.1), rank, **{"side": "short", **options})


def projected(tx, params):
    """Shapes of the projectors by path; leaves at full rank are not in it."""
    state = jax.eval_shape(tx.init, params)
    leaves, _ = trees.flatten(state.projector)
    return {leaf.path: leaf.value.shape for leaf in leaves}


def reasons(tx, params):
    """Why the others are not."""
    with selection.recorded_choices() as record:
        jax.eval_shape(tx.init, params)
    return {choice.path: choice.reason for choice in record[0] if choice.projection is None}


# The default rule, on a LLaMA.


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.RMSNorm(name="attention_norm")(x)
        for name in ("query", "key", "value", "out"):
            y = nn.Dense(8, name=name)(y)
        y = nn.RMSNorm(name="mlp_norm")(x + y)
        y = nn.Dense(12, use_bias=False, name="gate")(y) * nn.Dense(12, name="up")(y)
        return x + nn.Dense(8, name="down")(y), None


class LinenLlama(nn.Module):
    axis: int | None = None

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(32, 8, name="embed_tokens")(tokens)
        if self.axis is None:
            for i in range(2):
                x, _ = LinenBlock(name=f"layers_{i}")(x, None)
        else:
            scan = nn.scan(
                LinenBlock,
                variable_axes={"params": self.axis},
                split_rngs={"params": True},
                length=5,
            )
            x, _ = scan(name="layers")(x, None)
        return nn.Dense(32, use_bias=False, name="lm_head")(nn.RMSNorm(name="norm")(x))


def linen_params(axis=None):
    init = LinenLlama(axis).init
    return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 3), jnp.int32))["params"]


MATRICES = {"query": 8, "key": 8, "value": 8, "out": 8, "gate": 8, "up": 8, "down": 8}


def test_default_on_linen():
    expected = {f"layers_{i}/{k}/kernel": (d, RANK) for i in range(2) for k, d in MATRICES.items()}
    assert projected(make(), linen_params()) == expected
    why = reasons(make(), linen_params())
    assert why["embed_tokens/embedding"] == (
        "'embed_tokens' names an embedding, head, norm or bias"
    )
    assert "'lm_head'" in why["lm_head/kernel"]
    assert why["layers_0/query/bias"] == why["norm/scale"] == "a vector"


def test_default_on_scanned_linen():
    """Stacked norms and biases are matrices by shape, and are still left out."""
    params = linen_params(axis=0)
    assert params["layers"]["attention_norm"]["scale"].shape == (5, 8)
    expected = {f"layers/{k}/kernel": (5, d, RANK) for k, d in MATRICES.items()}
    assert projected(make(), params) == expected
    why = reasons(make(), params)
    assert "'attention_norm'" in why["layers/attention_norm/scale"]
    assert "'bias'" in why["layers/query/bias"]


def test_scan_on_axis_1():
    """`nn.scan` may put the layers anywhere; dimension numbers say where."""
    params = linen_params(axis=1)
    assert params["layers"]["up"]["kernel"].shape == (8, 5, 12)
    numbers = GaleDimensionNumbers(reduction_axis=0, output_axis=-1)
    expected = {f"layers/{k}/kernel": (5, d, RANK) for k, d in MATRICES.items()}
    assert projected(make(weight_dimension_numbers=numbers), params) == expected


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.input_norm = nnx.RMSNorm(8, rngs=rngs)
        self.q_proj = nnx.Linear(8, 8, rngs=rngs)
        self.up_proj = nnx.Linear(8, 12, rngs=rngs)


class NnxLlama(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(32, 8, rngs=rngs)
        self.layers = nnx.List([NnxBlock(rngs) for _ in range(2)])
        self.final_norm = nnx.RMSNorm(8, rngs=rngs)
        self.output_head = nnx.Linear(8, 32, rngs=rngs)


def test_default_on_nnx():
    params = nnx.eval_shape(lambda: nnx.state(NnxLlama(nnx.Rngs(0)), nnx.Param))
    expected = {
        f"layers/{i}/{k}/kernel": (8, RANK) for i in range(2) for k in ("q_proj", "up_proj")
    }
    assert projected(make(), params) == expected
    assert projected(make(select="0/.*kernel|head"), params) == {
        "layers/0/q_proj/kernel": (8, RANK),
        "layers/0/up_proj/kernel": (8, RANK),
        "output_head/kernel": (8, RANK),
    }


@pytest.mark.parametrize(
    ("name", "is_projected"),
    [
        ("kernel", True), ("w", True), ("q_proj", True), ("headed", True), ("normalizer_w", False),
        ("embedding", False), ("token_embed", False), ("wte", False), ("lm_head", False),
        ("head", False), ("output_head", False), ("logits", False), ("LayerNorm_0", False),
        ("ln_1", False), ("final_ln", False), ("bias", False), ("scale", False),
        ("upscale", True), ("multihead", True), ("line", True), ("remb", True), ("armstrong", True),
        ("emb", False), ("tok_emb", False), ("ln1", False), ("rms", False), ("gamma", False),
        ("beta", False), ("offset", False), ("lm_head_proj", False), ("logits_dense", False),
    ],
)  # fmt: skip
def test_default_by_name(name, is_projected):
    for tree in (shapes(**{name: (8, 12)}), {"layer": shapes(**{name: (8, 12)})}):
        assert bool(projected(make(), tree)) == is_projected


def test_default_on_an_array_without_a_name():
    assert projected(make(), jax.ShapeDtypeStruct((8, 12), jnp.float32)) == {"": (8, RANK)}


# Overriding it.

TREE = {"a": shapes(kernel=(8, 12), bias=(12,)), "embed": shapes(embedding=(32, 8))}
A, EMBED = {"a/kernel": (8, RANK)}, {"embed/embedding": (8, RANK)}


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        (None, A),
        ("embed", EMBED),
        ("^a/", A),
        (re.compile("KERNEL|embedding", re.IGNORECASE), A | EMBED),
        ("nothing", {}),
        (lambda path, leaf: leaf.shape[0] > 8, EMBED),
        (lambda path, leaf: path.endswith("bias"), {}),  # a vector all the same
        ({"a": False, "embed": True}, EMBED),
        ({"a": None, "embed": {"embedding": True}}, EMBED),
        ({"a": optax.MaskedNode(), "embed": True}, EMBED),
        ({"a": {"kernel": True, "bias": True}, "embed": optax.MaskedNode()}, A),
        (True, A | EMBED),
        (False, {}),
    ],
)
def test_select(select, expected):
    assert projected(make(select=select), TREE) == expected


@pytest.mark.parametrize("empty", [None, optax.MaskedNode()], ids=["None", "MaskedNode"])
def test_empty_places_in_the_parameters(empty):
    """As `optax.masked` and `optax.partition` leave them."""
    params = {"a": {"kernel": jnp.ones((8, 12)), "other": empty}, "gone": empty}
    tx = make(select={"a": True, "gone": None}, rank={"a": RANK, "gone": None})
    state = tx.init(params)
    assert state.projector["a"]["kernel"].shape == (8, RANK)
    updates, _ = tx.update(params, state, params, refresh=False)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@pytest.mark.parametrize(
    "rank",
    [
        {"a": 3, "b": {"c": 5, "d": None}},
        {"a": 3, "b": {"c": np.int64(5), "d": optax.MaskedNode()}},
        lambda path, leaf: {"a": 3, "b/c": 5, "b/d": None}[path],
    ],
    ids=["tree", "MaskedNode", "callable"],
)
def test_rank_per_leaf(rank):
    tree = {**shapes(a=(8, 12)), "b": shapes(c=(8, 12), d=(8, 12))}
    assert projected(make(rank), tree) == {"a": (8, 3), "b/c": (8, 5)}
    assert reasons(make(rank), tree) == {"b/d": "no rank"}


def test_rank_as_a_prefix():
    tree = {"a": shapes(x=(8, 12), y=(16, 12)), "b": shapes(x=(3, 8, 12))}
    expected = {"a/x": (8, 2), "a/y": (12, 2), "b/x": (3, 8, 6)}
    assert projected(make({"a": 2, "b": 6}), tree) == expected


def test_too_small_a_matrix_stays_at_full_rank():
    tree = shapes(small=(3, 12), exact=(4, 12), stack=(9, 12, 3), vector=(12,), scalar=())
    assert projected(make(), tree) == {"exact": (4, RANK)}
    why = reasons(make(), tree)
    assert (
        why["small"] == why["stack"] == ("min(m, n) = 3 is less than the rank, 4: nothing to save")
    )
    assert (why["vector"], why["scalar"]) == ("a vector", "a scalar")


def test_only_real_floating_leaves():
    tree = {
        "complex": jax.ShapeDtypeStruct((8, 12), jnp.complex64),
        "bf16": jax.ShapeDtypeStruct((8, 12), jnp.bfloat16),
    }
    assert projected(make(), tree) == {"bf16": (8, RANK)}
    assert reasons(make(), tree) == {"complex": "complex64 is not a real floating type"}


# Dimension numbers.

CLASSES = [
    GaleDimensionNumbers,
    optax.contrib.GaLoreDimensionNumbers,
    optax.contrib.MuonDimensionNumbers,
]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    ("shape", "reduction", "output", "short", "long"),
    [
        ((8, 12), 0, 1, (8, 4), (12, 4)),
        ((8, 12), 1, 0, (8, 4), (12, 4)),
        ((8, 8), 0, 1, (8, 4), (8, 4)),
        ((5, 8, 12), 1, 2, (5, 8, 4), (5, 12, 4)),
        ((8, 5, 12), 0, 2, (5, 8, 4), (5, 12, 4)),
        ((8, 12, 5), 0, 1, (5, 8, 4), (5, 12, 4)),
        ((8, 12, 5), -3, -2, (5, 8, 4), (5, 12, 4)),
        ((5, 8, 2, 6), 1, (2, 3), (5, 8, 4), (5, 12, 4)),
        ((5, 2, 6, 8), (1, 2), 3, (5, 8, 4), (5, 12, 4)),
        ((2, 5, 8, 6), (-1, 0), -2, (5, 8, 4), (5, 12, 4)),
        ((3, 8, 5, 12), 1, 3, (3, 5, 8, 4), (3, 5, 12, 4)),
    ],
)
def test_dimension_numbers(cls, shape, reduction, output, short, long):
    numbers = cls(reduction_axis=reduction, output_axis=output)
    for side, expected in (("short", short), ("long", long)):
        tx = make(weight_dimension_numbers=numbers, side=side)
        assert projected(tx, shapes(w=shape)) == {"w": expected}


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({"a": GaleDimensionNumbers(0, 2), "b": None}, {"a/x": (5, 8, 4), "a/y": (6, 8, 4)}),
        (
            {
                "a": {"x": GaleDimensionNumbers(0, 2), "y": optax.MaskedNode()},
                "b": GaleDimensionNumbers(0, 1),
            },
            {"a/x": (5, 8, 4), "b/embedding": (12, 8, 4)},
        ),
        (lambda params: {"a": GaleDimensionNumbers(0, 2), "b": None}, {"a/x": (5, 8, 4),
                                                                     "a/y": (6, 8, 4)}),
        (GaleDimensionNumbers(0, -1), {"a/x": (5, 8, 4), "a/y": (6, 8, 4)}),
    ],
    ids=["prefix", "tree", "callable", "one for all"],
)  # fmt: skip
def test_dimension_numbers_as_a_tree_select_too(numbers, expected):
    """A leaf with numbers of its own is projected, whatever its name; one without is not."""
    tree = {"a": shapes(x=(8, 5, 12), y=(8, 6, 12)), "b": shapes(embedding=(8, 9, 12))}
    assert projected(make(weight_dimension_numbers=numbers), tree) == expected


def test_select_has_the_last_word_over_numbers():
    tree = shapes(a=(8, 5, 12), b=(8, 5, 12))
    numbers = {"a": GaleDimensionNumbers(0, 2), "b": GaleDimensionNumbers(0, 2)}
    assert projected(make(weight_dimension_numbers=numbers, select="b"), tree) == {"b": (5, 8, 4)}


def test_views_are_stacks_of_matrices_and_back():
    """Entry by entry, for every way to name the axes of a small array."""
    x = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    view = selection.MatrixView.build("x", x.shape, GaleDimensionNumbers((3, 0), 1))
    matrix = view.to_matrix(x)
    assert matrix.shape == (4, 10, 3) and (view.m, view.n) == (10, 3)
    for i, j, k, h in np.ndindex(x.shape):
        assert matrix[k, h * 2 + i, j] == x[i, j, k, h]
    np.testing.assert_array_equal(view.from_matrix(matrix), x)


# What bad options say.


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        (
            {"weight_dimension_numbers": GaleDimensionNumbers(0, 0)},
            ValueError,
            ["'layer/w'", "(8, 12)", "name an axis twice", "batch axis (not named)"],
        ),
        (
            {"weight_dimension_numbers": GaleDimensionNumbers(0, -2)},
            ValueError,
            ["'layer/w'", "(8, 12)", "name an axis twice"],
        ),
        (
            {"weight_dimension_numbers": GaleDimensionNumbers(0, 2)},
            ValueError,
            ["'layer/w'", "(8, 12)", "output_axis=(2,)", "at least one of its 2 axes"],
        ),
        (
            {"weight_dimension_numbers": GaleDimensionNumbers((), 1)},
            ValueError,
            ["'layer/w'", "(8, 12)", "reduction_axis=()", "at least one of its 2 axes"],
        ),
        (
            {"weight_dimension_numbers": {"layer": {"w": "rows"}}},
            ValueError,
            ["'layer/w'", "`reduction_axis` and `output_axis`", "'rows'"],
        ),
        (
            {"weight_dimension_numbers": {"other": None}},
            ValueError,
            ["`weight_dimension_numbers`", "prefix of the parameters'", "'other'", "'layer'"],
        ),
        ({"rank": {"layer": {"w": 0}}}, ValueError, ["'layer/w'", "at least 1", "0"]),
        ({"rank": {"layer": 2.5}}, TypeError, ["'layer/w'", "must be an int", "2.5"]),
        ({"rank": {"layer": "many"}}, TypeError, ["'layer/w'", "must be an int", "'many'"]),
        ({"rank": {"layers": 2}}, ValueError, ["`rank`", "prefix", "'layers'", "'layer'"]),
        ({"select": {"layer": {}}}, ValueError, ["`select`", "prefix", "'layer'"]),
        ({"select": "("}, ValueError, ["`select`", "regular expression", "'('"]),
        ({"scale": {"layers": 1.0}}, ValueError, ["`scale`", "prefix"]),
        ({"scale": {"layer": {"w": None}}}, TypeError, ["`scale` of 'layer/w'", "None"]),
        ({"scale": {"layer": {"w": "big"}}}, TypeError, ["`scale` of 'layer/w'", "'big'"]),
        (
            {"weight_dimension_numbers": GaleDimensionNumbers("in", 1)},
            TypeError,
            ["'layer/w'", "reduction_axis='in'", "int or a sequence of ints"],
        ),
    ],
    ids=lambda x: str(x)[:40] if isinstance(x, dict) else "",
)
def test_errors_of_init(options, error, parts):
    tx = make(**options)
    with pytest.raises(error) as caught:
        jax.eval_shape(tx.init, {"layer": shapes(w=(8, 12))})
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"rank": 0}, ValueError, "`rank` must be at least 1, got 0"),
        ({"rank": -1}, ValueError, "`rank` must be at least 1, got -1"),
        ({"rank": True}, ValueError, "`rank` must be at least 1, got True"),
        ({"rank": 2.0}, TypeError, "`rank` must be an int, got 2.0"),
        ({"rank": "128"}, TypeError, "`rank` must be an int, got '128'"),
        ({"rank": None}, TypeError, "`rank` must be an int, got None"),
        ({"scale": None}, TypeError, "`scale` must be a number, got None"),
        ({"scale": "0.25"}, TypeError, "`scale` must be a number, got '0.25'"),
        ({"seed": None}, TypeError, "`seed` must be an int, got None"),
        ({"seed": 1.5}, TypeError, "`seed` must be an int, got 1.5"),
        ({"seed": jax.random.key(0)}, TypeError, "`seed` must be an int, got Array"),
        ({"side": "left"}, ValueError, r"`side` must be one of \('short', 'long'\), got 'left'"),
        ({"residual": "Fira"}, ValueError, "`residual` must be one of .*'fira'.*got 'Fira'"),
        ({"refresh_schedule": "x"}, ValueError, "`refresh_schedule` must be one of"),
        ({"moments": "rotated"}, ValueError, "`moments` must be 'keep', 'rotate', 'reset' or"),
        ({"range_finder": "qr"}, ValueError, "`range_finder` must be one of .*'gale'.*'svd'"),
        ({"range_finder": 3}, TypeError, "`range_finder` must be a name, a `Sketch`, or a callab"),
        ({"state_dtype": "int4"}, ValueError, "`state_dtype` must be .* or 'int8', got 'int4'"),
        ({"projector_dtype": "int16"}, ValueError, "`projector_dtype` must be .*'int8' or 'int4'"),
        ({"projector_dtype": None}, ValueError, "`projector_dtype` must be a floating type"),
        ({"projector_dtype": "float33"}, ValueError, "`projector_dtype` must be .* 'int4', got"),
        ({"state_dtype": "float33"}, ValueError, "`state_dtype` must be .* 'int8', got 'float33'"),
        ({"state_dtype": "float8_e4m3fn"}, ValueError, "16 bits or more, .* 'int8' keeps moments"),
        ({"update_proj_gap": 0}, ValueError, "`update_proj_gap` must be at least 1, got 0"),
    ],
)
def test_errors_of_construction(options, error, match):
    for factory in (make, optax_gale.gale_project, lambda **o: optax_gale.gale_adamw(0.1, **o)):
        with pytest.raises(error, match=match):
            factory(**options)


def test_inner_must_be_a_transformation():
    with pytest.raises(TypeError, match="`inner` must be an Optax gradient transformation"):
        optax_gale.gale(0.1)
    with pytest.raises(TypeError, match="`full_rank` must be an Optax gradient transformation"):
        optax_gale.gale(optax.sgd(0.1), full_rank=optax.sgd)


@pytest.mark.parametrize(
    "options",
    [
        {"oversampling": -1},
        {"power_iterations": -1},
        {"sketch": "uniform"},
        {"sample_fraction": 0.0},
        {"sample_fraction": 1.5},
        {"warm_start": True, "power_iterations": 0},
    ],
)
def test_errors_of_the_sketch(options):
    with pytest.raises(ValueError, match="Sketch: .*" + next(iter(options))):
        optax_gale.Sketch(**options)


@pytest.mark.parametrize("options", [{"oversampling": 2.5}, {"power_iterations": 1.5}])
def test_types_of_the_sketch(options):
    with pytest.raises(TypeError, match="Sketch: `" + next(iter(options)) + "` must be an int"):
        optax_gale.Sketch(**options)


def test_axes_and_leaves_of_other_number_types():
    numbers = GaleDimensionNumbers(np.int64(0), (np.int32(1),))
    params = {"w": shapes(w=(8, 12))["w"], "number": 2.0, "none": jnp.zeros((0, 8, 12))}
    tx = make(weight_dimension_numbers={"w": numbers, "number": None, "none": numbers}, select=True)
    assert projected(tx, params) == {"w": (8, RANK)}
    update = jax.jit(tx.update)
    values = {"w": jnp.ones((8, 12)), "number": 2.0, "none": params["none"]}
    updates, _ = update(values, tx.init(values), values)
    assert updates["none"].shape == (0, 8, 12)
    report = str(optax_gale.memory_report(tx, values))
    assert "full rank: a scalar" in report and "full rank: empty" in report


def test_a_range_finder_of_the_wrong_shape():
    tx = make(range_finder=lambda x, *, rank, key, previous: x)
    params = {"w": jnp.ones((8, 12))}
    with pytest.raises(ValueError, match=r"returned shape \(8, 12\).*rank 4; expected \(8, 4\)"):
        tx.update(params, tx.init(params), params)


def test_gradients_of_other_parameters():
    params = {"w": jnp.ones((8, 12))}
    state = make().init(params)
    with pytest.raises(ValueError, match=r"'w' has shape \(12, 8\).*made for other parameters"):
        other = {"w": jnp.ones((6, 12))}
        make().update({"w": jnp.ones((12, 8))}, make().init(other), None)
    with pytest.raises(ValueError, match=r"`state\.projector` does not have the structure"):
        make().update({"v": params["w"], "w": params["w"]}, state, params)
    with pytest.raises(ValueError, match="`params` does not have the structure"):
        make().update(params, state, [params["w"]])
