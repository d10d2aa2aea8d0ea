"""Updates inside the backward pass give what the ordinary step gives."""

import collections
import functools
import math
from importlib.metadata import version

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_gale

from .models import LAYERS, MODEL, WIDTH, make_batch, make_params, tied_head

SCHEDULE = optax.warmup_cosine_decay_schedule(1e-3, 1e-2, 3, 20)


def fixed(x, *, rank, key, previous):
    """A basis that depends on no gradient, only on the key, which is of the step."""
    phase = (jax.random.key_data(key) % 1000).astype(jnp.float32).sum()
    waves = jnp.cos(phase + jnp.arange(math.prod(previous.shape[-2:])) ** 2)
    return jnp.broadcast_to(jnp.linalg.qr(waves.reshape(previous.shape[-2:]))[0], previous.shape)


# Exact SVDs compile in a third of a sketch's time. Where a sketch is drawn is tested by "sketch"
# and "long, kept, several gaps"; all else is the same for both.
def adamw(range_finder="svd", **options):
    return optax_gale.gale_adamw(
        SCHEDULE, 4, weight_decay=0.1, update_proj_gap=5, range_finder=range_finder, **options
    )


OPTIMIZERS = {
    "sketch": lambda: adamw("gale"),
    "long, kept, several gaps": lambda: optax_gale.gale_adamw(
        SCHEDULE,
        4,
        side="long",
        moments="keep",
        update_proj_gap=lambda path, leaf: 3 if "mlp" in path else 4,
    ),
    "fira": lambda: adamw(residual="fira"),
    "chain": lambda: optax_gale.chain(
        optax.scale(2.0),
        optax_gale.gale_project(4, update_proj_gap=5, range_finder="svd"),
        optax.adamw(SCHEDULE),
    ),
    "muon": lambda: optax_gale.gale_muon(SCHEDULE, 4, update_proj_gap=5, range_finder="svd"),
    "adafactor": lambda: optax_gale.gale_adafactor(
        SCHEDULE, 4, update_proj_gap=5, clipping_threshold=None, range_finder="svd"
    ),
    "8 bits": lambda: optax_gale.gale(
        optax_gale.quantize_states(optax.adamw(SCHEDULE), min_size=64),
        4,
        projector_dtype="int4",
        update_proj_gap=5,
        range_finder="svd",
    ),
    "kahan": lambda: optax_gale.kahan_summation(adamw(state_dtype="float32")),
    "optax.adamw": lambda: optax.adamw(SCHEDULE, weight_decay=0.1),
    "partition": lambda: optax.partition(
        {"matrix": adamw(), "other": optax.sgd(SCHEDULE, 0.9)},
        lambda params: jax.tree.map(lambda x: "matrix" if x.ndim == 3 else "other", params),
    ),
}


def ordinary(tx, model=MODEL, clip_norm=None):
    """The step that layerwise stands in for."""
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)

    def step(params, state, batch, **extra_args):
        loss, grads = jax.value_and_grad(model.loss)(params, batch)
        norm = optax.tree.norm(optax.tree.cast(grads, jnp.float32))
        grads = clip.update(grads, clip.init(params))[0]
        params, state = optax_gale.update_and_apply(tx, grads, state, params, **extra_args)
        return params, state, optax_gale.LayerwiseMetrics(loss, norm)

    return step


def run(step, params, state, steps=20, compiler_options=None, **extra_args):
    compiled = jax.jit(functools.partial(step, **extra_args), compiler_options=compiler_options)
    history = []
    for i in range(steps):
        params, state, metrics = compiled(params, state, make_batch(i))
        history.append(metrics)
    return params, state, jax.tree.map(lambda *xs: np.stack(xs), *history)


def assert_same(got, wanted, atol=2e-6):
    for x, y in zip(got, wanted, strict=True):
        chex.assert_trees_all_equal_shapes_and_dtypes(x, y)
    chex.assert_trees_all_close(got[0], wanted[0], atol=atol)
    chex.assert_trees_all_close(got[2], wanted[2], atol=atol)
    # Codes on the edge of two may fall to either side where a sum is rounded otherwise.
    floats = lambda tree: [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    chex.assert_trees_all_close(floats(got[1]), floats(wanted[1]), atol=10 * atol, rtol=1e-3)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "kahan"])
