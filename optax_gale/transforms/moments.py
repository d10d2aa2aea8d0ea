"""Carrying the inner optimizer's moments from one subspace to the next.

A moment is found in the inner's state by its place and its name: it belongs to a projected leaf, it
has the shape of the projected gradient R, and the field that holds it says how it depends on the
gradients (see `Rotate`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_gale import _sharding, linalg
from optax_gale.transforms import storage, trees
from optax_gale.transforms.matrices import Projection

MomentKind = Literal["first", "second", "variance", "norm", "keep"]


class Meaning(NamedTuple):
    """What is known of a state's field.

    Attributes:
      kind: how it depends on the gradients; None if that is not known.
      stored: the kind of moment whose numbers it has, for those who store it in fewer bits;
        ``"keep"`` if it is to stay as it is.
    """

    kind: MomentKind | None
    stored: MomentKind

    @classmethod
    def of(cls, kind: MomentKind) -> "Meaning":
        """That of a moment of a kind."""
        return cls(kind, kind)


_FIRST, _SECOND = Meaning.of("first"), Meaning.of("second")
# Single gradients and sums of a few: they turn as first moments do, but no average over many steps
# evens out what rounding does to them.
_GRADIENT = Meaning("first", "keep")
_UNKNOWN = Meaning(None, "keep")

# Fields that mean the same wherever they hold an array a parameter. Single letters are not among
# them: `v` is one paper's first moment and another one's second.
_FIELDS: Mapping[str, Meaning] = {
    "mu": _FIRST,  # adam, lion, muon, adabelief, yogi, centred rmsprop
    "trace": _FIRST,  # sgd with momentum
    "exp_avg": _FIRST,  # dadapt_adamw, momo_adam
    "grad_sum": _FIRST,  # dadapt_adamw
    "acc_grads": _GRADIENT,  # MultiSteps
    "grad_acc": _GRADIENT,  # apply_every
    "previous_gradient": _GRADIENT,  # optimistic_gradient_descent
    "prev_updates": _GRADIENT,  # rprop
    "nu": _SECOND,  # adam, rmsprop
    "nu_max": _SECOND,  # amsgrad
    "sum_of_squares": _SECOND,  # adagrad
    "exp_avg_sq": _SECOND,  # dadapt_adamw, momo_adam
    "e_g": _SECOND,  # adadelta
    "e_x": _SECOND,  # adadelta
    "v_row": _SECOND,  # adafactor
    "v_col": _SECOND,  # adafactor
    "step_sizes": Meaning.of("keep"),  # rprop
}
# Fields that mean something in one of Optax's states only, or something else there.
_STATES: Mapping[str, Mapping[str, Meaning]] = {
    "EmaState": {"ema": _FIRST},
    # `v` is the average of the gradients' differences, `g` the last gradient.
    "ScaleByAdanState": {"m": _FIRST, "v": _FIRST, "n": _SECOND, "g": _GRADIENT},
    "ScaleByAdemamixState": {"m1": _FIRST, "m2": _FIRST},
    "ScaleBySimplifiedAdEMAMixState": {"m": _FIRST, "n": _SECOND},
    "ScaleByBeliefState": {"nu": Meaning.of("variance")},
    # A momentum of scaled updates, beside maxima over rows and columns: neither can be rotated.
    "ScaleBySM3State": {"nu": _UNKNOWN},
    # An average of the Hessian's diagonal: linear in the squared rotation, as a variance, but of
    # either sign.
    "SophiaState": {"nu": Meaning("variance", "first")},
}


@dataclass(frozen=True)
class Rotate:
    r"""Rotates the moments into the new basis; ``moments="rotate"`` with more fields known.

    With ``Q = P_new^T P_old``, a first moment becomes ``Q M``. A second moment whose state also
    holds a first one becomes, in terms of their bias-corrected values,
    ``|Q^2 (V - M^2) + (Q M)^2|`` (squares elementwise): the mean is rotated exactly, and the
    variance as that of uncorrelated components. A second moment alone becomes ``Q^2 V``, as does a
    variance (an average of squares from which the mean was taken), and a norm, of the gradient's
    first power, ``sqrt(Q^2 N^2)``.

    Attributes:
      fields: kind (``"first"``, ``"second"``, ``"variance"``, ``"norm"`` or ``"keep"``) of state
        fields that Optax's own transformations do not have, or that mean something else.

    Example:
      >>> import optax, optax_gale
      >>> infinity_norm = optax_gale.Rotate({"nu": "norm"})
      >>> tx = optax_gale.gale(optax.adamax(1e-3), rank=32, moments=infinity_norm)

    References:
      Robert et al., `LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics
      <https://arxiv.org/abs/2410.16103>`_, 2024, Algorithm 1.
    """

    fields: Mapping[str, MomentKind] = field(default_factory=dict)


Moments = Literal["keep", "rotate", "reset"] | Rotate


def check(moments: Any) -> None:
    """Raises ValueError unless ``moments`` is one of the option's values."""
    if not isinstance(moments, Rotate) and moments not in ("keep", "rotate", "reset"):
        raise ValueError(
            f"`moments` must be 'keep', 'rotate', 'reset' or a `Rotate`, got {moments!r}."
        )


