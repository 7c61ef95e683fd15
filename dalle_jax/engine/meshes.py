"""Device meshes with the axes data, fsdp and tensor, of any number of devices."""

import collections
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from dalle_jax import axes
from dalle_jax.config import ConfigDict
from dalle_jax.types import UsageError


def make_mesh(mesh_config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The (data, fsdp, tensor) mesh of `config.mesh`; for one device (1, 1, 1).

    Axes are `AxisType.Auto` (jax.make_mesh's default, Explicit, refuses linen's constraints).

    Args:
      mesh_config: sizes `data, fsdp, tensor`; one of them may be -1, the rest of the devices.
      devices: the devices; None = all devices of all processes.

    Raises:
      UsageError: if the product of the sizes is not the number of devices, or an axis other than
        data would cross TPU slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(mesh_config, len(devices))
    kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
    return Mesh(_grid(sizes, devices), axes.MESH_AXES, axis_types=kinds)


def local() -> Mesh:
    """This process's devices as one data axis, for work that no other process takes part in."""
    return make_mesh(ConfigDict(dict(data=-1, fsdp=1, tensor=1)), jax.local_devices())


def mesh_sizes(mesh_config: ConfigDict, num_devices: int) -> tuple[int, ...]:
    """Sizes of the mesh axes data, fsdp and tensor for `num_devices`, with -1 replaced.

    Raises:
      UsageError: if the product of the sizes is not the number of devices.
    """
    sizes = [int(mesh_config[name]) for name in axes.MESH_AXES]
    asked = ", ".join(f"{n}={s}" for n, s in zip(axes.MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise UsageError(f"mesh {asked}: sizes are positive, and at most one is -1 (the rest).")
    given = math.prod(size for size in sizes if size > 0)
    if -1 in sizes:
        if num_devices % given:
            raise UsageError(
                f"mesh {asked}: {num_devices} devices are not a multiple of {given}, the product "
                "of the given sizes; change one of them."
            )
        sizes[sizes.index(-1)] = num_devices // given
    elif given != num_devices:
        product = " x ".join(str(size) for size in sizes)
        raise UsageError(
            f"mesh {asked}: {product} = {given}, but there are {num_devices} devices; "
            "set one size to -1 to fill it."
        )
    return tuple(sizes)


def _grid(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices as an array of that shape, in which neighbours are close to one another."""
    # Without allow_split_physical_axes, (2, 128) on a 16x16 torus is refused.
    options = dict(devices=devices, allow_split_physical_axes=True)
    # GPU hosts have slice numbers too, but one network.
    slices = len({getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"})
    if slices <= 1:
        return mesh_utils.create_device_mesh(tuple(sizes), **options)
    data, *inside = sizes
    if data % slices:
        raise UsageError(
            f"mesh data={data} over {slices} TPU slices: only the data axis crosses the network "
            f"between slices, so it must be a multiple of {slices}."
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *inside), (slices, *(1 for _ in inside)), **options
    )


def describe(mesh: Mesh) -> str:
    """One line: mesh axes and the devices by kind."""
    kinds = collections.Counter(device.device_kind for device in mesh.devices.flat)
    sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return f"mesh ({sizes}) over {', '.join(f'{n} x {kind}' for kind, n in kinds.items())}"
