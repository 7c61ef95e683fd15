"""The interface between the engine and everything it can train.

The engine (`loop`, `train_state`, `sharding`, `checkpoint`) knows a `Task` and nothing else: no
model, no dataset, no flag. A new objective is a new file in `dalle_jax/tasks/`, one line in
`tasks.TASKS` and one config; `engine/loop.py` never grows for it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax

from dalle_jax.engine import sharding
from dalle_jax.types import Array, Batch, Key, Params

# Complete numpy arrays on every process; a preview applies it to its batch and its samples.
to_host = sharding.to_host


@flax.struct.dataclass
class Output:
    """The outputs of a loss beside its scalar.

    Attributes:
      metrics: name -> float32 scalar, already averaged over the global batch.
      extra: the next value of the task's non-trained variables (codebook EMA, counters), same
        structure as was passed in; None for a task without any.
    """

    metrics: dict[str, Array]
    extra: Any = None


@dataclasses.dataclass(frozen=True)
class Task:
    """Everything that the engine needs to train one network: a record of functions.

    Attributes:
      name: key in `tasks.TASKS`, stored with the checkpoint.
      batch_spec: name -> ShapeDtypeStruct of one *global* batch, leading axis B. Data and task
        must agree on it before anything compiles; a dry run needs no data.
      init: key -> (params, extra). Pure and jit-able. Leaves are boxed by
        `nn.with_logical_partitioning` with names of `axes`; an unboxed leaf is replicated.
      loss: (params, extra, frozen, batch, key, step) -> (scalar float32, Output). `step` is an
        int32 scalar for schedules; `key` is already folded with it.
      frozen: variables of networks that are not trained, as host arrays (boxed like params if they
        should be sharded), or as ShapeDtypeStructs in a task for a plan. They are an argument of
        the step, never a constant, never optimised and never saved. None without any.
      preview: (params, extra, frozen, batch, key) -> {name: images [n, h, w, 3] float in
        [-1, 1]}, a grid per name in the log. Called outside jit with the EMA params; it may jit
        its own functions. None for a task without pictures.
      evaluate: (params, extra, frozen, batch, key) -> {name: float32 scalar}; jit-able. The loop
        averages it over held-out batches with the EMA params. None = the loss's own metrics.
      flops: model FLOPs of one training step on the global batch: 3 x forward matmuls and
        convolutions (2 FLOPs per multiply-add), attention counted on allowed keys, remat not
        counted.
      decay_mask: params -> pytree of bool, True where weight decay applies. None = matrices and
        kernels (rank >= 2 beyond the stacked layer axis) but no embedding, gain or bias.
      warm_start: (params, extra) -> (params, extra) on host arrays, called once on a fresh
        workdir (never on resume): `init_from`. None = train from init.
      unit: a second unit of throughput beside images, e.g. ("tokens", 80) per example.
      alarms: name of a metric -> a text with the fault and its remedy, which the loop prints when a
        logged value of the metric rises above 0.
      keeps: name -> content of small files in the workdir that identify what the weights depend on:
        the tokenizer, the fingerprint of a frozen codec. The loop refuses a start whose files
        differ from the workdir's.
    """

    name: str
    batch_spec: dict[str, jax.ShapeDtypeStruct]
    init: Callable[[Key], tuple[Params, Any]]
    loss: Callable[[Params, Any, Any, Batch, Key, Array], tuple[Array, Output]]
    frozen: Any = None
    preview: Callable[..., dict[str, Array]] | None = None
    evaluate: Callable[..., dict[str, Array]] | None = None
    flops: float = 0.0
    decay_mask: Callable[[Params], Any] | None = None
    warm_start: Callable[[Params, Any], tuple[Params, Any]] | None = None
    unit: tuple[str, int] | None = None
    alarms: dict[str, str] = dataclasses.field(default_factory=dict)
    keeps: dict[str, bytes] = dataclasses.field(default_factory=dict)
