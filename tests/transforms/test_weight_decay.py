"""Weight decay acts on whole weights; what needs the whole weight otherwise is refused."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import optax_gale

from .reference import assert_trees_close, turned

LR, DECAY, RANK = 0.1, 0.3, 2
SHAPES = {"a": {"kernel": (8, 6), "bias": (6,)}, "b": {"kernel": (2, 5, 9)}}


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


PARAMS, GRADS = random_tree(0), random_tree(1)


def decay_of(tx, steps=1, params=PARAMS):
    """What the update owes to the parameters' values: its difference from that of zero weights."""
    update = jax.jit(functools.partial(tx.update, refresh=False))
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = tx.init(params)
    for _ in range(steps):
        with_weights, new_state = update(GRADS, state, params)
        without, other_state = update(GRADS, state, zeros)
        chex.assert_trees_all_equal(new_state, other_state)  # weights leave no trace in the state
        state = new_state
    return jax.tree.map(jnp.subtract, with_weights, without)


def times_params(coefficients):
    """``-lr * coefficient * W``, the coefficients a prefix of the tree."""
    return jax.tree.map(
        lambda c, weights: jax.tree.map(lambda w: -c * np.asarray(w, np.float64), weights),
        coefficients,
        PARAMS,
    )


def no_biases(params):
    return jax.tree.map_with_path(lambda path, _: path[-1].key != "bias", params)


MASK = {"a": {"kernel": False, "bias": True}, "b": True}
LABELS = {"a": "light", "b": "heavy"}

INNERS = {
    "adamw": (lambda: optax.adamw(LR, weight_decay=DECAY), LR * DECAY),
    "no decay": (lambda: optax.adam(LR), 0.0),
    "masked by a tree": (
        lambda: optax.adamw(LR, weight_decay=DECAY, mask=MASK),
        {"a": {"kernel": 0.0, "bias": LR * DECAY}, "b": LR * DECAY},
    ),
    "masked by a callable": (
        lambda: optax.adamw(LR, weight_decay=DECAY, mask=no_biases),
        {"a": {"kernel": LR * DECAY, "bias": 0.0}, "b": LR * DECAY},
    ),
    "masked by rank": (
        lambda: optax.adamw(LR, weight_decay=DECAY, mask=lambda p: jax.tree.map(jnp.ndim, p)),
        LR * DECAY,
    ),
    "injected": (
        lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=LR, weight_decay=DECAY),
        LR * DECAY,
    ),
    "partitioned": (
        lambda: optax.partition(
            {
                "light": optax.adamw(LR, weight_decay=DECAY / 2),
                "heavy": optax.adamw(LR, weight_decay=DECAY),
            },
            LABELS,
        ),
        {"a": LR * DECAY / 2, "b": LR * DECAY},
    ),
    "lion": (lambda: optax.lion(LR, weight_decay=DECAY), LR * DECAY),
    "nadamw": (lambda: optax.nadamw(LR, weight_decay=DECAY), LR * DECAY),
    "adan": (lambda: optax.contrib.ademamix(LR, weight_decay=DECAY), LR * DECAY),
    "adafactor without the parameter scale": (
        lambda: optax.adafactor(LR, multiply_by_parameter_scale=False, weight_decay_rate=DECAY),
        DECAY,  # Adafactor's decay is not multiplied by the learning rate
    ),
    "no decay of novograd's": (lambda: optax.novograd(LR), 0.0),
    "skipping steps that are not finite": (
        lambda: optax.apply_if_finite(optax.adamw(LR, weight_decay=DECAY), 3),
        LR * DECAY,
    ),
    "decay by a schedule": (
        lambda: optax.chain(
            optax.scale_by_adam(),
            optax.add_decayed_weights(DECAY),
            optax.scale_by_schedule(optax.linear_schedule(LR, 0.0, 10)),
            optax.scale(-1.0),
        ),
        LR * DECAY,
    ),
    "accumulated inside": (
        lambda: optax.MultiSteps(optax.adamw(LR, weight_decay=DECAY), 1),
        LR * DECAY,
    ),
    "chain": (
        lambda: optax.chain(
            optax.scale_by_adam(),
            optax.add_decayed_weights(DECAY),
            optax.scale_by_learning_rate(LR),
        ),
        LR * DECAY,
    ),
}


