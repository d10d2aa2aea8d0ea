"""The range finder for half-precision matrices on GPUs, whose arithmetic every device can do."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from spectra import RANK, decays, orthogonality_error, sine, with_spectrum

from optax_gale.linalg import (
    _half_range,
    _split,
    captured_energy,
    random_range,
    range_finder,
    range_finders,
)

KEY = jax.random.key(0)
M, N = 60, 48
SPECTRA = np.stack(list(decays(N).values()))
MATRICES = np.stack([with_spectrum(s, M, N) for s in SPECTRA])
G = jnp.asarray(MATRICES, jnp.bfloat16)
TOLERANCE = 1e-5  # on the entries of PᵀP - I
ROUNDING = 1e-4  # on captured energy: of a flat spectrum, a sketch takes what it is rounded to


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def tensor_cores(monkeypatch):
    """Takes the device for one that has them."""
    monkeypatch.setattr(_split, "is_fast", lambda: True)


def slow(monkeypatch, *args, **options):
    """What every other device does."""
    with monkeypatch.context() as patch:
        patch.setattr(_split, "is_fast", lambda: False)
        return range_finder(*args, **options)


def best_energy(g, rank):
    squares = np.linalg.svd(np.asarray(g, np.float64), compute_uv=False) ** 2
    return squares[..., :rank].sum(-1) / squares.sum(-1)


def assert_alike(p, q, g):
    """Compares the bases where singular values are apart, and the subspaces everywhere."""
    assert orthogonality_error(p).max() < TOLERANCE
    np.testing.assert_allclose(captured_energy(p, g), captured_energy(q, g), atol=1e-4)
    # Rounding to bfloat16 depends on the order of sums.
    np.testing.assert_allclose(p[..., 0], q[..., 0], atol=5e-3)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (jnp.bfloat16, {"align": True}),
        (jnp.float16, {"align": True}),
        (jnp.bfloat16, {"power_iterations": 2, "sketch": "rademacher"}),
        (jnp.bfloat16, {"align": True, "power_iterations": 0, "sample_fraction": 0.5}),
    ],
    ids=str,
)
@pytest.mark.slow
def test_it_finds_what_other_devices_find(monkeypatch, dtype, options):
    g = G.astype(dtype)
    p = range_finder(KEY, g, RANK, **options)
    assert p.dtype == jnp.float32
    assert orthogonality_error(p).max() < TOLERANCE
    expected = slow(monkeypatch, KEY, g, RANK, **options)
    assert not np.array_equal(p, expected)  # or nothing was tested
    energy = captured_energy(expected, g)
    # Without an iteration, the sketch itself is rounded, and its square part badly conditioned.
    tolerance = ROUNDING if options.get("power_iterations", 1) else 2e-3
    np.testing.assert_allclose(captured_energy(p, g), energy, atol=tolerance)
    if options.get("power_iterations") == 2:
        np.testing.assert_allclose(captured_energy(p, g), best_energy(g, RANK), atol=0.05)


def test_the_basis_is_that_of_other_devices(monkeypatch):
    """Column by column, where singular values are apart."""
    g = jnp.asarray(with_spectrum(2.0 ** -np.arange(N), M, N), jnp.bfloat16)
    for align in (True, False):
        p = range_finder(KEY, g, 6, align=align)
        expected = slow(monkeypatch, KEY, g, 6, align=align)
        assert np.abs(np.sum(np.asarray(p) * np.asarray(expected), axis=0) - 1).max() < 1e-3


def test_condition_numbers(monkeypatch):
    spectra = [np.logspace(0, -exponent, 120) for exponent in (2, 4, 6, 8)]
    g = jnp.asarray(np.stack([with_spectrum(s, 200, 120) for s in spectra]), jnp.bfloat16)
    p = range_finder(KEY, g, 80, align=True)
    assert orthogonality_error(p).max() < TOLERANCE
    expected = captured_energy(slow(monkeypatch, KEY, g, 80, align=True), g)
    np.testing.assert_allclose(captured_energy(p, g), expected, atol=2e-5)
    assert np.all(captured_energy(p, g) > best_energy(g, 80) - 2e-3)


@pytest.mark.slow
def test_blocks_of_the_gram_and_of_the_factors():
    """Matrices that are taken apart: rows in the Gram matrix, halves in the factorisation."""
    g = with_spectrum(1 / (1.0 + np.arange(300)), 8200, 300)
    g = jnp.asarray(g, jnp.bfloat16)
    p = range_finder(KEY, g, 260, align=True)
    assert orthogonality_error(p) < TOLERANCE
    assert captured_energy(p, g) > best_energy(g, 260) - 3e-4


def test_matrices_without_enough_range():
    entry = np.zeros((M, N))
    entry[3, 5] = -2.0
    three = with_spectrum(np.array([1.0, 0.5, 0.2]), M, N)
    g = jnp.asarray(np.stack([entry, three, np.ones((M, N))]), jnp.bfloat16)
    p = range_finder(KEY, g, RANK, align=True)
    assert orthogonality_error(p).max() < TOLERANCE
    np.testing.assert_allclose(captured_energy(p, g), best_energy(g, RANK), atol=2e-5)


def test_full_rank_holds_everything():
    gs = [jax.random.normal(KEY, shape, jnp.bfloat16) for shape in [(12, 12), (40, 12), (12, 40)]]
    for g, p in zip(gs, range_finders([KEY] * 3, gs, 12, align=True), strict=True):
        assert orthogonality_error(p) < TOLERANCE
        np.testing.assert_allclose(captured_energy(p, g), 1, atol=2e-5)


def test_scale():
    scales = np.array([1, 1e-30, 1e30, 1e-15, 1e15])
    g = jnp.asarray(MATRICES[0] * scales[:, None, None], jnp.bfloat16)
    p = range_finder(KEY, g, RANK, align=True)
    assert orthogonality_error(p).max() < TOLERANCE
    energy = captured_energy(p, g)
    np.testing.assert_allclose(energy, best_energy(MATRICES[0], RANK), atol=1e-4)


def test_scale_of_float16():
    g = jnp.asarray(MATRICES[0] * np.array([3e-4, 1.0, 6e4])[:, None, None], jnp.float16)
    p = range_finder(KEY, g, 4, align=True)
    assert orthogonality_error(p).max() < TOLERANCE
    np.testing.assert_allclose(captured_energy(p, g), best_energy(g, 4), atol=1e-3)


def test_bad_matrices_leave_the_others_alone():
    g = np.array(np.broadcast_to(MATRICES[0], (5, M, N)), np.float32)
    g[1] = 0
    g[2, 4, 5] = np.nan
    g[3, 4, 5] = np.inf
    g = jnp.asarray(g, jnp.bfloat16)
    fallback = random_range(jax.random.key(1), M, RANK, (5,))
    keys, fallbacks = [KEY] * 3, [None, fallback, None]
    without, p, alone = range_finders(keys, [g, g, G[0]], RANK, fallbacks=fallbacks, align=True)
    chex.assert_trees_all_equal(p[1:4], fallback[1:4])
    np.testing.assert_array_equal(without[1:4], np.broadcast_to(np.eye(M, RANK), (3, M, RANK)))
    for other in (p[0], p[4], without[0], without[4]):
        assert_alike(other, alone, G[0])


def test_a_hopeless_matrix_costs_no_pass(monkeypatch):
    """Its zero columns would otherwise be waited for, by all matrices of the model."""
    passes = []
    loop = jax.lax.while_loop

    def counting(condition, body, start):
        out = loop(condition, body, start)
        jax.debug.callback(lambda count: passes.append(int(count)), out[3])
        return out

    monkeypatch.setattr(_half_range.lax, "while_loop", counting)
    g = jnp.stack([G[0], jnp.zeros_like(G[0]), G[1].at[0, 0].set(jnp.nan)])[:, :, :-1]
    jax.block_until_ready(range_finder(KEY, g, RANK, align=True))
    jax.effects_barrier()
    assert passes == [1]
    jax.block_until_ready(range_finder(KEY, jnp.ones((M, N - 1), jnp.bfloat16), RANK))
    jax.effects_barrier()
    assert 1 < passes[1] < 6


def test_many_stacks_are_served_like_one():
    """Of any shapes and dtypes; what is not half precision takes its own way."""
    gs = [G, G[0, :30], G[1:3].reshape(1, 2, M, N), G[1].astype(jnp.float16), G[2].astype(float)]
    keys = jax.random.split(KEY, len(gs))
    starts = [None, jnp.eye(30, 4), None, None, None]
    found = range_finders(keys, gs, RANK, starts=starts, align=True)
    for g, p in zip(gs, found, strict=True):
        chex.assert_shape(p, (*g.shape[:-1], RANK))
        assert orthogonality_error(p).max() < TOLERANCE
    for i in (0, 1, 4):
        one = range_finder(keys[i], gs[i], RANK, start=starts[i], align=True)
        np.testing.assert_allclose(
            captured_energy(found[i], gs[i]), captured_energy(one, gs[i]), atol=1e-4
        )
    assert range_finders([], [], RANK) == []


def test_warm_starts(monkeypatch):
    start = random_range(KEY, M, RANK, (len(G),))
    p = range_finder(KEY, G, RANK, power_iterations=0, start=start, align=True)
    options = {"power_iterations": 0, "start": start, "align": True}
    expected = slow(monkeypatch, KEY, G, RANK, **options)
    assert orthogonality_error(p).max() < TOLERANCE
    # A step function's ten columns have some of 1e-3 among them, as small as bfloat16's rounding.
    for i in range(3):
        assert abs(captured_energy(p[i], G[i]) - captured_energy(expected[i], G[i])) < 2e-3
    lost = G.at[:, :RANK].set(0.0)
    start = jnp.broadcast_to(jnp.eye(M, RANK), start.shape)
    warm = range_finder(KEY, lost, RANK, power_iterations=0, start=start)
    cold = range_finder(KEY, lost, RANK)
    assert jnp.all(captured_energy(warm, lost) > 0.5 * captured_energy(cold, lost))


def test_oversampling_takes_the_other_way(monkeypatch):
    p = range_finder(KEY, G, 4, oversampling=3)
    chex.assert_trees_all_equal(p, slow(monkeypatch, KEY, G, 4, oversampling=3))


def test_inside_transformations():
    g = jnp.stack([G[0]] * 4)
    f = lambda g: range_finder(KEY, g, RANK, align=True)
    p = f(g)
    assert_alike(jax.vmap(f)(g), p, g)
    if len(jax.devices()) == 8:
        mesh = jax.make_mesh((4,), ("layer",), axis_types=(AxisType.Auto,))
        mapped = jax.shard_map(f, mesh=mesh, in_specs=P("layer"), out_specs=P("layer"))
        assert_alike(jax.jit(mapped)(g), p, g)


@pytest.mark.skipif(len(jax.devices()) != 8, reason="needs 8 devices")
@pytest.mark.parametrize("spec", [P("x"), P()], ids=str)
def test_explicit_shardings(monkeypatch, spec):
    """What is spread over devices by its type takes the other way."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        g = jax.device_put(G, NamedSharding(mesh, spec))
        f = lambda g: range_finders([KEY, KEY], [g, G[0]], RANK, align=True)
        p, alone = jax.device_get(jax.jit(f)(g))
    assert_alike(p[0], alone, G[0])
    if any(spec):
        chex.assert_trees_all_close(p, slow(monkeypatch, KEY, G, RANK, align=True), atol=1e-3)


