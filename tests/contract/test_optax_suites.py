"""Optax's own tests for contributed optimizers and for GaLore, pointed at this library.

They ship inside the installed Optax. Their tables are spread into test methods when the class
statement runs, so that statement is run again here, with other names in its globals.
"""

import ast
import functools
import importlib
import inspect
import re
import unittest
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_gale

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _pointed_here(
    module_name: str, class_name: str, *, without: str = "(?!)", **replacements: Any
) -> type:
    """A test class of Optax's whose module has ``replacements`` among its globals.

    Tests whose name ``without`` matches are left out.
    """
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        message = f"Optax {optax.__version__} does not ship {module_name}: {error}"

        @pytest.mark.skip(reason=message)
        class Missing(unittest.TestCase):
            def test_suite(self):
                raise AssertionError(message)

        return Missing
    statements = ast.parse(inspect.getsource(module)).body
    is_suite = lambda node: isinstance(node, ast.ClassDef) and node.name == class_name
    code = ast.Module([node for node in statements if is_suite(node)], type_ignores=[])
    unknown = set(replacements) - set(vars(module))
    assert code.body and not unknown, f"{module_name} no longer has {class_name} or {unknown}"
    namespace = {**vars(module), **replacements, "__name__": __name__}
    exec(compile(code, str(module.__file__), "exec"), namespace)
    suite = namespace[class_name]
    for name in [name for name in dir(suite) if re.match(without, name)]:
        delattr(suite, name)
    return suite


def _gale_of_lion(
    learning_rate: optax.ScalarOrSchedule, rank=8, update_proj_gap=200, range_finder="gale"
):
    return optax_gale.gale(
        optax.lion(learning_rate), rank, update_proj_gap=update_proj_gap, range_finder=range_finder
    )


def _chain(
    learning_rate: optax.ScalarOrSchedule,
    rank=8,
    update_proj_gap=200,
    range_finder="gale",
    moments="keep",
    residual=None,
):
    return optax_gale.chain(
        optax.clip_by_global_norm(1e6),
        optax_gale.gale_project(
            rank,
            update_proj_gap=update_proj_gap,
            range_finder=range_finder,
            moments=moments,
            residual=residual,
        ),
        optax.scale_by_adam(),
        optax.add_decayed_weights(1e-4),
        optax.scale_by_learning_rate(learning_rate),
    )


def _gale_adafactor(
    learning_rate: optax.ScalarOrSchedule, rank=8, update_proj_gap=200, range_finder="gale"
):
    # Without `min_dim_size_to_factor` in the signature: Optax's own tests of `optax.adafactor`
    # name it static under `inject_hyperparams`, the contrib suite cannot.
    return optax_gale.gale_adafactor(
        learning_rate, rank, update_proj_gap=update_proj_gap, range_finder=range_finder
    )


def _quantised(learning_rate: optax.ScalarOrSchedule):
    return optax_gale.quantize_states(optax.adamw(learning_rate), min_size=0)


def _gale_quantised(
    learning_rate: optax.ScalarOrSchedule, rank=8, update_proj_gap=200, range_finder="gale"
):
    return optax_gale.gale(
        _quantised(learning_rate),
        rank,
        update_proj_gap=update_proj_gap,
        range_finder=range_finder,
        projector_dtype="int8",
    )


_FACTORIES = {
    "gale_adamw": optax_gale.gale_adamw,
    "gale_muon": optax_gale.gale_muon,
    "gale_adafactor": _gale_adafactor,
    "gale_lion": optax_gale.gale_lion,
    "gale_sgd": optax_gale.gale_sgd,
    "gale_of_lion": _gale_of_lion,
    "chain": _chain,
    "quantised": _quantised,
    "gale_quantised": _gale_quantised,
}


def _entry(name: str, learning_rate: float, **options: Any) -> dict[str, Any]:
    """A row of Optax's tables."""
    return {
        "opt_name": name,
        "opt_kwargs": {"learning_rate": learning_rate, **options},
        "wrapper_name": None,
        "wrapper_kwargs": None,
    }


def _compiled(name: str):
    """A factory whose `update` is compiled: some of Optax's tests run eagerly, where JAX compiles
    every conditional anew at every call."""
    factory = _FACTORIES[name]

    @functools.wraps(factory)
    def make(*args, **kwargs):
        tx = factory(*args, **kwargs)
        return optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update))

    return make


def _contrib_suite(table: tuple[dict[str, Any], ...], **replacements: Any) -> type:
    return _pointed_here(
        "optax.contrib._common_test",
        "ContribTest",
        _ALL_OPTIMIZERS_UNDER_TEST=table,
        _MAIN_OPTIMIZERS_UNDER_TEST=table,
        _get_opt_factory=_compiled,
        **replacements,
    )


