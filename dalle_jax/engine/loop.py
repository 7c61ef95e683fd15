"""The training loop: one for every task, every size and every number of devices.

`train` is linear and headed; read it from top to bottom. The same folder continues: the order of
batches and every noise stream are functions of (seed, step), so an interrupted run ends with the
same bits as an unbroken one on the same mesh.
"""

import contextlib
import functools
import signal
import time
from collections.abc import Callable
from typing import Any

import jax

from dalle_jax.config import ConfigDict
from dalle_jax.engine import (
    checkpoint,
    console,
    event_files,
    held_out,
    interrupt,
    metric_log,
    prefetch,
    sharding,
    timing,
    train_state,
    workdir,
)
from dalle_jax.engine.program import Program
from dalle_jax.engine.task import Task
from dalle_jax.types import Batch, UsageError

_INIT = 2**32 - 1  # fold_in number of the initial weights; the training steps count up from 0


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


def prepare(config: ConfigDict, task: Task) -> Program:
    """The program of a run on all devices, after checking the config; computes nothing.

    Raises:
      UsageError: for a config that does not fit itself, the task or the devices.
    """
    for name in ("steps", "log_every_steps", "save_every_steps", "keep_last"):
        if config.train[name] < 1:
            raise UsageError(f"train.{name}={config.train[name]}; expected 1 or more.")
    for name in ("eval_every_steps", "preview_every_steps", "keep_every_steps", "eval_batches"):
        if config.train[name] < 0:
            raise UsageError(f"train.{name}={config.train[name]}; expected 0 (never) or more.")
    timing.check(config)
    program = Program.build(config, task)
    sharding.check_batch(config.data.eval_batch, program.mesh, "data.eval_batch")
    return program


def train(
    program: Program,
    batches: Callable[[int], Batch],
    eval_batches: Callable[[int], Batch],
    folder: str,
    *,
    may_reshard: bool = False,
) -> dict[str, float]:
    """Trains until `config.train.steps`, continuing the run in the folder.

    Args:
      program: the run's program, from `prepare`.
      batches: step -> this process's rows of the global batch; `.ids(step)`, where it exists,
        names its examples in reports.
      eval_batches: likewise for held-out batches 0 to train.eval_batches - 1.
      folder: a new folder, or the folder of the same run; it stores the config.
      may_reshard: continue on this mesh even if the folder's checkpoint has another one.

    Returns:
      The last metrics: {"step", "loss", …, "eval/loss", …}. For a finished run, the stored ones.

    Raises:
      UsageError: before anything compiles, for data or a folder that does not fit the program.
      NonFiniteError: at the first loss or gradient that is not finite; that state is not saved.
      Interrupted: after SIGTERM or SIGINT, with the current step saved.
    """
    config, task = program.config, program.task
    steps = config.train.steps
    workdir.claim(folder, config, task.keeps)
    # Under jit: one process cannot place an array on the devices of several.
    key = jax.jit(jax.random.key, static_argnums=0, out_shardings=program.replicated)(config.seed)

    # ---- Restore or initialise ---------------------------------------------------------------
    checkpointer = checkpoint.Checkpointer(folder, config, workdir.describe(program.mesh, config))
    start = checkpointer.latest_step()
    if (start or 0) >= steps:
        checkpointer.close()
        console.log(f"{folder} has finished its {steps} steps; nothing to do (raise train.steps?).")
        return event_files.final_metrics(folder)
    if start is None:
        state, start = program.init(jax.random.fold_in(key, _INIT)), 0
        if task.warm_start:
            state = train_state.warm_start(state, task, program.shardings)
    else:
        meta = checkpointer.latest_meta()
        workdir.check_mesh(folder, meta, program.mesh, config, may_reshard)
        state, start = checkpointer.restore(program.folding.unfolded_shapes)
        state = program.folding.fold(state)
        console.log(f"continuing {folder} from step {start}.")
    frozen = sharding.place(sharding.unbox(task.frozen), program.frozen_shardings)
    console.log(train_state.describe(task, program.state_shapes, program.mesh, config))

    with contextlib.ExitStack() as stack:
        # ---- Open files and data, compile ----------------------------------------------------
        stack.callback(checkpointer.close)
        writer = event_files.Writer(folder, config, first_step=start)
        stack.callback(writer.close)
        stack.enter_context(program.use())
        read = prefetch.global_batches(batches, program, config.data.batch)
        read_held_out = prefetch.global_batches(eval_batches, program, config.data.eval_batch)
        feed = prefetch.Prefetch(read, range(start, steps), config.data.prefetch)
        stack.enter_context(feed)
        feed.wait()  # data that do not fit are refused before minutes of compiling, not after
        compile_start = time.perf_counter()
        step_fn = program.lower_step().compile()
        console.log(f"compiled the training step in {time.perf_counter() - compile_start:.1f} s.")
        if config.train.dump_hlo:
            timing.dump_hlo(folder, step_fn)
        stop = stack.enter_context(interrupt.Stop())
        watchdog = stack.enter_context(interrupt.Watchdog(config.train.hang_timeout_s))
        profiler = stack.enter_context(timing.Profiler(folder, config))
        evaluation = held_out.HeldOut(program, frozen, read_held_out, key, watchdog)
        meter = timing.Meter(config.data.batch, task, jax.devices())
        explain = functools.partial(_explain, batches, checkpointer, folder)
        log = metric_log.MetricLog(config, task.alarms, writer, meter, explain, start)

        # ---- Train ---------------------------------------------------------------------------
        watchdog.begin(f"reading the batch of step {start + 1}")
        for index, batch in feed:
            watchdog.begin(f"step {index + 1}")
            meter.spent(timing.INPUT)
            profiler.before(index - start, state, meter)
            with (
                jax.transfer_guard("disallow"),
                jax.profiler.StepTraceAnnotation("train", step_num=index),
            ):
                state, metrics = step_fn(state, frozen, batch, key)
            step = index + 1
            log.add(step, metrics)

            is_last = step == steps
            signum = stop.requested(step)
            is_end = bool(is_last or signum)
            evaluates = is_last or metric_log.is_due(step, config.train.eval_every_steps)
            previews = is_last or metric_log.is_due(step, config.train.preview_every_steps)
            saves = is_end or metric_log.is_due(step, config.train.save_every_steps)
            if evaluates or previews or saves:
                log.fetch()  # raises if this state is not worth saving
                if is_end or metric_log.is_due(step, config.train.log_every_steps):
                    log.report()
                meter.spent(timing.HOST)
                if evaluates and config.train.eval_batches:
                    log.report_evaluation(step, evaluation.evaluate(state, step))
                if previews and task.preview:
                    log.report_previews(step, evaluation.preview(state, step))
                meter.spent(timing.EVALUATION)
            if saves:
                watchdog.begin(f"the checkpoint of step {step}")
                checkpointer.save(step, program.folding.unfold(state), wait=is_end)
                meter.spent(timing.CHECKPOINT)
            if is_end:
                log.report_totals(step)
            if signum and not is_last:
                raise Interrupted(signum, step)
            meter.spent(timing.HOST)
            watchdog.begin(f"reading the batch of step {step + 1}")
    return log.final


