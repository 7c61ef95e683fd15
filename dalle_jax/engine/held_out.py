"""Evaluations and previews during training: held-out batches, averaged weights, fixed noise."""

from collections.abc import Callable
from typing import Any

import jax

from dalle_jax.engine import interrupt, prefetch, sharding
from dalle_jax.engine.program import Program
from dalle_jax.engine.train_state import TrainState
from dalle_jax.types import Batch, Key

# fold_in numbers of the noise streams; the training steps count up from 0.
_EVAL, _PREVIEW = 2**32 - 2, 2**32 - 3


class HeldOut:
    """What a run computes on its held-out batches.

    Args:
      program: the run's program.
      frozen: `Task.frozen` on the devices.
      read: i -> held-out batch i, global.
      key: the run's base key.
      watchdog: learns of every batch.
    """

    def __init__(
        self,
        program: Program,
        frozen: Any,
        read: Callable[[int], Batch],
        key: Key,
        watchdog: interrupt.Watchdog,
    ):
        self._program, self._frozen, self._read = program, frozen, read
        self._key, self._watchdog = key, watchdog

    def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        """Means of the metrics over all held-out batches, with the same noise each time.

        Args:
          state: the training state.
          step: number of finished steps, for the watchdog.
        """
        means: dict[str, float] = {}
        config, key = self._program.config, jax.random.fold_in(self._key, _EVAL)
        count = config.train.eval_batches
        with prefetch.Prefetch(self._read, range(count), config.data.prefetch) as feed:
            for i, batch in feed:
                self._watchdog.begin(f"evaluation batch {i + 1} after step {step}")
                metrics = self._program.evaluate(
                    _averaged(state), state.extra, self._frozen, batch,
                    jax.random.fold_in(key, i), state.step,
                )  # fmt: skip
                for name, value in jax.device_get(metrics).items():
                    means[name] = means.get(name, 0.0) + float(value) / count
        return means

    def preview(self, state: TrainState, step: int) -> dict[str, Any]:
        """`Task.preview` of the first held-out batch on the host, same noise each time."""
        self._watchdog.begin(f"the preview after step {step}")
        key = jax.random.fold_in(self._key, _PREVIEW)
        previews = self._program.task.preview(
            _averaged(state), state.extra, self._frozen, self._read(0), key
        )
        return sharding.to_host(dict(previews))


def _averaged(state: TrainState) -> Any:
    return state.params if state.ema is None else state.ema
