import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from optax_gale.linalg import gaussian, make_sketch, rademacher

KEY = jax.random.key(0)


def test_gaussian_is_standard_normal():
    x = np.asarray(gaussian(KEY, (200, 50))).ravel()
    assert stats.kstest(x, "norm").pvalue > 1e-3


def test_rademacher_is_a_fair_sign():
    x = np.asarray(rademacher(KEY, (200, 50)))
    assert set(np.unique(x)) == {-1.0, 1.0}
    assert abs(x.mean()) < 0.04


@pytest.mark.parametrize(("kind", "draw"), [("gaussian", gaussian), ("rademacher", rademacher)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_make_sketch_draws_the_kind_that_is_named(kind, draw, dtype):
    x = make_sketch(kind, KEY, (6, 4), dtype)
    assert x.dtype == dtype
    np.testing.assert_array_equal(x, draw(KEY, (6, 4), dtype))
    assert not np.array_equal(x, make_sketch(kind, jax.random.key(1), (6, 4), dtype))


def test_unknown_kind():
    with pytest.raises(ValueError, match="'gaussian' or 'rademacher'; got 'srht'"):
        make_sketch("srht", KEY, (2, 2))  # pyright: ignore[reportArgumentType]
