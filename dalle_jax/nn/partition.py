"""The touch points between a network and the mesh: named parameters, named activations, layers.

A module says which logical axis (`dalle_jax.axes`) each dimension is; the engine's rules say which
mesh axes carry it. No other file under nn/ or models/ names a partitioning API of flax or jax.

Weights outside layer stacks are left to the partitioner. The matrices of a stack, most of any big
model, are not where the rules scatter them over fsdp: `layer` then runs each layer device by device
and gathers its weights itself, one layer at a time. Left to itself the TPU partitioner all-reduces
their gradients whole, or merges the reductions over data and fsdp (measured by compiling at 12B:
3.51 instead of 2.76 s per step).
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax

from dalle_jax import layout
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
    """`values` boxed like `boxed`, a tree of the same structure (abstract ones will do)."""

    def one(box, value):
        return box.replace_boxed(value) if _is_box(box) else value

    return jax.tree.map(one, boxed, values, is_leaf=_is_box)


def constrain(x: Array, *names: str | None) -> Array:
    """`x`, laid out as the rules in force say for its logical axes; outside a mesh, `x` itself.

    Args:
      x: an activation of rank len(names).
      *names: one `ACT_...` name of `dalle_jax.axes` per dimension; None = replicated.

    Raises:
      ValueError: if there is not one name per dimension (flax would silently do nothing).
    """
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} axis names {names} for an array of shape {x.shape}.")
    return nn.with_logical_constraint(x, names)


def whole(weight: Array) -> Array:
    """`weight`, gathered on every device before it is used.

    For tables and kernels outside layer stacks, where the partitioner would rather split the
    activations along the weight's axis and then cannot find the way back to the batch: it gathers
    the activations of the global batch (XLA says so, "involuntary full rematerialization").
    """
    return constrain(weight, *[None] * weight.ndim)


@contextlib.contextmanager
def unconstrained() -> Iterator[None]:
    """A context in which `constrain` and `layer` leave everything to the partitioner.

    For decoding, whose arrays have other leading axes (few prompts, many candidates) than the
    training batch that the rules speak of.
    """
    with nn.logical_axis_rules(()), layout.gathering(None):
        yield


def platform() -> str:
    """JAX's name ("tpu", "cpu", …) of what the program is traced for: of the mesh in force, if any.

    A plan's mesh is of another platform than JAX's own.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def by_device(
    run: Callable[..., Array], names: Sequence[str | None], shape: Sequence[int]
) -> Callable[..., Array]:
    """`run` on each device's own part of its arguments, for kernels that XLA cannot split.

    Args:
      run: of arrays that all have the names and shape given, and so has its result.
      names: one logical name per dimension along which the parts are independent; None = whole.
      shape: of the arrays. Where a dimension does not divide (a single example of `init`), all
        devices compute everything.
    """
    rules, mesh = nn.get_logical_axis_rules(), jax.sharding.get_abstract_mesh()
    if not rules or mesh.empty:  # one device, or inside of a layer that runs device by device
        return run
    spec = nn.logical_to_mesh_axes(names)
    for size, where in zip(shape, spec, strict=True):
        split = where if isinstance(where, tuple) else (where,) if where else ()
        if size % math.prod(mesh.shape[axis] for axis in split):
            return run
    return jax.shard_map(run, in_specs=spec, out_specs=spec, check_vma=False)


def storage(boxed: Params) -> Any:
    """How each array of a layer stack is stored under the rules in force, a tree of `Storage`.

    Args:
      boxed: the stacked parameters [L, ...] (abstract ones will do), boxed with their names.
    """
    how = layout.gathers()

    def one(leaf):
        return layout.PLAIN if how is None else how.storage(leaf.value.shape, leaf.names)

    return jax.tree.map(one, boxed, is_leaf=_is_box)


