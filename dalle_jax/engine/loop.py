"""The training loop: one for every task, every size and every number of devices.

`train` is linear and headed; read it from top to bottom. The same workdir continues: the order of
batches and every noise stream are functions of (seed, step), so an interrupted run ends with the
same bits as an unbroken one on the same mesh.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dalle_jax import config as cfg
from dalle_jax.engine import checkpoint, program, sharding
from dalle_jax.engine import feed as feed_lib
from dalle_jax.engine import metrics as metrics_lib
from dalle_jax.engine import state as state_lib
from dalle_jax.engine.task import Task
from dalle_jax.types import Batch, UsageError

# fold_in numbers of the streams beside the per-step ones, which count up from 0.
_INIT, _EVAL, _PREVIEW = 2**32 - 1, 2**32 - 2, 2**32 - 3

# Steps dispatched but not finished. Without a bound the host runs ahead to the next log line and
# keeps every batch until then alive on the device.
_RUN_AHEAD = 3


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not finite; the text names step, examples and checkpoint."""


class Interrupted(Exception):
    """A signal stopped the run at a step boundary, after saving.

    Attributes:
      signum: the signal.
      step: number of finished steps, all saved.
    """

    def __init__(self, signum: int, step: int):
        name = signal.Signals(signum).name
        super().__init__(f"{name}: saved step {step}; the same command continues from there.")
        self.signum, self.step = signum, step


