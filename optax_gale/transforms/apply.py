"""What transformations can do beyond `update`: apply updates, and take a step in two halves."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_gale import pallas
from optax_gale._averages import AxisName
from optax_gale.pallas import Implementation


class Halves(NamedTuple):
    """A step in two halves, between which gradients can be summed, scaled, or wait.

    Attributes:
      zeros: ``(params) -> projected``, a sum of no gradients.
      project: ``(grads, state, params, *, first=None, refresh=None, **extra_args) -> (projected,
        state)``: refreshes projectors, if ``first`` (a boolean array; None for True) and due, and
        gives what the inner sees of the gradients. That is linear in them for given projectors.
      update: ``(projected, state, params, *, like, **extra_args) -> (updates, state)``, ``like``
        with the shapes of the gradients.
      apply: ``(projected, state, params, implementation, **extra_args) -> (params, state)``.
      axis_name: mapped axes over which projections are to be averaged before ``update`` or
        ``apply``; ``project`` leaves that out.
      before: what sees the gradients before they are projected, if there is such a stage.
    """

    zeros: Callable[[Any], Any]
    project: Callable[..., tuple[Any, Any]]
    update: Callable[..., tuple[Any, Any]]
    apply: Callable[..., tuple[Any, Any]]
    axis_name: AxisName = None
    before: optax.GradientTransformation | None = None


class ExtendedTransformation(optax.GradientTransformationExtraArgs):
    """A transformation that can do more than ``update``.

    Attributes:
      in_place: ``(grads, state, params, implementation, **extra_args) -> (params, state)``, if it
        can apply its updates itself.
      halves: its step in two halves, if it projects gradients.
      refreshed: ``(grads, state, params, **extra_args) -> state``: what of a step that refreshes
        all projectors comes before the step, if it has projectors.
    """

    in_place: Callable[..., tuple[Any, Any]] | None = None
    halves: Halves | None = None
    refreshed: Callable[..., Any] | None = None


def extended(
    tx: optax.GradientTransformationExtraArgs,
    *,
    in_place: Callable[..., tuple[Any, Any]] | None = None,
    halves: Halves | None = None,
    refreshed: Callable[..., Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Attaches what a transformation can do beyond ``update``, if that is anything."""
    if in_place is None and halves is None and refreshed is None:
        return tx
    out = ExtendedTransformation(*tx)
    out.in_place, out.halves, out.refreshed = in_place, halves, refreshed
    return out


def halves_of(tx: optax.GradientTransformation) -> Halves:
    """The two halves of any transformation's step; the first does nothing where none projects."""
    found = getattr(tx, "halves", None)
    if found is not None:
        return found
    whole = optax.with_extra_args_support(tx)

    def project(grads, state, params, *, first=None, refresh=None, **extra_args):
        del params, first, refresh, extra_args
        return grads, state

    def update(projected, state, params, *, like, **extra_args):
        del like
        return whole.update(projected, state, params, **extra_args)

    def apply(projected, state, params, implementation, **extra_args):
        return update_and_apply(
            whole, projected, state, params, implementation=implementation, **extra_args
        )

    return Halves(lambda params: jax.tree.map(jnp.zeros_like, params), project, update, apply)


