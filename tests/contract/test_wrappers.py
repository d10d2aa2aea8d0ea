"""Every public factory inside everything that people put around an optimizer.

Traced, not run: that numbers are right there is shown for one of them in `test_frameworks`, and
does not depend on the factory, since each is the same wrapper around another inner.
"""

import functools
import inspect

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training import train_state
from jax.sharding import AxisType

import optax_gale

RANK = 2
_at = {"rank": RANK, "update_proj_gap": 3}
FACTORIES = {
    "gale": functools.partial(optax_gale.gale, optax.adamw(0.1)),
    "gale_adamw": functools.partial(optax_gale.gale_adamw, 0.1),
    "gale_muon": functools.partial(optax_gale.gale_muon, 0.1),
    "gale_adafactor": functools.partial(optax_gale.gale_adafactor, 0.1),
    "gale_lion": functools.partial(optax_gale.gale_lion, 0.1),
    "gale_sgd": functools.partial(optax_gale.gale_sgd, 0.1),
    "chain": lambda **options: optax_gale.chain(
        optax.clip_by_global_norm(1.0), optax_gale.gale_project(**options), optax.adamw(0.1)
    ),
    "momentum in the subspace": lambda **options: optax_gale.gale(
        optax.chain(
            optax_gale.scale_by_orthogonalized_momentum(), optax.scale_by_learning_rate(0.1)
        ),
        **options,
        full_rank=optax.adam(0.1),
    ),
    "quantize_states": lambda **options: optax_gale.quantize_states(
        optax_gale.gale_adamw(0.1, **options), min_size=1, block_size=4
    ),
    "accumulate": lambda **options: optax_gale.accumulate(optax_gale.gale_adamw(0.1, **options), 2),
    "stochastic_rounding": lambda **options: optax_gale.stochastic_rounding(
        optax_gale.gale_adamw(0.1, **options)
    ),
    "kahan_summation": lambda **options: optax_gale.kahan_summation(
        optax_gale.gale_adamw(0.1, **options)
    ),
}
WRAPPERS = {
    "alone": lambda tx: tx,
    "partition": lambda tx: optax.partition(
        {"low": tx, "full": optax.sgd(0.1)},
        lambda params: jax.tree.map(lambda p: "low" if p.ndim > 1 else "full", params),
    ),
    "masked": lambda tx: optax.masked(
        tx, lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step, **_: step >= 0),
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx, optax.scale(0.5)),
    "named_chain": lambda tx: optax.named_chain(("tx", tx)),
}


def make(name):
    return FACTORIES[name](**_at)


def params(dtype=jnp.float32):
    shapes = {"kernel": (8, 6), "stack": (2, 4, 6), "bias": (6,)}
    return {name: jnp.ones(shape, dtype) for name, shape in shapes.items()}


def ranks(state):
    """Lengths of the last axis of projectors in a state."""
    found = jax.tree_util.tree_leaves_with_path(state)
    return [
        x.shape[-1]
        for path, x in found
        if any(getattr(key, "name", "") == "projector" for key in path) and x.ndim > 1
    ]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", FACTORIES)
def test_optax(name, wrapper):
    tx = WRAPPERS[wrapper](make(name))

    def train():
        weights = params()
        state = first = tx.init(weights)
        for _ in range(2):
            updates, state = tx.update(weights, state, weights)
            weights = optax.apply_updates(weights, updates)
        return weights, first, state

    weights, first, state = jax.eval_shape(train)
    chex.assert_trees_all_equal_shapes_and_dtypes(weights, params())
    chex.assert_trees_all_equal_shapes_and_dtypes(first, state)
    assert len(ranks(state)) >= 2


def names_of(function):
    return inspect.signature(function).parameters


ALIASES = ("gale_adamw", "gale_muon", "gale_adafactor", "gale_lion", "gale_sgd")


@pytest.mark.parametrize("name", ALIASES)
def test_inject_hyperparams(name):
    factory = getattr(optax_gale, name)
    static = [name for name in ("rank", "min_dim_size_to_factor") if name in names_of(factory)]
    tx = optax.inject_hyperparams(factory, static_args=static)(0.1, **_at)

    def train():
        state = tx.init(params())
        return tx.update(params(), state, params())

    _, state = jax.eval_shape(train)
    assert state.hyperparams["learning_rate"].shape == () and len(ranks(state)) >= 2


class Mlp(nn.Module):
    """With names on the axes of the kernels if `boxed`."""

    boxed: bool

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        if self.boxed:
            init = nn.with_partitioning(init, ("embed", "mlp"))
        return nn.Dense(12, kernel_init=init)(nn.Dense(6, kernel_init=init)(x))


@pytest.mark.parametrize("boxed", [False, True], ids=["plain", "boxed"])
@pytest.mark.parametrize("name", FACTORIES)
def test_linen(name, boxed):
    model, x = Mlp(boxed), jnp.ones((3, 8))

    def train():
        weights = model.init(jax.random.key(0), x)["params"]
        state = train_state.TrainState.create(apply_fn=model.apply, params=weights, tx=make(name))
        grads = jax.grad(lambda p: jnp.mean(model.apply({"params": p}, x) ** 2))(state.params)
        return state, state.apply_gradients(grads=grads)

    before, after = jax.eval_shape(train)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    assert len(ranks(after.opt_state)) == 2


@pytest.mark.parametrize("names", [None, (None, "model")], ids=["plain", "metadata"])
@pytest.mark.parametrize("name", FACTORIES)
def test_nnx(name, names):
    def train():
        init = nnx.initializers.lecun_normal()
        if names is not None:
            init = nnx.with_partitioning(init, names)
        model = nnx.Linear(8, 6, kernel_init=init, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, make(name), wrt=nnx.Param)
        grads = nnx.grad(lambda model: jnp.mean(model(jnp.ones((3, 8))) ** 2))(model)
        optimizer.update(model, grads)
        return model.kernel.get_value(), nnx.state(optimizer)

    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        if names is not None and name == "gale_adafactor":
            # Flax gives every array of a state its parameter's axes, and Adafactor's have fewer:
            # optax.adafactor fails too.
            with pytest.raises(ValueError, match="sharding"):
                nnx.eval_shape(train)
            return
        kernel, state = nnx.eval_shape(train)
    assert kernel.shape == (8, 6)
    assert jax.tree.leaves(state)
