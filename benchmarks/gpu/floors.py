"""The least that a step must move and compute, and how fast the device can."""

import math
from typing import Any, NamedTuple

import jax


class Ceilings(NamedTuple):
    """What the device reaches.

    Attributes:
      bandwidth: bytes a second, read plus written, of a large copy.
      matrix_rate: operations a second of a large bfloat16 matrix product.
    """

    bandwidth: float
    matrix_rate: float


class Work(NamedTuple):
    """What a step has to do.

    Attributes:
      bytes: each input read once, each output written once.
      flops: of its matrix products.
    """

    bytes: int
    flops: int

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds below which no implementation gets."""
        return max(self.bytes / ceilings.bandwidth, self.flops / ceilings.matrix_rate)


def nbytes(tree: Any) -> int:
    """Bytes of a tree of arrays or of shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def projectors(state: Any) -> list[tuple[str, Any]]:
    """The projectors in an optimizer's state, with their paths in the parameters."""
    found = []
    for path, x in jax.tree_util.tree_flatten_with_path(state)[0]:
        names = [getattr(key, "name", None) for key in path]
        if "projector" in names and 0 not in x.shape:
            rest = path[names.index("projector") + 1 :]
            found.append((jax.tree_util.keystr(rest, simple=True, separator="/"), x))
    return found


def ordinary_step(params: dict[str, Any], grads: Any, state: Any) -> Work:
    """The work of a step that keeps its projectors.

    Weights and moments are read and written, gradients and projectors read. A projected matrix
    enters its subspace and the update leaves it: two products of ``m n r`` multiplications.
    """
    basis = projectors(state)
    projector_bytes = nbytes([p for _, p in basis])
    moved = 2 * nbytes(params) + nbytes(grads) + 2 * nbytes(state) - projector_bytes
    flops = sum(4 * math.prod(params[name].shape) * p.shape[-1] for name, p in basis)
    return Work(moved, flops)
