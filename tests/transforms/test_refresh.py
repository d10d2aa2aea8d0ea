"""When projectors are refreshed, with which random numbers, and at what price."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import optax_gale
from optax_gale import linalg
from optax_gale.transforms import projectors

from .reference import Problem, assert_trees_close, fixed_sketch, last, turned

RANK = 2


def from_key(x, *, rank, key, previous):
    """A range finder that shows its key."""
    del x, rank
    return jax.random.uniform(key, previous.shape)


def ones(shapes):
    return {name: jnp.ones(shape) for name, shape in shapes.items()}


def refreshed_matrices(shapes, steps, **options):
    """For every step, the names (and indices in a stack) of the matrices that were refreshed."""
    tx = optax_gale.gale(optax.sgd(0.1), RANK, range_finder=turned, **options)
    update = jax.jit(tx.update)
    params = ones(shapes)
    state = tx.init(params)
    out = []
    for _ in range(steps):
        before = state.projector
        _, state = update(params, state, params)
        changed = jax.tree.map(
            lambda a, b: np.any(np.asarray(a != b), axis=(-2, -1)), before, state.projector
        )
        out.append({(k, *map(int, i)) for k, flags in changed.items() for i in np.argwhere(flags)})
    return out


def everything(shapes):
    return {(k, *i) for k, shape in shapes.items() for i in np.ndindex(shape[:-2])}


def test_together():
    shapes = {"a": (4, 6), "b": (6, 4), "stack": (3, 4, 6)}
    steps = refreshed_matrices(shapes, 8, update_proj_gap=3)
    assert steps == [everything(shapes) if step % 3 == 0 else set() for step in range(8)]


@pytest.mark.parametrize(
    "gap", [{"a": 2, "b": 3, "c": 4}, lambda path, leaf: {"a": 2, "b": 3, "c": 4}[path]]
)
def test_gaps_per_leaf(gap):
    gaps = {"a": 2, "b": 3, "c": 4}
    shapes = {name: (4, 6) for name in gaps}
    steps = refreshed_matrices(shapes, 13, update_proj_gap=gap)
    assert steps == [{(k,) for k, gap in gaps.items() if step % gap == 0} for step in range(13)]


def test_gap_of_one():
    shapes = {"a": (4, 6), "stack": (2, 4, 6)}
    for schedule in ("together", "staggered"):
        steps = refreshed_matrices(shapes, 3, update_proj_gap=1, refresh_schedule=schedule)
        assert steps == [everything(shapes)] * 3


STAGGERED = {
    "fewer leaves than the gap": ({"a": (4, 6), "b": (6, 4)}, 5, 1),
    "more": ({name: (4, 6) for name in "abcdefg"}, 3, 3),
    "a stack, one by one": ({"stack": (4, 4, 6)}, 4, 1),
    "a stack in even slices": ({"stack": (6, 4, 6)}, 3, 2),
    "a stack in uneven slices": ({"stack": (5, 4, 6)}, 3, 2),
    "very uneven slices": ({"stack": (7, 4, 6)}, 3, 3),
    "two stacks and two matrices": (
        {"a": (4, 6), "b": (6, 4), "deep": (6, 4, 6), "shallow": (3, 6, 4)},
        7,
        2,
    ),
    "a stack of stacks": ({"experts": (4, 2, 4, 6), "a": (4, 6)}, 3, 4),
}


@pytest.mark.parametrize("case", STAGGERED)
def test_staggered(case):
    """Everything at first; then every matrix once in a gap, and never many of them in a step."""
    shapes, gap, at_most = STAGGERED[case]
    first, *turns = refreshed_matrices(
        shapes, 3 * gap + 1, update_proj_gap=gap, refresh_schedule="staggered"
    )
    assert first == everything(shapes)
    assert max(map(len, turns)) <= at_most
    for start in range(2 * gap + 1):  # any window as long as the gap
        window = turns[start : start + gap]
        assert sum(map(len, window)) == len(everything(shapes))
        assert set().union(*window) == everything(shapes)


def test_staggered_needs_one_gap():
    tx = optax_gale.gale(
        optax.sgd(0.1), RANK, update_proj_gap={"a": 2, "b": 3}, refresh_schedule="staggered"
    )
    with pytest.raises(ValueError, match=r"one `update_proj_gap`.*\['2', '3'\].*'together'"):
        tx.init(ones({"a": (4, 6), "b": (4, 6)}))


def test_many_different_gaps_are_refused():
    tx = optax_gale.gale(optax.sgd(0.1), RANK, update_proj_gap=lambda path, leaf: 2 + int(path[1:]))
    with pytest.raises(ValueError, match="at most 4 different values"):
        tx.init(ones({f"w{i}": (4, 6) for i in range(5)}))


@pytest.mark.parametrize(
    ("gap", "error", "match"),
    [
        (0, ValueError, "at least 1, got 0"),
        (2.5, TypeError, "must be an int, got 2.5"),
        (True, TypeError, "must be an int, got True"),
        (np.float32(2), TypeError, "must be an int, got "),
        (jnp.asarray(0), ValueError, "at least 1, got 0"),
        ({"a": 0}, ValueError, "of 'a' must be at least 1, got 0"),
        ({"a": "often"}, TypeError, "of 'a' must be an int, got 'often'"),
    ],
)
def test_bad_gaps(gap, error, match):
    with pytest.raises(error, match=match):
        optax_gale.gale(optax.sgd(0.1), RANK, update_proj_gap=gap).init(ones({"a": (4, 6)}))


def test_gaps_as_concrete_arrays():
    """Also where they are closed over by a compiled function."""
    gaps = {"a": jnp.asarray(2), "b": jnp.asarray(3)}
    shapes = {"a": (4, 6), "b": (4, 6)}
    assert refreshed_matrices(shapes, 7, update_proj_gap=gaps) == refreshed_matrices(
        shapes, 7, update_proj_gap={"a": 2, "b": 3}
    )


def test_several_traced_gaps_are_refused():
    params = ones({"a": (4, 6), "b": (4, 6)})

    def init(gap):
        gaps = {"a": gap, "b": gap + 1}
        return optax_gale.gale(optax.sgd(0.1), RANK, update_proj_gap=gaps).init(params)

    with pytest.raises(ValueError, match="one number for the whole tree where it is traced"):
        jax.jit(init)(2)


def test_the_gap_as_a_hyperparameter():
    tx = optax.inject_hyperparams(optax_gale.gale_sgd, static_args=("rank", "range_finder"))(
        learning_rate=0.1, rank=RANK, update_proj_gap=2, range_finder=turned
    )
    params = ones({"a": (4, 6)})
    state = tx.init(params)
    update = jax.jit(tx.update)
    changed = []
    for step in range(12):
        if step == 4:
            state.hyperparams["update_proj_gap"] = jnp.asarray(4)
        before = state.inner_state.projector["a"]
        _, state = update(params, state, params)
        changed.append(bool(jnp.any(before != state.inner_state.projector["a"])))
    assert [step for step, c in enumerate(changed) if c] == [0, 2, 4, 8]


def test_the_host_may_choose():
    shapes = {"a": (4, 6), "stack": (3, 6, 4)}
    tx = optax_gale.gale(optax.sgd(0.1), RANK, update_proj_gap=100, range_finder=turned)
    update = jax.jit(tx.update, static_argnames="refresh")
    params = ones(shapes)
    state = tx.init(params)
    for refresh in (False, True, True, False):
        before = state.projector
        _, state = update(params, state, params, refresh=refresh)
        changed = jax.tree.map(lambda a, b: bool(jnp.all(jnp.any(a != b, (-2, -1)))), before,
                               state.projector)  # fmt: skip
        assert changed == {"a": refresh, "stack": refresh}
    assert int(state.count) == 4


def test_the_host_and_the_device_agree():
    problem = Problem({"a": (6, 10), "stack": (3, 10, 6)}, steps=9)
    tx = optax_gale.gale_adamw(
        0.01, RANK, update_proj_gap=4, moments="rotate", range_finder=fixed_sketch
    )
    update = jax.jit(tx.update, static_argnames="refresh")
    params, state = problem.params, tx.init(problem.params)
    for step in range(problem.steps):
        grads = problem.grads(params, step)
        updates, state = update(grads, state, params, refresh=step % 4 == 0)
        params = optax.apply_updates(params, updates)
    expected, expected_state = last(problem.run(tx))
    assert_trees_close(params, expected, 1e-5)
    assert_trees_close(state.projector, expected_state.projector, 1e-4)


def test_refresh_must_be_static():
    tx = optax_gale.gale_adamw(0.01, RANK)
    params = ones({"a": (4, 6)})
    state = tx.init(params)
    with pytest.raises(TypeError, match="static_argnames='refresh'"):
        jax.jit(tx.update)(params, state, params, refresh=True)
    with pytest.raises(TypeError, match="True, False or None"):
        tx.update(params, state, params, refresh=1)


def test_states_out_of_step_under_vmap():
    """Each of a batch of states refreshes when its own count says so, or at the batch's pace."""
    tx = optax_gale.gale(optax.sgd(0.1), RANK, update_proj_gap=3, range_finder=turned)
    params = ones({"a": (4, 6)})
    state = tx.init(params)
    counts = jnp.asarray([0, 1, 3])
    states = jax.tree.map(lambda x: jnp.stack([x] * 3), state)._replace(count=counts)
    batch = jax.tree.map(lambda x: jnp.stack([x] * 3), params)
    _, after = jax.jit(jax.vmap(tx.update))(batch, states, batch)
    changed = jnp.any(after.projector["a"] != states.projector["a"], (-2, -1))
    assert changed.tolist() == [True, False, True]
    assert after.count.tolist() == [1, 2, 4]


