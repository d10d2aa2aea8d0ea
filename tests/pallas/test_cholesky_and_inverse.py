"""Factors and their inverses against float64: solvers, a kernel on a GPU or in the interpreter."""

import importlib
import importlib.util

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_gale import pallas
from optax_gale.pallas import cholesky_and_inverse, dispatch
from optax_gale.pallas.cholesky_and_inverse import cholesky, choose, problem
from optax_gale.pallas.cholesky_and_inverse.reference import cholesky_and_inverse as reference

from .triton_interpreter import install

pytestmark = (
    [] if jax.default_backend() == "gpu" else [pytest.mark.usefixtures("quick_compilation")]
)


def with_condition(condition, k, count=3):
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((count, k, k)))[0]
    return (q * np.logspace(0, -np.log10(condition), k)) @ np.swapaxes(q, -1, -2)


def check(k, implementation, condition=1e3, count=3):
    """Factors, their inverses, and what both together leave of a matrix, whatever was there."""
    a = with_condition(condition, k, count)
    x = jnp.asarray(a, jnp.float32)
    a = np.asarray(x, np.float64)
    run, factor = (
        jax.jit(f, static_argnames="implementation") for f in (cholesky_and_inverse, cholesky)
    )
    jax.block_until_ready([jnp.full_like(x, jnp.nan) for _ in range(2)])
    found = run(x, implementation=implementation)
    for got, exact in zip(found, reference(a), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, np.tril(got))
        assert np.abs(got - exact).max() < 2e-7 * condition * np.abs(exact).max()
    inverse = np.asarray(found[1], np.float64)
    residual = inverse @ a @ np.swapaxes(inverse, -1, -2) - np.eye(k)
    assert np.abs(residual).max() < 2e-7 * condition
    alone = factor(x, implementation=implementation)  # by products of its own
    assert np.abs(alone - reference(a)[0]).max() < 2e-7 * condition


def check_indefinite(implementation):
    """One matrix that cannot be factored is told apart, and leaves the others alone."""
    places = [(100, i) for i in (0, 15, 16, 41, 99)] + [(300, 40), (300, 299)]
    for (k, i), pivot in zip(places, (-1.0, 0.0, np.nan, -1.0, -1.0, -1.0, 0.0), strict=True):
        a = np.stack([np.eye(k), with_condition(10.0, k, 1)[0]])
        a[0, i, i] = pivot
        found = cholesky_and_inverse(jnp.asarray(a, jnp.float32), implementation=implementation)
        for x in found:
            assert not np.isfinite(x[0]).all() and np.isfinite(x[1]).all()


SIZES = [1, 16, 20, 33, 97, 128, 300]
CONDITIONS = [1e3, 1e5]


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("k", [*SIZES, 32])
@pytest.mark.quick("97-1000.0", "33-1000.0", "300-100000.0")
def test_xla(k, condition):
    check(k, "xla", condition)


def test_xla_on_what_is_not_positive_definite():
    check_indefinite("xla")


@pytest.mark.gpu
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("k", [*SIZES, 64, 512])
def test_triton_on_a_gpu(k, condition):
    check(k, "triton", condition, count=200 if k == 128 else 3)
    run = jax.jit(lambda x: cholesky_and_inverse(x, implementation="triton"))
    text = run.lower(jnp.ones((k, k))).compile().as_text()
    assert "triton_kernel_call" in text and "potrf" not in text


@pytest.mark.gpu
def test_triton_on_a_gpu_on_what_is_not_positive_definite():
    check_indefinite("triton")


@pytest.mark.gpu
def test_random_sizes_on_a_gpu():
    for k in np.random.default_rng(0).integers(2, 400, 12):
        check(int(k), "triton", 1e2)


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or jax.default_backend() == "gpu",
    reason="needs triton, and no GPU: there the kernel itself runs",
)


@pytest.fixture
def interpreter(monkeypatch):
    install(monkeypatch)
    triton = importlib.import_module("optax_gale.pallas.cholesky_and_inverse.triton")
    monkeypatch.setattr(triton._triton, "refusal", lambda _: None)
    monkeypatch.setattr(dispatch, "capability", lambda: "9.0")
    return triton


@needs_triton
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("k", SIZES)
@pytest.mark.quick("97-1000.0", "20-1000.0", "300-100000.0")
def test_triton_interpreted(k, condition, interpreter):
    check(k, "triton", condition)


