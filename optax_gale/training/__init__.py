"""A whole training step."""

from optax_gale.training.budgets import LargestBatch, largest_batch, parse_bytes
from optax_gale.training.memory import StepMemoryReport, step_memory_report

__all__ = ["LargestBatch", "StepMemoryReport", "largest_batch", "parse_bytes", "step_memory_report"]
