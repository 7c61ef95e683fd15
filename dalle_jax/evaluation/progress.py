"""How fast a suite runs and how long it will take, as lines of text."""

import time
from collections.abc import Callable

Report = Callable[[str], None]


def silent(line: str) -> None:
    """A `Report` that drops the line."""


class Clock:
    """Counts pictures and reports rate and time left at most every five seconds."""

    def __init__(self, name: str, total: int | None, report: Report):
        """Starts the clock.

        Args:
          name: of the work, in front of every line.
          total: pictures that will come; None = unknown.
          report: takes the lines.
        """
        self._name, self._total, self._report = name, total, report
        self._done, self._start = 0, time.monotonic()
        self._last = self._start

    def add(self, num: int) -> None:
        """Counts `num` more pictures as done."""
        self._done += num
        now = time.monotonic()
        if now - self._last < 5 and self._done != self._total:
            return
        self._last = now
        rate = self._done / max(now - self._start, 1e-9)
        of = f" of {self._total:,}" if self._total else ""
        left = f", {(self._total - self._done) / rate:.0f} s left" if self._total else ""
        self._report(f"{self._name}: {self._done:,}{of} pictures, {rate:,.1f}/s{left}")
