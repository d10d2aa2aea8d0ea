"""Updates inside the backward pass: a layer's gradient is used up before the next is computed."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_gale.pallas import Implementation, check_implementation
from optax_gale.training.model import LayeredModel
from optax_gale.training.passes import Pass, Sums, as_seen
from optax_gale.training.weights import any_quantized
from optax_gale.transforms.apply import check_transformation
from optax_gale.transforms.options import check_computing_dtype, check_one_of

Clip = Literal["hold", "two_pass", "previous"]
Activations = Literal["recompute", "keep"]


class LayerwiseState(NamedTuple):
    """State of `layerwise` with ``clip="previous"``.

    Attributes:
      opt_state: the transformation's state.
      grad_norm: norm of the last step's gradient, float32 ``()``; 0 before the first.
    """

    opt_state: optax.OptState
    grad_norm: jax.Array


class LayerwiseMetrics(NamedTuple):
    """What a step tells.

    Attributes:
      loss: the loss before the update, float32 ``()``; the mean over micro-batches.
      grad_norm: global norm of the gradient before clipping, float32 ``()``; the mean of those of
        the micro-batches.
    """

    loss: jax.Array
    grad_norm: jax.Array


class Layerwise(NamedTuple):
    """A training step; see `layerwise`.

    Attributes:
      init: ``(params) -> state``.
      step: ``(params, state, batch, *, refresh=None, key=None, **extra_args) -> (params, state,
        LayerwiseMetrics)``.
    """

    init: Callable[[Any], Any]
    step: Callable[..., tuple[Any, Any, LayerwiseMetrics]]


def layerwise(
    model: LayeredModel,
    tx: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
    clip_norm: float | None = None,
    clip: Clip = "hold",
    activations: Activations = "recompute",
    accumulator_dtype: Any = None,
    implementation: Implementation | None = None,
) -> Layerwise:
    r"""Builds a training step in which the full gradient never exists.

    The layers are walked backwards. For each, its activations are computed again from its input (or
    were kept), then its gradient, and with that the optimizer's step of its weights, in place. Of
    the gradient, one layer's and that of the embedding and the head exist at a time (of a large
    head it is used up before the layers'); between layers, the inputs of the layers are kept, one
    activation of the residual stream each.

    The result is that of the ordinary step, up to rounding where a compiler orders sums
    differently. Every layer is to the optimizer as a parameter of its own, ``(1, ...)``, so what
    looks at a whole leaf (a trust ratio, a norm of a block, a callable ``scale``) sees a layer of
    it, and random draws are others. Transformations that mix leaves are refused.

    With several micro-batches, gradients are projected and summed in the subspace, as `accumulate`
    does, and the layers take their steps at the end.

    Args:
      model: the model.
      tx: any Optax transformation.
      micro_batches: parts, at least 1, in which the batch is computed, of equal weight. All arrays
        of the batch then have its size as their leading axis, which this divides; scalars go to
        every part.
      clip_norm: global norm to which gradients are scaled down, that of every micro-batch by
        itself; None for no clipping.
      clip: how the norm is known in time. ``"hold"``: exactly; gradients are held, in the
        subspace, until the backward pass ends (as much memory as a first moment; ``tx`` of
        another kind holds them whole). ``"two_pass"``: exactly, from a backward pass before the
        one that updates (no memory, about 1.75 times the time of a step). ``"previous"``: the last
        step's norm is taken for this one's (free; not exact, and the first step is not clipped).
      activations: ``"recompute"``: of the activations only the inputs of the layers are kept until
        the backward pass, which runs every layer forward once more. ``"keep"``: all that the
        derivative of ``block`` reads is, and nothing is computed again. Weights are not kept, but
        what a block makes of them alone is (casts, transposes, a branch's), as are arrays that it
        makes of nothing. A ``block`` under `jax.checkpoint` says what it reads.
      accumulator_dtype: dtype of sums over micro-batches; None for float32.
      implementation: as in `update_and_apply`.

    Returns:
      A `Layerwise`: ``init(params)`` makes the state, which is that of ``tx`` itself, so that
      checkpoints fit the ordinary step (with ``clip="previous"``, a `LayerwiseState`).
      ``step(params, state, batch)`` is to be compiled, with params and state donated;
      ``refresh`` is as in `gale`, and static. Parameters may be in 8 bits (`quantize_weights`); to
      the optimizer they are float32, and ``key``, another one at every step, rounds them.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if an option is out of range; from ``step``, if leaves do not have a leading
        axis of layers, ``micro_batches`` does not divide the batch, the optimizer mixes leaves, or
        it needs the whole gradient where gradients are held or summed (``residual="fira"``).

    Example:
      >>> import functools, jax, jax.numpy as jnp, optax_gale
      >>> model = optax_gale.LayeredModel(
      ...     embed=lambda rest, batch: batch["x"] @ rest["embed"],
      ...     block=lambda p, x, batch, layer: x + jnp.tanh(x @ p["kernel"]),
      ...     head=lambda rest, x, batch: jnp.mean((x @ rest["head"] - batch["y"]) ** 2),
      ... )
      >>> params = {
      ...     "embed": jnp.ones((3, 64)),
      ...     "layers": {"kernel": jnp.ones((4, 64, 64)) / 64},
      ...     "head": jnp.ones((64, 1)) / 64,
      ... }
      >>> train = optax_gale.layerwise(model, optax_gale.gale_adamw(1e-2, 8), clip_norm=1.0)
      >>> state = train.init(params)
      >>> step = jax.jit(train.step, donate_argnums=(0, 1), static_argnames="refresh")
      >>> batch = {"x": jnp.ones((2, 3)), "y": jnp.zeros((2, 1))}
      >>> params, state, metrics = step(params, state, batch)
      >>> metrics.loss.shape
      ()

    References:
      Lv et al., `Full Parameter Fine-tuning for Large Language Models with Limited Resources
      <https://arxiv.org/abs/2306.09782>`_, 2023 (LOMO); Zhao et al., `GaLore
      <https://arxiv.org/abs/2403.03507>`_, 2024, section 4.3.
    """
    _check(model, tx, micro_batches, clip_norm, clip, accumulator_dtype, implementation)
    check_one_of("activations", activations, get_args(Activations))
    tx = optax.with_extra_args_support(tx)
    remembers = clip_norm is not None and clip == "previous"

    def init(params: Any) -> Any:
        state = tx.init(params) if not any_quantized(params) else _init(tx, params)
        return LayerwiseState(state, jnp.zeros((), jnp.float32)) if remembers else state

    def step(
        params: Any,
        state: Any,
        batch: Any,
        *,
        refresh: bool | None = None,
        key: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any, LayerwiseMetrics]:
        _check_state(state, remembers)
        if "layer" in extra_args:
            raise ValueError(
                "`layer` is what layers are told apart by: pass it under another name."
            )
        opt_state, previous = state if remembers else (state, None)
        if previous is not None:  # one gradient that is not finite does not spoil the next
            previous = jnp.where(jnp.isfinite(previous), previous, 0.0)
        options = {} if refresh is None else {"refresh": refresh}
        extra_args = {**options, **extra_args}
        recompute = activations == "recompute"
        pass_ = Pass(model, tx, params, opt_state, implementation, extra_args, key, recompute)
        parts = Parts(batch, micro_batches)
        if micro_batches == 1 and (clip_norm is None or clip != "hold"):
            new, opt_state, *metrics = _at_once(pass_, parts, clip_norm, previous)
        else:
            new, opt_state, *metrics = _summed(
                pass_, parts, clip_norm, clip, previous, accumulator_dtype
            )
        loss, norm = metrics[0].astype(jnp.float32), metrics[1].astype(jnp.float32)
        loss = pass_.averaged(loss)
        return (
            new,
            LayerwiseState(opt_state, norm) if remembers else opt_state,
            LayerwiseMetrics(loss, norm),
        )

    return Layerwise(init, step)


def _init(tx: optax.GradientTransformation, params: Any) -> Any:
    # Compiled, since of what the weights stand for only the shapes are needed.
    return jax.jit(lambda params: tx.init(as_seen(params)))(params)


class Parts:
    """A batch in micro-batches."""

    def __init__(self, batch: Any, count: int):
        """Checks that it can be divided.

        Raises:
          ValueError: if arrays have leading axes of different lengths, or no multiple of ``count``.
        """
        self.count, self._batch = count, batch
        if count == 1:
            return
        arrays = {
            jax.tree_util.keystr(path): jnp.shape(x)
            for path, x in jax.tree_util.tree_flatten_with_path(batch)[0]
            if jnp.ndim(x)
        }
        if len({shape[0] for shape in arrays.values()}) > 1:
            raise ValueError(
                f"With micro_batches={count} the leading axis of every array of the batch must be "
                f"that of the examples, got {arrays}. What all parts share is to be a scalar, or "
                "no part of the batch (a constant of `block` or `head`)."
            )
        for name, shape in arrays.items():
            if shape[0] % count or not shape[0]:
                raise ValueError(
                    f"micro_batches={count} must divide the leading axis of every array of the "
                    f"batch: batch{name} has shape {shape}."
                )

    def __getitem__(self, i: Any) -> Any:
        """Every ``count``-th example, from the i-th on: where a batch is spread over devices, so is
        each of its parts."""  # noqa: D205, D209

        def part(x: Any) -> Any:
            if not jnp.ndim(x):
                return x
            return jnp.reshape(x, (-1, self.count, *jnp.shape(x)[1:]))[:, i]

        return self._batch if self.count == 1 else jax.tree.map(part, self._batch)


def _at_once(
    pass_: Pass, parts: Parts, clip_norm: float | None, previous: jax.Array | None
) -> tuple[Any, Any, jax.Array, jax.Array]:
    batch = parts[0]
    forward = pass_.forward(batch)
    factor = None
    if clip_norm is not None:
        norm = pass_.norm(batch, forward) if previous is None else previous
        factor = _factor(clip_norm, norm)
    params, state, norm = pass_.update(batch, forward, factor)
    return params, state, forward.loss, norm


def _summed(
    pass_: Pass,
    parts: Parts,
    clip_norm: float | None,
    clip: Clip,
    previous: jax.Array | None,
    accumulator_dtype: Any,
) -> tuple[Any, Any, jax.Array, jax.Array]:
    """Gradients are summed as the inner sees them; then every layer takes its step."""
    holds = clip_norm is not None and clip == "hold"

    def add(i: Any, sums: Sums, *, refresh: bool) -> tuple[Sums, Any, jax.Array, jax.Array]:
        """Adds the gradients of a micro-batch."""
        batch = parts[i]
        forward = pass_.forward(batch)
        factor = None
        if clip_norm is not None and not holds:
            norm = pass_.norm(batch, forward) if previous is None else previous
            factor = _factor(clip_norm, norm)
        sums, state, norm = pass_.add(batch, forward, sums, factor, refresh=refresh)
        return sums, state, forward.loss, norm

    if parts.count == 1:
        held, state, loss, norm = add(0, pass_.zeros(), refresh=True)
        params, new = pass_.step(held, _factor(clip_norm, norm), state, several=False)
        return params, new, loss, norm

    def add_clipped(i: Any, sums: Sums, *, refresh: bool) -> tuple[Sums, Any, jax.Array, jax.Array]:
        if not holds:
            return add(i, sums, refresh=refresh)
        held, state, loss, norm = add(i, pass_.zeros(), refresh=refresh)
        factor = _factor(clip_norm, norm)
        sums = jax.tree.map(lambda s, x: s + (x * factor).astype(s.dtype), sums, held)
        return sums, state, loss, norm

    def more(carried: Any, i: jax.Array) -> tuple[Any, None]:
        sums, loss, norm = carried
        sums, _, own_loss, own_norm = add_clipped(i, sums, refresh=False)
        return (sums, loss + own_loss, norm + own_norm), None

    pass_.check_sums()
    sums, state, loss, norm = add_clipped(0, pass_.zero_sums(accumulator_dtype), refresh=True)
    pass_.parts = state
    (sums, loss, norm), _ = jax.lax.scan(more, (sums, loss, norm), jnp.arange(1, parts.count))
    params, new = pass_.step(sums, 1 / parts.count, state, several=True)
    return params, new, loss / parts.count, norm / parts.count


def _factor(clip_norm: float | None, norm: jax.Array) -> jax.Array:
    """What scales a gradient down to a norm, as ``optax.clip_by_global_norm`` does."""
    assert clip_norm is not None
    return jnp.where(norm < clip_norm, 1.0, clip_norm / norm)


def _check_state(state: Any, remembers: bool) -> None:
    if remembers and not isinstance(state, LayerwiseState):
        raise TypeError(
            "With clip='previous' `state` must be a LayerwiseState, as `init` makes it, got "
            f"{type(state).__name__}. To go on from another training: LayerwiseState(state, 0.0)."
        )
    if not remembers and isinstance(state, LayerwiseState):
        raise TypeError(
            "`state` is that of clip='previous'; with other options it is its `opt_state`."
        )


def _check(
    model: Any,
    tx: Any,
    micro_batches: Any,
    clip_norm: Any,
    clip: Any,
    accumulator_dtype: Any,
    implementation: Any,
) -> None:
    check_transformation("tx", tx)
    check_implementation(implementation)
    if not isinstance(model, LayeredModel):
        raise TypeError(f"`model` must be a LayeredModel, got {model!r}.")
    if not isinstance(micro_batches, (int, np.integer)) or isinstance(micro_batches, bool):
        raise TypeError(f"`micro_batches` must be an int, got {micro_batches!r}.")
    if micro_batches < 1:
        raise ValueError(f"`micro_batches` must be at least 1, got {micro_batches}.")
    is_number = isinstance(clip_norm, (int, float, np.number)) and not isinstance(clip_norm, bool)
    if clip_norm is not None and not (is_number and clip_norm > 0):
        raise ValueError(
            f"`clip_norm` must be a positive number, or None for no clipping, got {clip_norm!r}."
        )
    check_one_of("clip", clip, get_args(Clip))
    if accumulator_dtype is not None:
        check_computing_dtype("accumulator_dtype", accumulator_dtype)
