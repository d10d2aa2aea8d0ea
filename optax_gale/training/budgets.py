"""How much memory there is, and the largest batch that it is enough for."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**i for i, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 1024**i for i, prefix in enumerate("kmgt", start=1)},
}
_AMOUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]*)\s*", re.IGNORECASE)
_FASTEST = 32  # times the batch that fits: how far a straight line through small ones is trusted


class HasPeak(Protocol):
    """Anything with a peak, such as a `StepMemoryReport`."""

    @property
    def peak(self) -> int:
        """Bytes."""


Report = TypeVar("Report", bound=HasPeak)


class LargestBatch(NamedTuple):
    """What `largest_batch` found.

    Attributes:
      size: the batch size; 0 where not even the smallest fits.
      report: of the step with that batch, or with the smallest where none fits; None where the
        compiler ran out of memory over that one.
      tried: the peak of every batch size that was compiled, in bytes; infinite where the compiler
        itself ran out of memory.
    """

    size: int
    report: Any
    tried: dict[int, float]


def parse_bytes(amount: int | float | str) -> int:
    """Reads an amount of memory.

    Args:
      amount: a number of bytes, or a string such as ``"24GiB"`` (24 x 1024^3), ``"24 GB"``
        (24 x 1000^3), ``"512MiB"`` or ``"1.5TB"``.

    Returns:
      Bytes, rounded down.

    Raises:
      ValueError: if it is something else, or not positive.

    Example:
      >>> parse_bytes("1.5KiB"), parse_bytes("1.5 kB"), parse_bytes(1536)
      (1536, 1500, 1536)
    """
    value = math.nan
    if isinstance(amount, str):
        found = _AMOUNT.fullmatch(amount)
        if found and found[2].lower() in _UNITS:
            value = float(found[1]) * _UNITS[found[2].lower()]
    elif isinstance(amount, (int, float, np.number)) and not isinstance(amount, bool):
        value = float(amount)
    if not (math.isfinite(value) and value >= 1):
        raise ValueError(
            "a budget of memory must be a positive number of bytes, or such a number and a unit, "
            f"like '24GiB' (1024^3) or '24GB' (1000^3): got {amount!r}"
        )
    return int(value)


def largest_batch(
    report_of: Callable[[int], Report],
    budget: int | float | str,
    *,
    start: int | None = None,
    multiple: int = 1,
    maximum: int = 2**20,
) -> LargestBatch:
    """Finds the largest batch whose training step fits into a budget of memory.

    Every batch size that is tried is compiled. Memory grows almost in a straight line with it, so
    that a handful suffices: the next one to try is where a line through two peaks meets the budget,
    until a batch fits and the next larger one does not. Both are always compiled.

    Args:
      report_of: the report of a batch size, such as
        ``lambda n: step_memory_report(step, params, opt_state, batch_of(n))``.
      budget: bytes, or a string such as ``"24GiB"`` or ``"24GB"``.
      start: the batch size to try first; by default ``multiple``. A guess saves compilations.
      multiple: batch sizes are multiples of this number.
      maximum: no larger batch is tried.

    Returns:
      The batch size and its report.

    Raises:
      ValueError: if the budget makes no sense, or ``start``, ``multiple`` and ``maximum`` do not.

    Example:
      >>> from types import SimpleNamespace
      >>> largest_batch(lambda n: SimpleNamespace(peak=1000 + 24 * n), "64kB").size
      2625
    """
    limit = parse_bytes(budget)
    start = multiple if start is None else start
    if multiple < 1 or start < 1 or maximum < multiple:
        raise ValueError(
            "`multiple` and `start` must be at least 1, and `maximum` at least `multiple`: got "
            f"multiple={multiple}, start={start}, maximum={maximum}"
        )
    peaks: dict[int, float] = {}  # of multiples, by how many
    reports: dict[int, Report | None] = {}

    def fits(n: int) -> bool:
        reports[n] = _unless_exhausted(lambda: report_of(n * multiple))
        peaks[n] = math.inf if reports[n] is None else reports[n].peak  # type: ignore[union-attr]
        return peaks[n] <= limit

    fitting, failing = 0, maximum // multiple + 1
    n = min(max(start // multiple, 1), failing - 1)
    growth = 1
    while True:
        width = failing - fitting
        if fits(n):
            fitting = n
        else:
            failing = n
        if failing - fitting == 1:
            break
        guess = _meets(limit, peaks, fitting, failing)
        if failing not in peaks:  # all that was tried fits
            growth *= 2  # or a line that is a little too steep would creep
            guess = min(max(guess, fitting + growth), _FASTEST * fitting)
        elif 2 * (failing - fitting) > width and len(peaks) > 4:
            guess = (fitting + failing) // 2  # the line does not help
        n = min(max(guess, fitting + 1), failing - 1)
    return LargestBatch(
        fitting * multiple,
        reports[fitting or 1],
        {n * multiple: peak for n, peak in sorted(peaks.items())},
    )


def _meets(limit: int, peaks: dict[int, float], fitting: int, failing: int) -> int:
    """Where a line through two peaks around the limit, or the two nearest below, meets it."""
    known = sorted(n for n, peak in peaks.items() if math.isfinite(peak))
    around = [n for n in (fitting, failing) if n in known]
    a, b = around if len(around) == 2 else (known[-2:] if len(known) > 1 else (0, 0))
    if a == b or peaks[b] <= peaks[a]:
        return (fitting + failing) // 2 if failing in peaks else 2 * fitting
    return a + math.floor((limit - peaks[a]) * (b - a) / (peaks[b] - peaks[a]))


def _unless_exhausted(make: Callable[[], Report]) -> Report | None:
    try:
        return make()
    except RuntimeError as error:  # the compiler's own trials can run out of memory
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
