"""The training state: one record that is donated, sharded, saved and restored together.

The matrices of layer stacks may be stored folded (`layout`). Tasks, checkpoints and importers see
unfolded matrices: `unfolded` converts between a task and the step that trains it, `Folding` between
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
from dalle_jax.engine import console, meshes, sharding
from dalle_jax.engine.task import Task
from dalle_jax.types import Array, Key, Params


@flax.struct.dataclass
class TrainState:
    """Everything that a run must remember; all trees are unboxed nested dicts.

    Attributes:
      step: int32 scalar, number of finished updates.
      params: trained weights, in their stored (perhaps folded) shapes.
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


def unfolded(task: Task, storage: Any) -> Task:
    """`task` for stored parameters: its own functions receive them unfolded.

    Inside a step this costs nothing: the layers fold their stack again, and XLA drops a reshape
    that undoes another.

    Args:
      task: a task whose functions take and return unfolded parameters.
      storage: `sharding.storage` of its parameters.
    """
    if not _folds(storage):
        return task

    def unfold_first(fn):
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
        loss=unfold_first(task.loss),
        evaluate=unfold_first(task.evaluate),
        preview=unfold_first(task.preview),
        warm_start=task.warm_start and start,
    )


class Folding:
    """Converts a state between its stored shapes and the unfolded shapes of a checkpoint.

    A checkpoint in unfolded shapes restores on any mesh, bit for bit.

    Args:
      state_shapes: the stored state as ShapeDtypeStructs with shardings.
      storage: `sharding.storage` of the parameters.

    Attributes:
      unfolded_shapes: the unfolded state as ShapeDtypeStructs with shardings, which a checkpoint
        is restored to.
    """

    def __init__(self, state_shapes: TrainState, storage: Any):
        state_storage = _state_storage(state_shapes, storage)
        self.unfolded_shapes = layout.plain(state_shapes, state_storage)
        kinds, shapes = jax.tree.leaves(state_storage), jax.tree.leaves(state_shapes)
        self._folded = [i for i, kind in enumerate(kinds) if kind.fold > 1]
        self._unfold, self._fold = (
            jax.jit(
                functools.partial(convert, storage=[kinds[i] for i in self._folded]),
                out_shardings=[shapes[i].sharding for i in self._folded],
            )
            for convert in (layout.plain, layout.stored)
        )

    def unfold(self, state: TrainState) -> TrainState:
        """`state` with unfolded matrices: copies of the folded ones, all other arrays as is."""
        return self._convert(self._unfold, state)

    def fold(self, state: TrainState) -> TrainState:
        """The inverse of `unfold`."""
        return self._convert(self._fold, state)

    def _convert(self, convert: Callable[[list], list], state: TrainState) -> TrainState:
        if not self._folded:
            return state
        arrays, tree = jax.tree.flatten(state)
        for i, array in zip(self._folded, convert([arrays[i] for i in self._folded]), strict=True):
            arrays[i] = array
        return jax.tree.unflatten(tree, arrays)


def make_init(
    task: Task, tx: optax.GradientTransformation, *, has_ema: bool
) -> Callable[[Key], TrainState]:
    """A pure function key -> TrainState; jit it with the state's shardings."""

    def init(key: Key) -> TrainState:
        params, extra = sharding.unbox(task.init(key))
        return _assemble(params, extra, tx, has_ema)

    return init


def shapes_and_shardings(
    boxed: tuple[Any, Any],
    tx: optax.GradientTransformation,
    *,
    has_ema: bool,
    mesh: jax.sharding.Mesh,
    rules: sharding.Rules,
) -> tuple[TrainState, TrainState]:
    """Shapes and shardings of the state of a task.

    An optimiser leaf whose path ends in a parameter's path is sharded like that parameter if it has
    its (stored or unfolded) shape, and like its remaining dimensions if it lacks one dimension of
    the unfolded shape (the row and column means of adafactor). All other leaves (counts) are
    replicated.

    Args:
      boxed: (params, extra), as `abstract` returns them.
      tx: the optimiser.
      has_ema: whether the state has an average of the weights.
      mesh: the device mesh.
      rules: logical name -> mesh axes.

    Returns:
      (state of ShapeDtypeStructs with shardings, state of NamedShardings).
    """
    unfolded_params, extra = sharding.unbox(boxed)
    params = layout.stored(unfolded_params, sharding.storage(boxed[0], mesh, rules))
    shapes = jax.eval_shape(lambda *args: _assemble(*args, tx, has_ema), params, extra)
    params = sharding.shardings(boxed[0], mesh, rules)
    shardings = TrainState(
        step=sharding.replicated(mesh),
        params=params,
        ema=params if has_ema else None,
        extra=sharding.shardings(boxed[1], mesh, rules),
        opt_state=_like_params(shapes.opt_state, shapes.params, unfolded_params, params, mesh),
    )
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    return shapes, shardings


