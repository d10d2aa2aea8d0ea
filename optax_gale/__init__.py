"""optax_gale: train every weight while the optimizer keeps its moments in a low-rank subspace."""

from optax_gale import linalg
from optax_gale.transforms import (
    GaleDimensionNumbers,
    GaleProjectWarning,
    GaleState,
    LeafMemory,
    MemoryReport,
    RangeFinder,
    Rotate,
    ScaleByOrthogonalizedMomentumState,
    Sketch,
    chain,
    gale,
    gale_adafactor,
    gale_adamw,
    gale_lion,
    gale_muon,
    gale_project,
    gale_sgd,
    memory_report,
    scale_by_orthogonalized_momentum,
    state_partition_specs,
    update_and_apply,
)

__version__ = "0.1.0"

__all__ = [
    "GaleDimensionNumbers",
    "GaleProjectWarning",
    "GaleState",
    "LeafMemory",
    "MemoryReport",
    "RangeFinder",
    "Rotate",
    "ScaleByOrthogonalizedMomentumState",
    "Sketch",
    "chain",
    "gale",
    "gale_adafactor",
    "gale_adamw",
    "gale_lion",
    "gale_muon",
    "gale_project",
    "gale_sgd",
    "linalg",
    "memory_report",
    "scale_by_orthogonalized_momentum",
    "state_partition_specs",
    "update_and_apply",
]
