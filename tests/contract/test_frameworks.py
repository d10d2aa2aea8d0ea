"""The transformations inside what people put around them: Flax, Optax's wrappers, meshes."""

import functools
import itertools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_gale

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Exact SVDs compile in no time; what is tested here does not depend on the range finder.
_at: dict[str, Any] = {"rank": 2, "update_proj_gap": 2, "side": "short", "range_finder": "svd"}


def _compiled_once(function):
    """`jax.jit` that refuses to trace twice."""
    traces = []

    @jax.jit
    def traced(*args):
        traces.append(1)
        assert len(traces) == 1, "compiled twice"
        return function(*args)

    return traced


def _tree():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "kernel": jax.random.normal(keys[0], (8, 6)),
        "stack": jax.random.normal(keys[1], (2, 4, 6)),
        "bias": jax.random.normal(keys[2], (6,)),
    }


def _gradients(params, step):
    """Gradients of full rank that depend on the parameters and on the step."""
    return jax.tree.map(lambda p: p + 0.3 * jnp.sin(37.0 * p + step), params)


def _assert_close(got, want):
    """Other programs round otherwise, which Adam magnifies; a mistake is of order 0.1."""
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)


def _train(tx, params, steps=5, init=None, **extra_args):
    """Parameters after every step, and the last state; one compilation."""
    state = (tx.init if init is None else init)(params)

    @_compiled_once
    def step(params, state, k):
        updates, state = tx.update(_gradients(params, k), state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    history = []
    for k in range(steps):
        params, state = step(params, state, k)
        history.append(params)
    return history, state


@functools.cache
def _bare():
    return _train(optax_gale.gale_adamw(0.1, **_at), _tree())


# --- Optax's wrappers ------------------------------------------------------------------------


def test_partition():
    tx = optax.partition(
        {
            "gale": optax_gale.gale_adamw(0.1, **_at),
            "sgd": optax.sgd(0.1),
            "none": optax.set_to_zero(),
        },
        {"kernel": "gale", "stack": "none", "bias": "sgd"},
    )
    history, state = _train(tx, _tree())
    projector = state.inner_states["gale"].inner_state.projector
    assert projector["kernel"].shape == (6, 2)
    assert projector["bias"] == projector["stack"] == optax.MaskedNode()
    wanted = [{**params, "stack": _tree()["stack"]} for params in _bare()[0]]
    _assert_close([h["kernel"] for h in history], [w["kernel"] for w in wanted])
    chex.assert_trees_all_equal([h["stack"] for h in history], [w["stack"] for w in wanted])


def test_partition_with_a_per_leaf_tree_of_options():
    """Trees of options are written for all parameters; `partition` hides some of them."""
    numbers = {"kernel": optax_gale.GaleDimensionNumbers(), "stack": None, "bias": None}
    tx = optax_gale.gale_adamw(
        0.1,
        rank={"kernel": 2, "stack": 3, "bias": None},
        update_proj_gap={"kernel": 2, "stack": 5, "bias": 7},
        weight_dimension_numbers=numbers,
        range_finder="svd",
    )
    both = optax.partition(
        {"gale": tx, "sgd": optax.sgd(0.1)}, {"kernel": "gale", "stack": "sgd", "bias": "gale"}
    )
    history, _ = _train(both, _tree())
    bare, _ = _train(tx, {k: v for k, v in _tree().items() if k != "stack"} | {"stack": None})
    _assert_close([h["kernel"] for h in history], [b["kernel"] for b in bare])


def test_masked():
    tx = optax.masked(
        optax_gale.gale_adamw(0.1, **_at), {"kernel": True, "stack": False, "bias": True}
    )
    history, state = _train(tx, _tree(), steps=3)
    assert state.inner_state.projector["stack"] == optax.MaskedNode()
    for got, want in zip(history, _bare()[0], strict=False):
        _assert_close(got["kernel"], want["kernel"])
        _assert_close(got["bias"], want["bias"])


@pytest.mark.parametrize("static", [(), ("rank", "update_proj_gap")], ids=["all", "static rank"])
def test_inject_hyperparams(static):
    tx = optax.inject_hyperparams(optax_gale.gale_adamw, static_args=static)(0.1, **_at)
    history, state = _train(tx, _tree())
    _assert_close(history, _bare()[0])
    state.hyperparams["learning_rate"] = jnp.zeros(())
    state.hyperparams["weight_decay"] = jnp.zeros(())
    updates, _ = tx.update(_tree(), state, _tree())
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, _tree()))


