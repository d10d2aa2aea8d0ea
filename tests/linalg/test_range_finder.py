import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from spectra import RANK, decays, orthogonality_error, sine, with_spectrum

from optax_gale.linalg import captured_energy, random_range, range_finder, svd_range

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
M, N = 60, 48
OVERSAMPLING = 5
SPECTRA = np.stack(list(decays(N).values()))
MATRICES = np.stack([with_spectrum(s, M, N) for s in SPECTRA])
G = jnp.asarray(MATRICES, jnp.float32)
ROUNDING = 2e-6


def residuals(p):
    p = np.asarray(p, np.float64)
    return MATRICES - p @ (np.swapaxes(p, -1, -2) @ MATRICES)


@pytest.fixture(scope="module", params=[0, 1])
def mean_errors(request):
    """Power iterations, and the mean errors over 50 draws of rank + oversampling columns."""
    finder = jax.vmap(
        lambda key: range_finder(key, G, RANK + OVERSAMPLING, power_iterations=request.param)
    )
    p = finder(jax.random.split(KEY, 50))
    frobenius = np.linalg.norm(residuals(p), axis=(-2, -1)).mean(axis=0)
    spectral = np.linalg.norm(residuals(p), 2, axis=(-2, -1)).mean(axis=0)
    return request.param, frobenius, spectral


def test_mean_frobenius_error_is_within_the_bound_of_theorem_10_5(mean_errors):
    _, frobenius, _ = mean_errors
    tail = np.linalg.norm(SPECTRA[:, RANK:], axis=-1)
    bound = np.sqrt(1 + RANK / (OVERSAMPLING - 1)) * tail
    assert np.all(frobenius <= bound + ROUNDING)
    best = np.linalg.norm(SPECTRA[:, RANK + OVERSAMPLING :], axis=-1)
    assert np.all(frobenius >= best - ROUNDING)  # or the residuals here are wrong


def test_mean_spectral_error_is_within_the_bound_of_theorem_10_6(mean_errors):
    iterations, _, spectral = mean_errors
    # Corollary 10.10: the bound of (A Aᵀ)^q A, to the power of 1 / (2 q + 1).
    power = 2 * iterations + 1
    k, p = RANK, OVERSAMPLING
    largest = (1 + np.sqrt(k / (p - 1))) * SPECTRA[:, k] ** power
    tail = np.linalg.norm(SPECTRA[:, k:] ** power, axis=-1)
    bound = (largest + np.e * np.sqrt(k + p) / p * tail) ** (1 / power)
    assert np.all(spectral <= bound + ROUNDING)


def test_oversampling_keeps_the_leading_directions_in_order():
    p = range_finder(KEY, G, RANK, oversampling=OVERSAMPLING)
    chex.assert_shape(p, (len(G), M, RANK))
    assert orthogonality_error(p).max() < 5e-6
    best = np.linalg.norm(SPECTRA[:, RANK:], axis=-1)
    error = np.linalg.norm(residuals(p), axis=(-2, -1))
    assert np.all(error <= 1.05 * best + ROUNDING)
    b = np.swapaxes(np.asarray(p, np.float64), -1, -2) @ MATRICES
    gram = b @ np.swapaxes(b, -1, -2)
    energies = np.diagonal(gram, axis1=-2, axis2=-1)
    # Squares of singular values, some of them equal: rounded to twice their own rounding.
    assert np.all(np.diff(energies) <= 2 * ROUNDING)
    assert np.abs(gram - energies[..., None] * np.eye(RANK)).max() < 2 * ROUNDING


@pytest.mark.parametrize("options", [{}, {"power_iterations": 0}, {"sample_fraction": 0.5}])
def test_alignment_turns_the_basis_within_its_subspace(options):
    plain = range_finder(KEY, G, RANK, **options)
    aligned = range_finder(KEY, G, RANK, align=True, **options)
    assert orthogonality_error(aligned).max() < 5e-6
    for i in range(len(G)):
        assert sine(plain[i], aligned[i]) < 1e-5

    def mixing(p):
        """How far P^T G is from having orthogonal rows, as singular vectors would give it."""
        b = np.swapaxes(np.asarray(p, np.float64), -1, -2) @ MATRICES
        gram = b @ np.swapaxes(b, -1, -2)
        off = gram - np.eye(RANK) * gram
        return np.linalg.norm(off, axis=(-2, -1)) / np.linalg.norm(gram, axis=(-2, -1))

    # Where singular values differ at all; a flat spectrum has no vectors of its own.
    decaying = [i for i, s in enumerate(SPECTRA) if s[0] > 1.5 * s[RANK - 1]]
    assert len(decaying) >= 2
    assert np.all(mixing(aligned)[decaying] < 0.9 * mixing(plain)[decaying])


