"""Seconds of kernels written by hand, of which no compiler has an estimate: an estimate of ours.

A Pallas kernel runs its body for every step of its grid while the blocks of the next step are
fetched. Its time is the slower of two: the matrix products of all steps at the chip's peak, each
dimension rounded up to the 128 lanes of the matrix unit (a head of 64 uses half of it), and the
blocks that are fetched and written, at the memory's bandwidth. Not counted: starting a step,
exponentials. Steps that a kernel leaves at once count in full. No hardware has confirmed these
figures.
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
        work = math.prod(grid.grid) * flops.count(eqn.params["jaxpr"], lanes=layout.LANES)
        moved = sum(_bytes(block, grid.grid) for block in grid.block_mappings)
        return max(work / chip.peak_flops, moved / chip.hbm_bytes_per_s)
    inside = [_seconds(jaxpr, chip) for jaxpr in flops.inner(eqn)]
    if eqn.primitive.name == "cond":
        return max(inside)
    return (eqn.params["length"] if eqn.primitive.name == "scan" else 1) * sum(inside)


def _bytes(block: Any, grid: tuple[int, ...]) -> int:
    """What one operand of a kernel moves: a block stays where the next step has the same one."""
    where = block.index_map_jaxpr.jaxpr
    read = [*where.outvars, *(v for eqn in where.eqns for v in eqn.invars)]
    used = {v for v in read if not isinstance(v, jax.extend.core.Literal)}
    changes = [i + 1 for i, v in enumerate(where.invars[: len(grid)]) if v in used]
    steps = math.prod(grid[: max(changes, default=0)])
    *rows, columns = block.ref_aval.shape
    columns = -(-columns // layout.LANES) * layout.LANES
    return steps * math.prod(rows) * columns * block.array_aval.dtype.itemsize
