"""Our own time estimate for Pallas kernels, which XLA's cost model does not cover.

A Pallas kernel runs its body for every step of its grid while it fetches the blocks of the next
step. Its time is the longer of two: the matrix products of all steps at the chip's peak, with each
dimension rounded up to the 128 lanes of the matrix unit (a head of 64 uses half of it), and the
blocks that it fetches and writes, at the memory's bandwidth. The start of a step and exponentials
are not counted. Steps that a kernel skips count in full. No hardware has confirmed these figures.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core

from dalle_jax import layout
from dalle_jax.engine import flops
from dalle_jax.engine.chips import Chip


def seconds(fn: Callable, *arguments: Any, chip: Chip) -> float:
    """Seconds per device in the Pallas kernels of one call; 0 without kernels.

    Args:
      fn: jax-traceable; under `jax.shard_map` a kernel has one device's part of the arrays.
      *arguments: arrays or ShapeDtypeStructs.
      chip: the chip of all devices.
    """
    return _seconds(jax.make_jaxpr(fn)(*arguments).jaxpr, chip)


def _seconds(jaxpr: Any, chip: Chip) -> float:
    return sum(_equation(eqn, chip) for eqn in jaxpr.eqns)


def _equation(eqn: Any, chip: Chip) -> float:
    if eqn.primitive.name == "pallas_call":
        grid = eqn.params["grid_mapping"]
        work = math.prod(grid.grid) * flops.count(eqn.params["jaxpr"], lanes=layout.LANES)
        moved = sum(_bytes(block, grid.grid) for block in grid.block_mappings)
        return max(work / chip.peak_flops, moved / chip.hbm_bytes_per_s)
    inside = [_seconds(jaxpr, chip) for jaxpr in flops.inner(eqn)]
    if eqn.primitive.name == "cond":
        return max(inside)
    return (eqn.params["length"] if eqn.primitive.name == "scan" else 1) * sum(inside)


def _bytes(block: Any, grid: tuple[int, ...]) -> int:
    """Bytes that one operand of a kernel moves: only steps with another block move one."""
    index_map = block.index_map_jaxpr.jaxpr
    read = [*index_map.outvars, *(v for eqn in index_map.eqns for v in eqn.invars)]
    used = {v for v in read if not isinstance(v, jax.extend.core.Literal)}
    changes = [i + 1 for i, v in enumerate(index_map.invars[: len(grid)]) if v in used]
    steps = math.prod(grid[: max(changes, default=0)])
    *rows, columns = block.ref_aval.shape
    columns = -(-columns // layout.LANES) * layout.LANES
    return steps * math.prod(rows) * columns * block.array_aval.dtype.itemsize
