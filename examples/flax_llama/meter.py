"""Turning what the device computes into records, without making it wait."""

import math
import time

import jax

from examples.flax_llama.errors import UserError
from examples.flax_llama.metrics import Display, MetricsLog, peak_memory
from examples.flax_llama.step import Metrics


class DivergedError(UserError):
    """The loss or the gradients are no longer finite."""


class Meter:
    """Collects the metrics of single steps, and the time they take.

    Metrics stay on the device until a report, which fetches them all at once. The clock stands
    still during validation and saving.
    """

    def __init__(
        self, log: MetricsLog, display: Display, *, step: int, tokens_per_step: int, seconds: float
    ):
        """Starts at ``step``, after ``seconds`` of training; the clock is not running yet."""
        self._log = log
        self._display = display
        self._tokens_per_step = tokens_per_step
        self._pending: list[Metrics] = []
        self._reported = step
        self._seconds = seconds
        self._since = math.nan

    @property
    def seconds(self) -> float:
        """Training time up to the last report."""
        return self._seconds

    def run(self) -> None:
        """Starts the clock, or starts it again."""
        self._since = time.perf_counter()

    def add(self, metrics: Metrics) -> None:
        """Takes the metrics of the next step; does not wait for them."""
        self._pending.append(metrics)

    def report(self, *, leave: int = 0) -> None:
        """Fetches metrics, and writes and shows them.

        Args:
          leave: how many of the latest steps to leave for the next report. With one left, the
            device works on it while the others are written.

        Raises:
          DivergedError: at the first loss or gradient norm that is not finite.
        """
        count = len(self._pending) - leave
        if count <= 0:
            return
        fetched = jax.device_get(self._pending[:count])
        now = time.perf_counter()
        del self._pending[:count]
        for step, metrics in enumerate(fetched, start=self._reported + 1):
            values = {key: float(value) for key, value in metrics.items()}
            if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
                raise DivergedError(
                    f"diverged: loss {values['loss']:.4g}, gradient norm "
                    f"{values['grad_norm']:.4g} at step {step}; lower --learning-rate"
                )
            self._log.write("train", step, values)
        speed = count * self._tokens_per_step / (now - self._since)
        self._seconds += now - self._since
        self._since = now
        self._reported += count
        self._log.write(
            "speed",
            self._reported,
            {
                "seconds": self._seconds,
                "tokens_per_second": speed,
                "memory_bytes": peak_memory(),
            },
        )
        self._log.flush()
        self._display.report(self._reported, float(fetched[-1]["loss"]), speed)
