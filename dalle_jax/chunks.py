"""Work in chunks of one shape: one compilation, bounded memory, no row lost.

The last chunk is filled up with copies of the last row, whose results are dropped.
"""

from collections.abc import Callable, Iterator

import jax
import numpy as np


def rows(count: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Row indices of each chunk.

    Args:
      count: number of rows in total.
      size: rows of a chunk.

    Yields:
      (int [size] indices in [0, count), the last one repeated where rows are missing; how many of
      them are rows of this chunk).
    """
    for start in range(0, count, size):
        yield np.minimum(np.arange(start, start + size), count - 1), min(size, count - start)


def mapped(function: Callable, size: int) -> Callable[[np.ndarray], np.ndarray]:
    """`function` of an array [n, …], applied to chunks of `size` rows; gives host arrays."""

    def apply(array):
        parts = [np.asarray(function(array[some]))[:n] for some, n in rows(len(array), size)]
        return np.concatenate(parts)

    return apply


def power_of_two(count: int, maximum: int) -> int:
    """A chunk size for `count` rows: a power of two, so that few programs compile."""
    return min(maximum, 1 << max(count - 1, 0).bit_length())


def fitting(bytes_per_row: float, maximum: int) -> int:
    """Rows that fit into half of a device's free memory (a CPU: 0.5 GiB), from 1 to `maximum`."""
    stats = jax.local_devices()[0].memory_stats() or {}
    free = stats.get("bytes_limit", 2**30) - stats.get("bytes_in_use", 0)
    return max(1, min(maximum, int(free // 2 // bytes_per_row)))
