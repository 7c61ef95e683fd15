"""The time of a run by cause, and remedies: rates, MFU, a verdict, profiles, HLO.

Every second of the loop is booked to what the devices were waiting for: the input pipeline, the
host (Python between two steps), a checkpoint, an evaluation with its previews, a profile. The rest
is computing. If the devices finish in the middle of a wait, all of the wait is booked to its cause:
causes are overstated by at most one step per wait, and never understated.

Conventions. Model FLOPs are `Task.flops`: 3 x the forward pass, 2 per multiply-add, attention on
allowed keys, recomputation under remat not counted. TFLOP/s per device = model FLOPs per step /
(seconds per step x devices). MFU = that over the dense bfloat16 peak in `chips`, in whatever dtype
the run computes (Chowdhery et al. 2022, arXiv:2204.02311, appendix B). Seconds per step are those
of training: evaluations, checkpoints and profiles are counted separately.
"""

import gzip
import time
from typing import Any

import jax
from etils import epath

from dalle_jax.config import ConfigDict
from dalle_jax.engine import chips, console
from dalle_jax.engine.task import Task
from dalle_jax.types import UsageError

PROFILE = "profile"
HLO = "hlo"

COMPUTE, INPUT, HOST = "compute", "input", "host"
CHECKPOINT, EVALUATION, TRACE = "checkpoint", "evaluation", "profile"
_TRAINING = (COMPUTE, INPUT, HOST)

# A cause with a smaller share of the time does not limit a run.
_BOUND_SHARE = 0.1

_REMEDIES = {
    INPUT: "the devices wait for batches: raise data.threads and data.prefetch, let data.cache_mib "
    "hold the decoded pictures, prepare the set at data.image_px, or train DALL-E on stored codes "
    "(`encode`)",
    HOST: "the devices wait for Python between steps: a larger data.batch, a higher "
    "train.log_every_steps, fewer other programs on this host",
    CHECKPOINT: "saving takes this share of the run: a higher train.save_every_steps, or a faster "
    "disk under --workdir",
    EVALUATION: "evaluations and previews take this share of the run: a higher "
    "train.eval_every_steps and train.preview_every_steps, fewer train.eval_batches",
    COMPUTE: "the devices are the limit; train.profile_steps=3 shows their time by operation",
}


class Meter:
    """Books the loop's seconds and turns them into rates.

    `spent(cause)` books the time since the last booking, so the bookings add up to the run.

    Args:
      batch: examples per step, all devices together.
      task: the task; its `flops` and `unit` are used.
      devices: all devices of the run; their kind determines the peak.
    """

    def __init__(self, batch: int, task: Task, devices: list[jax.Device]):
        self._batch, self._task = batch, task
        self._num_devices = len(devices)
        self._kind = devices[0].device_kind
        # The CPU backend runs a small program inside the call that should only dispatch it.
        self._is_cpu = devices[0].platform == "cpu"
        self._newest: jax.Array | None = None  # a result of the step dispatched last
        self._steps = self._all_steps = 0
        self._interval: dict[str, float] = {}
        self._total: dict[str, float] = {}
        self._last = time.perf_counter()

    def spent(self, cause: str) -> None:
        """Books the seconds since the last call to `cause`, or to computing.

        While the devices still work on the previous step, input and host delay nothing.
        """
        now = time.perf_counter()
        if cause in (INPUT, HOST) and self._newest is not None and not self._newest.is_ready():
            cause = COMPUTE
        for book in (self._interval, self._total):
            book[cause] = book.get(cause, 0.0) + now - self._last
        self._last = now

    def step(self, result: jax.Array) -> None:
        """Counts one step and books its dispatch.

        Args:
          result: an output of the step, ready when the step is done.
        """
        # `spent` looks at the previous step: if the accelerator was idle, dispatching is a wait.
        self.spent(COMPUTE if self._is_cpu else HOST)
        self._newest = result
        self._steps += 1
        self._all_steps += 1

    def read(self) -> dict[str, float]:
        """Rates of the interval since the last call, as `perf/…` metrics; starts the next one.

        Returns:
          images_per_s and, with `task.unit`, tokens_per_s, all devices together; step_ms, which
          includes the waits input_ms and host_ms; tflops_per_device and mfu_pct if known;
          input_wait_pct, a share of the step; checkpoint_s and evaluation_s in the interval.
        """
        values = self._rates(self._interval, self._steps)
        for cause in (CHECKPOINT, EVALUATION):
            values[f"perf/{cause}_s"] = self._interval.get(cause, 0.0)
        self._interval, self._steps = {}, 0
        return values

    def totals(self) -> dict[str, float]:
        """The rates over all of the run, with each cause's share of its time as `perf/…_pct`."""
        values = self._rates(self._total, self._all_steps)
        del values["perf/input_wait_pct"]  # perf/input_pct is the share of all time
        total_s = max(sum(self._total.values()), 1e-9)
        for cause in (*_TRAINING, CHECKPOINT, EVALUATION):
            values[f"perf/{cause}_pct"] = 100 * self._total.get(cause, 0.0) / total_s
        return values

    def bound(self) -> str:
        """`input-bound` and the like, by the cause that delays the run most."""
        return f"{self._bound()}-bound"

    def verdict(self) -> str:
        """One line for a person: the cause that limits the run, its share, and the remedy."""
        cause, shares = self._bound(), self.totals()
        text = f"{cause}-bound: {shares[f'perf/{cause}_pct']:.0f}% of the time: {_REMEDIES[cause]}."
        rest = [
            f"{name} {shares[f'perf/{name}_pct']:.0f}%"
            for name in (*_TRAINING, CHECKPOINT, EVALUATION)
            if name != cause and shares[f"perf/{name}_pct"] >= 0.5
        ]
        text += f" The rest: {', '.join(rest)}." if rest else ""
        if "perf/mfu_pct" in shares:
            peak = chips.PEAK_FLOPS[self._kind] / 1e12
            text += (
                f" MFU {shares['perf/mfu_pct']:.1f}%: {shares['perf/tflops_per_device']:.1f} model "
                f"TFLOP/s per device of {peak:,.0f} (dense bfloat16)."
            )
        return text

    def _bound(self) -> str:
        total_s = sum(self._total.values())
        waits = {c: s for c, s in self._total.items() if c not in (COMPUTE, TRACE)}
        cause = max(waits, key=waits.get, default=COMPUTE)
        return cause if waits.get(cause, 0.0) >= _BOUND_SHARE * total_s else COMPUTE

    def _rates(self, book: dict[str, float], steps: int) -> dict[str, float]:
        seconds = max(sum(book.get(cause, 0.0) for cause in _TRAINING), 1e-9)
        rate, per_step = steps / seconds, 1000 / max(steps, 1)
        values = {"perf/images_per_s": rate * self._batch, "perf/step_ms": seconds * per_step}
        for cause in (INPUT, HOST):
            values[f"perf/{cause}_ms"] = book.get(cause, 0.0) * per_step
        if self._task.unit:
            name, count = self._task.unit
            values[f"perf/{name}_per_s"] = rate * self._batch * count
        if self._task.flops:
            flops = rate * self._task.flops / self._num_devices
            values["perf/tflops_per_device"] = flops / 1e12
            if self._kind in chips.PEAK_FLOPS:
                values["perf/mfu_pct"] = 100 * flops / chips.PEAK_FLOPS[self._kind]
        values["perf/input_wait_pct"] = 100 * book.get(INPUT, 0.0) / seconds
        return values


