import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from optax_gale.linalg import captured_energy, principal_angles

RNG = np.random.default_rng(0)


def basis(*shape):
    return np.linalg.qr(RNG.standard_normal(shape))[0]


def rotated(p, angles):
    """Turns each column of ``p`` by its own angle, out of the range of ``p``."""
    m, r = p.shape
    complement = np.linalg.qr(np.concatenate([p, RNG.standard_normal((m, r))], axis=1))[0][:, r:]
    mixed = p * np.cos(angles) + complement * np.sin(angles)
    return mixed @ basis(r, r)


@pytest.mark.parametrize(("r", "s"), [(4, 4), (6, 2), (2, 6)])
def test_angles_agree_with_scipy(r, s):
    p, q = basis(3, 30, r), basis(3, 30, s)
    angles = principal_angles(jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32))
    expected = [scipy.linalg.subspace_angles(*pair) for pair in zip(p, q, strict=True)]
    np.testing.assert_allclose(angles, np.stack(expected), atol=1e-5)


def test_small_and_large_angles_are_accurate():
    expected = np.array([np.pi / 2, np.pi / 2 - 1e-5, 0.8, 1e-2, 1e-4, 1e-6])
    p = basis(40, 6)
    q = rotated(p, expected)
    angles = principal_angles(jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32))
    np.testing.assert_allclose(angles, expected, atol=3e-7)


def test_a_subspace_makes_no_angle_with_itself():
    p = basis(40, 6)
    q = p @ basis(6, 6)
    angles = principal_angles(jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32))
    np.testing.assert_allclose(angles, 0, atol=5e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_captured_energy(dtype, scale):
    p = basis(2, 30, 5)
    g = jnp.asarray(RNG.standard_normal((2, 30, 20)) * scale, dtype)
    exact = np.asarray(g, np.float64)
    r = np.swapaxes(p, -1, -2) @ exact
    expected = np.sum(r**2, axis=(-2, -1)) / np.sum(exact**2, axis=(-2, -1))
    np.testing.assert_allclose(captured_energy(jnp.asarray(p, jnp.float32), g), expected, rtol=1e-5)


def test_captured_energy_of_zero_is_zero():
    assert captured_energy(jnp.eye(4, 2), jnp.zeros((4, 3))) == 0


def test_bases_that_are_not_finite_have_no_angles():
    p = np.stack([basis(20, 3), np.full((20, 3), np.inf), np.full((20, 3), np.nan)])
    q = np.broadcast_to(basis(20, 3), p.shape)
    angles = principal_angles(jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32))
    np.testing.assert_array_equal(np.isnan(angles).all(axis=-1), [False, True, True])
