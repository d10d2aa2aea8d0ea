"""What every public factory promises, whatever its options: one table for every test."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

import optax_gale
from optax_gale.quantization import Quantized, dequantize

pytestmark = pytest.mark.usefixtures("quick_compilation")

RANK, GAP = 2, 3


def _householder(x, *, rank, key, previous):
    """A range finder from outside the library: QR of the leading columns."""
    del key, previous
    return jnp.linalg.qr(x[..., : 2 * rank].astype(jnp.float32))[0][..., :rank]


def _chained(before, projection: dict[str, Any], *after):
    return optax_gale.chain(
        *before, optax_gale.gale_project(RANK, update_proj_gap=GAP, **projection), *after
    )


def _decays(params):
    return jax.tree.map(lambda p: len(p.shape) > 1, params)


_at = {"rank": RANK, "update_proj_gap": GAP}
# Sketches take most of a step's compilation. Each factory has a row with its default; what else
# differs between rows meets exact SVDs where it does not look at how bases are found.
_svd = {**_at, "range_finder": "svd"}
_FACTORIES: dict[str, Callable[[], optax.GradientTransformationExtraArgs]] = {
    "adamw": lambda: optax_gale.gale_adamw(0.03, **_at),
    "adamw long fira": lambda: optax_gale.gale_adamw(
        0.02, **_at, side="long", residual="fira", weight_decay=1e-3, mask=_decays
    ),
    "adamw staggered": lambda: optax_gale.gale_adamw(
        0.03, **_svd, refresh_schedule="staggered", nesterov=True
    ),
    "adamw svd keep": lambda: optax_gale.gale_adamw(
        0.03, **_at, range_finder="svd", moments="keep"
    ),
    "adamw half precision": lambda: optax_gale.gale_adamw(
        0.03, **_at, projector_dtype="bfloat16", state_dtype="float32", mu_dtype="bfloat16"
    ),
    "adamw int8": lambda: optax_gale.gale_adamw(
        0.03, **_svd, state_dtype="int8", projector_dtype="int8"
    ),
    "quantised inner": lambda: optax_gale.gale(
        optax_gale.quantize_states(optax.adamw(0.03), min_size=0, stochastic_rounding=True),
        **_svd,
        projector_dtype="int4",
    ),
    "adamw two gaps": lambda: optax_gale.gale_adamw(
        0.03,
        rank=lambda path, _: 3 if path == "kernel" else RANK,
        update_proj_gap=lambda path, _: 2 if path == "kernel" else GAP,
        scale=lambda path, _: 0.5 if path == "kernel" else 1.0,
        range_finder="svd",
    ),
    "muon": lambda: optax_gale.gale_muon(0.05, **_at, adam_learning_rate=0.03),
    "muon approx long": lambda: optax_gale.gale_muon(
        0.05,
        **_at,
        range_finder="gale_approx",
        side="long",
        weight_decay=1e-3,
    ),
    "adafactor": lambda: optax_gale.gale_adafactor(0.03, **_at),
    "adafactor factored warm": lambda: optax_gale.gale_adafactor(
        0.03,
        **_at,
        min_dim_size_to_factor=2,
        momentum=0.9,
        range_finder="warm",
        weight_decay=1e-3,
    ),
    "lion": lambda: optax_gale.gale_lion(0.01, **_at),
    "lion reset long": lambda: optax_gale.gale_lion(0.01, **_svd, moments="reset", side="long"),
    "sgd": lambda: optax_gale.gale_sgd(0.01, **_at),
    "sgd random nesterov": lambda: optax_gale.gale_sgd(
        0.01, **_at, range_finder="random", nesterov=True, weight_decay=1e-3
    ),
    "gale of a chain": lambda: optax_gale.gale(
        optax.chain(optax.scale(1.0), optax.yogi(0.03)),
        **_at,
        range_finder=optax_gale.Sketch(oversampling=1, sketch="rademacher"),
        full_rank=optax.adam(0.03),
    ),
    "gale with a custom range finder": lambda: optax_gale.gale(
        optax.adamw(optax.cosine_decay_schedule(0.05, 400)), **_at, range_finder=_householder
    ),
    "stochastic rounding": lambda: optax_gale.stochastic_rounding(
        optax_gale.gale_adamw(0.03, **_svd)
    ),
    "kahan summation": lambda: optax_gale.kahan_summation(optax_gale.gale_lion(0.01, **_svd)),
    "chain": lambda: _chained([], {}, optax.adamw(0.03)),
    "chain of stages": lambda: _chained(
        [optax.scale(1.0)],
        {
            "refresh_schedule": "staggered",
            "residual": "fira",
            "side": "long",
            "range_finder": "svd",
        },
        optax.scale_by_adam(),
        optax.add_decayed_weights(1e-3),
        optax.scale_by_schedule(optax.linear_schedule(-0.03, -0.01, 200)),
    ),
}


def _params(dtype: Any = jnp.float32):
    """Projected: `kernel` and both matrices of `stack`. At full rank: the others."""
    keys = iter(jax.random.split(jax.random.key(0), 4))
    normal = lambda *shape: jax.random.normal(next(keys), shape).astype(dtype)
    return {
        "bias": normal(5),
        "embedding": normal(6, 5),
        "kernel": normal(8, 5),
        "stack": normal(2, 4, 6),
    }


PROJECTED = ("kernel", "stack")


def _loss(params):
    """Least squares, moderately ill-conditioned, with its minimum at 0."""
    x = jax.random.normal(jax.random.key(9), (16, 16))
    total = sum(jnp.sum((x[:, : p.shape[-2]] @ p) ** 2) for p in params.values() if p.ndim > 1)
    return (total + jnp.sum(params["bias"] ** 2)) / 16


def gale_state(state: Any) -> optax_gale.GaleState:
    """The GaleState in any state."""
    is_gale = lambda x: isinstance(x, optax_gale.GaleState)
    (found,) = (x for x in jax.tree.leaves(state, is_leaf=is_gale) if is_gale(x))
    return found


class Run(NamedTuple):
    """A transformation and its one compiled step, shared by the tests of a table's row."""

    tx: optax.GradientTransformationExtraArgs
    params: Any
    state: Any
    step: Callable[..., Any]
    traces: list[int]

    def steps(self, count: int, gradients: Callable[[int], Any] | None = None):
        """Params, states and updates of some steps; ``gradients`` adds to them step by step."""
        params, state = self.params, self.state
        history = []
        for k in range(count):
            offset = None if gradients is None else gradients(k)
            gain = jnp.float32(offset is None)
            offset = self.zeros() if offset is None else offset
            updates, params, state = self.step(params, state, gain, offset)
            history.append((updates, params, state))
        return history

    def zeros(self):
        return jax.tree.map(jnp.zeros_like, self.params)


