"""Every option has its effect: on what is compiled, on the optimizer, on the order of a run."""

import functools
import re
from types import SimpleNamespace

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from examples.flax_llama import cli, compare, optimizers, step, train
from examples.flax_llama.config import ModelOptions, OptimizerOptions, TrainConfig, TrainingOptions
from examples.flax_llama.data import DataConfig, load
from examples.flax_llama.errors import UserError
from examples.flax_llama.metrics import read_records
from examples.flax_llama.step import Evaluation

STEPS = 12

# --- a run without its arithmetic -----------------------------------------------------------------


class Rehearsal:
    """Stands for the compiled functions of a run: traces them, and computes nothing.

    Attributes:
      programs: what the step was traced to, by its argument ``refresh``.
      calls: which of these programs each step of the run was.
      batches: what each step was given.
      shapes: the first state's.
    """

    def __init__(self):
        self.programs, self.calls, self.batches = {}, [], []

    def trace_init(self, *arguments):
        traced = step.trace_init(*arguments)
        self.shapes, self.first_state = traced.out_info, str(traced.jaxpr)
        return SimpleNamespace(out_info=self.shapes)

    def make_first_state(self, *arguments):
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.shapes)

    def make_train_step(self, model, tx, *arguments):
        real = step.make_train_step(model, tx, *arguments)

        def lower(state, batch, refresh):
            self.programs[refresh] = real.trace(state, batch, refresh=refresh).jaxpr
            return SimpleNamespace(compile=lambda: functools.partial(self.take_step, refresh))

        return SimpleNamespace(lower=lower)

    def take_step(self, refresh, state, batch):
        self.calls.append(refresh)
        self.batches.append(batch["tokens"])
        return state, dict.fromkeys(("loss", "grad_norm", "learning_rate"), np.float32(1.0))

    def make_evaluate(self, model, loss_chunks, *arguments):
        self.evaluation_chunks = loss_chunks
        return lambda params, batches: Evaluation(1.0, 1)


@pytest.fixture(scope="module")
def rehearse(corpus_folder, tmp_path_factory):
    """Runs ``train`` with some options on the command line, without its arithmetic."""

    @functools.cache
    def run(**changes):
        rehearsal = Rehearsal()
        rehearsal.folder = tmp_path_factory.mktemp("rehearsal")
        defaults = {"optimizer": "sgd", "checkpoint_every": 0, "eval_every": 0}
        options = {**conftest.nano_options(corpus_folder), "out": rehearsal.folder}
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(conftest.SIZES, "nano", conftest.NANO)
            for name in ("trace_init", "make_train_step", "make_evaluate"):
                patch.setattr(train, name, getattr(rehearsal, name))
            patch.setattr(train, "first_state", rehearsal.make_first_state)
            patch.setattr(train.plots, "plot_run", lambda *arguments: None)
            words = conftest.words(options, **{**defaults, **changes})
            assert cli.main(["train", *words]) == 0
        return rehearsal

    return run


def equations(jaxpr):
    """All equations of a program, also those inside others."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(inner):
                yield from equations(inner)


def is_program(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def step_equations(run, *primitives):
    return [
        equation
        for program in run.programs.values()
        for equation in equations(program)
        if equation.primitive.name in primitives
    ]


def state_leaves(state, name):
    """The leaves of an optimizer's state under an attribute, by the parameter's path."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        names = [getattr(key, "name", None) for key in path]
        if name in names:
            rest = path[names.index(name) + 1 :]
            found[jax.tree_util.keystr(rest, simple=True, separator="/")] = leaf
    assert found
    return found


# --- what is seen of a run ------------------------------------------------------------------------


def dtypes(leaves):
    return {str(leaf.dtype) for leaf in leaves}


def products_with_weights(run):
    """Dtypes of the products that contract something and have no batch axis: those of weights."""
    found = set()
    for equation in step_equations(run, "dot_general"):
        (contracted, _), (batch, _) = equation.params["dimension_numbers"]
        if contracted and not batch:
            found |= dtypes(x.aval for x in (*equation.invars, *equation.outvars))
    return found


def weights(run):
    return dtypes(jax.tree.leaves(run.shapes.params))


def recomputed(run):
    return len(step_equations(run, "checkpoint", "remat", "remat2"))


