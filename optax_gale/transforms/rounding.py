"""Half-precision weights that small updates are not lost in.

A bfloat16 weight has 8 significant bits: an update below 1/512 of it is rounded away, however often
it comes. Two remedies: rounding up or down at random, so that updates arrive on average, and
keeping what was rounded away.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_gale import _sharding
from optax_gale.linalg._split import rounded
from optax_gale.transforms import trees
from optax_gale.transforms.apply import (
    Halves,
    check_state,
    check_transformation,
    extended,
    halves_of,
)
from optax_gale.transforms.options import check_seed


class StochasticRoundingState(NamedTuple):
    """State of `stochastic_rounding`.

    Attributes:
      count: steps taken, int32.
      inner_state: the inner's state.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count is not needed
    inner_state: optax.OptState


class KahanSummationState(NamedTuple):
    """State of `kahan_summation`.

    Attributes:
      compensation: what is missing in every half-precision parameter, of its shape, and of its
        dtype or float32; `optax.MaskedNode` (no array) for the others.
      inner_state: the inner's state.
    """

    compensation: Any
    inner_state: optax.OptState


def stochastic_rounding(
    inner: optax.GradientTransformation, *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    r"""Rounds new half-precision weights up or down at random, right on average.

    Of the two numbers next to ``w + u``, each is taken with a probability in proportion to its
    nearness, so that :math:`\mathbb E[w_{new}] = w + u` where nearest rounding would give ``w`` for
    ever. No memory, and some noise. To be the outermost transformation, as it must know the whole
    update; float32 leaves are left alone. Its updates are such that ``optax.apply_updates`` gives
    exactly the weights that were drawn, where no weight more than doubles or halves; elsewhere the
    update is rounded once more.

    Args:
      inner: any Optax transformation; its updates are those that are applied.
      seed: all draws derive from it, the leaf and the step, so that runs repeat.

    Returns:
      The transformation.

    Raises:
      TypeError: if ``inner`` is no transformation.
      ValueError: in ``update``, if it gets no ``params``, or updates of another structure or shape.

    Example:
      >>> import jax.numpy as jnp, optax, optax_gale
      >>> tx = optax_gale.stochastic_rounding(optax.sgd(1e-4))
      >>> params = {"w": jnp.ones(10_000, jnp.bfloat16)}
      >>> updates, _ = tx.update({"w": jnp.ones_like(params["w"])}, tx.init(params), params)
      >>> new = optax.apply_updates(params, updates)["w"]  # most are 1 still, some 1 - 2**-8
      >>> round(1 - float(new.astype(jnp.float32).mean()), 5)
      0.0001

    References:
      Gupta et al., `Deep Learning with Limited Numerical Precision
      <https://arxiv.org/abs/1502.02551>`_, 2015; Zamirai et al., `Revisiting BFloat16 Training
      <https://arxiv.org/abs/2010.06192>`_, 2020.
    """
    check_transformation("inner", inner)
    check_seed(seed)

    def init(params: optax.Params) -> StochasticRoundingState:
        return StochasticRoundingState(jnp.zeros((), jnp.int32), inner.init(params))

    def round_sums(
        updates: optax.Updates,
        state: StochasticRoundingState,
        params: optax.Params,
        layer: jax.Array | None = None,
    ) -> tuple[optax.Updates, StochasticRoundingState]:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), state.count)
        if layer is not None:
            key = jax.random.fold_in(key, layer)

        def step(leaf: trees.Leaf, u: jax.Array) -> jax.Array:
            own = trees.fold_in_path(key, leaf.path)
            new = round_stochastically(own, _sum(leaf.value, u), leaf.value.dtype)
            return _difference(new, leaf.value)

        leaves, treedef = trees.flatten(params)
        steps = [
            _like(u, step(leaf, trees.unbox(u))) if _is_rounded(leaf, u) else u
            for leaf, u in zip(leaves, treedef.flatten_up_to(updates), strict=True)
        ]
        count = optax.safe_increment(state.count)
        return treedef.unflatten(steps), state._replace(count=count)

    return _outermost("stochastic_rounding", StochasticRoundingState, inner, init, round_sums)


