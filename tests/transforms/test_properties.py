"""What holds for every shape, batch, dtype, rank, side and range finder."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_gale
from optax_gale import GaleDimensionNumbers, linalg

from .reference import assert_trees_close, moments_of

LR = 0.1
OVERSAMPLED = optax_gale.Sketch(oversampling=2, sketch="rademacher")


class Weight(NamedTuple):
    """A weight whose axes stand in any order."""

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    order: tuple[int, ...]  # where the axes of (*batch, *rows, *columns) stand in the weight
    dtype: str

    @property
    def shape(self):
        sizes = self.batch + self.rows + self.columns
        shape = [0] * len(sizes)
        for size, place in zip(sizes, self.order, strict=True):
            shape[place] = size
        return tuple(shape)

    @property
    def m(self):
        return math.prod(self.rows)

    @property
    def n(self):
        return math.prod(self.columns)

    @property
    def numbers(self):
        batch, rows = len(self.batch), len(self.rows)
        return GaleDimensionNumbers(self.order[batch : batch + rows], self.order[batch + rows :])

    def to_matrix(self, x):
        """``(*batch, m, n)``, the batch axes in the order in which they stand in the weight."""
        batch = sorted(self.order[: len(self.batch)])
        x = np.asarray(x, np.float64).transpose(*batch, *self.order[len(self.batch) :])
        return x.reshape(*x.shape[: len(batch)], self.m, self.n)

    @property
    def standing_batch(self):
        return tuple(self.shape[axis] for axis in sorted(self.order[: len(self.batch)]))


SIDES = st.lists(st.integers(1, 4), min_size=1, max_size=2).map(tuple)


@st.composite
def weights(draw):
    batch = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    rows, columns = draw(SIDES), draw(SIDES)
    order = draw(st.permutations(range(len(batch + rows + columns))))
    return Weight(
        batch, rows, columns, tuple(order), draw(st.sampled_from(["float32", "bfloat16"]))
    )


@st.composite
def cases(draw):
    weight = draw(weights())
    return {
        "weight": weight,
        "rank": draw(st.integers(1, min(weight.m, weight.n))),
        "side": draw(st.sampled_from(["short", "long"])),
        "range_finder": draw(
            st.sampled_from(["gale", "gale_approx", "warm", "svd", "random", OVERSAMPLED])
        ),
        "size": draw(st.sampled_from([1e-12, 1.0, 1e8])),
        "gradient_rank": draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def gradient(weight, gradient_rank, size, seed):
    """Low-rank or not, of any size: rounding is all there is outside the range."""
    rng = np.random.default_rng(seed)
    left = rng.normal(size=(*weight.batch, weight.m, gradient_rank))
    right = rng.normal(size=(*weight.batch, gradient_rank, weight.n))
    x = (left @ right).reshape(weight.batch + weight.rows + weight.columns)
    x = x.transpose(np.argsort(weight.order)) * size
    assert x.shape == weight.shape
    return jnp.asarray(x, weight.dtype)


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(cases())
def test_projectors_states_and_updates(case):
    weight, rank, side = case["weight"], case["rank"], case["side"]
    m, n = weight.m, weight.n
    g = gradient(weight, case["gradient_rank"], case["size"], case["seed"])
    tx = optax_gale.gale(
        optax.sgd(LR, momentum=0.9),
        rank,
        side=side,
        range_finder=case["range_finder"],
        weight_dimension_numbers=weight.numbers,
    )
    params = jnp.zeros(weight.shape, weight.dtype)
    update = jax.jit(functools.partial(tx.update, refresh=True))
    updates, state = update(g, tx.init(params), params)

    rows = m < n if side == "short" else m >= n
    p = np.asarray(state.projector, np.float64)
    assert state.projector.dtype == jnp.float32
    assert p.shape == (*weight.standing_batch, m if rows else n, rank)
    gram = np.swapaxes(p, -1, -2) @ p
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(rank), gram.shape), atol=1e-5)

    (trace,) = moments_of(state, "trace").values()
    assert trace.shape == (*weight.standing_batch, *((rank, n) if rows else (m, rank)))
    assert trace.dtype == updates.dtype == weight.dtype
    assert updates.shape == weight.shape
    assert np.all(np.isfinite(np.asarray(updates, np.float64)))

    # The first update is -lr P P^T G: in the span of P, and no longer than the gradient.
    matrix, moved = weight.to_matrix(g), weight.to_matrix(updates)
    if not rows:
        matrix, moved = np.swapaxes(matrix, -1, -2), np.swapaxes(moved, -1, -2)
    inside = p @ (np.swapaxes(p, -1, -2) @ matrix)
    tolerance = 1e-5 if weight.dtype == "float32" else 2.0**-5
    largest = np.abs(matrix).max()
    np.testing.assert_allclose(moved / largest, -LR * inside / largest, atol=LR * tolerance)
    energy = np.asarray(linalg.captured_energy(state.projector, jnp.asarray(matrix, jnp.float32)))
    assert np.all((energy >= 0) & (energy <= 1 + 1e-5))
    if case["gradient_rank"] <= rank and case["range_finder"] in ("gale", "svd"):
        assert np.all(energy > (1 - 1e-4 if weight.dtype == "float32" else 0.99))


EQUIVARIANT = st.sampled_from(["gale", "warm", "svd"])


@settings(max_examples=2, deadline=None, derandomize=True, database=None)
@given(
    st.permutations(range(3)),
    EQUIVARIANT,
    st.sampled_from(["keep", "rotate"]),
    st.sampled_from([None, "fira"]),
    st.integers(0, 2**32 - 1),
)
def test_layers_of_a_stack_do_not_know_their_place(
    permutation, range_finder, moments, residual, seed
):
    """Permuting a stack permutes its updates."""
    rng = np.random.default_rng(seed)
    weights, *grads = (rng.normal(size=(3, 5, 8)).astype(np.float32) for _ in range(4))
    permutation = np.array(permutation)
    tx = optax_gale.gale_adamw(
        LR, 3, range_finder=range_finder, moments=moments, residual=residual, update_proj_gap=2
    )
    update = jax.jit(tx.update)
    state, permuted_state = tx.init(weights), tx.init(weights[permutation])
    for g in grads:
        updates, state = update(g, state, weights)
        permuted, permuted_state = update(g[permutation], permuted_state, weights[permutation])
        assert_trees_close(permuted, updates[permutation], 1e-4)


@settings(max_examples=2, deadline=None, derandomize=True, database=None)
@given(st.permutations(range(3)), EQUIVARIANT, st.integers(0, 2**32 - 1))
def test_where_the_axes_stand_does_not_matter(order, range_finder, seed):
    """A weight and its transpose, with dimension numbers that say so, train alike."""
    rng = np.random.default_rng(seed)
    weight, *grads = (rng.normal(size=(3, 5, 8)).astype(np.float32) for _ in range(3))
    straight = optax_gale.gale_adamw(LR, 3, range_finder=range_finder, update_proj_gap=2)
    place = np.argsort(order)
    turned = optax_gale.gale_adamw(
        LR,
        3,
        range_finder=range_finder,
        update_proj_gap=2,
        weight_dimension_numbers=GaleDimensionNumbers(int(place[1]), int(place[2])),
    )
    update, turned_update = jax.jit(straight.update), jax.jit(turned.update)
    state, turned_state = straight.init(weight), turned.init(weight.transpose(order))
    for g in grads:
        updates, state = update(g, state, weight)
        other, turned_state = turned_update(
            g.transpose(order), turned_state, weight.transpose(order)
        )
        assert_trees_close(other, np.asarray(updates).transpose(order), 1e-4)
    assert_trees_close(turned_state.projector, state.projector, 1e-4)