_QUICK = ("adamw", "adamw int8", "muon", "adafactor", "lion", "sgd", "chain", "kahan summation")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[] if name in _QUICK else pytest.mark.slow) for name in _FACTORIES
    ],
    ids=lambda name: name.replace(" ", "-"),
)
def run(request) -> Run:
    tx = _FACTORIES[request.param]()
    params = _params()
    traces: list[int] = []

    @jax.jit
    def step(params, state, gain, offset):
        traces.append(1)
        grads = jax.tree.map(lambda g, o: gain * g + o, jax.grad(_loss)(params), offset)
        updates, state = tx.update(
            grads, state, params, value=gain, grad=grads, something_unexpected=1
        )
        return updates, optax.apply_updates(params, updates), state

    return Run(tx, params, jax.jit(tx.init)(params), step, traces)


def test_state_holds_arrays_only_and_none_is_empty(run):
    for path, x in jax.tree_util.tree_leaves_with_path(run.state):
        assert isinstance(x, jax.Array), jax.tree_util.keystr(path)
        assert x.size > 0, jax.tree_util.keystr(path)
    shapes = {x.shape for x in jax.tree.leaves(gale_state(run.state).inner_state)}
    assert not shapes & {run.params[name].shape for name in PROJECTED}


def test_init_on_shapes_and_without_jit_is_the_same(run):
    shapes = jax.eval_shape(lambda: run.params)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(run.tx.init, shapes), run.tx.init(shapes), run.state
    )
    chex.assert_trees_all_equal(run.tx.init(run.params), run.state)


