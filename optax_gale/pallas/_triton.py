"""What the Triton backends share: when they serve, and one launch over a group of leaves.

Triton and jax-triton are optional, and jax-triton refuses to be imported without a CUDA JAX, so
both are imported where a kernel is built. Triton compiles from source text, which the functions
here generate where it depends on the problem.
"""

import functools
import importlib.util
import linecache
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_gale.pallas import dispatch
from optax_gale.pallas.dispatch import Problem

# Pointers that one launch takes: each is 8 bytes, and all arguments of a kernel fit in 4 KiB.
MOST_POINTERS = 400
# Elements of a stack from which rounding its projector before the kernel costs less than reading
# it in float32.
_ROUNDED_BEFORE = 2**22

_DTYPES = ("bfloat16", "float16", "float32")


def refusal(problem: Problem) -> str | None:
    """Why Triton cannot serve a problem; None if it can."""
    for package in ("triton", "jax_triton"):
        if importlib.util.find_spec(package) is None:
            return f"it needs {package}; install the extra optax_gale[triton]"
    if jax.default_backend() != "gpu":
        return f"it needs a GPU, and the backend is {jax.default_backend()}"
    if capability() < (8, 0):
        return "it needs an NVIDIA GPU of compute capability 8.0 or later"
    if problem.dtype not in _DTYPES:
        return f"it takes {', '.join(_DTYPES)} only"
    return None


def capability() -> tuple[int, int]:
    """Compute capability of the GPU; (0, 0) where there is none."""
    major, _, minor = dispatch.capability().partition(".")
    return (int(major), int(minor or 0)) if major.isdigit() else (0, 0)


def vector(dtype: Any) -> int:
    """Elements that one thread moves at once: 16 bytes, if their address is a multiple of that."""
    return 16 // jnp.dtype(dtype).itemsize


def alignment(m: int, n: int, dtype: Any) -> tuple[int, int]:
    """How the alignment of a matrix's rows repeats.

    Rows of one class, those whose numbers have one remainder by the period, start at the same
    distance from a 16-byte boundary. A tile of such rows, moved by that distance, is copied in full
    vectors whatever the length of a row is.

    Args:
      m: rows.
      n: their length.
      dtype: of the elements.

    Returns:
      The period, and the elements of a vector; 1 and 1 where the classes differ in size.
    """
    width = vector(dtype)
    period = next(c for c in range(1, width + 1) if c * n % width == 0)
    return (period, width) if m % period == 0 else (1, 1)


def rounded(projectors: Sequence[jax.Array], problem: Problem) -> list[jax.Array]:
    """Projectors as a kernel takes them: rounded, or to be rounded in it if a launch costs more."""
    if problem.batch * problem.m * problem.n < _ROUNDED_BEFORE:
        return list(projectors)
    return [p.astype(problem.dtype) for p in projectors]


def power_of_two(x: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (x - 1).bit_length()


def launches(leaves: int, pointers: int) -> list[slice]:
    """Cuts a group into launches, given the pointers that a leaf needs."""
    size = MOST_POINTERS // pointers
    return [slice(i, min(i + size, leaves)) for i in range(0, leaves, size)]


def call(
    name: str,
    body: Any,
    programs: int,
    *,
    inputs: Mapping[str, Sequence[jax.Array]],
    donated: Mapping[str, Sequence[jax.Array]],
    scalars: Sequence[Sequence[Any]],
    fresh: Mapping[str, Sequence[jax.ShapeDtypeStruct]] | None = None,
    warps: int,
    stages: int,
) -> dict[str, list[jax.Array]]:
    """Runs a body on every leaf of a group, in one launch.

    Args:
      name: of the launch, for profiles.
      body: Triton function of the inputs' pointers, a tuple of the results', a pointer to the
        leaf's scalars in float32, and the number of the program within the leaf.
      programs: programs that serve one leaf.
      inputs: arrays that are only read, for every leaf.
      donated: arrays that are overwritten, for every leaf.
      scalars: scalars of every leaf, or once those that all have.
      fresh: arrays that are made, for every leaf.
      warps: warps of a program.
      stages: stages of its pipelines.

    Returns:
      The fresh arrays and what became of the donated ones.
    """
    import jax_triton

    results: dict[str, Sequence[Any]] = {**(fresh or {}), **donated}
    leaves = len(next(iter(results.values())))
    numbers = len(scalars[0]) if len(scalars) > 1 else 0
    kernel = _grouped(body, leaves, programs, numbers, *map(tuple, (inputs, donated, results)))
    arrays = [x for group in (*inputs.values(), *donated.values()) for x in group]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for group in results.values() for x in group]
    read, made = len(inputs) * leaves, len(fresh or {}) * leaves
    out = jax_triton.triton_call(
        *arrays,
        _packed(scalars),
        kernel=kernel,
        out_shape=shapes,
        grid=(leaves * programs,),
        name=name,
        num_warps=warps,
        num_stages=stages,
        input_output_aliases={read + i: made + i for i in range(len(donated) * leaves)},
    )
    return {key: out[i * leaves : (i + 1) * leaves] for i, key in enumerate(results)}