@pytest.mark.quick("sketch", "8 bits")
def test_is_the_ordinary_step(name):
    tx, params = OPTIMIZERS[name](), make_params()
    train = optax_gale.layerwise(MODEL, tx)
    state = train.init(params)
    chex.assert_trees_all_equal(state, tx.init(params))
    got = run(train.step, params, state)
    wanted = run(ordinary(tx), params, state)
    assert_same(got, wanted)
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), got[0], params)
    assert min(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize("make", [adamw, lambda: adamw(fixed), OPTIMIZERS["optax.adamw"]])
@pytest.mark.quick("adamw")
def test_is_the_ordinary_step_bit_for_bit(make):
    """On a CPU, in float32, without the optimisations by which XLA rounds each program otherwise.

    With those, or with a sketch, whose products over a whole stack are summed in another order than
    those of a layer, `test_is_the_ordinary_step` gives the bound.
    """
    tx, params = make(), make_params()
    # The quick compilation of these tests has a code generator with roundings of its own.
    quick = version("jaxlib").startswith("0.10.")
    options = {"xla_cpu_use_fusion_emitters": True} if quick else None
    exact = functools.partial(run, compiler_options=options)
    got = exact(optax_gale.layerwise(MODEL, tx).step, params, tx.init(params))
    wanted = exact(ordinary(tx), params, tx.init(params))
    chex.assert_trees_all_equal(got[0], wanted[0])
    chex.assert_trees_all_equal(got[1], wanted[1])
    chex.assert_trees_all_equal(got[2].loss, wanted[2].loss)


def test_what_looks_at_a_whole_leaf_sees_a_layer():
    """As if the layers were not stacked: the root mean square that Adafactor clips is a layer's."""
    tx = optax_gale.gale_adafactor(0.1, 4, range_finder="svd", update_proj_gap=5)
    params = make_params()

    def unstacked(tree):
        layers = [jax.tree.map(lambda x, i=i: x[i], tree["layers"]) for i in range(LAYERS)]
        return {**tree, "layers": {str(i): layer for i, layer in enumerate(layers)}}

    def stacked(tree):
        layers = [tree["layers"][str(i)] for i in range(LAYERS)]
        return {**tree, "layers": jax.tree.map(lambda *xs: jnp.stack(xs), *layers)}

    model = optax_gale.LayeredModel(MODEL.embed, MODEL.block, MODEL.head)
    one_by_one = ordinary(tx, Unstacked(lambda tree, batch: model.loss(stacked(tree), batch)))
    start = unstacked(params)
    wanted = run(one_by_one, start, tx.init(start), 8)
    got = run(optax_gale.layerwise(MODEL, tx).step, params, tx.init(params), 8)
    chex.assert_trees_all_close(got[0], stacked(wanted[0]), atol=1e-4)
    whole = run(ordinary(tx), params, tx.init(params), 8)
    assert (
        np.abs(
            got[0]["layers"]["mlp"]["up"]["kernel"] - whole[0]["layers"]["mlp"]["up"]["kernel"]
        ).max()
        > 1e-4
    )


class Unstacked:
    """A model that is nothing but a loss."""

    def __init__(self, loss):
        self.loss = loss


def test_tied_embeddings_add_up():
    model = optax_gale.LayeredModel(MODEL.embed, MODEL.block, tied_head)
    tx, params = adamw(), make_params(tied=True)
    got = run(optax_gale.layerwise(model, tx).step, params, tx.init(params), 8)
    wanted = run(ordinary(tx, model), params, tx.init(params), 8)
    assert_same(got, wanted)


def test_parameters_deeper_in_the_tree():
    def deeper(params):
        return {
            "decoder": {"stack": params["layers"]},
            **{k: v for k, v in params.items() if k != "layers"},
        }

    model = optax_gale.LayeredModel(MODEL.embed, MODEL.block, MODEL.head, layers="decoder/stack")
    tx, params = adamw("random"), make_params()
    got = run(optax_gale.layerwise(model, tx).step, deeper(params), tx.init(deeper(params)), 3)
    wanted = run(ordinary(tx, model), deeper(params), tx.init(deeper(params)), 3)
    assert_same(got, wanted)


@pytest.mark.parametrize("refresh", [True, False])
def test_the_host_may_choose_the_refresh(refresh):
    tx, params = adamw(), make_params()
    train = optax_gale.layerwise(MODEL, tx)
    got = run(train.step, params, tx.init(params), 3, refresh=refresh)
    wanted = run(ordinary(tx), params, tx.init(params), 3, refresh=refresh)
    assert_same(got, wanted)
    sketch = OPTIMIZERS["sketch"]()
    step = functools.partial(optax_gale.layerwise(MODEL, sketch).step, refresh=refresh)
    text = jax.jit(step).lower(params, sketch.init(params), make_batch(0)).as_text()
    assert "stablehlo.case" not in text


@pytest.mark.parametrize(
    ("name", "clip"),
    [
        ("sketch", "hold"),
        ("kahan", "two_pass"),
        ("chain", "two_pass"),
    ],
)
@pytest.mark.quick("chain-two_pass")
def test_exact_clipping_is_that_of_the_ordinary_step(name, clip):
    tx, params = OPTIMIZERS[name](), make_params()
    train = optax_gale.layerwise(MODEL, tx, clip_norm=0.5, clip=clip)
    got = run(train.step, params, train.init(params), 8)
    wanted = run(ordinary(tx, clip_norm=0.5), params, tx.init(params), 8)
    assert_same(got, wanted)
    assert got[2].grad_norm.max() > 0.5


def test_clipping_by_the_norm_before():
    tx, params = optax.sgd(0.1), make_params()
    train = optax_gale.layerwise(MODEL, tx, clip_norm=0.5, clip="previous")
    state = train.init(params)
    assert float(state.grad_norm) == 0
    step, gradients = jax.jit(train.step), jax.jit(jax.grad(MODEL.loss))
    norm = 0.0
    for i in range(4):
        grads = gradients(params, make_batch(i))
        factor = min(1.0, 0.5 / norm) if norm else 1.0
        wanted = jax.tree.map(lambda w, g, f=factor: w - 0.1 * f * g, params, grads)
        params, state, metrics = step(params, state, make_batch(i))
        chex.assert_trees_all_close(params, wanted, atol=1e-6)
        norm = float(optax.tree.norm(grads))
        np.testing.assert_allclose([metrics.grad_norm, state.grad_norm], norm, rtol=1e-5)
        assert norm > 0.5


def mean_step(tx, count, clip_norm=None):
    """The ordinary step for the mean of micro-batches' gradients, each clipped."""
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)

    def step(params, state, batch):
        grads, losses, norms = [], [], []
        for i in range(count):
            part = {"tokens": batch["tokens"][i::count]}
            loss, g = jax.value_and_grad(MODEL.loss)(params, part)
            losses.append(loss)
            norms.append(optax.tree.norm(g))
            grads.append(clip.update(g, clip.init(params))[0])
        mean = jax.tree.map(lambda *gs: sum(gs) / count, *grads)
        params, state = optax_gale.update_and_apply(tx, mean, state, params)
        metrics = optax_gale.LayerwiseMetrics(sum(losses) / count, sum(norms) / count)
        return params, state, metrics

    return step