@pytest.mark.parametrize("name", INNERS)
def test_decay_acts_on_the_whole_weight_and_is_not_scaled(name):
    make, coefficients = INNERS[name]
    tx = optax_gale.gale(make(), RANK, scale=0.25)
    assert_trees_close(decay_of(tx), times_params(coefficients), 1e-5)


def test_masked_wrapper_around_decay():
    decay = optax.masked(optax.add_decayed_weights(DECAY), MASK)
    tx = optax_gale.chain(
        optax_gale.gale_project(RANK, scale=7.0),
        optax.scale_by_adam(),
        decay,
        optax.scale_by_learning_rate(LR),
    )
    expected = {"a": {"kernel": 0.0, "bias": LR * DECAY}, "b": LR * DECAY}
    assert_trees_close(decay_of(tx), times_params(expected), 1e-5)


def test_decay_follows_the_schedule():
    schedule = optax.linear_schedule(0.0, LR, 4)
    tx = optax_gale.gale_adamw(schedule, RANK, weight_decay=DECAY, scale=0.25)
    for steps in (2, 4):
        rate = float(schedule(steps - 1)) * DECAY
        assert_trees_close(decay_of(tx, steps), times_params(rate), 1e-5)


def test_injected_outside_the_wrapper_under_jit():
    tx = optax.inject_hyperparams(optax_gale.gale_adamw, static_args=("rank", "range_finder"))(
        learning_rate=LR, rank=RANK, weight_decay=DECAY, scale=0.25, range_finder=turned
    )
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    update = jax.jit(tx.update)
    state = tx.init(PARAMS)
    for decay in (DECAY, 2 * DECAY):  # changed between steps, without compiling again
        state.hyperparams["weight_decay"] = jnp.asarray(decay)
        with_weights, without = (update(GRADS, state, params)[0] for params in (PARAMS, zeros))
        difference = jax.tree.map(jnp.subtract, with_weights, without)
        assert_trees_close(difference, times_params(LR * decay), 1e-5)


@pytest.mark.parametrize(
    "alias",
    [
        optax_gale.gale_adamw,
        optax_gale.gale_lion,
        optax_gale.gale_sgd,
        optax_gale.gale_muon,
        optax_gale.gale_adafactor,
    ],
)
def test_aliases_decay_alike(alias):
    """Muon's AdamW decays with its own learning rate, the others with the one there is."""
    rates = {"adam_learning_rate": LR / 2} if alias is optax_gale.gale_muon else {}
    tx = alias(LR, RANK, weight_decay=DECAY, scale=0.25, **rates)
    bias = LR * DECAY / 2 if rates else LR * DECAY
    expected = {"a": {"kernel": LR * DECAY, "bias": bias}, "b": LR * DECAY}
    assert_trees_close(decay_of(tx), times_params(expected), 1e-5)


def test_without_parameters_there_is_no_decay():
    """`params` stay optional for an inner that does not need them."""
    tx = optax_gale.gale(optax.adam(LR), RANK)
    state = tx.init(PARAMS)
    chex.assert_trees_all_close(
        tx.update(GRADS, state, refresh=False), tx.update(GRADS, state, PARAMS, refresh=False)
    )


