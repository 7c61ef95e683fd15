"""DALL-E: a sparse transformer over one stream of text ids and image codes.

The stream is text_len text slots and grid**2 codes in raster order, without begin tokens: the
last text slot predicts code 0 (the paper mentions a start-of-image position but specifies no
embedding for one). Text and image positions have separate output heads, and each head is applied
only at positions that predict its vocabulary: image logits at the last text slot and at all codes
but the last, text logits at all text slots but the last.

Source: Ramesh et al. 2021 (arXiv:2102.12092), §2.2 and appendix B. Deliberate differences: two
untied heads, one per vocabulary, instead of one (at 12B this saves 60 % of the head's FLOPs); the
initial standard deviation of the embeddings is a field.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax import axes
from dalle_jax.nn import cpu_products, embed, masks, partition, stack, transformer
from dalle_jax.nn.transformer import TransformerConfig
from dalle_jax.types import Array, DtypePolicy, Key, UsageError

TEXT_WEIGHT = 1 / 8  # paper §2.2; the image gets the rest


@dataclasses.dataclass(frozen=True)
class DalleConfig:
    """Sizes of a DALL-E.

    Attributes:
      text_len: T, text slots.
      vocab_size: text ids, 0 = padding.
      num_codes: V of the codebook.
      grid: g, side of the code grid.
      transformer: sizes of the stack, and how it runs.
      attention: kinds of `nn.masks`, cycled over the layers.
      last_attention: kind of the last layer; "" = no exception.
      conv_kernel: side of the window of conv layers.
      embed_std: initial standard deviation of the embedding tables.
    """

    text_len: int
    vocab_size: int
    num_codes: int
    grid: int
    transformer: TransformerConfig = TransformerConfig(width=128, num_layers=4, num_heads=2)
    attention: tuple[str, ...] = ("row", "column", "row", "row")
    last_attention: str = "conv"
    conv_kernel: int = 11
    embed_std: float = 0.02

    def __post_init__(self):
        for field in ("text_len", "vocab_size", "num_codes", "grid"):
            if getattr(self, field) < 1:
                raise UsageError(f"{field}={getattr(self, field)}; expected 1 or more.")
        self.layer_masks()  # refuses unknown kinds

    @property
    def num_image_tokens(self) -> int:
        """Codes per image."""
        return self.grid**2

    @property
    def length(self) -> int:
        """Positions of the stream."""
        return self.text_len + self.num_image_tokens

    def layer_masks(self) -> tuple[masks.Mask, ...]:
        """The mask of every layer."""
        return masks.pattern(
            tuple(self.attention),
            self.last_attention,
            self.transformer.num_layers,
            self.text_len,
            self.grid,
            self.conv_kernel,
        )


class Dalle(nn.Module):
    """The network; `sampling/autoregressive.py` samples from it.

    Attributes:
      config: sizes.
      dtype: parameters, compute, islands.
    """

    config: DalleConfig
    dtype: DtypePolicy = DtypePolicy()

    def setup(self):
        """Declares `embed`, `transformer`, `norm_final`, `text_head` and `image_head`."""
        c, dtype, width = self.config, self.dtype, self.config.transformer.width
        self.embed = embed.StreamEmbedding(
            width, c.vocab_size, c.text_len, c.num_codes, c.grid, c.embed_std, dtype
        )
        self.transformer = stack.Stack(c.transformer, c.layer_masks(), dtype=dtype)
        self.norm_final = transformer.Norm(c.transformer.norm, dtype)
        # A fifth of 1/sqrt(D): the first logits are near zero and the first loss is near ln V.
        init = nn.initializers.normal(0.2 * width**-0.5)
        init = partition.param_with_axes(init, (axes.EMBED, axes.VOCAB))
        self.text_head = self.param("text_head", init, (width, c.vocab_size), dtype.param)
        self.image_head = self.param("image_head", init, (width, c.num_codes), dtype.param)

    def __call__(self, text: Array, codes: Array, key: Key | None = None) -> tuple[Array, Array]:
        """Logits of every predicted token, teacher-forced.

        Args:
          text: [B, T] int32, right-padded with 0.
          codes: [B, g*g] int32 in raster order.
          key: samples the dropout; None = no dropout.

        Returns:
          text logits [B, T - 1, vocab_size], row t predicting text[:, t + 1]; and image logits
          [B, g*g, num_codes], row i predicting codes[:, i]. Float32.

        Raises:
          ValueError: if the shapes are not the config's.
        """
        c = self.config
        if text.shape[1:] != (c.text_len,) or codes.shape[1:] != (c.num_image_tokens,):
            raise ValueError(
                f"text {text.shape} and codes {codes.shape}; expected [B, {c.text_len}] and "
                f"[B, {c.num_image_tokens}]."
            )
        return self.logits(self.embed_text(text), self.embed_image(codes), key)

    def logits(self, text: Array, image: Array, key: Key | None = None) -> tuple[Array, Array]:
        """`__call__` for embedded inputs, [B, T, D] and [B, g*g, D]."""
        x = jnp.concatenate([text, image], axis=1)
        # The last code is included although nothing reads it: 1280 positions tile, 1279 do not.
        x = self.norm_final(self.transformer(x, key))
        first = self.config.text_len - 1
        return self._head(x[:, :first], self.text_head), self.image_logits(x[:, first:-1])

    def embed_text(self, text: Array) -> Array:
        """[B, T] int32 -> [B, T, D]."""
        return self.embed.text(text)

    def embed_image(self, codes: Array, positions: Array | None = None) -> Array:
        """[..., n] int32 at raster positions [n] (None = 0 .. n-1) -> [..., n, D]."""
        return self.embed.image(
            codes, jnp.arange(codes.shape[-1]) if positions is None else positions
        )

    def final_norm(self, x: Array) -> Array:
        """[..., D] after the last block -> [..., D], the input of the heads."""
        return self.norm_final(x)

    def image_logits(self, x: Array) -> Array:
        """[B, n, D] after the final norm -> [B, n, num_codes] float32."""
        return self._head(x, self.image_head)

    def _head(self, x: Array, w: Array) -> Array:
        logits = cpu_products.matmul(x, w.astype(self.dtype.compute), self.dtype.accum)
        return partition.constrain(logits, axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_VOCAB)


def loss(
    text_logits: Array, image_logits: Array, text: Array, codes: Array
) -> tuple[Array, dict[str, Array]]:
    """1/8 text + 7/8 image cross-entropy, each averaged over its own predicted tokens.

    Padding is no text target. The paper leaves this open; here most slots of a short caption are
    padding, whose near-zero losses would dominate the text term. The first text token is never
    predicted, because there is no begin token.

    Args:
      text_logits: [B, T - 1, vocab_size] float32.
      image_logits: [B, g*g, num_codes] float32.
      text: [B, T] int32.
      codes: [B, g*g] int32.

    Returns:
      (scalar, metrics: loss, text_loss and image_loss in nats per token, image_accuracy).
    """
    targets = text[:, 1:]
    real = targets != 0
    count = jnp.maximum(jnp.sum(real), 1)
    text_loss = jnp.sum(cross_entropy(text_logits, targets) * real) / count
    image_loss = jnp.mean(cross_entropy(image_logits, codes))
    total = TEXT_WEIGHT * text_loss + (1 - TEXT_WEIGHT) * image_loss
    metrics = {
        "loss": total,
        "text_loss": text_loss,
        "image_loss": image_loss,
        "image_accuracy": jnp.mean(jnp.argmax(image_logits, axis=-1) == codes),
    }
    return total, metrics


def cross_entropy(logits: Array, labels: Array) -> Array:
    """-log softmax(logits)[label]: [..., V] float32 and [...] int32 -> [...] float32, nats."""
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def flops(config: DalleConfig) -> float:
    """Forward matmul FLOPs of one example (2 per multiply-add), attention on allowed pairs."""
    c, width = config, config.transformer.width
    text_head = 2 * width * c.vocab_size * (c.text_len - 1)
    image_head = 2 * width * c.num_codes * c.num_image_tokens
    return stack.flops(c.transformer, c.layer_masks(), c.length) + text_head + image_head
