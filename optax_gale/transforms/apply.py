"""The update and its application in one function, for any transformation."""

from collections.abc import Callable
from typing import Any

import optax

from optax_gale import pallas
from optax_gale.pallas import Implementation


class InPlaceTransformation(optax.GradientTransformationExtraArgs):
    """A transformation that can apply its updates itself.

    Attributes:
      in_place: ``(grads, state, params, implementation, **extra_args) -> (params, state)``.
    """

    in_place: Callable[..., tuple[Any, Any]]


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
        measured on such a GPU and shape, and XLA elsewhere, also where JAX sees several devices;
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


def check_transformation(name: str, tx: Any) -> None:
    """Raises TypeError unless an argument is a transformation."""
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        raise TypeError(
            f"`{name}` must be an Optax gradient transformation, with `init` and `update`, got "
            f"{tx!r}."
        )