def test_one_compilation_and_a_stable_state_over_refreshes(run):
    history = run.steps(2 * GAP + 2)
    assert len(run.traces) == 1
    for updates, params, state in history:
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params, run.params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, run.state)
    assert int(gale_state(history[-1][2]).count) == len(history)


def test_a_run_repeats_exactly(run):
    chex.assert_trees_all_equal(run.steps(GAP + 2), run.steps(GAP + 2))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])  # float32: above
def test_updates_have_the_dtype_of_the_parameters(run, dtype):
    with jax.enable_x64(dtype == "float64"):
        params = jax.eval_shape(lambda: _params(dtype))
        state = jax.eval_shape(run.tx.init, params)
        assert params["kernel"].dtype == dtype
        updates, new_state = jax.eval_shape(run.tx.update, params, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


def test_it_converges(run):
    start, (*_, (_, params, _)) = _loss(run.params), run.steps(250)
    assert _loss(params) < 0.2 * start


def _read(p):
    return np.asarray(dequantize(p) if isinstance(p, Quantized) else p, np.float64)


def _orthonormality(p):
    p = _read(p)
    return np.abs(np.swapaxes(p, -1, -2) @ p - np.eye(p.shape[-1])).max()


_ORTHONORMAL = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 2e-2, "int4": 0.3}


def test_projectors_are_orthonormal_and_used(run):
    before = gale_state(run.state).projector
    kept = before["kernel"]
    tolerance = _ORTHONORMAL[kept.code if isinstance(kept, Quantized) else str(kept.dtype)]
    for _, _, state in run.steps(GAP + 1):
        after = gale_state(state).projector
        assert all(_orthonormality(after[name]) < tolerance for name in PROJECTED)
    assert not np.allclose(_read(after["kernel"]), _read(kept), atol=0.1)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_useless_gradient_does_not_touch_the_projectors(run, bad):
    """Neither at the first refresh nor at a later one, and matrix by matrix."""
    at_all = lambda value: jax.tree.map(lambda p: jnp.full_like(p, value), run.params)
    first = run.steps(1, lambda k: at_all(bad))
    chex.assert_trees_all_equal(gale_state(first[0][2]).projector, gale_state(run.state).projector)
    # Only the second matrix of the stack is hit; nothing else notices, in any step of a cycle.
    healthy = lambda k: jax.grad(_loss)(jax.tree.map(lambda p: p + 0.1 * k, run.params))

    def hit(k):
        grads = healthy(k)
        if k == 0:
            return grads
        return {**grads, "stack": grads["stack"].at[1].set(bad)}

    before, *states = [
        (params, gale_state(state).projector) for _, params, state in run.steps(GAP + 2, hit)
    ]
    wanted = [(p, gale_state(state).projector) for _, p, state in run.steps(GAP + 2, healthy)][1:]
    neighbours_alive = True
    for (params, got), (_, want) in zip(states, wanted, strict=True):
        of_layer = lambda p, i: jax.tree.map(lambda x: x[i], p["stack"])
        chex.assert_trees_all_equal(of_layer(got, 1), of_layer(before[1], 1))
        if neighbours_alive:
            chex.assert_trees_all_equal(of_layer(got, 0), of_layer(want, 0))
            chex.assert_trees_all_equal(got["kernel"], want["kernel"])
        # Adafactor clips by a norm over the whole leaf, and so spreads what is not finite itself.
        neighbours_alive &= bool(jnp.all(jnp.isfinite(params["stack"][0])))


@struct.dataclass
class _Block:
    kernel: Any
    bias: Any = None


_TREES = {
    "array": lambda a, b: a,
    "tuple": lambda a, b: (a, (b,)),
    "list": lambda a, b: [a, b],
    "none": lambda a, b: {"a": a, "b": None, "c": {"d": None, "e": b}},
    "masked": lambda a, b: {"a": a, "b": optax.MaskedNode(), "c": b},
    "empty": lambda a, b: {"a": a, "b": {}, "c": (), "d": [], "e": optax.EmptyState()},
    "dataclass": lambda a, b: _Block({"inner": _Block(a, b)}),
    "nothing to project": lambda a, b: {"bias": b},
    "no leaves": lambda a, b: {"a": {}, "b": None},
}


