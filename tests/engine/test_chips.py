"""The table of peaks against what JAX itself says of TPUs, and against its own clocks."""

import pytest
from jax.experimental.pallas import tpu as pltpu

from dalle_jax.engine import chips

# (device_kind, JAX's version, FLOPs a cycle of the matrix units)
TPUS = [
    ("TPU v4", pltpu.ChipVersion.TPU_V4, 2**18),
    ("TPU v5 lite", pltpu.ChipVersion.TPU_V5E, 2**17),
    ("TPU v5", pltpu.ChipVersion.TPU_V5P, 2**18),
    ("TPU v6 lite", pltpu.ChipVersion.TPU_V6E, 2**19),
]


@pytest.mark.parametrize("kind, version, flops_per_cycle", TPUS)
def test_tpu_peaks_agree_with_jax_and_with_the_clock(kind, version, flops_per_cycle):
    chip, one_core = chips.CHIPS[kind], pltpu.get_tpu_info_for_chip(version, 1)
    cores = 2 if version in (pltpu.ChipVersion.TPU_V4, pltpu.ChipVersion.TPU_V5P) else 1
    # 1 %: JAX rounds v6e to 9.20e14.
    assert chip.peak_flops == pytest.approx(cores * one_core.bf16_ops_per_second, rel=0.01)
    # JAX has 103 GB and 2.46 TB/s for v5p, where the data sheet has 95 GiB and 2.765 TB/s.
    assert chip.hbm_bytes == pytest.approx(cores * one_core.hbm_capacity_bytes, rel=0.02)
    assert chip.hbm_bytes_per_s == pytest.approx(cores * one_core.mem_bw_bytes_per_second, rel=0.13)
    assert chip.clock_hz * flops_per_cycle == pytest.approx(chip.peak_flops, rel=0.005)


def test_both_names_of_a_chip_are_one_chip():
    assert chips.CHIPS["TPU v5 lite"] is chips.CHIPS["TPU v5e"]
    assert "cpu" not in chips.PEAK_FLOPS
    assert chips.PEAK_FLOPS["NVIDIA H100 80GB HBM3"] == 989.4e12
