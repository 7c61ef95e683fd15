"""The sparse attention masks of DALL-E over one text + image stream.

Positions 0 .. text_len-1 are text slots, followed by the image tokens in raster order. Text is
causal. Every image token sees every text slot, padding included (it is learned, not masked), and
the earlier image tokens that its kind allows. One softmax runs over both.

  full    every earlier image token.
  row     a window in *raster* order that reaches back to the same column of the previous row:
          grid + 1 keys with itself (33 on a 32x32 grid), not "the same row".
  column  the same column of this and earlier rows.
  conv    the causal half of a kernel x kernel window in raster order. It wraps around at the row
          edges, as an unpadded flat convolution does (61 keys for 11x11 on a wide grid).

A `Mask` is a static, hashable description, so that an attention implementation can dispatch on its
kind. Inside a graph it is computed from iotas: as numpy constants, three 1280x1280 tables would add
10 MB to the program.

Source: Ramesh et al. 2021 (arXiv:2102.12092), appendix B.1 and figure 11; Child et al. 2019.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from dalle_jax.types import Array, UsageError

KINDS = ("full", "row", "column", "conv")


@dataclasses.dataclass(frozen=True)
class Mask:
    """A mask over text_len + rows * grid positions; with grid 0 it is plain causal text.

    Attributes:
      kind: one of KINDS.
      text_len: text slots before the image.
      grid: width of the code grid in codes; 0 = no image.
      kernel: side of the conv window, odd.
      rows: height of the code grid; 0 = grid.
    """

    kind: str
    text_len: int
    grid: int
    kernel: int = 11
    rows: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UsageError(f"attention kind {self.kind!r} is unknown; use one of {KINDS}.")
        if self.kernel % 2 != 1:
            raise UsageError(f"conv attention kernel {self.kernel} must be odd; 11 is the paper's.")

    @property
    def height(self) -> int:
        """Rows of the code grid."""
        return self.rows or self.grid

    @property
    def num_codes(self) -> int:
        """Positions of the image."""
        return self.height * self.grid

    @property
    def length(self) -> int:
        """T, the number of positions."""
        return self.text_len + self.num_codes

    def allowed(self, query: Array, key: Array) -> Array:
        """Whether each query position may attend to each key position.

        Args:
          query: int array of positions in [0, length).
          key: int array of positions, of equal rank, that broadcasts against `query`.

        Returns:
          bool array of the broadcast shape. numpy in, numpy out; inside a graph, iotas in.
        """
        allowed = key <= query
        if not self.grid or self.kind == "full":
            return allowed
        # Distances in raster order do not depend on the position of the image; columns do.
        back = query - key
        if self.kind == "row":
            near = back <= self.grid
        elif self.kind == "column":
            near = back % self.grid == 0
        else:
            # back = dr * grid + dc with 0 <= dr <= half and |dc| <= half. On a grid no wider than
            # the kernel the windows of successive rows touch, and together they are one run.
            half = self.kernel // 2
            if self.grid <= self.kernel:
                near = back <= half * self.grid + half
            else:
                shifted = back + half
                near = (shifted % self.grid < self.kernel) & (shifted // self.grid <= half)
        return allowed & ((query < self.text_len) | (key < self.text_len) | near)

    def table(self) -> np.ndarray:
        """numpy bool [T, T]: True = the query (row) sees the key (column)."""
        positions = np.arange(self.length)
        return self.allowed(positions[:, None], positions[None, :])

    def graph(self) -> Array:
        """`table`, computed from iotas in the graph."""
        positions = jnp.arange(self.length)
        return self.allowed(positions[:, None], positions[None, :])

    def num_allowed(self) -> int:
        """Number of allowed (query, key) pairs, on which attention FLOPs are counted."""
        return int(self.table().sum())


def pattern(
    kinds: tuple[str, ...], last: str, num_layers: int, text_len: int, grid: int, kernel: int = 11
) -> tuple[Mask, ...]:
    """The masks of a stack of layers: `kinds` repeated, and `last` in the last layer.

    The paper's ("row", "column", "row", "row") with last "conv" gives column to layers 2, 6, 10 ...
    (1-based): 47 row, 16 column and 1 conv for 64 layers.

    Args:
      kinds: cycled from the first layer.
      last: kind of the last layer; "" = no exception.
      num_layers: L.
      text_len: text slots.
      grid: side of the code grid.
      kernel: side of the conv window, odd.

    Raises:
      UsageError: for an unknown kind, an even kernel or an empty pattern.
    """
    if not kinds:
        raise UsageError(f"attention=() is empty; give one or more of {KINDS}.")
    names = [kinds[i % len(kinds)] for i in range(num_layers)]
    if last and names:
        names[-1] = last
    return tuple(Mask(name, text_len, grid, kernel) for name in names)
