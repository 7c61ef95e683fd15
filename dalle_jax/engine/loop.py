"""The training loop: one for every task, every size and every number of devices.

`train` is linear and headed; read it from top to bottom. The same folder continues: the order of
batches and every noise stream are functions of (seed, step), so an interrupted run ends with the
same bits as an unbroken one on the same mesh.
"""

import contextlib
import signal
import time
from collections.abc import Callable

import jax
import numpy as np

from dalle_jax import config as cfg
from dalle_jax.engine import (
    checkpoint,
    interrupt,
    meshes,
    prefetch,
    program,
    sharding,
    timing,
    train_state,
    workdir,
)
from dalle_jax.engine import metrics as metrics_lib
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
    folder: str,
    *,
    may_reshard: bool = False,
) -> dict[str, float]:
    """Trains until `config.train.steps`, continuing what the folder holds.

    Args:
      config: the run's config, stored in the folder.
      task: what to train.
      batches: step -> this process's rows of the global batch; `.ids(step)`, where it exists,
        names its examples in reports.
      eval_batches: likewise for held-out batches 0 .. train.eval_batches - 1.
      folder: a new folder or one of the same run.
      may_reshard: continue even if the folder's mesh is another than today's devices make.

    Returns:
      The last metrics: {"step", "loss", …, "eval/loss", …}. A finished run returns those stored.

    Raises:
      UsageError: before anything compiles, for a config that does not fit the devices, the data
        or the folder.
      NonFiniteError: at the first loss or gradient that is not finite; that state is not saved.
      Interrupted: after SIGTERM or SIGINT, with the current step saved.
    """
    steps = config.train.steps

    # ---- Refuse what cannot work -------------------------------------------------------------
    check(config, task)
    made = program.build(config, task)
    task = made.task
    workdir.claim(folder, config, task.keeps)
    # Made under jit: an array over the devices of several processes cannot be put there from one.
    key = jax.jit(jax.random.key, static_argnums=0, out_shardings=made.whole)(config.seed)
    has_ema = made.target.ema is not None

    # ---- Where are we? -----------------------------------------------------------------------
    checkpointer = checkpoint.Checkpointer(folder, config, workdir.describe(made.mesh, config))
    if (checkpointer.latest_step() or 0) >= steps:
        checkpointer.close()
        metrics_lib.say(
            f"{folder} has finished its {steps} steps; nothing to do (raise train.steps?)."
        )
        return stored_metrics(folder)
    if checkpointer.latest_step() is None:
        state, start = made.init(jax.random.fold_in(key, _INIT)), 0
        if task.warm_start:
            state = train_state.warm_start(state, task, made.where)
    else:
        workdir.check_mesh(folder, checkpointer.latest_meta(), made.mesh, config, may_reshard)
        state, start = checkpointer.restore(made.saved.target)
        state = made.saved.back(state)
        metrics_lib.say(f"continuing {folder} from step {start}.")
    frozen = sharding.place(sharding.unbox(task.frozen), made.frozen_where)
    metrics_lib.say(train_state.describe(task, made.target, made.mesh, config))

    # ---- Functions ---------------------------------------------------------------------------
    rows = len(sharding.local_rows(made.mesh, config.data.batch))
    eval_rows = len(sharding.local_rows(made.mesh, config.data.eval_batch))

    def read_train(step: int) -> Batch:
        batch = prefetch.fitting(batches(step), task, rows)
        return sharding.to_global(batch, made.batch_where)

    def read_eval(i: int) -> Batch:
        batch = prefetch.fitting(eval_batches(i), task, eval_rows)
        return sharding.to_global(batch, made.batch_where)

    writer = metrics_lib.Writer(folder, config, first_step=start)
    pending: list[tuple[int, dict[str, jax.Array]]] = []  # finished step count, device metrics
    untold: list[tuple[int, dict[str, float]]] = []  # fetched, not yet logged
    ringing: set[str] = set()  # alarms told and not yet over
    final: dict[str, float] = {"step": start}

    def fetch(entries: list[tuple[int, dict[str, jax.Array]]]) -> None:
        """Brings the metrics of these steps to the host and checks them."""
        meter.spent(timing.HOST)
        got = jax.device_get(entries)
        meter.spent(timing.COMPUTE)
        for step, values in got:
            if not np.isfinite(values["loss"]) or not np.isfinite(values["grad_norm"]):
                raise NonFiniteError(_explain(step, values, batches, checkpointer, folder))
            untold.append((step, {name: float(value) for name, value in values.items()}))

    def tell() -> None:
        """Logs the means over the steps fetched since the last time."""
        if not untold:
            return
        step, last = untold[-1]
        mean = {name: float(np.mean([v[name] for _, v in untold])) for name in last}
        mean = {"loss": mean.pop("loss"), **mean, "lr": last["lr"]}
        rates = meter.read()
        left = (steps - step) * rates["perf/step_ms"] / 1000
        writer.scalars(step, "train", mean | rates)
        line = metrics_lib.console_line(step, steps, mean | rates, left)
        metrics_lib.say(f"{line}  {meter.bound()}")
        for name, text in task.alarms.items():
            if mean.get(name, 0) <= 0:
                ringing.discard(name)
            elif name not in ringing:
                ringing.add(name)
                metrics_lib.say(f"  warning ({name}): {text}")
        final.update(last, step=step)
        untold.clear()

    def evaluate(step: int) -> None:
        """Means over the held-out batches with the averaged weights."""
        params = state.ema if has_ema else state.params
        sums: dict[str, float] = {}
        count = config.train.eval_batches
        with prefetch.Prefetch(read_eval, range(count), config.data.prefetch) as feed:
            for i, batch in feed:
                watch.doing(f"evaluation batch {i + 1} after step {step}")
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
        feed = stack.enter_context(
            prefetch.Prefetch(read_train, range(start, steps), config.data.prefetch)
        )
        feed.wait()  # what does not fit is said before minutes of compiling, not after
        began = time.perf_counter()
        step_fn = made.lower_step().compile()
        metrics_lib.say(f"compiled the training step in {time.perf_counter() - began:.1f} s.")
        if config.train.dump_hlo:
            timing.dump_hlo(folder, step_fn)
        stop = stack.enter_context(interrupt.Stop())
        watch = stack.enter_context(interrupt.Watchdog(config.train.hang_timeout_s))
        profiler = stack.enter_context(timing.Profiler(folder, config))
        meter = timing.Meter(config.data.batch, task, jax.devices())
        watch.doing(f"reading the batch of step {start + 1}")
        for index, batch in feed:
            watch.doing(f"step {index + 1}")
            meter.spent(timing.INPUT)
            profiler.before(index - start, state, meter)
            with (
                jax.transfer_guard("disallow"),
                jax.profiler.StepTraceAnnotation("train", step_num=index),
            ):
                state, values = step_fn(state, frozen, batch, key)
            done = index + 1
            pending.append((done, values))
            meter.step(values["loss"])
            if len(pending) > _RUN_AHEAD:
                jax.block_until_ready(pending[-1 - _RUN_AHEAD][1])
                meter.spent(timing.COMPUTE)

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
                meter.spent(timing.HOST)
                if evals and config.train.eval_batches:
                    evaluate(done)
                if draws and task.preview:
                    watch.doing(f"the preview after step {done}")
                    preview(done)
                meter.spent(timing.EVALUATION)
                if saves:
                    watch.doing(f"the checkpoint of step {done}")
                    checkpointer.save(done, made.saved.of(state), wait=bool(is_last or signum))
                    meter.spent(timing.CHECKPOINT)
                if is_last or signum:
                    timing.conclude(meter, writer, done)
            if signum and not is_last:
                raise Interrupted(signum, done)
            meter.spent(timing.HOST)
            watch.doing(f"reading the batch of step {done + 1}")
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
    for name in ("eval_every_steps", "preview_every_steps", "keep_every_steps", "eval_batches"):
        if train[name] < 0:
            raise UsageError(f"train.{name}={train[name]}; expected 0 (never) or more.")
    timing.check(config)
    mesh = meshes.make_mesh(config.mesh)
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
    lines = [train_state.describe(task, made.target, made.mesh, config), "", "parameters:"]
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


def stored_metrics(folder: str) -> dict[str, float]:
    """What the last events of a run said, in the form that `train` returns."""
    final: dict[str, float] = {}
    for event in metrics_lib.read(folder):
        kind, prefix = event.pop("kind"), ""
        if kind == "eval":
            final["step"], prefix = event.pop("step"), "eval/"
        final.update({f"{prefix}{k}": v for k, v in event.items() if not k.startswith("perf/")})
    return final


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _explain(step, values, batches, checkpointer, folder) -> str:
    bad = [name for name, value in values.items() if not np.isfinite(value)]
    ids = batches.ids(step - 1) if hasattr(batches, "ids") else []
    shown = ", ".join(ids[:16]) + (f" … ({len(ids)} in all)" if len(ids) > 16 else "")
    good = checkpointer.latest_step()
    return (
        f"step {step}: not finite: {', '.join(bad)}. Examples of its batch: {shown or 'unknown'}. "
        f"Last good checkpoint: {'none' if good is None else f'step {good}'} in {folder}; the "
        "broken state was not saved. Usual cures: a lower optim.lr, a longer "
        "optim.warmup_steps, optim.clip_norm=1, dtype.compute=float32."
    )
