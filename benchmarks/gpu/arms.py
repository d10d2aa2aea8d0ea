"""The rivals: one optimizer step each, on the same weights and gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_gale
from optax_gale.pallas import Implementation

LEARNING_RATE, WEIGHT_DECAY, SCALE, GAP = 1e-3, 0.1, 0.25, 200

Make = Callable[[int], optax.GradientTransformation]


class Arm(NamedTuple):
    """A way to take a step.

    Attributes:
      make: the optimizer of a rank.
      in_place: whether `optax_gale.update_and_apply` takes the step, or ``tx.update`` and
        ``optax.apply_updates``.
      implementation: of the former.
      low_rank: whether the rank matters.
      gale: whether the host can choose the steps that refresh.
    """

    make: Make
    in_place: bool = False
    implementation: Implementation | None = None
    low_rank: bool = True
    gale: bool = True

    def step(
        self, tx: optax.GradientTransformation, refresh: bool | None = False
    ) -> Callable[[Any, Any], Any]:
        """``((params, state), grads) -> (params, state)``."""
        extra = {"refresh": refresh} if self.gale and refresh is not None else {}

        def in_place(carry: Any, grads: Any) -> Any:
            params, state = carry
            return optax_gale.update_and_apply(
                tx, grads, state, params, implementation=self.implementation, **extra
            )

        def two_calls(carry: Any, grads: Any) -> Any:
            params, state = carry
            update = optax.with_extra_args_support(tx).update
            updates, state = update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), state

        return in_place if self.in_place else two_calls


def gale(rank: int, **options: Any) -> optax.GradientTransformationExtraArgs:
    """GALE's AdamW with float32 moments."""
    return optax_gale.gale_adamw(
        LEARNING_RATE,
        rank,
        weight_decay=WEIGHT_DECAY,
        scale=SCALE,
        update_proj_gap=GAP,
        **{"state_dtype": jnp.float32, **options},
    )


def adamw() -> optax.GradientTransformation:
    """Optax's AdamW, its moments in the weights' dtype."""
    return optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def float32_states(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs a transformation on float32 gradients, and so with float32 moments."""

    def widened(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return tx.update(widened(updates), state, params)

    return optax.GradientTransformation(lambda params: tx.init(widened(params)), update)


def contrib_galore(rank: int) -> optax.GradientTransformation:
    """Optax's GaLore with its default inner, ``scale_by_adam``, as its documentation has it."""
    return optax.contrib.galore(
        LEARNING_RATE, rank=rank, update_proj_gap=GAP, scale=SCALE, weight_decay=WEIGHT_DECAY
    )


def _half(rank: int) -> optax.GradientTransformation:
    return gale(rank, projector_dtype=jnp.bfloat16)


GALE = "GALE"
KEPT = "GALE, moments kept"
ADAMW = "AdamW, f32 states"
CONTRIB = "optax.contrib.galore"
TORCH = "galore-torch"

ARMS: dict[str, Arm] = {
    GALE: Arm(gale, in_place=True),
    ADAMW: Arm(lambda _: float32_states(adamw()), low_rank=False, gale=False),
    "GALE, XLA": Arm(gale, in_place=True, implementation="xla"),
    "GALE, XLA, two calls": Arm(gale),
    "GALE, bf16 projector": Arm(_half, in_place=True),
    "GALE, bf16 projector, XLA": Arm(_half, in_place=True, implementation="xla"),
    "AdamW, bf16 states": Arm(lambda _: adamw(), low_rank=False, gale=False),
    "GALE, triton": Arm(gale, in_place=True, implementation="triton"),
    "GALE, mosaic_gpu": Arm(gale, in_place=True, implementation="mosaic_gpu"),
    KEPT: Arm(lambda rank: gale(rank, moments="keep"), in_place=True),
    CONTRIB: Arm(contrib_galore, gale=False),
}
"""The most important first. galore-torch is a rival too, but not one of JAX's."""

FORCED = ("GALE, triton", "GALE, mosaic_gpu", KEPT)
"""Arms whose ordinary steps are measured only when asked for."""

XLA_FORMS = {
    GALE: ("GALE, XLA", "GALE, XLA, two calls"),
    "GALE, bf16 projector": ("GALE, bf16 projector, XLA",),
}
"""The plain-XLA forms of an arm's computation, the best of which is its rival."""
