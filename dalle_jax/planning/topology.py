"""Clusters that are not here, by name: devices for the compiler, limits for the plan.

    v5e:16x16     a TPU slice: v4, v5e, v5p or v6e, chips along each axis of its torus
    2*v5e:16x16   two such slices, joined by the data-centre network
    h100:16x8     16 hosts with 8 H100 each (SXM, 80 GB)
    cpu:8         8 faked devices on this machine's CPU

The compilers come with optional packages: `pip install 'dalle_jax[plan]'` installs the TPU's, the
`cuda12` extra that of NVIDIA GPUs. Neither needs a driver or a device.

*Source:* names and environment: `jax.experimental.topologies`, tested with libtpu 0.0.52.
"""

import dataclasses
import difflib
import math
import os
import re
from typing import Any

import jax

from dalle_jax.engine import chips
from dalle_jax.planning import libtpu_env
from dalle_jax.types import UsageError

# The kind in jax.devices(), and the sizes that are for rent; the compiler accepts more.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
)  # fmt: skip
_TPUS = {
    "v4": ("TPU v4", _CUBE),
    "v5e": ("TPU v5e", _FLAT),
    "v5p": ("TPU v5p", _CUBE),
    "v6e": ("TPU v6e", _FLAT),
}
# "Available HBM" in GiB, from each compiler's out-of-memory message (libtpu 0.0.52).
_TPU_MEMORY = {"v4": 30.75, "v5e": 15.75, "v5p": 95.73, "v6e": 31.24}
_GPUS = {"h100": ("NVIDIA H100 80GB HBM3", ("1x1", "1x8", "2x8", "4x8", "8x8", "16x8", "32x8"))}
_CPUS = ("cpu:1", "cpu:8")
_NAME = re.compile(r"(?:(\d+)\*)?([a-z]\w*):(\d+(?:x\d+)*)")

# By default jax takes 75 % of a GPU's memory, with XLA_PYTHON_CLIENT_MEM_FRACTION more; above 0.92
# NCCL and the CUDA context have too little.
_GPU_SHARE = 0.92

