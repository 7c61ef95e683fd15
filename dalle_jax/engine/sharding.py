"""Shardings: the mesh, the rules, and the shardings that follow from logical axis names.

This is the only module that enters a mesh; `meshes` makes it. Models name the axes of their arrays
with the constants of `axes`; a rule table (`axes.RULES`, chosen by `config.mesh.rules`) maps each
name to mesh axes. The parallelism of a run is a field of its config, and a checkpoint from one mesh
restores on another.

The dimensions of an array take mesh axes from left to right: of the axes that the rule allows, in
order, a dimension takes each one that (a) no earlier dimension of this array has taken and (b)
divides the rest of the dimension. So if a rule table maps two dimensions of an array to one mesh
axis, the first dimension takes it. A dimension that takes no axis is replicated; if (b) is the
reason, that is reported once, since at scale it costs memory.

Matrices of layer stacks have another sharding if the rules map one of their dimensions to fsdp and
the mesh has no tensor axis: by rows over fsdp, folded (`layout`), and each layer gathers its own
matrices (`nn/partition.py`). Gains and biases of such a stack, a few thousandths of its numbers,
are replicated: gathering them layer by layer would take longer than it saves (at 12B, 13 D of
12 D**2 numbers, 0.05 GiB with moments and average). If fsdp does not divide the rows, or tensor is
more than 1, the second paragraph applies, and the partitioner decides the rest.
"""

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle_jax import axes, layout
from dalle_jax.config import ConfigDict
from dalle_jax.types import Batch, UsageError

logger = logging.getLogger(__name__)

Rules = Mapping[str, tuple[str, ...]]

_reported: set[str] = set()


@dataclasses.dataclass(frozen=True)
class Names:
    """Logical axis names of one array, as a leaf of a tree (a tuple is none); None = nameless."""

    axes: tuple[str | None, ...] | None


def rules(mesh_config: ConfigDict) -> dict[str, tuple[str, ...]]:
    """The rule table of `config.mesh.rules`: logical name -> mesh axes.

    "NAME" is a table of `axes.RULES`; "NAME,mlp=fsdp,vocab=fsdp+tensor,codes=" changes some of its
    rows (nothing after the sign = replicated).

    Raises:
      UsageError: for an unknown table, logical name or mesh axis.
    """
    name, *changes = mesh_config.rules.replace(" ", "").split(",")
    if name not in axes.RULES:
        raise UsageError(f"mesh.rules={name!r} is unknown; use one of {sorted(axes.RULES)}.")
    table = dict(axes.RULES[name])
    for change in changes:
        logical, sign, mesh_axes = change.partition("=")
        if not sign or logical not in table:
            raise UsageError(
                f"mesh.rules: {change!r} is not LOGICAL=AXES with a logical name of "
                f"{', '.join(axes.LOGICAL)}."
            )
        table[logical] = tuple(mesh_axes.split("+")) if mesh_axes else ()
        if not set(table[logical]) <= set(axes.MESH_AXES):
            raise UsageError(
                f"mesh.rules: {change!r} names an unknown mesh axis; use "
                f"{', '.join(axes.MESH_AXES)}, joined by +."
            )
    return table


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules, reduce_dtype: Any = None) -> Iterator[Mesh]:
    """Enters the mesh and the rules together; sharding constraints in models take effect within.

    Args:
      mesh: the device mesh.
      rules: logical name -> mesh axes.
      reduce_dtype: dtype in which devices sum the gradients of layer matrices; None = the compute
        dtype.
    """
    pairs = [(name, tuple(mesh_axes) or None) for name, mesh_axes in rules.items()]
    gathers = None
    if _layers_gather(mesh, rules):
        batch = tuple(rules[axes.ACT_BATCH])
        choose = functools.partial(storage_of, mesh=mesh, rules=rules)
        gathers = layout.Gathers(mesh, axes.FSDP, batch, choose, reduce_dtype)
    with jax.set_mesh(mesh), nn.logical_axis_rules(pairs), layout.gathering(gathers):
        yield mesh


