"""One step of the wrapper, and the state that it carries."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_gale import pallas
from optax_gale._averages import averaged_as
from optax_gale._products import operand, operand_dtype
from optax_gale.transforms import inner as inner_lib
from optax_gale.transforms import projectors as projectors_lib
from optax_gale.transforms import residual as residual_lib
from optax_gale.transforms import storage, subspace, trees
from optax_gale.transforms.apply import check_state


class GaleState(NamedTuple):
    """State of `gale`.

    Attributes:
      count: steps taken, int32 ``()``.
      projector: a tree like the parameters, with ``(*batch, d, r)`` arrays at projected leaves,
        quantised (`optax_gale.quantization.Quantized`) if ``projector_dtype`` says so, and
        ``optax.MaskedNode`` at the others.
      inner_state: the inner's state, made for the parameters with projected leaves replaced by
        their subspaces, ``(*batch, r, n)`` or ``(*batch, m, r)``.
      residual: a tree like ``projector`` with the residual's ``(*batch,)`` float32 memory, or
        ``optax.MaskedNode`` where there is none.
    """

    count: jax.Array  # type: ignore[assignment]
    projector: Any
    inner_state: Any
    residual: Any


class Step:
    """One update: the projectors are refreshed, the inner runs, its update is lifted or applied.

    The methods are called in that order, and then `new_state`.
    """

    def __init__(self, inner, full_rank, options, updates, state, params, extra_args):
        check_state(state, GaleState)
        self.options, self.state, self.extra_args = options, state, extra_args
        self.updates = updates
        self.leaves, self.treedef = trees.flatten(updates)
        like_updates = lambda name, tree: trees.flatten_like(self.treedef, name, tree, "gradients")
        self.boxed_projectors = like_updates("state.projector", state.projector)
        self.stored_projectors = [storage.unboxed(p) for p in self.boxed_projectors]
        self.matrices: list[Any] = subspace.matrices(
            options, updates, self.leaves, self.stored_projectors
        )
        self.projected = [matrix is not None for matrix in self.matrices]
        self.projectors = self._read_projectors()
        self.has_params = params is not None
        self.boxed_weights = (
            [None] * len(self.leaves) if params is None else like_updates("params", params)
        )
        self.weights: list[Any] = [trees.unbox(w) for w in self.boxed_weights]
        for leaf, weight in zip(self.leaves, self.weights, strict=True):
            if weight is not None and jnp.shape(weight) != leaf.value.shape:
                raise ValueError(
                    f"The gradient of '{leaf.path}' has shape {leaf.value.shape}, but the "
                    f"parameter has shape {jnp.shape(weight)}."
                )
        self.inner = projectors_lib.inner_of(inner, full_rank, self.treedef, self.projected)
        self.inner_state = state.inner_state

    def _read_projectors(self) -> list[Any]:
        """The projectors as both passes over a matrix use them.

        A quantised one is read once, in half precision where the gradient is: the same numbers
        project and back-project.
        """
        out = []
        for stored, matrix in zip(self.stored_projectors, self.matrices, strict=True):
            if storage.is_quantized(stored):
                stored = storage.value(stored, operand_dtype(matrix.g.dtype))
            out.append(stored)
        return out

    def _inner_params(self, of_projected):
        """The parameters as the inner sees them; the values of projected leaves do not matter."""
        if not self.has_params:
            return None
        return self.treedef.unflatten(
            [
                stand_in
                if projected
                else trees.rebox(leaf.box, subspace.as_inner_param(self.options, w))
                for leaf, stand_in, w, projected in zip(
                    self.leaves, of_projected, self.weights, self.projected, strict=True
                )
            ]
        )

    def refresh_projectors(self, asked: bool | None, allowed: jax.Array | None = None) -> None:
        """Refreshes what is due, or what the caller asks for; with ``allowed`` False, nothing."""
        chosen = [None if matrix is None else matrix.projection for matrix in self.matrices]

        def advance(inner_state):
            still = jax.tree.map(jnp.zeros_like, self._seen())
            params = self._inner_params(self.treedef.flatten_up_to(still))
            return self.inner.update(still, inner_state, params, **self.extra_args)[1]

        moments = projectors_lib.InnerMoments(
            self.options.moments,
            self.state.inner_state,
            trees.key_paths(self.updates),
            chosen,
            advance,
            self.state.count,
        )
        self.stored_projectors, self.inner_state = projectors_lib.refreshed(
            self.options,
            projectors_lib.plan(self.options, self.updates, self.leaves, chosen),
            self.matrices,
            self.stored_projectors,
            moments,
            self.state.count,
            asked,
            allowed,
        )
        self.projectors = self._read_projectors()

    def project(self) -> Any:
        """What the inner is to see of the gradients."""
        return self.treedef.unflatten([self._project_leaf(i) for i in range(len(self.leaves))])

    def _seen(self) -> Any:
        """What the inner sees: projections, averaged over mapped axes."""
        return averaged_as(self.project(), self.updates, self.options.axis_name)

    def _project_leaf(self, i: int) -> Any:
        """What the inner sees of a gradient."""
        leaf, matrix, weight = self.leaves[i], self.matrices[i], self.weights[i]
        return subspace.project(self.options, leaf, matrix, self.projectors[i], weight)

    def run_inner(self, projected: Any = None) -> None:
        """Runs the inner on the gradients' projections, or on what was made of them before."""
        self.gradients = self._seen() if projected is None else projected
        params = self._inner_params(self.treedef.flatten_up_to(self.gradients))
        self.inner_updates, self.inner_state, self.decays = self._run(
            self.gradients, self.inner_state, params
        )

    def _run(self, gradients, inner_state, params):
        """The inner's update, its new state, and every leaf's decay."""
        if params is None:
            updates, new = self.inner.update(gradients, inner_state, None, **self.extra_args)
            return updates, new, [None] * len(self.leaves)
        return inner_lib.decayed_update(
            self.inner, gradients, inner_state, params, self.projected, self.extra_args
        )

    def lift(self) -> optax.Updates:
        """The updates of the parameters."""
        out = []
        for i, (leaf, change) in enumerate(zip(self.leaves, self._changes(), strict=True)):
            weight = self.weights[i]
            dtype = leaf.value.dtype if weight is None else weight.dtype
            out.append(trees.rebox(leaf.box, change.astype(dtype)))
        return self.treedef.unflatten(out)

    def _changes(self) -> list[Any]:
        """What every weight changes by."""
        scales = self._scales()
        updates = [trees.unbox(u) for u in self.treedef.flatten_up_to(self.inner_updates)]
        terms = self._residuals(updates)
        out = []
        for i, (leaf, u) in enumerate(zip(self.leaves, updates, strict=True)):
            matrix, weight = self.matrices[i], self.weights[i]
            if matrix is not None:
                dtype = leaf.value.dtype if weight is None else weight.dtype
                rows = matrix.projection.rows
                step = pallas.back_project(self.projectors[i], u, rows=rows, dtype=dtype)
                if terms[i] is not None:
                    step = step + terms[i]
                u = matrix.projection.view.from_matrix(step * scales[i])
                if weight is not None:
                    u = u + self.decays[i] * weight.astype(u.dtype)
            out.append(u)
        return out

    def _scales(self) -> list[Any]:
        scales = trees.per_leaf("scale", self.options.scale, self.updates, self.leaves)
        if self.options.shape_scale is None:
            return scales
        return [
            scale if m is None else scale * self.options.shape_scale(m.projection.view)
            for scale, m in zip(scales, self.matrices, strict=True)
        ]

    def _residuals(self, updates: Sequence[Any]) -> list[Any]:
        """What is added to every lifted update, or None."""
        self.residual = self.treedef.flatten_up_to(self.state.residual)
        terms: list[Any] = [None] * len(self.leaves)
        if self.options.residual is None or not any(self.projected):
            return terms
        gradients = [trees.unbox(r) for r in self.treedef.flatten_up_to(self.gradients)]
        direction = inner_lib.direction(self.inner, self.gradients, self.projected)
        for i, matrix in enumerate(self.matrices):
            if matrix is None:
                continue
            memory = self.residual[i]
            terms[i], ratio = residual_lib.fira(
                matrix.g,
                operand(self.projectors[i], matrix.g.dtype),
                gradients[i],
                updates[i],
                trees.unbox(memory),
                rows=matrix.projection.rows,
                direction=direction,
            )
            self.residual[i] = storage.boxed_as(memory, ratio)
        return terms

    def refreshed_state(self) -> GaleState:
        """The state after the refresh, before the step."""
        return self.state._replace(
            projector=self.treedef.unflatten(
                [
                    storage.boxed_as(old, p)
                    for old, p in zip(self.boxed_projectors, self.stored_projectors, strict=True)
                ]
            ),
            inner_state=self.inner_state,
        )

    def new_state(self) -> GaleState:
        """The state after the step."""
        return self.refreshed_state()._replace(
            count=optax.safe_increment(self.state.count),
            residual=self.treedef.unflatten(self.residual),
        )