# As Optax tests its own GaLore: a rank larger than any side, so everything stays at full rank.
ContribSuiteAtFullRank = pytest.mark.slow(
    _contrib_suite(
        (
            _entry("gale_adamw", 1e-2, rank=8),
            _entry("gale_muon", 1e-2, rank=8),
            _entry("gale_adafactor", 1e-2, rank=8),
            _entry("gale_lion", 1e-3, rank=8),
            _entry("gale_sgd", 1e-4, rank=8),
            _entry("quantised", 1e-2),
        )
    )
)


def _parabola(*shapes: tuple[int, ...]):
    """A quadratic target with parameters of the given shapes, made like Optax's own."""

    def setup(dtype):
        initial = [jnp.zeros(shape, dtype) for shape in shapes]
        keys = jax.random.split(jax.random.key(0), len(shapes))
        final = [
            2 * jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)
        ]

        def objective(params):
            return sum(jnp.sum((p - q) ** 2) for p, q in zip(params, final, strict=True))

        return initial, final, objective

    return setup


# The same suite where the subspace is half of the space or less, it changes all the time, and every
# target has a matrix.
_at = {"rank": 1, "update_proj_gap": 3}
ContribSuiteInSubspaces = _contrib_suite(
    (
        _entry("gale_adamw", 1e-3, **_at, moments="rotate"),
        _entry("gale_muon", 1e-3, **_at, range_finder="svd"),
        _entry("gale_of_lion", 1e-3, **_at, range_finder="svd"),
        _entry("gale_lion", 1e-3, **_at, range_finder="svd", moments="keep"),
        _entry("gale_sgd", 1e-4, **_at, range_finder="svd"),
        _entry("gale_adafactor", 1e-2, **_at, range_finder="svd"),
        _entry("chain", 1e-3, **_at, range_finder="svd", moments="rotate", residual="fira"),
        _entry("gale_quantised", 1e-2, **_at, range_finder="svd"),
    ),
    # They have vectors only, or compile for long what `test_factories` asks more cheaply.
    without="test_preserve_dtype|test_gradient_accumulation|test_state_shape_dtype"
    "|test_optimizers_accept_learning_rate_schedule",
    _setup_parabola=_parabola((2, 2)),
    _setup_rosenbrock=_parabola((2, 2, 3), (3,)),
)


class _GaLoreState(NamedTuple):
    """Our state, with the names of Optax's."""

    gale: optax_gale.GaleState

    @property
    def projector(self):
        return self.gale.projector

    @property
    def base_optimizer_state(self):
        return self.gale.inner_state[0]


def _galore_of(range_finder: str):
    """What `optax.contrib._galore` is to its tests, made of this library."""

    def galore(
        learning_rate,
        rank=128,
        update_proj_gap=200,
        scale=1.0,
        base_optimizer=None,
        weight_dimension_numbers=None,
    ):
        # Compiled: eagerly, JAX compiles a conditional anew at every call.
        tx = optax_gale.gale(
            optax.chain(
                optax.scale_by_adam() if base_optimizer is None else base_optimizer,
                optax.scale_by_learning_rate(learning_rate),
            ),
            # Ours keeps a matrix smaller than the rank at full rank; Optax's clips the rank.
            lambda path, leaf: min(rank, *leaf.shape) if len(leaf.shape) == 2 else rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            side="long",
            moments="keep",
            range_finder=range_finder,
            weight_dimension_numbers=weight_dimension_numbers,
        )
        compiled = jax.jit(tx.update)

        def init(params):
            return (_GaLoreState(tx.init(params)),)

        def update(updates, state, params=None, **extra_args):
            updates, gale_state = compiled(updates, state[0].gale, params, **extra_args)
            return updates, (_GaLoreState(gale_state),)

        return optax.GradientTransformationExtraArgs(init, update)

    class Module:
        GaLoreState = _GaLoreState
        GaLoreDimensionNumbers = optax.contrib.GaLoreDimensionNumbers

    Module.galore = staticmethod(galore)
    return Module


GaLoreSuiteWithSvd = _pointed_here(
    "optax.contrib._galore_test", "GaLoreTest", _galore=_galore_of("svd")
)
GaLoreSuiteWithSketch = pytest.mark.slow(
    _pointed_here(
        "optax.contrib._galore_test",
        "GaLoreTest",
        without="test_(?!.*(projector|converge))",
        _galore=_galore_of("gale"),
    )
)
