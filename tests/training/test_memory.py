"""`step_memory_report`: the parts of a step's memory, on steps whose memory is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_gale
from optax_gale import StepMemoryReport, step_memory_report
from optax_gale.training import liveness, programs
from optax_gale.training import memory as step_memory

WIDTH, ROWS = 256, 2048
GIB = 2**30


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def loss(params, x):
    for w in params.values():
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


def make_step(tx, donate=(0, 1)):
    def step(params, opt_state, x):
        value, grads = jax.value_and_grad(loss)(params, x)
        return *optax_gale.update_and_apply(tx, grads, opt_state, params), value

    return jax.jit(step, donate_argnums=donate)


def problem(tx, layers=3, rows=ROWS):
    params = {f"layer_{i}": struct(WIDTH, WIDTH) for i in range(layers)}
    return params, jax.eval_shape(tx.init, params), struct(rows, WIDTH)


SGD = optax.sgd(1e-3)
TRANSFORMATIONS = {
    "adamw": optax.adamw(1e-3),
    "gale_adamw": optax_gale.gale_adamw(1e-3, 8),
    "int8": optax_gale.gale_adamw(1e-3, 8, state_dtype="int8", projector_dtype="int4"),
}


@pytest.fixture
def quickly():
    """Compiles without optimisations, for tests that do not look at temporaries."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_arguments_are_those_of_the_arrays(name, quickly):
    tx = TRANSFORMATIONS[name]
    params, state, x = problem(tx, layers=1)
    report = step_memory_report(make_step(tx), params, state, x)
    of_state = optax_gale.memory_report(tx, params)
    assert report.weights == of_state.weights == nbytes(params)
    assert report.state == nbytes(state)
    for part in ("moments", "projectors", "other"):
        assert getattr(report, part) == getattr(of_state, part)
    assert report.inputs == nbytes(x)
    assert report.copied == 0 and report.results < 256  # the loss


def test_the_parts_add_up_to_what_the_program_allocates():
    tx = TRANSFORMATIONS["adamw"]
    compiled = make_step(tx).lower(*problem(tx)).compile()
    report = step_memory_report(compiled)
    stats = compiled.memory_analysis()
    assert report.temporaries == stats.temp_size_in_bytes
    assert report.peak == sum(report.parts().values()) == (
        stats.argument_size_in_bytes + stats.output_size_in_bytes
        - stats.alias_size_in_bytes + stats.temp_size_in_bytes
    )  # fmt: skip
    fields = {field.name for field in dataclasses.fields(StepMemoryReport)}
    assert set(report.parts()) == fields - {"told_apart", "copied", "platform", "budget"}


def test_jitted_lowered_and_compiled_steps_and_arrays_are_alike():
    params, state, x = problem(SGD, layers=1)
    step = make_step(SGD)
    report = step_memory_report(step, params, state, x)
    lowered = step.lower(params, state, x)
    assert step_memory_report(lowered) == step_memory_report(lowered.compile()) == report
    made = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (params, state, x))
    assert step_memory_report(step, *made) == report
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(made))


def test_activations_are_what_the_backward_pass_needs():
    layers = 6
    params, state, x = problem(SGD, layers)
    report = step_memory_report(make_step(SGD), params, state, x)
    assert report.told_apart
    # The result of every tanh is kept, and one more is on its way.
    kept = layers * nbytes(x)
    assert kept <= report.activations + report.work_space <= kept + 3 * nbytes(x)
    assert report.activations >= kept - nbytes(x)
    assert report.gradients <= report.weights


def test_recomputed_layers_need_fewer_activations():
    def report(layer):
        def scanned(params, x):
            return jnp.mean(jax.lax.scan(lambda h, w: (layer(h, w), None), x, params)[0] ** 2)

        def step(params, opt_state, x):
            grads = jax.grad(scanned)(params, x)
            return optax_gale.update_and_apply(SGD, grads, opt_state, params)

        params = struct(8, WIDTH, WIDTH)
        arguments = params, jax.eval_shape(SGD.init, params), struct(ROWS, WIDTH)
        return step_memory_report(jax.jit(step, donate_argnums=0), *arguments)

    def layer(h, w):
        return jnp.tanh(jnp.sin(h @ w))

    plain, again = report(layer), report(jax.checkpoint(layer))
    one = 4 * ROWS * WIDTH
    assert plain.told_apart and again.told_apart
    # cos and 1 - tanh^2 of eight layers, and their inputs; or their inputs alone.
    assert plain.activations >= 3 * 8 * one - one
    assert 8 * one <= again.activations <= 8 * one + 4 * one
    # The loop has the gradients of all layers from its beginning to its end.
    assert plain.gradients == again.gradients == plain.weights


