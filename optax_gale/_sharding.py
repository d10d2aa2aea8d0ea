"""Output shardings for meshes whose axes are Explicit.

On such a mesh sharding is part of an array's type, and JAX asks the caller to decide wherever a
result could be laid out in several ways. Everything here reads types only, so it costs nothing on
one device, under Auto axes, or inside ``vmap`` and ``shard_map``.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

_Axes = str | tuple[str, ...] | None
_NO_MESH = jax.sharding.AbstractMesh((), ())


@contextlib.contextmanager
def concrete() -> Iterator[None]:
    """Within it JAX computes with numbers at once, also while it traces, and whatever the mesh."""
    with jax.ensure_compile_time_eval(), jax.sharding.use_abstract_mesh(_NO_MESH):
        yield


def spec_of(x: jax.Array) -> tuple[_Axes, ...]:
    """Returns the mesh axes of each dimension of ``x`` as its type states them.

    Args:
        x: any array or tracer.

    Returns:
        One entry a dimension: None, the name of a mesh axis, or a tuple of names.
    """
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def is_sharded(x: jax.Array, axes: Sequence[int]) -> bool:
    """Returns whether the type of ``x`` shards any of the dimensions ``axes``."""
    spec = spec_of(x)
    return any(spec[axis] is not None for axis in axes)


def replicate(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Returns ``x`` with the dimensions ``axes`` unsharded and the others as they were."""
    if not is_sharded(x, axes):
        return x
    spec = list(spec_of(x))
    for axis in axes:
        spec[axis] = None
    return jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*spec)))


def undivided(x: jax.Array, axis: int) -> jax.Array:
    """Returns ``x`` with a dimension that the compiler must not spread over Auto axes.

    Of a product over a spread dimension it would add up parts of the size of the result. It can be
    told where the mesh is known: under `jax.set_mesh`, or `jax.sharding.use_abstract_mesh`.
    """
    return _told(x, axis)


def divided_once(x: jax.Array) -> jax.Array:
    """Returns ``x`` spread over Auto axes as its readers want it, before any of them reads it.

    A sum over devices of which each reads a part is scattered then: compilers see that where one
    slice of it is taken, and not where every reader takes its own.
    """
    return _told(x)


def _told(x: jax.Array, *whole: int) -> jax.Array:
    """Leaves all to the compiler but some dimensions, which are not to be spread."""
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Auto not in mesh.axis_types or AxisType.Explicit in mesh.axis_types:
        return x
    spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * x.ndim
    for axis in whole:
        spec[axis] = None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def shards(x: jax.Array, axis: int) -> int:
    """Returns in how many parts the type of ``x`` divides a dimension."""
    mesh = jax.typeof(x).sharding.mesh
    return math.prod(mesh.shape[name] for name in _names(spec_of(x)[axis]))


def match(x: jax.Array, like: jax.Array) -> jax.Array:
    """Returns ``x`` sharded as the type of ``like``, which has as many dimensions.

    As it is, where that type says nothing: without a mesh, or one with Explicit axes.
    """
    mesh = jax.typeof(like).sharding.mesh
    if spec_of(x) == spec_of(like) or AxisType.Explicit not in mesh.axis_types:
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec_of(like))))


def uniform(key: jax.Array, like: jax.Array) -> jax.Array:
    """Draws from [0, 1) for every element of ``like``, each device what it needs."""
    if not any(spec_of(like)):
        return jax.random.uniform(key, like.shape)
    return jax.random.uniform(key, like.shape, out_sharding=jax.typeof(like).sharding)


def per_matrix(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Applies ``f`` to a stack of whole matrices, on each device to those that it holds.

    ``cholesky`` and ``qr`` would do so by themselves, were it not that on an Explicit mesh JAX
    (0.10 to 0.12) fails to compile their batches when those are sharded.

    Args:
        f: maps ``(*batch, m, k)`` to an array of the same rank, matrix by matrix.
        x: an array of which at most the batch axes are sharded.

    Returns:
        ``f(x)``.
    """
    axes = spec_of(x)
    if not any(axes):
        return f(x)
    return jax.shard_map(
        f,
        mesh=jax.typeof(x).sharding.mesh,
        in_specs=PartitionSpec(*axes),
        out_specs=PartitionSpec(*axes),
        axis_names=frozenset().union(*map(_names, axes)),
    )(x)


def einsum_layout(
    subscripts: str, operands: Sequence[jax.Array]
) -> tuple[list[jax.Array], NamedSharding | None]:
    """Lays out an einsum so that contracted dimensions are summed over devices.

    A dimension is sharded as in the first operand that shards it. Operands that do not shard a
    contracted dimension which another one does are sliced to match: left alone, JAX would gather
    the other one. In the result, a mesh axis that an earlier dimension has taken is dropped.

    Args:
        subscripts: explicit einsum subscripts, with ``->``.
        operands: the arrays.

    Returns:
        The operands, and the sharding to ask for, or None where no operand is sharded by its type.
    """
    specs = [spec_of(x) for x in operands]
    mesh = next(
        (jax.typeof(x).sharding.mesh for x, s in zip(operands, specs, strict=True) if any(s)), None
    )
    if mesh is None:
        return list(operands), None
    inputs, output = subscripts.replace(" ", "").split("->")
    terms = inputs.split(",")
    labels = [_labels(term, len(spec)) for term, spec in zip(terms, specs, strict=True)]
    layout: dict[str | int, _Axes] = {}
    for names, spec in zip(labels, specs, strict=True):
        for label, axes in zip(names, spec, strict=True):
            layout[label] = layout.get(label) or axes
    batch = max(sum(isinstance(label, int) for label in names) for names in labels)
    result = _labels(output, batch + len(output.replace("...", "")))
    aligned = []
    for x, names, spec in zip(operands, labels, specs, strict=True):
        taken = set().union(*map(_names, spec))
        wanted = list(spec)
        for i, label in enumerate(names):
            free = spec[i] is None and label not in result and not _names(layout[label]) & taken
            if free and layout[label] is not None:
                wanted[i] = layout[label]
                taken |= _names(layout[label])
        changed = tuple(wanted) != tuple(spec)
        sharding = NamedSharding(mesh, PartitionSpec(*wanted))
        aligned.append(jax.sharding.reshard(x, sharding) if changed else x)
    used: set[str] = set()
    out: list[_Axes] = []
    for label in result:
        axes = layout[label]
        out.append(None if _names(axes) & used else axes)
        used |= _names(axes)
    return aligned, NamedSharding(mesh, PartitionSpec(*out))


def _names(axes: _Axes) -> set[str]:
    return {axes} if isinstance(axes, str) else set(axes or ())


def _labels(term: str, rank: int) -> list[str | int]:
    """Names the dimensions of one einsum term; those of ``...`` count from the right: -1, -2."""
    head, dots, tail = term.partition("...")
    width = rank - len(head) - len(tail) if dots else 0
    return [*head, *range(-width, 0), *tail]
