"""Early ends of a run: a signal asks for one, or a step never ends.

`Stop` turns SIGTERM, SIGINT and preemption notices into "save after this step and exit", the same
step on all processes. `Watchdog` ends a job of several processes when one of them hangs.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from dalle_jax.engine import distributed


class Stop:
    """Turns the first SIGTERM or SIGINT into a request; the second has its usual effect.

    With several processes, JAX's preemption notice takes the place of the signal: a SIGTERM to any
    process reaches all, and they agree on a step that none has passed. SIGINT is forwarded as
    SIGTERM.
    """

    def __init__(self):
        self._signum = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            is_alone = jax.process_count() == 1
            # With several, JAX's runtime catches SIGTERM, from before the first compilation on.
            for number in (signal.SIGTERM, signal.SIGINT) if is_alone else (signal.SIGINT,):
                self._old[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}

    def _request(self, number: int, frame: Any) -> None:
        self._signum = number
        self.__exit__()
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def requested(self, step: int) -> int:
        """The signal that asks to stop after `step`, or 0; all processes must ask at every step."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0
        return self._signum


class Watchdog:
    """Ends the job when one activity exceeds its time limit; off with one process.

    A process that waits for ever, for a disk, a lock or a collective that another one has not
    entered, still sends its heartbeats. Each process prints its activity and the stacks of its
    threads; the process that was not waiting for the devices is the one to look at.

    Args:
      timeout_s: the time limit of one activity; 0 = off.
      end: called with the text; by default it ends all processes with exit code 1.
    """

    def __init__(self, timeout_s: float, end: Callable[[str], Any] = distributed.fail):
        self._timeout_s, self._end = timeout_s, end
        self._is_on = timeout_s > 0 and jax.process_count() > 1
        self._activity, self._waited = "starting", 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._is_on:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._closed.set()
        if self._is_on:
            self._thread.join()

    def begin(self, activity: str) -> None:
        """Sets the activity that begins now, and the clock to zero."""
        self._activity, self._waited = activity, 0.0
        distributed.set_activity(activity)

    def _watch(self) -> None:
        period = min(1.0, self._timeout_s / 4)
        last = time.monotonic()
        while not self._closed.wait(period):
            now = time.monotonic()
            # The time in which this process was itself stopped (a debugger) does not count.
            self._waited += min(now - last, 2 * period)
            last = now
            if self._waited >= self._timeout_s:
                faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
                self._end(
                    f"{self._activity} has taken {self._waited:.0f} s, more than "
                    f"train.hang_timeout_s={self._timeout_s:g}. All processes end here. If one of "
                    "them was reading a batch, its disk or host is the cause; otherwise look for "
                    "one that prints nothing. The same command continues from the last checkpoint."
                )
                return
