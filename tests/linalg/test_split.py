"""Split products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_gale.linalg import _split
from optax_gale.linalg._split import (
    half_times_split,
    split,
    split_einsum,
    split_gram,
    split_times,
)


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
