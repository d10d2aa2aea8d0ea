"""The optimizers that people know, in low-rank subspaces."""

import dataclasses
import math
from typing import Any

import jax
import optax

from optax_gale._averages import AxisName
from optax_gale.transforms.matrices import MatrixView
from optax_gale.transforms.moments import Moments
from optax_gale.transforms.muon import scale_by_orthogonalized_momentum
from optax_gale.transforms.options import Options
from optax_gale.transforms.range_finders import RangeFinder, RangeFinderName
from optax_gale.transforms.refresh import RefreshSchedule
from optax_gale.transforms.residual import Residual
from optax_gale.transforms.selection import Select, Side
from optax_gale.transforms.wrapper import wrap


def gale_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any = None,
    weight_decay: jax.typing.ArrayLike = 1e-4,
    mask: Any = None,
    nesterov: bool = False,
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
    r"""AdamW with its moments in low-rank subspaces.

    ``gale(optax.adamw(learning_rate, ...), rank, ...)``.

    Args:
      learning_rate: step size, a number or a schedule.
      rank: rank of the subspaces; see `gale`.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the root of the second moment.
      eps_root: added under the root.
      mu_dtype: dtype of the first moment; None for the parameters'.
      weight_decay: decoupled decay of the whole weight, multiplied by the learning rate.
      mask: which leaves decay; a tree of booleans or a callable from parameters to one, as in
        ``optax.adamw``. A callable sees the subspaces of projected leaves.
      nesterov: whether to use Nesterov momentum.
      update_proj_gap: steps between refreshes; see `gale`, as all that follow.
      scale: factor of the projected update.
      side: which side of a matrix is projected.
      range_finder: how a gradient becomes a projector.
      moments: what a refresh does to the moments.
      residual: what becomes of the gradient outside the subspace.
      refresh_schedule: how refreshes are spread over the gap.
      select: which leaves are projected.
      weight_dimension_numbers: which axes make a weight's rows and columns.
      state_dtype: dtype in which the optimizer runs, or ``"int8"``: moments in 8 bits.
      projector_dtype: dtype in which projectors are stored, also ``"int8"`` or ``"int4"``.
      seed: seed of every random number.
      axis_name: mapped axes along which gradients differ, and over which they are averaged.

    Returns:
      The transformation; see `gale` for the ``refresh`` argument of its `update`.

    Raises:
      TypeError: if an option has the wrong type.
      ValueError: if an option is out of range.

    Example:
      >>> import jax.numpy as jnp, optax, optax_gale
      >>> params = {"kernel": jnp.ones((256, 64)), "bias": jnp.zeros(64)}
      >>> tx = optax_gale.gale_adamw(1e-2, rank=8)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> updates["kernel"].shape
      (256, 64)

    References:
      Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection
      <https://arxiv.org/abs/2403.03507>`_, 2024. Loshchilov, Hutter, `Decoupled Weight Decay
      Regularization <https://arxiv.org/abs/1711.05101>`_, 2019.
    """
    options = Options.of(locals())
    inner = optax.adamw(
        learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        eps_root=eps_root,
        mu_dtype=mu_dtype,
        weight_decay=weight_decay,
        mask=mask,
        nesterov=nesterov,
    )
    return wrap(inner, options)