REFUSED = {
    "lamb": (lambda: optax.lamb(LR), "ScaleByAdamState"),
    "lamb with a warm-up from 0": (
        lambda: optax.lamb(optax.linear_schedule(0.0, LR, 100)),
        "ScaleByAdamState",
    ),
    "lars": (lambda: optax.lars(LR), "TraceState"),
    "dog": (lambda: optax.contrib.dog(), "DoGState"),
    "dowg": (lambda: optax.contrib.dowg(), "DoWGState"),
    "adafactor": (lambda: optax.adafactor(LR, multiply_by_parameter_scale=True), "FactoredState"),
    "adafactor with a warm-up from 0": (
        lambda: optax.adafactor(optax.linear_schedule(0.0, LR, 100)),
        "FactoredState",
    ),
    "schedule_free": (
        lambda: optax.contrib.schedule_free(optax.sgd(LR), LR),
        "ScheduleFreeState",
    ),
    "schedule_free_adamw": (lambda: optax.contrib.schedule_free_adamw(LR), "ScheduleFreeState"),
    "prodigy": (lambda: optax.contrib.prodigy(), "ProdigyState"),
    "momo": (lambda: optax.contrib.momo_adam(LR), "MomoAdamState"),
    "mechanize": (lambda: optax.contrib.mechanize(optax.adam(LR)), "MechanicState"),
    "weights kept positive": (
        lambda: optax.chain(optax.adam(LR), optax.keep_params_nonnegative()),
        "ScaleByAdamState",
    ),
    "decay through a momentum": (
        lambda: optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(LR, momentum=0.9)),
        "TraceState",
    ),
    "decay through an average": (
        lambda: optax.chain(optax.add_decayed_weights(DECAY), optax.ema(0.9)),
        "EmaState",
    ),
    "decay collected over steps": (
        lambda: optax.chain(optax.add_decayed_weights(DECAY), optax.apply_every(4)),
        "ApplyEvery",
    ),
    "novograd with decay": (
        lambda: optax.novograd(LR, weight_decay=DECAY),
        "ScaleByNovogradState",
    ),
    "a norm clipped after decay": (
        lambda: optax.chain(optax.adamw(LR), optax.clip_by_global_norm(1e6)),
        "ScaleByAdamState",
    ),
    "entries clipped after decay": (
        lambda: optax.chain(optax.adamw(LR), optax.clip(1e6)),
        "ScaleByAdamState",
    ),
    "decay of some entries": (
        lambda: optax.chain(
            optax.scale_by_adam(),
            optax.stateless(
                lambda u, p: jax.tree.map(lambda u, p: u + jnp.where(u * p > 0, p, 0), u, p)
            ),
        ),
        "ScaleByAdamState",
    ),
    "decay of others": (
        lambda: optax.chain(
            optax.scale_by_adam(),
            optax.stateless(lambda u, p: jax.tree.map(lambda u: u + jnp.sum(p["a"]["kernel"]), u)),
        ),
        "ScaleByAdamState",
    ),
    "a trust ratio": (
        lambda: optax.chain(optax.scale_by_adam(), optax.scale_by_trust_ratio(), optax.scale(-LR)),
        "ScaleByAdamState",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_needs_the_whole_weight(name):
    make, state_name = REFUSED[name]
    tx = optax_gale.gale(make(), RANK)
    with pytest.raises(ValueError, match="The inner ") as caught:
        tx.init(PARAMS)
    message = str(caught.value)
    assert state_name in message
    assert "outside the wrapper" in message and "schedule_free(gale(...))" in message


def test_refused_in_a_chain_and_as_shapes_alike():
    tx = optax_gale.chain(optax_gale.gale_project(RANK), optax.lamb(LR))
    with pytest.raises(ValueError, match="decoupled weight decay"):
        jax.eval_shape(tx.init, PARAMS)
    with pytest.raises(ValueError, match="decoupled weight decay"):
        jax.jit(tx.init)(PARAMS)


def test_refused_where_hyperparameters_are_traced():
    @optax.inject_hyperparams
    def make(learning_rate):
        return optax_gale.gale(optax.lamb(learning_rate), RANK)

    with pytest.raises(ValueError, match="decoupled weight decay"):
        jax.jit(make(LR).init)(PARAMS)


def test_the_remedy_works():
    """Schedule-free outside the wrapper, as the error says."""
    inner = optax_gale.gale(optax.sgd(LR), RANK, update_proj_gap=1, range_finder=turned)
    tx = optax.contrib.schedule_free(inner, LR)
    params, state = PARAMS, tx.init(PARAMS)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(params, state, params)  # the gradient of |w|^2 / 2
        return optax.apply_updates(params, updates), state

    for _ in range(50):
        params, state = step(params, state)
    average = optax.contrib.schedule_free_eval_params(state, params)
    assert optax.tree.norm(average) < 0.7 * optax.tree.norm(PARAMS)


def test_what_is_not_projected_may_use_its_parameters():
    """The trust ratio of a bias is its own; nothing is refused if nothing is projected."""
    tx = optax_gale.gale(optax.lamb(LR), rank=100)
    chex.assert_trees_all_close(
        tx.update(GRADS, tx.init(PARAMS), PARAMS, refresh=False)[0],
        optax.lamb(LR).update(GRADS, optax.lamb(LR).init(PARAMS), PARAMS)[0],
    )
    tx = optax_gale.gale(
        optax.partition(
            {"matrix": optax.adamw(LR, weight_decay=DECAY), "vector": optax.lamb(LR)},
            lambda params: jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "vector", params),
        ),
        RANK,
    )
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, refresh=False)
    lamb = optax.lamb(LR)
    bias = PARAMS["a"]["bias"]
    expected, _ = lamb.update(GRADS["a"]["bias"], lamb.init(bias), bias)
    chex.assert_trees_all_close(updates["a"]["bias"], expected)