def test_alignment_of_matrices_without_a_range():
    g = G.at[0].set(0.0).at[1].set(jnp.nan).at[2].set(jnp.ones((M, N)))
    p = range_finder(KEY, g, RANK, align=True)
    assert orthogonality_error(p).max() < 5e-6
    chex.assert_trees_all_close(p[:2], jnp.broadcast_to(jnp.eye(M, RANK), (2, M, RANK)), atol=1e-5)
    assert captured_energy(p[2], g[2]) > 1 - 1e-5


def test_truncation_tells_singular_values_below_the_root_of_eps_apart():
    s = 10.0 ** -np.arange(7)
    g = with_spectrum(s, M, N)
    p = np.asarray(range_finder(KEY, jnp.asarray(g, jnp.float32), 5, oversampling=2), np.float64)
    # Eigenvectors of B Bᵀ would mix everything below 3e-4.
    assert np.linalg.norm(g - p @ (p.T @ g), 2) < 1.5e-5


def test_scale_rounding_and_bad_matrices():
    g = np.array(np.broadcast_to(MATRICES[0], (5, M, N)), np.float32)
    g[1:3] *= np.array([1e-30, 1e30], np.float32)[:, None, None]
    g[3, 4, 5] = np.nan
    g[4] = 0
    for dtype in (jnp.float32, jnp.bfloat16):
        p = range_finder(KEY, jnp.asarray(g, dtype), RANK)
        assert p.dtype == jnp.float32
        assert orthogonality_error(p).max() < 5e-6
        energy = captured_energy(p[:3], jnp.asarray(g[:3]))
        best = np.sum(SPECTRA[0, :RANK] ** 2) / np.sum(SPECTRA[0] ** 2)
        np.testing.assert_allclose(energy, best, atol=1e-4)
        np.testing.assert_allclose(energy, energy[0], atol=1e-6)
        np.testing.assert_array_equal(p[3], np.eye(M, RANK))


def test_half_precision_matrices_are_not_copied_to_float32():
    g = jnp.zeros((M, N), jnp.bfloat16)
    start = jnp.zeros((M, 3))
    jaxpr = jax.make_jaxpr(lambda g, start: range_finder(KEY, g, 4, oversampling=2, start=start))(
        g, start
    )
    assert f"bf16[{M},{N}]" in str(jaxpr)
    assert f"f32[{M},{N}]" not in str(jaxpr)


def test_one_sketch_is_shared_by_the_batch_and_vmap_agrees():
    g = jnp.stack([G[1], G[1], G[2]])

    def finder(key, x):
        return range_finder(key, x, 4, power_iterations=0)

    p = finder(KEY, g)
    chex.assert_trees_all_close(p[0], p[1], atol=1e-6)
    mapped = jax.jit(jax.vmap(finder, in_axes=(None, 0)))(KEY, g)
    chex.assert_trees_all_close(p, mapped, atol=1e-5)
    chex.assert_trees_all_equal(p, finder(KEY, g))
    assert sine(p[0], finder(jax.random.key(1), g)[0]) > 1e-3


@pytest.mark.parametrize(("fraction", "expected"), [(0.25, 10), (1e-6, 3)])
def test_the_sketch_reads_a_random_subset_of_the_columns(fraction, expected):
    g = jnp.stack([jnp.eye(50, 40), -jnp.eye(50, 40)])
    p = range_finder(KEY, g, 3, sample_fraction=fraction, power_iterations=0)
    is_read = np.abs(np.asarray(p)).max(axis=-1) > 1e-5
    np.testing.assert_array_equal(is_read.sum(axis=-1), expected)
    np.testing.assert_array_equal(is_read[0], is_read[1])
    assert not is_read[0, :expected].all()


def test_start_makes_a_power_iteration_of_the_old_basis():
    start = random_range(KEY, M, 4, (len(G),))
    p = range_finder(KEY, G[2:], 4, start=start[2:], power_iterations=0)
    for matrix, old, new in zip(MATRICES[2:], start[2:], p, strict=True):
        assert sine(matrix @ (matrix.T @ np.asarray(old, np.float64)), new) < 1e-4


def test_start_is_filled_up_by_a_sketch():
    u = np.linalg.svd(MATRICES[0])[0]
    start = jnp.asarray(u[:, :3], jnp.float32)
    p = range_finder(KEY, G[0], 6, start=start, power_iterations=0)
    assert sine(p, u[:, :3]) < 1e-5
    assert captured_energy(p, G[0]) > captured_energy(start, G[0])