@needs_triton
@pytest.mark.parametrize("block", [16, 32])
def test_other_blocks(block, interpreter, monkeypatch):
    monkeypatch.setattr(interpreter, "_BLOCK", block)
    check(70, "triton")


@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:divide by zero")
@pytest.mark.slow
def test_triton_interpreted_on_what_is_not_positive_definite(interpreter):
    check_indefinite("triton")


@needs_triton
def test_the_kernel_serves_blocks_where_it_is_faster(interpreter, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    alike = problem(jnp.ones((3, 128, 128)))._replace(is_known=True)
    entry = {"architecture": "9.0", "problem": alike._asdict(), "times_ms": {"xla": 2}}
    times = entry["times_ms"]
    monkeypatch.setattr(dispatch, "_table", lambda: [entry])
    served = []
    kernel = interpreter.cholesky_and_inverse
    monkeypatch.setattr(
        interpreter, "cholesky_and_inverse", lambda a: served.append(a.shape) or kernel(a)
    )
    a = jnp.asarray(with_condition(10.0, 300), jnp.float32)
    by_solvers = cholesky_and_inverse(a)
    assert not served and choose(a) == "xla"
    times["triton"] = 1
    assert choose(a) == choose(a[:, :128, :128]) == "triton"
    chex.assert_trees_all_close(cholesky_and_inverse(a), by_solvers, rtol=1e-4, atol=1e-4)
    assert served == [(3, 128, 128), (3, 128, 128), (3, 44, 44)]
    # What a batch of them is under vmap, no kernel serves.
    wrong = lambda a: (jnp.full_like(a, jnp.nan),) * 2
    monkeypatch.setattr(interpreter, "cholesky_and_inverse", wrong)
    found = jax.vmap(cholesky_and_inverse)(a)
    chex.assert_trees_all_close(found, by_solvers, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_served_is_refused_with_the_reason():
    a = jnp.eye(8)
    if jax.default_backend() != "gpu":
        with pytest.raises(pallas.UnsupportedError, match="'triton' cannot serve"):
            cholesky_and_inverse(a, implementation="triton")
    with pytest.raises(pallas.UnsupportedError, match="there is no such kernel"):
        cholesky_and_inverse(a, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="must be None or one of"):
        cholesky_and_inverse(a, implementation="cuda")


@pytest.mark.parametrize("shape", [(0, 40, 40), (3, 0, 0), (0, 300, 300)], ids=str)
def test_nothing_is_factored(shape):
    assert [x.shape for x in cholesky_and_inverse(jnp.zeros(shape))] == [shape] * 2
    with pytest.raises(pallas.UnsupportedError, match="there is nothing to do"):
        cholesky_and_inverse(jnp.zeros(shape), implementation="triton")


def test_matrices_must_be_square_and_in_float32():
    for shape in ((4,), (4, 3), (2, 4, 3)):
        with pytest.raises(ValueError, match=r"a must be \(\*batch, k, k\), got shape"):
            cholesky_and_inverse(jnp.ones(shape))
    for dtype in (jnp.bfloat16, jnp.int32):
        with pytest.raises(TypeError, match="a must be of float32 or float64, got"):
            cholesky_and_inverse(jnp.eye(4, dtype=dtype))
    with jax.enable_x64():
        a = jnp.asarray(with_condition(1e3, 40))
        (lower, _) = cholesky_and_inverse(a)
        assert lower.dtype == jnp.float64
        np.testing.assert_allclose(lower, np.linalg.cholesky(a), atol=1e-12)
        with pytest.raises(pallas.UnsupportedError, match="it takes float32 only"):
            cholesky_and_inverse(a, implementation="triton")
    assert cholesky_and_inverse([[4.0]])[1].tolist() == [[0.5]]


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P(None, None, "x")], ids=str)
def test_matrices_that_devices_share_are_refused(spec):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        whole = jnp.tile(jnp.eye(24), (8, 1, 1))
        a = jax.device_put(whole, NamedSharding(mesh, spec))
        with pytest.raises(ValueError, match="a must be whole on every device, got the sharding"):
            cholesky_and_inverse(a)
        each = jax.shard_map(cholesky_and_inverse, out_specs=P("x"))
        found = each(jax.device_put(whole, NamedSharding(mesh, P("x"))))
    chex.assert_trees_all_equal(jax.device_get(found), (np.asarray(whole),) * 2)