def positions_of_logits(run):
    """How many positions have logits at the same time."""
    vocabulary = run.shapes.params["lm_head"]["kernel"].shape[-1]
    shapes = [x.aval.shape for e in step_equations(run, "dot_general") for x in e.outvars]
    return {s[1] for s in shapes if len(s) == 3 and s[2] == vocabulary}, run.evaluation_chunks


def batch_shape(run):
    return {batch.shape for batch in run.batches}


def steps_taken(run):
    return len(run.calls)


def branches(run):
    """The conditionals of each executable, by their number of branches."""
    return {
        refresh: [
            len(e.params["branches"]) for e in equations(program) if e.primitive.name == "cond"
        ]
        for refresh, program in run.programs.items()
    }


def refreshes(run):
    return run.calls


def projectors(run):
    return state_leaves(run.shapes.opt_state, "projector")


def ranks(run):
    return {p.shape[-1] for p in projectors(run).values()}


def projected_sides(run):
    return {path.split("/")[2]: p.shape[-2] for path, p in projectors(run).items()}


def projected(run):
    return {path.split("/")[2] for path in projectors(run)}


def projector_dtypes(run):
    return dtypes(projectors(run).values())


def moment_dtypes(run):
    """Those of Adam's two moments of projected matrices."""
    moments = [state_leaves(run.shapes.opt_state, name) for name in ("mu", "nu")]
    return [dtypes(x for path, x in m.items() if path.startswith("layers")) for m in moments]


def moment_dtypes_of_the_embedding(run):
    """Large enough, at this size, to be quantised."""
    moments = [state_leaves(run.shapes.opt_state, name) for name in ("mu", "nu")]
    return [dtypes(x for path, x in m.items() if path.startswith("embed")) for m in moments]


def momentum_dtype(run):
    return dtypes(state_leaves(run.shapes.opt_state, "trace").values())


def rounding(run):
    name = type(run.shapes.opt_state).__name__
    return name if name in ("StochasticRoundingState", "KahanSummationState") else None


def recorded(kind):
    def steps(run):
        return [r["step"] for r in read_records(run.folder / "metrics.jsonl") if r["kind"] == kind]

    steps.__name__ = f"recorded_{kind}"
    return steps


def checkpoints(run):
    folder = run.folder / "checkpoints"
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def tensorboard(run):
    return (run.folder / "tensorboard").exists()