def update_and_apply(
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    *,
    implementation: Implementation | None = None,
    **extra_args: Any,
) -> tuple[optax.Params, optax.OptState]:
    """Takes a step: ``tx.update`` and ``optax.apply_updates`` in one.

    For this library's optimizers, and for `optax_gale.chain` where one of them comes last, weights,
    moments and projectors are replaced in place, if they are donated. Where kernels run, two for
    every group of leaves of one shape, no update of the weights' size is made on the way. Sums are
    float32 and rounded once, where ``apply_updates`` rounds the update first: on bfloat16 weights
    this is the more accurate of the two. For any other transformation it is the two calls.

    Args:
      tx: any Optax transformation.
      grads: the gradients.
      state: its state; donate it.
      params: the parameters; donate them.
      implementation: who runs the two passes over the matrices. None for the fastest that was
        measured on such a GPU and shape, and XLA elsewhere, also where JAX sees several devices and
        no type says what each of them has (Explicit axes and `jax.shard_map` do);
        ``"xla"``, ``"mosaic_gpu"`` or ``"triton"`` to force one for what kernels do: an inner that
        is not elementwise, a residual, and other transformations run on XLA all the same.
      **extra_args: for the transformation's `update`, such as ``refresh``.

    Returns:
      The new parameters and the new state.

    Raises:
      ValueError: if ``params`` is None or of other shapes than ``grads``, or ``implementation`` is
        unknown or cannot serve.
      TypeError: if ``tx`` is no transformation, or ``state`` is another one's.

    Example:
      >>> import jax, jax.numpy as jnp, optax_gale
      >>> tx = optax_gale.gale_adamw(1e-2, rank=8)
      >>> @jax.jit(donate_argnums=(0, 1))
      ... def step(params, state, grads):
      ...     return optax_gale.update_and_apply(tx, grads, state, params)
      >>> params = {"kernel": jnp.ones((256, 64)), "bias": jnp.zeros(64)}
      >>> grads = {"kernel": jnp.ones((256, 64)), "bias": jnp.ones(64)}
      >>> params, state = step(params, tx.init(params), grads)
      >>> params["kernel"].shape
      (256, 64)
    """
    if params is None:
        raise ValueError("update_and_apply needs `params`: they are what it applies the update to.")
    pallas.check_implementation(implementation)
    check_transformation("tx", tx)
    in_place = getattr(tx, "in_place", None)
    if in_place is not None:
        out: tuple[Any, Any] = in_place(grads, state, params, implementation, **extra_args)
        return out
    updates, state = optax.with_extra_args_support(tx).update(grads, state, params, **extra_args)
    return optax.apply_updates(params, updates), state


def refresh_projectors(
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
    **extra_args: Any,
) -> optax.OptState:
    """Refreshes all projectors, and carries the moments over, but takes no step.

    The step that ``tx.update(..., refresh=True)`` takes is this, and then
    ``tx.update(..., refresh=False)`` on the same gradients. Apart, the two can run differently:
    on a mesh, say, the refresh as the compiler spreads it, and the step in kernels that types tell
    what each device has.

    Args:
      tx: `gale` or an alias of it, or `optax_gale.chain` where one of them comes last.
      grads: the gradients.
      state: its state.
      params: the parameters, if ``tx`` needs them.
      **extra_args: for the transformation's `update`, but ``refresh``.

    Returns:
      The state before the step.

    Raises:
      ValueError: if ``tx`` has no projectors that it can refresh by themselves.
      TypeError: if ``tx`` is no transformation, or ``state`` is another one's.

    Example:
      >>> import jax.numpy as jnp, optax_gale
      >>> tx = optax_gale.gale_adamw(1e-2, rank=8)
      >>> params = {"kernel": jnp.ones((256, 64))}
      >>> state = optax_gale.refresh_projectors(tx, params, tx.init(params), params)
      >>> updates, state = tx.update(params, state, params, refresh=False)
    """
    check_transformation("tx", tx)
    refreshed = getattr(tx, "refreshed", None)
    if refreshed is None:
        raise ValueError(
            "refresh_projectors takes `gale`, an alias of it, or an optax_gale.chain that ends in "
            f"one, got {tx!r}."
        )
    return refreshed(grads, state, params, **extra_args)


def check_transformation(name: str, tx: Any) -> None:
    """Raises TypeError unless an argument is a transformation."""
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        raise TypeError(
            f"`{name}` must be an Optax gradient transformation, with `init` and `update`, got "
            f"{tx!r}."
        )


def check_state(state: Any, kind: type) -> None:
    """Raises TypeError unless a state is of a transformation's own class."""
    if not isinstance(state, kind):
        raise TypeError(
            "`state` must be what `init` of this transformation returned (or a later state of "
            f"it), a {kind.__name__}, got {type(state).__name__}."
        )