def warm_start(state: TrainState, task: Task, shardings: TrainState) -> TrainState:
    """`state` with the weights that `task.warm_start` returns; the optimiser stays fresh.

    Raises:
      ValueError: if the task changes the shapes of its variables.
    """
    params, extra = sharding.to_host((state.params, state.extra))
    new_params, new_extra = task.warm_start(params, extra)
    for old, new in ((params, new_params), (extra, new_extra)):
        if jax.tree.map(np.shape, old) != jax.tree.map(np.shape, new):
            raise ValueError(f"{task.name}: warm_start changed the shapes of the variables.")

    def place(new, old, sharding_of_new):
        return sharding.place(np.asarray(new, old.dtype), sharding_of_new)

    params = jax.tree.map(place, new_params, params, shardings.params)
    ema = shardings.ema
    if ema is not None:
        # A copy and not the same buffers: the first step receives both donated.
        ema = jax.tree.map(place, new_params, state.ema, ema)
    extra = jax.tree.map(place, new_extra, extra, shardings.extra)
    return state.replace(params=params, ema=ema, extra=extra)


def describe(task: Task, state_shapes: TrainState, mesh: jax.sharding.Mesh, config) -> str:
    """Two lines on a run before it starts: parameters per module, bytes, mesh, batch."""

    def count(tree):
        return sum(x.size for x in jax.tree.leaves(tree))

    leaves = jax.tree.leaves(state_shapes)
    total = sum(x.size * x.dtype.itemsize for x in leaves)
    per_device = sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    modules = state_shapes.params.get("params", state_shapes.params)
    parts = ", ".join(f"{name} {count(tree):,}" for name, tree in modules.items())
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    batch = f"{config.data.batch} ({config.data.batch // shards} per shard"
    if config.optim.accum_steps > 1:
        batch += f", {config.optim.accum_steps} micro-batches"
    return (
        f"{task.name}: {count(state_shapes.params):,} parameters ({parts})\n"
        f"training state {console.format_bytes(total)}, {console.format_bytes(per_device)} per "
        f"device; {meshes.describe(mesh)}, rules {config.mesh.rules}; batch {batch}); "
        f"{task.flops / 1e9:,.1f} GFLOP per step"
    )


def _assemble(
    params: Params, extra: Any, tx: optax.GradientTransformation, has_ema: bool
) -> TrainState:
    ema = jax.tree.map(lambda x: x.astype(jnp.float32), params) if has_ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, ema, extra, tx.init(params))


def _like_params(opt_state: Any, params: Any, unfolded_params: Any, shardings: Any, mesh: Any):
    """Shardings of the optimiser's leaves; see `shapes_and_shardings`."""
    owner = _owners(params, unfolded_params, shardings)

    def place(path, leaf):
        param, unfolded_param, owned = owner(path)
        if owned is None:
            return sharding.replicated(mesh)
        if leaf.shape in (param.shape, unfolded_param.shape):
            return owned
        shape = unfolded_param.shape
        spec = (*owned.spec, *[None] * (len(shape) - len(owned.spec)))
        absent = [i for i in range(len(spec)) if shape[:i] + shape[i + 1 :] == leaf.shape]
        if not absent:
            return sharding.replicated(mesh)
        # For a square matrix optax's v_row lacks the last dimension and v_col the other one.
        i = absent[0] if "v_col" in jax.tree_util.keystr(path) else absent[-1]
        return NamedSharding(mesh, PartitionSpec(*spec[:i], *spec[i + 1 :]))

    return jax.tree_util.tree_map_with_path(place, opt_state)


def _state_storage(state_shapes: TrainState, storage: Any) -> TrainState:
    """A `Storage` for every leaf of the state: the moments of a folded matrix are folded too."""
    owner = _owners(state_shapes.params, storage)

    def choose(path, leaf):
        param, owned = owner(path)
        return owned if owned is not None and leaf.shape == param.shape else layout.PLAIN

    parts = {
        name: jax.tree_util.tree_map_with_path(choose, getattr(state_shapes, name))
        for name in ("params", "ema", "opt_state")
    }
    others = jax.tree.map(lambda _: layout.PLAIN, (state_shapes.step, state_shapes.extra))
    return TrainState(step=others[0], extra=others[1], **parts)


def _owners(*trees: Any):
    """path -> one leaf per tree, for the parameter whose path `path` ends in; Nones without."""
    leaves = [jax.tree.leaves(tree) for tree in trees]
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(trees[0])]
    by_path = dict(zip(paths, zip(*leaves, strict=True), strict=True))

    def owner(path):
        matches = (by_path[path[i:]] for i in range(len(path)) if path[i:] in by_path)
        return next(matches, (None,) * len(trees))

    return owner


def _folds(storage: Any) -> bool:
    return any(s.fold > 1 for s in jax.tree.leaves(storage))