@pytest.mark.skipif(len(jax.devices()) != 8, reason="needs 8 devices")
def test_auto_shardings_gather_no_matrix():
    mesh = jax.make_mesh((2, 2, 2), ("layer", "x", "y"), axis_types=(AxisType.Auto,) * 3)
    g = jax.device_put(G, NamedSharding(mesh, P("layer", "x", "y")))
    f = jax.jit(lambda g: range_finder(KEY, g, RANK, align=True)).lower(g).compile()
    assert orthogonality_error(f(g)).max() < TOLERANCE
    collectives = "all-gather|all-to-all|collective-permute|reduce-scatter"
    exchanged = re.findall(
        rf"= \(?\w+\[([\d,]*)\][^=]* (?:{collectives})(?:-start)?\(", f.as_text()
    )
    sizes = [np.prod([int(d) for d in shape.split(",") if d]) for shape in exchanged]
    assert max(sizes, default=0) <= len(G) * RANK**2


def test_the_matrix_is_never_copied_to_float32():
    jaxpr = jax.make_jaxpr(lambda g: range_finder(KEY, g, 4, align=True))(G)
    assert f"f32[4,{M},{N}]" not in str(jaxpr)


def test_subspaces_stay_in_the_range():
    g = jnp.asarray(with_spectrum(np.ones(5), M, N), jnp.bfloat16)
    assert sine(range_finder(KEY, g, 5), range_finder(KEY, g.astype(jnp.float32), 5)) < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "rank"), [(4096, 4096, 128), (11008, 4096, 1024), (70, 50, 16)])
