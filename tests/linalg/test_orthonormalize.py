import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import orthogonality_error, sine, with_spectrum

from optax_gale.linalg import orthonormalize

SAFE_METHODS = ("auto", "randomized_cholesky_qr", "householder")
EPS = float(np.finfo(np.float32).eps)


def ill_conditioned(m, k):
    rng = np.random.default_rng(0)
    matrices = {
        f"kappa 1e{e}": with_spectrum(np.logspace(0, -e, k), m, k, seed=e) for e in range(11)
    }
    matrices["one small direction"] = with_spectrum(np.append(np.ones(k - 1), 1e-8), m, k)
    matrices["half of the rank"] = with_spectrum(np.repeat([1.0, 0.0], [k - k // 2, k // 2]), m, k)
    matrices["rank 1"] = rng.standard_normal((m, 1)) @ rng.standard_normal((1, k))
    matrices["equal columns"] = np.repeat(rng.standard_normal((m, 1)), k, axis=1)
    matrices["constant"] = np.ones((m, k))
    matrices["nearly constant"] = 1 + 1e-4 * rng.standard_normal((m, k))
    matrices["one entry"] = np.eye(m, k) * (np.arange(k) == 0)
    matrices["one row"] = np.eye(m, 1) @ np.ones((1, k))
    matrices["zero columns"] = rng.standard_normal((m, k)) * (np.arange(k) % 2)
    matrices["repeated first column"] = rng.standard_normal((m, k))
    matrices["repeated first column"][:, 1:2] = matrices["repeated first column"][:, :1]
    matrices["column scales"] = rng.standard_normal((m, k)) * np.logspace(0, -30, k)
    matrices["integers"] = rng.integers(0, 2, (m, k)).astype(float)
    matrices["Vandermonde"] = np.vander(np.linspace(0, 1, m), k)
    matrices["Hilbert"] = 1 / (1.0 + np.arange(m)[:, None] + np.arange(k))
    matrices["Lauchli"] = np.concatenate([np.ones((1, k)), 1e-4 * np.eye(m - 1, k)])
    matrices["signs"] = np.eye(m, k) - np.triu(np.ones((m, k)), 1)
    return matrices


def lost_accuracy(y, q):
    """The largest distance of a left singular vector to the range of ``q``, relative to the eps s_1
    / s_j by which rounding moves it, over those that rounding does not move freely."""
    y = np.asarray(y, np.float64)
    norms = np.linalg.norm(y, axis=0)
    u, s, _ = np.linalg.svd(y / np.where(norms > 0, norms, 1), full_matrices=False)
    is_known = s > 100 * EPS * s[0]
    u, s, q = u[:, is_known], s[is_known], np.asarray(q, np.float64)
    return np.max(np.linalg.norm(u - q @ (q.T @ u), axis=0) * s / (EPS * s[0]))


@pytest.mark.parametrize(
    ("m", "k", "method"), [*((120, 12, method) for method in SAFE_METHODS), (260, 64, "auto")]
)
def test_sweep_of_ill_conditioned_matrices(m, k, method):
    matrices = ill_conditioned(m, k)
    y = np.stack(list(matrices.values())).astype(np.float32)
    q = np.asarray(orthonormalize(jnp.asarray(y), method))
    errors = dict(zip(matrices, orthogonality_error(q), strict=True))
    assert max(errors.values()) < 3e-6, errors
    accuracy = {name: lost_accuracy(*pair) for name, *pair in zip(matrices, y, q, strict=True)}
    assert max(accuracy.values()) < 40, accuracy


@pytest.mark.parametrize(("m", "k"), [(1, 1), (24, 24), (33, 32)])
def test_few_rows(m, k):
    matrices = ill_conditioned(max(m, 2), k)
    y = np.stack(list(matrices.values())).astype(np.float32)[:, :m]
    y = y[np.any(y != 0, axis=(1, 2))]
    q = np.asarray(orthonormalize(jnp.asarray(y)))
    assert orthogonality_error(q).max() < 3e-6
    # Only a matrix on the axes may give them: a failure would too.
    off_axes = [i for i in range(len(y)) if np.count_nonzero(y[i, :, 0]) > 1]
    assert not any(np.array_equal(q[i], np.eye(m, k)) for i in off_axes)


def test_many_rows_of_one_sign():
    # A plain float32 sum of the squares is wrong by 1e-3 here.
    y = np.stack([np.ones((100_000, 2)), 1 + np.random.default_rng(0).random((100_000, 2))])
    q = orthonormalize(jnp.asarray(y, jnp.float32))
    assert orthogonality_error(q).max() < 1e-5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_input_gives_a_float32_basis(dtype):
    y = jnp.asarray(with_spectrum(np.logspace(0, -6, 4), 40, 4), dtype)
    q = orthonormalize(y)
    assert q.dtype == jnp.float32
    assert orthogonality_error(q) < 3e-6
    chex.assert_trees_all_close(q, orthonormalize(y.astype(jnp.float32)), atol=1e-6)


def test_float64_is_orthonormal_to_float64():
    with jax.enable_x64(True):
        y = jnp.asarray(with_spectrum(np.logspace(0, -20, 6), 50, 6))
        q = orthonormalize(y)
        assert q.dtype == jnp.float64
        assert orthogonality_error(q) < 1e-14


@pytest.fixture(scope="module", params=[*SAFE_METHODS, "cholesky_qr2"])
def batch(request):
    """Variants of one well-conditioned matrix, and their bases, by name."""
    y = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)
    variants = {
        "itself": y,
        "zero": 0 * y,
        "NaN": np.where(np.arange(4) == 1, np.nan, y),
        "Inf": np.where(np.arange(40)[:, None] == 7, np.inf, y),
        "-Inf and NaN": np.where(y > 0, -np.inf, np.nan),
        "subnormal": (y * 1e-20) * 1e-20,
        "tiny": y * 2.0**-100,
        "huge": y * 2.0**100,
        "column scales": y * np.array([1e-30, 1.0, 1e30, 1e-10], np.float32),
        "again": y,
    }
    q = orthonormalize(jnp.asarray(np.stack(list(variants.values()))), request.param)
    return request.param, y, dict(zip(variants, np.asarray(q), strict=True))


def test_bad_matrices_give_the_identity(batch):
    _, _, q = batch
    for name in ("zero", "NaN", "Inf", "-Inf and NaN", "subnormal"):
        np.testing.assert_array_equal(q[name], np.eye(40, 4), err_msg=name)


def test_bad_matrices_leave_the_others_alone(batch):
    method, y, q = batch
    np.testing.assert_array_equal(q["itself"], q["again"])
    np.testing.assert_allclose(q["itself"], orthonormalize(jnp.asarray(y), method), atol=1e-6)
    assert orthogonality_error(q["itself"]) < 3e-6
    assert sine(y, q["itself"]) < 1e-5


def test_scale_does_not_matter(batch):
    _, _, q = batch
    np.testing.assert_array_equal(q["tiny"], q["itself"])
    np.testing.assert_array_equal(q["huge"], q["itself"])
    np.testing.assert_allclose(q["column scales"], q["itself"], atol=2e-6)


def test_triangular_factor_has_a_positive_diagonal(batch):
    method, y, q = batch
    if method == "householder":
        pytest.skip("LAPACK chooses the signs")
    r = q["itself"].T.astype(np.float64) @ y
    assert np.all(np.diag(r) > 0)
    assert np.abs(np.tril(r, -1)).max() < 1e-5
    np.testing.assert_allclose(
        orthonormalize(jnp.asarray(q["itself"]), method), q["itself"], atol=1e-6
    )


def test_cholesky_qr2_is_fine_when_well_conditioned_and_fails_visibly_otherwise():
    y = jnp.asarray(
        np.stack([with_spectrum(np.logspace(0, -e, 8), 60, 8) for e in (1, 9)]), jnp.float32
    )
    q = orthonormalize(y, "cholesky_qr2")
    assert orthogonality_error(q[0]) < 3e-6
    assert np.isnan(q[1]).any()


def test_batch_axes_jit_and_vmap_agree():
    y = jax.random.normal(jax.random.key(0), (2, 1, 2, 40, 4))
    q = orthonormalize(y)
    one_by_one = jnp.stack([orthonormalize(x) for x in y.reshape(4, 40, 4)]).reshape(y.shape)
    chex.assert_trees_all_close(q, one_by_one, atol=1e-6)
    mapped = jax.jit(jax.vmap(orthonormalize, in_axes=2, out_axes=2))(y)
    chex.assert_trees_all_close(q, mapped, atol=1e-6)


def test_no_qr_or_svd_in_the_default_path():
    jaxpr = str(jax.make_jaxpr(orthonormalize)(jnp.zeros((50, 5))))
    assert "cholesky" in jaxpr
    assert not any(name in jaxpr for name in ("geqrf", " qr", "svd", "eigh"))


@given(
    shape=st.sampled_from([(6, 6), (2, 2, 30, 3)]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    rank=st.integers(0, 6),
    scale=st.integers(-30, 30),
    decay=st.floats(0, 12),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_any_input_gives_an_orthonormal_basis_of_its_range(shape, dtype, rank, scale, decay, seed):
    *batch, m, k = shape
    rng = np.random.default_rng(seed)
    rank = min(rank, k)
    s = np.logspace(0, -decay, k) * (np.arange(k) < rank) * 10.0**scale
    y = (rng.standard_normal((*batch, m, k)) * s) @ rng.standard_normal((k, k))
    y = jnp.asarray(y, dtype)
    q = orthonormalize(y)
    chex.assert_shape(q, shape)
    assert q.dtype == jnp.float32
    assert orthogonality_error(q).max() < 3e-6
    for matrix, basis in zip(
        np.asarray(y, np.float32).reshape(-1, m, k), np.asarray(q).reshape(-1, m, k), strict=True
    ):
        if matrix.any():
            assert lost_accuracy(matrix, basis) < 40


@pytest.mark.parametrize(
    ("y", "method", "error", "message"),
    [
        (jnp.zeros((3, 4)), "auto", ValueError, r"y must be .* k <= m.*\(3, 4\)"),
        (jnp.zeros(3), "auto", ValueError, r"y must be .*\(3,\)"),
        (jnp.zeros((4, 3), jnp.int32), "auto", TypeError, "y must be a floating-point.*int32"),
        (jnp.zeros((4, 3)), "qr", ValueError, "method must be one of.*'qr'"),
    ],
)
def test_bad_arguments(y, method, error, message):
    with pytest.raises(error, match=message):
        orthonormalize(y, method)


def test_no_columns():
    assert orthonormalize(jnp.zeros((4, 0))).shape == (4, 0)