# What the compiled program holds.

_FACTORISATION = re.compile(
    r"(custom_call_target=\"[^\"]*(lapack|solver|qr|svd|syevd|eigh|potrf|trsm)| cholesky\(|"
    r" triangular-solve\()",
    re.IGNORECASE,
)
_CALLEES = re.compile(r"(?:to_apply|calls|body|condition|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")


def computations(compiled):
    """The program's computations by name, each a list of instructions; and the entry's name."""
    found, entry, current = {}, None, []
    for line in compiled.as_text().splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            current = found[header[2]] = []
            entry = header[2] if header[1] else entry
        elif line.startswith("  "):
            current.append(line)
    assert entry is not None
    return found, entry


def always_run(found, entry):
    """The instructions outside every conditional."""
    waiting, seen, out = [entry], set(), []
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in found[name]:
            out.append(line)
            if " conditional(" not in line:
                for callees in _CALLEES.findall(line):
                    waiting += [n for n in re.findall(r"[\w.\-]+", callees) if n in found]
    return out


def compile_update(shapes, refresh=None, **options):
    tx = optax_gale.gale(optax.adamw(0.1), RANK, moments="rotate", **options)
    params = ones(shapes)
    state = tx.init(params)
    update = jax.jit(functools.partial(tx.update, refresh=refresh))
    return update.lower(params, state, params).compile()