def test_full_rank_holds_everything():
    g = G[1, :20, :12]
    np.testing.assert_allclose(
        captured_energy(range_finder(KEY, g, 12, power_iterations=0), g), 1, rtol=1e-6
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_svd_range_is_the_svd(dtype):
    g = G[:2, :20, :12].astype(dtype)
    u, _, vh = jnp.linalg.svd(g.astype(jnp.float32), full_matrices=False)
    np.testing.assert_array_equal(svd_range(g, 3), u[..., :3])
    np.testing.assert_array_equal(svd_range(g, 3, "right"), jnp.swapaxes(vh[..., :3, :], -1, -2))


def test_singular_vectors_lie_row_by_row_on_gpus(monkeypatch):
    """Solvers return columns; a loop over layers would copy the projectors of all."""
    g = jnp.ones((2, 6, 4))
    constrains = lambda: "LayoutConstraint" in jax.jit(lambda g: svd_range(g, 3)).lower(g).as_text()
    assert not constrains()  # which `jax.export` would refuse
    jax.export.export(jax.jit(lambda g: svd_range(g, 3)))(g)
    jax.clear_caches()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert constrains()
    monkeypatch.undo()
    jax.clear_caches()


def test_svd_range_of_a_bad_matrix_is_the_identity():
    g = G[:2, :20, :12].at[0, 0, 0].set(jnp.inf)
    p = svd_range(g, 3)
    np.testing.assert_array_equal(p[0], np.eye(20, 3))
    assert orthogonality_error(p[1]) < 5e-6


def test_fallback_is_for_matrices_without_a_range():
    g = G.at[1].set(0.0).at[2].set(jnp.nan)
    fallback = random_range(jax.random.key(1), M, RANK, (4,))
    p = range_finder(KEY, g, RANK, fallback=fallback)
    chex.assert_trees_all_equal(p[1:3], fallback[1:3])
    chex.assert_trees_all_equal(p[::3], range_finder(KEY, g, RANK)[::3])
    # One column of few, which the sample does not hold.
    g = jnp.zeros((M, N)).at[:, 3].set(1.0)
    found = [
        range_finder(
            jax.random.key(i), g, 2, fallback=fallback[0, :, :2], sample_fraction=0.1,
            power_iterations=0,
        )
        for i in range(8)
    ]  # fmt: skip
    kept = [bool(jnp.all(p == fallback[0, :, :2])) for p in found]
    assert any(kept) and not all(kept)
    for p, is_fallback in zip(found, kept, strict=True):
        assert is_fallback or captured_energy(p, g) > 0.999


def test_a_start_that_has_lost_the_matrix_is_sketched_anew():
    g = G.at[:, :RANK].set(0.0)
    start = jnp.broadcast_to(jnp.eye(M, RANK), (len(G), M, RANK))
    cold = captured_energy(range_finder(KEY, g, RANK), g)
    warm = captured_energy(range_finder(KEY, g, RANK, power_iterations=0, start=start), g)
    assert jnp.all(warm > 0.5 * cold)


def test_random_range_draws_independent_orthonormal_bases():
    p = random_range(KEY, 40, 4, (2,))
    assert p.dtype == jnp.float32
    assert orthogonality_error(p).max() < 5e-6
    assert sine(p[0], p[1]) > 0.1
    chex.assert_trees_all_equal(p, random_range(KEY, 40, 4, (2,)))


@pytest.mark.parametrize(
    ("rank", "options", "error", "message"),
    [
        (0, {}, ValueError, "rank must be from 1 to .*got 0"),
        (49, {}, ValueError, r"rank must be from 1 to min\(m, n\) = 48 .*\(4, 60, 48\); got 49"),
        (2, {"oversampling": -1}, ValueError, "oversampling must be 0 or more; got -1"),
        (2, {"power_iterations": -1}, ValueError, "power_iterations must be 0 or more; got -1"),
        (2, {"sample_fraction": 0.0}, ValueError, r"sample_fraction must be in \(0, 1\]; got 0"),
        (2, {"sample_fraction": 1.5}, ValueError, r"sample_fraction must be in \(0, 1\]; got 1.5"),
        (2, {"sketch": "srht"}, ValueError, "sketch must be .*got 'srht'"),
        (2, {"method": "qr"}, ValueError, "method must be one of .*got 'qr'"),
        (2, {"start": jnp.zeros((4, M, 3))}, ValueError, r"r0 <= .* = 2; got shape \(4, 60, 3\)"),
        (2, {"start": jnp.zeros((M, 2))}, ValueError, r"start must be .*got shape \(60, 2\)"),
        (2, {"fallback": jnp.zeros((M, 2))}, ValueError, r"fallback must be .*got shape \(60, 2\)"),
        (2, {"start": jnp.zeros((4, M, 2), int)}, TypeError, "start must be a floating-point"),
    ],
)
def test_bad_arguments(rank, options, error, message):
    with pytest.raises(error, match=message):
        range_finder(KEY, G, rank, **options)


def test_bad_matrices_to_find():
    with pytest.raises(ValueError, match=r"g must be \(\*batch, m, n\); got shape \(3,\)"):
        range_finder(KEY, jnp.zeros(3), 1)
    with pytest.raises(TypeError, match="g must be a floating-point array; got int32"):
        svd_range(jnp.zeros((3, 3), jnp.int32), 1)
    with pytest.raises(ValueError, match="side must be 'left' or 'right'; got 'rows'"):
        svd_range(jnp.zeros((3, 3)), 1, "rows")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="rank must be from 1 to m = 3; got 4"):
        random_range(KEY, 3, 4)
