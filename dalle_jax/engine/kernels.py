"""Seconds of kernels written by hand, of which no compiler has an estimate: an estimate of ours.

A Pallas kernel runs its body for every step of its grid while the blocks of the next step are
fetched. Its time is the slower of two: the matrix products of all steps at the chip's peak, each
dimension rounded up to the 128 lanes of the matrix unit (a head of 64 uses half of it), and the
blocks that are fetched and written, at the memory's bandwidth. Not counted: starting a step (some
0.35 microseconds a step on TPU v4, by its makers), exponentials. Steps that a kernel leaves at once
count in full. No hardware has confirmed these figures.
"""

import math
from collections.abc import Callable
from typing import Any

import jax

from dalle_jax.engine import flops
from dalle_jax.engine.chips import Chip

_LANES = 128


def seconds(fn: Callable, *arguments: Any, chip: Chip) -> float:
    """Seconds that the kernels of one call keep each device busy; 0 without kernels.

    Args:
      fn: jax-traceable; under `jax.shard_map` a kernel sees one device's part.
      *arguments: arrays or ShapeDtypeStructs.
      chip: what every device is.
    """
    return _seconds(jax.make_jaxpr(fn)(*arguments).jaxpr, chip)


def _seconds(jaxpr: Any, chip: Chip) -> float:
    return sum(_equation(eqn, chip) for eqn in jaxpr.eqns)


def _equation(eqn: Any, chip: Chip) -> float:
    if eqn.primitive.name == "pallas_call":
        grid = eqn.params["grid_mapping"]
        work = math.prod(grid.grid) * flops.count(eqn.params["jaxpr"], lanes=_LANES)
        moved = sum(_bytes(block, grid.grid) for block in grid.block_mappings)
        return max(work / chip.peak_flops, moved / chip.hbm_bytes_per_s)
    inside = [_seconds(jaxpr, chip) for jaxpr in flops.inner(eqn)]
    if eqn.primitive.name == "cond":
        return max(inside)
    return (eqn.params["length"] if eqn.primitive.name == "scan" else 1) * sum(inside)


def _bytes(block: Any, grid: tuple[int, ...]) -> int:
    """What one operand of a kernel moves: a block stays where the next step has the same one."""
    where = block.index_map_jaxpr.jaxpr
    used = {v for eqn in where.eqns for v in eqn.invars if not hasattr(v, "val")}
    used |= {v for v in where.outvars if not hasattr(v, "val")}
    changes = [i + 1 for i, v in enumerate(where.invars[: len(grid)]) if v in used]
    steps = math.prod(grid[: max(changes, default=0)])
    sizes = [size for size in block.ref_aval.shape]
    sizes[-1:] = [-(-size // _LANES) * _LANES for size in sizes[-1:]]
    return steps * math.prod(sizes) * block.array_aval.dtype.itemsize
