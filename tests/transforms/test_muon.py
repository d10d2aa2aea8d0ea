"""The momentum orthogonalised in the subspace."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_gale
from optax_gale.transforms.muon import newton_schulz

from .reference import assert_trees_close, moments_of, turned

LOW, HIGH = 0.65, 1.25  # where Muon's coefficients leave singular values


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def polar(x):
    """The nearest matrix with orthonormal rows or columns."""
    u, _, vh = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return u @ vh


@pytest.mark.parametrize("shape", [(4, 16), (16, 4), (6, 6), (3, 4, 16), (2, 3, 16, 4)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_newton_schulz(shape, dtype):
    x = draw(*shape, dtype=dtype)
    y = newton_schulz(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    singular_values = np.linalg.svd(np.asarray(y, np.float64), compute_uv=False)
    slack = 0.0 if dtype == "float32" else 0.02
    assert LOW - slack < singular_values.min() and singular_values.max() < HIGH + slack
    if dtype == "float32":  # it moves singular values only
        np.testing.assert_allclose(polar(y), polar(x), atol=1e-4)


def test_newton_schulz_is_blind_to_scale_and_spares_zeros():
    x = draw(2, 4, 16)
    for scale in (1e-4, 1e12):
        np.testing.assert_allclose(newton_schulz(scale * x), newton_schulz(x), atol=1e-2)
    stack = jnp.stack([x[0], jnp.zeros((4, 16))])
    y = newton_schulz(stack)
    np.testing.assert_array_equal(y[1], 0.0)
    np.testing.assert_allclose(y[0], newton_schulz(x[0]), atol=1e-5)


def test_newton_schulz_with_exact_coefficients_converges():
    """The cubic iteration, which has no error of its own."""
    x = draw(4, 16)
    y = newton_schulz(x, steps=12, coefficients=(1.5, -0.5, 0.0))
    np.testing.assert_allclose(y, polar(x), atol=1e-5)


RANK, LR = 4, 0.05
SHAPES = {"wide": (2, 12, 27), "tall": (27, 12)}
FACTORS = {"wide": 1.5, "tall": 1.0}  # sqrt(max(1, n / m))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("side", "scale"), [("short", 1.0), ("long", 0.25)])
def test_updates_have_rank_r_and_singular_values_of_muon(dtype, side, scale):
    params = {k: draw(*s, dtype=dtype) for k, s in SHAPES.items()}
    grads = {k: draw(*s, seed=1, dtype=dtype) for k, s in SHAPES.items()}
    tx = optax_gale.gale_muon(LR, RANK, side=side, scale=scale, range_finder=turned)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    for name, u in updates.items():
        assert u.dtype == dtype
        singular_values = np.linalg.svd(np.asarray(u, np.float64), compute_uv=False)
        singular_values /= LR * scale * FACTORS[name]
        slack = 0.0 if dtype == "float32" else 0.03
        kept, rest = singular_values[..., :RANK], singular_values[..., RANK:]
        assert LOW - slack < kept.min() and kept.max() < HIGH + slack
        assert rest.max() < (1e-5 if dtype == "float32" else 0.03)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_over_several_steps(nesterov):
    beta, steps = 0.8, 4
    tx = optax_gale.gale_muon(
        LR,
        RANK,
        beta=beta,
        nesterov=nesterov,
        weight_decay=0.3,
        side="short",
        range_finder=turned,
        update_proj_gap=100,
    )
    update = jax.jit(tx.update)
    params = {"wide": draw(12, 27)}
    state = tx.init(params)
    m = 0.0
    for step in range(steps):
        grads = {"wide": draw(12, 27, seed=step)}
        updates, state = update(grads, state, params)
        p = np.asarray(state.projector["wide"], np.float64)
        r = p.T @ np.asarray(grads["wide"], np.float64)
        m = beta * m + (1 - beta) * r
        ahead = beta * m + (1 - beta) * r if nesterov else m
        moved = np.asarray(updates["wide"], np.float64) + LR * 0.3 * np.asarray(params["wide"])
        np.testing.assert_allclose(polar(p.T @ moved), -polar(ahead), atol=1e-3)
    assert_trees_close(moments_of(state, "mu")["wide"], m, 1e-5)


def test_what_is_not_projected_trains_with_adamw():
    params = {"kernel": draw(12, 27), "bias": draw(27), "embedding": draw(40, 12)}
    tx = optax_gale.gale_muon(
        LR,
        RANK,
        adam_learning_rate=0.01,
        weight_decay=0.1,
        adam_b2=0.95,
        side="short",
        range_finder=turned,
    )
    adamw = optax.adamw(0.01, b2=0.95, weight_decay=0.1)
    rest = {name: params[name] for name in ("bias", "embedding")}
    state, adam_state = tx.init(params), adamw.init(rest)
    update = jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(params, state, params)
        expected, adam_state = adamw.update(rest, adam_state, rest)
        assert_trees_close({name: updates[name] for name in rest}, expected, 1e-5)
    # One moment of the subspace for the matrix, two of the whole leaf for the others.
    sizes = sorted(x.shape for x in jax.tree.leaves(state.inner_state) if x.ndim)
    assert sizes == sorted([(4, 27), *2 * [(27,)], *2 * [(40, 12)]])


def test_vectors_need_another_optimizer():
    tx = optax_gale.gale(optax_gale.scale_by_orthogonalized_momentum(), RANK)
    with pytest.raises(ValueError, match=r"'bias' has shape \(27,\).*full_rank=") as caught:
        tx.init({"kernel": draw(12, 27), "bias": draw(27)})
    assert "needs matrices" in str(caught.value)
