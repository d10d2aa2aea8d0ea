"""The projection as a stage of a chain."""

import warnings
from typing import Any

import optax

from optax_gale._averages import AxisName
from optax_gale.transforms.apply import Halves, extended
from optax_gale.transforms.moments import Moments
from optax_gale.transforms.options import Options
from optax_gale.transforms.range_finders import RangeFinder, RangeFinderName
from optax_gale.transforms.refresh import RefreshSchedule
from optax_gale.transforms.residual import Residual
from optax_gale.transforms.selection import Select, Side
from optax_gale.transforms.wrapper import wrap


class GaleProjectWarning(UserWarning):
    """`gale_project` was used where it cannot shrink its neighbours' states."""


class _ProjectStage(optax.GradientTransformationExtraArgs):
    """A stage that `chain` recognises; a plain transformation to everybody else."""

    options: Options


def gale_project(
    rank: Any = 128,
    *,
    update_proj_gap: Any = 200,
    scale: Any = 1.0,
    side: Side = "short",
    range_finder: RangeFinderName | RangeFinder = "gale",
    moments: Moments = "rotate",
    residual: Residual = None,
    refresh_schedule: RefreshSchedule = "together",
    select: Select = None,
    weight_dimension_numbers: Any = None,
    state_dtype: Any = None,
    projector_dtype: Any = "float32",
    seed: Any = 0,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Projects gradients into low-rank subspaces, for the stages that follow it.

    In ``optax_gale.chain`` the stages after it run in the subspace, with moments of rank r:
    ``chain(gale_project(rank), *inner)`` is ``gale(chain(*inner), rank)``.

    ``optax.chain`` builds every stage's state from the full-size parameters, so no stage can shrink
    its neighbour's. There this stage returns ``scale P P^T G``, at the parameter's shape: training
    works, moments are full size, and a `GaleProjectWarning` says so once. The scale then comes
    before the following stages, and Adam is blind to it.

    Args:
      rank: see `gale`, as all the options.
      update_proj_gap: steps between refreshes.
      scale: factor of the projected update.
      side: which side of a matrix is projected.
      range_finder: how a gradient becomes a projector.
      moments: what a refresh does to the following stages' moments.
      residual: what becomes of the gradient outside the subspace.
      refresh_schedule: how refreshes are spread over the gap.
      select: which leaves are projected.
      weight_dimension_numbers: which axes make a weight's rows and columns.
      state_dtype: dtype in which the following stages run, or ``"int8"``: moments in 8 bits.
      projector_dtype: dtype in which projectors are stored, also ``"int8"`` or ``"int4"``.
      seed: seed of every random number.
      axis_name: mapped axes along which gradients differ, and over which they are averaged.

    Returns:
      The stage.

    Raises:
      TypeError: if an option has the wrong type.
      ValueError: if an option is out of range.

    Example:
      >>> import jax.numpy as jnp, optax, optax_gale
      >>> tx = optax_gale.chain(
      ...     optax.clip_by_global_norm(1.0),
      ...     optax_gale.gale_project(rank=8),
      ...     optax.adamw(1e-3),
      ... )
      >>> state = tx.init({"kernel": jnp.ones((256, 64))})
      >>> state[1].inner_state[0][0].mu["kernel"].shape
      (256, 8)
    """
    options = Options.of(locals())
    alone = wrap(optax.identity(), options)
    warned = False

    def init(params: optax.Params) -> optax.OptState:
        nonlocal warned
        if not warned:
            warned = True
            warnings.warn(
                "gale_project() inside optax.chain returns P P^T G at the parameters' full size, "
                "so the moments of the stages after it are full size too and no memory is saved. "
                "Write optax_gale.chain(...) instead of optax.chain(...): same arguments, moments "
                "of rank r.",
                GaleProjectWarning,
                stacklevel=2,
            )
        return alone.init(params)

    stage = _ProjectStage(init, alone.update)
    stage.options = options
    return stage


def chain(*args: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """``optax.chain``, in which the stages after `gale_project` run in the subspace.

    Args:
      *args: the transformations, in the order in which they are applied. With a `gale_project`
        among them, those before it see full gradients (clipping) and those after it subspaces.
        Nest a chain to end the subspace earlier.

    Returns:
      One transformation. Without a `gale_project` it is ``optax.chain(*args)``.

    Raises:
      ValueError: if there is more than one `gale_project`.

    Example:
      >>> import optax, optax_gale
      >>> schedule = optax.cosine_decay_schedule(1e-3, 1000)
      >>> tx = optax_gale.chain(
      ...     optax_gale.gale_project(rank=128),
      ...     optax.scale_by_adam(),
      ...     optax.add_decayed_weights(0.1),
      ...     optax.scale_by_learning_rate(schedule),
      ... )
    """
    stages = [i for i, tx in enumerate(args) if isinstance(tx, _ProjectStage)]
    if len(stages) > 1:
        raise ValueError(
            f"optax_gale.chain takes one gale_project, got {len(stages)} (arguments {stages}). For "
            "different ranks in different leaves, give one of them a tree or a callable as `rank`."
        )
    if stages:
        (i,) = stages
        stage = args[i]
        assert isinstance(stage, _ProjectStage)
        args = (
            *args[:i],
            wrap(optax.chain(*(args[i + 1 :] or (optax.identity(),))), stage.options),
        )
    return _chained(args or (optax.identity(),))


def _chained(
    stages: tuple[optax.GradientTransformation, ...],
) -> optax.GradientTransformationExtraArgs:
    """``optax.chain``, which can do what its last stage can."""
    *first, last = stages
    before = optax.with_extra_args_support(optax.chain(*first)) if first else None

    def pass_on(grads, state, params, extra_args):
        if before is None:
            return grads, ()
        return before.update(grads, tuple(state[:-1]), params, **extra_args)

    return extended(
        optax.with_extra_args_support(optax.chain(*stages)),
        in_place=_in_place(getattr(last, "in_place", None), pass_on),
        halves=_halves(getattr(last, "halves", None), before, pass_on),
        refreshed=_refreshed(getattr(last, "refreshed", None), pass_on),
    )


def _in_place(own, pass_on):
    if own is None:
        return None

    def in_place(grads, state, params, implementation, **extra_args):
        grads, states = pass_on(grads, state, params, extra_args)
        params, last = own(grads, state[-1], params, implementation, **extra_args)
        return params, (*states, last)

    return in_place


def _refreshed(own, pass_on):
    if own is None:
        return None

    def refreshed(grads, state, params=None, **extra_args):
        # Those before it take their step with the last one.
        grads, _ = pass_on(grads, state, params, extra_args)
        return (*state[:-1], own(grads, state[-1], params, **extra_args))

    return refreshed


def _halves(own: Halves | None, before, pass_on) -> Halves | None:
    if own is None:
        return None

    def project(grads, state, params, *, first=None, refresh=None, **extra_args):
        grads, states = pass_on(grads, state, params, extra_args)
        options = {"first": first, "refresh": refresh, **extra_args}
        projected, last = own.project(grads, state[-1], params, **options)
        return projected, (*states, last)

    def update(projected, state, params, **extra_args):
        updates, last = own.update(projected, state[-1], params, **extra_args)
        return updates, (*state[:-1], last)

    def apply(projected, state, params, implementation, **extra_args):
        params, last = own.apply(projected, state[-1], params, implementation, **extra_args)
        return params, (*state[:-1], last)

    return Halves(own.zeros, project, update, apply, own.axis_name, before)
