"""The training state: one record that is donated, sharded, saved and restored as a whole.

The matrices of layer stacks may lie folded in it (`layout`). Tasks, checkpoints and importers see
plain matrices: `seen_plain` stands between a task and the step that trains it, `Saved` between
the state and a checkpoint.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from dalle_jax import layout
from dalle_jax.engine import meshes, metrics, sharding
from dalle_jax.engine.task import Task
from dalle_jax.types import Array, Key, Params


@flax.struct.dataclass
class TrainState:
    """Everything a run must remember; all trees are plain (unboxed) nested dicts.

    Attributes:
      step: int32 scalar, number of finished updates.
      params: trained weights, as they are stored.
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


def seen_plain(task: Task, storage: Any) -> Task:
    """`task` for parameters as they are stored: it sees plain matrices itself.

    Inside a step this costs nothing: the layers fold their stack again (`nn/stack.py`), and
    XLA drops a reshape that undoes another.

    Args:
      task: whose functions take and give plain parameters.
      storage: `sharding.storage` of its parameters.
    """
    if not _folds(storage):
        return task

    def plainly(fn):
        return fn and (lambda params, *rest: fn(layout.plain(params, storage), *rest))

    def init(key):
        params, extra = task.init(key)
        return layout.stored(sharding.unbox(params), storage), extra

    def start(params, extra):
        params, extra = task.warm_start(layout.plain(params, storage), extra)
        return layout.stored(params, storage), extra

    return dataclasses.replace(
        task,
        init=init,
        loss=plainly(task.loss),
        evaluate=plainly(task.evaluate),
        preview=plainly(task.preview),
        warm_start=task.warm_start and start,
    )


class Saved:
    """A state in plain shapes, as it is saved: it restores on any mesh, bit for bit.

    Args:
      target: `shardings`' state of ShapeDtypeStructs.
      storage: `sharding.storage` of the parameters.

    Attributes:
      target: the same in plain shapes; what a checkpoint is restored to.
    """

    def __init__(self, target: TrainState, storage: Any):
        every = _state_storage(target, storage)
        self.target = layout.plain(target, every)
        self._folded = [i for i, s in enumerate(jax.tree.leaves(every)) if s.fold > 1]
        kinds = [jax.tree.leaves(every)[i] for i in self._folded]
        where = [jax.tree.leaves(target)[i].sharding for i in self._folded]
        self._plain, self._stored = (
            jax.jit(functools.partial(convert, storage=kinds), out_shardings=where)
            for convert in (layout.plain, layout.stored)
        )

    def of(self, state: TrainState) -> TrainState:
        """`state` with plain matrices: copies of the folded ones, the other arrays themselves."""
        return self._each(self._plain, state)

    def back(self, state: TrainState) -> TrainState:
        """The reverse of `of`."""
        return self._each(self._stored, state)

    def _each(self, convert: Callable[[list], list], state: TrainState) -> TrainState:
        if not self._folded:
            return state
        arrays, tree = jax.tree.flatten(state)
        for i, array in zip(self._folded, convert([arrays[i] for i in self._folded]), strict=True):
            arrays[i] = array
        return jax.tree.unflatten(tree, arrays)


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

    An optimiser leaf whose path ends in a parameter's path lies where that parameter lies if it
    has its (stored or plain) shape, and like its remaining dimensions if it is one dimension short
    of the plain shape (the row and column means of adafactor). Anything else (counts) is
    replicated.

    Args:
      boxed: `abstract`'s (params, extra).
      tx: the optimiser.
      has_ema: whether the state carries an average of the weights.
      mesh: the device mesh.
      rules: logical name -> mesh axes.

    Returns:
      (state of ShapeDtypeStructs with shardings, state of NamedShardings).
    """
    plain, extra = sharding.unbox(boxed)
    params = layout.stored(plain, sharding.storage(boxed[0], mesh, rules))
    shapes = jax.eval_shape(lambda *args: _assemble(*args, tx, has_ema), params, extra)
    params = sharding.shardings(boxed[0], mesh, rules)
    where = TrainState(
        step=sharding.replicated(mesh),
        params=params,
        ema=params if has_ema else None,
        extra=sharding.shardings(boxed[1], mesh, rules),
        opt_state=_like_params(shapes.opt_state, shapes.params, plain, params, mesh),
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
        f"{meshes.describe(mesh)}, rules {config.mesh.rules}; batch {batch}); "
        f"{task.flops / 1e9:,.1f} GFLOP per step"
    )


def _assemble(
    params: Params, extra: Any, tx: optax.GradientTransformation, has_ema: bool
) -> TrainState:
    ema = jax.tree.map(lambda x: x.astype(jnp.float32), params) if has_ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, ema, extra, tx.init(params))


def _like_params(opt_state: Any, params: Any, plain: Any, where: Any, mesh: Any) -> Any:
    """Shardings of the optimiser's leaves; see `shardings`."""
    owner = _owners(params, plain, where)

    def place(path, leaf):
        stored, plain, found = owner(path)
        if found is None:
            return sharding.replicated(mesh)
        if leaf.shape in (stored.shape, plain.shape):
            return found
        spec = (*found.spec, *[None] * (len(plain.shape) - len(found.spec)))
        short = [
            i for i in range(len(spec)) if plain.shape[:i] + plain.shape[i + 1 :] == leaf.shape
        ]
        if not short:
            return sharding.replicated(mesh)
        # Of a square matrix optax's v_row is short of the last dimension, v_col of the other.
        gone = short[0] if "v_col" in jax.tree_util.keystr(path) else short[-1]
        return NamedSharding(mesh, PartitionSpec(*spec[:gone], *spec[gone + 1 :]))

    return jax.tree_util.tree_map_with_path(place, opt_state)


def _state_storage(target: TrainState, storage: Any) -> TrainState:
    """A `Storage` for every leaf of the state: the moments of a folded matrix are folded too."""
    owner = _owners(target.params, storage)

    def find(path, leaf):
        param, found = owner(path)
        return found if found is not None and leaf.shape == param.shape else layout.PLAIN

    parts = {
        name: jax.tree_util.tree_map_with_path(find, getattr(target, name))
        for name in ("params", "ema", "opt_state")
    }
    others = jax.tree.map(lambda _: layout.PLAIN, (target.step, target.extra))
    return TrainState(step=others[0], extra=others[1], **parts)


def _owners(*trees: Any):
    """path -> the leaves of all trees of the parameter whose path it ends in; Nones without."""
    leaves = [jax.tree.leaves(tree) for tree in trees]
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(trees[0])]
    by_path = dict(zip(paths, zip(*leaves, strict=True), strict=True))

    def owner(path):
        found = (by_path[path[i:]] for i in range(len(path)) if path[i:] in by_path)
        return next(found, (None,) * len(trees))

    return owner


def _folds(storage: Any) -> bool:
    return any(s.fold > 1 for s in jax.tree.leaves(storage))
