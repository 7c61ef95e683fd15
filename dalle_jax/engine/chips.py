"""Peak rates and memory of accelerators, by the name that JAX gives them: the only such table.

A device is one that `jax.devices()` lists: one chip, for TPU v4 and v5p as well (megacore). The
peak is dense bfloat16 with float32 accumulation, whatever dtype a run uses: so MFU compares runs,
and a run in float32 shows its loss.

*Sources:* TPU: Google Cloud's pages of the versions (peak, memory, bandwidth per chip); clocks are
those of XProf's device table, and peak / clock is the whole number of FLOPs of the matrix units
(131,072 a cycle on v5e, 262,144 on v4 and v5p, 524,288 on v6e). GPU: NVIDIA's data sheets of A100,
H100 and H200, without structured sparsity; the clock is the boost clock at which the stated peak
is reached.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator.

    Attributes:
      name: its usual name.
      peak_flops: dense bfloat16 FLOP/s, 2 per multiply-add.
      hbm_bytes: physical memory; a TPU program may use about 0.25 GiB less.
      hbm_bytes_per_s: bandwidth of the memory.
      clock_hz: converts a TPU compiler's estimated cycles to seconds.
    """

    name: str
    peak_flops: float
    hbm_bytes: int
    hbm_bytes_per_s: float
    clock_hz: float


def _tpu(name: str, peak: float, gib: int, bandwidth: float, ghz: float) -> Chip:
    return Chip(name, peak, gib * 2**30, bandwidth, ghz * 1e9)


def _gpu(name: str, peak: float, gb: int, bandwidth: float, ghz: float) -> Chip:
    return Chip(name, peak, gb * 10**9, bandwidth, ghz * 1e9)


_V5E = _tpu("TPU v5e", 197e12, 16, 819e9, 1.5)
_V5P = _tpu("TPU v5p", 459e12, 95, 2765e9, 1.75)
_V6E = _tpu("TPU v6e", 918e12, 32, 1640e9, 1.75)

# device_kind -> chip. Some TPU kinds have two names, old and new.
CHIPS = {
    "TPU v4": _tpu("TPU v4", 275e12, 32, 1228e9, 1.05),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "NVIDIA A100-SXM4-40GB": _gpu("A100 SXM 40 GB", 312e12, 40, 1555e9, 1.41),
    "NVIDIA A100-SXM4-80GB": _gpu("A100 SXM 80 GB", 312e12, 80, 2039e9, 1.41),
    "NVIDIA A100 80GB PCIe": _gpu("A100 PCIe 80 GB", 312e12, 80, 1935e9, 1.41),
    "NVIDIA H100 80GB HBM3": _gpu("H100 SXM", 989.4e12, 80, 3350e9, 1.83),
    "NVIDIA H100 PCIe": _gpu("H100 PCIe", 756e12, 80, 2000e9, 1.62),
    "NVIDIA H200": _gpu("H200 SXM", 989.4e12, 141, 4800e9, 1.83),
}

# device_kind -> dense bfloat16 FLOP/s. A kind that is not here (a CPU, above all) has no MFU.
PEAK_FLOPS = {kind: chip.peak_flops for kind, chip in CHIPS.items()}
