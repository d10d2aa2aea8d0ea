"""The wrapper: any Optax transformation, run in low-rank subspaces."""

from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_gale._averages import AxisName
from optax_gale.pallas import Implementation
from optax_gale.transforms import inner as inner_lib
from optax_gale.transforms import moments as moments_lib
from optax_gale.transforms import projectors as projectors_lib
from optax_gale.transforms import selection, subspace, trees
from optax_gale.transforms.apply import Halves, check_transformation, extended
from optax_gale.transforms.in_place import InPlaceStep
from optax_gale.transforms.moments import Moments, Rotate
from optax_gale.transforms.options import Options, check_scale
from optax_gale.transforms.quantize import quantize_states
from optax_gale.transforms.range_finders import RangeFinder, RangeFinderName
from optax_gale.transforms.refresh import RefreshSchedule
from optax_gale.transforms.residual import Residual
from optax_gale.transforms.selection import Select, Side
from optax_gale.transforms.step import GaleState, Step


def wrap(
    inner: optax.GradientTransformation,
    options: Options,
    full_rank: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds the transformation that `gale` documents."""
    check_transformation("inner", inner)
    if full_rank is not None:
        check_transformation("full_rank", full_rank)
    if options.quantizes_states:
        told = options.moments.fields if isinstance(options.moments, Rotate) else None
        inner = quantize_states(inner, fields=told)
        full_rank = None if full_rank is None else quantize_states(full_rank, fields=told)

    def choose(params: optax.Params, leaves: Sequence[trees.Leaf]) -> list[selection.Choice]:
        return selection.choose(
            params,
            leaves,
            rank=options.rank,
            side=options.side,
            select=options.select,
            weight_dimension_numbers=options.weight_dimension_numbers,
        )

    def init(params: optax.Params) -> GaleState:
        leaves, treedef = trees.flatten(params)
        choices = choose(params, leaves)
        selection.record(choices)
        chosen = [choice.projection for choice in choices]
        projected = [p is not None for p in chosen]
        projectors_lib.plan(options, params, leaves, chosen)  # raises on a bad gap
        scales = trees.per_leaf("scale", options.scale, params, leaves)
        for leaf, scale, projection in zip(leaves, scales, chosen, strict=True):
            if projection is not None:
                check_scale(scale, f" of '{leaf.path}'")
                subspace.check_sharding(leaf, projection)
        proxies = treedef.unflatten(
            [subspace.proxy(options, leaf, p) for leaf, p in zip(leaves, chosen, strict=True)]
        )
        run = projectors_lib.inner_of(inner, full_rank, treedef, projected)
        inner_state = run.init(proxies)
        inner_lib.examine(run, inner_state, proxies, projected)
        found = moments_lib.find(inner_state, trees.key_paths(params), chosen, options.moments)
        if options.moments != "reset" and any(moment.kind == "second" for moment in found):
            once, doubled = (inner_lib.probe(run, proxies, projected, size) for size in (1.0, 2.0))
            if once is not None:
                moments_lib.check_powers(options.moments, found, once, doubled)
        return GaleState(
            count=jnp.zeros((), jnp.int32),
            projector=treedef.unflatten(
                [
                    optax.MaskedNode() if p is None else subspace.first_projector(options, leaf, p)
                    for leaf, p in zip(leaves, chosen, strict=True)
                ]
            ),
            inner_state=inner_state,
            residual=treedef.unflatten(
                [
                    optax.MaskedNode()
                    if p is None or options.residual is None
                    else subspace.first_residual(leaf, p)
                    for leaf, p in zip(leaves, chosen, strict=True)
                ]
            ),
        )

    def update(
        updates: optax.Updates,
        state: GaleState,
        params: optax.Params | None = None,
        *,
        refresh: bool | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GaleState]:
        step = Step(inner, full_rank, options, updates, state, params, extra_args)
        step.refresh_projectors(_checked_refresh(refresh))
        step.run_inner()
        return step.lift(), step.new_state()

    def in_place(
        updates: optax.Updates,
        state: GaleState,
        params: optax.Params,
        implementation: Implementation | None,
        *,
        refresh: bool | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Params, GaleState]:
        step = InPlaceStep(
            implementation, inner, full_rank, options, updates, state, params, extra_args
        )
        step.refresh_projectors(_checked_refresh(refresh))
        step.run_inner()
        return step.apply(), step.new_state()

    def refreshed(
        updates: optax.Updates,
        state: GaleState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> GaleState:
        step = Step(inner, full_rank, options, updates, state, params, extra_args)
        step.refresh_projectors(True)
        return step.refreshed_state()

    def zeros(params: optax.Params) -> Any:
        leaves, treedef = trees.flatten(params)
        proxies = [
            subspace.proxy(options, leaf, choice.projection)
            for leaf, choice in zip(leaves, choose(params, leaves), strict=True)
        ]
        return jax.tree.map(jnp.zeros_like, treedef.unflatten(proxies))

    def project(
        updates: optax.Updates,
        state: GaleState,
        params: optax.Params | None,
        *,
        first: jax.Array | None = None,
        refresh: bool | None = None,
        **extra_args: Any,
    ) -> tuple[Any, GaleState]:
        _refuse_residual(options)
        step = Step(inner, full_rank, options, updates, state, params, extra_args)
        step.refresh_projectors(_checked_refresh(refresh), first)
        return step.project(), step.refreshed_state()

    def update_projected(
        projected: Any,
        state: GaleState,
        params: optax.Params | None,
        *,
        like: Any,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GaleState]:
        step = Step(inner, full_rank, options, like, state, params, extra_args)
        step.run_inner(projected)
        return step.lift(), step.new_state()

    def apply_projected(
        projected: Any,
        state: GaleState,
        params: optax.Params,
        implementation: Implementation | None,
        **extra_args: Any,
    ) -> tuple[optax.Params, GaleState]:
        # The weights stand for the gradients, of which nothing but the shapes is asked.
        step = InPlaceStep(
            implementation, inner, full_rank, options, params, state, params, extra_args
        )
        step.run_inner(projected)
        return step.apply(), step.new_state()

    return extended(
        optax.GradientTransformationExtraArgs(init, cast(Any, update)),
        in_place=in_place,
        halves=Halves(
            *(zeros, project, update_projected, apply_projected),
            axis_name=options.axis_name,
        ),
        refreshed=refreshed,
    )


def _refuse_residual(options: Options) -> None:
    if options.residual is not None:
        raise ValueError(
            f"residual={options.residual!r} needs the gradient itself where the step is taken, but "
            "of gradients that are summed or held in the subspace only that is left. Use "
            "residual=None, or sum the gradients themselves (optax.MultiSteps)."
        )


def _checked_refresh(refresh: Any) -> bool | None:
    if isinstance(refresh, np.bool_):
        return bool(refresh)
    if refresh is not None and not isinstance(refresh, bool):
        raise TypeError(
            "`refresh` must be True, False or None, and static under jit (two executables, no "
            f"conditional), got {refresh!r}. Use jax.jit(..., static_argnames='refresh'), or "
            "leave it out to let the device decide."
        )
    return refresh


def gale(
    inner: optax.GradientTransformation,
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
    full_rank: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs an Optax transformation in low-rank subspaces of the weight matrices.

    For a weight W ``(m, n)`` with gradient G, rows projected::

        every update_proj_gap steps:  P <- orthonormal basis of the range of G   (m, r)
        R  <- P^T G                                                              (r, n)
        U  <- inner.update(R)
        dW <- scale * (P U + residual) - lr * weight_decay * W

    The inner's state is made for R, so its moments have ``r n`` numbers instead of ``m n``. All of
    W is trained: the subspace changes at every refresh. Decoupled weight decay inside ``inner``
    (``optax.adamw``) acts on the whole weight and is not scaled. Leaves that are not projected go
    through the same inner at full rank.

    Args:
      inner: any transformation whose update depends on the parameters through decoupled weight
        decay at most: ``adamw``, ``lion``, ``scale_by_adam``, chains of them, ...
      rank: r, at least 1; a callable of (path, leaf), or a prefix tree of the parameters with one
        rank a leaf (None: full rank).
      update_proj_gap: steps between refreshes, at least 1; per leaf as ``rank``.
      scale: GaLore's alpha; per leaf as ``rank``.
      side: ``"short"``, the default, projects the shorter side of a matrix: moments of
        ``2 r max(m, n)`` and a projector of ``r min(m, n)`` numbers (GaLore's ``std``). ``"long"``
        projects the longer one: ``2 r min(m, n)`` and ``r max(m, n)`` (``optax.contrib.galore``).
      range_finder: ``"gale"`` (a sketch; see `Sketch`), ``"gale_approx"`` (the sketch reads a
        quarter of G), ``"warm"`` (subspace iteration from the old P), ``"svd"`` (GaLore),
        ``"random"`` (data-free, APOLLO and Flora), a `Sketch`, or a callable (`RangeFinder`).
      moments: what a refresh does to the inner's moments: ``"keep"``, ``"rotate"`` into the new
        basis (see `Rotate`), or ``"reset"`` to zero.
      residual: None, or ``"fira"``: the part of G outside the subspace, scaled like the part
        inside, is added to the update.
      refresh_schedule: ``"together"``, or ``"staggered"``: after the first step the matrices take
        turns over the gap, so that no step refreshes everything.
      select: which leaves are projected: None (matrices, but no embeddings, heads, norms, biases),
        a regular expression on the path, a callable of (path, leaf), or a prefix tree of booleans.
      weight_dimension_numbers: which axes make a weight's rows and columns; the others count
        matrices. One `GaleDimensionNumbers` (or Muon's, or GaLore's), a prefix tree of them (None:
        full rank), or a callable from the parameters to one. Default: the last two axes.
      state_dtype: dtype in which the inner runs; None for the parameters'. float32 is advisable
        when they are bfloat16: Adam's second moment stalls in 8 bits of mantissa. ``"int8"``: the
        inner runs in float32 and its moments are kept in 8 bits, as `quantize_states` does.
      projector_dtype: dtype in which P is stored, a floating type, ``"int8"``, or ``"int4"`` (two
        numbers a byte), in blocks of 128 along a row, each with a float32 scale; float32 for rank
        1, which would not shrink. P is computed in float32; what is stored is what projects,
        back-projects, and turns the moments.
      seed: from which, with the leaf's path and the step, every random number derives.
      axis_name: mapped axes (of `jax.shard_map`) along which gradients differ: those of a device's
        own part of the batch. They are projected where they are, and the projections are averaged;
        at a refresh also the products of the sketch (``"svd"`` and callables get the average of
        the gradient itself). Leaves that are not projected are averaged as usual.
      full_rank: a transformation for the leaves that are not projected; None for ``inner``.

    Returns:
      A transformation whose `update` also takes ``refresh``: None (default) refreshes when due, in
      one `jax.lax.switch` for the whole tree; True or False, static, does or does not, without a
      conditional: the host then counts the steps.

    Raises:
      TypeError: if an option has the wrong type.
      ValueError: if an option is out of range; from `init`, if the inner cannot run in a subspace,
        or dimension numbers do not fit a leaf.

    Example:
      >>> import jax.numpy as jnp, optax, optax_gale
      >>> params = {"kernel": jnp.ones((256, 64)), "bias": jnp.zeros(64)}
      >>> tx = optax_gale.gale(optax.adamw(1e-2), rank=8)
      >>> state = tx.init(params)
      >>> state.projector["kernel"].shape
      (64, 8)
      >>> state.inner_state[0].mu["kernel"].shape
      (256, 8)
      >>> updates, state = tx.update(params, state, params)
      >>> params = optax.apply_updates(params, updates)

    References:
      Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection
      <https://arxiv.org/abs/2403.03507>`_, 2024, Algorithm 2.
    """
    arguments = locals()
    return wrap(inner, Options.of(arguments), full_rank)