def train(
    config: cfg.ConfigDict,
    task: Task,
    batches: Callable[[int], Batch],
    eval_batches: Callable[[int], Batch],
    workdir: str,
) -> dict[str, float]:
    """Trains until `config.train.steps`, continuing what the workdir holds.

    Args:
      config: the run's config, stored in the workdir.
      task: what to train.
      batches: step -> this process's rows of the global batch; `.ids(step)`, where it exists,
        names its examples in reports.
      eval_batches: likewise for held-out batches 0 .. train.eval_batches - 1.
      workdir: a new folder or one of the same run.

    Returns:
      The last metrics: {"step", "loss", …, "eval/loss", …}. A finished run returns those stored.

    Raises:
      UsageError: before anything compiles, for a config that does not fit the devices, the data
        or the workdir.
      NonFiniteError: at the first loss or gradient that is not finite; that state is not saved.
      Interrupted: after SIGTERM or SIGINT, with the current step saved.
    """
    steps = config.train.steps

    # ---- Refuse what cannot work -------------------------------------------------------------
    check(config, task)
    checkpoint.claim(workdir, config)
    made = program.build(config, task)
    task = made.task
    # Made under jit: an array over the devices of several processes cannot be put there from one.
    key = jax.jit(jax.random.key, static_argnums=0, out_shardings=made.whole)(config.seed)
    has_ema = made.target.ema is not None

    # ---- Where are we? -----------------------------------------------------------------------
    checkpointer = checkpoint.Checkpointer(workdir, config)
    if (checkpointer.latest_step() or 0) >= steps:
        checkpointer.close()
        metrics_lib.say(
            f"{workdir} has finished its {steps} steps; nothing to do (raise train.steps?)."
        )
        return stored_metrics(workdir)
    if checkpointer.latest_step() is None:
        state, start = made.init(jax.random.fold_in(key, _INIT)), 0
        if task.warm_start:
            state = state_lib.warm_start(state, task, made.where)
    else:
        state, start = checkpointer.restore(made.saved.target)
        state = made.saved.back(state)
        metrics_lib.say(f"continuing {workdir} from step {start}.")
    frozen = sharding.place(sharding.unbox(task.frozen), made.frozen_where)
    metrics_lib.say(state_lib.describe(task, made.target, made.mesh, config))

    # ---- Functions ---------------------------------------------------------------------------
    def read_train(step: int) -> Batch:
        batch = feed_lib.fitting(batches(step), task, config.data.batch)
        return sharding.to_global(batch, made.batch_where)

    def read_eval(i: int) -> Batch:
        batch = feed_lib.fitting(eval_batches(i), task, config.data.eval_batch)
        return sharding.to_global(batch, made.batch_where)

    writer = metrics_lib.Writer(workdir, config, first_step=start)
    meter = metrics_lib.Meter()
    pending: list[tuple[int, dict[str, jax.Array]]] = []  # finished step count, device metrics
    untold: list[tuple[int, dict[str, float]]] = []  # fetched, not yet logged
    final: dict[str, float] = {"step": start}

    def fetch(entries: list[tuple[int, dict[str, jax.Array]]]) -> None:
        """Brings the metrics of these steps to the host and checks them."""
        for step, values in jax.device_get(entries):
            if not np.isfinite(values["loss"]) or not np.isfinite(values["grad_norm"]):
                raise NonFiniteError(_explain(step, values, batches, checkpointer, workdir))
            untold.append((step, {name: float(value) for name, value in values.items()}))

    def tell() -> None:
        """Logs the means over the steps fetched since the last time."""
        if not untold:
            return
        step, last = untold[-1]
        mean = {name: float(np.mean([v[name] for _, v in untold])) for name in last}
        mean = {"loss": mean.pop("loss"), **mean, "lr": last["lr"]}
        rates = meter.read(config.data.batch, task.unit, task.flops)
        left = (steps - step) * rates["perf/step_ms"] / 1000
        writer.scalars(step, "train", mean | rates)
        metrics_lib.say(metrics_lib.console_line(step, steps, mean | rates, left))
        for name, text in task.alarms.items():
            if mean.get(name, 0) > 0:
                metrics_lib.say(f"  warning ({name}): {text}")
        final.update(last, step=step)
        untold.clear()

    def evaluate(step: int) -> None:
        """Means over the held-out batches with the averaged weights."""
        params = state.ema if has_ema else state.params
        sums: dict[str, float] = {}
        count = config.train.eval_batches
        with feed_lib.Prefetch(read_eval, range(count), config.data.prefetch) as feed:
            for i, batch in feed:
                noise = jax.random.fold_in(jax.random.fold_in(key, _EVAL), i)
                values = made.evaluate(params, state.extra, frozen, batch, noise, state.step)
                got = jax.device_get(values)
                for name, value in got.items():
                    sums[name] = sums.get(name, 0.0) + float(value) / count
        if sums:
            writer.scalars(step, "eval", sums)
            metrics_lib.say(
                metrics_lib.console_line(step, steps, {f"eval/{k}": v for k, v in sums.items()})
            )
            final.update({f"eval/{name}": value for name, value in sums.items()})

    def preview(step: int) -> None:
        """Pictures of the averaged weights, with the same noise every time."""
        params = state.ema if has_ema else state.params
        noise = jax.random.fold_in(key, _PREVIEW)
        pictures = task.preview(params, state.extra, frozen, read_eval(0), noise)
        writer.pictures(step, sharding.to_host(dict(pictures)))

    # ---- Train -------------------------------------------------------------------------------
    with contextlib.ExitStack() as stack:
        stack.callback(checkpointer.close)
        stack.callback(writer.close)
        stack.enter_context(made.use())
        began = time.perf_counter()
        step_fn = made.lower_step().compile()
        metrics_lib.say(f"compiled the training step in {time.perf_counter() - began:.1f} s.")
        stop = stack.enter_context(_Stop())
        feed = stack.enter_context(
            feed_lib.Prefetch(read_train, range(start, steps), config.data.prefetch)
        )
        meter = metrics_lib.Meter()
        waiting = time.perf_counter()
        for index, batch in feed:
            if not pending or pending[-1][1]["loss"].is_ready():
                # Only a wait that left the device idle is the input's fault.
                meter.waited += time.perf_counter() - waiting
            with jax.transfer_guard("disallow"):
                state, values = step_fn(state, frozen, batch, key)
            done = index + 1
            pending.append((done, values))
            meter.step()
            if len(pending) > _RUN_AHEAD:
                jax.block_until_ready(pending[-1 - _RUN_AHEAD][1])

            if _due(done - 1, config.train.log_every_steps):
                # One step late: the device works on this step while the host reads the last.
                fetch(pending[:-1])
                pending = pending[-1:]
                tell()
            is_last = done == steps
            signum = stop.requested(done)
            evals = is_last or _due(done, config.train.eval_every_steps)
            draws = is_last or _due(done, config.train.preview_every_steps)
            saves = is_last or signum or _due(done, config.train.save_every_steps)
            if evals or draws or saves:
                fetch(pending)  # also the check that this state is worth keeping
                pending = []
                if is_last or signum or _due(done, config.train.log_every_steps):
                    tell()
                pause = time.perf_counter()
                if evals and config.train.eval_batches:
                    evaluate(done)
                if draws and task.preview:
                    preview(done)
                if saves:
                    checkpointer.save(done, made.saved.of(state), wait=bool(is_last or signum))
                meter.pause(pause)
            if signum and not is_last:
                raise Interrupted(signum, done)
            waiting = time.perf_counter()
    return final


