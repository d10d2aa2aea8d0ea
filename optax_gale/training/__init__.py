"""A whole training step: taken layer by layer, and what memory one takes."""

from optax_gale.training.budgets import LargestBatch, largest_batch, parse_bytes
from optax_gale.training.layerwise import Layerwise, LayerwiseMetrics, LayerwiseState, layerwise
from optax_gale.training.memory import StepMemoryReport, step_memory_report
from optax_gale.training.model import LayeredModel

__all__ = [
    "LargestBatch",
    "LayeredModel",
    "Layerwise",
    "LayerwiseMetrics",
    "LayerwiseState",
    "StepMemoryReport",
    "largest_batch",
    "layerwise",
    "parse_bytes",
    "step_memory_report",
]
