"""The optimizers that can be trained with: one table of builders and defaults."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

import optax_gale
from examples.flax_llama.config import OptimizerOptions, TrainingOptions
from examples.flax_llama.errors import UserError, flag
from examples.flax_llama.sizes import SIZES, LlamaSize

Settings = Mapping[str, Any]
Schedule = Callable[[float], optax.Schedule]
Builder = Callable[[Settings, Schedule], optax.GradientTransformation]

DATA = "data"  # the mesh axis along which devices have other sequences and the same weights

# Without devices that average, `average_dtype` has no effect: there is no option for it.
_SKETCH = tuple(
    field.name for field in dataclasses.fields(optax_gale.Sketch) if field.name != "average_dtype"
)
_RATES = ("learning_rate", "adam_learning_rate")
_NOT_NEGATIVE = ("eps", "adam_eps", "eps_root", "weight_decay", "min_dim_size_to_factor")
_MOST_NS_STEPS = 100  # a handful does
_DECAYS = ("b1", "b2", "adam_b1", "adam_b2", "beta", "momentum")


class Recipe(NamedTuple):
    """An optimizer of the table.

    Attributes:
      build: makes it from its settings and the shape of the schedule.
      options: the options that it has.
      defaults: what this script chooses; the rest is up to the library.
      takes_refresh: whether its ``update`` lets the host choose the steps that refresh.
    """

    build: Builder
    options: tuple[str, ...]
    defaults: Settings
    takes_refresh: bool = False


def _options(*functions: Callable[..., Any], fixed: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The command line's options that are parameters of ``functions``, except the fixed ones."""
    parameters = {name for f in functions for name in inspect.signature(f).parameters}
    if "range_finder" in parameters - {*fixed}:
        parameters |= {*_SKETCH, "projection_seed"}
    names = (field.name for field in dataclasses.fields(OptimizerOptions))
    return tuple(name for name in names if name in parameters and name not in fixed)


# Full rank ----------------------------------------------------------------------------------------


def _plain(alias: Callable[..., Any], defaults: Settings, **fixed: Any) -> Recipe:
    """A recipe for one of Optax's aliases; ``fixed`` are arguments that are not options."""

    def build(s: Settings, schedule: Schedule) -> optax.GradientTransformation:
        return alias(**_scheduled(s, schedule), **_decay_mask(alias), **fixed)

    return Recipe(build, _options(alias), defaults)


def _muon(s: Settings, schedule: Schedule) -> optax.GradientTransformation:
    def dimension_numbers(params: Any) -> Any:
        # The axis not named, of the layers, is a batch axis.
        matrix = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
        return jax.tree_util.tree_map_with_path(
            lambda path, _: matrix if is_hidden_matrix(path) else None, params
        )

    def muon(weight_decay: float) -> optax.GradientTransformation:
        settings = {**_scheduled(s, schedule), "weight_decay": weight_decay}
        return optax.contrib.muon(
            **settings,
            muon_weight_dimension_numbers=dimension_numbers,
            adam_weight_decay=weight_decay,
        )

    # Its mask covers the matrices only, not what its Adam trains.
    return optax.partition({True: muon(s["weight_decay"]), False: muon(0.0)}, decayed)


# Low rank -----------------------------------------------------------------------------------------


def _low_rank(alias: Callable[..., Any], defaults: Settings, **fixed: Any) -> Recipe:
    """A recipe for one of the library's aliases; ``fixed`` are options that define the method."""

    def build(s: Settings, schedule: Schedule) -> optax.GradientTransformation:
        options = {k: v for k, v in _scheduled(s, schedule).items() if k not in _SKETCH}
        if "projection_seed" in options:
            options["seed"] = options.pop("projection_seed")
        if options.get("residual") == "none":
            options["residual"] = None
        sketch = {k: s[k] for k in _SKETCH if k in s}
        if sketch:
            if s.get("range_finder", "gale") != "gale":
                raise UserError(
                    f"{flag(next(iter(sketch)))} is an option of the range finder 'gale', not of "
                    f"'{s['range_finder']}'; leave --range-finder out"
                )
            options["range_finder"] = optax_gale.Sketch(**sketch)
        return alias(**options, **_decay_mask(alias), **fixed)

    return Recipe(build, _options(alias, fixed=tuple(fixed)), defaults, takes_refresh=True)


