"""Optimizer states in 8 bits, for any transformation."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_gale.quantization import BLOCK_SIZE
from optax_gale.quantization.blockwise import checked_block_size
from optax_gale.quantization.codes import CodeName
from optax_gale.transforms import moments, storage, trees
from optax_gale.transforms.apply import check_state, check_transformation
from optax_gale.transforms.moments import MomentKind
from optax_gale.transforms.options import check_seed

MIN_SIZE = 4096

_CODES: Mapping[MomentKind, CodeName] = {
    "first": "dynamic",
    "second": "dynamic_unsigned",
    "variance": "dynamic_unsigned",
    "norm": "dynamic_unsigned",
}


class QuantizeStatesState(NamedTuple):
    """State of `quantize_states`.

    Attributes:
      count: steps taken, int32 ``()``.
      inner_state: the inner's state, with an `optax_gale.quantization.Quantized` in the place of
        every array that is quantised.
    """

    count: jax.Array  # type: ignore[assignment]
    inner_state: Any


def quantize_states(
    inner: optax.GradientTransformation,
    *,
    block_size: int = BLOCK_SIZE,
    min_size: int = MIN_SIZE,
    stochastic_rounding: bool = False,
    seed: Any = 0,
    fields: Mapping[str, MomentKind] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the moments of any transformation in 8 bits.

    At every step the moments are read, ``x = s_b c(code)`` with the scale ``s_b`` of their block,
    the inner runs in float32 (float64 where the parameters are), and the new ones are stored. The
    code c is the dynamic one of bitsandbytes (`optax_gale.quantization.dynamic_map`): signed for
    first moments, unsigned for second ones, ``1 + 4 / block_size`` bytes an element. Blocks run
    along the last axis, so codes have the shape and can have the sharding of what they stand for.

    A second moment that is not zero is rounded up to the smallest number of its block, 3.25e-7 of
    the largest, never to zero: beside a first moment that is not zero, zero would make a step of
    ``m / eps``. Rounded up, it makes a shorter step, of a component a thousand times smaller than
    the block's largest. (Where the largest is below 4e-32, the smallest number is below float32's
    own, and zero.)

    Which arrays are moments, and of which kind, is known of Optax's own states, and of others whose
    fields have names with one meaning (``mu``, ``nu``, ``trace``, ...), as in `gale`. Unknown
    fields stay as they are unless ``fields`` names them, and so do gradients that are summed or
    held for a step (``optax.MultiSteps``), as no average evens out what rounding does to them. Step
    counters, float64 arrays, and arrays that are small or would not shrink always stay.

    Args:
      inner: any transformation; `gale` also keeps its own inner's moments this way with
        ``state_dtype="int8"``.
      block_size: elements along the last axis that share a scale: 256 as in bitsandbytes; 2048 in
        the paper.
      min_size: arrays with fewer elements than this stay as they are.
      stochastic_rounding: rounds at random, to the right mean, instead of to the nearest number:
        averages then follow changes that are smaller than half the distance of two numbers.
      seed: from which, with the array's place and the step, random numbers derive.
      fields: kind (``"first"``, ``"second"``, ``"variance"``, ``"norm"``, or ``"keep"`` for none)
        of state fields that are not known, that mean something else, or that are to be kept. A
        hand-written Adam's, say: ``{"m": "first", "v": "second"}``.

    Returns:
      The transformation.

    Raises:
      TypeError: if an option has the wrong type, or ``inner`` is no transformation.
      ValueError: if an option is out of range.

    Example:
      >>> import jax.numpy as jnp, optax, optax_gale
      >>> tx = optax_gale.quantize_states(optax.adamw(1e-3))
      >>> params = {"kernel": jnp.ones((64, 512)), "bias": jnp.zeros(512)}
      >>> state = tx.init(params)
      >>> nu = state.inner_state[0].nu
      >>> nu["kernel"].codes.dtype, nu["kernel"].scales.shape, nu["bias"].dtype
      (dtype('uint8'), (64, 2), dtype('float32'))
      >>> updates, state = tx.update(params, state, params)

    References:
      Dettmers et al., `8-bit Optimizers via Block-wise Quantization
      <https://arxiv.org/abs/2110.02861>`_, 2022.
    """
    check_transformation("inner", inner)
    block_size = checked_block_size(block_size)
    _check_min_size(min_size)
    check_seed(seed)
    known = _checked_fields(fields)
    if not isinstance(stochastic_rounding, bool):
        raise TypeError(f"`stochastic_rounding` must be a bool, got {stochastic_rounding!r}.")
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> QuantizeStatesState:
        inner_state = inner.init(_wide(params))
        leaves, treedef = jax.tree.flatten(inner_state, is_leaf=storage.is_stored)
        for found in moments.fields(inner_state, trees.key_paths(params), known):
            x = found.array
            code = _CODES.get(found.meaning.stored)
            if code is not None and _shrinks(x, code, block_size, min_size):
                leaves[found.index] = storage.quantized(x, code, block_size)
        return QuantizeStatesState(jnp.zeros((), jnp.int32), jax.tree.unflatten(treedef, leaves))

    def update(
        updates: optax.Updates,
        state: QuantizeStatesState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, QuantizeStatesState]:
        check_state(state, QuantizeStatesState)
        if params is not None:
            trees.check_updates(updates, params)
        read = jax.tree.map(
            lambda x: storage.boxed_value(x) if storage.is_quantized(x) else x,
            state.inner_state,
            is_leaf=storage.is_quantized,
        )
        new, inner_state = inner.update(_wide(updates), read, _wide(params), **extra_args)

        def store(path: Any, old: Any, x: Any) -> Any:
            # What is not quantised in the old state stays so, also where it could be: the state's
            # derivatives are taken on arrays.
            if not storage.is_quantized(old):
                return x
            key = None
            if stochastic_rounding:
                key = jax.random.key(seed, impl="threefry2x32")
                key = trees.fold_in_path(key, jax.tree_util.keystr(path))
                key = jax.random.fold_in(key, state.count)
                if "layer" in extra_args:  # of a stack whose layers take steps of their own
                    key = jax.random.fold_in(key, extra_args["layer"])
            x = storage.quantized_as(old, trees.unbox(x), key)
            return storage.boxed_as(old, x)

        inner_state = jax.tree_util.tree_map_with_path(
            store, state.inner_state, inner_state, is_leaf=storage.is_quantized
        )
        new = _cast_like(new, updates if params is None else params)
        return new, QuantizeStatesState(optax.safe_increment(state.count), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _wide(tree: Any) -> Any:
    """Half-precision arrays, or their shapes, in float32."""

    def widened(x: Any) -> Any:
        dtype = jnp.result_type(x)
        if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize >= 4:
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, jnp.float32)
        return x.astype(jnp.float32)

    return jax.tree.map(widened, tree)