def storage(boxed: Any, mesh: Mesh, rules: Rules) -> Any:
    """The storage of each array: the tree of `unbox(boxed)` with a `layout.Storage` per leaf.

    Raises:
      ValueError: for a name without a rule.
    """
    check_names(boxed, rules)

    def choose(leaf):
        return storage_of(np.shape(unbox(leaf)), _names(leaf), mesh=mesh, rules=rules)

    return jax.tree.map(choose, boxed, is_leaf=_is_box)


def storage_of(
    shape: Sequence[int], names: Sequence[str | None] | None, *, mesh: Mesh, rules: Rules
) -> layout.Storage:
    """The storage of one array, by the rule in this module's docstring.

    Args:
      shape: the unfolded shape.
      names: one logical name (or None) per dimension; None = nameless.
      mesh: the device mesh.
      rules: logical name -> mesh axes.
    """
    if not _is_stacked(names) or len(shape) != 3 or not _layers_gather(mesh, rules):
        return layout.PLAIN
    shards = mesh.shape[axes.FSDP]
    on_fsdp = any(axes.FSDP in rules[name] for name in names[1:] if name is not None)
    if not on_fsdp or shape[1] % shards:
        return layout.PLAIN
    return layout.Storage(layout.choose_fold(shape[1], shape[2], shards), gathered=True)


def check_names(boxed: Any, rules: Rules) -> None:
    """Refuses logical names without a rule: flax would silently replicate such arrays.

    Raises:
      ValueError: with the array, the axis name and the known names.
    """
    for path, leaf in _leaves(boxed):
        for name in _names(leaf) or ():
            if name is not None and name not in rules:
                raise ValueError(
                    f"{jax.tree_util.keystr(path)} has the axis name {name!r}, for which there is "
                    f"no rule; use the constants of dalle_jax.axes: {', '.join(sorted(rules))}."
                )


def shardings(boxed: Any, mesh: Mesh, rules: Rules) -> Any:
    """NamedShardings of a tree of (boxed) arrays or ShapeDtypeStructs.

    Args:
      boxed: leaves boxed by `nn.with_logical_partitioning`; an unboxed leaf is replicated.
      mesh: the device mesh.
      rules: logical name -> mesh axes.

    Returns:
      The tree of `unbox(boxed)` with a NamedSharding per leaf, for the folded and the unfolded
      array alike.

    Raises:
      ValueError: for a name without a rule, or unless there is one name per dimension.
    """
    check_names(boxed, rules)
    uneven = []

    def place(path, leaf):
        names = _names(leaf)
        if names is None:
            return replicated(mesh)
        shape = np.shape(unbox(leaf))
        path_text = jax.tree_util.keystr(path)
        if len(names) != len(shape):
            raise ValueError(f"{path_text} has shape {shape} but axis names {names}.")
        if storage_of(shape, names, mesh=mesh, rules=rules).gathered:
            return NamedSharding(mesh, PartitionSpec(None, axes.FSDP, None))
        if _is_stacked(names) and len(shape) == 2 and _layers_gather(mesh, rules):
            return replicated(mesh)
        return NamedSharding(mesh, spec(shape, names, mesh, rules, path_text, uneven))

    tree = jax.tree_util.tree_map_with_path(place, boxed, is_leaf=_is_box)
    more = f"; and {len(uneven) - 4} more" if len(uneven) > 4 else ""
    text = "; ".join(uneven[:4]) + more
    if text and text not in _reported:
        _reported.add(text)
        logger.warning("not divisible by their mesh axis, so replicated: %s.", text)
    return tree


def spec(
    shape: Sequence[int],
    names: Sequence[str | None],
    mesh: Mesh,
    rules: Rules,
    array: str = "",
    uneven: list[str] | None = None,
) -> PartitionSpec:
    """PartitionSpec of one array, by the rule in this module's docstring.

    Args:
      shape: the array's shape.
      names: one logical name (or None) per dimension.
      mesh: the device mesh.
      rules: logical name -> mesh axes.
      array: the array's name in reports.
      uneven: list that gets a line for each dimension that its mesh axis does not divide.
    """
    taken: set[str] = set()
    parts = []
    for size, name in zip(shape, names, strict=True):
        part: list[str] = []
        for axis in rules[name] if name is not None else ():
            count = mesh.shape[axis]
            if count == 1 or axis in taken:
                continue
            if size % (count * math.prod(mesh.shape[a] for a in part)):
                if uneven is not None:
                    uneven.append(f"{array} {tuple(shape)} {name} over {axis}={count}")
                continue
            part.append(axis)
            taken.add(axis)
        parts.append(tuple(part) if len(part) > 1 else part[0] if part else None)
    return PartitionSpec(*parts)


