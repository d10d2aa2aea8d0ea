"""A step that applies its update itself, in kernels where they pay."""

import functools
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_gale import pallas
from optax_gale.pallas import Implementation
from optax_gale.transforms import fusion, storage, subspace, trees
from optax_gale.transforms.step import Step


class InPlaceStep(Step):
    """As `Step`, and then `apply` in place of `lift`.

    Gradients are projected, stepped in the subspace, and added to the weights by two kernels, for
    all leaves at once. Where the kernels are not XLA's, nothing of a weight's size
    is made but the weight's new value.
    """

    def __init__(self, implementation: Implementation | None, *args):
        super().__init__(*args)
        self.implementation = implementation

    def run_inner(self, projected: Any = None) -> None:
        """Runs the inner; where it is elementwise, in the kernel that projects the gradient."""
        served = self._served() if projected is None else None
        analysed = self._analysed(served) if served else None
        if not served or analysed is None:
            return super().run_inner(projected)
        analysis, decays = analysed
        state = jax.tree.leaves(self.inner_state)

        def kind(i: int) -> Hashable:
            program = analysis.programs[i]
            dtypes = (str(state[k].dtype) for k in program.moments)
            return (
                *(served[i], self._dtypes(i), self._update_dtype(i)),
                *(program.function, program.scalar_dtypes, *dtypes),
            )

        groups = _grouped([i for i in served if i in analysis.programs], kind)
        in_kernels = [i for group in groups for i in group]
        rest = analysis.evaluate(
            {
                i: trees.unbox(self._project_leaf(i))
                for i in range(len(self.leaves))
                if i not in in_kernels
            },
            state,
            in_kernels,
        )
        for group in groups:
            self._run_group(group, served[group[0]], analysis, rest)
        self.inner_updates = self.treedef.unflatten(
            [trees.rebox(x.box, u) for x, u in zip(self.leaves, rest.updates, strict=True)]
        )
        self.inner_state = jax.tree.unflatten(jax.tree.structure(self.inner_state), rest.state)
        values = iter(rest.others)
        self.decays = [next(values) if is_one else None for is_one in decays]
        return None

    def _served(self) -> dict[int, Implementation]:
        """The leaves whose projection a kernel serves, and which kernel."""
        # Either needs R before the inner runs.
        if self.options.residual is not None or self.options.axis_name is not None:
            return {}
        where = [i for i, projected in enumerate(self.projected) if projected]
        chosen = pallas.choose_project_update(
            [self.matrices[i].g for i in where],
            [self.projectors[i] for i in where],
            rows=[self.matrices[i].projection.rows for i in where],
            implementation=self.implementation,
        )
        return {i: name for i, name in zip(where, chosen, strict=True) if name != "xla"}

    def _dtypes(self, i: int) -> Hashable:
        """What leaves must have in common to be served together."""
        arrays = (self.matrices[i].g, self.projectors[i], self.weights[i])
        return tuple(str(x.dtype) for x in arrays)

    def _update_dtype(self, i: int) -> Any:
        """In which dtype the inner's update stands in memory between the kernels."""
        dtype = self.weights[i].dtype
        if dtype.itemsize < 4:
            return dtype
        return subspace.subspace_dtype(self.options, self.leaves[i], self.weights[i])

    def _analysed(self, served) -> tuple[fusion.Analysis, list[bool]] | None:
        """The inner's programs, and which leaves decay; None if there are none to be run."""
        shapes = jax.eval_shape(self.project)
        decays: list[bool] = []
        same: list[bool] = []

        def inner(leaves, state):
            gradients = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
            params = self._inner_params(self.treedef.flatten_up_to(gradients))
            state = jax.tree.unflatten(jax.tree.structure(self.inner_state), state)
            updates, new, found = self._run(gradients, state, params)
            decays[:] = [d is not None for d in found]
            same.append(_form(new) == _form(self.inner_state))
            return (
                jax.tree.leaves(updates),
                jax.tree.leaves(new),
                [d for d in found if d is not None],
            )

        leaves, state = jax.tree.leaves(shapes), jax.tree.leaves(self.inner_state)
        analysis = fusion.Analysis(inner, leaves, state, served)
        return (analysis, decays) if analysis.programs and all(same) else None

    def _run_group(self, group, implementation, analysis, rest) -> None:
        """Runs the kernel on a group of leaves, and puts its results among the rest."""
        programs = [analysis.programs[i] for i in group]
        state = jax.tree.leaves(self.inner_state)
        kernel = functools.partial(
            pallas.project_update,
            [self.matrices[i].g for i in group],
            [self.projectors[i] for i in group],
            [[state[k] for k in program.moments] for program in programs],
            [rest.scalars[i] for i in group],
            programs[0].function,
            rows=[self.matrices[i].projection.rows for i in group],
            update_dtype=self._update_dtype(group[0]),
        )
        try:
            updates, moments = kernel(implementation=implementation)
        except pallas.UnsupportedError:  # something in the inner's step
            if self.implementation is not None:
                raise
            updates, moments = kernel(implementation="xla")
        for i, program, u, new in zip(group, programs, updates, moments, strict=True):
            rest.updates[i] = u
            for k, moment in zip(program.moments, new, strict=True):
                rest.state[k] = moment

    def apply(self) -> optax.Params:
        """The parameters after the step."""
        if self.options.residual is not None:
            return self._apply_changes()
        updates = [trees.unbox(u) for u in self.treedef.flatten_up_to(self.inner_updates)]
        self.residual = self.treedef.flatten_up_to(self.state.residual)
        new = [
            w if projected else optax.apply_updates(w, u)
            for w, u, projected in zip(self.weights, updates, self.projected, strict=True)
        ]
        where = [i for i, projected in enumerate(self.projected) if projected]
        scales = self._scales()
        numbers = _arrays({i: (scales[i], _sum_dtype(self.weights[i])) for i in where})
        for group in _grouped(where, lambda i: (self._dtypes(i), str(updates[i].dtype))):
            views = [self.matrices[i].projection.view for i in group]
            applied = pallas.back_project_apply(
                [view.to_matrix(self.weights[i]) for view, i in zip(views, group, strict=True)],
                [self.projectors[i] for i in group],
                [updates[i] for i in group],
                [numbers[i] for i in group],
                [self.decays[i] for i in group],
                rows=[self.matrices[i].projection.rows for i in group],
                implementation=self.implementation,
            )
            for i, view, w in zip(group, views, applied, strict=True):
                new[i] = view.from_matrix(w)
        return self._like_params(new)

    def _apply_changes(self) -> optax.Params:
        """With a residual the change of a weight is full-size anyhow; XLA fuses what follows."""
        return self._like_params(
            [
                optax.apply_updates(w, change)
                for w, change in zip(self.weights, self._changes(), strict=True)
            ]
        )

    def _like_params(self, values: Sequence[jax.Array]) -> optax.Params:
        return self.treedef.unflatten(
            [storage.boxed_as(old, w) for old, w in zip(self.boxed_weights, values, strict=True)]
        )


def _arrays(numbers: Mapping[int, tuple[Any, Any]]) -> dict[int, jax.Array]:
    """Makes arrays of numbers and dtypes, the same of equal ones: kernels pass those once."""
    made: dict[Hashable, jax.Array] = {}
    out = {}
    for i, (number, dtype) in numbers.items():
        key = (number if isinstance(number, (int, float)) else id(number), dtype)
        if key not in made:
            made[key] = jnp.asarray(number, dtype)
        out[i] = made[key]
    return out


def _sum_dtype(weight: jax.Array) -> Any:
    return jnp.promote_types(weight.dtype, jnp.float32)


def _form(state: Any) -> Any:
    """What a state must keep for its arrays to be replaced one by one."""
    leaves, treedef = jax.tree.flatten(state)
    return treedef, [(jnp.shape(x), jnp.result_type(x)) for x in leaves]


def _grouped(items: Sequence[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i in items:
        groups[key(i)].append(i)
    return list(groups.values())