def gale_muon(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    beta: jax.typing.ArrayLike = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    mu_dtype: Any = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Any = None,
    adam_b1: jax.typing.ArrayLike = 0.9,
    adam_b2: jax.typing.ArrayLike = 0.999,
    adam_eps: jax.typing.ArrayLike = 1e-8,
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
    r"""Muon in low-rank subspaces: the projected momentum, orthogonalised.

    With M the momentum of R, r by n::

        dW <- - learning_rate * sqrt(max(1, n / m)) * P orthogonalize(M)

    an update of rank r whose singular values are all about 1, at the memory of one moment.

    Args:
      learning_rate: step size, a number or a schedule.
      rank: rank of the subspaces; see `gale`.
      adam_learning_rate: learning rate of the leaves that are not projected, which AdamW trains;
        None for ``learning_rate``.
      beta: decay rate of the momentum.
      nesterov: whether the momentum looks one step ahead.
      ns_steps: Newton-Schulz iterations.
      mu_dtype: dtype of the momenta; None for the parameters'.
      weight_decay: decoupled decay of the whole weight, multiplied by the learning rate.
      mask: which leaves decay, as in ``optax.adamw``.
      adam_b1: AdamW's first decay rate.
      adam_b2: AdamW's second decay rate.
      adam_eps: AdamW's epsilon.
      update_proj_gap: steps between refreshes; see `gale`, as all that follow.
      scale: factor of the projected update.
      side: which side of a matrix is projected.
      range_finder: how a gradient becomes a projector.
      moments: what a refresh does to the moments.
      residual: what becomes of the gradient outside the subspace.
      refresh_schedule: how refreshes are spread over the gap.
      select: which leaves are projected.
      weight_dimension_numbers: which axes make a weight's rows and columns.
      state_dtype: dtype in which the optimizer runs, or ``"int8"``: moments in 8 bits.
      projector_dtype: dtype in which projectors are stored, also ``"int8"`` or ``"int4"``.
      seed: seed of every random number.
      axis_name: mapped axes along which gradients differ, and over which they are averaged.

    Returns:
      The transformation; see `gale` for the ``refresh`` argument of its `update`.

    Raises:
      TypeError: if an option has the wrong type.
      ValueError: if an option is out of range.

    Example:
      >>> import jax.numpy as jnp, optax, optax_gale
      >>> params = {"kernel": jnp.ones((256, 64)), "bias": jnp.zeros(64)}
      >>> tx = optax_gale.gale_muon(2e-2, rank=8)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> updates["kernel"].shape
      (256, 64)

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024; Ahn et al., `Dion
      <https://arxiv.org/abs/2504.05295>`_, 2025.
    """
    options = Options.of(locals())
    decay = optax.add_decayed_weights(weight_decay, mask)
    inner = optax.chain(
        scale_by_orthogonalized_momentum(
            beta, nesterov=nesterov, ns_steps=ns_steps, mu_dtype=mu_dtype
        ),
        decay,
        optax.scale_by_learning_rate(learning_rate),
    )
    full_rank = optax.chain(
        optax.scale_by_adam(adam_b1, adam_b2, adam_eps, mu_dtype=mu_dtype),
        decay,
        optax.scale_by_learning_rate(
            learning_rate if adam_learning_rate is None else adam_learning_rate
        ),
    )
    return wrap(inner, dataclasses.replace(options, shape_scale=_muon_scale), full_rank)


def _muon_scale(view: MatrixView) -> float:
    """Muon's factor for a matrix that maps m inputs to n outputs."""
    return math.sqrt(max(1.0, view.n / view.m))


def gale_adafactor(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    decay_rate: float = 0.8,
    min_dim_size_to_factor: int = 128,
    clipping_threshold: float | None = 1.0,
    momentum: float | None = None,
    eps: float = 1e-30,
    weight_decay: float = 0.0,
    mask: Any = None,
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
    r"""Adafactor in low-rank subspaces: factored second moments of the projected gradient.

    Without the parameter scale, which needs the whole weight's root mean square and which GaLore
    leaves out too.

    Args:
      learning_rate: step size, a number or a schedule.
      rank: rank of the subspaces; see `gale`.
      decay_rate: exponent of the second moment's decay schedule.
      min_dim_size_to_factor: second moments are factored if both sides have this size.
      clipping_threshold: root mean square at which a leaf's update is clipped.
      momentum: decay rate of a first moment; None for no first moment.
      eps: added to the squared gradient.
      weight_decay: decoupled decay of the whole weight, multiplied by the learning rate.
      mask: which leaves decay, as in ``optax.adamw``.
      update_proj_gap: steps between refreshes; see `gale`, as all that follow.
      scale: factor of the projected update.
      side: which side of a matrix is projected.
      range_finder: how a gradient becomes a projector.
      moments: what a refresh does to the moments.
      residual: what becomes of the gradient outside the subspace.
      refresh_schedule: how refreshes are spread over the gap.
      select: which leaves are projected.
      weight_dimension_numbers: which axes make a weight's rows and columns.
      state_dtype: dtype in which the optimizer runs, or ``"int8"``: moments in 8 bits.
      projector_dtype: dtype in which projectors are stored, also ``"int8"`` or ``"int4"``.
      seed: seed of every random number.
      axis_name: mapped axes along which gradients differ, and over which they are averaged.

    Returns:
      The transformation; see `gale` for the ``refresh`` argument of its `update`.

    Raises:
      TypeError: if an option has the wrong type.
      ValueError: if an option is out of range.

    Example:
      >>> import jax.numpy as jnp, optax, optax_gale
      >>> params = {"kernel": jnp.ones((256, 64)), "bias": jnp.zeros(64)}
      >>> tx = optax_gale.gale_adafactor(1e-2, rank=8)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> updates["kernel"].shape
      (256, 64)

    References:
      Shazeer, Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018.
      Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024.
    """
    options = Options.of(locals())
    if isinstance(min_dim_size_to_factor, jax.core.Tracer):
        raise TypeError(
            "`min_dim_size_to_factor` sets the shapes of the optimizer's state, so it must be a "
            "Python int. Under `optax.inject_hyperparams`, pass "
            "static_args=('min_dim_size_to_factor',)."
        )
    min_dim_size_to_factor = int(min_dim_size_to_factor)
    stages = [
        optax.adafactor(
            learning_rate=None,
            min_dim_size_to_factor=min_dim_size_to_factor,
            decay_rate=decay_rate,
            multiply_by_parameter_scale=False,
            clipping_threshold=clipping_threshold,
            momentum=momentum,
            eps=eps,
        ),
        optax.scale(-1.0),  # Adafactor's update already descends.
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    ]
    return wrap(optax.chain(*stages), options)


def gale_lion(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    mu_dtype: Any = None,
    weight_decay: jax.typing.ArrayLike = 1e-3,
    mask: Any = None,
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
    r"""Lion with its momentum in low-rank subspaces.

    ``gale(optax.lion(learning_rate, ...), rank, ...)``.

    Args:
      learning_rate: step size, a number or a schedule.
      rank: rank of the subspaces; see `gale`.
      b1: weight of the momentum in the update's sign.
      b2: decay rate of the momentum.
      mu_dtype: dtype of the momentum; None for the parameters'.
      weight_decay: decoupled decay of the whole weight, multiplied by the learning rate.
      mask: which leaves decay, as in ``optax.lion``.
      update_proj_gap: steps between refreshes; see `gale`, as all that follow.
      scale: factor of the projected update.
      side: which side of a matrix is projected.
      range_finder: how a gradient becomes a projector.
      moments: what a refresh does to the moments.
      residual: what becomes of the gradient outside the subspace.
      refresh_schedule: how refreshes are spread over the gap.
      select: which leaves are projected.
      weight_dimension_numbers: which axes make a weight's rows and columns.
      state_dtype: dtype in which the optimizer runs, or ``"int8"``: moments in 8 bits.
      projector_dtype: dtype in which projectors are stored, also ``"int8"`` or ``"int4"``.
      seed: seed of every random number.
      axis_name: mapped axes along which gradients differ, and over which they are averaged.

    Returns:
      The transformation; see `gale` for the ``refresh`` argument of its `update`.

    Raises:
      TypeError: if an option has the wrong type.
      ValueError: if an option is out of range.

    Example:
      >>> import jax.numpy as jnp, optax, optax_gale
      >>> params = {"kernel": jnp.ones((256, 64)), "bias": jnp.zeros(64)}
      >>> tx = optax_gale.gale_lion(1e-3, rank=8)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> updates["kernel"].shape
      (256, 64)

    References:
      Chen et al., `Symbolic Discovery of Optimization Algorithms
      <https://arxiv.org/abs/2302.06675>`_, 2023. Zhao et al., `GaLore
      <https://arxiv.org/abs/2403.03507>`_, 2024.
    """
    options = Options.of(locals())
    inner = optax.lion(
        learning_rate, b1=b1, b2=b2, mu_dtype=mu_dtype, weight_decay=weight_decay, mask=mask
    )
    return wrap(inner, options)


def gale_sgd(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    momentum: jax.typing.ArrayLike | None = 0.9,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Any = None,
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
    r"""SGD with its momentum in low-rank subspaces.

    ``T <- momentum * T + R``, and the update is ``-learning_rate * P T``.

    Args:
      learning_rate: step size, a number or a schedule.
      rank: rank of the subspaces; see `gale`.
      momentum: decay rate of the momentum; None for no momentum.
      nesterov: whether to use Nesterov momentum.
      accumulator_dtype: dtype of the momentum; None for the parameters'.
      weight_decay: decoupled decay of the whole weight, multiplied by the learning rate.
      mask: which leaves decay, as in ``optax.adamw``.
      update_proj_gap: steps between refreshes; see `gale`, as all that follow.
      scale: factor of the projected update.
      side: which side of a matrix is projected.
      range_finder: how a gradient becomes a projector.
      moments: what a refresh does to the moments.
      residual: what becomes of the gradient outside the subspace.
      refresh_schedule: how refreshes are spread over the gap.
      select: which leaves are projected.
      weight_dimension_numbers: which axes make a weight's rows and columns.
      state_dtype: dtype in which the optimizer runs, or ``"int8"``: moments in 8 bits.
      projector_dtype: dtype in which projectors are stored, also ``"int8"`` or ``"int4"``.
      seed: seed of every random number.
      axis_name: mapped axes along which gradients differ, and over which they are averaged.

    Returns:
      The transformation; see `gale` for the ``refresh`` argument of its `update`.

    Raises:
      TypeError: if an option has the wrong type.
      ValueError: if an option is out of range.

    Example:
      >>> import jax.numpy as jnp, optax, optax_gale
      >>> params = {"kernel": jnp.ones((256, 64)), "bias": jnp.zeros(64)}
      >>> tx = optax_gale.gale_sgd(1e-2, rank=8)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> updates["kernel"].shape
      (256, 64)

    References:
      Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection
      <https://arxiv.org/abs/2403.03507>`_, 2024.
    """
    options = Options.of(locals())
    inner = optax.chain(
        optax.identity()
        if momentum is None
        else optax.trace(momentum, nesterov=nesterov, accumulator_dtype=accumulator_dtype),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    return wrap(inner, options)