def test_orthonormal_on_a_gpu(m, n, rank):
    """At the sizes where what tensor cores cut off, and what compilers do not round, shows."""
    a, b = jax.random.normal(KEY, (2, m, 64)), jax.random.normal(jax.random.key(1), (2, n, 64))
    noise = jax.random.normal(jax.random.key(2), (2, m, n))
    g = (a * 2.0 ** -jnp.arange(64)) @ jnp.swapaxes(b, -1, -2) + 1e-3 * noise
    p = jax.jit(range_finder, static_argnums=2)(KEY, g.astype(jnp.bfloat16), rank)
    assert orthogonality_error(np.asarray(p)).max() < TOLERANCE


@pytest.mark.parametrize("power_iterations", [0, 1])
def test_the_range_of_an_average(power_iterations):
    parts = G * jnp.asarray([0.5, 1.5], G.dtype)[:, None, None, None]
    find = lambda g, axis_name: range_finder(
        KEY, g, RANK, power_iterations=power_iterations, align=True, axis_name=axis_name
    )
    got = jax.vmap(lambda g: find(g, "parts"), axis_name="parts")(parts)
    assert np.array_equal(got[0], got[1])
    assert np.max(orthogonality_error(got[0])) < TOLERANCE
    energies = [captured_energy(p, G) for p in (got[0], find(G, None))]
    np.testing.assert_allclose(*energies, atol=0.02)


@pytest.mark.parametrize(
    ("average_dtype", "sent"),
    [(None, "bfloat16"), ("bfloat16", "bfloat16"), ("float32", "float32")],
)
@pytest.mark.parametrize("warm", [False, True])
def test_products_are_averaged_in_the_dtype_asked_for(average_dtype, sent, warm, monkeypatch):
    start = jnp.ones((1, M, RANK)) if warm else None
    means = []

    def pmean(tree, axis_name):
        means.extend(str(x.dtype) for x in jax.tree.leaves(tree))
        return tree

    monkeypatch.setattr(jax.lax, "pmean", pmean)
    options = {"axis_name": "parts", "average_dtype": average_dtype, "start": start}
    jax.make_jaxpr(lambda g: range_finder(KEY, g, RANK, **options))(G[:1])
    assert len(means) == 3 + warm and set(means) == {sent}
