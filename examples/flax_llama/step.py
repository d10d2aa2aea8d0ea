"""The two compiled functions: one optimizer step, and the loss of one validation batch."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_gale
from examples.flax_llama.errors import UserError
from examples.flax_llama.model import Llama, next_token_loss

Batch = Mapping[str, Any]  # tokens (B, T) and mask (B, T), of JAX or of NumPy
Metrics = dict[str, jax.Array]


def check_backend(attention: str) -> None:
    """Refuses the fused attention where it cannot run.

    Raises:
      UserError: if there is no NVIDIA GPU.
    """
    if attention == "cudnn" and not _sees_cuda():
        raise UserError(
            "--attention-backend cudnn needs an NVIDIA GPU and a JAX that sees it; leave it out"
        )


def _sees_cuda() -> bool:
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


class TrainState(NamedTuple):
    """What training carries from step to step.

    Attributes:
      step: number of steps taken, int32 scalar.
      params: the weights.
      opt_state: the optimizer's state.
    """

    step: jax.Array
    params: Any
    opt_state: Any


def trace_init(model: Llama, tx: optax.GradientTransformation, seed: int) -> "jax.stages.Traced":
    """Traces the making of the first state.

    Its weights depend on the model and the seed only. ``out_info`` of what is returned is the
    state's shapes; ``lower().compile()()`` makes it.
    """

    def init() -> TrainState:
        params = model.init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))

    return jax.jit(init).trace()


def make_train_step(
    model: Llama,
    tx: optax.GradientTransformationExtraArgs,
    learning_rate: optax.Schedule,
    loss_chunks: int = 1,
) -> jax.stages.Wrapped:
    """Builds ``step(state, batch, refresh=None) -> (state, metrics)``, jitted, state donated.

    The metrics are scalars that stay on the device: the loss before the update, the gradients' norm
    before clipping, and the learning rate. ``refresh`` is static: True and False are one executable
    each.
    """

    def loss_fn(params: Any, batch: Batch) -> jax.Array:
        total, count = next_token_loss(model, params, batch, chunks=loss_chunks)
        return total / jnp.maximum(count, 1.0)

    def train_step(
        state: TrainState, batch: Batch, refresh: bool | None = None
    ) -> tuple[TrainState, Metrics]:
        loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
        extra: dict[str, Any] = {} if refresh is None else {"refresh": refresh}
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(learning_rate(state.step), jnp.float32),
        }
        params, opt_state = optax_gale.update_and_apply(
            tx, grads, state.opt_state, state.params, **extra
        )
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(train_step, static_argnames="refresh", donate_argnums=0)


class Evaluation(NamedTuple):
    """A validation.

    Attributes:
      loss: mean loss a token, over all tokens that the mask counts.
      tokens: how many those are.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinity where that overflows."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def make_evaluate(
    model: Llama, loss_chunks: int = 1
) -> Callable[[Any, Iterable[Batch]], Evaluation]:
    """Builds ``evaluate(params, batches)``.

    The mean is over tokens, not over batches: sums and counts are added up before they are divided,
    in double precision, so that it is unbiased however uneven the batches are.
    """
    batch_loss = jax.jit(
        lambda params, batch: jnp.stack(next_token_loss(model, params, batch, chunks=loss_chunks))
    )

    def evaluate(params: Any, batches: Iterable[Batch]) -> Evaluation:
        sums = jax.device_get([batch_loss(params, batch) for batch in batches])
        total = math.fsum(float(s[0]) for s in sums)
        count = math.fsum(float(s[1]) for s in sums)
        return Evaluation(total / count if count else math.nan, round(count))

    return evaluate
