"""Text ids, image codes and diffusion steps as vectors.

A text slot is token + position. An image token is code + row + column; there is no table of grid**2
positions. A text slot without a token has a padding vector: the table has one extra row for each
position, and padding is never masked.

Source: Ramesh et al. 2021 (arXiv:2102.12092), §2.2 and appendix B.1, figure 10. The paper leaves
the text position table undecided; lucidrains/DALLE-pytorch stores padding as vocabulary + position
index, and so do we.
"""

import math

import flax.linen as nn
import jax.numpy as jnp

from dalle_jax import axes
from dalle_jax.nn import partition
from dalle_jax.types import Array, DtypePolicy


def timestep_features(t: Array, width: int) -> Array:
    """Cosines, then sines, of a step at width / 2 frequencies from 1 down to 1e-4.

    Args:
      t: [...] steps.
      width: even.

    Returns:
      [..., width] float32: bfloat16 does not resolve single steps above 256.

    Source: openai/guided-diffusion `nn.py` (`timestep_embedding`).
    """
    half = width // 2
    frequencies = jnp.exp(-math.log(10_000) / half * jnp.arange(half, dtype=jnp.float32))
    angles = t.astype(jnp.float32)[..., None] * frequencies.reshape((1,) * t.ndim + (half,))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class StreamEmbedding(nn.Module):
    """The five tables of the stream.

    Attributes:
      width: D.
      vocab_size: text ids; 0 is padding.
      text_len: T, text slots.
      num_codes: V, entries of the codebook.
      grid: g, side of the code grid.
      std: initial standard deviation of all tables.
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
            weight = self.param(name, init, (rows, self.width), self.dtype.param)
            return partition.replicated(weight)

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
          positions: [n] int32 in [0, grid**2), raster order.

        Returns:
          [..., n, D] in the compute dtype.
        """
        position = self.row_table[positions // self.grid] + self.column_table[positions % self.grid]
        x = self.image_table[codes]
        x = x + position.reshape((1,) * (x.ndim - position.ndim) + position.shape)
        return x.astype(self.dtype.compute)