def _optax_galore(s: Settings, schedule: Schedule) -> optax.GradientTransformation:
    """``optax.contrib.galore`` on the weights that GALE projects, AdamW on the others.

    Left to itself it would project the embeddings and the head, and leave stacked layers, which
    have three axes, at full rank: the comparison would be one of selections, not of methods.
    """
    settings = _scheduled(s, schedule)
    adam = {k: settings.pop(k) for k in ("b1", "b2", "eps", "eps_root") if k in settings}
    galore = optax.contrib.galore(**settings, base_optimizer=optax.scale_by_adam(**adam))
    others = optax.adamw(
        settings["learning_rate"], weight_decay=s["weight_decay"], mask=decayed, **adam
    )

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "projected" if is_hidden_matrix(path) else "full rank", params
        )

    return optax.partition({"projected": per_layer(galore), "full rank": others}, labels)


def per_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Gives ``tx`` every matrix of a stack ``(layers, in, out)`` as a parameter of its own."""

    def unstack(tree: Any) -> Any:
        return jax.tree.map(lambda x: [x[i] for i in range(x.shape[0])], tree)

    def stack(tree: Any) -> Any:
        return jax.tree.map(jnp.stack, tree, is_leaf=lambda x: isinstance(x, list))

    def init(params: Any) -> Any:
        return tx.init(unstack(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        params = None if params is None else unstack(params)
        updates, state = tx.update(unstack(updates), state, params)
        return stack(updates), state

    return optax.GradientTransformation(init, update)


# What builders share ------------------------------------------------------------------------------


def _scheduled(s: Settings, schedule: Schedule) -> dict[str, Any]:
    """The settings, with schedules in the place of learning rates."""
    return {k: schedule(v) if k in _RATES else v for k, v in s.items()}


def _decay_mask(alias: Callable[..., Any]) -> dict[str, Any]:
    return {"mask": decayed} if "mask" in inspect.signature(alias).parameters else {}


def _keys(path: Any) -> list[str]:
    # A parameter may lie in a box, whose field is no part of its name.
    return [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]


def decayed(params: Any) -> Any:
    """Which parameters decay: all but the norms' scales."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _keys(path)[-1] != "scale", params)


def is_hidden_matrix(path: Any) -> bool:
    """Whether a parameter is a stack of attention or MLP matrices ``(layers, in, out)``."""
    keys = _keys(path)
    return "layers" in keys and keys[-1] == "kernel"


# The table ----------------------------------------------------------------------------------------

_NO_DECAY = {"weight_decay": 0.0}
_GALORE = {"scale": 0.25}
_MUON = {"learning_rate": 0.02, "adam_learning_rate": 5e-3, **_NO_DECAY}

RECIPES: dict[str, Recipe] = {
    "adamw": _plain(optax.adamw, {"learning_rate": 2e-3, **_NO_DECAY}),
    "sgd": _plain(optax.sgd, {"learning_rate": 0.5, "momentum": 0.9}),
    "lion": _plain(optax.lion, {"learning_rate": 5e-4, **_NO_DECAY}),
    # Without the parameter scale, as GaLore runs it, so that learning rates compare.
    "adafactor": _plain(
        optax.adafactor, {"learning_rate": 5e-3}, multiply_by_parameter_scale=False
    ),
    "muon": Recipe(_muon, _options(optax.contrib.muon), _MUON),
    "gale_adamw": _low_rank(optax_gale.gale_adamw, {"learning_rate": 0.01, **_NO_DECAY, **_GALORE}),
    "gale_muon": _low_rank(optax_gale.gale_muon, _MUON),
    "gale_adafactor": _low_rank(
        optax_gale.gale_adafactor, {"learning_rate": 0.01, **_NO_DECAY, **_GALORE}
    ),
    "gale_lion": _low_rank(optax_gale.gale_lion, {"learning_rate": 2e-3, **_NO_DECAY, **_GALORE}),
    "gale_sgd": _low_rank(optax_gale.gale_sgd, {"learning_rate": 0.5, **_NO_DECAY}),
    "galore": _low_rank(
        optax_gale.gale_adamw,
        {"learning_rate": 0.01, **_NO_DECAY, **_GALORE},
        range_finder="svd",
        side="short",
        moments="keep",
        residual=None,
    ),
    "optax_galore": Recipe(
        _optax_galore,
        _options(optax.contrib.galore, optax.scale_by_adam, fixed=("mu_dtype", "nesterov")),
        {"learning_rate": 0.01, **_NO_DECAY, **_GALORE},
    ),
}