def _packed(scalars: Sequence[Sequence[Any]]) -> jax.Array:
    """Lists of scalars one after the other as float32; integers keep their bits."""
    return jnp.stack([_bits(x) for row in scalars for x in row] or [jnp.float32(0)])


def _bits(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x.astype(jnp.float32)
    return jax.lax.bitcast_convert_type(x.astype(jnp.int32), jnp.float32)


def compiled(name: str, source: str, names: Mapping[str, Any]) -> Any:
    """Makes a function for Triton to compile.

    Args:
      name: of the function.
      source: its text.
      names: what the text refers to, besides ``tl``.

    Returns:
      The Triton function.
    """
    import triton
    import triton.language as tl

    # Triton reads the text back through `inspect`, which looks here.
    file = f"<optax_gale {name} {zlib.crc32(source.encode()):08x}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    space: dict[str, Any] = {"tl": tl, "__name__": __name__, **names}
    exec(compile(source, file, "exec"), space)
    return triton.jit(space[name])


@functools.cache
def _grouped(
    body: Any,
    leaves: int,
    programs: int,
    numbers: int,
    inputs: tuple[str, ...],
    donated: tuple[str, ...],
    results: tuple[str, ...],
) -> Any:
    """The kernel of `call`: a body, with the pointers of the leaf that a program serves."""
    source = _grouped_source(leaves, programs, numbers, inputs, donated, results)
    return compiled("grouped", source, {"body": body})


def _grouped_source(
    leaves: int,
    programs: int,
    numbers: int,
    inputs: Sequence[str],
    donated: Sequence[str],
    results: Sequence[str],
) -> str:
    """Its text; it takes every input's arrays, every donated one's, scalars, every result's."""
    # A donated array's buffer is its result's: the kernel reads it there.
    names = [*inputs, *(f"old_{name}" for name in donated)]
    parameters = [f"{name}{leaf}" for name in names for leaf in range(leaves)]
    parameters += ["numbers", *(f"{name}{leaf}" for name in results for leaf in range(leaves))]
    lines = [
        f"def grouped({', '.join(parameters)}):",
        "    program = tl.program_id(0)",
        f"    leaf = program // {programs}",
        *_choice((*inputs, *results), 0, leaves, "    "),
        f"    body({', '.join(inputs)}, ({', '.join(results)},), numbers + leaf * {numbers}, "
        f"program % {programs})",
    ]
    return "\n".join(lines) + "\n"


def _choice(names: Sequence[str], first: int, last: int, indent: str) -> list[str]:
    """Lines that give names the pointers of a leaf, by bisection: few branches, no table."""
    if last - first == 1:
        return [f"{indent}{name} = {name}{first}" for name in names]
    middle = (first + last) // 2
    return [
        f"{indent}if leaf < {middle}:",
        *_choice(names, first, middle, indent + "    "),
        f"{indent}else:",
        *_choice(names, middle, last, indent + "    "),
    ]