def test_inject_hyperparams_under_jit_needs_a_static_rank():
    factory = optax_gale.gale_adamw
    with pytest.raises(TypeError, match=r"`rank`.*static_args=\('rank',\)"):
        jax.jit(optax.inject_hyperparams(factory)(0.1, **_at).init)(_tree())
    tx = optax.inject_hyperparams(factory, static_args=("rank",))(0.1, **_at)
    history, _ = _train(tx, _tree(), init=jax.jit(tx.init))
    _assert_close(history, _bare()[0])


def test_inject_hyperparams_with_a_scheduled_gap():
    """A gap that changes during a run: refreshes at 0, 1, 2, then at 4."""
    factory = optax.inject_hyperparams(optax_gale.gale_adamw, static_args="rank")
    gap = lambda count: jnp.where(count < 3, 1, 4)
    tx = factory(0.1, rank=2, update_proj_gap=gap, range_finder="svd")
    params, projectors = _tree(), []
    state, update = tx.init(params), jax.jit(tx.update)
    for k in range(5):
        _, state = update(_gradients(params, k), state, params)
        projectors.append(state.inner_state.projector["kernel"])
    changed = [not np.array_equal(a, b) for a, b in itertools.pairwise(projectors)]
    assert changed == [True, True, False, True]


def test_multi_steps():
    """Every second micro-step applies the mean of two gradients."""
    tx = optax.MultiSteps(optax_gale.gale_adamw(0.1, **_at), every_k_schedule=2)
    params = _tree()
    state, update = tx.init(params), jax.jit(tx.update)
    bare = optax_gale.gale_adamw(0.1, **_at)
    bare_state, bare_update = bare.init(params), jax.jit(bare.update)
    for k in range(3):
        first, second = _gradients(params, 2 * k), _gradients(params, 2 * k + 1)
        nothing, state = update(first, state, params)
        chex.assert_trees_all_equal(nothing, jax.tree.map(jnp.zeros_like, params))
        updates, state = update(second, state, params)
        mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
        wanted, bare_state = bare_update(mean, bare_state, params)
        _assert_close(updates, wanted)
    assert int(state.gradient_step) == 3


def test_apply_if_finite():
    tx = optax.apply_if_finite(optax_gale.gale_adamw(0.1, **_at), max_consecutive_errors=3)
    params = _tree()
    state, update = tx.init(params), jax.jit(tx.update)
    updates, state = update(_gradients(params, 0), state, params)
    bad = {**_gradients(params, 1), "bias": jnp.full(6, jnp.nan)}
    updates, after = update(bad, state, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    updates, after = update(_gradients(params, 1), after, params)
    assert np.abs(updates["kernel"]).max() > 0 and int(after.total_notfinite) == 1


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.clip_by_global_norm(1e6), tx),
        lambda tx: optax.chain(tx, optax.scale(1.0)),
        lambda tx: optax.chain(optax.apply_every(1), tx),
        lambda tx: optax.named_chain(("gale", tx)),
        lambda tx: optax.conditionally_mask(tx, lambda step, **_: step >= 0),
        lambda tx: optax.chain(tx, optax.contrib.reduce_on_plateau(patience=100)),
    ],
    ids=["clip", "scale", "apply_every", "named_chain", "conditionally", "reduce_on_plateau"],
)
def test_wrappers_that_change_nothing(wrap):
    tx = wrap(optax_gale.gale_adamw(0.1, **_at))
    history, _ = _train(tx, _tree(), steps=3, value=jnp.ones(()))
    _assert_close(history, _bare()[0][:3])


def test_accumulation_inside_the_subspace():
    """`apply_every` as an inner keeps its sum at rank r."""
    inner = optax.chain(optax.apply_every(2), optax.sgd(0.1))
    tx = optax_gale.gale(inner, **_at)
    history, state = _train(tx, _tree(), steps=2)
    assert state.inner_state[0].grad_acc["kernel"].shape == (8, 2)
    chex.assert_trees_all_equal(history[0], _tree())
    assert np.abs(history[1]["kernel"] - _tree()["kernel"]).max() > 0


def test_schedule_free_around():
    tx = optax.contrib.schedule_free(
        optax_gale.gale_adamw(0.1, **_at, b1=0.0), learning_rate=0.1, b1=0.9
    )
    params = _tree()
    history, state = _train(tx, params, steps=40)
    evaluated = optax.contrib.schedule_free_eval_params(state, history[-1])
    norm = lambda tree: float(optax.tree.norm(tree))
    assert norm(evaluated["kernel"]) < 0.5 * norm(params["kernel"])


