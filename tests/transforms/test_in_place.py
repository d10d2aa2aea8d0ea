"""`update_and_apply`: the update and its application in one."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_gale
from optax_gale.pallas import dispatch
from optax_gale.transforms import in_place

from .reference import turned

SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 10)
SHAPES = {
    "stacked": (3, 24, 16),
    "wide": (10, 24),
    "also_wide": (10, 24),
    "heads": (2, 12, 3, 4),
    "bias": (24,),
    "embedding": (20, 8),
}
NUMBERS = lambda params: {
    name: optax_gale.GaleDimensionNumbers(1, (2, 3))
    if name == "heads"
    else optax_gale.GaleDimensionNumbers(w.ndim - 2, w.ndim - 1)
    if name in ("stacked", "wide", "also_wide")
    else None
    for name, w in params.items()
}

# Inners that are elementwise, so that their steps can run in the kernel that projects.
ELEMENTWISE = {
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "amsgrad": optax.amsgrad(1e-2),
    "lion": optax.lion(1e-3),
    "momentum": optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "injected": optax.inject_hyperparams(optax.adamw)(learning_rate=SCHEDULE, weight_decay=0.1),
    "masked": optax.adamw(1e-2, mask=lambda p: jax.tree.map(lambda x: x.ndim > 2, p)),
    "bf16_momentum": optax.adamw(1e-2, mu_dtype=jnp.bfloat16),
}
OTHERS = {
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    "normalised": optax.chain(optax.normalize_by_update_norm(), optax.scale(-1e-2)),
}


def draw(seed, shapes=SHAPES, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=s), dtype) for name, s in shapes.items()}


# A sketch takes seconds to compile, and who calls the range finder is the same for all of them.
CHEAP = {"range_finder": turned}
SKETCH = {"range_finder": "gale"}


def gale(inner, **options):
    options = {"update_proj_gap": 2, "weight_dimension_numbers": NUMBERS, **CHEAP, **options}
    return optax_gale.gale(inner, 4, **options)


def in_two_calls(tx, grads, state, params, **extra):
    updates, state = optax.with_extra_args_support(tx).update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state


def train(step, tx, steps=3, dtype=jnp.float32, params=None):
    params = draw(0, dtype=dtype) if params is None else params
    state = tx.init(params)
    step = jax.jit(step, static_argnums=0)
    for i in range(steps):
        grads = jax.tree.map(
            lambda w, i=i: (w + 0.3 * jnp.cos(7.0 * jnp.arange(w.size) + i).reshape(w.shape)
                            .astype(w.dtype)), params)  # fmt: skip
        params, state = step(tx, grads, state, params)
    return params, state


@pytest.fixture
def kernels(monkeypatch):
    """Sends every projected leaf the way of the kernels, which XLA then serves; counts groups."""
    groups = []
    run = in_place.pallas.project_update

    def project_update(gradients, *args, implementation, **kwargs):
        assert implementation == "triton"
        groups.append(len(gradients))
        return run(gradients, *args, implementation="xla", **kwargs)

    monkeypatch.setattr(
        in_place.pallas, "choose_project_update", lambda g, *_, **__: ["triton"] * len(g)
    )
    monkeypatch.setattr(in_place.pallas, "project_update", project_update)
    return groups


@functools.cache
def elementwise(name):
    """A transformation, and what it does in two calls."""
    tx = gale(ELEMENTWISE[name], **(SKETCH if name == "adamw" else {}))
    return tx, train(in_two_calls, tx)


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.quick("lion", "injected", "bf16_momentum")
def test_elementwise_inners_run_in_the_kernels(name, kernels):
    tx, expected = elementwise(name)
    assert not kernels
    # bfloat16 moments are rounded where they leave the program, not after every operation.
    atol = 2e-3 if name == "bf16_momentum" else 2e-6
    found = train(optax_gale.update_and_apply, tx)
    chex.assert_trees_all_close(found, expected, atol=atol)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    # All leaves together that have the same program: of adamw's, only some may have a decay.
    assert sorted(kernels) == ([2, 2] if name == "masked" else [4])


def test_without_kernels_it_is_update_and_apply_updates():
    tx, expected = elementwise("adamw")
    chex.assert_trees_all_close(train(optax_gale.update_and_apply, tx), expected, atol=2e-6)


def test_leaves_share_their_scalars(kernels, monkeypatch):
    """Kernels then read a few numbers, not a few for each of hundreds of leaves."""
    sets = []
    merge = dispatch.one_for_all
    monkeypatch.setattr(
        dispatch, "one_for_all", lambda rows: sets.append(len(rows := merge(rows))) or rows
    )
    params = {name: w for name, w in draw(0).items() if name in ("wide", "also_wide")}
    train(optax_gale.update_and_apply, gale(ELEMENTWISE["injected"]), params=params)
    assert kernels == [2]
    assert sets == [1, 1]


@pytest.mark.parametrize("name", OTHERS)
def test_inners_that_look_at_the_whole_gradient_do_not(name, kernels):
    tx = gale(OTHERS[name])
    expected = train(in_two_calls, tx)
    chex.assert_trees_all_close(train(optax_gale.update_and_apply, tx), expected, atol=2e-6)
    assert not kernels


def test_muon_and_adafactor_do_not_and_their_adam_leaves_stay_with_them(kernels):
    for tx in (
        optax_gale.gale_muon(1e-2, 4, weight_dimension_numbers=NUMBERS, **CHEAP),
        optax_gale.gale_adafactor(1e-2, 4, weight_dimension_numbers=NUMBERS, **CHEAP),
    ):
        expected = train(in_two_calls, tx)
        chex.assert_trees_all_close(train(optax_gale.update_and_apply, tx), expected, atol=2e-6)
    assert not kernels


@pytest.mark.parametrize("options", [
    {"residual": "fira"},
    {"scale": 0.25, "side": "long"},
    {"refresh_schedule": "staggered", "update_proj_gap": 8},
    {"state_dtype": "float32", "projector_dtype": "bfloat16"},
], ids=str)  # fmt: skip
@pytest.mark.quick("{'residual': 'fira'}")
def test_with_options(options, kernels):
    tx = gale(optax.adamw(1e-2, weight_decay=0.1), **options)
    expected = train(in_two_calls, tx)
    chex.assert_trees_all_close(train(optax_gale.update_and_apply, tx), expected, atol=2e-6)
    assert bool(kernels) == ("residual" not in options)


def test_half_precision_weights_are_rounded_once(kernels):
    tx = gale(optax.sgd(1.0), state_dtype="float32", scale=0.3)
    wide = {k: w.astype(jnp.float32) for k, w in draw(0, dtype=jnp.bfloat16).items()}
    grads = draw(1, dtype=jnp.bfloat16)
    step = lambda run, params: run(tx, grads, tx.init(params), params)[0]
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), wide)
    once = step(optax_gale.update_and_apply, narrow)
    twice = step(in_two_calls, narrow)
    exact = step(in_two_calls, wide)
    error = lambda got: sum(
        float(jnp.sum(jnp.abs(got[k].astype(jnp.float32) - exact[k])))
        for k in ("stacked", "wide", "heads")
    )
    assert jax.tree.leaves(once)[0].dtype == jnp.bfloat16
    assert error(once) < 0.98 * error(twice)
    assert kernels


def test_stacks_of_other_batch_axes(kernels):
    shapes = {"flat": (6, 12, 8), "nested": (2, 3, 12, 8)}
    tx = optax_gale.gale_adamw(1e-2, 4, **CHEAP)
    params = draw(0, shapes)
    expected = train(in_two_calls, tx, steps=2, params=params)
    found = train(optax_gale.update_and_apply, tx, steps=2, params=params)
    chex.assert_trees_all_close(found, expected, atol=2e-6)
    assert kernels == [2]


def test_refresh_is_the_callers_choice_without_a_conditional():
    tx = gale(optax.adamw(1e-2))
    params, grads = draw(0), draw(1)
    state = tx.init(params)
    for refresh in (True, False):
        program = jax.make_jaxpr(
            lambda g, s, p, r=refresh: optax_gale.update_and_apply(tx, g, s, p, refresh=r)
        )(grads, state, params)
        assert " cond[" not in str(program)
        found, expected = (
            jax.jit(functools.partial(step, tx, refresh=refresh))(grads, state, params)
            for step in (optax_gale.update_and_apply, in_two_calls)
        )
        chex.assert_trees_all_close(found, expected, atol=2e-6)
    with pytest.raises(TypeError, match="refresh"):
        optax_gale.update_and_apply(tx, grads, state, params, refresh=1)


def test_donated_arrays_are_replaced_in_place():
    tx = gale(optax.adamw(1e-2))
    params = draw(0)
    state = tx.init(params)
    step = jax.jit(
        lambda g, s, p: optax_gale.update_and_apply(tx, g, s, p, refresh=False),
        donate_argnums=(1, 2),
    )
    size = sum(x.nbytes for x in jax.tree.leaves((params, state)))
    memory = step.lower(draw(1), state, params).compile().memory_analysis()
    assert memory.alias_size_in_bytes == size


def test_chains_whose_last_stage_is_ours_and_those_of_others(kernels):
    clip, ours = optax.clip_by_global_norm(1.0), gale(optax.adamw(1e-2))
    project = optax_gale.gale_project(4, weight_dimension_numbers=NUMBERS, **CHEAP)
    for tx, in_kernels in (
        (optax_gale.chain(clip, ours), True),
        (optax_gale.chain(clip, project, optax.adamw(1e-2)), True),
        (optax_gale.chain(project), True),
        (optax_gale.chain(ours, optax.ema(0.9)), False),
        (optax.chain(clip, ours), False),
        (optax.adamw(1e-2), False),
        (optax_gale.chain(), False),
    ):
        kernels.clear()
        few = {"steps": 2, "params": draw(0, {"wide": SHAPES["wide"], "bias": (24,)})}
        expected = train(in_two_calls, tx, **few)
        found = train(optax_gale.update_and_apply, tx, **few)
        chex.assert_trees_all_close(found, expected, atol=2e-6)
        chex.assert_trees_all_equal_structs(found, expected)
        assert bool(kernels) == in_kernels


def test_boxed_parameters_stay_in_their_boxes(kernels):
    params = {"kernel": nn.Partitioned(jnp.ones((24, 16)), ("embed", "mlp"))}
    grads = {"kernel": nn.Partitioned(draw(1)["stacked"][0], ("embed", "mlp"))}
    tx = optax_gale.gale_adamw(1e-2, 4, **CHEAP)
    state = tx.init(params)
    found = optax_gale.update_and_apply(tx, grads, state, params)
    chex.assert_trees_all_close(found, in_two_calls(tx, grads, state, params), atol=2e-6)
    chex.assert_trees_all_equal_structs(found, in_two_calls(tx, grads, state, params))
    assert kernels


def stateful(update, state=()):
    """An inner made of ``update(gradients, state) -> (updates, state)``."""
    return optax.GradientTransformation(lambda _: state, lambda g, s, params=None: update(g, s))


def reduced(g, s):
    """Looks at the whole gradient, through a reduction with a computation of its own."""
    total = lambda x: jax.lax.reduce(x, np.float32(0), lambda a, b: a + 2.0 * b, range(x.ndim))
    return jax.tree.map(lambda x: -1e-2 * x + 1e-3 * total(x), g), s


def transposed(g, s):
    turn = lambda x: jax.lax.reshape(x, x.shape, dimensions=(1, 0)) if x.shape == (4, 4) else x
    return jax.tree.map(lambda x: -1e-2 * turn(x), g), s


def switched(g, s):
    """A condition of the step decides, elementwise."""
    late = s["count"] > 1
    steps = jax.tree.map(lambda x: jnp.where(late, -1e-2 * x, 1e-2 * x), g)
    return steps, {"count": s["count"] + 1}


@pytest.mark.parametrize(
    ("inner", "in_kernels"),
    [
        (stateful(reduced), False),
        (stateful(transposed), False),
        (stateful(switched, {"count": jnp.zeros((), jnp.int32)}), True),
    ],
    ids=["reduced", "transposed", "switched"],
)
def test_only_what_is_elementwise_is_taken_for_it(inner, in_kernels, kernels):
    params = draw(0, {"square": (4, 4), "bias": (24,)})
    tx = optax_gale.gale(inner, 4, **CHEAP)
    expected = train(in_two_calls, tx, params=params)
    found = train(optax_gale.update_and_apply, tx, params=params)
    chex.assert_trees_all_close(found, expected, atol=2e-6)
    assert bool(kernels) == in_kernels


def test_a_state_that_changes_its_form_takes_the_general_path(kernels):
    def grows(g, s):
        steps = jax.tree.map(lambda x: -1e-2 * x, g)
        return steps, {"last": jnp.float32(3), "steps": s["steps"] + 1}

    tx = optax_gale.gale(stateful(grows, {"last": None, "steps": jnp.zeros(())}), 4, **CHEAP)
    params = draw(0, {"wide": (10, 24)})
    state = tx.init(params)
    found = optax_gale.update_and_apply(tx, params, state, params)
    chex.assert_trees_all_close(found, in_two_calls(tx, params, state, params), atol=2e-6)
    assert not kernels


def test_what_an_inner_prints_is_printed(kernels):
    calls = []

    def printing(g, s):
        jax.debug.callback(calls.append, jnp.float32(1))
        return jax.tree.map(lambda x: -1e-2 * x, g), s

    tx = optax_gale.gale(stateful(printing), 4, **CHEAP)
    params = draw(0, {"wide": (10, 24)})
    optax_gale.update_and_apply(tx, params, tx.init(params), params)
    jax.effects_barrier()
    assert calls
    assert not kernels


def test_it_can_be_differentiated():
    params, grads = draw(0, {"wide": (10, 24)}), draw(1, {"wide": (10, 24)})
    tx = optax_gale.gale_adamw(1e-2, 4, **CHEAP)
    state = tx.init(params)

    def loss(run, params):
        return jnp.sum(run(tx, grads, state, params, refresh=False)[0]["wide"])

    runs = (optax_gale.update_and_apply, in_two_calls)
    found, expected = (jax.grad(loss, argnums=1)(run, params) for run in runs)
    chex.assert_trees_all_close(found, expected, atol=1e-6)


def test_what_is_wrong_is_said():
    tx, params = gale(optax.adamw(1e-2)), draw(0)
    state = tx.init(params)
    with pytest.raises(ValueError, match="needs `params`"):
        optax_gale.update_and_apply(tx, params, state, None)
    with pytest.raises(ValueError, match="must be None or one of"):
        optax_gale.update_and_apply(tx, params, state, params, implementation="cuda")
    with pytest.raises(ValueError, match="must be None or one of"):
        optax_gale.update_and_apply(optax.sgd(1.0), params, (), params, implementation="cuda")
    with pytest.raises(ValueError, match=r"'wide' has shape \(10, 24\), but the parameter"):
        optax_gale.update_and_apply(tx, params, state, {**params, "wide": jnp.ones((24, 10))})
    with pytest.raises(TypeError, match="must be what `init` of this transformation returned"):
        optax_gale.update_and_apply(tx, params, optax.adam(1.0).init(params), params)
    with pytest.raises(TypeError, match="must be an Optax gradient transformation"):
        optax_gale.update_and_apply(optax.adam, params, state, params)
    for implementation in ("mosaic_gpu", "triton"):
        with pytest.raises(
            ValueError, match=f"'{implementation}' cannot serve .* float32 matrices"
        ):
            optax_gale.update_and_apply(tx, params, state, params, implementation=implementation)


def test_equal_arrays_of_a_state_can_be_donated(kernels):
    """They are computed once, but are not one array, outside jit too."""

    def update(updates, state, params=None):
        del params
        again = jax.tree.map(jnp.zeros_like, state)
        return jax.tree.map(lambda u: -1e-2 * u, updates), again

    def init(params):
        return {name: jax.tree.map(jnp.ones_like, params) for name in ("a", "b")}

    inner = optax.GradientTransformation(init, update)
    tx = gale(inner, moments="keep")
    params = {"wide": draw(0)["wide"]}
    _, state = optax_gale.update_and_apply(tx, params, tx.init(params), params)
    assert kernels == [1]
    jax.jit(lambda state: jax.tree.map(jnp.add, state, state), donate_argnums=0)(state)
