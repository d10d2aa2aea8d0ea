import jax
import jax.numpy as jnp
import numpy as np
import pytest
from spectra import RANK, decays, orthogonality_error, with_spectrum

from optax_gale.linalg import randomized_svd

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
M, N = 60, 45
MATRICES = np.stack([with_spectrum(s, M, N) for s in decays(N).values()])


@pytest.fixture(scope="module")
def factors():
    scales = np.array([1.0, 1e-30, 1e30, 1.0])[:, None, None]
    g = jnp.asarray(MATRICES * scales, jnp.float32)
    u, s, vh = (np.asarray(x, np.float64) for x in randomized_svd(KEY, g, RANK, power_iterations=2))
    return u, s / scales[..., 0], vh


def test_singular_values_agree_with_numpy(factors):
    _, s, _ = factors
    expected = np.linalg.svd(MATRICES, compute_uv=False)[:, :RANK]
    np.testing.assert_allclose(s[[0, 2, 3]], expected[[0, 2, 3]], atol=2e-6)
    # A slow decay is what sketches are bad at; never above the truth (interlacing).
    np.testing.assert_allclose(s[1], expected[1], rtol=0.02)
    assert np.all(s <= expected + 2e-6)
    assert np.all(np.diff(s) <= 0)


def test_factors_are_orthonormal_and_close_to_the_best_approximation(factors):
    u, s, vh = factors
    assert orthogonality_error(u).max() < 5e-6
    assert orthogonality_error(np.swapaxes(vh, -1, -2)).max() < 5e-6
    error = np.linalg.norm(MATRICES - (u * s[:, None]) @ vh, axis=(-2, -1))
    best = np.sqrt(
        [np.sum(values[RANK:] ** 2) for values in np.linalg.svd(MATRICES, compute_uv=False)]
    )
    assert np.all(error <= 1.02 * best + 5e-6)


def test_wide_rank_deficient_and_bad_matrices():
    g = np.stack([MATRICES[0].T, np.zeros((N, M)), np.full((N, M), np.nan)])
    g[0] = with_spectrum(np.array([3.0, 2.0]), N, M)
    u, s, vh = randomized_svd(KEY, jnp.asarray(g, jnp.bfloat16), 4)
    assert u.shape == (3, N, 4) and s.shape == (3, 4) and vh.shape == (3, 4, M)
    assert orthogonality_error(u).max() < 5e-6
    assert orthogonality_error(np.swapaxes(vh, -1, -2)).max() < 5e-6
    np.testing.assert_allclose(s[0, :2], [3, 2], rtol=1e-2)
    assert np.all(s[0, 2:] < 0.03)
    np.testing.assert_array_equal(s[1], 0)
    assert np.isnan(s[2]).all()


@pytest.mark.parametrize(
    ("rank", "options", "message"),
    [
        (0, {}, "rank must be from 1 to"),
        (46, {}, r"rank must be from 1 to min\(m, n\) = 45"),
        (2, {"oversampling": -1}, "oversampling must be 0 or more; got -1"),
        (2, {"power_iterations": -1}, "power_iterations must be 0 or more; got -1"),
    ],
)
def test_bad_arguments(rank, options, message):
    with pytest.raises(ValueError, match=message):
        randomized_svd(KEY, jnp.zeros((M, N)), rank, **options)