def test_lookahead_around():
    tx = optax.lookahead(optax_gale.gale_adamw(0.1, **_at), sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(_tree())
    state = tx.init(params)
    update = jax.jit(tx.update)
    for k in range(2):
        updates, state = update(_gradients(params.fast, k), state, params)
        params = optax.apply_updates(params, updates)
    wanted = jax.tree.map(lambda a, b: (a + b) / 2, _tree(), _bare()[0][1])
    _assert_close(params.slow, wanted)


# --- Flax Linen ------------------------------------------------------------------------------


class _Mlp(nn.Module):
    """Two layers, as people write them; with names on the axes of the kernels if `boxed`."""

    boxed: bool = False

    @nn.compact
    def __call__(self, x):
        named = nn.with_partitioning if self.boxed else lambda init, names: init
        init = nn.initializers.lecun_normal()
        x = nn.Dense(16, kernel_init=named(init, ("embed", "mlp")), name="up")(x)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(8, kernel_init=named(init, ("mlp", "embed")), name="down")(x)


def _data():
    x, target = jax.random.split(jax.random.key(3))
    return jax.random.normal(x, (32, 8)), jax.random.normal(target, (32, 8))


def _train_linen(boxed: bool, tx):
    model, (x, y) = _Mlp(boxed), _data()
    state = train_state.TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(0), x)["params"], tx=tx
    )

    @_compiled_once
    def step(state):
        loss = lambda params: jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)
        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(30):
        state, value = step(state)
        losses.append(float(value))
    return state, losses


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax_gale.gale_adamw(0.02, **_at, residual="fira"),
        lambda: optax_gale.gale_muon(0.05, **_at),
        lambda: optax_gale.chain(
            optax.clip_by_global_norm(1.0),
            optax_gale.gale_project(**_at, refresh_schedule="staggered"),
            optax.adamw(0.02),
        ),
    ],
    ids=["adamw", "muon", "chain"],
)
def test_linen_train_state_plain_and_boxed(make):
    plain, losses = _train_linen(False, make())
    assert losses[-1] < 0.7 * losses[0]
    boxed, boxed_losses = _train_linen(True, make())
    assert boxed_losses == losses
    # A box is only a wrapping: the same numbers in the same places.
    chex.assert_trees_all_equal(
        jax.tree.leaves(nn.meta.unbox(boxed.opt_state)), jax.tree.leaves(plain.opt_state)
    )


def test_linen_boxes_name_the_axes_of_the_state():
    state, _ = _train_linen(True, optax_gale.gale_adamw(0.02, **_at))
    specs = nn.get_partition_spec(state).opt_state
    # `up` is 8 x 16, rows projected; `down` is 16 x 8, columns projected.
    assert specs.projector["up"]["kernel"] == P("embed", None)
    assert specs.projector["down"]["kernel"] == P("embed", None)
    adam = specs.inner_state[0]
    for moment in (adam.mu, adam.nu):
        assert moment["up"]["kernel"] == P(None, "mlp")
        assert moment["down"]["kernel"] == P("mlp", None)
        assert moment["up"]["bias"] == P()


