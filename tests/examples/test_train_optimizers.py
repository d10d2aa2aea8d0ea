"""The optimizers' table: every entry, every option, and what each does to which weight."""

import dataclasses

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.flax_llama import optimizers
from examples.flax_llama.config import OptimizerOptions, TrainingOptions
from examples.flax_llama.errors import UserError
from examples.flax_llama.memory import breakdown
from examples.flax_llama.model import Llama
from examples.flax_llama.sizes import SIZES

SIZE = conftest.NANO
TRAINING = TrainingOptions(steps=20)
LOW_RANK = [name for name, recipe in optimizers.RECIPES.items() if "rank" in recipe.options]
SAMPLES = {
    **dict(mu_dtype="bfloat16", accumulator_dtype="bfloat16", state_dtype="bfloat16"),
    **dict(projector_dtype="bfloat16", nesterov=True, rank=4, update_proj_gap=3, ns_steps=2),
    **dict(side="long", range_finder="random", moments="rotate", residual="fira"),
    **dict(refresh_schedule="staggered", select="mlp", projection_seed=7, oversampling=2),
    **dict(
        power_iterations=2, sketch="rademacher", sample_fraction=0.5, warm_start=True, align=False
    ),
    **dict(min_dim_size_to_factor=8),
}


@pytest.fixture(scope="module")
def params():
    return jax.jit(Llama(SIZE).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


def make(name, **options):
    settings = optimizers.resolve(name, OptimizerOptions(**options), SIZE, TRAINING.steps)
    return optimizers.build(name, settings, TRAINING)


def shapes_after_update(tx, params):
    def update(params):
        return tx.update(params, tx.init(params), params)

    return jax.eval_shape(update, params)


@pytest.mark.parametrize("name", optimizers.RECIPES)
def test_updates_have_the_shape_of_the_weights(name, params):
    updates, state = shapes_after_update(make(name), params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    assert (breakdown(params, state).projectors > 0) == (name in LOW_RANK)


@pytest.mark.parametrize("name", optimizers.RECIPES)
def test_every_option_is_accepted(name, params):
    known = optimizers.RECIPES[name].options
    values = {option: SAMPLES.get(option, 0.01) for option in known}
    for option, value in values.items():
        make(name, **{option: value})
    if "range_finder" in values:  # all at once; the sketch's options stand for a range finder
        del values["range_finder"], values["moments"]
    jax.eval_shape(lambda p: make(name, **values).init(p), params)


@pytest.mark.parametrize("name", LOW_RANK)
def test_embeddings_head_and_norms_are_at_full_rank(name, params):
    state = jax.eval_shape(lambda p: make(name, rank=4).init(p), params)
    projected = {
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]
        if any(getattr(key, "name", None) == "projector" for key in path)
    }
    assert projected and all("'kernel'" in path for path in projected)
    assert not any("lm_head" in path or "embed" in path for path in projected)
    assert all(
        any(matrix in path for path in projected)
        for matrix in ("query", "key", "value", "out", "gate", "up", "down")
    )


def test_optax_galore_is_run_layer_by_layer(params):
    """The same as ``optax.contrib.galore`` on the matrices of each layer by themselves."""
    settings = optimizers.resolve("optax_galore", OptimizerOptions(rank=4), SIZE, TRAINING.steps)
    rate = optimizers.schedule(settings["learning_rate"], TRAINING)
    alone = optax.contrib.galore(rate, 4, update_proj_gap=5, scale=0.25)
    tx = optimizers.RECIPES["optax_galore"].build(
        settings, lambda peak: optimizers.schedule(peak, TRAINING)
    )
    state, kernel = tx.init(params), params["layers"]["mlp"]["gate"]["kernel"]
    alone_states = [alone.init(matrix) for matrix in kernel]
    update = jax.jit(tx.update)
    for step in range(3):
        grads = jax.tree.map(
            lambda x, step=step: jax.random.normal(jax.random.key(step), x.shape), params
        )
        updates, state = update(grads, state, params)
        for i, matrix in enumerate(grads["layers"]["mlp"]["gate"]["kernel"]):
            expected, alone_states[i] = alone.update(matrix, alone_states[i], kernel[i])
            np.testing.assert_allclose(
                updates["layers"]["mlp"]["gate"]["kernel"][i], expected, rtol=1e-4, atol=1e-7
            )


def test_muon_orthogonalises_each_layer_and_leaves_the_rest_to_adam(params):
    tx = make("muon", learning_rate=1.0, adam_learning_rate=1.0)
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    values = jnp.linalg.svd(updates["layers"]["mlp"]["down"]["kernel"], compute_uv=False)
    assert values.shape == (2, 16)
    assert values.max() < 2 * values.min()
    # Adam's first step is the sign of the gradient.
    head = jnp.abs(updates["lm_head"]["kernel"])
    np.testing.assert_allclose(head, head.mean(), rtol=1e-2)


def test_norms_do_not_decay(params):
    mask = optimizers.decayed(params)
    assert not mask["final_norm"]["scale"] and not mask["layers"]["mlp_norm"]["scale"]
    assert mask["lm_head"]["kernel"] and mask["embed"]["embedding"]


def test_schedule_warms_up_and_ends_at_the_fraction():
    training = TrainingOptions(steps=100, warmup_fraction=0.1, final_lr_fraction=0.1)
    rate = optimizers.schedule(2.0, training)
    np.testing.assert_allclose(rate(0), 0.2, rtol=1e-6)
    np.testing.assert_allclose(rate(10), 2.0, rtol=1e-6)
    np.testing.assert_allclose(rate(100), 0.2, rtol=1e-5)
    assert float(optimizers.schedule(2.0, TrainingOptions(steps=1))(0)) > 0


def test_defaults_follow_model_and_length():
    settings = optimizers.resolve("gale_adamw", OptimizerOptions(), SIZE, steps=20)
    assert (settings["rank"], settings["update_proj_gap"]) == (4, 5)
    settings = optimizers.resolve("gale_adamw", OptimizerOptions(), SIZE, steps=80_000)
    assert settings["update_proj_gap"] == 200


@pytest.mark.parametrize("name", LOW_RANK)
@pytest.mark.parametrize(("size", "side"), [("tiny", "long"), ("60m", None)])
def test_the_longer_side_is_the_default_of_tiny_alone(name, size, side):
    """And of no optimizer whose side is part of its definition."""
    shape = dataclasses.replace(SIZES[size], vocab_size=300)
    settings = optimizers.resolve(name, OptimizerOptions(), shape, TRAINING.steps)
    assert settings.get("side") == (None if name.endswith("galore") else side)
    if "side" in optimizers.RECIPES[name].options:
        settings = optimizers.resolve(name, OptimizerOptions(side="short"), shape, TRAINING.steps)
        assert settings["side"] == "short"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("adamv", {}, "unknown optimizer 'adamv'; choose from adamw"),
        ("adamw", {"rank": 4}, "--rank is not an option of adamw"),
        ("gale_adamw", {"rank": 0}, "--rank must be at least 1"),
        ("gale_adamw", {"rank": 17}, r"\(at most 16\): nothing would be projected"),
        ("optax_galore", {"rank": 17}, "nothing would be projected"),
        ("gale_adamw", {"learning_rate": float("nan")}, "--learning-rate must be a positive"),
        ("muon", {"ns_steps": 0}, "--ns-steps must be from 1 to 100, got 0"),
        ("gale_muon", {"ns_steps": 2**31 - 1}, "--ns-steps must be from 1 to 100"),
        ("adamw", {"eps": -1.0}, "--eps must be 0 or more, got -1.0"),
        ("gale_adamw", {"weight_decay": -0.1}, "--weight-decay must be 0 or more, got -0.1"),
        ("adafactor", {"min_dim_size_to_factor": -1}, "--min-dim-size-to-factor must be 0 or more"),
        ("adafactor", {"decay_rate": -3.0}, "--decay-rate must be more than 0 and less than 1"),
        ("gale_adamw", {"scale": 0.0}, "--scale must be a positive number, got 0.0"),
        ("optax_galore", {"update_proj_gap": 0}, "--update-proj-gap must be at least 1, got 0"),
        ("adamw", {"b1": 1.0}, "--b1 must be at least 0 and less than 1, got 1.0"),
        ("gale_adamw", {"b2": -0.1}, "--b2 must be at least 0 and less than 1, got -0.1"),
        ("muon", {"beta": 1.5}, "--beta must be at least 0 and less than 1, got 1.5"),
        ("muon", {"adam_b1": 1.0}, "--adam-b1 must be at least 0 and less than 1"),
        ("sgd", {"momentum": -0.5}, "--momentum must be at least 0 and less than 1, got -0.5"),
        ("adafactor", {"clipping_threshold": 0.0}, "--clipping-threshold must be a positive"),
        ("gale_adamw", {"scale": float("inf")}, "--scale must be a finite number"),
        ("gale_adamw", {"update_proj_gap": -5}, "--update-proj-gap must be at least 1, got -5"),
        ("gale_adamw", {"range_finder": "svd", "oversampling": 4}, "leave --range-finder out"),
        ("gale_adamw", {"sample_fraction": 2.0}, "sample_fraction"),
    ],
)
def test_what_makes_no_sense_is_refused(name, options, words):
    with pytest.raises(UserError, match=words):
        make(name, **options)


def test_host_refresh_needs_an_optimizer_that_refreshes():
    settings = optimizers.resolve("adamw", OptimizerOptions(), SIZE, 10)
    with pytest.raises(UserError, match="--host-refresh: adamw"):
        optimizers.build("adamw", settings, TrainingOptions(host_refresh=True))
