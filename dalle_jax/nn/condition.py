"""The condition of both priors: a caption and its CLIP text embedding, as positions of a stream.

Both streams begin with the tokens of the caption, followed by its CLIP embedding. The priors have
no separate text encoder. They are decoder-only, so the layers that read these positions causally
are the encoder, and each prior has a token table of its own.
"""

import math

import flax.linen as nn
import jax.numpy as jnp

from dalle_jax import axes
from dalle_jax.nn import partition
from dalle_jax.types import Array, DtypePolicy

# 17.2 / sqrt(1024): with the paper's scale, the standard deviation of each of the 1024 numbers.
# Pictures in [-1, 1], for which the noise schedules were designed, have about the same.
EMBEDDING_STD = 0.5375


def embedding_scale(joint_width: int) -> float:
    """Factor that gives the E numbers of a unit embedding a variance of 0.5375**2.

    Source: unCLIP (arXiv:2204.06125) appendix C, which states 17.2 for E = 1024 and no other size.
    """
    return EMBEDDING_STD * math.sqrt(joint_width)


class Condition(nn.Module):
    """A caption and its CLIP embedding as T + 1 positions of a stream, or learned nulls.

    Attributes:
      width: D.
      vocab_size: text ids; 0 is padding, an ordinary token that is not masked.
      text_len: T.
      joint_width: E.
      std: initial standard deviation of the tables.
      dtype: parameters and compute.
    """

    width: int
    vocab_size: int
    text_len: int
    joint_width: int
    std: float
    dtype: DtypePolicy = DtypePolicy()

    def setup(self):
        """Declares the tables and the projection of z_t."""
        normal, std = nn.initializers.normal, self.std

        def param(name, std, shape, *names):
            init = partition.param_with_axes(normal(std), names)
            return partition.replicated(self.param(name, init, shape, self.dtype.param))

        rows = (axes.POSITIONS, axes.EMBED)
        vocab = (self.vocab_size, self.width)
        self.tokens = param("tokens", std, vocab, axes.VOCAB, axes.EMBED)
        self.positions = param("positions", std, (self.text_len + 1, self.width), *rows)
        # These replace caption and embedding, positions included, if both are dropped.
        self.null = param("null", std, (self.text_len + 1, self.width), *rows)
        shape = (self.joint_width, self.width)
        self.project = param("project", self.joint_width**-0.5, shape, axes.JOINT, axes.EMBED)

    def __call__(self, text: Array, z_t: Array, dropped: Array | None = None) -> Array:
        """The first T + 1 positions of the stream.

        Args:
          text: [B, T] int32.
          z_t: [B, E] CLIP text embeddings of unit length.
          dropped: bool [B], True = nulls replace both; None = all False.

        Returns:
          [B, T + 1, D] in the compute dtype.

        Raises:
          ValueError: if the shapes are not the config's.
        """
        if text.shape[1:] != (self.text_len,) or z_t.shape[1:] != (self.joint_width,):
            raise ValueError(
                f"text {text.shape} and z_t {z_t.shape}; expected [B, {self.text_len}] and "
                f"[B, {self.joint_width}]."
            )
        dtype = self.dtype.compute
        tokens = self.tokens.astype(dtype)[text]
        scaled = (z_t * embedding_scale(self.joint_width)).astype(dtype)
        x = jnp.concatenate([tokens, (scaled @ self.project.astype(dtype))[:, None]], axis=1)
        x = x + self.positions.astype(dtype)[None]
        if dropped is None:
            return x
        null = jnp.broadcast_to(self.null.astype(dtype)[None], x.shape)
        return jnp.where(dropped[:, None, None], null, x)
