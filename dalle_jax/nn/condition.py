"""What the priors are conditioned on, and time: captions, CLIP text embeddings, diffusion steps.

Both priors begin with the same positions: a caption's tokens, then its CLIP embedding. There is no
separate text encoder: the priors are decoder-only, so the layers that read these positions causally
*are* the encoder, and tokens come in through a table of the prior's own.
"""

import math

import flax.linen as nn
import jax.numpy as jnp

from dalle_jax import axes
from dalle_jax.nn import partition
from dalle_jax.types import Array, DtypePolicy

# 17.2 / sqrt(1024): the deviation that the paper's scale gives each of the 1024 numbers. Pictures
# in [-1, 1] have about the same, and the noise schedules are made for them.
EMBEDDING_STD = 0.5375


def embedding_scale(joint_width: int) -> float:
    """What embeddings of unit length are multiplied by: E numbers of variance 0.5375**2.

    Source: unCLIP (arXiv:2204.06125) appendix C, 17.2 at E = 1024; stated there for that size only.
    """
    return EMBEDDING_STD * math.sqrt(joint_width)


def timestep_features(t: Array, width: int) -> Array:
    """Cosines, then sines of a step at width / 2 frequencies from 1 down to 1e-4.

    Args:
      t: [...] steps.
      width: even.

    Returns:
      [..., width] float32: in bfloat16 a step above 256 would lose its last digit.

    Source: openai/guided-diffusion (`timestep_embedding`).
    """
    half = width // 2
    frequencies = jnp.exp(-math.log(10_000) / half * jnp.arange(half, dtype=jnp.float32))
    angles = t.astype(jnp.float32)[..., None] * frequencies.reshape((1,) * t.ndim + (half,))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Condition(nn.Module):
    """A caption and its CLIP embedding as T + 1 positions of a stream, or learned nulls instead.

    Attributes:
      width: D.
      vocab_size: ids of captions; 0 = padding, which is a token like others and is not masked.
      text_len: T.
      joint_width: E.
      std: deviation of the tables at the start.
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
            return partition.whole(self.param(name, init, shape, self.dtype.param))

        rows = (axes.POSITIONS, axes.EMBED)
        vocab = (self.vocab_size, self.width)
        self.tokens = param("tokens", std, vocab, axes.VOCAB, axes.EMBED)
        self.positions = param("positions", std, (self.text_len + 1, self.width), *rows)
        # In the places of caption and embedding when they are dropped; places included.
        self.null = param("null", std, (self.text_len + 1, self.width), *rows)
        self.project = param(
            "project",
            self.joint_width**-0.5,
            (self.joint_width, self.width),
            axes.JOINT,
            axes.EMBED,
        )

    def __call__(self, text: Array, z_t: Array, dropped: Array | None = None) -> Array:
        """Caption and embedding, embedded.

        Args:
          text: [B, T] int32.
          z_t: [B, E] CLIP text embeddings of unit length.
          dropped: bool [B], True where the nulls take the place of both; None = nowhere.

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
        whole = jnp.concatenate([tokens, (scaled @ self.project.astype(dtype))[:, None]], axis=1)
        whole = whole + self.positions.astype(dtype)[None]
        if dropped is None:
            return whole
        null = jnp.broadcast_to(self.null.astype(dtype)[None], whole.shape)
        return jnp.where(dropped[:, None, None], null, whole)