def test_linen_scanned_layers_keep_the_name_of_the_layer_axis():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
            return nn.Dense(8, kernel_init=init)(x), None

    scanned = nn.scan(
        Layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    params = scanned().init(jax.random.key(0), jnp.ones((2, 8)), None)["params"]
    tx = optax_gale.gale_adamw(0.1, **{**_at, "side": "long"}, residual="fira")
    state = tx.init(params)
    specs = nn.get_partition_spec(state)
    assert specs.projector["Dense_0"]["kernel"] == P("layers", "embed", None)
    assert specs.inner_state[0].mu["Dense_0"]["kernel"] == P("layers", None, "mlp")
    assert specs.residual["Dense_0"]["kernel"] == P("layers")
    updates, new_state = jax.jit(tx.update)(params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


# --- Flax NNX --------------------------------------------------------------------------------


class _NnxMlp(nnx.Module):
    def __init__(self, names: bool):
        rngs = nnx.Rngs(0)
        init = nnx.initializers.lecun_normal()
        named = nnx.with_partitioning if names else lambda init, _: init
        self.up = nnx.Linear(8, 16, kernel_init=named(init, ("data", "model")), rngs=rngs)
        self.down = nnx.Linear(16, 8, kernel_init=named(init, (None, "data")), rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def _train_nnx(names: bool, check=lambda state: None):
    model = _NnxMlp(names)
    optimizer = nnx.Optimizer(model, optax_gale.gale_adamw(0.02, **_at), wrt=nnx.Param)
    check(optimizer.opt_state)
    x, y = _data()

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(20)]
    check(optimizer.opt_state)
    return losses


@functools.cache
def _nnx_losses():
    return _train_nnx(False)


def test_nnx_optimizer():
    assert _nnx_losses()[-1] < 0.7 * _nnx_losses()[0]


def _mesh(kind: str):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(getattr(AxisType, kind),) * 2)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_nnx_optimizer_with_sharding_metadata(kind):
    def check(state):
        adam = state.inner_state[0]
        # `up` is 8 x 16, rows projected; `down` is 16 x 8, columns projected.
        for tree, up, down in (
            (state.projector, P("data", None), P("data", None)),
            (adam.mu, P(None, "model"), P(None, None)),
            (adam.nu, P(None, "model"), P(None, None)),
        ):
            for layer, spec in (("up", up), ("down", down)):
                variable = tree[layer]["kernel"]
                assert P(*variable.get_metadata("out_sharding")) == spec
                if kind == "Explicit" or int(state.count.get_value()) == 0:
                    wanted = NamedSharding(_mesh(kind), spec)  # later, compilers choose
                    assert variable.get_value().sharding.is_equivalent_to(wanted, 2)

    with jax.set_mesh(_mesh(kind)):
        losses = _train_nnx(True, check)
    np.testing.assert_allclose(losses, _nnx_losses(), rtol=1e-4)


# --- Meshes ----------------------------------------------------------------------------------

_SHARDED = {
    "rows": ((16, 8), P("data", None)),
    "columns": ((8, 16), P(None, ("data", "model"))),
    "both": ((12, 8), P("data", "model")),
    "layers": ((4, 6, 8), P("data", None, "model")),
    "bias": ((8,), P("data")),
}
_RUNS: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "sketch": (optax_gale.gale_adamw, {"residual": "fira"}, ("columns", "both", "layers", "bias")),
    "approx": (
        optax_gale.gale_lion,
        {"range_finder": "gale_approx", "moments": "reset", "side": "long"},
        ("both",),
    ),
    "svd": (
        optax_gale.gale_adafactor,
        {
            "range_finder": "svd",
            "side": "long",
            "refresh_schedule": "staggered",
            "min_dim_size_to_factor": 3,
        },
        ("rows", "both"),
    ),
    "staggered layers": (
        optax_gale.gale_adamw,
        {"range_finder": "svd", "refresh_schedule": "staggered"},
        ("layers",),
    ),
    "muon": (
        optax_gale.gale_muon,
        {"range_finder": "svd", "moments": "keep"},
        ("rows", "layers", "bias"),
    ),
}


def _run_on(place, name, steps=4):
    make, options, chosen = _RUNS[name]
    tx = make(0.1, rank=3, update_proj_gap=2, **options)
    keys = jax.random.split(jax.random.key(0), len(chosen))
    params = {
        leaf: place(jax.random.normal(key, _SHARDED[leaf][0]), _SHARDED[leaf][1])
        for leaf, key in zip(chosen, keys, strict=True)
    }
    state = tx.init(params)

    @_compiled_once
    def step(params, state, k):
        updates, state = tx.update(_gradients(params, k), state, params)
        return optax.apply_updates(params, updates), state

    history = []
    for k in range(steps):
        params, state = step(params, state, k)
        history.append((params, state.projector))
    return history


@functools.cache
def _on_one_device(name):
    return _run_on(lambda x, _: x, name)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("name", list(_RUNS))
@pytest.mark.quick("sketch-Auto", "svd-Explicit")
def test_sharded_parameters_give_the_numbers_of_one_device(kind, name):
    mesh = _mesh(kind)
    with jax.set_mesh(mesh):
        history = _run_on(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), name)
    got, want = jax.device_get((history, _on_one_device(name)))
    _assert_close(got, want)
    for leaf, x in history[-1][0].items():
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, _SHARDED[leaf][1]), x.ndim), leaf


@pytest.mark.parametrize(
    ("spec", "fits"), [(P("data", "model", None), True), (P(None, None, "model"), False)]
)
def test_merged_axes_may_be_sharded_on_the_first(spec, fits):
    mesh = _mesh("Explicit")
    numbers = optax_gale.GaleDimensionNumbers(0, (1, 2))
    tx = optax_gale.gale_adamw(
        0.1, rank=2, range_finder="svd", weight_dimension_numbers=numbers, select=True
    )
    with jax.set_mesh(mesh):
        w = {"query": jax.device_put(jnp.ones((8, 4, 4)), NamedSharding(mesh, spec))}
        if fits:
            updates, _ = jax.jit(tx.update)(w, tx.init(w), w)
            assert jax.typeof(updates["query"]).shape == (8, 4, 4)
            return
        with pytest.raises(ValueError, match=r"'query' .*Shard axis 1 instead of 2"):
            tx.init(w)
