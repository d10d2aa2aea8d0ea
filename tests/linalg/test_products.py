import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_gale.linalg import einsum


def precisions(*operands):
    jaxpr = jax.make_jaxpr(lambda *xs: einsum("...mn,nk->...mk", *xs))(*operands)
    dots = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "dot_general"]
    casts = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "convert_element_type"]
    (dot,) = dots
    return dot.params["precision"], len(casts)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_multiplied_as_it_is_and_summed_in_float32(dtype):
    x, y = jnp.full((2, 3, 4096), 1.0, dtype), jnp.full((4096, 5), 1.0, dtype)
    out = einsum("...mn,nk->...mk", x, y)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 4096.0)  # bfloat16 sums stop at 256
    assert precisions(x, y) == (None, 0)


@pytest.mark.parametrize(
    "dtypes",
    [
        (jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.float32),
        (jnp.bfloat16, jnp.float16),
    ],
)
def test_anything_else_is_multiplied_in_full_float32(dtypes):
    x, y = jnp.ones((2, 3, 4), dtypes[0]), jnp.ones((4, 5), dtypes[1])
    assert einsum("...mn,nk->...mk", x, y).dtype == jnp.float32
    precision, _ = precisions(x, y)
    assert precision == (jax.lax.Precision.HIGHEST,) * 2


def test_float64_stays():
    with jax.enable_x64(True):
        out = einsum("mn,nk->mk", jnp.ones((2, 3), jnp.float64), jnp.ones((3, 2), jnp.bfloat16))
        assert out.dtype == jnp.float64


def test_broadcasts_an_unbatched_operand_under_strict_promotion():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 3, 4, 5)), rng.standard_normal((5, 6))
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        out = einsum("...mn,nk->...mk", jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.bfloat16))
    y = np.asarray(jnp.asarray(y, jnp.bfloat16), np.float64)
    np.testing.assert_allclose(out, x @ y, rtol=1e-5, atol=1e-5)


def test_complex_operands_are_refused():
    with pytest.raises(TypeError, match="operands must be real; got complex64, float32"):
        einsum("mn,nk->mk", jnp.ones((2, 2), jnp.complex64), jnp.ones((2, 2)))


def test_subscripts_must_name_the_result():
    with pytest.raises(ValueError, match="must name the result"):
        einsum("mn,nk", jnp.ones((2, 2)), jnp.ones((2, 2)))
