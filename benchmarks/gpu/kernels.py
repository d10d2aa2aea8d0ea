"""The problems that the kernels of `optax_gale.pallas` are measured on."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.gpu import data
from benchmarks.gpu.floors import Work, nbytes
from benchmarks.gpu.shapes import Case, Group, counts, groups
from benchmarks.gpu.timing import Step
from examples.flax_llama.sizes import get_size
from optax_gale import pallas
from optax_gale.pallas import Elementwise, Implementation, cholesky_and_inverse
from optax_gale.pallas.cholesky_and_inverse import LARGEST
from optax_gale.pallas.cholesky_and_inverse import problem as factorisation_of
from optax_gale.pallas.dispatch import Problem
from optax_gale.transforms.fusion import Analysis
from optax_gale.transforms.selection import Side, project_rows


class Shape(NamedTuple):
    """A group of leaves, the projection of its matrices, and the step of a kernel on them."""

    group: Group
    rank: int
    rows: bool

    @property
    def matrix(self) -> tuple[int, ...]:
        """Of a stack of matrices; a leaf without a batch axis is a matrix."""
        batch = () if self.group.batch == 1 else (self.group.batch,)
        return (*batch, self.group.m, self.group.n)

    @property
    def projector(self) -> tuple[int, ...]:
        """Of a stack of projectors."""
        return (*self.matrix[:-2], self.group.m if self.rows else self.group.n, self.rank)

    @property
    def subspace(self) -> tuple[int, ...]:
        """Of a stack of projected gradients."""
        sides = (self.rank, self.group.n) if self.rows else (self.group.m, self.rank)
        return (*self.matrix[:-2], *sides)

    @property
    def flops(self) -> int:
        """Of one product with the projectors."""
        count = self.group.leaves * self.group.batch
        return 2 * count * self.group.m * self.group.n * self.rank


class Task(NamedTuple):
    """A kernel on a problem.

    Attributes:
      problem: as the dispatch sees it.
      work: what it must do.
      carry: shapes of what it changes.
      fixed: shapes of what it reads.
      scalars: numbers that all leaves share, which stand among ``fixed`` at the end.
      step: ``implementation -> step``.
    """

    problem: Problem
    work: Work
    carry: Any
    fixed: Any
    scalars: Any
    step: Any

    def inputs(self) -> tuple[Any, Any]:
        """Random numbers, the same every time."""
        carry = jax.tree.map(lambda x: data.normal(x, 5, positive=True), self.carry)
        fixed = data.normal_tree(self.fixed, 6, scale=0.1)
        return carry, (*fixed, self.scalars)


def shapes_of(cases: list[Case], sides: list[Side]) -> list[Shape]:
    """Every group of the models, as published and as the example trains them, once."""
    found: dict[Shape, None] = {}
    for case in cases:
        for group in (*groups(case), *groups(case, padded=True)):
            for side in sides:
                rows = project_rows(group.m, group.n, side)
                found[Shape(group, case.rank, rows)] = None
    return list(found)


def tasks(cases: list[Case], sides: list[Side]) -> Iterator[Task]:
    """Every kernel on what the models have for it."""
    for shape in shapes_of(cases, sides):
        yield project_update(shape)
        yield back_project_apply(shape)
    found: dict[tuple[int, int], None] = {}
    for case in cases:
        matrices, layers = sum(counts(case.size).values()), get_size(case.size).layers
        for batch in (matrices, matrices // layers, 1):
            found[batch, min(case.rank, LARGEST)] = None
    for batch, size in found:
        yield factorisation(batch, size)


class _Factorisation(Task):
    """Of matrices that are positive definite."""

    def inputs(self) -> tuple[Any, Any]:
        """Random ones, the same every time."""
        (shape,) = self.fixed
        x = data.normal(shape, 6, scale=0.1 * shape.shape[-1] ** -0.5)
        a = jnp.eye(shape.shape[-1]) + x + jnp.swapaxes(x, -1, -2)
        return jax.tree.map(lambda x: data.normal(x, 5), self.carry), [a]


def factorisation(batch: int, size: int) -> Task:
    """The blocks of a refresh's factorisations: of all matrices of a model, of some, of one."""
    a = jax.ShapeDtypeStruct((batch, size, size), jnp.float32)

    def step(implementation: Implementation | None) -> Step:
        return lambda _, fixed: cholesky_and_inverse(fixed[0], implementation=implementation)

    work = Work(3 * nbytes(a), batch * 2 * size**3 // 3)
    return _Factorisation(factorisation_of(a), work, (a, a), [a], None, step)


def project_update(shape: Shape) -> Task:
    """The first pass of a step, with Adam and float32 moments."""
    leaves = shape.group.leaves
    gradients = [jax.ShapeDtypeStruct(shape.matrix, jnp.bfloat16)] * leaves
    projectors = [jax.ShapeDtypeStruct(shape.projector, jnp.float32)] * leaves
    moment = jax.ShapeDtypeStruct(shape.subspace, jnp.float32)
    update = jax.ShapeDtypeStruct(shape.subspace, jnp.bfloat16)
    moments = [(moment, moment)] * leaves
    inner, scalars = adam(moment)

    def step(implementation: Implementation | None) -> Step:
        def call(carry: Any, fixed: Any) -> Any:
            (_, moments), (gradients, projectors, scalars) = carry, fixed
            return pallas.project_update(
                gradients,
                projectors,
                moments,
                [scalars] * leaves,
                inner,
                rows=shape.rows,
                update_dtype=jnp.bfloat16,
                implementation=implementation,
            )

        return call

    carry, fixed = ([update] * leaves, moments), (gradients, projectors)
    moved = nbytes(fixed) + 2 * nbytes(moments) + nbytes(carry[0])
    problem = Problem.of("project_update", gradients, projectors, rows=shape.rows)
    return Task(problem, Work(moved, shape.flops), carry, fixed, scalars, step)


def back_project_apply(shape: Shape) -> Task:
    """The second pass of a step."""
    leaves = shape.group.leaves
    weights = [jax.ShapeDtypeStruct(shape.matrix, jnp.bfloat16)] * leaves
    projectors = [jax.ShapeDtypeStruct(shape.projector, jnp.float32)] * leaves
    updates = [jax.ShapeDtypeStruct(shape.subspace, jnp.bfloat16)] * leaves
    scalars = [jnp.float32(x) for x in (-0.01, -1e-4)]

    def step(implementation: Implementation | None) -> Step:
        def call(weights: Any, fixed: Any) -> Any:
            projectors, updates, (scale, decay) = fixed
            return pallas.back_project_apply(
                weights,
                projectors,
                updates,
                [scale] * leaves,
                [decay] * leaves,
                rows=shape.rows,
                implementation=implementation,
            )

        return call

    fixed = (projectors, updates)
    moved = 2 * nbytes(weights) + nbytes(fixed)
    problem = Problem.of("back_project_apply", weights, projectors, rows=shape.rows)
    return Task(problem, Work(moved, shape.flops), weights, fixed, scalars, step)


def adam(leaf: jax.ShapeDtypeStruct) -> tuple[Elementwise, list[jax.Array]]:
    """Adam's elementwise program on a leaf, and its scalars at the second step."""
    tx = optax.adam(1e-3)
    state = jax.eval_shape(tx.init, leaf)
    arrays, treedef = jax.tree.flatten(state)

    def update(leaves: list[Any], arrays: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        updates, new = tx.update(leaves[0], jax.tree.unflatten(treedef, arrays))
        return [updates], jax.tree.leaves(new), []

    analysis = Analysis(update, [leaf], arrays, [0])
    # Of the state only the counter matters to scalars.
    counted = [jnp.ones((), x.dtype) if x.shape == () else None for x in arrays]
    scalars = analysis.evaluate({}, counted, [0]).scalars[0]  # type: ignore[arg-type]
    return analysis.programs[0].function, scalars