# Public figures of the H100 SXM (data sheet, CUDA programming guide, 81,559 MiB from nvidia-smi),
# which the compiler would otherwise query from a device.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  clock_rate_ghz: 1.98
  memory_bandwidth: 3350000000000
  l2_cache_size: 52428800
  device_memory_size: 85520809984
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that a program can be compiled for.

    Attributes:
      name: the user's name for it.
      devices: the devices, for a mesh.
      chip: the chip of each device; None for a CPU.
      capacity: bytes per device that a program can use.
      slices: number of TPU slices, joined by a slower network.
    """

    name: str
    devices: tuple[jax.Device, ...]
    chip: chips.Chip | None
    capacity: int
    slices: int = 1


def known() -> list[str]:
    """Names of common topologies; slices of other sizes exist too."""
    names = [f"{kind}:{size}" for kind, (_, sizes) in (_TPUS | _GPUS).items() for size in sizes]
    return [*names, *_CPUS]


def prepare(name: str) -> None:
    """Sets the environment variables that the compiler of a topology reads.

    Call it before jax looks for devices. A plan never takes an accelerator of this machine: jax
    itself runs on the CPU.

    Raises:
      UsageError: for a name in an unknown form.
    """
    _, kind, sizes = _parse(name)
    jax.config.update("jax_platforms", "cpu")
    if kind in _TPUS:
        for key, value in libtpu_env.ENVIRONMENT.items():
            os.environ.setdefault(key, value)
    elif kind in _GPUS:
        # Without a driver there is no version to check.
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    else:
        flags = os.environ.get("XLA_FLAGS", "")
        if "xla_force_host_platform_device_count" not in flags:
            count = f"--xla_force_host_platform_device_count={math.prod(sizes)}"
            os.environ["XLA_FLAGS"] = f"{flags} {count}".strip()


def get(name: str) -> Topology:
    """The topology with that name, after `prepare`.

    Raises:
      UsageError: if there is none, or its compiler is not installed.
    """
    slices, kind, sizes = _parse(name)
    if kind in _TPUS:
        return _tpu(name, slices, kind, sizes)
    if slices > 1:
        raise UsageError(f"topology {name!r}: only TPUs have slices; more GPU hosts: h100:32x8.")
    return _gpu(name, kind, sizes) if kind in _GPUS else _cpu(name, sizes)


def _parse(name: str) -> tuple[int, str, list[int]]:
    """(slices, kind, sizes)."""
    match = _NAME.fullmatch(name)
    kinds = {**_TPUS, **_GPUS, "cpu": None}
    if not match or match[2] not in kinds:
        raise UsageError(f"topology {name!r} is unknown;{_near(name)}")
    sizes = [int(n) for n in match[3].split("x")]
    axes = {"v4": 3, "v5p": 3, "cpu": 1}.get(match[2], 2)
    if len(sizes) != axes or 0 in sizes or match[1] == "0":
        form = {1: "cpu:DEVICES", 2: f"{match[2]}:AxB", 3: f"{match[2]}:AxBxC"}[axes]
        form = "h100:HOSTSxGPUS" if match[2] in _GPUS else form
        raise UsageError(f"topology {name!r} is not of the form {form};{_near(name)}")
    return int(match[1] or 1), match[2], sizes


def _near(name: str) -> str:
    """A sentence with similar names and with the known forms."""
    # Clouds count chips: v5e-256, v5litepod-256 (v4 and v5p: half chips).
    clouds = re.fullmatch(r"(v4|v5e|v5p|v6e|v5litepod)-(\d+)", name)
    near: list[str] = []
    if clouds:
        kind = "v5e" if clouds[1] == "v5litepod" else clouds[1]
        count = int(clouds[2]) // (2 if kind in ("v4", "v5p") else 1)
        sizes = _TPUS[kind][1]
        near = [f"{kind}:{size}" for size in sizes if _product(size) == count]
    near = near or difflib.get_close_matches(name.split("*")[-1], known(), n=3, cutoff=0.5)
    meant = f" did you mean {' or '.join(near)}?" if near else ""
    forms = "v5e:16x16, v6e:16x16, v4:4x4x8, v5p:4x4x8, 2*v5e:16x16, h100:16x8, cpu:8"
    return f"{meant} Topologies are written like {forms}."


def _tpu(name: str, slices: int, kind: str, sizes: list[int]) -> Topology:
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"topology {name!r} needs the TPU's compiler, which is not installed: "
            "pip install 'dalle_jax[plan]' (no TPU is needed)."
        ) from error
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # one device per chip and not two
    if slices > 1:
        options["num_slices"] = slices
    shape = "x".join(map(str, sizes))
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{shape}", **options
        )
    except Exception as error:  # jaxlib raises several kinds for an impossible shape
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"there is no topology {name!r} ({reason}); sizes of {kind}: "
            f"{', '.join(_TPUS[kind][1])}."
        ) from error
    return Topology(
        name,
        tuple(description.devices),
        chips.CHIPS[_TPUS[kind][0]],
        capacity=int(_TPU_MEMORY[kind] * 2**30),
        slices=slices,
    )


def _gpu(name: str, kind: str, sizes: list[int]) -> Topology:
    from jax.experimental import topologies

    hosts, gpus = sizes
    try:
        description = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            topology=f"1x{hosts}x{gpus}",
            target_config=_H100.strip(),
        )
    except (NotImplementedError, RuntimeError) as error:
        raise UsageError(
            f"topology {name!r} needs the compiler for NVIDIA GPUs, which is not installed "
            f"({str(error).splitlines()[0]}): pip install 'dalle_jax[cuda12]' (no GPU is needed)."
        ) from error
    chip = chips.CHIPS[_GPUS[kind][0]]
    return Topology(name, tuple(description.devices), chip, int(chip.hbm_bytes * _GPU_SHARE))


def _cpu(name: str, sizes: list[int]) -> Topology:
    devices, count = jax.devices("cpu"), sizes[0]
    if len(devices) < count:
        raise UsageError(
            f"topology {name!r}: jax has started with {len(devices)} CPU devices; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}."
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Topology(name, tuple(devices[:count]), None, memory // count)


def _product(size: str) -> int:
    return math.prod(int(n) for n in size.split("x"))
