"""Metrics of a run: fetched from the devices, checked, averaged, printed and written."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from dalle_jax.config import ConfigDict
from dalle_jax.engine import console, event_files, timing

# Steps dispatched but not finished. Without a bound the host runs ahead to the next log line and
# keeps every batch until then alive on the device.
_RUN_AHEAD = 3


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not finite; the text names step, examples and checkpoint."""


class MetricLog:
    """Collects the metrics of the training steps, checks them and reports their means.

    Args:
      config: the run's config.
      alarms: `Task.alarms`.
      writer: writes the event files.
      meter: books the time that fetching takes, and gives the rates.
      explain: step, names of the metrics that are not finite -> text of the NonFiniteError.
      first_step: the step that the run continues from.

    Attributes:
      final: the last metrics: {"step", "loss", …, "eval/loss", …}.
    """

    def __init__(
        self,
        config: ConfigDict,
        alarms: Mapping[str, str],
        writer: event_files.Writer,
        meter: timing.Meter,
        explain: Callable[[int, list[str]], str],
        first_step: int = 0,
    ):
        self._steps, self._every = config.train.steps, config.train.log_every_steps
        self._alarms, self._active_alarms = alarms, set()
        self._writer, self._meter, self._explain = writer, meter, explain
        self._on_device: list[tuple[int, dict[str, jax.Array]]] = []
        self._on_host: list[tuple[int, dict[str, float]]] = []
        self.final: dict[str, float] = {"step": first_step}

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of step number `step`, which the devices may still be working on.

        Waits while more than `_RUN_AHEAD` steps are unfinished.
        """
        self._on_device.append((step, metrics))
        self._meter.step(metrics["loss"])
        if len(self._on_device) > _RUN_AHEAD:
            jax.block_until_ready(self._on_device[-1 - _RUN_AHEAD][1])
            self._meter.spent(timing.COMPUTE)
        if is_due(step - 1, self._every):
            # One step late: the devices work on this step while the host reads the last one.
            self.fetch(keep=1)
            self.report()

    def fetch(self, keep: int = 0) -> None:
        """Copies metrics to the host and checks them.

        Args:
          keep: number of newest steps that stay on the devices.

        Raises:
          NonFiniteError: for a loss or a gradient norm that is not finite.
        """
        split = len(self._on_device) - keep
        steps, self._on_device = self._on_device[:split], self._on_device[split:]
        self._meter.spent(timing.HOST)
        steps = jax.device_get(steps)
        self._meter.spent(timing.COMPUTE)
        for step, metrics in steps:
            if not np.isfinite([metrics["loss"], metrics["grad_norm"]]).all():
                names = [name for name, value in metrics.items() if not np.isfinite(value)]
                raise NonFiniteError(self._explain(step, names))
            self._on_host.append((step, {name: float(v) for name, v in metrics.items()}))

    def report(self) -> None:
        """Writes and prints the means over the steps fetched since the last report."""
        if not self._on_host:
            return
        step, last = self._on_host[-1]
        means = {name: float(np.mean([m[name] for _, m in self._on_host])) for name in last}
        means = {"loss": means.pop("loss"), **means, "lr": last["lr"]}
        rates = self._meter.read()
        eta_s = (self._steps - step) * rates["perf/step_ms"] / 1000
        self._writer.scalars(step, "train", means | rates)
        line = console.step_line(step, self._steps, means | rates, eta_s)
        console.log(f"{line}  {self._meter.bound()}")
        for name, text in self._alarms.items():
            if means.get(name, 0) <= 0:
                self._active_alarms.discard(name)
            elif name not in self._active_alarms:
                self._active_alarms.add(name)
                console.log(f"  warning ({name}): {text}")
        self.final.update(last, step=step)
        self._on_host.clear()

    def report_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes and prints the metrics on the held-out batches."""
        self._writer.scalars(step, "eval", metrics)
        metrics = {f"eval/{name}": value for name, value in metrics.items()}
        console.log(console.step_line(step, self._steps, metrics))
        self.final.update(metrics)

    def report_previews(self, step: int, previews: Mapping[str, Any]) -> None:
        """Writes preview images: name -> [n, h, w, 3] float in [-1, 1]."""
        self._writer.images(step, previews)

    def report_totals(self, step: int) -> None:
        """Writes the rates over all of the run as an event of kind "run"; prints the verdict."""
        self._writer.scalars(step, "run", self._meter.totals())
        console.log(self._meter.verdict())


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0 = never) happens after `step`."""
    return every > 0 and step > 0 and step % every == 0