@pytest.mark.parametrize(
    ("name", "clip"),
    [
        ("gale", None),
        ("gale", "hold"),
        ("8 bits", "hold"),
        ("kahan", None),
    ],
)
@pytest.mark.quick("gale-hold")
def test_micro_batches_take_one_step_for_the_mean(name, clip):
    inner = {
        "gale": lambda: adamw(fixed),
        "8 bits": lambda: adamw(fixed, state_dtype="int8", projector_dtype="int4"),
        "kahan": lambda: optax_gale.kahan_summation(adamw(fixed)),
    }
    tx, params = inner[name](), make_params()
    options = {} if clip is None else {"clip_norm": 1.0, "clip": clip}
    train = optax_gale.layerwise(MODEL, tx, micro_batches=4, **options)
    got = run(train.step, params, train.init(params), 7)
    wanted = run(mean_step(tx, 4, options.get("clip_norm")), params, tx.init(params), 7)
    assert_same(got, wanted)


def test_the_first_micro_batch_decides_the_subspace():
    tx, params = adamw(), make_params()
    batch = make_batch(0)
    _, state, _ = jax.jit(optax_gale.layerwise(MODEL, tx, micro_batches=2).step)(
        params, tx.init(params), batch
    )
    first = jax.grad(MODEL.loss)(params, {"tokens": batch["tokens"][::2]})
    _, wanted = jax.jit(tx.update)(first, tx.init(params), params)
    chex.assert_trees_all_close(state.projector, wanted.projector, atol=1e-4)


