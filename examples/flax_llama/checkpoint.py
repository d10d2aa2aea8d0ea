"""Checkpoints: everything a run needs to go on as if nothing had happened."""

import errno
import functools
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from examples.flax_llama.config import check_same_run
from examples.flax_llama.errors import UserError
from examples.flax_llama.processes import is_lost, leads
from examples.flax_llama.step import TrainState

_FULL = {errno.ENOSPC: "no space left on the disk", errno.EDQUOT: "the disk quota is used up"}
_FULL[errno.EFBIG] = "the file would be larger than this system allows"
_MOST_CHARACTERS = 200  # of an error of Orbax, which may go on for pages


class Progress(NamedTuple):
    """What a checkpoint holds besides arrays.

    Attributes:
      position: the data iterator's state.
      seconds: time spent training so far.
    """

    position: Any
    seconds: float


class Checkpoints:
    """The checkpoints of one run, in ``folder/checkpoints``.

    A checkpoint appears under its final name only when it is complete, and an old one is deleted
    only after that: whatever happens while saving, the previous one survives. Saving goes on in the
    background; its errors come out of the next call.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, keep: int):
        """Opens the folder and removes what an interrupted save left there.

        Args:
          folder: the run's folder.
          settings: everything that determines the run's numbers, flat, as JSON holds it.
          keep: how many checkpoints to keep.
        """
        _quieten_orbax()
        self._folder = (folder / "checkpoints").absolute()
        self._settings = dict(settings)
        self._saving: int | None = None
        with self._reported("open"):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
            self._manager = ocp.CheckpointManager(
                self._folder,
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(),
                    "run": ocp.JsonCheckpointHandler(),
                },
                options=ocp.CheckpointManagerOptions(max_to_keep=keep),
            )

    @property
    def latest(self) -> int | None:
        """Step of the last complete checkpoint, if there is one."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, progress: Progress) -> None:
        """Starts to save; the arrays may be donated as soon as this returns.

        Raises:
          UserError: if this or the previous checkpoint cannot be written.
        """
        self.wait()
        run = {"settings": self._settings, **progress._asdict()}
        self._saving = step
        with self._reported("write"):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run)
                ),
            )

    def poll(self) -> None:
        """Raises the error of a save that has failed, without waiting for one under way."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is complete.

        Raises:
          UserError: if it cannot be written.
        """
        with self._reported("write"):
            self._manager.wait_until_finished()
        self._saving = None

    def restore(self, like: TrainState) -> tuple[TrainState, Progress]:
        """Reads the last checkpoint.

        Args:
          like: the state to fill, arrays or their shapes.

        Returns:
          The state, and what else the checkpoint holds.

        Raises:
          UserError: if the checkpoint is of another run (what differs is named) or is damaged.
        """
        step = self.latest
        if step is None:
            raise UserError(f"there is no checkpoint in {self._folder}")
        with self._reported("read"):
            run = self._checked(step, like)
            state = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like))
            )["state"]
        return state, Progress(run["position"], run["seconds"])

    def check(self, like: TrainState) -> None:
        """Raises what `restore` would, without reading the arrays; nothing without a checkpoint."""
        if self.latest is not None:
            with self._reported("read"):
                self._checked(self.latest, like)

    def _checked(self, step: int, like: TrainState) -> Any:
        """What a checkpoint holds besides arrays, if it is of this run."""
        run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))[
            "run"
        ]
        stored = f"the checkpoint in {self._folder}"
        check_same_run(stored, self._settings, run["settings"])
        shapes = _shapes(self._manager.item_metadata(step)["state"])
        check_same_run(stored, _shapes(like), shapes)
        return run

    def close(self) -> None:
        """Waits for the last save, and lets go of the folder."""
        self.wait()
        self._manager.close()

    @contextmanager
    def _reported(self, verb: str) -> Iterator[None]:
        """Turns what Orbax and the operating system raise into one line."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if is_lost(error):  # nothing is wrong with the checkpoint
                raise
            if verb == "write":
                # Room for whatever the person does next; the previous checkpoint is untouched.
                self._remove_unfinished()
            raise UserError(self._explain(verb, error)) from error

    def _explain(self, verb: str, error: Exception) -> str:
        what = "checkpoints" if verb == "open" else f"the checkpoint of step {self._saving}"
        if verb == "read":
            what = f"the checkpoint of step {self.latest}"
        text = f"cannot {verb} {what} in {self._folder}: {full_disk(error) or _short(error)}"
        if verb == "write":
            kept = sorted(int(name) for name in os.listdir(self._folder) if name.isdigit())
            if kept:
                text += f". The checkpoint of step {kept[-1]} is intact: make room and run again"
        elif verb == "read":
            text += f". Delete {self._folder / str(self.latest)} to go on from the one before"
        return text

    def _remove_unfinished(self) -> None:
        if not leads():  # what others still write is theirs
            return
        for path in self._folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)


@functools.cache
def _quieten_orbax() -> None:
    """Keeps Orbax from printing tracebacks of what it also raises."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    default = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        # After the first array that cannot be written, the others report to a loop that is gone.
        if str(unraisable.exc_value) != "Event loop is closed":
            default(unraisable)

    sys.unraisablehook = hook


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + "..."


def full_disk(error: Exception) -> str | None:
    """Says in words that a disk is full, if that is what ``error`` means."""
    code = getattr(error, "errno", None)
    in_text = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's errors
    if in_text:
        code = int(in_text[1])
    return _FULL.get(code) if isinstance(code, int) else None


def _shapes(tree: Any) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{tuple(x.shape)} {x.dtype}"
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