LEAVES = {"a": (4, 6), "b": (6, 4), "stack": (3, 6, 8)}
MANY_LEAVES = {f"w{i}": (4, 6) for i in range(6)}


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ({"a": (4, 6)}, {"range_finder": "svd"}),
        ({"stack": (3, 4, 6)}, {"range_finder": "gale_approx", "residual": "fira"}),
        (LEAVES, {"range_finder": "svd", "refresh_schedule": "staggered", "update_proj_gap": 7}),
        (LEAVES, {"range_finder": "svd", "update_proj_gap": {"a": 2, "b": 3, "stack": 2}}),
        (MANY_LEAVES, {"range_finder": "svd"}),
    ],
    ids=["one leaf", "sketch", "staggered", "two gaps", "six leaves"],
)
def test_one_conditional_holds_every_factorisation(full_compilation, shapes, options):
    found, entry = computations(compile_update(shapes, **options))
    instructions = [line for lines in found.values() for line in lines]
    assert sum(" conditional(" in line for line in instructions) == 1
    assert any(_FACTORISATION.search(line) for line in instructions)
    outside = always_run(found, entry)
    assert sum(" conditional(" in line for line in outside) == 1
    assert not [line for line in outside if _FACTORISATION.search(line)]


@pytest.mark.parametrize("moments", ["keep", "rotate", "reset"])
@pytest.mark.parametrize("range_finder", ["svd", "gale"])
@pytest.mark.quick("svd-rotate", "gale-keep")
def test_the_branch_that_keeps_copies_nothing(full_compilation, moments, range_finder):
    """With donated buffers, projectors and moments stay where they are."""
    tx = optax_gale.gale_adamw(0.1, 4, moments=moments, range_finder=range_finder)
    params = ones({"a": (48, 32), "stack": (2, 32, 48)})
    state = tx.init(params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    found, entry = computations(compiled)
    (conditional,) = (line for line in found[entry] if " conditional(" in line)
    branches = re.search(r"branch_computations=\{%?([\w.\-]+)", conditional)
    keeps = branches or re.search(r"false_computation=%?([\w.\-]+)", conditional)
    copies = [x for x in found[keeps[1]] + found[entry] if re.search(r"= f32\S* copy\(", x)]
    assert not copies


@pytest.mark.parametrize(
    "options",
    [{}, {"refresh_schedule": "staggered", "update_proj_gap": 6}],
    ids=["together", "staggered"],
)
@pytest.mark.quick("together")
def test_large_leaves_are_turned_one_after_another(monkeypatch, options):
    """What turning moments needs beside them is then needed once, not for all leaves."""
    tx = optax_gale.gale_adamw(0.1, RANK, **options)
    params = {k: jax.random.normal(jax.random.key(len(k)), shape) for k, shape in LEAVES.items()}
    state = jax.jit(tx.update)(params, tx.init(params), params)[1]

    def refreshed():  # a function of its own: what was traced is found again otherwise
        update = functools.partial(tx.update, refresh=True)
        turns = str(jax.make_jaxpr(update)(params, state, params)).count("optimization_barrier")
        return turns, jax.jit(update)(params, state, params)

    together, wanted = refreshed()
    monkeypatch.setattr(projectors, "_TOGETHER", 1)
    one_by_one, found = refreshed()
    matrices = sum(p is not None for p in jax.tree.leaves(state.projector))
    assert (together, one_by_one) == (0, matrices - 1)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("refresh", [None, True])
def test_what_is_the_same_on_all_devices_stays_so(monkeypatch, refresh):
    """Beside a leaf that devices share along a mapped axis, one that they do not."""
    monkeypatch.setattr(projectors, "_TOGETHER", 1)
    tx = optax_gale.gale_adamw(0.1, RANK, range_finder="svd")
    shapes = {"a": (4, 8, 6), "b": (6, 8), "c": (2, 6, 5)}
    params = {k: jax.random.normal(jax.random.key(len(x)), x) for k, x in shapes.items()}
    specs = {"a": P("x"), "b": P(), "c": P("x")}
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    state = tx.init(params)
    of_state = optax_gale.state_partition_specs(tx, params, specs)
    step = jax.shard_map(
        lambda p, s: tx.update(p, s, p, refresh=refresh),
        mesh=mesh,
        in_specs=(specs, of_state),
        out_specs=(specs, of_state),
    )
    found = jax.jit(step)(params, state)
    chex.assert_trees_all_close(found, jax.jit(tx.update)(params, state, params), rtol=1e-4)


def test_no_conditional_where_the_host_chooses(full_compilation):
    for refresh in (True, False):
        found, _ = computations(compile_update(LEAVES, refresh=refresh, range_finder="svd"))
        instructions = [line for lines in found.values() for line in lines]
        assert not [line for line in instructions if " conditional(" in line]
        assert any(_FACTORISATION.search(line) for line in instructions) == refresh


def test_the_conditional_survives_vmap(full_compilation):
    """A `select` would compute an SVD in every step."""
    tx = optax_gale.gale(optax.adamw(0.1), RANK, range_finder="svd")
    params = ones({"a": (4, 6)})
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 2), (params, tx.init(params)))
    program = jax.jit(jax.vmap(tx.update)).lower(stacked[0], stacked[1], stacked[0]).compile()
    found, entry = computations(program)
    assert sum(" conditional(" in line for line in always_run(found, entry)) == 1
    assert not [line for line in always_run(found, entry) if _FACTORISATION.search(line)]