def _cast_like(updates: Any, tree: Any) -> Any:
    """Updates in the dtypes of another tree's leaves; None where there is no update."""
    is_none = lambda x: x is None
    cast = lambda u, x: None if u is None else u.astype(jnp.result_type(x))
    return jax.tree.map(cast, updates, tree, is_leaf=is_none)


def _shrinks(boxed: Any, code: CodeName, block_size: int, min_size: int) -> bool:
    """Whether an array is one to be quantised, and would take less memory."""
    x = trees.unbox(boxed)
    if storage.is_quantized(x) or not jnp.issubdtype(x.dtype, jnp.floating) or not x.ndim:
        return False
    # Scales are float32: they have neither float64's range nor its precision.
    is_meant = x.dtype.itemsize <= 4 and x.size >= max(min_size, 1)
    return is_meant and storage.shrinks(x.shape, x.dtype, code, block_size)


def _check_min_size(min_size: Any) -> None:
    if not isinstance(min_size, (int, np.integer)) or isinstance(min_size, bool):
        raise TypeError(f"`min_size` must be an int, got {min_size!r}. Use 4096 if unsure.")
    if min_size < 0:
        raise ValueError(f"`min_size` must be 0 (everything) or more, got {min_size}.")


def _checked_fields(fields: Mapping[str, MomentKind] | None) -> Mapping[str, MomentKind]:
    fields = {} if fields is None else fields
    if not isinstance(fields, Mapping):
        raise TypeError(f"`fields` must map names of fields to kinds of moments, got {fields!r}.")
    for name, kind in fields.items():
        if kind not in (*_CODES, "keep"):
            raise ValueError(
                f"`fields` must give each field one of {(*_CODES, 'keep')}, got {name!r}: {kind!r}."
            )
    return fields