@dataclass(frozen=True)
class Moment:
    """One array of the inner's state that lives in the subspace of one leaf.

    Attributes:
      index: position among the leaves of the inner's state, quantised arrays being leaves.
      leaf: position of the parameter among the parameters' leaves.
      node: path of the state whose field this is; moments of one node belong together.
      kind: how it depends on the gradients.
      rank_axis: the axis that counts subspace directions (negative); None if it was averaged away.
      full: whether it has the shape of R.
    """

    index: int
    leaf: int
    node: tuple[Any, ...]
    kind: MomentKind
    rank_axis: int | None
    full: bool


def find(
    inner_state: Any,
    leaf_paths: Sequence[tuple[Any, ...]],
    projections: Sequence[Projection | None],
    moments: Moments,
) -> list[Moment]:
    """Finds the arrays of the inner's state that must follow the subspace.

    Args:
      inner_state: the inner's state, arrays or shapes.
      leaf_paths: key path of every parameter leaf.
      projections: how every leaf is projected.
      moments: what is done to them.

    Returns:
      The moments.

    Raises:
      ValueError: if they are rotated, and an array with the subspace's shape is in a field that is
        not known; or if a factored moment has averaged over the matrices of a stack.
    """
    if moments == "keep":
        return []
    extra = moments.fields if isinstance(moments, Rotate) else {}
    found = []
    for field_ in fields(inner_state, leaf_paths, extra):
        projection = projections[field_.leaf]
        if projection is None:
            continue
        index, leaf, node, kind = field_.index, field_.leaf, field_.node, field_.meaning.kind
        name, shape = field_.name, tuple(jnp.shape(storage.unboxed(field_.array)))
        is_full = shape == projection.subspace_shape
        if is_full and kind is None and moments != "reset":
            raise ValueError(
                f"The inner's state{jax.tree_util.keystr(field_.path)} has the subspace's shape "
                f"{shape}, but `moments` does not know how the field '{name}' depends on the "
                f"gradients. Say it with moments=optax_gale.Rotate({{'{name}': 'first'}}) (or "
                "'second', or 'keep'), or use moments='keep'."
            )
        if is_full:
            found.append(Moment(index, leaf, node, kind or "keep", projection.rank_axis, full=True))
        elif name in ("v_row", "v_col") and shape == _without(
            projection, _averaged(name, projection)
        ):
            axis = _factored_rank_axis(name, field_.path, shape, projection)
            found.append(Moment(index, leaf, node, "second", axis, full=False))
    return found


class Field(NamedTuple):
    """One array of a state that belongs to a parameter, by its place.

    Attributes:
      index: position among the leaves of the state, boxes and quantised arrays being leaves.
      path: its key path.
      array: the array, as it is stored.
      leaf: position of the parameter among the parameters' leaves.
      node: path of the state whose field this is.
      name: the field's name.
      meaning: what is known of it.
    """

    index: int  # type: ignore[assignment]
    path: tuple[Any, ...]
    array: Any
    leaf: int
    node: tuple[Any, ...]
    name: str
    meaning: Meaning


