"""Gradient accumulation in the subspace."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_gale._averages import averaged_as
from optax_gale.transforms import inner as inner_lib
from optax_gale.transforms import trees
from optax_gale.transforms.apply import (
    Halves,
    check_state,
    check_transformation,
    extended,
    halves_of,
)
from optax_gale.transforms.options import check_computing_dtype
from optax_gale.transforms.shardings import alike


class AccumulateState(NamedTuple):
    """State of `accumulate`.

    Attributes:
      mini_step: gradients summed since the last step, int32 ``()``.
      gradient_step: steps taken, int32 ``()``.
      projected: sum of what the inner sees of the gradients: ``(*batch, r, n)`` or
        ``(*batch, m, r)`` at projected leaves, the leaf's shape at others.
      inner_state: the transformation's state.
    """

    mini_step: jax.Array
    gradient_step: jax.Array
    projected: Any
    inner_state: optax.OptState


def accumulate(
    tx: optax.GradientTransformation,
    every_k_schedule: int | Callable[[jax.Array], Any],
    *,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Takes one step for the mean of k gradients, of which it keeps :math:`P^\top G` only.

    What ``optax.MultiSteps`` is for other transformations: ``update`` returns zeros, and a step at
    every k-th call. There the sum has the size of the parameters, here
    :math:`\sum_i P^\top G_i = P^\top \sum_i G_i` has that of one moment. Where a refresh is due,
    the first of the k gradients decides the new subspace, and the range finder runs once. Steps,
    schedules and gaps count every k-th call.

    Stages before a `gale_project` (or before an optimizer in `chain`) act on every gradient by
    itself: ``clip_by_global_norm`` there bounds each, and with them the mean. Stages after it
    act on the mean.

    Args:
      tx: an optimizer of this library, a `chain` that ends in one, either of them in
        `stochastic_rounding` or `kahan_summation`; any other transformation keeps sums of the
        gradients' size.
      every_k_schedule: k, at least 1, or a callable from the number of steps taken to k.
      accumulator_dtype: dtype of the sums; None for float32, or float64 where parameters are.

    Returns:
      A transformation whose `update` takes ``refresh`` as that of `gale` does: True refreshes at
      the first of k calls only.

    Raises:
      TypeError: if ``tx`` is no transformation, or k no integer.
      ValueError: if k is less than 1; from ``init``, if a stage before the projection keeps a
        state, which would advance k times a step; from ``update``, with ``residual="fira"``, which
        needs the whole gradient.

    Example:
      >>> import jax.numpy as jnp, optax, optax_gale
      >>> tx = optax_gale.accumulate(optax_gale.gale_adamw(1e-2, rank=8), 4)
      >>> params = {"kernel": jnp.ones((256, 64))}
      >>> state = tx.init(params)
      >>> state.projected["kernel"].shape
      (256, 8)
      >>> for _ in range(4):
      ...     updates, state = tx.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> int(state.gradient_step), int(state.mini_step)
      (1, 0)

    References:
      Hao, Cao, Mou, `Flora: Low-Rank Adapters Are Secretly Gradient Compressors
      <https://arxiv.org/abs/2402.03293>`_, 2024, Algorithm 1.
    """
    check_transformation("tx", tx)
    every = _checked_schedule(every_k_schedule)
    if accumulator_dtype is not None:
        check_computing_dtype("accumulator_dtype", accumulator_dtype)
    halves = halves_of(tx)
    init_inner = tx.init

    def init(params: optax.Params) -> AccumulateState:
        refuse_stateful_stages(halves, params)
        zero = jnp.zeros((), jnp.int32)
        sums = zero_sums(halves, params, accumulator_dtype)
        return AccumulateState(zero, zero, sums, init_inner(params))

    def advance(state, grads, params, refresh, extra_args):
        """Adds a gradient; also returns whether a step is due, and the mean."""
        check_state(state, AccumulateState)
        if params is not None:
            trees.check_updates(grads, params)
        k = _checked_k(every(state.gradient_step))
        projected, inner_state = halves.project(
            grads,
            state.inner_state,
            params,
            first=state.mini_step == 0,
            refresh=refresh,
            **extra_args,
        )
        # The sums wait in the state, which is that of all devices.
        projected = averaged_as(projected, grads, halves.axis_name)
        sums = jax.tree.map(lambda s, x: s + x.astype(s.dtype), state.projected, projected)
        mean = jax.tree.map(lambda s, x: (s / k).astype(x.dtype), sums, projected)
        waiting = AccumulateState(
            state.mini_step + 1, state.gradient_step, sums, alike(inner_state, state.inner_state)
        )
        return waiting, waiting.mini_step >= k, mean

    def stepped(waiting, inner_state):
        return AccumulateState(
            jnp.zeros_like(waiting.mini_step),
            optax.safe_increment(waiting.gradient_step),
            jax.tree.map(jnp.zeros_like, waiting.projected),
            alike(inner_state, waiting.inner_state),
        )

    def update(grads, state, params=None, *, refresh=None, **extra_args):
        waiting, due, mean = advance(state, grads, params, refresh, extra_args)
        still = jax.tree.map(jnp.zeros_like, grads if params is None else params)

        def step():
            updates, inner_state = halves.update(
                mean, waiting.inner_state, params, like=grads, **extra_args
            )
            return alike(updates, still), stepped(waiting, inner_state)

        return jax.lax.cond(due, step, lambda: (still, waiting))

    def in_place(grads, state, params, implementation, *, refresh=None, **extra_args):
        waiting, due, mean = advance(state, grads, params, refresh, extra_args)

        def step():
            new, inner_state = halves.apply(
                mean, waiting.inner_state, params, implementation, **extra_args
            )
            return alike(new, params), stepped(waiting, inner_state)

        return jax.lax.cond(due, step, lambda: (params, waiting))

    return extended(optax.GradientTransformationExtraArgs(init, update), in_place=in_place)


