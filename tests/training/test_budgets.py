"""Amounts of memory, and the largest batch that they are enough for."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_gale
from optax_gale import largest_batch, step_memory_report
from optax_gale.training.budgets import parse_bytes


@pytest.mark.parametrize(
    ("amount", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        (" 1.5 tib ", 3 * 2**39),
        (".5MB", 500_000),
        ("512 MiB", 2**29),
        ("1kB", 1000),
        ("1 KiB", 1024),
        ("7", 7),
        ("7 B", 7),
        ("1.9 b", 1),
        (7, 7),
        (7.9, 7),
        (np.int64(2**40), 2**40),
    ],
)
def test_budgets(amount, size):
    assert parse_bytes(amount) == size


@pytest.mark.parametrize(
    "amount",
    ["", "GiB", "24 gigabytes", "24G", "-1GB", "0", "1e9", "inf", "1,5GB", "24 GB free",
     0, -1, 0.5, math.nan, math.inf, True, None, [24]],
)  # fmt: skip
def test_what_is_no_budget_is_refused(amount):
    with pytest.raises(ValueError, match="positive number of bytes") as error:
        parse_bytes(amount)
    assert repr(amount) in str(error.value)


def search(peak, budget, **options):
    """Searches with a peak for every batch size; returns the answer and how often it asked."""
    asked = []

    def report_of(n):
        asked.append(n)
        return SimpleNamespace(peak=peak(n))

    found = largest_batch(report_of, budget, **options)
    assert len(set(asked)) == len(asked) == len(found.tried)
    return found, len(asked)


@settings(max_examples=200, deadline=None)
@given(
    base=st.integers(0, 10**9),
    slope=st.integers(0, 10**6),
    flat=st.integers(0, 300),
    wobble=st.integers(0, 5000),
    budget=st.integers(1, 10**10),
    start=st.integers(1, 3000),
    multiple=st.integers(1, 64),
    maximum=st.integers(64, 2**20),
)
def test_the_batch_found_fits_and_the_next_does_not(
    base, slope, flat, wobble, budget, start, multiple, maximum
):
    peak = lambda n: base + slope * max(n, flat) + (n * 7919 % 5) * wobble
    options = {"start": start, "multiple": multiple, "maximum": maximum}
    found, asked = search(peak, budget, **options)
    assert found.size % multiple == 0 and 0 <= found.size <= maximum
    if found.size:
        assert peak(found.size) <= budget and found.report.peak == peak(found.size)
    else:
        assert found.report.peak == peak(multiple) > budget
    if found.size + multiple <= maximum:
        assert peak(found.size + multiple) > budget
        assert found.size + multiple in found.tried
    assert asked <= 45


@pytest.mark.parametrize("budget", ["64kB", "24GB", "80GiB"])
def test_straight_lines_take_few_compilations(budget):
    limit = parse_bytes(budget)
    base, slope = limit // 3, limit // 1000
    found, asked = search(lambda n: base + slope * n, budget, start=8)
    assert found.size == (limit - base) // slope
    assert asked <= 7


def test_a_compiler_that_runs_out_of_memory():
    def peak(n):
        if n > 100:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return n

    found, _ = search(peak, 10**6)
    assert found.size == 100 and found.tried[101] == math.inf
    found, _ = search(peak, 10**6, multiple=128)
    assert found.size == 0 and found.report is None

    def broken(n):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        largest_batch(broken, 10)


@pytest.mark.parametrize(
    "options", [{"multiple": 0}, {"start": 0}, {"multiple": 8, "maximum": 4}, {"maximum": 0}]
)
def test_what_cannot_be_searched_is_refused(options):
    with pytest.raises(ValueError, match="must be at least 1"):
        largest_batch(lambda n: SimpleNamespace(peak=n), 100, **options)


def test_the_largest_batch_of_a_real_step():
    tx = optax.sgd(1e-3)
    params = {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32)}

    @jax.jit
    def step(params, state, x):
        grads = jax.grad(lambda p: jnp.mean(jnp.tanh(x @ p["w"]) ** 2))(params)
        return optax_gale.update_and_apply(tx, grads, state, params)

    def report_of(n):
        x = jax.ShapeDtypeStruct((n, 64), jnp.float32)
        return step_memory_report(step, params, jax.eval_shape(tx.init, params), x)

    budget = 10**6
    found = largest_batch(report_of, budget)
    assert found.report.fits(budget) and not report_of(found.size + 1).fits(budget)
    assert report_of(found.size) == found.report
    assert found.size > 100 and len(found.tried) <= 12
