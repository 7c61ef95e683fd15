"""CLIP: a vision transformer and a causal text transformer that meet in one joint space.

A config has the size of a released ViT model, or a small one for 32 to 64 px pictures. The loss is
in tasks/clip.py, the scores of samples in sampling/rerank.py.

Source: Radford et al. 2021 (arXiv:2103.00020) §2; openai/CLIP `model.py`. Deliberate differences:
blocks are initialised as in nn/transformer.py, and the text tower is read at the first token with
the id of the end token. openai/CLIP reads it at the largest id, which is its end token;
SentencePiece's end token is 3.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax import axes
from dalle_jax.nn import conv, cpu_products, masks, partition, stack, transformer
from dalle_jax.nn.transformer import TransformerConfig
from dalle_jax.types import Array, DtypePolicy, UsageError

# Mean and standard deviation of WIT's pixels in [0, 1], per channel (openai/CLIP `clip.py`).
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
INIT_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)  # the training step clamps exp(logit_scale) at 100
SENTENCEPIECE_EOS = 3
OPENAI_EOS = 49407


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Both towers of a CLIP.

    Attributes:
      image_px: h = w of the pictures.
      text_len: T, text ids per caption, begin and end included (77 as released).
      vocab_size: rows of the token embedding (49,408 as released).
      patch_px: side of a patch; (image_px / patch_px)**2 patches and one class token.
      image: the vision tower (heads of 64 as released).
      text: the text tower (heads of 64 as released).
      joint_width: E.
      pixel_norm: normalise pixels by CLIP's mean and deviation; False = no change to [-1, 1].
      eos_id: id of the end token; the text tower is read at its first occurrence.
    """

    image_px: int
    text_len: int
    vocab_size: int
    patch_px: int = 32
    image: TransformerConfig = TransformerConfig(width=768, num_layers=12, num_heads=12)
    text: TransformerConfig = TransformerConfig(width=512, num_layers=12, num_heads=8)
    joint_width: int = 512
    pixel_norm: bool = True
    eos_id: int = SENTENCEPIECE_EOS

    def __post_init__(self):
        if self.image_px % self.patch_px:
            raise UsageError(
                f"image_px {self.image_px} is not a multiple of patch_px {self.patch_px}; use "
                f"image_px={max(1, self.image_px // self.patch_px) * self.patch_px} or another "
                "patch_px."
            )
        if not 0 <= self.eos_id < self.vocab_size:
            raise UsageError(
                f"eos_id {self.eos_id} is no id of a vocabulary of {self.vocab_size}; "
                f"SentencePiece's end token is {SENTENCEPIECE_EOS}, openai/CLIP's {OPENAI_EOS}."
            )
        if self.text_len < 3:
            raise UsageError(
                f"text_len {self.text_len} leaves no room between begin and end; use 3 or more."
            )

    @property
    def num_patches(self) -> int:
        """Patches of one picture."""
        return (self.image_px // self.patch_px) ** 2


class ImageTower(nn.Module):
    """Pictures to points of the joint space, not normalised."""

    config: ClipConfig
    dtype: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """[B, h, w, 3] float in [-1, 1] -> [B, E] float32."""
        c, dtype = self.config, self.dtype
        width, std = c.image.width, c.image.width**-0.5
        x = conv.to_patches(normalise(images) if c.pixel_norm else images, c.patch_px)
        x = x.reshape(len(x), c.num_patches, -1)  # [B, patches, patch_px * patch_px * 3]
        # A convolution with stride = kernel is a matmul on patches, and a CPU runs it much faster.
        patch_embed = self.param(
            "patch_embed",
            partition.param_with_axes(
                nn.initializers.normal(x.shape[-1] ** -0.5), (axes.CONV_IN, axes.EMBED)
            ),
            (x.shape[-1], width),
            dtype.param,
        )
        class_embed = self.param(
            "class_embed",
            partition.param_with_axes(nn.initializers.normal(std), (axes.EMBED,)),
            (width,),
            dtype.param,
        )
        positions = self.param(
            "positions",
            partition.param_with_axes(nn.initializers.normal(std), (axes.POSITIONS, axes.EMBED)),
            (c.num_patches + 1, width),
            dtype.param,
        )
        patch_embed, class_embed, positions = (
            partition.replicated(weight.astype(dtype.compute))
            for weight in (patch_embed, class_embed, positions)
        )
        x = cpu_products.matmul(x.astype(dtype.compute), patch_embed)  # [B, patches, D]
        first = jnp.broadcast_to(class_embed, (x.shape[0], 1, width))
        x = jnp.concatenate([first, x], axis=1) + positions[None]
        x = transformer.Norm("layer", dtype, name="norm_pre")(x)
        layer_masks = (None,) * c.image.num_layers
        x = stack.Stack(c.image, layer_masks, dtype=dtype, name="transformer")(x)
        x = transformer.Norm("layer", dtype, name="norm_post")(x[:, 0])  # the class token, [B, D]
        return _project(self, x, c.joint_width, dtype)


class TextTower(nn.Module):
    """Captions to points of the joint space, not normalised."""

    config: ClipConfig
    dtype: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, text: Array) -> Array:
        """[B, T] int32 -> [B, E] float32, read where `eos_id` first occurs."""
        c, dtype = self.config, self.dtype
        if text.shape[1:] != (c.text_len,):
            raise ValueError(f"text has shape {text.shape}; expected [B, {c.text_len}].")
        tokens = self.param(
            "tokens",
            partition.param_with_axes(nn.initializers.normal(0.02), (axes.VOCAB, axes.EMBED)),
            (c.vocab_size, c.text.width),
            dtype.param,
        )
        positions = self.param(
            "positions",
            partition.param_with_axes(nn.initializers.normal(0.01), (axes.POSITIONS, axes.EMBED)),
            (c.text_len, c.text.width),
            dtype.param,
        )
        tokens, positions = (
            partition.replicated(table.astype(dtype.compute)) for table in (tokens, positions)
        )
        x = tokens[text] + positions[None]
        layer_masks = (masks.Mask("full", c.text_len, 0),) * c.text.num_layers  # causal
        x = stack.Stack(c.text, layer_masks, dtype=dtype, name="transformer")(x)
        # Only one token per caption is read, so the final norm skips the others.
        end = end_position(text, c.eos_id)
        x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]  # [B, D]
        x = transformer.Norm("layer", dtype, name="norm_final")(x)
        return _project(self, x, c.joint_width, dtype)