def table() -> str:
    """The optimizers and their defaults, one a line."""
    width = max(map(len, RECIPES))
    return "\n".join(
        f"{name:{width}}  " + ", ".join(f"{k}={v:g}" for k, v in recipe.defaults.items())
        for name, recipe in RECIPES.items()
    )


# From options to a transformation -----------------------------------------------------------------


def recipe_of(name: str) -> Recipe:
    """Looks an optimizer up.

    Raises:
      UserError: if there is none of that name.
    """
    if name not in RECIPES:
        raise UserError(f"unknown optimizer '{name}'; choose from {', '.join(RECIPES)}")
    return RECIPES[name]


def check_options(name: str, keys: Iterable[str]) -> None:
    """Refuses the first of ``keys`` that is not an option of the optimizer."""
    options = recipe_of(name).options
    for key in keys:
        if key not in options:
            raise UserError(
                f"{flag(key)} is not an option of {name}, which has {', '.join(map(flag, options))}"
            )


def narrowed(options: OptimizerOptions, names: Sequence[str]) -> list[OptimizerOptions]:
    """Splits options meant for several optimizers: each gets those that it has.

    Raises:
      UserError: if an option belongs to none of them.
    """
    given = options.given()
    for key in given:
        if not any(key in recipe_of(name).options for name in names):
            raise UserError(f"{flag(key)} is not an option of {', '.join(names)}")
    return [
        OptimizerOptions(**{k: v for k, v in given.items() if k in recipe_of(name).options})
        for name in names
    ]


