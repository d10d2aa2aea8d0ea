"""Batches on the device before they are needed."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import jax


class Prefetch:
    """Runs a data iterator in a thread, a few batches ahead.

    The iterator is then ahead of the training, so each batch travels with the state that the
    iterator had right after it: ``position`` belongs to the last batch that was handed out.
    """

    def __init__(self, batches: Any, *, depth: int = 4):
        """Prepares the thread, which starts with the second batch.

        Args:
          batches: an iterator of dictionaries of NumPy arrays, with Grain's ``get_state``.
          depth: how many batches to hold.
        """
        self.position: Any = batches.get_state()
        self._batches: Any = batches  # until the first batch is out
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=self._fill, args=(batches,), name="prefetch", daemon=True
        )

    def _fill(self, batches: Any) -> None:
        try:
            for batch in batches:
                if not self._put((jax.device_put(batch), batches.get_state())):
                    return
            self._put(StopIteration())
        except BaseException as error:  # handed over to the thread that consumes
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[Any]:
        """Itself."""
        return self

    def __next__(self) -> Any:
        """The next batch, on the device."""
        if self._batches is not None:
            # So that no transfer is under way while the first step runs: see the training loop.
            batch = jax.block_until_ready(jax.device_put(next(self._batches)))
            self.position, self._batches = self._batches.get_state(), None
            return batch
        if self._thread.ident is None:
            self._thread.start()
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        batch, self.position = item
        return batch

    def close(self) -> None:
        """Stops the thread."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()