class Clip(nn.Module):
    """Both towers and the learned temperature.

    Attributes:
      config: sizes.
      dtype: parameters, compute, islands.
    """

    config: ClipConfig
    dtype: DtypePolicy = DtypePolicy()

    def setup(self):
        """Declares `image`, `text` and `logit_scale`."""
        self.image = ImageTower(self.config, self.dtype)
        self.text = TextTower(self.config, self.dtype)
        self.logit_scale = self.param(
            "logit_scale",
            partition.param_with_axes(nn.initializers.constant(INIT_LOGIT_SCALE), ()),
            (),
            jnp.float32,
        )

    def __call__(self, images: Array, text: Array) -> tuple[Array, Array, Array]:
        """Embeddings of pictures and captions, and the log of the inverse temperature.

        Args:
          images: [B, h, w, 3] float in [-1, 1].
          text: [B, T] int32.

        Returns:
          image [B, E] and text [B, E], float32 of unit length; logit_scale, float32 scalar, not
          clamped (the training step clamps it).
        """
        return self.encode_image(images), self.encode_text(text), self.logit_scale

    def encode_image(self, images: Array) -> Array:
        """[B, h, w, 3] float in [-1, 1] -> [B, E] float32 of unit length."""
        c = self.config
        if images.shape[1:] != (c.image_px, c.image_px, 3):
            raise ValueError(
                f"images have shape {images.shape}; expected [B, {c.image_px}, {c.image_px}, 3]."
            )
        return unit(self.image(images))

    def encode_text(self, text: Array) -> Array:
        """[B, T] int32 -> [B, E] float32 of unit length."""
        return unit(self.text(text))


def normalise(images: Array) -> Array:
    """Pictures [B, h, w, 3] in [-1, 1] with CLIP's mean subtracted, over CLIP's deviation."""
    mean = np.asarray(PIXEL_MEAN, np.float32).reshape(1, 1, 1, 3)
    std = np.asarray(PIXEL_STD, np.float32).reshape(1, 1, 1, 3)
    return ((images + 1) / 2 - mean) / std


def end_position(text: Array, eos_id: int) -> Array:
    """Position of the first `eos_id` of each caption, [B, T] -> [B] int32.

    A caption without an end token is read at its last position. The tokenizer never produces one:
    it ends truncated captions too.
    """
    is_end = text == eos_id
    return jnp.where(is_end.any(axis=1), is_end.argmax(axis=1), text.shape[1] - 1)


def unit(x: Array) -> Array:
    """x [..., E] divided by its length, float32.

    The 1e-12 under the root makes the gradient of a zero vector finite; no embedding is near zero.
    """
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


def flops(config: ClipConfig) -> float:
    """Forward matmul FLOPs of one picture with its caption (2 per multiply-add)."""
    c = config
    image = stack.flops(c.image, (None,) * c.image.num_layers, c.num_patches + 1)
    causal = masks.Mask("full", c.text_len, 0)
    text = stack.flops(c.text, (causal,) * c.text.num_layers, c.text_len)
    stem = 2 * c.num_patches * c.patch_px**2 * 3 * c.image.width
    heads = 2 * c.joint_width * (c.image.width + c.text.width)
    return float(image + text + stem + heads)


def _project(module: nn.Module, x: Array, features: int, dtype: DtypePolicy) -> Array:
    """x [B, D] @ projection [D, E] without bias -> [B, E] float32."""
    init = nn.initializers.normal(x.shape[-1] ** -0.5)
    names = (axes.EMBED, axes.JOINT)
    w = module.param(
        "projection",
        partition.param_with_axes(init, names),
        (x.shape[-1], features),
        dtype.param,
    )
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32)
