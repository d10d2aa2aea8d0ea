"""Quantised arrays: shapes, bounds on the error, and what no number may become."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_gale import quantization
from optax_gale.quantization import Quantized, quantized_nbytes
from optax_gale.quantization.codes import CODES

pytestmark = pytest.mark.usefixtures("quick_compilation")
quantize = jax.jit(quantization.quantize, static_argnames=("code", "block_size"))
dequantize = jax.jit(quantization.dequantize, static_argnames="dtype")


def numpy_quantize(x, name, block_size):
    """Dequantised values in float64, block by block, from a search in the whole code."""
    code = CODES[name]
    numbers = np.asarray(code.decode(jnp.arange(code.lowest, code.highest + 1)), np.float64)
    rows = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    out = np.zeros_like(rows)
    for row, result in zip(rows, out, strict=True):
        for start in range(0, len(row), block_size):
            block = row[start : start + block_size]
            scale = np.abs(block).max()
            if name == "dynamic" and scale > block.max():
                scale = -scale
            if scale != 0:
                nearest = np.abs(block[:, None] / scale - numbers).argmin(axis=1)
                if code.floor is not None:
                    nearest = np.where(block > 0, np.maximum(nearest, 1), nearest)
                result[start : start + block_size] = numbers[nearest] * scale
    return out.reshape(x.shape)


@st.composite
def cases(draw):
    return {
        "shape": (*draw(st.lists(st.integers(1, 4), max_size=2)), draw(st.integers(1, 40))),
        "code": draw(st.sampled_from(list(CODES))),
        "block_size": draw(st.sampled_from([1, 3, 8, 16, 256])),
        "dtype": draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        "size": draw(st.sampled_from([1e-5, 1.0, 1e3])),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(cases())
def test_round_trip_of_any_array(case):
    code, block_size = case["code"], case["block_size"]
    rng = np.random.default_rng(case["seed"])
    x = case["size"] * rng.standard_t(2, case["shape"]) * (rng.random(case["shape"]) > 0.2)
    x = jnp.asarray(np.abs(x) if code == "dynamic_unsigned" else x, case["dtype"])
    q = quantize(x, code, block_size=block_size)
    n = x.shape[-1]
    width = -(-n // 2) if code == "int4" else n
    assert q.codes.shape == (*x.shape[:-1], width) and q.codes.dtype in (jnp.uint8, jnp.int8)
    assert q.scales.shape == (*x.shape[:-1], -(-n // block_size)) and q.scales.dtype == jnp.float32
    assert (q.shape, q.ndim, q.dtype) == (x.shape, x.ndim, case["dtype"])
    assert q.nbytes == quantized_nbytes(x.shape, code, block_size)
    back = dequantize(q)
    assert back.shape == x.shape and back.dtype == x.dtype
    exact, got = numpy_quantize(x, code, block_size), np.asarray(dequantize(q, jnp.float32))
    # A tie may fall either way: the distance counts, not the place.
    distance = np.abs(got - np.asarray(x, np.float64))
    nearest = np.abs(exact - np.asarray(x, np.float64))
    assert np.all(distance <= nearest + 1e-5 * np.abs(np.asarray(x, np.float64)) + 1e-30)
    # Quantising what was read changes nothing, unless the block's largest was rounded.
    if code in ("int8", "int4"):
        again = quantize(dequantize(q, jnp.float32), code, block_size=block_size)
        np.testing.assert_array_equal(again.codes, q.codes)


@pytest.mark.parametrize(
    ("code", "bound"),
    [("dynamic", 0.9 / 128), ("dynamic_unsigned", 0.9 / 256), ("int8", 0.5 / 127),
     ("int4", 0.5 / 7)],
)  # fmt: skip
@pytest.mark.parametrize("stochastic", [False, True])
def test_error_relative_to_the_largest_of_the_block(code, bound, stochastic):
    """Half the largest distance of two numbers; with stochastic rounding the whole of it.

    Of the signed dynamic code that is the distance of -1 from its first number.
    """
    x = jax.random.normal(jax.random.key(0), (64, 500))
    x = jnp.abs(x) if code == "dynamic_unsigned" else x
    key = jax.random.key(1) if stochastic else None
    error = jnp.abs(dequantize(quantize(x, code, block_size=100, key=key)) - x)
    largest = jnp.max(jnp.abs(x).reshape(64, 5, 100), axis=-1)
    relative = float(jnp.max(error.reshape(64, 5, 100) / largest[..., None]))
    assert relative <= bound * (1 + stochastic) * 1.001
    assert relative > 0.5 * bound


@pytest.mark.parametrize("code", CODES)
def test_the_largest_of_a_block_is_exact_whatever_its_sign(code):
    for sign in (1,) if code == "dynamic_unsigned" else (1, -1):
        x = sign * jnp.asarray([[3.7, 0.1, 1.0], [0.2, -0.9 * sign, 5.3]])
        x = jnp.abs(x) if code == "dynamic_unsigned" else x
        got = dequantize(quantize(x, code))
        # Compilers may divide by the number of steps after multiplying: a rounding, in int4.
        np.testing.assert_allclose(got[[0, 1], [0, 2]], x[[0, 1], [0, 2]], rtol=1.2e-7)


@pytest.mark.parametrize("code", CODES)
def test_zeros_stay_zeros(code):
    x = jnp.zeros((2, 10)).at[1, 7].set(3.0)
    np.testing.assert_array_equal(dequantize(quantize(x, code, block_size=4)), x)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("key", [None, 0])
def test_what_is_not_finite_stays_visible_and_within_its_block(code, bad, key):
    x = jnp.ones((3, 12)).at[1, 5].set(bad)
    key = None if key is None else jax.random.key(key)
    got = np.asarray(jax.jit(lambda x: dequantize(quantize(x, code, block_size=4, key=key)))(x))
    wrong = np.zeros((3, 12), bool)
    wrong[1, 4:8] = True
    assert np.all(np.isnan(got[wrong])) and np.all(got[~wrong] == 1.0)


@pytest.mark.parametrize("key", [None, 0])
def test_a_negative_number_without_a_sign_is_not_taken_for_zero(key):
    x = jnp.ones((2, 8)).at[0, 1].set(-1e-3)
    key = None if key is None else jax.random.key(key)
    got = dequantize(quantize(x, "dynamic_unsigned", block_size=4, key=key))
    wrong = np.zeros((2, 8), bool)
    wrong[0, :4] = True
    assert np.all(np.isnan(got[wrong])) and np.all(got[~wrong] == 1)
    minus_zero = dequantize(quantize(-jnp.zeros(4).at[0].set(-1.0), "dynamic_unsigned"))
    np.testing.assert_array_equal(minus_zero, [1.0, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("key", [None, 0])
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e20])
def test_no_positive_number_becomes_zero_without_a_sign(key, size):
    """Zero stays zero, and everything else gets at least the smallest number of the code."""
    x = size * jnp.asarray([1.0, 1e-7, 1e-12, 0.0, 1e-17, 0.5])
    key = None if key is None else jax.random.key(key)
    got = np.asarray(dequantize(quantize(x, "dynamic_unsigned", key=key)), np.float64) / size
    assert got[3] == 0
    np.testing.assert_allclose(got[[1, 2, 4]], 3.25e-7, rtol=1e-6)


def test_the_smallest_number_of_a_code_is_none_of_float32_in_tiny_blocks():
    """The documented end of what is never zero."""
    for size, is_zero in ((4e-32, False), (3e-32, True)):
        x = jnp.float32([size, 3.1e-7 * size if not is_zero else 1.2e-38])
        got = dequantize(quantize(x, "dynamic_unsigned"))
        assert x[1] > 0 and (got[1] < jnp.finfo(jnp.float32).tiny) == is_zero


def test_subnormal_blocks_are_zero_or_finite():
    x = jnp.full(8, 1e-40)
    for code in CODES:
        got = np.asarray(dequantize(quantize(x, code)))
        assert np.all(np.isfinite(got)) and np.all(np.abs(got) <= 1.1e-40)


def test_keys_decide_stochastic_rounding():
    x = jax.random.normal(jax.random.key(0), (500,))
    codes = [quantize(x, key=jax.random.key(k)).codes for k in (0, 0, 1)]
    np.testing.assert_array_equal(codes[0], codes[1])
    assert np.mean(np.asarray(codes[0]) != np.asarray(codes[2])) > 0.2


def test_identity_is_exact_in_the_codes_of_projectors():
    for code in ("int8", "int4"):
        eye = jnp.eye(9, 5)
        np.testing.assert_array_equal(dequantize(quantize(eye, code, block_size=2)), eye)


def test_vmap_is_a_loop():
    x = jax.random.normal(jax.random.key(0), (3, 4, 20))
    together = jax.vmap(lambda x: quantize(x, "int4", block_size=8))(x)
    assert together.shape == x.shape
    np.testing.assert_array_equal(together.codes, quantize(x, "int4", block_size=8).codes)
    back = jax.vmap(dequantize)(together)
    np.testing.assert_array_equal(back, dequantize(quantize(x, "int4", block_size=8)))


def test_it_is_a_pytree_of_two_arrays():
    q = quantize(jnp.ones((2, 6)))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(q)]
    assert paths == [".codes", ".scales"]
    assert isinstance(jax.tree.map(jnp.zeros_like, q), Quantized)
    assert math.prod(q.codes.shape) == 12


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("code", ["dynamic", "int8", "int4"])
@pytest.mark.parametrize("n", [64, 24])  # blocks that fit the devices, and that do not
def test_codes_stay_where_the_array_is(kind, code, n):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(getattr(AxisType, kind),) * 2)
    x = jax.random.normal(jax.random.key(0), (8, n))
    want = quantize(x, code, block_size=16)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P("data", "model")))
        q = jax.jit(lambda x: quantize(x, code, block_size=16, key=None))(placed)
        back = jax.jit(dequantize)(q)
        random = jax.jit(lambda x: quantize(x, code, block_size=16, key=jax.random.key(0)))(placed)
    np.testing.assert_array_equal(q.codes, want.codes)
    np.testing.assert_array_equal(back, dequantize(want))
    if kind == "Explicit":
        assert jax.typeof(q.codes).sharding.spec == P("data", "model")
        assert jax.typeof(q.scales).sharding.spec == P("data", None)
        assert jax.typeof(back).sharding.spec == P("data", "model")
        assert jax.typeof(random.codes).sharding.spec == P("data", "model")
    elif n == 64:
        assert q.codes.sharding.is_equivalent_to(placed.sharding, 2)


@pytest.mark.parametrize(("devices", "n"), [(8, 24), (8, 8), (3, 9), (3, 3)])
def test_bytes_are_not_divided_between_devices(devices, n):
    """Odd numbers of elements on each of them, and odd rows."""
    mesh = jax.make_mesh(
        (devices,), ("model",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:devices]
    )
    x = jax.random.normal(jax.random.key(0), (2, n))
    want = quantize(x, "int4", block_size=16)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P(None, "model")))
        for key in (None, jax.random.key(0)):
            q = jax.jit(lambda x, key=key: quantize(x, "int4", block_size=16, key=key))(placed)
            back = jax.jit(dequantize)(q)
            assert jax.typeof(q.codes).sharding.spec == P(None, None)
            if key is None:
                np.testing.assert_array_equal(q.codes, want.codes)
                np.testing.assert_array_equal(back, dequantize(want))
        # Bytes that someone else has divided, of an odd row.
        packed = jnp.zeros((2, devices), jnp.uint8)
        packed = jax.device_put(packed, NamedSharding(mesh, P(None, "model")))
        assert quantization.unpack(packed, 2 * devices - 1).shape == (2, 2 * devices - 1)
        even = jax.jit(quantization.unpack, static_argnums=1)(packed, 2 * devices)
        assert jax.typeof(even).sharding.spec == P(None, "model")


@pytest.mark.parametrize(
    ("x", "options", "error", "words"),
    [
        (jnp.ones(4, jnp.int32), {}, TypeError, "floating point, got int32"),
        (jnp.ones(()), {}, ValueError, "an axis"),
        (jnp.ones((0, 3)), {}, ValueError, "an element"),
        (jnp.ones(4), {"code": "int5"}, ValueError, "`code` must be one of"),
        (jnp.ones(4), {"block_size": 0}, ValueError, "`block_size` must be at least 1, got 0"),
        (jnp.ones(4), {"block_size": 2.0}, TypeError, "`block_size` must be an int, got 2.0"),
        (jnp.ones(4), {"code": ["int8"]}, ValueError, r"`code` must be one of .* got \['int8'\]"),
        (jnp.ones(4), {"key": 3}, TypeError, "`key` must be None or one PRNG key .* got 3"),
        (jnp.ones(4), {"key": jnp.ones(2)}, TypeError, r"one PRNG key .* got float32 \(2,\)"),
        (jnp.ones(4), {"key": jax.random.split(jax.random.key(0))}, TypeError, r"key<fry> \(2,\)"),
    ],
)
def test_what_makes_no_sense_is_refused(x, options, error, words):
    with pytest.raises(error, match=words):
        quantization.quantize(x, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (((3, 4), "int5"), ValueError, "`code` must be one of .* got 'int5'"),
        (((3, 4), ["int8"]), ValueError, "`code` must be one of"),
        (((), "int8"), ValueError, r"`shape` must be a tuple of at least one length, got \(\)"),
        ((3, "int8"), ValueError, "`shape` must be a tuple of at least one length, got 3"),
        (((3, 4), "int8", 0), ValueError, "`block_size` must be at least 1"),
    ],
)
def test_bytes_of_what_makes_no_sense(arguments, error, words):
    with pytest.raises(error, match=words):
        quantized_nbytes(*arguments)


def test_what_cannot_be_read_is_refused():
    with pytest.raises(TypeError, match=r"`q` must be a Quantized, .* got ArrayImpl"):
        quantization.dequantize(jnp.ones(4))
    for dtype in ("int32", "float33", [1]):
        with pytest.raises(TypeError, match="`dtype` must be None or a floating type"):
            quantization.dequantize(quantize(jnp.ones(4)), dtype)


def test_block_sizes_of_numpy():
    q = quantization.quantize(jnp.ones(8), block_size=np.int64(4))
    assert type(q.block_size) is int and q.scales.shape == (2,)
    # Of another type, it would be another pytree.
    assert jax.tree.structure(q) == jax.tree.structure(quantize(jnp.ones(8), block_size=4))
    assert quantized_nbytes((8,), "int8", np.int32(4)) == 16
