"""Text ids and image codes to the vectors of one stream.

Text is token + position, an image token is code + row + column (not a table of grid**2
positions). A text slot without a token holds a padding vector of its own: the table has one extra
row per position, and padding is never masked.

Source: Ramesh et al. 2021 (arXiv:2102.12092), §2.2 and appendix B.1, figure 10. The paper leaves
the text position table undecided; lucidrains/DALLE-pytorch stores padding as vocabulary + position
index, and so do we.
"""

import flax.linen as nn
import jax.numpy as jnp

from dalle_jax import axes
from dalle_jax.nn import partition
from dalle_jax.types import Array, DtypePolicy


class StreamEmbedding(nn.Module):
    """The five tables of the stream.

    Attributes:
      width: D.
      vocab_size: V of the text; id 0 is padding.
      text_len: T, text slots.
      num_codes: entries of the codebook.
      grid: g, side of the code grid.
      std: deviation of all tables at the start.
      dtype: parameters and compute.
    """

    width: int
    vocab_size: int
    text_len: int
    num_codes: int
    grid: int
    std: float
    dtype: DtypePolicy = DtypePolicy()

    def setup(self):
        """Declares the tables, [rows, D] each."""

        def table(name: str, rows: int, axis: str) -> Array:
            init = partition.param_with_axes(nn.initializers.normal(self.std), (axis, axes.EMBED))
            return partition.whole(self.param(name, init, (rows, self.width), self.dtype.param))

        self.text_table = table("text", self.vocab_size + self.text_len, axes.VOCAB)
        self.position_table = table("position", self.text_len, axes.POSITIONS)
        self.image_table = table("image", self.num_codes, axes.VOCAB)
        self.row_table = table("row", self.grid, axes.POSITIONS)
        self.column_table = table("column", self.grid, axes.POSITIONS)

    def text(self, text: Array) -> Array:
        """[B, T] int32, 0 = padding -> [B, T, D] in the compute dtype."""
        padding = self.vocab_size + jnp.arange(self.text_len, dtype=text.dtype)[None]
        ids = jnp.where(text == 0, padding, text)
        x = self.text_table[ids] + self.position_table[None]
        return x.astype(self.dtype.compute)

    def image(self, codes: Array, positions: Array) -> Array:
        """Codes at raster positions.

        Args:
          codes: [..., n] int32 in [0, num_codes).
          positions: [n] int32 in [0, grid**2).

        Returns:
          [..., n, D] in the compute dtype.
        """
        place = self.row_table[positions // self.grid] + self.column_table[positions % self.grid]
        x = self.image_table[codes]
        x = x + place.reshape((1,) * (x.ndim - place.ndim) + place.shape)
        return x.astype(self.dtype.compute)
