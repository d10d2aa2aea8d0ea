"""How a gradient becomes a projector: the `range_finder` option."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from optax_gale import linalg
from optax_gale._averages import AxisName, averaged, checked_average_dtype


class RangeFinder(Protocol):
    """Anything that turns gradients into orthonormal projectors.

    Called with ``x`` of shape ``(*batch, d, n)``, the projected side first, a rank, a key derived
    from (seed, leaf, step), and the projectors in use; returns ``(*batch, d, rank)`` with
    orthonormal columns in float32. `optax_gale.layerwise` calls it for one layer of a stack at a
    time, with the same key for each.
    """

    def __call__(
        self, x: jax.Array, *, rank: int, key: jax.Array, previous: jax.Array
    ) -> jax.Array:
        """Finds the projectors."""
        ...


@dataclass(frozen=True)
class Sketch:
    """GALE's range finder: a random sketch, subspace iteration, orthonormalisation.

    ``Y = G Omega``, then ``power_iterations`` times ``Y = G (G^T orth(Y))``, then ``P = orth(Y)``,
    aligned with the singular vectors.

    Attributes:
      oversampling: extra columns of the sketch; the surplus is dropped by Rayleigh-Ritz (an
        eigendecomposition of a matrix of size rank + oversampling).
      power_iterations: steps of subspace iteration; each reads the gradient twice.
      sketch: distribution of Omega, ``"gaussian"`` or ``"rademacher"``.
      sample_fraction: share of the gradient's columns that the sketch reads.
      warm_start: start from the projector in use instead of a random sketch, except where it has
        lost the gradient.
      align: turn the basis of the subspace towards the gradient's singular vectors. An optimizer
        that scales every entry, like Adam, depends on its basis, and does better in that one.
      average_dtype: with ``axis_name``, the dtype to which sketches are rounded for devices to
        average them, ``"bfloat16"`` or ``"float32"``; None: bfloat16 for bfloat16 gradients, else
        as they are computed. Sketches of float32 gradients are half as much to send in bfloat16,
        and choose a subspace that is off by about as much as that of rounded gradients would be.
        Projections of float32 gradients are averaged in float32 in any case.

    Example:
      >>> import optax, optax_gale
      >>> finder = optax_gale.Sketch(oversampling=8, power_iterations=2)
      >>> tx = optax_gale.gale(optax.adamw(1e-3), rank=32, range_finder=finder)

    References:
      Halko, Martinsson, Tropp, `Finding Structure with Randomness
      <https://arxiv.org/abs/0909.4061>`_, 2011, Algorithms 4.1, 4.4 and 5.1.
    """

    oversampling: int = 0
    power_iterations: int = 1
    sketch: Literal["gaussian", "rademacher"] = "gaussian"
    sample_fraction: float = 1.0
    warm_start: bool = False
    align: bool = True
    average_dtype: Literal["bfloat16", "float32"] | None = None

    def __post_init__(self):
        """Checks the options.

        Raises:
          TypeError: if one of them has the wrong type.
          ValueError: if one of them is out of range.
        """
        for name in ("oversampling", "power_iterations"):
            if not isinstance(getattr(self, name), (int, np.integer)):
                raise TypeError(f"Sketch: `{name}` must be an int, got {getattr(self, name)!r}.")
        if self.oversampling < 0 or self.power_iterations < 0:
            raise ValueError(
                "Sketch: `oversampling` and `power_iterations` must be 0 or more, got "
                f"{self.oversampling} and {self.power_iterations}."
            )
        if self.sketch not in ("gaussian", "rademacher"):
            raise ValueError(
                f"Sketch: `sketch` must be 'gaussian' or 'rademacher', got {self.sketch!r}."
            )
        if not 0.0 < self.sample_fraction <= 1.0:
            raise ValueError(
                f"Sketch: `sample_fraction` must be in (0, 1], got {self.sample_fraction}."
            )
        if self.warm_start and not self.power_iterations:
            raise ValueError(
                "Sketch: `warm_start` keeps the old subspace unless it is iterated; set "
                "`power_iterations` to at least 1."
            )
        object.__setattr__(self, "average_dtype", checked_average_dtype(self.average_dtype))

    def __call__(
        self, x: jax.Array, *, rank: int, key: jax.Array, previous: jax.Array
    ) -> jax.Array:
        """Finds the projectors of ``x`` (see `RangeFinder`)."""
        [p] = self._together([x], rank, [key], [previous], [previous])
        return p

    def _together(
        self,
        xs: Sequence[jax.Array],
        rank: int,
        keys: Sequence[jax.Array],
        previous: Sequence[jax.Array],
        fallbacks: Sequence[jax.Array],
        axis_name: AxisName = None,
    ) -> list[jax.Array]:
        """Finds the projectors of several leaves of one rank, which can be faster."""
        return linalg.range_finders(
            keys,
            xs,
            rank,
            oversampling=self.oversampling,
            # Warm: the start takes the sketch's place, and its first product is an iteration.
            power_iterations=self.power_iterations - int(self.warm_start),
            sketch=self.sketch,
            starts=previous if self.warm_start else None,
            fallbacks=fallbacks,
            sample_fraction=self.sample_fraction,
            align=self.align,
            axis_name=axis_name,
            average_dtype=self.average_dtype,
        )


def _random(x: jax.Array, *, rank: int, key: jax.Array, previous: jax.Array) -> jax.Array:
    """A random subspace, whatever the gradient (as in APOLLO and Flora)."""
    # Matrices of a stack share a draw, as they share that of a sketch.
    return jnp.broadcast_to(linalg.random_range(key, x.shape[-2], rank), previous.shape)


_NAMED: dict[str, RangeFinder] = {
    "gale": Sketch(),
    "gale_approx": Sketch(sample_fraction=0.25, power_iterations=0),
    "warm": Sketch(warm_start=True),
    "random": _random,
}
RangeFinderName = Literal["gale", "gale_approx", "warm", "svd", "random"]


class Request(NamedTuple):
    """A leaf that needs projectors.

    Attributes:
      g: the gradients ``(*batch, m, n)``.
      rows: whether the rows are projected.
      rank: columns of a projector.
      key: a key of its own.
      previous: the projectors in use.
    """

    g: jax.Array
    rows: bool
    rank: int
    key: jax.Array
    previous: jax.Array


def resolve(
    range_finder: RangeFinderName | RangeFinder,
    axis_name: AxisName = None,
) -> Callable[[Sequence[Request]], list[tuple[jax.Array, jax.Array]]]:
    """Turns the `range_finder` option into a function of requests.

    It finds their projectors, and tells which of them ``(*batch,)`` may be used. Where gradients
    are averaged over mapped axes, a sketch averages its products, and what looks at no gradient
    nothing; the others get the average itself.

    Raises:
      ValueError: if it is an unknown name.
      TypeError: if it is neither a name nor a callable.
    """
    if range_finder == "svd":
        return lambda requests: [
            _checked(_svd(request), request) for request in _averaged(requests, axis_name)
        ]
    if isinstance(range_finder, str):
        if range_finder not in _NAMED:
            raise ValueError(
                f"`range_finder` must be one of {sorted([*_NAMED, 'svd'])}, a `Sketch`, or a "
                f"callable, got {range_finder!r}."
            )
        range_finder = _NAMED[range_finder]
    if not callable(range_finder):
        raise TypeError(
            f"`range_finder` must be a name, a `Sketch`, or a callable, got {range_finder!r}."
        )
    if type(range_finder) is Sketch:  # a subclass may be called in its own way
        return functools.partial(_together, range_finder, axis_name=axis_name)
    if range_finder is _random:
        return lambda requests: [_checked(_one(_random, r), r, axis_name) for r in requests]
    return lambda requests: [
        _checked(_one(range_finder, request), request) for request in _averaged(requests, axis_name)
    ]


def _averaged(requests: Sequence[Request], axis_name: AxisName) -> list[Request]:
    gs = averaged([request.g for request in requests], axis_name)
    return [request._replace(g=g) for request, g in zip(requests, gs, strict=True)]


def _checked(
    p: jax.Array, request: Request, axis_name: AxisName = None
) -> tuple[jax.Array, jax.Array]:
    """A projector, and whether it may be used."""
    return p, _says_something(request.g, axis_name) & jnp.isfinite(jnp.sum(p, axis=(-2, -1)))


def _says_something(g: jax.Array, axis_name: AxisName = None) -> jax.Array:
    """Whether gradients have a range ``(*batch,)``: they are finite and not zero.

    A sum tells: unlike a maximum it cannot lose a NaN.
    """
    size = averaged(jnp.sum(jnp.abs(g.astype(jnp.float32)), axis=(-2, -1)), axis_name)
    return jnp.isfinite(size) & (size > 0)


def _svd(request: Request) -> jax.Array:
    """GaLore's range finder. It takes the gradient unoriented: the signs of singular vectors differ
    between a matrix and its transpose, and moments are kept across refreshes."""  # noqa: D205, D209
    side: Literal["left", "right"] = "left" if request.rows else "right"
    return linalg.svd_range(request.g, request.rank, side=side)


def _one(finder: RangeFinder, request: Request) -> jax.Array:
    x, previous = _oriented(request), request.previous
    p = finder(x, rank=request.rank, key=request.key, previous=previous)
    if p.shape != previous.shape:
        raise ValueError(
            f"`range_finder` returned shape {p.shape} for gradients of shape {x.shape} and "
            f"rank {request.rank}; expected {previous.shape}."
        )
    return p


def _together(
    sketch: Sketch, requests: Sequence[Request], axis_name: AxisName
) -> list[tuple[jax.Array, jax.Array]]:
    """Serves requests of one rank in one call."""
    out: list[Any] = [None] * len(requests)
    for rank in dict.fromkeys(request.rank for request in requests):
        places = [i for i, request in enumerate(requests) if request.rank == rank]
        xs = [_oriented(requests[i]) for i in places]
        previous = [requests[i].previous for i in places]
        # A sketch that says nothing leaves no projector, so that none needs to be looked for in G.
        nothing = [jnp.full_like(p, jnp.nan) for p in previous]
        keys = [requests[i].key for i in places]
        ps = sketch._together(xs, rank, keys, previous, nothing, axis_name)
        for i, x, p in zip(places, xs, ps, strict=True):
            usable = jnp.isfinite(jnp.sum(p, axis=(-2, -1)))
            if sketch.sample_fraction < 1:  # what was not read may not be finite
                usable = usable & _says_something(x, axis_name)
            out[i] = p, usable
    return out


def _oriented(request: Request) -> jax.Array:
    """The gradients with the projected side first."""
    return request.g if request.rows else jnp.swapaxes(request.g, -2, -1)