def test_gradients_that_an_optimizer_reads_all_at_once():
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-3))
    params, state, x = problem(tx, layers=12, rows=8)  # hardly any activations
    report = step_memory_report(make_step(tx), params, state, x)
    assert report.told_apart
    assert report.weights <= report.gradients < 1.001 * report.weights  # and a few scalars
    assert report.activations < 0.1 * report.gradients


def test_sums_of_gradients_in_their_scope():
    def step(params, opt_state, xs):
        with jax.named_scope("gradients"):
            total, _ = jax.lax.scan(
                lambda sums, x: (jax.tree.map(jnp.add, sums, jax.grad(loss)(params, x)), None),
                jax.tree.map(jnp.zeros_like, params),
                xs,
            )
        norm = optax.tree.norm(total)
        total = jax.tree.map(lambda g: g / norm, total)
        return optax_gale.update_and_apply(SGD, total, opt_state, params)

    params, state, _ = problem(SGD)
    step = jax.jit(step, donate_argnums=0)
    report = step_memory_report(step, params, state, struct(4, 64, WIDTH))
    assert report.told_apart and report.gradients >= report.weights


def test_without_donation_weights_and_states_exist_twice():
    tx = optax.adamw(1e-3)
    arguments = problem(tx)
    donated = step_memory_report(make_step(tx), *arguments)
    kept = step_memory_report(make_step(tx, donate=()), *arguments)
    twice = nbytes(arguments[:2])
    assert donated.copied == 0 and kept.copied == twice
    assert kept.results == donated.results + twice
    only_state = step_memory_report(make_step(tx, donate=1), *arguments)
    assert only_state.copied == nbytes(arguments[0])
    assert "not donated: 2.3 MiB of new weights and states" in str(kept)
    assert "not donated" not in str(donated)


def test_memory_grows_with_the_batch():
    tx = TRANSFORMATIONS["adamw"]
    step = make_step(tx)
    reports = [step_memory_report(step, *problem(tx, rows=rows)) for rows in (256, 512, 1024)]
    assert sorted({r.peak for r in reports}) == [r.peak for r in reports]
    assert len({r.weights for r in reports}) == len({r.state for r in reports}) == 1
    assert [r.inputs for r in reports] == [4 * WIDTH * rows for rows in (256, 512, 1024)]


def test_arguments_anywhere_unused_and_static():
    def step(train, x, *, unused, double=False):
        grads = jax.grad(loss)(train["params"], x)
        new = optax_gale.update_and_apply(SGD, grads, train["opt"], train["params"])
        return {"params": new[0], "opt": new[1]}

    params, state, x = problem(SGD, layers=1)
    report = step_memory_report(
        jax.jit(step, static_argnames="double", donate_argnums=0),
        {"params": params, "opt": state},
        x,
        unused=struct(1000),
        double=True,
        where=lambda train, x, unused: (train["params"], train["opt"]),
    )
    assert report.weights == nbytes(params)
    assert report.inputs == nbytes(x) + 4 * 1000


def test_what_one_device_holds_of_sharded_arguments():
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    tx = optax.adamw(1e-3)
    params, state, x = problem(tx)
    placed = lambda tree, where: jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where if s.shape else whole), tree
    )
    report = step_memory_report(
        make_step(tx), placed(params, whole), placed(state, split), placed(x, split)
    )
    assert report.weights == nbytes(params)
    assert report.moments == 2 * nbytes(params) // 4
    assert report.inputs == nbytes(x) // 4
    assert report.other == 4


def strange(program):
    raise KeyError("a computation that is not there")


@pytest.mark.parametrize(
    ("module", "name", "replacement"),
    [
        ("programs", "read", lambda compiled: None),
        ("liveness", "fullest", strange),
        ("liveness", "fullest", lambda program: liveness.Fullest(2**40, 0, 0)),
    ],
)
def test_a_program_that_tells_nothing_of_its_temporaries(module, name, replacement, monkeypatch):
    params, state, x = problem(SGD, layers=1)
    lowered = make_step(SGD).lower(params, state, x)
    told = step_memory_report(lowered)
    monkeypatch.setattr(getattr(step_memory, module), name, replacement)
    untold = step_memory_report(lowered)
    assert told.told_apart and not untold.told_apart
    assert untold.gradients == untold.activations == 0
    assert untold.peak == told.peak and untold.work_space == told.temporaries
    assert "work space: all temporaries; the program for cpu does not say" in str(untold)
    assert "estimated" in str(told) and "estimated" not in str(untold)