def resolve(name: str, options: OptimizerOptions, size: LlamaSize, steps: int) -> dict[str, Any]:
    """Fills an optimizer's defaults in.

    Args:
      name: a name of the table.
      options: what was asked for.
      size: the model, whose width decides the default rank and side.
      steps: length of the training, in which there are at least four refreshes by default.

    Returns:
      The settings that `build` takes.

    Raises:
      UserError: if the optimizer is unknown, does not have an option that was set, or a value makes
        no sense.
    """
    recipe = recipe_of(name)
    given = options.given()
    check_options(name, given)
    settings = {**recipe.defaults, **given}
    if "rank" in recipe.options:
        settings.setdefault("rank", size.hidden // 4)
        settings.setdefault("update_proj_gap", max(1, min(200, steps // 4)))
    if "side" in recipe.options and size.hidden <= SIZES["tiny"].hidden:
        settings.setdefault("side", "long")  # trains better there: docs/measurements.md
    _check(settings, size)
    return settings


def _check(settings: Settings, size: LlamaSize) -> None:
    for key in _RATES:
        if key in settings and not 0 < settings[key] < float("inf"):
            raise UserError(f"{flag(key)} must be a positive number, got {settings[key]}")
    for key, value in settings.items():
        if isinstance(value, float) and not -float("inf") < value < float("inf"):
            raise UserError(f"{flag(key)} must be a finite number, got {value}")
        if isinstance(value, int) and abs(value) >= 2**31:
            raise UserError(f"{flag(key)} must be less than 2**31, got {value}")
    for key in _DECAYS:
        if not 0 <= settings.get(key, 0) < 1:
            raise UserError(f"{flag(key)} must be at least 0 and less than 1, got {settings[key]}")
    for key in _NOT_NEGATIVE:
        if settings.get(key, 0) < 0:
            raise UserError(f"{flag(key)} must be 0 or more, got {settings[key]}")
    if not 1 <= settings.get("ns_steps", 1) <= _MOST_NS_STEPS:
        raise UserError(
            f"--ns-steps must be from 1 to {_MOST_NS_STEPS}, got {settings['ns_steps']}"
        )
    if not 0 < settings.get("decay_rate", 0.8) < 1:
        raise UserError(
            f"--decay-rate must be more than 0 and less than 1, got {settings['decay_rate']}"
        )
    if settings.get("scale", 1) <= 0:
        raise UserError(f"--scale must be a positive number, got {settings['scale']}")
    if settings.get("update_proj_gap", 1) < 1:
        raise UserError(f"--update-proj-gap must be at least 1, got {settings['update_proj_gap']}")
    if settings.get("clipping_threshold", 1.0) <= 0:
        raise UserError(
            f"--clipping-threshold must be a positive number, got {settings['clipping_threshold']}"
        )
    if settings.get("projection_seed", 0) < 0:
        raise UserError(f"--projection-seed must be 0 or more, got {settings['projection_seed']}")
    if settings.get("rank", 1) < 1:
        raise UserError(f"--rank must be at least 1, got {settings['rank']}")
    if settings.get("rank", 1) > size.hidden:
        raise UserError(
            f"--rank {settings['rank']} is more than the shorter side of every weight matrix "
            f"(at most {size.hidden}): nothing would be projected; choose a smaller rank"
        )


def build(
    name: str, settings: Settings, training: TrainingOptions
) -> optax.GradientTransformationExtraArgs:
    """Makes an optimizer: clipping, the transformation with its schedule, rounding, accumulation.

    Args:
      name: a name of the table.
      settings: what `resolve` returned.
      training: number of steps, warm-up, clipping.

    Returns:
      The transformation. Its ``update`` takes ``refresh=`` if the table says so.

    Raises:
      UserError: if the library refuses a setting, or the host cannot choose the refreshes.
    """
    recipe = RECIPES[name]
    if training.host_refresh:
        if not recipe.takes_refresh:
            raise UserError(f"--host-refresh: {name} does not let the host choose its refreshes")
        if settings.get("refresh_schedule", "together") != "together":
            raise UserError("--host-refresh goes with --refresh-schedule together only")
    if training.average == "projections":
        if not recipe.takes_refresh:
            raise UserError(f"--average projections: {name} projects nothing, or cannot do so")
        settings = {**settings, "axis_name": DATA}
    with refusals(name):
        tx = recipe.build(settings, functools.partial(schedule, training=training))
    clips = training.clip_norm and not training.layerwise  # which needs no norm but the step's own
    clip = optax.clip_by_global_norm(training.clip_norm) if clips else optax.identity()
    tx = _rounded(optax_gale.chain(clip, tx), training)
    sums = training.micro_batches > 1 and not training.layerwise
    return optax_gale.accumulate(tx, training.micro_batches) if sums else tx


def _rounded(
    tx: optax.GradientTransformationExtraArgs, training: TrainingOptions
) -> optax.GradientTransformationExtraArgs:
    if training.rounding == "stochastic":
        return optax_gale.stochastic_rounding(tx, seed=training.seed)
    return optax_gale.kahan_summation(tx) if training.rounding == "kahan" else tx


@contextmanager
def refusals(name: str) -> Iterator[None]:
    """Turns what an optimizer raises, when it is made or sees the weights, into one line."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UserError(f"{name}: {error}") from error


def schedule(peak: float, training: TrainingOptions) -> optax.Schedule:
    """Linear warm-up to ``peak``, then a cosine to its ``final_lr_fraction``."""
    warmup = min(round(training.warmup_fraction * training.steps), training.steps - 1)
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / max(warmup, 1),
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=training.steps,
        end_value=peak * training.final_lr_fraction,
    )
