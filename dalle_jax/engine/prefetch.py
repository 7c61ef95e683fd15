"""Batches for the devices: checked against the task's batch_spec, read ahead by one thread."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from dalle_jax.engine import sharding
from dalle_jax.engine.program import Program
from dalle_jax.engine.task import Task
from dalle_jax.types import Batch, UsageError


def global_batches(
    batches: Callable[[int], Batch], program: Program, size: int
) -> Callable[[int], Batch]:
    """step -> the global arrays that the task needs, from this process's rows.

    Args:
      batches: step -> this process's rows of the global batch, as host arrays.
      program: its task and its mesh.
      size: number of examples in the global batch.
    """
    rows = len(sharding.local_rows(program.mesh, size))

    def read(step: int) -> Batch:
        batch = check(batches(step), program.task, rows)
        return sharding.to_global(batch, program.batch_sharding)

    return read


def check(batch: Batch, task: Task, rows: int) -> Batch:
    """The arrays of `task.batch_spec`, after comparing shapes and dtypes.

    Args:
      batch: this process's rows of the global batch.
      task: the task that will read them.
      rows: the expected number of rows.

    Raises:
      UsageError: where data and task disagree.
    """
    for name, spec in task.batch_spec.items():
        if name not in batch:
            raise UsageError(
                f"task {task.name} needs {name!r} in its batches; the data gives "
                f"{', '.join(sorted(batch))}."
            )
        value, shape = np.asarray(batch[name]), (rows, *spec.shape[1:])
        if value.shape != shape or value.dtype != spec.dtype:
            raise UsageError(
                f"task {task.name} expects {name} {shape} {spec.dtype}; the data gives "
                f"{value.shape} {value.dtype}. Compare data.image_px, data.text_len and data.batch "
                "of this config with those of the prepared set."
            )
    return {name: batch[name] for name in task.batch_spec}


class Prefetch:
    """Reads items ahead in one thread; iterating yields (i, read(i)) in order."""

    def __init__(self, read: Callable[[int], Any], indices: Iterable[int], depth: int):
        self._queue: queue.Queue = queue.Queue(maxsize=max(1, depth))
        self._closed, self._arrived = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._work, args=(read, indices), name="prefetch", daemon=True
        )

    def __enter__(self) -> "Prefetch":
        self._thread.start()
        return self

    def wait(self) -> None:
        """Returns when the first item has been read; raises the error that reading it raised."""
        self._arrived.wait()
        if self._error is not None:
            raise self._error

    def __exit__(self, *_: Any) -> None:
        self._closed.set()
        self._thread.join()

    def _work(self, read: Callable[[int], Any], indices: Iterable[int]) -> None:
        try:
            for i in indices:
                self._put((i, read(i), None))
                if self._closed.is_set():
                    return
            self._put((None, None, None))
        except BaseException as error:  # raised again in the loop's thread
            self._error = error
            self._put((None, None, error))

    def _put(self, item: tuple) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return self._arrived.set()
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        while True:
            i, item, error = self._queue.get()
            if error is not None:
                raise error
            if i is None:
                return
            yield i, item
