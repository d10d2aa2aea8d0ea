"""What depends on what, read off programs."""

import jax
import jax.numpy as jnp
import pytest

from optax_gale.transforms.dataflow import dependences, keeps_rows_apart, sources

X = jnp.ones((2, 3))

CASES = {
    "itself": (lambda x, y, s: x, 0),
    "nothing": (lambda x, y, s: 2.0 * s + 1.0, None),
    "a shape": (lambda x, y, s: jnp.zeros_like(x), None),
    "a sum": (lambda x, y, s: jnp.sin(y) - 3.0 * x, "other"),
    "a sum with what is not watched": (lambda x, y, s: jnp.sin(s) - 3.0 * x, 0),
    "times a number": (lambda x, y, s: x * s[0, 0] / 2.0, 0),
    "times numbers": (lambda x, y, s: x * s, "other"),
    "two of them": (lambda x, y, s: x + y, "other"),
    "a power": (lambda x, y, s: x**2, "other"),
    "its sum": (lambda x, y, s: s + jnp.sum(x), "other"),
    "its rows, exchanged": (lambda x, y, s: x[::-1], "other"),
    "a cast": (lambda x, y, s: x.astype(jnp.bfloat16) + 1, 0),
    "times nothing": (lambda x, y, s: s + 0.0 * x, None),
    "a call": (lambda x, y, s: jax.jit(lambda z: z + z)(x), 0),
    "a rematerialised call": (lambda x, y, s: jax.checkpoint(lambda z: 2.0 * z)(x), 0),
    "a choice": (lambda x, y, s: jnp.where(s[0, 0] > 0, x, s), 0),
    "a choice for each entry": (lambda x, y, s: jnp.where(s > 0, x, s), "other"),
    "a conditional": (lambda x, y, s: jax.lax.cond(s[0, 0] > 0, lambda: x, lambda: s), 0),
    "a conditional on it": (
        lambda x, y, s: jax.lax.cond(x[0, 0] > 0, lambda: s, lambda: 2 * s),
        "other",
    ),
    "whether it is finite": (
        lambda x, y, s: jnp.where(jnp.all(jnp.isfinite(x)), s, 0.0),
        None,
    ),
    "a loop": (lambda x, y, s: jax.lax.fori_loop(0, 3, lambda _, z: z + 1, x), "other"),
    "a loop over something else": (
        lambda x, y, s: x + jax.lax.fori_loop(0, 3, lambda _, z: z + 1, s),
        0,
    ),
    "no gradient": (lambda x, y, s: jax.lax.stop_gradient(x), "other"),
}


@pytest.mark.parametrize("name", CASES)
def test_dependences(name):
    function, expected = CASES[name]
    assert dependences(function, (X, X, X), (0, 1, None)).on == expected


def test_trees_shapes_and_traced_constants():
    def outer(rate):
        found = dependences(
            lambda tree: {"u": tree["a"] * rate, "v": [tree["b"]]},
            ({"a": X, "b": jax.ShapeDtypeStruct((4,), jnp.float32)},),
            (0, 1),
        )
        assert (found["u"].on, found["v"][0].on) == (0, 1)
        return rate

    jax.jit(outer)(1.0)


SOURCES = {
    "itself": (lambda x, y, s: x, {0}),
    "nothing": (lambda x, y, s: s + 1.0, set()),
    "a shape": (lambda x, y, s: jnp.zeros_like(x), set()),
    "a norm of both": (lambda x, y, s: x / jnp.sqrt(jnp.sum(x * x) + jnp.sum(y * y)), {0, 1}),
    "a call": (lambda x, y, s: jax.jit(lambda a, b: a + b)(x, y), {0, 1}),
    "one result of a call": (lambda x, y, s: jax.jit(lambda a, b: (2 * a, b))(x, y)[0], {0}),
    "a conditional": (lambda x, y, s: jax.lax.cond(s[0, 0] > 0, lambda: x, lambda: y), {0, 1}),
    "what a conditional depends on": (
        lambda x, y, s: jax.lax.cond(y[0, 0] > 0, lambda: x, lambda: s),
        {0, 1},
    ),
    "one result of a conditional": (
        lambda x, y, s: jax.lax.cond(s[0, 0] > 0, lambda: (x, y), lambda: (s, s))[0],
        {0},
    ),
    "a loop": (lambda x, y, s: jax.lax.fori_loop(0, 3, lambda _, z: z + y, x), {0, 1}),
    "a constant from outside": (lambda x, y, s: x + X, {0}),
}


@pytest.mark.parametrize("name", SOURCES)
def test_sources(name):
    function, expected = SOURCES[name]
    assert sources(function, (X, X, X), (0, 1, None)) == [frozenset(expected)]


BY_ROWS = {
    "elementwise": (lambda x, y, s: jnp.where(x > y, jnp.sqrt(jnp.abs(x)), y * s[0, 0]), True),
    "sums of rows": (lambda x, y, s: x / jnp.sum(y, axis=1, keepdims=True), True),
    "rows in blocks": (lambda x, y, s: jnp.max(x.reshape(2, 3, 1), axis=1), True),
    "rows, padded and cut": (lambda x, y, s: jnp.pad(x, ((0, 0), (0, 2)))[:, 1:4], True),
    "rows side by side": (lambda x, y, s: jnp.concatenate([x, y, jnp.ones_like(x)], 1), True),
    "columns exchanged": (lambda x, y, s: jnp.swapaxes(x.reshape(2, 3, 1), 1, 2), True),
    "numbers of columns": (lambda x, y, s: x * jnp.arange(3.0), True),
    "what depends on none": (lambda x, y, s: (x, jnp.cumsum(s), s @ s.T), True),
    "a draw": (lambda x, y, s: x + jax.random.uniform(jax.random.key(0), x.shape), True),
    "sums of columns": (lambda x, y, s: x - jnp.sum(x, axis=0), False),
    "another's rows": (lambda x, y, s: x + s, False),
    "numbers of rows": (lambda x, y, s: x * jnp.arange(2.0)[:, None], False),
    "padded rows": (lambda x, y, s: jnp.pad(x, ((0, 1), (0, 0))), False),
    "some rows": (lambda x, y, s: x[:1], False),
    "more rows": (lambda x, y, s: jnp.concatenate([x, y]), False),
    "transposed": (lambda x, y, s: x.T, False),
    "in another shape": (lambda x, y, s: x.reshape(3, 2), False),
    "a product": (lambda x, y, s: x @ y.T, False),
    "a loop": (lambda x, y, s: jax.lax.fori_loop(0, 3, lambda _, z: z + 1, x), False),
}


@pytest.mark.parametrize("name", BY_ROWS)
def test_rows_apart(name):
    function, expected = BY_ROWS[name]
    assert keeps_rows_apart(function, (X, X, X), (True, True, False)) == expected