SAME_LAYERS = optax_gale.LayeredModel(
    lambda rest, batch: batch["x"],
    lambda p, x, batch, layer: x + jnp.sum(p["w"] * jnp.linspace(0.1, 1, 256).reshape(8, 32)),
    lambda rest, x, batch: x,
)


@pytest.mark.parametrize(
    "tx",
    [
        optax_gale.quantize_states(
            optax.trace(0.9), min_size=1, block_size=32, stochastic_rounding=True
        ),
        optax.chain(optax.sgd(0.1), optax.add_noise(1.0, 0.0, 0)),
    ],
    ids=["stochastic states", "noise"],
)
def test_layers_alike_draw_differently(tx):
    params = {"layers": {"w": jnp.ones((2, 8, 32))}, "rest": jnp.ones(3)}
    step, state = optax_gale.layerwise(SAME_LAYERS, tx).step, tx.init(params)
    batch = {"x": jnp.zeros(())}
    for _ in range(3):
        params, state, _ = jax.jit(step)(params, state, batch)
    # Codes of a state, and the weights.
    held = [np.asarray(x) for x in jax.tree.leaves((params, state)) if x.shape == (2, 8, 32)]
    assert any((x[0] != x[1]).any() for x in held)


def test_draws_differ_from_layer_to_layer():
    params = make_params(jnp.bfloat16)
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), params["layers"])
    model = optax_gale.LayeredModel(
        MODEL.embed,
        # The same gradient for each layer.
        lambda p, x, batch, layer: (
            x + sum(jnp.sum(w.astype(jnp.float32)) for w in jax.tree.leaves(p)).astype(x.dtype)
        ),
        lambda rest, x, batch: jnp.sum(x.astype(jnp.float32)) * 1e-3,
    )
    params = {**params, "layers": same}
    tx = optax_gale.stochastic_rounding(optax.sgd(1e-3))
    new, _, _ = jax.jit(optax_gale.layerwise(model, tx).step)(
        params, tx.init(params), make_batch(0)
    )
    rounded_up = np.asarray(
        new["layers"]["mlp"]["up"]["kernel"] != params["layers"]["mlp"]["up"]["kernel"]
    )
    assert 0.05 < rounded_up.mean() < 0.95
    assert (rounded_up[0] != rounded_up[1]).mean() > 0.1


def test_bfloat16_weights_keep_their_dtypes():
    tx, params = adamw(state_dtype="float32"), make_params(jnp.bfloat16)
    got = run(optax_gale.layerwise(MODEL, tx, clip_norm=1.0).step, params, tx.init(params), 3)
    wanted = run(ordinary(tx, clip_norm=1.0), params, tx.init(params), 3)
    assert_same(got, wanted, atol=0.02)
    assert got[2].loss.dtype == jnp.float32


def test_dimension_numbers_count_the_axis_of_layers():
    params = {
        "embed": {"embedding": jax.random.normal(jax.random.key(0), (8, 12))},
        "layers": {"w": 0.1 * jax.random.normal(jax.random.key(1), (LAYERS, 12, 3, 4))},
        "out": jnp.ones((12, 2)),
    }
    model = optax_gale.LayeredModel(
        lambda rest, batch: rest["embed"]["embedding"][batch["tokens"]],
        lambda p, x, batch, layer: x + jnp.tanh(x @ p["w"].reshape(12, 12)),
        lambda rest, x, batch: jnp.mean((x @ rest["out"]) ** 2),
    )
    numbers = {"embed": None, "layers": optax_gale.GaleDimensionNumbers(1, (2, 3)), "out": None}
    tx = optax_gale.gale_adamw(1e-2, 2, weight_dimension_numbers=numbers)
    assert tx.init(params).projector["layers"]["w"].shape == (LAYERS, 12, 2)
    got = run(optax_gale.layerwise(model, tx).step, params, tx.init(params), 4)
    wanted = run(ordinary(tx, model), params, tx.init(params), 4)
    assert_same(got, wanted)


