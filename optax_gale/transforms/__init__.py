"""GALE as Optax gradient transformations."""

from optax_gale.transforms.accumulate import AccumulateState, accumulate
from optax_gale.transforms.aliases import (
    gale_adafactor,
    gale_adamw,
    gale_lion,
    gale_muon,
    gale_sgd,
)
from optax_gale.transforms.apply import refresh_projectors, update_and_apply
from optax_gale.transforms.matrices import GaleDimensionNumbers
from optax_gale.transforms.memory import LeafMemory, MemoryReport, memory_report
from optax_gale.transforms.moments import Rotate
from optax_gale.transforms.muon import (
    ScaleByOrthogonalizedMomentumState,
    scale_by_orthogonalized_momentum,
)
from optax_gale.transforms.partition_specs import state_partition_specs
from optax_gale.transforms.project import GaleProjectWarning, chain, gale_project
from optax_gale.transforms.quantize import QuantizeStatesState, quantize_states
from optax_gale.transforms.range_finders import RangeFinder, Sketch
from optax_gale.transforms.rounding import (
    KahanSummationState,
    StochasticRoundingState,
    kahan_summation,
    stochastic_rounding,
)
from optax_gale.transforms.step import GaleState
from optax_gale.transforms.wrapper import gale

__all__ = [
    "AccumulateState",
    "GaleDimensionNumbers",
    "GaleProjectWarning",
    "GaleState",
    "KahanSummationState",
    "LeafMemory",
    "MemoryReport",
    "QuantizeStatesState",
    "RangeFinder",
    "Rotate",
    "ScaleByOrthogonalizedMomentumState",
    "Sketch",
    "StochasticRoundingState",
    "accumulate",
    "chain",
    "gale",
    "gale_adafactor",
    "gale_adamw",
    "gale_lion",
    "gale_muon",
    "gale_project",
    "gale_sgd",
    "kahan_summation",
    "memory_report",
    "quantize_states",
    "refresh_projectors",
    "scale_by_orthogonalized_momentum",
    "state_partition_specs",
    "stochastic_rounding",
    "update_and_apply",
]
