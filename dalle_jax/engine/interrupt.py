"""What ends a run early: a signal that asks for it, a step that never ends.

`Stop` turns SIGTERM, SIGINT and preemption notices into "save after this step and leave", the same
step for all processes. `Watchdog` ends a job of several processes of which one hangs.
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
    """Turns the first SIGTERM or SIGINT into a request; the second acts as usual.

    With several processes JAX's own preemption notice is asked instead: a SIGTERM to any of them
    reaches all, and they agree on a step that none has passed. SIGINT is passed on as SIGTERM.
    """

    def __init__(self):
        self._signum = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            is_alone = jax.process_count() == 1
            # Several: the runtime itself catches SIGTERM, from before the first compilation on.
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
        """The signal to stop for after `step`, 0 to go on; all processes must ask at every step."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0
        return self._signum


class Watchdog:
    """Ends the job when one thing takes longer than it may; off with one process.

    A process that waits for ever, for a disk, a lock or a collective that another has not
    entered, still sends its heartbeats. Each process tells what it was doing and where its
    threads stand; the one that was not waiting for the devices is the one to look at.

    Args:
      timeout_s: the longest that one thing may take; 0 = off.
      end: called with the text; by default ends all processes with exit code 1.
    """

    def __init__(self, timeout_s: float, end: Callable[[str], Any] = distributed.fail):
        self._timeout_s, self._end = timeout_s, end
        self._is_on = timeout_s > 0 and jax.process_count() > 1
        self._what, self._waited = "starting", 0.0
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

    def doing(self, what: str) -> None:
        """Says what begins now, and sets the clock to zero."""
        self._what, self._waited = what, 0.0
        distributed.doing(what)

    def _watch(self) -> None:
        period = min(1.0, self._timeout_s / 4)
        last = time.monotonic()
        while not self._closed.wait(period):
            now = time.monotonic()
            # A process that was itself stopped (a debugger, a frozen machine) has not waited.
            self._waited += min(now - last, 2 * period)
            last = now
            if self._waited >= self._timeout_s:
                faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
                self._end(
                    f"{self._what} has taken {self._waited:.0f} s, more than train.hang_timeout_s="
                    f"{self._timeout_s:g}. All processes end here; if one of them was reading a "
                    "batch, its disk or host is the cause, else look for one that says nothing. "
                    "The same command continues from the last checkpoint."
                )
                return
