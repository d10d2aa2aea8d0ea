"""A whole training step: taken layer by layer, and what memory one takes."""

from optax_gale.training.budgets import LargestBatch, largest_batch, parse_bytes
from optax_gale.training.layerwise import Layerwise, LayerwiseMetrics, LayerwiseState, layerwise
from optax_gale.training.memory import StepMemoryReport, step_memory_report
from optax_gale.training.model import LayeredModel
from optax_gale.training.traffic import Collective, TrafficReport, traffic_report
from optax_gale.training.weights import dequantize_weights, quantize_weights

__all__ = [
    "Collective",
    "LargestBatch",
    "LayeredModel",
    "Layerwise",
    "LayerwiseMetrics",
    "LayerwiseState",
    "StepMemoryReport",
    "TrafficReport",
    "dequantize_weights",
    "largest_batch",
    "layerwise",
    "parse_bytes",
    "quantize_weights",
    "step_memory_report",
    "traffic_report",
]
