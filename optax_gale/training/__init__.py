"""Training steps, for models and not just for gradients."""

from optax_gale.training.layerwise import (
    Layerwise,
    LayerwiseMetrics,
    LayerwiseState,
    layerwise,
)
from optax_gale.training.model import LayeredModel

__all__ = ["LayeredModel", "Layerwise", "LayerwiseMetrics", "LayerwiseState", "layerwise"]