def unbox(boxed: Any) -> Any:
    """The arrays of a boxed tree, without their boxes.

    Not `nn.meta.unbox`: inside a mesh it adds flax's own constraints, which ignore divisibility and
    refuse a ShapeDtypeStruct.
    """

    def value(leaf):
        return leaf.value if _is_box(leaf) else leaf

    return jax.tree.map(value, boxed, is_leaf=_is_box)


def names(boxed: Any) -> Any:
    """The tree of `unbox` with a `Names` per leaf."""
    return jax.tree.map(lambda leaf: Names(_names(leaf)), boxed, is_leaf=_is_box)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over data and fsdp together, the other axes not split."""
    return NamedSharding(mesh, PartitionSpec((axes.DATA, axes.FSDP)))


def check_batch(size: int, mesh: Mesh, field: str, accum_steps: int = 1) -> None:
    """Refuses a global batch that cannot be split evenly.

    Raises:
      UsageError: with the nearest sizes that can be.
    """
    shards = mesh.shape[axes.DATA] * mesh.shape[axes.FSDP]
    unit = shards * max(accum_steps, 1)  # `optim.make` refuses 0
    if size % unit:
        parts = f"{shards} data shards" + (f" x {accum_steps} micro-batches" * (accum_steps > 1))
        lower = size // unit * unit
        near = f"{lower} or {lower + unit}" if lower else f"{unit}"
        raise UsageError(f"{field}={size} is not a multiple of {unit} ({parts}); use {near}.")


def local_rows(mesh: Mesh, size: int) -> np.ndarray:
    """Indices in a global batch of `size` that the devices of this process hold, ascending.

    Neighbours on a torus need not be neighbours in the mesh, so a host's rows need not be one
    block; processes that share a tensor axis hold the same rows.
    """
    parts = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[part] for part in parts]))


def to_global(batch: Batch, sharding: NamedSharding) -> Batch:
    """Global arrays from this process's rows of the batch.

    Args:
      batch: name -> host array, leading axis = `local_rows`.
      sharding: `batch_sharding`'s.
    """
    make = jax.make_array_from_process_local_data
    return {name: make(sharding, np.asarray(value)) for name, value in batch.items()}


def place(tree: Any, shardings: Any) -> Any:
    """Global arrays from host arrays; every process must have all of each array.

    Not `device_put`: with several processes, each may only fill its own devices.

    Args:
      tree: arrays on the host.
      shardings: NamedShardings, same structure.
    """

    def put(value, sharding):
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(put, tree, shardings)


def to_host(tree: Any) -> Any:
    """Complete numpy arrays on every process; all processes must call it together."""

    def get(value):
        if not isinstance(value, jax.Array) or value.is_fully_addressable:
            return np.asarray(value)
        if value.is_fully_replicated:
            return np.asarray(value.addressable_data(0))
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(value, tiled=True)

    return jax.tree.map(get, tree)


def _layers_gather(mesh: Mesh, rules: Rules) -> bool:
    """Whether layers gather their own weights: fsdp splits batch and weights, tensor nothing."""
    return (
        mesh.shape[axes.FSDP] > 1
        and mesh.shape[axes.TENSOR] == 1
        and axes.FSDP in rules[axes.ACT_BATCH]
    )


def _is_stacked(names: Sequence[str | None] | None) -> bool:
    return bool(names) and names[0] == axes.LAYERS


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)


def _leaves(boxed: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(boxed, is_leaf=_is_box)


def _names(leaf: Any) -> tuple[str | None, ...] | None:
    return tuple(leaf.names) if isinstance(leaf, nn.Partitioned) else None