def test_blocks_know_their_number():
    params = make_params()
    model = optax_gale.LayeredModel(
        MODEL.embed,
        lambda p, x, batch, layer: MODEL.block(p, x * (1 + layer), batch, layer),
        MODEL.head,
    )
    tx = optax.sgd(0.1)
    got = run(optax_gale.layerwise(model, tx).step, params, tx.init(params), 1)
    wanted = run(ordinary(tx, model), params, tx.init(params), 1)
    assert_same(got, wanted)


def temporaries(step, tx, layers):
    """Bytes beside the arguments; weights and states must be updated in place."""
    params = jax.eval_shape(functools.partial(make_params, layers=layers))
    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, make_batch(0)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= nbytes((params, state))
    return memory.temp_size_in_bytes


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


# Only GPU compilers keep the barrier that orders readings before writings until buffers are chosen.
ON_GPUS = {
    "adamw": (OPTIMIZERS["optax.adamw"], {}),
    "8 bits": (OPTIMIZERS["8 bits"], {}),
    "muon": (OPTIMIZERS["muon"], {}),
    "no conditional": (lambda: adamw(moments="keep", range_finder="random"), {}),
}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (OPTIMIZERS["sketch"], {}),
        *(pytest.param(*case, marks=pytest.mark.gpu, id=name) for name, case in ON_GPUS.items()),
    ],
)
def test_a_layer_more_takes_no_more_than_its_input(make, options):
    """No gradient, and no second copy of weights or states, has a leading axis of layers."""
    tx = make()
    step = optax_gale.layerwise(MODEL, tx, **options).step
    few, many = (temporaries(step, tx, layers) for layers in (24, 48))
    of_layer = nbytes(jax.eval_shape(make_params)["layers"]) / LAYERS
    of_input = 4 * 6 * WIDTH * 4
    assert (many - few) / 24 < of_input + of_layer / 10
    few, many = (temporaries(ordinary(tx), tx, layers) for layers in (24, 48))
    assert (many - few) / 24 > of_input + of_layer / 2


def late(factor):
    """Scales by what the last step's gradients said."""

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(grads, state, params=None):
        del params
        return state, jax.tree.map(lambda g: g * factor(grads), grads)

    return optax.GradientTransformation(init, update)


def loss_of(**changes):
    pieces = {"embed": MODEL.embed, "block": MODEL.block, "head": MODEL.head, "layers": "layers"}
    return optax_gale.LayeredModel(**{**pieces, **changes})