def check(config: cfg.ConfigDict, task: Task) -> None:
    """Refuses a config that does not fit itself or the devices; computes nothing.

    Raises:
      UsageError: naming the field, the value and what would fit.
    """
    train = config.train
    for name in ("steps", "log_every_steps", "save_every_steps", "keep_last"):
        if train[name] < 1:
            raise UsageError(f"train.{name}={train[name]}; expected 1 or more.")
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.data.batch, mesh, "data.batch", config.optim.accum_steps)
    sharding.check_batch(config.data.eval_batch, mesh, "data.eval_batch")
    for name, spec in task.batch_spec.items():
        if spec.shape[0] != config.data.batch:
            raise UsageError(
                f"task {task.name} wants {name} of shape {spec.shape}, but data.batch="
                f"{config.data.batch}; the leading axis is the global batch."
            )


def plan(config: cfg.ConfigDict, task: Task) -> str:
    """What `train` would do, as text: parameters, memory, batch, schedule. Nothing is computed.

    Raises:
      UsageError: like `train`.
    """
    check(config, task)
    steps = config.train.steps
    made = program.build(config, task)
    lines = [state_lib.describe(task, made.target, made.mesh, config), "", "parameters:"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(made.saved.target.params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        lines.append(f"  {name:<48} {str(leaf.shape):<20} {leaf.size:>12,}  {leaf.sharding.spec}")
    lines += ["", "batch:"]
    for name, spec in task.batch_spec.items():
        lines.append(f"  {name:<16} {str(spec.shape):<20} {spec.dtype}")
    lines += ["", f"learning rate ({config.optim.schedule}):"]
    shown = sorted({0, config.optim.warmup_steps, *(round(steps * i / 10) for i in range(11))})
    for step in (s for s in shown if s <= steps):
        value = float(made.lr(step))
        bar = "#" * round(40 * value / config.optim.lr)
        lines.append(f"  step {step:>8}  {value:.3e}  {bar}")
    return "\n".join(lines)


def stored_metrics(workdir: str) -> dict[str, float]:
    """What the last events of a run said, in the form that `train` returns."""
    final: dict[str, float] = {}
    for event in metrics_lib.read(workdir):
        kind, prefix = event.pop("kind"), ""
        if kind == "eval":
            final["step"], prefix = event.pop("step"), "eval/"
        final.update({f"{prefix}{k}": v for k, v in event.items() if not k.startswith("perf/")})
    return final


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _explain(step, values, batches, checkpointer, workdir) -> str:
    bad = [name for name, value in values.items() if not np.isfinite(value)]
    ids = batches.ids(step - 1) if hasattr(batches, "ids") else []
    shown = ", ".join(ids[:16]) + (f" … ({len(ids)} in all)" if len(ids) > 16 else "")
    good = checkpointer.latest_step()
    return (
        f"step {step}: not finite: {', '.join(bad)}. Examples of its batch: {shown or 'unknown'}. "
        f"Last good checkpoint: {'none' if good is None else f'step {good}'} in {workdir}; the "
        "broken state was not saved. Usual cures: a lower optim.lr, a longer "
        "optim.warmup_steps, optim.clip_norm=1, dtype.compute=float32."
    )


class _Stop:
    """Turns the first SIGTERM or SIGINT into a request; the second acts as usual.

    With several processes jax's own preemption notice is asked instead: it makes all of them stop
    at the same step.
    """

    def __init__(self):
        self._signum = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "_Stop":
        is_main_thread = threading.current_thread() is threading.main_thread()
        if is_main_thread and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}

    def _request(self, number: int, frame: Any) -> None:
        self._signum = number
        self.__exit__()

    def requested(self, step: int) -> int:
        """The signal to stop for after `step`, 0 to go on."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                return signal.SIGTERM
        return self._signum