class Profiler:
    """Traces a few steps into `workdir/profile`, on process 0, for TensorBoard or Perfetto.

    Steps are counted from the start of this process, so that a resumed run can be profiled too.

    Args:
      workdir: the run's folder.
      config: `train.profile_steps` (0 = off) and `train.profile_at`, the first of them.
    """

    def __init__(self, workdir: str, config: ConfigDict):
        self._dir = str(epath.Path(workdir) / PROFILE)
        first, count = config.train.profile_at, config.train.profile_steps
        is_profiling = count > 0 and jax.process_index() == 0
        self._starts, self._stops = (first, first + count) if is_profiling else (-1, -1)
        self._is_tracing = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._is_tracing:  # the run ended first
            self._stop()

    def before(self, count: int, state: Any, meter: Meter) -> None:
        """Starts or stops the trace at its first and last step; does nothing at all others.

        Args:
          count: number of steps that this process has dispatched.
          state: the training state; waits for it, so that the trace has complete steps.
          meter: books the time separately.
        """
        if count not in (self._starts, self._stops):
            return
        jax.block_until_ready(state)
        meter.spent(COMPUTE)
        if count == self._starts:
            jax.profiler.start_trace(self._dir)
            self._is_tracing = True
        elif self._is_tracing:
            self._stop()
        meter.spent(TRACE)

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._is_tracing = False
        console.log(f"profile in {self._dir}: `xprof {self._dir}` or TensorBoard's profile plugin.")


def dump_hlo(workdir: str, compiled: Any) -> None:
    """Writes the compiled step's HLO as `workdir/hlo/step.txt.gz`, on process 0.

    Some compilers cannot print their programs (TPU v5p with libtpu 0.0.52); then it prints a line,
    and the run continues.
    """
    if jax.process_index() != 0:
        return
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        console.log(
            f"no HLO dump: the compiler cannot print this program ({str(error).splitlines()[0]})"
        )
        return
    file = epath.Path(workdir) / HLO / "step.txt.gz"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(text.encode(), mtime=0))
    console.log(f"HLO of the training step: {file}")


def check(config: ConfigDict) -> None:
    """Refuses a profile of steps that the run does not have.

    Raises:
      UsageError: with the fields.
    """
    first, count, steps = (config.train[n] for n in ("profile_at", "profile_steps", "steps"))
    if count < 0 or first < 0:
        raise UsageError(
            f"train.profile_at={first}, train.profile_steps={count}; expected 0 or more."
        )
    if count and first + count > steps:
        raise UsageError(
            f"train.profile_at={first} + train.profile_steps={count} is more than train.steps="
            f"{steps}; lower train.profile_at."
        )
