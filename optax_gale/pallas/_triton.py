"""What the Triton backends share: when they serve, and one launch over a group of leaves.

Triton and jax-triton are optional, and jax-triton refuses to be imported without a CUDA JAX, so
both are imported where a kernel is built. Triton compiles from source text, which the functions
here generate where it depends on the problem.
"""

import functools
import importlib.util
import linecache
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_gale.pallas import dispatch
from optax_gale.pallas.dispatch import Problem

# Pointers that one launch takes: each is 8 bytes, and all arguments of a kernel fit in 4 KiB.
MOST_POINTERS = 400
# Elements of a stack from which a launch, to round its projector, say, costs less than it saves.
_WORTH_A_LAUNCH = 2**22

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


def is_small(problem: Problem) -> bool:
    """Whether stacks take less time than what is done to launch something for each of them."""
    return problem.batch * problem.m * problem.n < _WORTH_A_LAUNCH


def rounded(projectors: Sequence[jax.Array], problem: Problem) -> list[jax.Array]:
    """Projectors as a kernel takes them: rounded, or to be rounded in it if they are small."""
    if is_small(problem):
        return list(projectors)
    return [p.astype(problem.dtype) for p in projectors]


def power_of_two(x: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (x - 1).bit_length()


class Part(NamedTuple):
    """Leaves that are alike, and what is done to each of them.

    Attributes:
      body: Triton function of the inputs' pointers, a tuple of the results', a pointer to the
        leaf's scalars in float32, and the number of the program within the leaf.
      programs: programs that serve one leaf.
      inputs: arrays that are only read, for every leaf.
      donated: arrays that are overwritten, for every leaf.
      fresh: arrays that are made, for every leaf.
      scalars: scalars of every leaf, or once those that all have.
      warps: warps of a program.
      stages: stages of its pipelines.
      alone: whether it is worth a launch of its own.
    """

    body: Any
    programs: int
    inputs: Mapping[str, Sequence[jax.Array]]
    donated: Mapping[str, Sequence[jax.Array]]
    fresh: Mapping[str, Sequence[jax.ShapeDtypeStruct]]
    scalars: Sequence[Sequence[Any]]
    warps: int
    stages: int
    alone: bool

    @property
    def leaves(self) -> int:
        """How many there are."""
        return len(next(iter(self.inputs.values())))

    @property
    def pointers(self) -> int:
        """Pointers that a leaf needs: what is donated is a result, too."""
        return len(self.inputs) + 2 * len(self.donated) + len(self.fresh)

    def cut(self, start: int, stop: int) -> "Part":
        """Some of its leaves."""
        some = lambda lists: {name: xs[start:stop] for name, xs in lists.items()}
        scalars = self.scalars if len(self.scalars) == 1 else self.scalars[start:stop]
        return self._replace(
            inputs=some(self.inputs),
            donated=some(self.donated),
            fresh=some(self.fresh),
            scalars=scalars,
        )


def launches(parts: Sequence[Part]) -> list[list[tuple[int, int, int]]]:
    """Which leaves a launch serves: number of the part, first and last leaf of it, exclusive.

    Small parts share launches, each of which costs the host as much time as such parts take.
    """
    out: list[list[tuple[int, int, int]]] = []
    open_ones: dict[tuple[int, int], tuple[list[tuple[int, int, int]], int]] = {}
    for number, part in enumerate(parts):
        start = 0
        while start < part.leaves:
            kind = (part.warps, part.stages)
            launch, room = open_ones.get(kind, ([], 0)) if not part.alone else ([], 0)
            if room < part.pointers:
                launch, room = [], MOST_POINTERS
                out.append(launch)
            stop = min(part.leaves, start + room // part.pointers)
            launch.append((number, start, stop))
            if not part.alone:
                open_ones[kind] = (launch, room - (stop - start) * part.pointers)
            start = stop
    return out


def call(name: str, parts: Sequence[Part]) -> list[dict[str, list[jax.Array]]]:
    """Runs the body of each part on its leaves, in as few launches as pay.

    Args:
      name: of the launches, for profiles.
      parts: the parts, whose inputs, donated and fresh arrays have the same names and dtypes.

    Returns:
      For each part the fresh arrays and what became of the donated ones.
    """
    out: list[dict[str, list[jax.Array]]] = [defaultdict(list) for _ in parts]
    for launch in launches(parts):
        pieces = [parts[number].cut(start, stop) for number, start, stop in launch]
        for (number, _, _), found in zip(launch, _launch(name, pieces), strict=True):
            for key, arrays in found.items():
                out[number][key] += arrays
    return out


def _launch(name: str, parts: Sequence[Part]) -> list[dict[str, list[jax.Array]]]:
    import jax_triton

    joined = lambda lists: {name: [x for some in lists for x in some[name]] for name in lists[0]}
    inputs, donated = joined([p.inputs for p in parts]), joined([p.donated for p in parts])
    results: dict[str, list[Any]] = {**joined([p.fresh for p in parts]), **donated}
    leaves = sum(part.leaves for part in parts)
    scalars = dispatch.one_for_all(
        [row for part in parts for row in dispatch.one_for_each(part.scalars, part.leaves)]
    )
    kernel = _grouped(
        tuple((part.body, part.leaves, part.programs) for part in parts),
        len(scalars[0]) if len(scalars) > 1 else 0,
        *map(tuple, (inputs, donated, results)),
    )
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for group in results.values() for x in group]
    read, made = len(inputs) * leaves, (len(results) - len(donated)) * leaves
    found = jax_triton.triton_call(
        *(x for group in (*inputs.values(), *donated.values()) for x in group),
        _packed(scalars),
        kernel=kernel,
        out_shape=shapes,
        grid=(sum(part.leaves * part.programs for part in parts),),
        name=name,
        num_warps=parts[0].warps,
        num_stages=parts[0].stages,
        input_output_aliases={read + i: made + i for i in range(len(donated) * leaves)},
    )
    found = iter(found)
    lists = {key: iter([next(found) for _ in range(leaves)]) for key in results}
    return [{key: [next(xs) for _ in range(p.leaves)] for key, xs in lists.items()} for p in parts]


def _packed(scalars: Sequence[Sequence[Any]]) -> jax.Array:
    """Lists of scalars one after the other as float32; integers keep their bits."""
    return jnp.stack([_bits(x) for row in scalars for x in row] or [jnp.float32(0)])


def _bits(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x.astype(jnp.float32)
    return jax.lax.bitcast_convert_type(x.astype(jnp.int32), jnp.float32)


def jit_for(*made_for: Any) -> Callable[[Any], Any]:
    """`triton.jit` for functions of one source that are made for different problems.

    Where the types of their arguments agree, Triton knows the functions of a launch by their names,
    and would run the first one for all.

    Args:
      made_for: what the function refers to; it becomes a part of the name.

    Returns:
      The decorator.
    """
    import triton

    mark = f"{zlib.crc32(repr(made_for).encode()):08x}"

    def decorate(function: Any) -> Any:
        function.__qualname__ = f"{function.__qualname__}_{mark}"
        return triton.jit(function)

    return decorate


def compiled(name: str, source: str, names: Mapping[str, Any]) -> Any:
    """Makes a function for Triton to compile.

    Args:
      name: of the function.
      source: its text.
      names: what the text refers to, besides ``tl``.

    Returns:
      The Triton function.
    """
    import triton.language as tl

    # Triton reads the text back through `inspect`, which looks here.
    file = f"<optax_gale {name} {zlib.crc32(source.encode()):08x}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    space: dict[str, Any] = {"tl": tl, "__name__": __name__, **names}
    exec(compile(source, file, "exec"), space)
    used = {k: x.fn.__qualname__ for k, x in names.items() if hasattr(x, "fn")}
    return jit_for(source, used)(space[name])


@functools.cache
def _grouped(
    parts: tuple[tuple[Any, int, int], ...],
    numbers: int,
    inputs: tuple[str, ...],
    donated: tuple[str, ...],
    results: tuple[str, ...],
) -> Any:
    """The kernel of a launch: bodies, with the pointers of the leaf that a program serves."""
    counts = [(leaves, programs) for _, leaves, programs in parts]
    source = _grouped_source(counts, numbers, inputs, donated, results)
    return compiled("grouped", source, {f"body{i}": body for i, (body, _, _) in enumerate(parts)})


def _grouped_source(
    parts: Sequence[tuple[int, int]],
    numbers: int,
    inputs: Sequence[str],
    donated: Sequence[str],
    results: Sequence[str],
) -> str:
    """Its text; it takes every input's arrays, every donated one's, scalars, every result's.

    Args:
      parts: leaves, and programs that serve each of them.
      numbers: scalars from one leaf's to the next one's.
      inputs: names of what is only read.
      donated: names of what is overwritten.
      results: names of what is made or overwritten.
    """
    # A donated array's buffer is its result's: the kernel reads it there.
    names = [*inputs, *(f"old_{name}" for name in donated)]
    leaves = range(sum(count for count, _ in parts))
    parameters = [f"{name}{leaf}" for name in names for leaf in leaves]
    parameters += ["numbers", *(f"{name}{leaf}" for name in results for leaf in leaves)]
    lines = [f"def grouped({', '.join(parameters)}):", "    program = tl.program_id(0)"]
    first, begin = 0, 0
    for i, (count, programs) in enumerate(parts):
        indent = "    "
        if len(parts) > 1:
            test = f"{'elif' if i else 'if'} program < {begin + count * programs}"
            lines.append(f"{indent}{test if i < len(parts) - 1 else 'else'}:")
            indent += "    "
        lines += [
            f"{indent}leaf = {first} + (program - {begin}) // {programs}",
            *_choice((*inputs, *results), first, first + count, indent),
            f"{indent}body{i}({', '.join(inputs)}, ({', '.join(results)},), "
            f"numbers + leaf * {numbers}, (program - {begin}) % {programs})",
        ]
        first, begin = first + count, begin + count * programs
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
