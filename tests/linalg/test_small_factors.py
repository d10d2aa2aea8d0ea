"""Split products and blocked factorisations."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_gale.linalg import _split
from optax_gale.pallas.cholesky_and_inverse import cholesky, cholesky_and_inverse
from optax_gale.linalg._split import (
    half_times_split,
    split,
    split_einsum,
    split_gram,
    split_times,
)


def with_condition(condition, k, count=3):
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((count, k, k)))[0]
    return (q * np.logspace(0, -np.log10(condition), k)) @ np.swapaxes(q, -1, -2)


@pytest.mark.parametrize("k", [1, 20, 32, 33, 97, 300])
@pytest.mark.quick("97", "33")
def test_blocked_cholesky(k):
    a = with_condition(1e3, k)
    lower, inverse = cholesky_and_inverse(jnp.asarray(a, jnp.float32))
    expected = np.linalg.cholesky(a)
    np.testing.assert_allclose(lower, expected, atol=1e-4)
    np.testing.assert_array_equal(lower, np.tril(lower))
    np.testing.assert_array_equal(inverse, np.tril(inverse))
    chex.assert_trees_all_equal(lower, cholesky(jnp.asarray(a, jnp.float32)))
    inverse = np.asarray(inverse, np.float64)
    residual = inverse @ a @ np.swapaxes(inverse, -1, -2) - np.eye(k)
    assert np.abs(residual).max() < 2e-4


def test_blocked_cholesky_of_an_indefinite_matrix_is_not_finite():
    a = np.stack([np.eye(100), with_condition(10.0, 100, 1)[0]])
    a[0, 40, 40] = -1
    lower, inverse = cholesky_and_inverse(jnp.asarray(a, jnp.float32))
    for x in (lower, inverse):
        assert not np.isfinite(x[0]).all() and np.isfinite(x[1]).all()


def test_split_products():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, 70, 70)).astype(np.float32)
    high, low = jax.jit(split)(a)
    assert high.dtype == low.dtype == jnp.bfloat16
    whole = np.asarray(high, np.float64) + np.asarray(low, np.float64)
    assert np.abs(whole - a).max() <= 2.0**-17 * np.abs(a).max()
    scale = np.abs(a) @ np.abs(b)
    exact = a.astype(np.float64) @ b
    assert np.abs((jax.jit(split_times)(a, b) - exact) / scale).max() < 2.0**-17
    half = jnp.asarray(a, jnp.bfloat16)
    exact = np.asarray(half, np.float64) @ b
    assert np.abs((jax.jit(half_times_split)(half, b) - exact) / scale).max() < 2.0**-17
    turned = np.swapaxes(a, -1, -2)
    error = (jax.jit(split_gram)(a) - turned.astype(np.float64) @ a) / (np.abs(turned) @ np.abs(a))
    assert np.abs(error).max() < 2.0**-16


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    ("subscripts", "a", "b"),
    [
        ("...rs,...sn->...rn", (2, 7, 9), (2, 9, 30)),
        ("...ms,...rs->...mr", (30, 9), (7, 9)),
        ("...dr,...ds->...rs", (3, 30, 7), (3, 30, 5)),
    ],
)
def test_split_einsum(subscripts, a, b, devices, monkeypatch):
    monkeypatch.setattr(_split, "is_fast", lambda: True)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    a, b = (
        np.random.default_rng(i).normal(size=s).astype(np.float32) for i, s in enumerate((a, b))
    )
    a *= 10.0 ** -np.arange(a.shape[-1], dtype=np.float32)
    exact = np.einsum(subscripts, a.astype(np.float64), b.astype(np.float64))
    size = np.einsum(subscripts, abs(a).astype(np.float64), abs(b).astype(np.float64))
    found = jax.jit(split_einsum, static_argnums=0)(subscripts, a, b)
    assert found.dtype == jnp.float32
    assert np.abs((found - exact) / size).max() < 2.0**-15
    # Not what float32 arithmetic would give, which the test would let pass too.
    assert np.abs((found - exact) / size).max() > 2.0**-23
    monkeypatch.setattr(_split, "is_fast", lambda: False)
    found = split_einsum(subscripts, a, b)
    assert np.abs((found - exact) / size).max() < 2.0**-22


@pytest.mark.parametrize("subscripts", ["rs,sn", "rs,sn->rsn", "rst,stn->rn", "rs->r"])
def test_split_einsum_takes_one_contracted_axis(subscripts):
    with pytest.raises(ValueError, match="contract one axis"):
        split_einsum(subscripts, jnp.ones((2, 2)), jnp.ones((2, 2)))
