"""Where a network meets the mesh: named parameters, named activations, layers device by device.

A module names the logical axis (`dalle_jax.axes`) of each dimension; the engine's rules map it to
mesh axes. No other file under nn/ or models/ uses a partitioning API of flax or jax.

XLA's partitioner handles all weights except the matrices of layer stacks that the rules scatter
over fsdp, which are most of any big model. `layer` runs each such layer device by device and
gathers the weights of one layer at a time. The TPU partitioner would all-reduce full gradients, or
merge the reductions over data and fsdp (12B, compiled: 3.51 instead of 2.76 s per step).
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax

from dalle_jax import axes, layout
from dalle_jax.types import Array, Key, Params

Layer = Callable[[Params, Array, Key | None], Array]


def param_with_axes(init: Callable[..., Array], names: tuple[str | None, ...]):
    """An initializer whose value is boxed with the logical axis name of each dimension.

    Args:
      init: (key, shape, dtype) -> array, e.g. `nn.initializers.normal(0.02)`.
      names: one name of `dalle_jax.axes` per dimension; None = never sharded.
    """
    return nn.with_logical_partitioning(init, names)


def rebox(boxed: Params, values: Params) -> Params:
    """`values` boxed like `boxed`, a tree of the same structure (possibly abstract)."""

    def one(box, value):
        return box.replace_boxed(value) if _is_box(box) else value

    return jax.tree.map(one, boxed, values, is_leaf=_is_box)


def constrain(x: Array, *names: str | None) -> Array:
    """`x` in the layout that the rules in force give to its logical axes; outside a mesh, `x`.

    Args:
      x: an activation of rank len(names).
      *names: one `ACT_...` name of `dalle_jax.axes` per dimension; None = replicated.

    Raises:
      ValueError: if there is not one name per dimension (flax would silently ignore the names).
    """
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} axis names {names} for an array of shape {x.shape}.")
    return nn.with_logical_constraint(x, names)


def replicated(weight: Array) -> Array:
    """`weight`, gathered on every device before it is used.

    For tables and kernels outside layer stacks. Without it the partitioner splits the activations
    along the weight's axis, and to split them by batch again it gathers the activations of the
    global batch (XLA's warning is "involuntary full rematerialization").
    """
    return constrain(weight, *[None] * weight.ndim)


@contextlib.contextmanager
def unconstrained() -> Iterator[None]:
    """A context in which `constrain` and `layer` leave everything to the partitioner.

    For sampling, whose leading axes (few prompts, many candidates) are not the training batch that
    the rules are written for.
    """
    with nn.logical_axis_rules(()), layout.gathering(None):
        yield


def num_batch_shards(mesh: jax.sharding.Mesh | None) -> int:
    """Parts into which `split_batch` splits an axis."""
    return math.prod(mesh.shape[axis] for axis in _batch_axes(mesh)) if mesh is not None else 1


def split_batch(tree: Any, mesh: jax.sharding.Mesh | None, axis: int = 0) -> Any:
    """Arrays with one axis split over the mesh axes data and fsdp; without a mesh, unchanged.

    For sampling, which has no rules and names the axis of prompts or candidates itself.
    """
    if mesh is None:
        return tree
    spec = jax.sharding.PartitionSpec(*[None] * axis, _batch_axes(mesh))
    sharding = jax.sharding.NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding), tree)


def platform() -> str:
    """JAX's name ("tpu", "cpu", …) of the platform that the program is traced for.

    It is that of the mesh in force if there is one: a plan's mesh differs from JAX's own platform.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def by_device(
    run: Callable[..., Array], names: Sequence[str | None], shape: Sequence[int]
) -> Callable[..., Array]:
    """`run` on each device's own part of its arguments, for kernels that XLA cannot split.

    Args:
      run: a function of arrays whose arguments and result all have these names and this shape.
      names: one logical name per dimension along which the parts are independent; None = the
        dimension is not split.
      shape: shape of the arrays. If a dimension is not divisible (the single example of `init`),
        all devices compute everything.
    """
    rules, mesh = nn.get_logical_axis_rules(), jax.sharding.get_abstract_mesh()
    if not rules or mesh.empty:  # one device, or inside of a layer that runs device by device
        return run
    spec = nn.logical_to_mesh_axes(names)
    for size, mesh_axes in zip(shape, spec, strict=True):
        split = mesh_axes if isinstance(mesh_axes, tuple) else (mesh_axes,) if mesh_axes else ()
        if size % math.prod(mesh.shape[axis] for axis in split):
            return run
    return jax.shard_map(run, in_specs=spec, out_specs=spec, check_vma=False)


def storage(boxed: Params) -> Any:
    """How each array of a layer stack is stored under the rules in force, a tree of `Storage`.

    Args:
      boxed: the stacked parameters [L, ...], possibly abstract, boxed with their names.
    """
    gathers = layout.gathers()

    def one(leaf):
        return layout.PLAIN if gathers is None else gathers.storage(leaf.value.shape, leaf.names)

    return jax.tree.map(one, boxed, is_leaf=_is_box)


def layer(run: Layer, storage: Any, dtype: Any) -> Layer:
    """`run` as a function of a slice of the stack as it is stored.

    If the rules scatter the matrices, the layer runs under `jax.shard_map`: each device casts its
    shards to `dtype`, gathers the full matrices and computes its own examples. The transpose adds
    the gradients of the fsdp devices with a reduce-scatter and then, on the remaining shard, those
    of the data devices. The partitioner handles a batch that does not split evenly over the devices
    (the single example of `init`), with the same result.

    Args:
      run: (plain parameters of one layer, x [B, ...], keys [B] or None) -> [B, ...]. Every output
        row depends on its own row of x and keys alone.
      storage: `storage` of the stack.
      dtype: the layer's compute dtype.
    """
    gathers = layout.gathers()
    if gathers is None or not any(s.gathered for s in jax.tree.leaves(storage)):
        return run
    spec, batch = jax.sharding.PartitionSpec, jax.sharding.PartitionSpec(gathers.batch)
    specs = jax.tree.map(lambda s: spec(gathers.rows) if s.gathered else spec(), storage)

    def on_one_device(params, x, keys):
        def full(w, s):
            return s.plain(_gather(w, gathers, dtype)) if s.gathered else w

        with unconstrained():
            return run(jax.tree.map(full, params, storage), x, keys)

    def on_all(params, x, keys):
        if len(x) % gathers.batch_shards:
            return run(layout.plain(params, storage), x, keys)
        # Unchecked, because Pallas kernels do not declare the axes over which they vary.
        mapped = jax.shard_map(
            on_one_device,
            mesh=gathers.mesh,
            in_specs=(specs, batch, batch),
            out_specs=batch,
            check_vma=False,
        )
        return mapped(params, x, keys)

    return on_all


def in_chunks(run: Callable[[Params, Array], Array], size: int) -> Callable[[Params, Array], Array]:
    """`run` on `size` examples at a time, on each device's own examples if a batch is sharded.

    For a frozen network that is applied to a batch before another network trains on the result. A
    program for one picture is smaller and compiles faster than one for a device's share of the
    batch (the paper's codec on a TPU: 115 CPU seconds for one 256 px picture, 189 for four).

    Args:
      run: (params, x [b, ...]) -> [b, ...], every output row a function of its own row of x. It is
        not differentiated.
      size: examples in a chunk; 0 = all at once.
    """
    if not size:
        return run
    gathers = layout.gathers()
    spec = jax.sharding.PartitionSpec

    def chunked(params, x):
        return jax.lax.map(lambda one: run(params, one[None])[0], x, batch_size=size)

    def on_all(params, x):
        if gathers is None:
            return chunked(params, x)
        if len(x) % gathers.batch_shards:
            return run(params, x)

        def on_one_device(params, x):
            with unconstrained():
                return chunked(params, x)

        batch = spec(gathers.batch)
        mapped = jax.shard_map(
            on_one_device, mesh=gathers.mesh, in_specs=(spec(), batch), out_specs=batch
        )
        return mapped(params, x)

    return on_all


def keep_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Remat policy that saves everything but gathered weights; the backward pass gathers again.

    Otherwise "no remat" would save the full matrices of the stack on every device.
    """
    return primitive.name not in _GATHER + _FREE


# The primitives of `_gather` before and after differentiation.
_GATHER = ("custom_vjp_call", "all_gather")
# Their results, between the stack, the gather and the matrix, would be copies of one or the other.
_FREE = ("slice", "squeeze", "pvary", "reshape")


def _gather(shard: Array, gathers: layout.Gathers, dtype: Any) -> Array:
    """The full matrix in `dtype` from this device's rows of it."""

    @jax.custom_vjp
    def gather(shard):
        return jax.lax.all_gather(shard.astype(dtype), gathers.rows, axis=0, tiled=True)

    def backward(_, gradient):
        gradient = gradient.astype(gathers.reduce_dtype or dtype)
        rows = jax.lax.psum_scatter(gradient, gathers.rows, scatter_dimension=0, tiled=True)
        return (rows.astype(shard.dtype),)

    gather.defvjp(lambda shard: (gather(shard), None), backward)
    # Before the gather, so that the transpose adds over data only after it has scattered.
    others = tuple(axis for axis in gathers.batch if axis != gathers.rows)
    return gather(jax.lax.pcast(shard, others, to="varying") if others else shard)


def _batch_axes(mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    return tuple(name for name in mesh.axis_names if name != axes.TENSOR)


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)
