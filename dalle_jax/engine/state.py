"""The training state: one record that is donated, sharded, saved and restored as a whole."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dalle_jax.engine import metrics, sharding
from dalle_jax.engine.task import Task
from dalle_jax.types import Array, Key, Params


@flax.struct.dataclass
class TrainState:
    """Everything a run must remember; all trees are plain (unboxed) nested dicts.

    Attributes:
      step: int32 scalar, number of finished updates.
      params: trained weights.
      ema: exponential moving average of the weights, float32, same tree; None when off.
      extra: the task's non-trained variables (codebook averages, counters); None without any.
      opt_state: optimiser state.
    """

    step: Array
    params: Params
    ema: Params | None
    extra: Any
    opt_state: Any


def abstract(task: Task, key: Key) -> tuple[Any, Any]:
    """Shapes of (params, extra), boxed with logical axis names; nothing is computed."""
    return jax.eval_shape(task.init, key)


def make_init(
    task: Task, tx: optax.GradientTransformation, *, has_ema: bool
) -> Callable[[Key], TrainState]:
    """A pure function key -> TrainState, to be jitted with the state's shardings."""

    def init(key: Key) -> TrainState:
        params, extra = sharding.unbox(task.init(key))
        return _assemble(params, extra, tx, has_ema)

    return init


def shardings(
    boxed: tuple[Any, Any],
    tx: optax.GradientTransformation,
    *,
    has_ema: bool,
    mesh: jax.sharding.Mesh,
    rules: sharding.Rules,
) -> tuple[TrainState, TrainState]:
    """Shapes and shardings of the state of a task.

    Optimiser moments live where their weights live: an optimiser leaf whose path ends in a
    parameter's path and that has its shape takes its sharding. Anything else (counts, factored
    vectors of adafactor, which are rows + columns and not rows x columns) is replicated.

    Args:
      boxed: `abstract`'s (params, extra).
      tx: the optimiser.
      has_ema: whether the state carries an average of the weights.
      mesh: the device mesh.
      rules: logical name -> mesh axes.

    Returns:
      (state of ShapeDtypeStructs with shardings, state of NamedShardings).
    """
    shapes = jax.eval_shape(
        lambda params, extra: _assemble(params, extra, tx, has_ema), *sharding.unbox(boxed)
    )
    params = sharding.shardings(boxed[0], mesh, rules)
    where = TrainState(
        step=sharding.replicated(mesh),
        params=params,
        ema=params if has_ema else None,
        extra=sharding.shardings(boxed[1], mesh, rules),
        opt_state=_like_params(shapes.opt_state, shapes.params, params, mesh),
    )
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where
    )
    return target, where


def warm_start(state: TrainState, task: Task, where: TrainState) -> TrainState:
    """`state` with the weights that `task.warm_start` makes of it; the optimiser stays fresh.

    Raises:
      ValueError: if the task returns other shapes than it was given.
    """
    params, extra = sharding.to_host((state.params, state.extra))
    new_params, new_extra = task.warm_start(params, extra)
    for old, new in ((params, new_params), (extra, new_extra)):
        if jax.tree.map(np.shape, old) != jax.tree.map(np.shape, new):
            raise ValueError(f"{task.name}: warm_start changed the shapes of the variables.")

    def place(new, old, target):
        return sharding.place(np.asarray(new, old.dtype), target)

    params = jax.tree.map(place, new_params, params, where.params)
    # The EMA is a copy and not the same buffers: both are donated to the first step.
    ema = jax.tree.map(place, new_params, state.ema, where.ema) if where.ema is not None else None
    extra = jax.tree.map(place, new_extra, extra, where.extra)
    return state.replace(params=params, ema=ema, extra=extra)


def describe(task: Task, target: TrainState, mesh: jax.sharding.Mesh, config) -> str:
    """What is about to be trained: parameters by module, bytes, mesh, batch."""

    def count(tree):
        return sum(x.size for x in jax.tree.leaves(tree))

    def held(tree):
        leaves = jax.tree.leaves(tree)
        total = sum(x.size * x.dtype.itemsize for x in leaves)
        shards = (np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
        return total, sum(shards)

    total, per_device = held(target)
    modules = target.params.get("params", target.params)
    parts = ", ".join(f"{name} {count(tree):,}" for name, tree in modules.items())
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    batch = f"{config.data.batch} ({config.data.batch // shards} per shard"
    if config.optim.accum_steps > 1:
        batch += f", {config.optim.accum_steps} micro-batches"
    return (
        f"{task.name}: {count(target.params):,} parameters ({parts})\n"
        f"training state {metrics.size(total)}, {metrics.size(per_device)} per device; "
        f"{sharding.describe(mesh)}, rules {config.mesh.rules}; batch {batch}); "
        f"{task.flops / 1e9:,.1f} GFLOP per step"
    )


def _assemble(
    params: Params, extra: Any, tx: optax.GradientTransformation, has_ema: bool
) -> TrainState:
    ema = jax.tree.map(lambda x: x.astype(jnp.float32), params) if has_ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, ema, extra, tx.init(params))


def _like_params(opt_state: Any, params: Any, where: Any, mesh: jax.sharding.Mesh) -> Any:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    places = jax.tree.leaves(where)
    by_path = {
        path: (leaf.shape, place) for (path, leaf), place in zip(leaves, places, strict=True)
    }

    def place(path, leaf):
        for start in range(len(path)):
            shape, found = by_path.get(path[start:], (None, None))
            if shape == leaf.shape:
                return found
        return sharding.replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, opt_state)