def kahan_summation(
    inner: optax.GradientTransformation, *, compensation_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps what rounding takes from half-precision weights, and adds it to the next update.

    With the compensation :math:`c`,

    .. math::
        s = w + u + c, \quad w_{new} = \operatorname{round}(s), \quad c_{new} = s - w_{new},

    in float32. To be the outermost transformation, as it must know the whole update; float32 leaves
    are left alone.

    A compensation of the weight's dtype is as much memory as a copy of it, and is rounded itself:
    steady updates below :math:`2^{-18} |w|` (4e-6) of a bfloat16 weight stall in it, those above
    :math:`2^{-16} |w|` arrive. Of a float16 weight it is :math:`2^{-24}` and :math:`2^{-22}`, but
    never less than 3e-8 in all, which is half of float16's smallest number. For smaller updates
    prefer `stochastic_rounding`, or a compensation in float32, of twice the memory: both follow
    them down to :math:`2^{-23} |w|`, as float32 weights would.

    Args:
      inner: any Optax transformation; its updates are those that are applied.
      compensation_dtype: None for the weight's, or ``"float32"``.

    Returns:
      The transformation.

    Raises:
      TypeError: if ``inner`` is no transformation.
      ValueError: if ``compensation_dtype`` is another dtype; in ``update``, if it gets no
        ``params``, or updates of another structure or shape.

    Example:
      >>> import jax.numpy as jnp, optax, optax_gale
      >>> tx = optax_gale.kahan_summation(optax.sgd(1e-4))
      >>> params = {"w": jnp.ones(4, jnp.bfloat16)}
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...     updates, state = tx.update({"w": jnp.ones_like(params["w"])}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> float(params["w"][0])  # 1 - 100 * 1e-4, where plain bfloat16 stays at 1
      0.98828125

    References:
      Kahan, Further remarks on reducing truncation errors, 1965; Zamirai et al., `Revisiting
      BFloat16 Training <https://arxiv.org/abs/2010.06192>`_, 2020.
    """
    check_transformation("inner", inner)
    if compensation_dtype is not None:
        _check_compensation_dtype(compensation_dtype)

    def init(params: optax.Params) -> KahanSummationState:
        leaves, treedef = trees.flatten(params)
        compensation = [
            trees.rebox(leaf.box, jnp.zeros_like(leaf.value, compensation_dtype))
            if _is_half(leaf.value.dtype)
            else optax.MaskedNode()
            for leaf in leaves
        ]
        return KahanSummationState(treedef.unflatten(compensation), inner.init(params))

    def round_sums(
        updates: optax.Updates,
        state: KahanSummationState,
        params: optax.Params,
        layer: jax.Array | None = None,
    ) -> tuple[optax.Updates, KahanSummationState]:
        del layer
        leaves, treedef = trees.flatten(params)
        steps = treedef.flatten_up_to(updates)
        left = trees.flatten_like(treedef, "state.compensation", state.compensation, "parameters")
        for i, (leaf, u, c) in enumerate(zip(leaves, steps, left, strict=True)):
            if not _is_rounded(leaf, u):
                continue
            w = leaf.value
            if jnp.shape(trees.unbox(c)) != w.shape:
                raise ValueError(
                    f"'{leaf.path}' has shape {w.shape}, but the state's compensation for it has "
                    f"{jnp.shape(trees.unbox(c))}: the state was made for other parameters."
                )
            total = _sum(w, trees.unbox(u)) + trees.unbox(c).astype(jnp.float32)
            step = _difference(_nearest(total, w.dtype), w)
            # Of the weight that applying the step gives, whatever rounding that takes.
            missing = total - _nearest(_sum(w, step), w.dtype).astype(jnp.float32)
            missing = _nearest(missing, trees.unbox(c).dtype)
            steps[i], left[i] = _like(u, step), _like(c, missing)
        return treedef.unflatten(steps), state._replace(compensation=treedef.unflatten(left))

    return _outermost("kahan_summation", KahanSummationState, inner, init, round_sums)


def _outermost(
    name: str,
    kind: type,
    inner: optax.GradientTransformation,
    init: Callable[[Any], Any],
    round_sums: Callable[..., tuple[Any, Any]],
) -> optax.GradientTransformationExtraArgs:
    """Makes a wrapper that rounds the sum of parameters and of what ``inner`` changes them by.

    Args:
      name: the wrapper's name, for the error.
      kind: the class of its state.
      inner: the transformation inside.
      init: makes the state, a named tuple with ``inner_state``.
      round_sums: ``(updates, state, params, layer) -> (updates, state)``; ``layer`` tells the
        layers of a stack apart where each takes its own step.
    """
    inner = optax.with_extra_args_support(inner)
    within = halves_of(inner)

    def check(updates, state, params):
        if params is None:
            raise ValueError(
                f"{name} rounds the sum of parameters and updates: pass `params` to `update`."
            )
        check_state(state, kind)
        trees.check_updates(updates, params)

    def finish(updates, inner_state, state, params, extra_args):
        state = state._replace(inner_state=inner_state)
        return round_sums(updates, state, params, extra_args.get("layer"))

    def update(updates, state, params=None, **extra_args):
        check(updates, state, params)
        updates, new = inner.update(updates, state.inner_state, params, **extra_args)
        return finish(updates, new, state, params, extra_args)

    def project(grads, state, params, **extra_args):
        check_state(state, kind)
        if params is not None:
            trees.check_updates(grads, params)
        projected, new = within.project(grads, state.inner_state, params, **extra_args)
        return projected, state._replace(inner_state=new)

    def update_projected(projected, state, params, *, like, **extra_args):
        check(like, state, params)
        updates, new = within.update(projected, state.inner_state, params, like=like, **extra_args)
        return finish(updates, new, state, params, extra_args)

    def apply_projected(projected, state, params, implementation, **extra_args):
        del implementation
        updates, state = update_projected(projected, state, params, like=params, **extra_args)
        return optax.apply_updates(params, updates), state

    return extended(
        optax.GradientTransformationExtraArgs(init, update),
        halves=Halves(
            *(within.zeros, project, update_projected, apply_projected),
            *(within.axis_name, within.before),
        ),
    )


def round_stochastically(key: jax.Array, x: jax.Array, dtype: Any) -> jax.Array:
    """Rounds float32 numbers to one of the two nearest of half precision, right on average.

    Args:
      key: a PRNG key.
      x: float32 array.
      dtype: bfloat16 or float16.

    Returns:
      Array of ``dtype``. What is not finite, or rounds to infinity, is rounded to nearest.
    """
    near = _nearest(x, dtype)
    error = x - near.astype(jnp.float32)
    toward = jnp.where(error > 0, jnp.inf, -jnp.inf).astype(dtype)
    other = jnp.nextafter(near, toward)
    gap = jnp.abs(other.astype(jnp.float32) - near.astype(jnp.float32))
    is_other = _sharding.uniform(key, x) * gap < jnp.abs(error)
    return jnp.where(is_other & jnp.isfinite(other), other, near)


def _nearest(x: jax.Array, dtype: Any) -> jax.Array:
    """Rounds float32 numbers to nearest, in a way that makes everyone read the rounded numbers.

    Of a mere cast, compilers may give those who cast back what was there before.
    """
    if dtype == jnp.float32:
        return x
    if dtype == jnp.bfloat16:
        return rounded(x)
    # Not `lax.reduce_precision`, which has no subnormal numbers.
    return jax.lax.optimization_barrier(x.astype(dtype))


def _is_half(dtype: Any) -> bool:
    return dtype in (jnp.bfloat16, jnp.float16)


def _is_rounded(leaf: trees.Leaf, update: Any) -> bool:
    return _is_half(leaf.value.dtype) and not trees.is_nothing(update)


def _sum(w: jax.Array, u: jax.Array) -> jax.Array:
    return _read(w) + u.astype(jnp.float32)


def _read(w: jax.Array) -> jax.Array:
    """Half-precision numbers in float32: those that `w` holds.

    Of a sum that was cast to `w` in the same program, compilers may give what was there before.
    """
    if w.dtype == jnp.bfloat16:
        return rounded(w.astype(jnp.float32)).astype(jnp.float32)
    return jax.lax.optimization_barrier(w).astype(jnp.float32)


def _difference(new: jax.Array, old: jax.Array) -> jax.Array:
    """What to add for ``new``; exact if it is between half of and twice ``old``, or that is 0."""
    return _nearest(new.astype(jnp.float32) - _read(old), old.dtype)


def _like(box: Any, value: jax.Array) -> Any:
    return trees.rebox(box if trees.is_box(box) else None, value)


def _check_compensation_dtype(dtype: Any) -> None:
    try:
        is_known = jnp.dtype(dtype) == jnp.float32
    except TypeError:
        is_known = False
    if not is_known:
        raise ValueError(
            f"`compensation_dtype` must be None, for the weight's, or 'float32', got {dtype!r}."
        )