F32, BF16 = {"float32"}, {"bfloat16"}
GALE = {"optimizer": "gale_adamw", "update_proj_gap": 3}
LONG = dict(query=16, key=16, value=16, out=16, gate=24, up=24, down=24)
SHORT = dict(query=16, key=8, value=8, out=16, gate=16, up=16, down=16)
HOST = [True, False, False] * (STEPS // 3)

EFFECTS = [
    ({}, products_with_weights, F32),
    ({"dtype": "bfloat16"}, products_with_weights, BF16),
    ({}, weights, F32),
    ({"param_dtype": "bfloat16"}, weights, BF16),
    ({}, recomputed, 0),
    ({"remat": True}, recomputed, 1),
    ({}, positions_of_logits, ({16}, 1)),
    ({"loss_chunks": 4}, positions_of_logits, ({4}, 4)),
    ({}, batch_shape, {(4, 16)}),
    ({"batch_size": 2, "sequence_length": 8}, batch_shape, {(2, 8)}),
    ({}, steps_taken, STEPS),
    ({"steps": 7}, steps_taken, 7),
    (GALE, branches, {None: [2]}),
    (GALE, refreshes, [None] * STEPS),
    ({**GALE, "host_refresh": True}, branches, {True: [], False: []}),
    ({**GALE, "host_refresh": True}, refreshes, HOST),
    # Nothing, everything, and each third of the matrices in its turn.
    ({**GALE, "refresh_schedule": "staggered"}, branches, {None: [2 + 3]}),
    (GALE, ranks, {4}),
    ({**GALE, "rank": 3}, ranks, {3}),
    (GALE, projected_sides, LONG),
    ({**GALE, "side": "short"}, projected_sides, SHORT),
    ({**GALE, "select": "down|query"}, projected, {"down", "query"}),
    (GALE, projector_dtypes, F32),
    ({**GALE, "projector_dtype": "bfloat16"}, projector_dtypes, BF16),
    ({**GALE, "projector_dtype": "int8"}, projector_dtypes, {"int8", "float32"}),
    ({**GALE, "projector_dtype": "int4"}, projector_dtypes, {"uint8", "float32"}),
    (GALE, moment_dtypes, [F32, F32]),
    ({**GALE, "state_dtype": "bfloat16"}, moment_dtypes, [BF16, BF16]),
    ({**GALE, "state_dtype": "int8"}, moment_dtypes_of_the_embedding, [{"uint8", "float32"}] * 2),
    ({**GALE, "mu_dtype": "bfloat16"}, moment_dtypes, [BF16, F32]),
    ({"param_dtype": "bfloat16"}, rounding, None),
    ({"param_dtype": "bfloat16", "rounding": "stochastic"}, rounding, "StochasticRoundingState"),
    ({"param_dtype": "bfloat16", "rounding": "kahan"}, rounding, "KahanSummationState"),
    ({}, momentum_dtype, F32),
    ({"accumulator_dtype": "bfloat16"}, momentum_dtype, BF16),
    ({}, recorded("speed"), [5, 10, 12]),
    ({"log_every": 3}, recorded("speed"), [3, 6, 9, 12]),
    ({}, recorded("validation"), [12]),
    ({"eval_every": 5}, recorded("validation"), [5, 10, 12]),
    ({"checkpoint_every": 5, "keep_checkpoints": 2}, recorded("validation"), [12]),
    ({}, checkpoints, set()),
    ({"checkpoint_every": 5, "keep_checkpoints": 2}, checkpoints, {"10", "12"}),
    ({"checkpoint_every": 5, "keep_checkpoints": 3}, checkpoints, {"5", "10", "12"}),
    ({}, tensorboard, False),
    ({"tensorboard": True}, tensorboard, True),
]


def row_name(row):
    changes, observe, _ = row
    shown = [f"{k}={v}" for k, v in changes.items() if GALE.get(k) != v]
    return f"{observe.__name__}-{','.join(shown) or 'default'}"


@pytest.mark.parametrize(("changes", "observe", "expected"), EFFECTS, ids=map(row_name, EFFECTS))
@pytest.mark.slow
def test_the_option_has_its_effect(changes, observe, expected, rehearse):
    assert observe(rehearse(**changes)) == expected


def test_the_seed_changes_weights_and_order(rehearse):
    first, again, other = (rehearse(seed=seed) for seed in (1, 1, 2))
    assert first.first_state == again.first_state != other.first_state
    np.testing.assert_array_equal(first.batches[0], again.batches[0])
    assert not np.array_equal(first.batches[0], other.batches[0])


@pytest.mark.parametrize("backend", ["xla", "cudnn"])
def test_the_attention_backend_is_asked_for(backend, nano, monkeypatch):
    asked, real = set(), jax.nn.dot_product_attention

    def attention(*arguments, implementation, **options):
        asked.add(implementation)
        return real(*arguments, **options)  # cudnn cannot even be traced without a GPU

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    config = TrainConfig(
        optimizer="sgd",
        model=ModelOptions("nano", attention_backend=backend),
        data=DataConfig("text", nano["path"], cache_dir=nano["cache-dir"], vocab_size=300),
    )
    train.Trainer(config, load(config.data), Console(quiet=True))
    assert asked == {backend}


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_the_memory_table_counts_the_weights_in_their_precision(dtype, itemsize, capsys):
    assert cli.main(["memory", "--optimizers", "sgd", "--size", "7b", "--param-dtype", dtype]) == 0
    expected = f"{6_738_415_616 * itemsize / 2**30:.2f} GiB"
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sgd")]
    assert re.split(r"\s{2,}", row)[1] == expected


def test_a_comparison_passes_the_options_on_to_every_trial(nano, tmp_path, monkeypatch):
    configs = []

    def trainer(config, *arguments, **options):
        configs.append(config)
        if len(configs) == 3:
            raise UserError("enough")

    monkeypatch.setattr(compare, "Trainer", trainer)
    shared = dict(param_dtype="bfloat16", remat=True, seed=3, clip_norm=0.25, log_every=7)
    words = conftest.words(nano, optimizers="adamw,gale_adamw", rank=3, out=tmp_path, **shared)
    arm = "name=fira optimizer=gale_adamw residual=fira lr=0.5"
    assert cli.main(["compare", *words, "--arm", arm]) == 2
    assert [config.optimizer for config in configs] == ["adamw", "gale_adamw", "gale_adamw"]
    given = [config.optimization.given() for config in configs]
    assert given == [{}, {"rank": 3}, {"rank": 3, "residual": "fira", "learning_rate": 0.5}]
    for config in configs:
        assert (config.model.size, config.model.dtype) == ("nano", "float32")
        assert (config.model.param_dtype, config.model.remat) == ("bfloat16", True)
        assert (config.training.seed, config.training.clip_norm) == (3, 0.25)
        assert (config.training.steps, config.data.path) == (STEPS, nano["path"])
        assert config.output.log_every == 7


# --- what an optimizer does with numbers ----------------------------------------------------------

SCHEDULE = {"steps": STEPS, "warmup_fraction": 0.5, "final_lr_fraction": 0.1}
# Linear to the peak in six steps, from a sixth of it; then a cosine towards a tenth.
RATES = np.concatenate(
    [
        1 / 6 + 5 / 6 * np.arange(6) / 6,
        0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(6) / 6)) / 2,
    ]
)


