"""What the Triton backends do before Triton sees anything; Triton itself is not needed here."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.flax_llama.sizes import SIZES
from optax_gale.pallas import UnsupportedError, _triton, dispatch
from optax_gale.pallas.back_project_apply import triton as back_project_apply
from optax_gale.pallas.dispatch import Problem
from optax_gale.pallas.elementwise import PRIMITIVES, Constant, Elementwise, Operation
from optax_gale.pallas.project_update import epilogue
from optax_gale.pallas.project_update import triton as project_update
from optax_gale.transforms.fusion import Analysis

from .problems import adam

F32 = jnp.dtype("float32")

# NumPy in the place of Triton's language: its functions, and no more of them than the text may use.
TL = types.SimpleNamespace(
    abs=np.abs,
    exp=np.exp,
    sqrt=np.sqrt,
    rsqrt=lambda x: 1 / np.sqrt(x),
    where=np.where,
    full=np.full,
    cast=lambda x, dtype: np.asarray(x).astype(dtype),
    maximum=lambda x, y, propagate_nan=None: (np.maximum if propagate_nan else np.fmax)(x, y),
    minimum=lambda x, y, propagate_nan=None: (np.minimum if propagate_nan else np.fmin)(x, y),
    PropagateNan=types.SimpleNamespace(ALL=True),
    float32=np.float32,
    int32=np.int32,
    uint32=np.uint32,
    int1=np.bool_,
)
LIBDEVICE = types.SimpleNamespace(log=np.log, tanh=np.tanh, pow=np.power)


def translated(inner, dtypes):
    space = {"tl": TL, "libdevice": LIBDEVICE}
    exec(epilogue.inner_source(inner, dtypes), space)
    return space["inner"]


def program(function, moments=0):
    """The program of ``function(R, *moments) -> (U, *moments)``."""
    shape = jax.ShapeDtypeStruct((3, 5), F32)

    def step(leaves, state):
        update, *new = function(*leaves, *state)
        return [update], new, []

    return Analysis(step, [shape], [shape] * moments, [0]).programs[0].function


def lion(r, m):
    return jnp.sign(0.9 * m + 0.1 * r), 0.99 * m + 0.01 * r


def momentum(r, m):
    return (r + 0.9 * m, r + 0.9 * m)


def rms(r, m):
    new = 0.9 * m + 0.1 * r**2
    return r * jax.lax.rsqrt(new + 1e-8), new


def clipped(r, m):
    return jnp.where(jnp.isfinite(r), jnp.clip(r, -0.5, 0.5), 0.0), jnp.maximum(jnp.abs(r), 0.9 * m)


def draw(count, seed=0):
    return list(np.random.default_rng(seed).standard_normal((count, 3, 5)).astype(np.float32))


@pytest.mark.parametrize("function", [None, lion, momentum, rms, clipped])
@pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning")
def test_an_optimizer_in_the_kernels_words(function):
    inner = program(function, 1) if function else adam()
    arrays, scalars = draw(inner.arrays), [np.float32(0.3 + i) for i in range(inner.scalars)]
    arrays[1:] = map(np.abs, arrays[1:])
    arrays[0][0, :2] = np.nan, np.inf
    found = translated(inner, [F32] * (inner.arrays + inner.scalars))(*arrays, *scalars)
    expected = inner(*([jnp.asarray(x) for x in given] for given in (arrays, scalars)))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def of(primitive, *dtypes, out="float32", constants=(), **params):
    """A program of one primitive on arrays of some dtypes, and numbers after them."""
    dtypes = [jnp.dtype(x) for x in dtypes]
    operands = (*range(len(dtypes)), *(Constant(x, F32) for x in constants))
    operation = Operation(primitive, tuple(sorted(params.items())), operands, jnp.dtype(out))
    return Elementwise(len(dtypes), 0, (operation,), (len(dtypes),)), dtypes


lax, f, b = jax.lax, "float32", "bool"
convert = {"sharding": None, "weak_type": False}
CASES = [
    *(of(p, f) for p in (lax.abs_p, lax.exp_p, lax.neg_p, lax.sign_p, lax.square_p, lax.tanh_p)),
    *(of(p, f, accuracy=None) for p in (lax.log_p, lax.rsqrt_p, lax.sqrt_p)),
    *(of(p, f, f) for p in (lax.add_p, lax.sub_p, lax.mul_p, lax.div_p, lax.max_p, lax.min_p)),
    *(of(p, f, f, out=b) for p in (lax.eq_p, lax.ne_p, lax.ge_p, lax.gt_p, lax.le_p, lax.lt_p)),
    *(of(p, b, b, out=b) for p in (lax.and_p, lax.or_p)),
    of(lax.not_p, b, out=b),
    of(lax.is_finite_p, f, out=b),
    *(of(lax.integer_pow_p, f, y=y) for y in (-2, 0, 3)),
    of(lax.pow_p, f, f),
    of(lax.pow_p, f, "int32"),
    of(lax.clamp_p, f, f, f),
    of(lax.select_n_p, b, f, f),
    of(lax.mul_p, f, constants=(0.1,)),
    of(lax.min_p, f, constants=(float("inf"),)),
    of(lax.max_p, "int32", "int32", out="int32"),
    of(lax.sign_p, "int32", out="int32"),
    of(lax.convert_element_type_p, b, new_dtype=F32, **convert),
    of(lax.convert_element_type_p, f, out=b, new_dtype=jnp.dtype(b), **convert),
    of(lax.convert_element_type_p, f, out="int32", new_dtype=jnp.dtype("int32"), **convert),
]


def values(dtypes):
    drawn = [np.abs(x) + 0.1 for x in draw(len(dtypes))]
    for x, dtype in zip(drawn, dtypes, strict=True):
        if dtype == F32:
            x[0, :3] = np.nan, np.inf, -0.0
    return [
        x > 0.8 if dtype == jnp.bool_ else np.nan_to_num(2 * x, posinf=1).astype(dtype)
        if dtype != F32
        else x
        for x, dtype in zip(drawn, dtypes, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize(("inner", "dtypes"), CASES, ids=lambda x: getattr(x, "operations", "-")[0])
@pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning")
def test_a_primitive_in_the_kernels_words(inner, dtypes):
    arrays = values(dtypes)
    if inner.operations[0].dtype == "int32":
        arrays = [np.nan_to_num(x, posinf=1) for x in arrays]
    (found,) = translated(inner, dtypes)(*arrays)
    (expected,) = inner(list(map(jnp.asarray, arrays)), [])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_every_primitive_has_a_translation():
    tested = {inner.operations[0].primitive.name for inner, _ in CASES}
    # Two names of the same expressions.
    assert tested | {"add_any", "copy"} == PRIMITIVES
    assert {"add_any", "copy"} <= set(epilogue._EXPRESSIONS)


def test_what_has_no_translation_is_refused():
    inner, dtypes = of(jax.lax.add_p, "float64", "float64", out="float64")
    with pytest.raises(UnsupportedError, match="float64"):
        epilogue.inner_source(inner, dtypes)
    inner, dtypes = of(jax.lax.select_n_p, "int32", f, f, f)
    with pytest.raises(UnsupportedError, match="select_n"):
        epilogue.inner_source(inner, dtypes)


class Pointer:
    """Into an array; adding offsets to it points at its elements."""

    def __init__(self, array, offset=0):
        self.array, self.offset = array, offset

    def __add__(self, offset):
        return Pointer(self.array, self.offset + offset)


class Loaded(np.ndarray):
    def to(self, dtype, bitcast=False):
        return self.view(dtype) if bitcast else self.astype(dtype)


def load(pointer, mask=None):
    return np.asarray(pointer.array.flat[pointer.offset]).view(Loaded)


def store(pointer, value, mask):
    pointer.array.flat[pointer.offset[mask]] = value[mask]


def test_the_epilogue_updates_moments_in_place():
    integer, to_float = jnp.dtype("int32"), {"new_dtype": F32, **convert}
    operations = (
        Operation(lax.convert_element_type_p, tuple(sorted(to_float.items())), (3,), F32),
        Operation(lax.mul_p, (), (0, 2), F32),
        Operation(lax.add_p, (), (5, 4), F32),
        Operation(lax.sub_p, (), (1, 0), F32),
    )
    inner = Elementwise(2, 2, operations, (6, 7))
    numbers = np.asarray(_triton._packed([[jnp.float32(1.5), jnp.int32(7)]]))
    space = {"tl": types.SimpleNamespace(**vars(TL), load=load, store=store)}
    exec(epilogue.finish_source(inner, [F32, integer]), space)
    space["inner"] = translated(inner, [F32, F32, F32, integer])
    r, moment = draw(2)
    old, update = moment.copy(), np.zeros((3, 5), np.float16)
    offsets = np.arange(15).reshape(3, 5)
    mask = offsets % 2 == 0
    results = (Pointer(update), Pointer(moment))
    space["finish"](r, 0, offsets, mask, Pointer(numbers), results)
    np.testing.assert_array_equal(moment, np.where(mask, old - r, old))
    np.testing.assert_allclose(update, np.where(mask, r * 1.5 + 7, 0), rtol=1e-3)


@pytest.mark.parametrize("leaves", [1, 2, 7])
def test_every_program_gets_its_leafs_pointers(leaves):
    parts = [(leaves, 3), (1, 2), (leaves, 1)]
    calls = []
    tl = types.SimpleNamespace(program_id=lambda axis: space["program"])
    bodies = {f"body{i}": lambda *given, i=i: calls.append((i, *given)) for i in range(3)}
    for served in (parts[:1], parts):
        space = {"tl": tl, **bodies}
        exec(_triton._grouped_source(served, 2, ["p", "g"], ["m"], ["u", "m"]), space)
        count = sum(n for n, _ in served)
        arrays = [f"{name}{leaf}" for name in ("p", "g", "old_m") for leaf in range(count)]
        results = [f"{name}{leaf}" for name in ("u", "m") for leaf in range(count)]
        calls.clear()
        for space["program"] in range(sum(n * programs for n, programs in served)):
            space["grouped"](*arrays, 100, *results)
        of_leaf = [(i, programs) for i, (n, programs) in enumerate(served) for _ in range(n)]
        assert calls == [
            (i, f"p{leaf}", f"g{leaf}", (f"u{leaf}", f"m{leaf}"), 100 + 2 * leaf, program)
            for leaf, (i, programs) in enumerate(of_leaf)
            for program in range(programs)
        ]


def part(leaves, *, alone, warps=4):
    return _triton.Part(
        body=None,
        programs=1,
        inputs={"left": range(leaves), "right": range(leaves)},
        donated={"weight": range(leaves)},
        fresh={},
        scalars=[[leaf] for leaf in range(leaves)],
        warps=warps,
        stages=3,
        alone=alone,
    )


def test_a_part_is_cut_where_a_launch_has_too_many_pointers():
    assert _triton.launches([part(230, alone=True)]) == [[(0, 0, 100)], [(0, 100, 200)],
                                                         [(0, 200, 230)]]  # fmt: skip
    some = part(230, alone=True).cut(100, 200)
    assert some.leaves == len(some.scalars) == 100
    assert some.donated["weight"][0] == some.scalars[0][0] == 100


def test_small_parts_share_launches():
    parts = [part(60, alone=False), part(5, alone=True), part(60, alone=False)]
    parts += [part(1, alone=False, warps=8), part(2, alone=False)]
    assert _triton.launches(parts) == [
        [(0, 0, 60), (2, 0, 40)], [(1, 0, 5)], [(2, 40, 60), (4, 0, 2)], [(3, 0, 1)]
    ]  # fmt: skip


def test_rows_of_one_class_are_aligned_alike():
    assert _triton.alignment(4096, 4096, "bfloat16") == (1, 8)
    assert _triton.alignment(2048, 5461, "bfloat16") == (8, 8)
    assert _triton.alignment(2048, 5461, "float32") == (4, 4)
    assert _triton.alignment(36, 46, "bfloat16") == (4, 8)
    assert _triton.alignment(37, 53, "bfloat16") == (1, 1)  # its classes differ in size


SHAPES = sorted(
    {
        (m, n)
        for size in SIZES.values()
        for m, n in (
            (size.hidden, size.hidden),
            (size.hidden, size.intermediate),
            (size.intermediate, size.hidden),
        )
    }
)
# Bytes of shared memory that a block may have.
SHARED = {(8, 0): 163 * 1024, (8, 6): 99 * 1024, (8, 9): 99 * 1024, (9, 0): 227 * 1024}


@pytest.mark.parametrize("capability", SHARED, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [1, 8, 100, 128, 512, 1024])
def test_tiles_fit_the_gpu(rank, dtype, capability):
    size = jnp.dtype(dtype).itemsize
    powers = {2**i for i in range(4, 9)}
    for m, n in SHAPES:
        for leaves, batch in ((1, 32), (32, 1), (1, 1)):
            problem = Problem("", leaves, batch, m, n, rank, n <= m, dtype)
            tile = back_project_apply.choose_tile(problem, capability)
            assert {tile.rows, tile.columns, tile.depth} <= powers
            if tile.walk:
                assert tile.depth >= rank
                moved = tile.rows * (tile.depth + tile.columns) * tile.stages
                assert (moved + tile.depth * tile.columns) * size <= SHARED[capability]
            else:
                moved = (tile.rows + tile.columns) * tile.depth * tile.stages
                assert moved * size <= SHARED[capability]
            tile = project_update.choose_tile(problem, capability)
            assert {tile.side, tile.rank, tile.depth} <= powers
            moved = (tile.side + tile.rank) * tile.depth * tile.stages
            assert moved * size <= SHARED[capability]
            finished = tile.side if problem.rows else tile.rank
            assert finished // tile.parts >= 16


@pytest.mark.parametrize("rows", [True, False])
def test_programs_cover_a_matrix(rows):
    problem = Problem("", 1, 3, 2048, 5461, 128, rows, "bfloat16")
    tile = back_project_apply.Tile(128, 128, 128, 8, 2, 3)
    # 8 classes of 256 rows, each 2 tiles in one walk; 5461 columns, moved by up to 7.
    assert back_project_apply._tiles(problem, tile) == (2, 43, 3 * 8 * 1 * 43)
    assert back_project_apply._tiles(problem, tile._replace(walk=0)) == (2, 43, 3 * 8 * 2 * 43)
    tile = project_update.Tile(256, 64, 64, 8, 3)
    expected = (22, 2, 3 * 22 * 2) if rows else (8, 2, 3 * 8 * 2)
    assert project_update._tiles(problem, tile) == expected


def test_refusals_say_what_is_missing(monkeypatch):
    problem = Problem("project_update", 1, 1, 8, 8, 4, True, "bfloat16")
    installed = {"triton"}
    monkeypatch.setattr(
        _triton.importlib.util, "find_spec", lambda name: name if name in installed else None
    )
    assert "needs jax_triton" in project_update.refusal(problem)
    installed.add("jax_triton")
    assert "needs a GPU" in back_project_apply.refusal(problem)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(dispatch, "capability", lambda: "7.5")
    assert "8.0 or later" in back_project_apply.refusal(problem)
    monkeypatch.setattr(dispatch, "capability", lambda: "8.9")
    assert project_update.refusal(problem) is None
    assert "bfloat16, float16, float32 only" in project_update.refusal(
        problem._replace(dtype="float64")
    )
    monkeypatch.setattr(dispatch, "capability", lambda: "gfx942")
    assert "NVIDIA" in project_update.refusal(problem)
