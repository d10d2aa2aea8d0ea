"""Runs of the example in several processes of this machine, on CPU devices."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Ended(NamedTuple):
    """How a process ended, and what it wrote."""

    status: int
    out: str
    error: str


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Group:
    """The processes of a run; none outlives the ``with`` block."""

    def __init__(
        self,
        count: int,
        program: str,
        words: Sequence[str],
        *,
        devices: int = 1,
        environment: Mapping[str, str] | None = None,
    ):
        """Starts them.

        Args:
          count: how many.
          program: what Python is to run; it finds the command line in ``sys.argv[1:]``.
          words: the command line, without what tells the processes apart.
          devices: of each process.
          environment: further variables.
        """
        variables = {
            **os.environ,
            **(environment or {}),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "PYTHONPATH": str(ROOT),
        }
        group = ["--coordinator", f"localhost:{free_port()}", "--processes", str(count)]
        self._children = [
            subprocess.Popen(
                [sys.executable, "-c", program, *words, *group, "--process-id", str(number)],
                cwd=ROOT,
                env=variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(count)
        ]

    def __enter__(self) -> "Group":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends whoever has not ended."""
        for child in self._children:
            child.kill()
            child.communicate()

    @property
    def running(self) -> bool:
        """Whether none has ended."""
        return all(child.poll() is None for child in self._children)

    def kill(self, number: int) -> None:
        """Ends a process that can do nothing about it."""
        self._children[number].send_signal(signal.SIGKILL)

    def wait(self, seconds: float) -> list[Ended]:
        """Waits until all have ended.

        Raises:
          subprocess.TimeoutExpired: if it takes longer.
        """
        deadline = time.monotonic() + seconds
        ended = []
        for child in self._children:
            out, error = child.communicate(timeout=max(0.1, deadline - time.monotonic()))
            ended.append(Ended(child.returncode, out, error))
        return ended
