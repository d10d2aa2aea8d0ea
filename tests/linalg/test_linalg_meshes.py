import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from spectra import decays, orthogonality_error, sine, with_spectrum

from optax_gale.linalg import (
    einsum,
    orthonormalize,
    randomized_svd,
    range_finder,
    svd_range,
)

# Who holds what is decided before the optimisations.
pytestmark = [
    pytest.mark.skipif(len(jax.devices()) != 8, reason="needs 8 devices"),
    pytest.mark.usefixtures("quick_compilation"),
]

KEY = jax.random.key(0)
BATCH, M, N = 2, 64, 48
G = np.stack([with_spectrum(decays(N)["fast"], M, N, seed=i) for i in range(BATCH)])
G = G.astype(np.float32)


def mesh(axis_type):
    return jax.make_mesh((2, 2, 2), ("layer", "x", "y"), axis_types=(axis_type,) * 3)


def run(f, x, axis_type, spec):
    """Compiles and runs ``f`` on a sharded ``x``; returns its result, specs and program."""
    with jax.set_mesh(mesh(axis_type)):
        x = jax.device_put(x, NamedSharding(mesh(axis_type), spec))
        compiled = jax.jit(f).lower(x).compile()
        result = compiled(x)
        specs = jax.tree.map(lambda x: tuple(jax.typeof(x).sharding.spec), result)
        return jax.device_get(result), specs, compiled.as_text()


def largest_transfer(program):
    """Returns the entries of the largest array that the program exchanges between devices."""
    collectives = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    shapes = re.findall(rf"= \w+\[([\d,]*)\][^=]* (?:{collectives})(?:-start)?\(", program)
    return max((np.prod([int(d) for d in s.split(",")]) for s in shapes), default=0)


@pytest.mark.parametrize(
    ("axis_type", "spec"),
    [
        (AxisType.Explicit, P("layer", "x", "y")),
        (AxisType.Explicit, P(None, ("x", "y"), None)),
        (AxisType.Explicit, P(None, None, "y")),
        (AxisType.Explicit, P("layer", None, ("x", "y"))),
        (AxisType.Auto, P("layer", "x", "y")),
    ],
    ids=str,
)
def test_range_finder_shards_and_never_gathers_the_matrix(axis_type, spec):
    # Auto axes do not tell that the columns to sample are spread over devices.
    fraction = 0.5 if axis_type == AxisType.Explicit else 1.0

    def finder(g):
        return range_finder(KEY, g, 4, sample_fraction=fraction)

    p, p_spec, program = run(finder, G, axis_type, spec)
    expected = finder(jnp.asarray(G))
    for i in range(BATCH):
        assert sine(expected[i], p[i]) < 1e-4
    assert orthogonality_error(p).max() < 5e-6
    assert largest_transfer(program) <= BATCH * M * 4  # what the sketch holds
    if axis_type == AxisType.Explicit:
        assert p_spec == (spec[0], spec[1], None)


@pytest.mark.parametrize("method", ["randomized_cholesky_qr", "householder"])
def test_orthonormalize_takes_sharded_rows_and_columns(method):
    y = G[..., :4]
    q, _, _ = run(lambda y: orthonormalize(y, method), y, AxisType.Explicit, P("layer", "x", "y"))
    assert orthogonality_error(q).max() < 3e-6
    for i in range(BATCH):
        assert sine(y[i], q[i]) < 1e-4


def test_decompositions_take_sharded_matrices():
    def decompose(g):
        start = svd_range(g, 3)
        return svd_range(g, 4, "right"), randomized_svd(KEY, g, 3), start

    (right, (u, s, vh), left), _, _ = run(decompose, G, AxisType.Explicit, P("layer", "x", "y"))
    exact_u, exact_s, exact_vh = np.linalg.svd(G.astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(s, exact_s[:, :3], rtol=1e-5)
    for i in range(BATCH):
        assert max(sine(exact_u[i, :, :3], x[i]) for x in (u, left)) < 1e-3
        assert sine(exact_vh[i, :3].T, np.asarray(vh[i]).T) < 1e-3
        assert sine(exact_vh[i, :4].T, right[i]) < 1e-4


def test_products_keep_and_sum_over_sharded_dimensions():
    def products(g):
        return (
            einsum("...mn,nk->...mk", g, jnp.ones((N, 3))),
            einsum("...mi,...mj->...ij", g, g),
            einsum("bmn,bmn->bn", g, g),
            einsum("...mn->...nm", g),
        )

    results, specs, _ = run(products, G, AxisType.Explicit, P("layer", "x", "y"))
    assert specs == (
        ("layer", "x", None),
        ("layer", "y", None),
        ("layer", "y"),
        ("layer", "y", "x"),
    )
    expected = (
        G @ np.ones((N, 3)),
        np.swapaxes(G, 1, 2) @ G,
        np.sum(G * G, axis=1),
        np.swapaxes(G, 1, 2),
    )
    for result, value in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, value, rtol=1e-4, atol=1e-5)


def test_whole_matrices_inside_shard_map():
    def finder(g):
        return range_finder(KEY, g, 4)

    mapped = jax.shard_map(
        finder, mesh=mesh(AxisType.Auto), in_specs=P("layer"), out_specs=P("layer")
    )
    p = jax.device_get(jax.jit(mapped)(G))
    expected = finder(jnp.asarray(G))
    for i in range(BATCH):
        assert sine(expected[i], p[i]) < 1e-4