@pytest.fixture(scope="module")
def params():
    """Small ones, named as the model's are."""
    shapes = {
        "embed": {"embedding": (6, 4)},
        "layers": {"mlp": {"down": {"kernel": (2, 8, 6)}}, "mlp_norm": {"scale": (2, 8)}},
    }
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape)),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def make(name, clip_norm=0.0, **options):
    settings = optimizers.resolve(name, OptimizerOptions(**options), conftest.NANO, STEPS)
    return optimizers.build(name, settings, TrainingOptions(clip_norm=clip_norm, **SCHEDULE))


def updater(tx):
    """All the updates for gradients and parameters that stay the same."""

    @jax.jit
    def run(gradients, params):
        def one(state, _):
            updates, state = tx.update(gradients, state, params)
            return state, updates

        return jax.lax.scan(one, tx.init(params), None, length=STEPS)[1]

    return lambda gradients, params: jax.tree.map(np.asarray, run(gradients, params))


@functools.cache
def simple(name, clip_norm=0.0):
    """An optimizer whose update to a constant gradient depends on the learning rate alone."""
    options = dict(learning_rate=0.125, adam_learning_rate=0.125, weight_decay=0.5, momentum=0.0)
    options |= dict(adam_b1=0.0, rank=6, update_proj_gap=100, range_finder="random", side="short")
    known = optimizers.RECIPES[name].options
    return updater(make(name, clip_norm, **{k: v for k, v in options.items() if k in known}))


def nothing(params):
    return jax.tree.map(jnp.zeros_like, params)


@pytest.mark.parametrize("name", optimizers.RECIPES)
def test_updates_follow_the_schedule(name, params):
    updates = simple(name)(params, nothing(params))  # what is zero does not decay
    for leaf in jax.tree.leaves(updates):
        sizes = np.linalg.norm(leaf.reshape(STEPS, -1), axis=1)
        np.testing.assert_allclose(sizes / sizes[6], RATES, rtol=2e-3)


@pytest.mark.parametrize("name", ["adamw", "lion", "gale_adamw", "sgd", "gale_sgd", "optax_galore"])
def test_the_learning_rate_is_the_peak_of_the_schedule(name, params):
    # At full rank the update is the sign of the gradient, or the gradient itself.
    update = simple(name)(params, nothing(params))["embed"]["embedding"]
    gradient = np.asarray(params["embed"]["embedding"])
    direction = gradient if name.endswith("sgd") else np.sign(gradient)
    np.testing.assert_allclose(update[0], -0.125 / 6 * direction, rtol=1e-5)
    np.testing.assert_allclose(update[6], -0.125 * direction, rtol=1e-5)


DECAYING = [name for name, recipe in optimizers.RECIPES.items() if "weight_decay" in recipe.options]


@pytest.mark.parametrize("name", DECAYING)
def test_everything_but_the_norms_decays(name, params):
    updates = simple(name)(nothing(params), params)
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    for (path, leaf), update in zip(leaves, jax.tree.leaves(updates), strict=True):
        decays = "scale" not in jax.tree_util.keystr(path)
        for at in (0, 6):
            expected = -0.125 * RATES[at] * 0.5 * np.asarray(leaf) * decays
            np.testing.assert_allclose(update[at], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "clip_norm", "norm"),
    [("sgd", 1.0, 1.0), ("sgd", 0.25, 0.25), ("sgd", 0.0, 4000.0), ("gale_sgd", 0.25, 0.25)],
)
def test_gradients_are_clipped_to_the_global_norm(name, clip_norm, norm, params):
    length = np.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(params)))
    gradients = jax.tree.map(lambda x: x * (4000 / length), params)
    # The rank is all that the matrix has: the projection loses nothing.
    updates = simple(name, clip_norm)(gradients, nothing(params))
    for at in (0, 6):
        got = np.sqrt(sum(np.sum(x[at] ** 2) for x in jax.tree.leaves(updates)))
        np.testing.assert_allclose(got, 0.125 * norm * RATES[at], rtol=1e-4)


