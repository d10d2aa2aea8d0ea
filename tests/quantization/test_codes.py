"""The codes against their published construction, derived here from the bits of their words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_gale.quantization import dynamic_map, pack, unpack
from optax_gale.quantization.codes import CODES, neighbour

pytestmark = pytest.mark.usefixtures("quick_compilation")

DYNAMIC = {"dynamic": True, "dynamic_unsigned": False}


def read_word(bits: str) -> float:
    """A word without its sign: zeros count powers of ten, a one ends them, a fraction follows."""
    zeros = len(bits) - len(bits.lstrip("0"))
    if zeros == len(bits):
        return 0.0
    fraction = bits[zeros + 1 :]
    parts = 2 ** len(fraction)
    middle = (int(fraction or "0", 2) + 0.5) / parts
    return 10.0**-zeros * (0.1 + 0.9 * middle)


def published(signed: bool) -> list[float]:
    """Every word of 8 bits; the two that would be minus zero and a second zero stand for 1."""
    if signed:
        sizes = [read_word(f"{word:07b}") for word in range(1, 128)]
        return sorted([-x for x in sizes] + [0.0] + sizes + [1.0])
    # The last bit of the exponent's zeros belongs to the fraction: never fewer than one bit of it.
    sizes = [read_word(f"{word:08b}") for word in range(2, 256)]
    return sorted([0.0, *sizes, 1.0])


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_the_published_one(signed):
    numbers = dynamic_map(signed=signed)
    assert numbers.shape == (256,) and np.all(np.diff(numbers) > 0)
    np.testing.assert_allclose(numbers, published(signed), rtol=1e-12, atol=0)


def test_ends_of_the_map():
    """Hand-made numbers: of the middles of [0.1, 1] in 64 and in 128 parts, and in one and two."""
    signed, unsigned = dynamic_map(), dynamic_map(signed=False)
    last = 1 - 0.9 / 128
    np.testing.assert_allclose(signed[[0, 126, 127, 128, 254, 255]],
                               [-last, -5.5e-7, 0, 5.5e-7, last, 1], rtol=1e-12)  # fmt: skip
    np.testing.assert_allclose(unsigned[[0, 1, 2, 254, 255]],
                               [0, 3.25e-7, 7.75e-7, 1 - 0.9 / 256, 1], rtol=1e-12)  # fmt: skip
    # Symmetric but for the 1, which has no counterpart.
    np.testing.assert_array_equal(signed[:127], -signed[128:255][::-1])


@pytest.mark.parametrize("name", DYNAMIC)
def test_places_decode_to_the_map(name):
    got = np.asarray(CODES[name].decode(jnp.arange(256)), np.float64)
    np.testing.assert_allclose(got, dynamic_map(signed=DYNAMIC[name]), rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", CODES)
def test_every_number_of_a_code_is_its_own_nearest(name):
    code = CODES[name]
    places = jnp.arange(code.lowest, code.highest + 1)
    np.testing.assert_array_equal(code.encode(code.decode(places)), places)


@pytest.mark.parametrize("name", CODES)
def test_the_nearest_number_is_found(name):
    """All numbers against float64: a search in the whole code; ties may fall either way."""
    code = CODES[name]
    numbers = np.asarray(code.decode(jnp.arange(code.lowest, code.highest + 1)), np.float64)
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-1, 1, 5000), 10 ** rng.uniform(-8, 0, 5000)])
    x = np.concatenate([x, -x[5000:], [-1.0, 0.0, 1.0]]).astype(np.float32)
    if name == "dynamic_unsigned":
        x = np.abs(x)
    got = numbers[np.asarray(code.encode(jnp.asarray(x))) - code.lowest]
    best = numbers[np.abs(x[:, None].astype(np.float64) - numbers).argmin(axis=1)]
    assert np.all(np.abs(got - x) <= np.abs(best - x) + 1e-6 * np.abs(x))


@pytest.mark.parametrize("name", CODES)
def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbour(name):
    code = CODES[name]
    x = jnp.asarray([0.9, 0.3, 0.0312, 0.00123] + [-0.41, -7e-5] * (name != "dynamic_unsigned"))
    draws = jnp.broadcast_to(x, (4000, x.size))
    places = np.asarray(neighbour(code, draws, jax.random.key(0)))
    assert np.all(np.ptp(places, axis=0) <= 1)
    gap = np.asarray(code.decode(jnp.asarray(places.min(0) + 1)) - code.decode(places.min(0)))
    mean = np.asarray(code.decode(jnp.asarray(places)), np.float64).mean(axis=0)
    np.testing.assert_array_less(np.abs(mean - np.asarray(x)), 4 * gap / np.sqrt(4000) + 1e-9)


@pytest.mark.parametrize("name", CODES)
def test_numbers_beyond_the_ends_go_to_the_ends(name):
    code = CODES[name]
    x = jnp.asarray([-5.0, 5.0] if name != "dynamic_unsigned" else [0.0, 5.0])
    ends = [code.lowest, code.highest]
    np.testing.assert_array_equal(code.encode(x), ends)
    np.testing.assert_array_equal(neighbour(code, x, jax.random.key(0)), ends)


@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_two_numbers_share_a_byte(length):
    x = np.random.default_rng(0).integers(-8, 8, (3, length))
    packed = pack(jnp.asarray(x))
    assert packed.dtype == jnp.uint8 and packed.shape == (3, -(-length // 2))
    np.testing.assert_array_equal(unpack(packed, length), x)
    assert int(packed[0, 0]) & 15 == x[0, 0] % 16


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        (lambda: pack(jnp.array([9, 1])), ValueError, r"in \[-8, 7\], got some from 1 to 9"),
        (lambda: pack(jnp.array([-9])), ValueError, "got some from -9 to -9"),
        (lambda: pack(jnp.ones(2)), TypeError, r"integers in \[-8, 7\], got float32"),
        (lambda: pack(jnp.int8(1)), ValueError, "`x` must have an axis"),
        (lambda: pack(3), TypeError, "`x` must be an array .* got int"),
        (lambda: unpack(jnp.ones(2, jnp.int32), 4), TypeError, "bytes, .* got int32"),
        (lambda: unpack(jnp.ones((3, 2), jnp.uint8), 5), ValueError, "3 or 4, got 5"),
        (lambda: unpack(jnp.ones((3, 2), jnp.uint8), 2), ValueError, "3 or 4, got 2"),
        (lambda: unpack(jnp.ones(1, jnp.uint8), -1), ValueError, "1 or 2, got -1"),
        (lambda: unpack(jnp.ones(1, jnp.uint8), 1.5), TypeError, "`length` must be an int"),
    ],
)
def test_what_cannot_be_packed_is_refused(function, error, words):
    with pytest.raises(error, match=words):
        function()