def fields(
    state: Any, leaf_paths: Sequence[tuple[Any, ...]], extra: Mapping[str, MomentKind]
) -> list[Field]:
    """Finds the arrays of a state that belong to parameters.

    Args:
      state: a transformation's state, arrays or shapes.
      leaf_paths: key path of every parameter leaf.
      extra: kinds of fields by name, before what is known of Optax's.

    Returns:
      The arrays, in the state's order.
    """
    deepest_first = sorted(enumerate(leaf_paths), key=lambda item: -len(item[1]))
    arrays = jax.tree_util.tree_flatten_with_path(state, is_leaf=storage.is_stored)[0]
    found = []
    for index, (path, array) in enumerate(arrays):
        match = next(
            ((i, path[: len(path) - len(p)]) for i, p in deepest_first if trees.endswith(path, p)),
            None,
        )
        if match is None:
            continue
        leaf, owner = match
        name, node = _last_key(owner), owner[:-1]
        meaning = _meaning(name, _at(state, node), extra)
        found.append(Field(index, path, array, leaf, node, name, meaning))
    return found


def _last_key(path: tuple[Any, ...]) -> str:
    if not path:
        return ""
    key = path[-1]
    return str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key))))


def _at(state: Any, path: tuple[Any, ...]) -> Any:
    """The part of a state that a key path leads to."""
    for key in path:
        if hasattr(key, "name"):
            state = getattr(state, key.name)
        elif hasattr(key, "key") and not isinstance(state, (dict, Mapping)):
            return None  # inside a node whose children have numbers only
        else:
            state = state[key.key if hasattr(key, "key") else key.idx]
    return state


def _meaning(name: str, owner: Any, extra: Mapping[str, MomentKind]) -> Meaning:
    if name in extra:
        return Meaning.of(extra[name])
    known = _STATES.get(type(owner).__name__, {})
    if name in known:
        return known[name]
    if name == "v" and _has(owner, "v_row"):
        return _SECOND  # adafactor's, of what it does not factor
    return _FIELDS.get(name, _UNKNOWN)


def _has(owner: Any, name: str) -> bool:
    return name in owner if isinstance(owner, Mapping) else hasattr(owner, name)


def _averaged(name: str, projection: Projection) -> int:
    """The axis of R that Adafactor averages away: of the two longest, the longer for the rows."""
    shorter, longer = np.argsort(projection.subspace_shape)[-2:]
    return int(longer if name == "v_row" else shorter)


def _without(projection: Projection, axis: int) -> tuple[int, ...]:
    return projection.subspace_shape[:axis] + projection.subspace_shape[axis + 1 :]


def _factored_rank_axis(
    name: str, path: tuple[Any, ...], shape: tuple[int, ...], projection: Projection
) -> int | None:
    """Where a factored second moment keeps the rank axis; None if it was averaged away."""
    ndim = len(projection.subspace_shape)
    averaged, rank_axis = _averaged(name, projection), projection.rank_axis % ndim
    if averaged < ndim - 2:
        raise ValueError(
            f"The inner's state{jax.tree_util.keystr(path)} has shape {shape}: of the subspace's "
            f"axes {projection.subspace_shape}, axis {averaged}, which counts matrices, is among "
            "the two longest and was averaged away, so that no matrix's own moments are left to "
            "rotate or reset. Use moments='keep', or a `min_dim_size_to_factor` above "
            f"{projection.subspace_shape[averaged]}."
        )
    if averaged == rank_axis:
        return None
    return (rank_axis - 1 if averaged < rank_axis else rank_axis) - len(shape)


