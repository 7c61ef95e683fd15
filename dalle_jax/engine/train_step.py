"""The pure functions that a run compiles: one training step, one evaluation batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dalle_jax.engine import optim
from dalle_jax.engine.task import Task
from dalle_jax.engine.train_state import TrainState
from dalle_jax.types import Batch, Key, Params


def make_step(
    task: Task,
    tx: optax.GradientTransformation,
    lr: optim.Schedule,
    ema_limit: float,
    accum_steps: int,
) -> Callable[[TrainState, Any, Batch, Key], tuple[TrainState, dict[str, jax.Array]]]:
    """The pure training step: (state, frozen, batch, key) -> (state, metrics).

    `key` is the run's base key; the step folds its number in. With accumulation, the step splits
    the batch into micro-batches, averages their gradients and metrics, and passes `extra` through
    them in turn: the result equals that of one batch if the loss is a mean over examples.

    Returns:
      Function whose metrics are the task's plus loss, grad_norm (before clipping), lr and
      update_ratio, the norm of the update over the norm of the weights: far below 1e-4 nothing is
      learned, far above 1e-2 training is unstable.
    """
    grad_fn = jax.value_and_grad(task.loss, has_aux=True)

    def gradients(state: TrainState, frozen: Any, batch: Batch, key: Key):
        if accum_steps == 1:
            (loss, out), grads = grad_fn(state.params, state.extra, frozen, batch, key, state.step)
            return grads, out.extra, {**out.metrics, "loss": loss}

        def split(x):
            # Every micro-batch has rows from every device's shard: no data moves.
            return jnp.moveaxis(x.reshape(-1, accum_steps, *x.shape[1:]), 1, 0)

        def micro(carry, inputs):
            total, extra = carry
            i, part = inputs
            noise = jax.random.fold_in(key, i)
            (loss, out), grads = grad_fn(state.params, extra, frozen, part, noise, state.step)
            total = jax.tree.map(lambda a, b: a + b / accum_steps, total, grads)
            return (total, out.extra), {**out.metrics, "loss": loss}

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        parts = (jnp.arange(accum_steps), jax.tree.map(split, batch))
        (grads, extra), values = jax.lax.scan(micro, (zeros, state.extra), parts)
        return grads, extra, jax.tree.map(lambda x: x.mean(0), values)

    def step(state: TrainState, frozen: Any, batch: Batch, key: Key):
        key = jax.random.fold_in(key, state.step)
        grads, extra, values = gradients(state, frozen, batch, key)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            decay = optim.ema_decay(ema_limit, state.step)
            ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
        values = {
            **values,
            "grad_norm": optax.tree.norm(grads),
            "update_ratio": optax.tree.norm(updates) / (optax.tree.norm(params) + 1e-12),
            "lr": jnp.asarray(lr(state.step), jnp.float32),
        }
        return TrainState(state.step + 1, params, ema, extra, opt_state), values

    return step


def make_eval(task: Task) -> Callable[..., dict[str, jax.Array]]:
    """(params, extra, frozen, batch, key, step) -> metrics of one held-out batch."""

    def evaluate(params: Params, extra: Any, frozen: Any, batch: Batch, key: Key, step):
        if task.evaluate:
            return task.evaluate(params, extra, frozen, batch, key)
        loss, out = task.loss(params, extra, frozen, batch, key, step)
        return {**out.metrics, "loss": loss}

    return evaluate
