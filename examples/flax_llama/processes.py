"""Training in several processes: how they find each other, who speaks, and how they end."""

import atexit
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from examples.flax_llama.config import DeviceOptions
from examples.flax_llama.errors import LostError, UserError

# What JAX, Gloo and NCCL say when nobody answers any more.
_LOST = re.compile(
    r"gloo|nccl|closed by peer|reset by peer|coordination service|barrier (timed out|has failed)"
    r"|unavailable|deadline_exceeded|aborted:",
    re.IGNORECASE,
)
_THREADS = 32  # enough for a handful of simulated devices a process
_FAREWELL = 120  # seconds: the first process draws and writes when the others have done their work

_AGAIN = "Start all of them again: they go on from the last checkpoint"
_last_words: subprocess.Popen[bytes] | None = None


def start(options: DeviceOptions) -> None:
    """Connects this process with the others; nothing else of JAX may have run before.

    Raises:
      UserError: if an option makes no sense, or they do not find each other.
    """
    options.check()
    sizes = options.axes() or {}
    # As many devices of a CPU as the pool has threads would all wait in LAPACK for another thread.
    threads = max(os.cpu_count() or 1, _THREADS, 4 * math.prod(sizes.values()))
    os.environ.setdefault("NPROC", str(threads))
    if options.coordinator is None:
        return
    _leave_last_words(options)
    detected = options.coordinator == "auto"
    try:
        jax.distributed.initialize(
            None if detected else options.coordinator,
            num_processes=options.processes,
            process_id=options.process_id,
            # Or it would look for a cluster to learn which devices are this process's: all.
            cluster_detection_method=None if detected else "deactivate",
            heartbeat_timeout_seconds=options.lost_after,
            shutdown_timeout_seconds=_FAREWELL,
        )
    except (RuntimeError, ValueError) as error:
        # A value is wrong for good; a process that does not answer may only be late.
        kind = UserError if isinstance(error, ValueError) else LostError
        raise kind(
            f"--coordinator {options.coordinator}: the processes do not find each other "
            f"({_first_line(error)})"
        ) from error


def leads() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def meet(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(settings: Mapping[str, Any]) -> None:
    """Finds out whether all processes were started alike: others would wait for each other.

    Raises:
      UserError: if they were not.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(settings, sort_keys=True, default=str)
    digest = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), np.uint32)
    everybody = np.asarray(multihost_utils.process_allgather(digest))
    different = [i for i, x in enumerate(everybody) if (x != everybody[0]).any()]
    if different:
        raise UserError(
            f"process {different[0]} has other options or other data than process 0: start all "
            "with the same command, but for --process-id, and the same data"
        )


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    text = str(error)
    return (
        jax.process_count() > 1
        and "RESOURCE_EXHAUSTED" not in text
        and _LOST.search(text) is not None
    )


@contextmanager
def explained() -> Iterator[None]:
    """Tells, in the place of what JAX raises when a process is gone, what to do about it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # JAX's, or Orbax's around them
        if not is_lost(error):
            raise
        raise LostError(
            f"process {jax.process_index()} of {jax.process_count()} has lost the others: one of "
            f"them has ended. {_AGAIN} ({_first_line(error)})"
        ) from error


def _leave_last_words(options: DeviceOptions) -> None:
    """Has somebody else say it if this process ends without a word of its own.

    JAX aborts processes whose heartbeats find another one gone, with a page of addresses that no
    handler here could add to. A shell waits for the end of a pipe that only this process holds.
    """
    global _last_words
    who = "" if options.process_id is None else f" {options.process_id} of {options.processes}"
    line = f"error: process{who} was ended from outside, or has lost another one. {_AGAIN}."
    script = 'read -r word; [ -n "$word" ] || echo "$0" >&2'
    _last_words = subprocess.Popen(["sh", "-c", script, line], stdin=subprocess.PIPE)
    atexit.register(_take_leave)


def _take_leave() -> None:
    # The others may be at work still, or end, while this one waits for them.
    jax.distributed.shutdown()
    _need_no_last_words()


def _need_no_last_words() -> None:
    global _last_words
    if _last_words is not None and _last_words.stdin is not None:
        with suppress(BrokenPipeError):
            _last_words.stdin.write(b"done\n")
            _last_words.stdin.close()
        _last_words.wait()
    _last_words = None


def leave(status: int) -> None:
    """Ends this process, whose work has failed, at once: the others would be waited for."""
    _need_no_last_words()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