@pytest.mark.parametrize("shape", list(_TREES))
def test_parameters_of_any_structure(run, shape):
    params = _TREES[shape](jnp.ones((8, 5)), jnp.ones(5))
    shapes = jax.eval_shape(lambda: params)
    state = jax.eval_shape(run.tx.init, shapes)
    updates, new_state = jax.eval_shape(run.tx.update, shapes, state, shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


def test_seeds_matter_and_paths_too():
    grads = {"a": jnp.arange(40.0).reshape(8, 5), "b": jnp.arange(40.0).reshape(8, 5)}
    projectors = [
        gale_state(tx.update(grads, tx.init(grads), grads)[1]).projector
        for tx in (optax_gale.gale_adamw(1.0, 2, range_finder="random", seed=s) for s in (0, 1))
    ]
    flat = [np.asarray(p[name]) for p in projectors for name in "ab"]
    for i in range(4):
        for j in range(i):
            assert not np.allclose(flat[i], flat[j], atol=0.01)


def test_warm_starts_find_what_the_first_projector_misses():
    """The first r unit vectors, and a gradient that is zero there."""
    params = {"w": jnp.zeros((16, 12))}
    grads = {"w": jax.random.normal(jax.random.key(0), (16, 12)).at[:4].set(0.0)}
    tx = optax_gale.gale(optax.sgd(1.0), 4, range_finder="warm", update_proj_gap=1)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert optax.tree.norm(updates) > 0.5 * optax.tree.norm(grads)


@pytest.mark.parametrize("factory", [optax_gale.gale_adamw, optax_gale.gale_adafactor])
def test_half_precision_gradients_of_float32_parameters(factory):
    """The state's dtype is the parameters', so that steps can be scanned."""
    params = {"w": jnp.ones((16, 12)), "b": jnp.ones(12)}
    grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    options = {"min_dim_size_to_factor": 2} if factory is optax_gale.gale_adafactor else {}
    tx = factory(0.1, rank=4, **options)

    def step(carry, _):
        updates, state = tx.update(grads, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    (trained, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=3)
    chex.assert_tree_all_finite(trained)
    in_subspace = [x for x in jax.tree.leaves(state.inner_state) if x.ndim]
    assert {x.dtype for x in in_subspace} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    "factory", [optax_gale.gale_adamw, optax_gale.gale_lion, optax_gale.gale_sgd,
                optax_gale.gale_muon, optax_gale.gale_adafactor],
)  # fmt: skip
def test_injected_hyperparameters_under_jit(factory):
    """All that can be injected is; what must be static says so."""
    params = {"w": jnp.ones((16, 12)), "b": jnp.ones(12)}
    options = {"rank": 4, "range_finder": "svd"}
    if factory is optax_gale.gale_adafactor:
        tx = optax.inject_hyperparams(factory)(0.1, **options)
        with pytest.raises(TypeError, match=r"static_args=\('min_dim_size_to_factor',\)"):
            jax.jit(tx.update)(params, tx.init(params), params)
        inject = optax.inject_hyperparams(factory, static_args=("min_dim_size_to_factor",))
    else:
        inject = optax.inject_hyperparams(factory)
    tx, plain = inject(0.1, **options), factory(0.1, **options)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    expected, _ = jax.jit(plain.update)(params, plain.init(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-5)


def test_sgd_without_momentum_and_a_refresh_of_numpys():
    params = {"w": jnp.ones((16, 12))}
    tx = optax_gale.gale_sgd(0.1, rank=4, momentum=None)
    state = tx.init(params)
    assert all(x.shape != (4, 12) for x in jax.tree.leaves(state))
    updates, _ = tx.update(params, state, params, refresh=np.bool_(True))
    chex.assert_trees_all_close(updates["w"], -0.1 * params["w"], rtol=1e-4)


def test_init_does_not_run_the_inner_leaf_by_leaf():
    """Programs are read once, whatever the number of leaves: hundreds of them take seconds."""
    calls = []

    def update(updates, state, params=None):
        calls.append(1)
        return updates, state

    inner = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    params = [jnp.ones((8, 8)) for _ in range(50)]
    optax_gale.gale(inner, 4).init(params)
    assert len(calls) == 1