def layer(run: Layer, stored: Any, dtype: Any) -> Layer:
    """`run` as a function of a slice of the stack as it is stored.

    Where the rules scatter the matrices, the layer runs under `jax.shard_map`: each device casts
    its shards to `dtype`, gathers the whole matrices and sees its own examples only. The transpose
    adds the gradients of the fsdp devices with a reduce-scatter and then, on the shard that is
    left, those of the data devices. A batch that does not split evenly over the devices (a single
    example of `init`) is left to the partitioner, with the same result.

    Args:
      run: (plain parameters of one layer, x [B, ...], keys [B] or None) -> [B, ...]. Every output
        row depends on its own row of x and keys alone.
      stored: `storage` of the stack.
      dtype: the layer's compute dtype.
    """
    how = layout.gathers()
    if how is None or not any(s.gathered for s in jax.tree.leaves(stored)):
        return run
    spec, batch = jax.sharding.PartitionSpec, jax.sharding.PartitionSpec(how.batch)
    where = jax.tree.map(lambda s: spec(how.rows) if s.gathered else spec(), stored)

    def on_one_device(params, x, keys):
        def whole(w, s):
            return s.plain(_gather(w, how, dtype)) if s.gathered else w

        with unconstrained():
            return run(jax.tree.map(whole, params, stored), x, keys)

    def on_all(params, x, keys):
        if len(x) % how.batch_shards:
            return run(layout.plain(params, stored), x, keys)
        # Unchecked, because kernels written by hand do not say over which axes they vary.
        mapped = jax.shard_map(
            on_one_device,
            mesh=how.mesh,
            in_specs=(where, batch, batch),
            out_specs=batch,
            check_vma=False,
        )
        return mapped(params, x, keys)

    return on_all


def in_chunks(run: Callable[[Params, Array], Array], size: int) -> Callable[[Params, Array], Array]:
    """`run` on `size` examples at a time; where the rules scatter a batch, on each device's own.

    For a network that is applied to a whole batch before another one is trained on the result: a
    program for one picture is smaller and faster to compile than one for a device's share (the
    paper's codec on a TPU: 115 instead of 189 CPU seconds for 1 and 4 pictures of 256 px).

    Args:
      run: (params, x [b, ...]) -> [b, ...], every output row of its own row of x. No gradient is
        asked of it.
      size: examples of a chunk; 0 = all at once.
    """
    if not size:
        return run
    how = layout.gathers()
    spec = jax.sharding.PartitionSpec

    def chunked(params, x):
        return jax.lax.map(lambda one: run(params, one[None])[0], x, batch_size=size)

    def on_all(params, x):
        if how is None:
            return chunked(params, x)
        if len(x) % how.batch_shards:
            return run(params, x)

        def on_one_device(params, x):
            with unconstrained():
                return chunked(params, x)

        batch = spec(how.batch)
        mapped = jax.shard_map(
            on_one_device, mesh=how.mesh, in_specs=(spec(), batch), out_specs=batch
        )
        return mapped(params, x)

    return on_all


def keep_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Remat policy that keeps everything except gathered weights, which backward gathers again.

    Without it "no remat" would keep the whole stack's matrices on every device.
    """
    return primitive.name not in _GATHER + _FREE


# What `_gather` looks like before and after differentiation.
_GATHER = ("custom_vjp_call", "all_gather")
# Between the stack, the gather and the matrix: kept, they would be copies of one or the other.
_FREE = ("slice", "squeeze", "pvary", "reshape")


def _gather(shard: Array, how: layout.Gathers, dtype: Any) -> Array:
    """The whole matrix in `dtype` from this device's rows of it."""

    @jax.custom_vjp
    def gather(shard):
        return jax.lax.all_gather(shard.astype(dtype), how.rows, axis=0, tiled=True)

    def backward(_, gradient):
        gradient = gradient.astype(how.reduce_dtype or dtype)
        rows = jax.lax.psum_scatter(gradient, how.rows, scatter_dimension=0, tiled=True)
        return (rows.astype(shard.dtype),)

    gather.defvjp(lambda shard: (gather(shard), None), backward)
    # Declared before the gather, so that in the transpose the sum over data is one of shards.
    others = tuple(axis for axis in how.batch if axis != how.rows)
    return gather(jax.lax.pcast(shard, others, to="varying") if others else shard)


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)
