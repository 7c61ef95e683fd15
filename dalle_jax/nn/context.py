"""The condition of a U-Net: a caption and a CLIP image embedding, as vectors and as tokens.

The sum of the vectors is added to the embedding of the diffusion step; attention sees the tokens.

Source: GLIDE (arXiv:2112.10741; openai/glide-text2im `text2im_model.py`) for captions, unCLIP
(arXiv:2204.06125) §2.1 for embeddings. Deliberate difference: embeddings of unit length are scaled
by sqrt(E) to numbers of variance 1, on which the paper says nothing.
"""

import flax.linen as nn
import jax.numpy as jnp

from dalle_jax import axes
from dalle_jax.nn import partition, stack, transformer
from dalle_jax.nn.transformer import TransformerConfig
from dalle_jax.nn.unet_blocks import Linear
from dalle_jax.types import Array, Batch, DtypePolicy


class TextEncoder(nn.Module):
    """Captions to one vector and T tokens.

    A slot without a token (id 0) has a learned vector for its position, and no slot is masked. The
    pooled vector is read at the last slot, as in GLIDE, whatever the length of the caption. It is
    usually padding, which sees the full caption because attention is bidirectional. Captions come
    in CLIP's form, with begin and end; the null caption is all padding, GLIDE's empty one.

    Attributes:
      config: sizes of the stack.
      text_len: T.
      vocab_size: text ids.
      features: width of the pooled vector.
      dtype: parameters, compute, islands.
    """

    config: TransformerConfig
    text_len: int
    vocab_size: int
    features: int
    dtype: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, text: Array) -> tuple[Array, Array]:
        """[B, T] int32 -> ([B, features], [B, T, D])."""
        dtype, c = self.dtype, self.config

        def table(name: str, rows: int, axis: str, std: float) -> Array:
            init = partition.param_with_axes(nn.initializers.normal(std), (axis, axes.EMBED))
            weight = self.param(name, init, (rows, c.width), dtype.param)
            return partition.replicated(weight.astype(dtype.compute))

        tokens = table("tokens", self.vocab_size, axes.VOCAB, 1.0)
        positions = table("positions", self.text_len, axes.POSITIONS, 0.5)
        padding = table("padding", self.text_len, axes.POSITIONS, 1.0)
        x = jnp.where((text == 0)[..., None], padding[None], tokens[text] + positions[None])
        x = stack.Stack(c, (None,) * c.num_layers, dtype=dtype, name="transformer")(x)
        x = transformer.Norm("layer", dtype, name="norm_final")(x)
        names = (axes.EMBED, axes.CONV_OUT)
        pooled = Linear(c.width, self.features, names=names, dtype=dtype, name="pooled")(x[:, -1])
        return pooled, x


class Context(nn.Module):
    """Caption and CLIP embedding to a vector for the step and the tokens for attention.

    Attributes:
      width: D of the tokens.
      features: width of the vector.
      text_encoder: stack of the text encoder; None = no captions.
      text_len: T.
      vocab_size: text ids.
      clip_width: E of the CLIP; 0 = no embeddings.
      clip_tokens: number of tokens for an embedding.
      dtype: parameters, compute, islands.
    """

    width: int
    features: int
    text_encoder: TransformerConfig | None = None
    text_len: int = 0
    vocab_size: int = 0
    clip_width: int = 0
    clip_tokens: int = 4
    dtype: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, cond: Batch) -> tuple[Array, Array]:
        """Encodes the conditions.

        Args:
          cond: text [B, T] int32 with a text encoder; clip [B, E] float32 and has_clip [B] bool
            with embeddings; False = the learned null embedding.

        Returns:
          ([B, features], [B, S, D]); the tokens of the embedding come before those of the caption.
        """
        dtype, vectors, tokens = self.dtype, [], []
        if self.clip_width:
            init = nn.initializers.normal(self.clip_width**-0.5)
            null = partition.param_with_axes(init, (axes.JOINT,))
            null = self.param("null_clip", null, (self.clip_width,), dtype.param)
            z = jnp.where(cond["has_clip"][:, None], cond["clip"], null[None])
            z = z * self.clip_width**0.5
            size = self.clip_tokens * self.width
            vectors.append(Linear(self.clip_width, self.features, dtype=dtype, name="clip_step")(z))
            z = Linear(self.clip_width, size, dtype=dtype, name="clip_context")(z)
            tokens.append(z.reshape(-1, self.clip_tokens, self.width))
        if self.text_encoder:
            encoder = TextEncoder(
                self.text_encoder, self.text_len, self.vocab_size, self.features, dtype, name="text"
            )
            pooled, text = encoder(cond["text"])
            vectors.append(pooled)
            tokens.append(text)
        return sum(vectors), jnp.concatenate(tokens, axis=1)