def carry(
    moments: Moments,
    found: Sequence[Moment],
    values: Sequence[jax.Array],
    bases: Mapping[int, tuple[jax.Array, jax.Array]],
    decays: Callable[[], Sequence[jax.Array]],
    count: jax.Array,
) -> dict[int, jax.Array]:
    """Carries moments over a refresh.

    Args:
      moments: the option.
      found: the moments.
      values: their arrays (of the matrices that are refreshed).
      bases: for every refreshed leaf its old and new projectors ``(*batch, d, r)``.
      decays: gives the decay rate of every moment's running average.
      count: steps averaged so far, int32.

    Returns:
      The moments that change, in the new bases, by their positions among ``found``; dtypes as they
      were.
    """
    touched = [k for k, moment in enumerate(found) if moment.leaf in bases]
    if moments == "reset":
        return {k: jnp.zeros_like(values[k]) for k in touched}
    if not touched:
        return {}
    rates, out = decays(), dict[int, jax.Array]()
    turns = {
        leaf: linalg.split_einsum("...dr,...ds->...rs", new, old)
        for leaf, (old, new) in bases.items()
    }
    # First moments first: second ones are carried with their help.
    for k in sorted(touched, key=lambda k: found[k].kind != "first"):
        moment, value = found[k], values[k].astype(jnp.float32)
        if moment.kind == "keep" or moment.rank_axis is None:
            continue
        q, axis = turns[moment.leaf], moment.rank_axis
        partner = _partner(found, moment)
        if moment.kind == "first":
            out[k] = _apply(q, value, axis)
        elif moment.kind == "norm":
            out[k] = jnp.sqrt(_apply(q * q, value * value, axis))
        elif partner is None:
            out[k] = _apply(q * q, value, axis)
        else:
            # Of bias-corrected moments V/c2 and M/c1, times c2 again:
            # Q^2 V + c2 ((Q M/c1)^2 - Q^2 (M/c1)^2).
            c1, c2 = (1.0 - rates[i] ** count for i in (partner, k))
            over = jnp.where(c1 > 0, c2 / jnp.where(c1 > 0, c1, 1.0) ** 2, 0.0)
            mean = values[partner].astype(jnp.float32)
            spread = _apply(q * q, value - over * mean * mean, axis)
            out[k] = jnp.abs(spread + over * out[partner] ** 2)
    return {k: x.astype(values[k].dtype) for k, x in out.items()}


def _apply(q: jax.Array, value: jax.Array, rank_axis: int) -> jax.Array:
    """Multiplies ``q`` (*batch, r, r) into the rank axis of ``value``."""
    if value.ndim == q.ndim - 1:
        return linalg.einsum("...rs,...s->...r", q, value)
    if rank_axis == -2:
        return linalg.split_einsum("...rs,...sn->...rn", q, value)
    return linalg.split_einsum("...ms,...rs->...mr", value, q)


def _partner(found: Sequence[Moment], second: Moment) -> int | None:
    """The first moment that a second moment's state holds beside it, if there is just one."""
    firsts = [
        k
        for k, moment in enumerate(found)
        if (moment.leaf, moment.node, moment.kind) == (second.leaf, second.node, "first")
        and moment.full
    ]
    return firsts[0] if len(firsts) == 1 and second.full and second.kind == "second" else None


def check_powers(moments: Moments, found: Sequence[Moment], once: Any, doubled: Any) -> None:
    """Checks that what is taken for a second moment grows with the gradient's square.

    Args:
      moments: the option, whose word on a field is taken.
      found: the moments.
      once: the inner's state after one step on a few numbers.
      doubled: the same with a gradient twice as large.

    Raises:
      ValueError: if one of them grows with its first power.
    """
    told = moments.fields if isinstance(moments, Rotate) else {}
    small = jax.tree.leaves(once, is_leaf=storage.is_stored)
    large = jax.tree_util.tree_flatten_with_path(doubled, is_leaf=storage.is_stored)[0]
    for moment in found:
        path, x = large[moment.index]
        name = _last_key(path[: len(moment.node) + 1])
        if moment.kind != "second" or name in told:
            continue
        # In NumPy: these arrays are concrete also where `init` is traced.
        with _sharding.concrete():
            arrays = [storage.value(y) for y in (small[moment.index], x)]
        size, doubled_size = (np.abs(np.asarray(y, np.float64)).sum() for y in arrays)
        if size and abs(doubled_size / size - 2) < 0.1:
            raise ValueError(
                f"The inner's state{jax.tree_util.keystr(path)} is called like a second moment, "
                "but grows with the gradient, not with its square. Say that it is a norm with "
                f"moments=optax_gale.Rotate({{'{name}': 'norm'}}), or use moments='keep'."
            )