def zero_sums(halves: Halves, params: Any, dtype: Any = None) -> Any:
    """Sums of no gradients, in at least float32 unless a dtype is given."""

    def zero(x: jax.Array) -> jax.Array:
        return x.astype(jnp.promote_types(x.dtype, jnp.float32) if dtype is None else dtype)

    return jax.tree.map(zero, halves.zeros(params))


def refuse_stateful_stages(halves: Halves, params: Any) -> None:
    """Raises ValueError if what sees every gradient of a sum by itself keeps a state."""
    if halves.before is None:
        return
    state = jax.eval_shape(halves.before.init, params)
    if jax.tree.leaves(state):
        names = ", ".join(sorted(inner_lib.state_names(state))) or "arrays"
        raise ValueError(
            f"A stage before the projection keeps a state ({names}), which would advance with "
            "every gradient that is summed, not with every step. Put it after gale_project, or "
            "into the optimizer's inner, or sum the gradients themselves (optax.MultiSteps)."
        )


def _checked_schedule(every_k: Any) -> Callable[[jax.Array], Any]:
    if callable(every_k):
        return every_k
    _checked_k(every_k)
    return lambda step: every_k


def _checked_k(k: Any) -> jax.Array:
    """A number of gradients; where it is traced, and less than 1, it counts as 1."""
    value = None if k is None else np.asarray(k) if not isinstance(k, jax.Array) else k
    is_integer = value is not None and jnp.issubdtype(value.dtype, jnp.integer) and not value.ndim
    if not is_integer or isinstance(k, bool):
        raise TypeError(
            f"`every_k_schedule` must be an int, or a callable that returns one, got {k!r}."
        )
    if not isinstance(k, jax.core.Tracer) and k < 1:
        raise ValueError(f"`every_k_schedule` must be at least 1, got {k}.")
    return jnp.maximum(jnp.asarray(k, jnp.int32), 1)
