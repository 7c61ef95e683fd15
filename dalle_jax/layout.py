"""How the matrices of a layer stack are stored on a mesh: words that engine and networks share.

The engine's rules choose a `Storage` for every array (`engine/sharding.py`). A network that runs a
stack of layers reads the `Gathers` in force (`nn/partition.py`). Neither imports the other.

Folded storage: [..., R, C] is stored as [..., m R, C / m], the same numbers in the same order. Its
rows are split over the mesh axis fsdp, and m is chosen so that a shard consists of full tiles. At
width 3968 over 128 chips a shard of the plain matrix has 31 rows, and the TPU compiler then turns
the reduce-scatter of the gradient into an all-reduce with twice the traffic; m = 8 gives 248 rows,
31 tiles of 8. If fsdp divides R, shard i of the folded and of the plain matrix hold the same
numbers, so folding moves nothing between devices.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

ROW_TILE = 8  # rows of a float32 tile on TPU
LANES = 128  # columns of a tile, and sides of the TPU's matrix unit (256 on v6e)


@dataclasses.dataclass(frozen=True)
class Storage:
    """How one array is stored; the default is unfolded and not gathered.

    Attributes:
      fold: m of this module's docstring; 1 = the plain shape.
      gathered: the rows are scattered over the mesh axis fsdp, and the layer that uses the matrix
        gathers it itself.
    """

    fold: int = 1
    gathered: bool = False

    def stored(self, x: Any) -> Any:
        """[..., R, C] -> [..., m R, C / m] of an array of jax or numpy, or a ShapeDtypeStruct."""
        return x if self.fold == 1 else _with_matrix(x, x.shape[-2] * self.fold)

    def plain(self, x: Any) -> Any:
        """The reverse of `stored`."""
        return x if self.fold == 1 else _with_matrix(x, x.shape[-2] // self.fold)


PLAIN = Storage()


def choose_fold(rows: int, columns: int, num_shards: int) -> int:
    """The smallest m for which every shard of m * rows consists of full tiles; 1 if there is none.

    Args:
      rows: R, a multiple of num_shards.
      columns: C; m divides it.
      num_shards: parts into which the rows are split.
    """
    fold = ROW_TILE // math.gcd(ROW_TILE, rows // num_shards)
    return fold if columns % fold == 0 else 1


def stored(tree: Any, storage: Any) -> Any:
    """`Storage.stored` of every leaf; `storage` has the same structure."""
    return jax.tree.map(lambda x, s: s.stored(x), tree, storage)


def plain(tree: Any, storage: Any) -> Any:
    """`Storage.plain` of every leaf; `storage` has the same structure."""
    return jax.tree.map(lambda x, s: s.plain(x), tree, storage)


@dataclasses.dataclass(frozen=True)
class Gathers:
    """The setting under which layers gather their own weights.

    Attributes:
      mesh: the device mesh.
      rows: mesh axis over which the rows of stored matrices are scattered.
      batch: mesh axes over which the leading axis of activations is split; includes `rows`.
      storage: (shape, logical names) of a stacked array -> its `Storage`.
      reduce_dtype: dtype in which gradients are added over devices; None = the dtype in which
        weights are gathered.
    """

    mesh: jax.sharding.Mesh
    rows: str
    batch: tuple[str, ...]
    storage: Callable[[Sequence[int], Sequence[str | None]], Storage]
    reduce_dtype: Any = None

    @property
    def batch_shards(self) -> int:
        """Parts into which a batch is split."""
        return math.prod(self.mesh.shape[axis] for axis in self.batch)


_in_force: contextvars.ContextVar[Gathers | None] = contextvars.ContextVar("gathers", default=None)


def gathers() -> Gathers | None:
    """The `Gathers` in force; None = the partitioner handles layers."""
    return _in_force.get()


@contextlib.contextmanager
def gathering(gathers: Gathers | None) -> Iterator[None]:
    """A context in which `gathers` is in force."""
    token = _in_force.set(gathers)
    try:
        yield
    finally:
        _in_force.reset(token)


def _with_matrix(x: Any, rows: int) -> Any:
    shape = (*x.shape[:-2], rows, x.shape[-2] * x.shape[-1] // rows)
    return x.update(shape=shape) if isinstance(x, jax.ShapeDtypeStruct) else x.reshape(shape)
