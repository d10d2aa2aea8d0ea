"""Batches on the device before they are needed."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax


class Prefetch:
    """Runs a data iterator in a thread, a few batches ahead.

    The iterator is then ahead of the training, so each batch travels with the state that the
    iterator had right after it: ``position`` belongs to the last batch that was handed out.
    """

    def __init__(
        self, batches: Any, *, depth: int = 4, place: Callable[[Any], Any] = jax.device_put
    ):
        """Starts the thread.

        Args:
          batches: an iterator of dictionaries of NumPy arrays, with Grain's ``get_state``.
          depth: how many batches to hold.
          place: puts a batch on the devices.
        """
        self.position: Any = batches.get_state()
        self._place = place
        self._transfer = threading.Lock()
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=self._fill, args=(batches,), name="prefetch", daemon=True
        )
        self._thread.start()

    def _fill(self, batches: Any) -> None:
        try:
            for batch in batches:
                with self._transfer:
                    on_device = jax.block_until_ready(self._place(batch))
                if not self._put((on_device, batches.get_state())):
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
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        batch, self.position = item
        return batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No transfer is under way within this context."""
        with self._transfer:
            yield

    def close(self) -> None:
        """Stops the thread."""
        self._stopped.set()
        self._thread.join()