def dry_run(program: Program) -> str:
    """A text on what `train` would do: parameters, memory, batch, schedule; computes nothing."""
    config, task = program.config, program.task
    lines = [train_state.describe(task, program.state_shapes, program.mesh, config)]
    lines += ["", "parameters:"]
    params = program.folding.unfolded_shapes.params
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        lines.append(f"  {name:<48} {str(leaf.shape):<20} {leaf.size:>12,}  {leaf.sharding.spec}")
    lines += ["", "batch:"]
    for name, spec in task.batch_spec.items():
        lines.append(f"  {name:<16} {str(spec.shape):<20} {spec.dtype}")
    lines += ["", f"learning rate ({config.optim.schedule}):"]
    steps, warmup = config.train.steps, config.optim.warmup_steps
    for step in sorted({0, warmup, *(round(steps * i / 10) for i in range(11))}):
        if step <= steps:
            lr = float(program.lr(step))
            bar = "#" * round(40 * lr / config.optim.lr)
            lines.append(f"  step {step:>8}  {lr:.3e}  {bar}")
    return "\n".join(lines)


def _explain(
    batches: Any, checkpointer: checkpoint.Checkpointer, folder: str, step: int, names: list[str]
) -> str:
    """The text of a NonFiniteError; see `MetricLog`."""
    ids = batches.ids(step - 1) if hasattr(batches, "ids") else []
    examples = ", ".join(ids[:16]) + (f" … ({len(ids)} in all)" if len(ids) > 16 else "")
    good = checkpointer.latest_step()
    return (
        f"step {step}: not finite: {', '.join(names)}. Examples of its batch: "
        f"{examples or 'unknown'}. Last good checkpoint: "
        f"{'none' if good is None else f'step {good}'} in {folder}; the broken state was not "
        "saved. Usual cures: a lower optim.lr, a longer optim.warmup_steps, optim.clip_norm=1, "
        "dtype.compute=float32."
    )