@pytest.mark.parametrize("schedule", ["together", "staggered"])
def test_compiles_once(schedule):
    problem = Problem({"a": (6, 10), "stack": (3, 10, 6), "b": (7,)}, steps=5)
    tx = optax_gale.gale_adamw(
        optax.cosine_decay_schedule(0.1, 10),
        RANK,
        update_proj_gap=2,
        refresh_schedule=schedule,
        moments="rotate",
        residual="fira",
        range_finder=turned,
    )
    update = jax.jit(tx.update)
    params, state = problem.params, tx.init(problem.params)
    for step in range(problem.steps):
        updates, new_state = update(problem.grads(params, step), state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
        params, state = optax.apply_updates(params, updates), new_state
        if step == 1:
            compiled = update._cache_size()
    assert update._cache_size() == compiled


# Random keys.


def keys(tree, *, seed=0, count=0):
    """What every leaf's key made of its projector."""
    tx = optax_gale.gale(optax.sgd(0.1), RANK, range_finder=from_key, seed=seed)
    state = tx.init(tree)._replace(count=jnp.asarray(count, jnp.int32))
    _, state = jax.jit(functools.partial(tx.update, refresh=True))(tree, state, tree)
    return jax.tree.map(np.asarray, state.projector)


def test_keys_depend_on_seed_leaf_and_step():
    tree = {"a": jnp.ones((4, 6)), "deep": {"a": jnp.ones((4, 6)), "b": jnp.ones((4, 6))}}
    first = keys(tree)
    chex.assert_trees_all_equal(first, keys(tree))
    others = [
        *jax.tree.leaves(first),
        *jax.tree.leaves(keys(tree, seed=1)),
        *jax.tree.leaves(keys(tree, count=1)),
    ]
    assert len({x.tobytes() for x in others}) == len(others)


def test_keys_do_not_depend_on_other_leaves():
    first = keys({"deep": {"b": jnp.ones((4, 6))}})
    more = keys({"a": jnp.ones((4, 6)), "deep": {"a": jnp.ones((6, 4)), "b": jnp.ones((4, 6))}})
    np.testing.assert_array_equal(first["deep"]["b"], more["deep"]["b"])


def test_sketches_repeat_exactly():
    problem = Problem({"a": (6, 10)}, steps=3)
    sketch = optax_gale.Sketch(power_iterations=0)
    make = lambda seed: optax_gale.gale_adamw(0.1, RANK, seed=seed, range_finder=sketch)
    run = lambda seed: last(problem.run(make(seed)))
    first = run(0)
    chex.assert_trees_all_equal(first, run(0))
    assert np.any(np.asarray(first[1].projector["a"]) != np.asarray(run(1)[1].projector["a"]))


def test_seed_as_a_hyperparameter_sets_the_key():
    make = optax.inject_hyperparams(optax_gale.gale_sgd, static_args=("rank", "range_finder"))
    tx = make(learning_rate=0.1, rank=RANK, range_finder=from_key, seed=3)
    tree = {"a": jnp.ones((4, 6))}
    _, state = jax.jit(tx.update)(tree, tx.init(tree), tree)
    np.testing.assert_array_equal(state.inner_state.projector["a"], keys(tree, seed=3)["a"])


def test_a_sketch_serves_leaves_of_one_rank_together(monkeypatch):
    calls = []
    find = linalg.range_finders

    def counting(keys, xs, rank, **options):
        calls.append((rank, [x.shape for x in xs]))
        return find(keys, xs, rank, **options)

    monkeypatch.setattr(linalg, "range_finders", counting)
    params = ones({"a": (4, 6), "b": (2, 6, 4), "c": (8, 9)})
    gradients = {k: jax.random.normal(jax.random.key(1), p.shape) for k, p in params.items()}
    tx = optax_gale.gale(optax.sgd(0.1), {"a": 2, "b": 2, "c": 3}, side="short")
    _, state = jax.jit(functools.partial(tx.update, refresh=True))(
        gradients, tx.init(params), params
    )
    assert calls == [(2, [(4, 6), (2, 4, 6)]), (3, [(8, 9)])]
    for name, p in state.projector.items():
        calls.clear()
        tx = optax_gale.gale(optax.sgd(0.1), {"a": 2, "b": 2, "c": 3}[name], side="short")
        one = {name: params[name]}
        _, alone = jax.jit(functools.partial(tx.update, refresh=True))(
            {name: gradients[name]}, tx.init(one), one
        )
        chex.assert_trees_all_close(p, alone.projector[name], atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax_gale.gale_adamw(0.1, RANK, weight_decay=0.1),
        lambda: optax_gale.gale_adamw(0.1, RANK, residual="fira", state_dtype="int8"),
        lambda: optax_gale.chain(
            optax.trace(0.9), optax.clip_by_global_norm(1.0), optax_gale.gale_adamw(0.1, RANK)
        ),
        lambda: optax_gale.chain(
            optax.trace(0.9), optax_gale.gale_project(RANK), optax.scale_by_adam(), optax.scale(-1)
        ),
    ],
    ids=["gale_adamw", "fira, int8", "a chain", "gale_project"],
)
def test_a_refresh_and_the_step_after_it_are_the_step_that_refreshes(make):
    tx = make()
    params = ones({"a": (4, 6), "b": (2, 6, 4), "c": (3,)})
    state = tx.init(params)
    draw = lambda seed: {
        k: jax.random.normal(jax.random.key(seed), p.shape) for k, p in params.items()
    }
    update = jax.jit(tx.update, static_argnames="refresh")
    _, state = update(draw(0), state, params, refresh=True)
    expected = update(draw(1), state, params, refresh=True)
    refreshed = optax_gale.refresh_projectors(tx, draw(1), state, params)
    assert jax.tree.structure(refreshed) == jax.tree.structure(state)
    apart = update(draw(1), refreshed, params, refresh=False)
    chex.assert_trees_all_close(apart, expected, rtol=1e-5, atol=1e-6)
    kept, _ = update(draw(1), state, params, refresh=False)
    assert not np.allclose(kept["a"], expected[0]["a"], atol=1e-3)


def test_only_what_projects_has_projectors_to_refresh():
    grads = {"a": jnp.ones((4, 6))}
    with pytest.raises(ValueError, match="takes `gale`, an alias of it, or an optax_gale"):
        optax_gale.refresh_projectors(optax.sgd(0.1), grads, (), grads)
    with pytest.raises(TypeError, match="`tx` must be an Optax gradient transformation"):
        optax_gale.refresh_projectors(None, grads, (), grads)
    tx = optax_gale.gale_adamw(0.1, 2)
    with pytest.raises(TypeError, match="`state` must be what `init`"):
        optax_gale.refresh_projectors(tx, grads, (), grads)
