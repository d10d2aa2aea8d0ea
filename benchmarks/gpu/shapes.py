"""The matrices of a model, from the one table of its shapes."""

import dataclasses
import math
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from examples.flax_llama.model import Llama
from examples.flax_llama.optimizers import is_hidden_matrix
from examples.flax_llama.sizes import get_size

UNSTACKED = ("tiny", "60m")
"""Sizes measured as models without `nn.scan` have them: every matrix a parameter of its own."""

Tree = Any


class Case(NamedTuple):
    """A model and a rank, written ``7b:128``."""

    size: str
    rank: int

    @classmethod
    def parse(cls, text: str) -> "Case":
        """Reads ``size:rank``.

        Example:
          >>> Case.parse("7b:128")
          Case(size='7b', rank=128)
        """
        size, _, rank = text.partition(":")
        get_size(size)
        return cls(size, int(rank))

    @property
    def stacked(self) -> bool:
        """Whether the layers are stacked."""
        return self.size not in UNSTACKED


def matrices(
    size: str, layers: int | None = None, *, padded: bool = False
) -> dict[str, tuple[int, int, int]]:
    """Shapes ``(layers, m, n)`` of the attention and MLP matrices, by path.

    As published, or ``padded`` as the example trains them.

    Example:
      >>> matrices("7b")["layers/mlp/gate/kernel"]
      (32, 4096, 11008)
    """
    shape = get_size(size)
    if layers is not None:
        shape = dataclasses.replace(shape, layers=layers)
    if not padded:
        shape = dataclasses.replace(shape, padding=0)
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    params = jax.eval_shape(Llama(shape).init, jax.random.key(0), tokens)["params"]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
        if is_hidden_matrix(path)
    }


def parameters(
    size: str,
    *,
    stacked: bool,
    layers: int | None = None,
    dtype: Any = jnp.bfloat16,
    padded: bool = False,
) -> dict[str, jax.ShapeDtypeStruct]:
    """The matrices as parameters: stacks ``(layers, m, n)``, or one parameter a matrix."""
    out = {}
    for name, (count, *shape) in matrices(size, layers, padded=padded).items():
        if stacked:
            out[name] = jax.ShapeDtypeStruct((count, *shape), dtype)
        else:
            for i in range(count):
                out[f"{i}/{name}"] = jax.ShapeDtypeStruct(tuple(shape), dtype)
    return out


def counts(size: str) -> dict[tuple[int, int], int]:
    """How many matrices of every shape ``(m, n)`` the whole model has.

    Example:
      >>> counts("60m")
      {(512, 512): 32, (1376, 512): 8, (512, 1376): 16}
    """
    total: Counter[tuple[int, int]] = Counter()
    for layers, m, n in matrices(size).values():
        total[m, n] += layers
    return dict(total)


class Group(NamedTuple):
    """Leaves of one shape, which a kernel serves together."""

    leaves: int
    batch: int
    m: int
    n: int


def groups(case: Case, *, padded: bool = False) -> list[Group]:
    """The groups of a model's leaves."""
    leaves = parameters(case.size, stacked=case.stacked, padded=padded).values()
    shapes = Counter(x.shape for x in leaves)
    return [Group(number, math.prod(batch), m, n) for (*batch, m, n), number in shapes.items()]


def layers_that_fit(size: str, bytes_per_weight: float, limit: int | None) -> int:
    """The model's layers, halved until so many bytes a weight fit in ``limit``."""
    layers = get_size(size).layers
    if limit is None:
        return layers
    weights = sum(math.prod(shape) for shape in matrices(size).values()) / layers
    count = layers
    while count > 1 and count * weights * bytes_per_weight > limit:
        count = (count + 1) // 2
    return count