def test_gradients_below_the_clip_norm_are_left_alone(params):
    gradients = jax.tree.map(lambda x: x * 1e-3, params)
    updates = simple("sgd", 1.0)(gradients, params)
    for update, gradient in zip(*map(jax.tree.leaves, (updates, gradients)), strict=True):
        np.testing.assert_allclose(update[6], -0.125 * gradient, rtol=1e-6)


def test_moments_are_kept_rotated_or_reset(params):
    """A refresh in the second step; in all three the moment then takes the new gradient in."""
    keys = jax.random.split(jax.random.key(0), 2)
    gradients = [jax.tree.map(lambda x, k=k: jax.random.normal(k, x.shape), params) for k in keys]
    matrix = gradients[1]["layers"]["mlp"]["down"]["kernel"]
    for choice in ("keep", "rotate", "reset"):
        fixed = dict(range_finder="random", side="long", rank=4)
        tx = make("gale_adamw", moments=choice, b1=0.75, **fixed)
        seen, state = [], tx.init(params)
        update = jax.jit(functools.partial(tx.update, refresh=True))
        for gradient in gradients:
            _, state = update(gradient, state, params)
            seen.append(
                [state_leaves(state, n)["layers/mlp/down/kernel"] for n in ("projector", "mu")]
            )
        (old_basis, old_mu), (basis, mu) = seen
        new = jnp.einsum("lmr,lmn->lrn", basis, matrix)
        carried = (mu - 0.25 * new) / 0.75
        rotated = jnp.einsum("lmr,lms,lsn->lrn", basis, old_basis, old_mu)
        expected = {"keep": old_mu, "rotate": rotated, "reset": jnp.zeros_like(old_mu)}[choice]
        np.testing.assert_allclose(carried, expected, atol=1e-5)
        assert np.abs(old_basis - basis).max() > 0.1  # the three do differ


# --- every option of every optimizer --------------------------------------------------------------

SAMPLES = {  # where 0.01 would not do, or is the default
    **dict(learning_rate=0.03, adam_learning_rate=0.03, clipping_threshold=0.5, ns_steps=2),
    **dict(mu_dtype="bfloat16", accumulator_dtype="bfloat16", state_dtype="bfloat16"),
    **dict(projector_dtype="bfloat16", nesterov=True, rank=3, update_proj_gap=7),
    **dict(side="short", range_finder="random", moments="reset", residual="fira"),
    **dict(refresh_schedule="staggered", select="nothing", projection_seed=7, oversampling=1),
    **dict(
        power_iterations=2, sketch="rademacher", sample_fraction=0.5, warm_start=True, align=False
    ),
    **dict(min_dim_size_to_factor=2),
}
SAMPLES_OF = {"muon": {"nesterov": False}}
# The options that these share with gale_adamw are handled by the same builder.
LIKE_GALE_ADAMW = {"gale_muon", "gale_adafactor", "gale_lion", "gale_sgd", "galore"}
CASES = [
    (name, option)
    for name, recipe in optimizers.RECIPES.items()
    for option in recipe.options
    if name not in LIKE_GALE_ADAMW or option not in optimizers.RECIPES["gale_adamw"].options
]


def program(name, **options):
    """The optimizer as text."""
    tx = make(name, **options)
    shapes = {
        "embed": {"embedding": jax.ShapeDtypeStruct((6, 4), jnp.float32)},
        "layers": {"down": {"kernel": jax.ShapeDtypeStruct((2, 8, 6), jnp.float32)}},
    }

    def run(gradients, params):
        return tx.update(gradients, tx.init(params), params)

    return re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(run)(shapes, shapes)))


default_program = functools.cache(program)


@pytest.mark.parametrize("name", optimizers.RECIPES)
def test_the_same_options_make_the_same_program(name):
    # What the next test rests on: programs differ only because their options do.
    assert program(name) == default_program(name)


@pytest.mark.parametrize(("name", "option"), CASES)
def test_every_option_changes_the_program(name, option):
    value = {**SAMPLES, **SAMPLES_OF.get(name, {})}.get(option, 0.01)
    assert program(name, **{option: value}) != default_program(name)