REFUSED = {
    "no such key": (loss_of(layers="blocks"), adamw, {}, r"there is no 'blocks'.*in \['embed'"),
    "a norm of everything": (
        MODEL,
        lambda: optax.chain(optax.clip_by_global_norm(1.0), adamw()),
        {},
        r"The update of '.*' depends on '.*'.*there is `clip_norm`",
    ),
    "a state of everything": (
        MODEL,
        lambda: optax.apply_if_finite(optax.sgd(0.1), 3),
        {},
        r"depends on '",
    ),
    "the parameters of others": (
        MODEL,
        lambda: optax.stateless(
            lambda grads, params: jax.tree.map(lambda g: g / optax.tree.norm(params), grads)
        ),
        {},
        r"The update of '.*' depends on '.*'",
    ),
    "a gradient of others, a step late": (
        MODEL,
        lambda: late(lambda grads: 1 / (1 + optax.tree.norm(grads))),
        {},
        r"The optimizer's state.* depends on '.*'.*no two gradients exist at once",
    ),
    "a stack of vectors as a matrix": (
        MODEL,
        lambda: optax_gale.gale_adamw(0.1, 1, side="long", select=lambda path, x: "norm" in path),
        {},
        r"'layers/norm/scale' of shape \(3, 16\) is projected as one matrix.*`select`",
    ),
    "leaves put together": (
        MODEL,
        lambda: optax.flatten(optax.adam(0.1)),
        {},
        r"does not take the step of a single layer",
    ),
    "factors of the axis of layers": (
        loss_of(),
        lambda: optax.scale_by_factored_rms(min_dim_size_to_factor=2),
        {},
        r"treats? the (axis of layers|layers of a stack)",
    ),
    "more than the loss": (
        loss_of(head=lambda rest, x, batch: (jnp.sum(x), x)),
        adamw,
        {},
        r"`head` must return the loss and nothing else, an array of one float: got tuple",
    ),
    "an integer": (
        loss_of(embed=lambda rest, batch: batch["tokens"]),
        adamw,
        {},
        r"`embed` must return floating arrays only, got int32.*goes into the batch",
    ),
    "another shape": (
        loss_of(block=lambda p, x, batch, layer: x[:1]),
        adamw,
        {},
        r"`block` must return the shapes and dtypes of its input.*\(1, 6, 16\) for .*\(4, 6, 16\)",
    ),
    "no scalar": (
        loss_of(head=lambda rest, x, batch: x),
        adamw,
        {},
        r"`head` must return the loss and nothing else.*got float32 \(4, 6, 16\)",
    ),
    "parts that do not fit": (
        MODEL,
        adamw,
        {"micro_batches": 3},
        r"micro_batches=3 must divide.*batch\['tokens'\] has shape \(4, 6\)",
    ),
    "fira held": (
        MODEL,
        OPTIMIZERS["fira"],
        {"clip_norm": 1.0},
        r"residual='fira' needs the gradient itself",
    ),
    "a counter before": (
        MODEL,
        lambda: optax_gale.chain(optax.scale_by_schedule(SCHEDULE), adamw()),
        {"micro_batches": 2},
        r"keeps a state \(ScaleByScheduleState\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name):
    model, make, options, message = REFUSED[name]
    params = make_params()
    tx = make()
    train = optax_gale.layerwise(model, tx, **options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(train.step, params, train.init(params), make_batch(0))


def test_stacks_of_different_lengths():
    params = make_params()
    params["layers"]["norm"]["scale"] = jnp.ones((LAYERS + 1, WIDTH))
    with pytest.raises(
        ValueError, match=r"'layers' must have a leading axis of one length.*\(4,\)"
    ):
        jax.eval_shape(optax_gale.layerwise(MODEL, optax.sgd(0.1)).step, params, (), make_batch(0))


def test_a_state_of_other_layers():
    tx = optax.adam(0.1)
    state = tx.init(make_params(layers=LAYERS + 1))
    with pytest.raises(ValueError, match=r"made for another number of layers"):
        jax.eval_shape(optax_gale.layerwise(MODEL, tx).step, make_params(), state, make_batch(0))


def test_arrays_of_a_batch_that_are_no_examples():
    train = optax_gale.layerwise(MODEL, optax.sgd(0.1), micro_batches=2)
    params = make_params()
    batch = {**make_batch(0), "weights": jnp.ones(40)}
    with pytest.raises(ValueError, match=r"leading axis of every array.*'weights'.*\(40,\)"):
        jax.eval_shape(train.step, params, train.init(params), batch)


def test_arguments_reach_the_optimizer():
    tx = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(factor=0.5, patience=0))
    params = make_params()
    step = optax_gale.layerwise(MODEL, tx).step
    got = run(step, params, tx.init(params), 4, value=1.0)
    wanted = run(ordinary(tx), params, tx.init(params), 4, value=1.0)
    assert_same(got, wanted)
    with pytest.raises(ValueError, match="`layer` is what layers are told apart by"):
        step(params, tx.init(params), make_batch(0), layer=1)


def test_names_that_look_alike():
    """A key that begins as the stack's does, one with a slash, a hyperparameter like a weight."""
    extra = {"layers2": jnp.ones(16), "layers/more": jnp.ones(16), "scale": jnp.ones(16)}
    params = {**make_params(), **extra}

    def head(rest, x, batch):
        return MODEL.head(rest, x * rest["layers2"] * rest["layers/more"] * rest["scale"], batch)

    model = optax_gale.LayeredModel(MODEL.embed, MODEL.block, head, layers=("layers",))
    tx = optax.inject_hyperparams(optax_gale.gale_adamw)(SCHEDULE, rank=4, scale=1.0)
    got = run(optax_gale.layerwise(model, tx).step, params, tx.init(params), 3)
    wanted = run(ordinary(tx, model), params, tx.init(params), 3)
    assert_same(got, wanted)


def test_mappings_in_their_own_order():
    params = collections.OrderedDict(
        z=jnp.ones(16), layers={"w": 0.1 * jnp.ones((2, 16, 16))}, a=2 * jnp.ones(16)
    )
    model = optax_gale.LayeredModel(
        lambda rest, batch: batch["x"] * rest["z"],
        lambda p, x, batch, layer: x + jnp.tanh(x @ p["w"]),
        lambda rest, x, batch: jnp.mean((x - rest["a"]) ** 2),
    )
    tx, batch = optax.sgd(0.1, momentum=0.9), {"x": jnp.arange(32.0).reshape(2, 16) / 16}
    got = wanted = params, tx.init(params)
    for _ in range(3):
        got = jax.jit(optax_gale.layerwise(model, tx).step)(*got, batch)[:2]
        wanted = jax.jit(ordinary(tx, model))(*wanted, batch)[:2]
    chex.assert_trees_all_close(got, wanted, atol=2e-6)
    assert isinstance(got[0], collections.OrderedDict)


def test_a_stack_that_is_one_array():
    params = {"layers": 0.1 * jnp.ones((3, 8, 8)), "rest": jnp.ones(8)}
    model = optax_gale.LayeredModel(
        lambda rest, batch: batch["x"] * rest["rest"],
        lambda w, x, batch, layer: x + jnp.tanh(x @ w),
        lambda rest, x, batch: jnp.mean(x**2),
    )
    tx, batch = optax.adam(0.1), {"x": jnp.ones((2, 8))}
    got = jax.jit(optax_gale.layerwise(model, tx).step)(params, tx.init(params), batch)
    wanted = jax.jit(ordinary(tx, model))(params, tx.init(params), batch)
    assert_same(got, wanted)


def test_a_gradient_that_is_not_finite_does_not_spoil_the_step_after():
    params = make_params()
    train = optax_gale.layerwise(MODEL, optax.sgd(0.1), clip_norm=1.0, clip="previous")
    state = train.init(params)._replace(grad_norm=jnp.float32(jnp.nan))
    new, state, _ = jax.jit(train.step)(params, state, make_batch(0))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(new))
    assert jnp.isfinite(state.grad_norm)


def test_bad_arguments():
    tx = adamw()
    with pytest.raises(TypeError, match=r"`model` must be a LayeredModel, got None"):
        optax_gale.layerwise(None, tx)
    with pytest.raises(TypeError, match=r"`tx` must be an Optax gradient transformation"):
        optax_gale.layerwise(MODEL, 0.1)
    with pytest.raises(TypeError, match=r"`micro_batches` must be an int, got 2.0"):
        optax_gale.layerwise(MODEL, tx, micro_batches=2.0)
    with pytest.raises(ValueError, match=r"`micro_batches` must be at least 1, got 0"):
        optax_gale.layerwise(MODEL, tx, micro_batches=0)
    for wrong in (0, True, "1"):
        with pytest.raises(ValueError, match=r"`clip_norm` must be a positive number, or None"):
            optax_gale.layerwise(MODEL, tx, clip_norm=wrong)
    optax_gale.layerwise(MODEL, tx, clip_norm=np.float32(1))
    with pytest.raises(ValueError, match=r"`clip` must be one of.*got 'later'"):
        optax_gale.layerwise(MODEL, tx, clip_norm=1.0, clip="later")
    with pytest.raises(ValueError, match=r"`implementation` must be"):
        optax_gale.layerwise(MODEL, tx, implementation="cuda")
    with pytest.raises(ValueError, match=r"`accumulator_dtype` must be a floating type"):
        optax_gale.layerwise(MODEL, tx, accumulator_dtype="int8")
    previous = optax_gale.layerwise(MODEL, tx, clip_norm=1.0, clip="previous")
    params = make_params()
    with pytest.raises(
        TypeError, match=r"must be a LayerwiseState, as `init` makes it, got GaleState"
    ):
        previous.step(params, tx.init(params), make_batch(0))
    with pytest.raises(TypeError, match=r"`state` is that of clip='previous'"):
        optax_gale.layerwise(MODEL, tx).step(params, previous.init(params), make_batch(0))
