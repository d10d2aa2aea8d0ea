"""Where the numbers of a run go: JSON lines, TensorBoard, the terminal."""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from examples.flax_llama.errors import UserError

Record = dict[str, Any]
_PROTO: Any = event_pb2  # made at import: type checkers see nothing in it

# The key that tells the kinds of records apart, and the scalars of each that TensorBoard gets.
_TENSORBOARD = {
    "train": ("loss", "grad_norm", "learning_rate"),
    "speed": ("tokens_per_second", "memory_bytes"),
    "validation": ("loss", "perplexity"),
}


# What of each kind is drawn over the steps.
CURVES = {"train": "loss", "speed": "seconds", "validation": "loss"}


class MetricsLog:
    """Appends records to ``metrics.jsonl`` and to TensorBoard.

    There are three kinds: ``train``, one a step; ``speed``, one a report; ``validation``. Opened
    at a step, it first drops what lies after it: a run that was killed and goes on from a
    checkpoint writes those records again.
    """

    def __init__(self, folder: Path, *, step: int, tensorboard: bool):
        """Opens the files, keeping records up to and including ``step``."""
        self._path = folder / "metrics.jsonl"
        with writing(self._path):
            kept = [r for r in read_records(self._path) if r["step"] <= step]
            replace_text(self._path, "".join(json.dumps(record) + "\n" for record in kept))
            self._file = self._path.open("a")
            self._events = TensorBoard(folder / "tensorboard", step=step) if tensorboard else None

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Adds one record."""
        with writing(self._path):
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            if self._events is not None:
                for key in _TENSORBOARD[kind]:
                    self._events.add(f"{kind}/{key}", values[key], step)

    def flush(self) -> None:
        """Hands everything to the operating system, so that a kill loses nothing."""
        with writing(self._path):
            self._file.flush()
            if self._events is not None:
                self._events.flush()

    def close(self) -> None:
        """Closes the files."""
        with writing(self._path):
            self._file.close()
            if self._events is not None:
                self._events.close()


class NoLog(MetricsLog):
    """Keeps nothing: another process does."""

    def __init__(self) -> None:
        """Opens nothing."""

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class TensorBoard:
    """Writes event files.

    In the calling thread, unlike tensorboardX's own writer: a full disk is then an exception here,
    and not the end of a thread there.
    """

    def __init__(self, folder: Path, *, step: int):
        """Starts a file whose records replace those of earlier files after ``step``."""
        folder.mkdir(exist_ok=True)
        suffix = f".{os.getpid()}.{step}"
        self._writer = EventsWriter(str(folder / "events"), suffix)
        start = _PROTO.SessionLog(status=_PROTO.SessionLog.START)
        self._write(step + 1, session_log=start)

    def add(self, tag: str, value: float, step: int) -> None:
        """Adds a scalar."""
        self._write(step, summary=summary.scalar(tag, value))

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write_event(_PROTO.Event(wall_time=time.time(), step=step, **content))

    def flush(self) -> None:
        """Hands everything to the operating system."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


@contextmanager
def writing(path: Path, option: str = "--out") -> Iterator[None]:
    """Turns what the operating system says about writing ``path`` into a line that names it.

    Args:
      path: the file.
      option: the one that chose it.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; make room, or choose another {option}"
        ) from error


def replace_text(path: Path, text: str) -> None:
    """Writes a file in one step, so that a kill leaves the old one or the new one.

    Raises:
      UserError: if it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        partial.write_text(text)
        os.replace(partial, path)


def read_records(path: Path) -> Iterator[Record]:
    """Reads a metrics file; stops at a last line that a kill left unfinished.

    Raises:
      UserError: at any other line that is not a record.
    """
    if not path.exists():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            record = _parse_record(line)
            if record is None and line.endswith(b"\n"):
                raise UserError(f"{path}, line {number}: not a record of a run; delete the line")
            if record is None:
                return
            yield record


def _parse_record(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
        step, drawn = record["step"], record[CURVES[record["kind"]]]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return record if isinstance(step, int) and isinstance(drawn, (int, float)) else None


def peak_memory() -> int:
    """Peak memory in bytes: the accelerator's where it keeps count, else the process's."""
    stats = device_memory()
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_memory() -> dict[str, int]:
    """What the accelerator's allocator counts: empty where it does not."""
    return jax.local_devices()[0].memory_stats() or {}


def human_bytes(n: float) -> str:
    """``1536`` becomes ``1.50 KiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


class Display:
    """A progress bar on a terminal; a line a report elsewhere."""

    def __init__(self, console: Console, *, steps: int, start: int, bar: bool):
        """Starts at step ``start`` of ``steps``."""
        self._console = console
        self._steps = steps
        self._bar = None
        if bar and console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("", total=steps, completed=start, numbers="")
            self._bar.start()

    def report(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Shows where the training is."""
        numbers = (
            f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {human_bytes(peak_memory())}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        else:
            self._console.print(f"step {step}/{self._steps}  {numbers}")

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self._console.print(line, highlight=False)

    def close(self) -> None:
        """Stops the bar and leaves it on the screen."""
        if self._bar is not None:
            self._bar.stop()