def example(**changes):
    parts = dict.fromkeys(step_memory.PARTS, 0) | {"weights": 3 * GIB, "activations": GIB}
    rest = {"told_apart": True, "copied": 0, "platform": "gpu", "budget": 6 * GIB}
    return StepMemoryReport(**(parts | rest | changes))


def test_the_table():
    lines = str(example()).splitlines()
    assert lines[0].split() == ["weights", "3.00", "GiB", "75.0%"]
    assert "results that replace nothing" in lines[5] and "work space" in lines[8]
    assert lines[10].split() == ["peak", "4.00", "GiB", "100.0%"]
    assert lines[11] == "fits in 6.00 GiB: yes, 2.00 GiB to spare"
    assert lines[12].startswith("estimated: ") and len(lines) == 13
    assert "fits in 3.50 GiB: no, 512.0 MiB too much" in str(example(budget=7 * GIB // 2))
    assert "fits" not in str(example(budget=None))
    assert "compiled for cpu" in str(example(platform="cpu"))
    assert "100.0%" not in str(example(weights=0, activations=0))  # and no division by zero


def test_fits():
    report = example()
    assert report.fits() and report.fits("4GiB") and report.fits(4 * GIB)
    assert not report.fits("4GB") and not report.fits(4 * GIB - 1)
    with pytest.raises(ValueError, match="without a `budget`"):
        example(budget=None).fits()
    with pytest.raises(ValueError, match="positive number of bytes"):
        report.fits("4 gigs")


def test_what_is_no_step_is_refused():
    params, state, x = problem(SGD, layers=1)
    step = make_step(SGD)
    with pytest.raises(TypeError, match=r"must be a function of jax\.jit"):
        step_memory_report(lambda *_: None, params, state, x)
    with pytest.raises(TypeError, match="has its arguments already"):
        step_memory_report(step.lower(params, state, x), params)
    with pytest.raises(ValueError, match="`where` must find them: got 1 arguments"):
        step_memory_report(jax.jit(lambda x: x), x)
    with pytest.raises(ValueError, match=r"got '24GBs'"):  # before anything is compiled
        step_memory_report(None, budget="24GBs")


def test_a_backend_that_does_not_say(monkeypatch):
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda self: None)
    with pytest.raises(NotImplementedError, match="does not say what memory"):
        step_memory_report(make_step(SGD), *problem(SGD, layers=1))


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "rows"), [("adamw", 2**17), ("gale_adamw", 2**18)])
def test_the_measured_peak_of_a_gpu(name, rows):
    tx = TRANSFORMATIONS[name]
    device = jax.local_devices()[0]
    before = device.memory_stats()
    params, state, x = problem(tx, layers=32, rows=rows)
    compiled = make_step(tx).lower(params, state, x).compile()
    report = step_memory_report(compiled)
    made = [jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), t) for t in (params, state, x)]
    jax.block_until_ready(compiled(*made))
    after = device.memory_stats()
    if after["peak_bytes_in_use"] <= before["peak_bytes_in_use"]:
        pytest.skip("something in this process needed more memory before")
    measured = after["peak_bytes_in_use"] - before["bytes_in_use"]
    assert report.peak == pytest.approx(measured, rel=0.05)
    assert report.told_apart and report.platform == "gpu"
    assert report.activations > 0.5 * report.peak


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_without_places_shapes_say_nearly_the_same(name, monkeypatch):
    """JAX's plugin for GPUs tells the instructions and their order, but not where arrays lie."""
    tx = TRANSFORMATIONS[name]

    def loss(params, x):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jnp.mean(jax.lax.scan(layer, x, params["w"])[0] ** 2)

    def step(params, state, x):
        grads = jax.grad(loss)(params, x)
        return optax_gale.update_and_apply(tx, grads, state, params)

    params = {"w": struct(8, WIDTH, WIDTH)}
    arguments = (params, jax.eval_shape(tx.init, params), struct(ROWS, WIDTH))
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    placed = step_memory_report(compiled)
    parse = programs.parse
    monkeypatch.setattr(programs, "parse", lambda module, assignment: parse(module, b""))
    shapes = step_memory_report(compiled)
    assert placed.told_apart and shapes.told_apart and shapes.peak == placed.peak
    for part in ("gradients", "activations", "work_space"):
        near = pytest.approx(getattr(placed, part), abs=0.1 * placed.temporaries)
        assert getattr(shapes, part) == near
    assert shapes.gradients == pytest.approx(placed.gradients, rel=0.1)
    # Sums that are far from the truth are not told.
    monkeypatch.setattr(programs, "_SIZES", dict.fromkeys(programs._SIZES, 7))
    assert not step_memory_report(compiled).told_apart
