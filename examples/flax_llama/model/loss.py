"""The next-token loss."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.flax_llama.model.llama import Llama


@jax.custom_vjp
def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of each token, ``logsumexp(logits) − logits[target]``, in float32.

    Written as reductions over the vocabulary, and with a gradient, softmax − one-hot, that needs
    only the logits and their logsumexp: nothing as large as the logits is kept in float32.

    Example:
        >>> token_losses(jnp.zeros((1, 2, 8)), jnp.zeros((1, 2), jnp.int32))
        Array([[2.0794415, 2.0794415]], dtype=float32)

    Args:
        logits: ``(B, T, V)``, any float dtype.
        targets: ``(B, T)``, integers.

    Returns:
        ``(B, T)`` in float32.
    """
    return _losses_and_normalisers(logits, targets)[0]


def _losses_and_normalisers(
    logits: jax.Array, targets: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    logits_f32 = logits.astype(jnp.float32)
    normalisers = jax.nn.logsumexp(logits_f32, axis=-1)
    target_logits = jnp.sum(jnp.where(_hits(logits, targets), logits_f32, 0.0), axis=-1)
    return normalisers - target_logits, (logits, targets, normalisers)


def _hits(logits: jax.Array, targets: jax.Array) -> jax.Array:
    # A comparison rather than a gather: it fuses into whatever reads it.
    vocabulary = jnp.arange(logits.shape[-1], dtype=targets.dtype)
    return vocabulary[None, None, :] == targets[..., None]


def _logits_gradient(
    residuals: tuple[jax.Array, jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None]:
    logits, targets, normalisers = residuals
    softmax = jnp.exp(logits.astype(jnp.float32) - normalisers[..., None])
    difference = softmax - _hits(logits, targets).astype(jnp.float32)
    return (difference * gradient[..., None]).astype(logits.dtype), None


token_losses.defvjp(_losses_and_normalisers, _logits_gradient)


def masked_sum(losses: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums ``losses`` where ``mask`` is set, and counts.

    Add up both over batches before dividing: the mean is then unbiased however uneven they are.

    Example:
        >>> total, count = masked_sum(jnp.array([1.0, 2.0, 9.0]), jnp.array([True, True, False]))
        >>> float(total / count)
        1.5

    Args:
        losses: Any shape.
        mask: The same shape; boolean, or 0 and 1.

    Returns:
        Sum and count, float32 scalars.
    """
    mask = mask.astype(jnp.float32)
    # where, not a product: 0 * inf would be NaN.
    return jnp.sum(jnp.where(mask > 0, losses * mask, 0.0)), jnp.sum(mask)


def next_token_loss(
    model: Llama, params: Any, batch: Mapping[str, jax.Array | np.ndarray], *, chunks: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Loss of predicting each token from those before it.

    Position t predicts token t + 1 where ``mask[t + 1]`` is set. All T tokens go through the model
    although the last predicts nothing: a length of T keeps the products aligned, T − 1 does not.

    Args:
        model: The model.
        params: Its parameters.
        batch: ``tokens (B, T)`` and ``mask (B, T)``.
        chunks: See ``head_loss``.

    Returns:
        Sum of the losses and their number; their quotient is the mean.

    Raises:
        ValueError: If ``chunks`` does not divide T.
    """
    hidden = model.apply({"params": params}, jnp.asarray(batch["tokens"]), method="hidden")
    assert isinstance(hidden, jax.Array)
    return head_loss(model, params, hidden, batch, chunks=chunks)


def predicted(mask: jax.Array | np.ndarray) -> jax.Array:
    """Where a prediction counts: ``mask (B, T)`` of the next token, float32."""
    return jnp.roll(jnp.asarray(mask), -1, axis=1).astype(jnp.float32).at[:, -1].set(0.0)


def head_loss(
    model: Llama,
    params: Any,
    hidden: jax.Array,
    batch: Mapping[str, jax.Array | np.ndarray],
    *,
    chunks: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """The loss from the residual stream after the last layer.

    Args:
        model: The model.
        params: Its parameters; those of the layers are not needed.
        hidden: ``(B, T, D)``.
        batch: ``tokens (B, T)`` and ``mask (B, T)``.
        chunks: Computes logits and loss for ``T / chunks`` positions at a time, and again in the
            backward pass, so that only ``B · T / chunks · V`` logits exist at once. Costs one more
            product with the LM head.

    Returns:
        Sum of the losses and their number.

    Raises:
        ValueError: If ``chunks`` does not divide T.
    """
    targets = jnp.roll(jnp.asarray(batch["tokens"]), -1, axis=1)
    mask = predicted(batch["mask"])

    def loss(params: Any, hidden: jax.Array, targets: jax.Array, mask: jax.Array) -> Any:
        logits = model.apply({"params": params}, hidden, method="head")
        assert isinstance(logits, jax.Array)
        return masked_sum(token_losses(logits, targets), mask)

    if chunks == 1:
        return loss(params, hidden, targets, mask)
    if hidden.shape[1] % chunks:
        raise ValueError(f"chunks={chunks} must divide the sequence length {hidden.shape[1]}.")

    def split(x: jax.Array) -> jax.Array:
        # Along time, not along the batch: the batch may be sharded.
        return jnp.stack(jnp.split(x, chunks, axis=1))

    def step(sums: Any, chunk: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, jax.checkpoint(loss)(params, *chunk)), None

    zero = jnp.zeros((), jnp.float32)
    sums, _ = jax.lax.scan(step, (zero, zero), (split(hidden), split(targets), split(mask)))
    return sums
