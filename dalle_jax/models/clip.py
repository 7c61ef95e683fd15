"""CLIP: a vision transformer and a causal text transformer that meet in one joint space.

The released ViT models at their sizes, and small ones for 32 to 64 px pictures by config. The
loss belongs to tasks/clip.py, the scores of drawn pictures to sampling/rerank.py.

Source: Radford et al. 2021 (arXiv:2103.00020) §2; openai/CLIP `model.py`. Deliberate differences:
the block initialisation is the house's (nn/transformer.py), and the first end token is found by
its id, where openai/CLIP takes the argmax of the ids (the same thing there, because the end token
is its largest id; SentencePiece's is 3).
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax import axes
from dalle_jax.nn import cpu_products, masks, partition, transformer
from dalle_jax.types import Array, DtypePolicy, Params, UsageError

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
      image_width: D of the vision tower.
      image_layers: its L.
      image_heads: its H (width / 64 as released).
      text_width: D of the text tower.
      text_layers: its L.
      text_heads: its H (width / 64 as released).
      joint_width: E.
      pixel_norm: normalise pixels by CLIP's mean and deviation; else [-1, 1] goes in as it is.
      eos_id: id of the end token; the text tower is read at its first occurrence.
      scan_layers: scan over the layers instead of unrolling them; same parameters.
      remat: what the backward pass keeps, see `transformer.TransformerConfig`.
    """

    image_px: int
    text_len: int
    vocab_size: int
    patch_px: int = 32
    image_width: int = 768
    image_layers: int = 12
    image_heads: int = 12
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    joint_width: int = 512
    pixel_norm: bool = True
    eos_id: int = SENTENCEPIECE_EOS
    scan_layers: bool = False
    remat: str = "none"

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
        # The towers' own checks (heads divide width, known remat) run here, before any compile.
        self.image_tower(DtypePolicy())
        self.text_tower(DtypePolicy())

    @property
    def num_patches(self) -> int:
        """Patches of one picture."""
        return (self.image_px // self.patch_px) ** 2

    def image_tower(self, dtype: DtypePolicy) -> transformer.TransformerConfig:
        """The vision tower's stack."""
        return self._tower(self.image_width, self.image_layers, self.image_heads, dtype)

    def text_tower(self, dtype: DtypePolicy) -> transformer.TransformerConfig:
        """The text tower's stack."""
        return self._tower(self.text_width, self.text_layers, self.text_heads, dtype)

    def _tower(self, width, layers, heads, dtype) -> transformer.TransformerConfig:
        return transformer.TransformerConfig(
            width=width,
            num_layers=layers,
            num_heads=heads,
            norm="layer",
            activation="quick_gelu",
            use_bias=True,
            scan_layers=self.scan_layers,
            remat=self.remat,
            dtype=dtype,
        )


class ImageTower(nn.Module):
    """Pictures to points of the joint space, not normalised."""

    config: ClipConfig
    dtype: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """[B, h, w, 3] float in [-1, 1] -> [B, E] float32."""
        c, dtype = self.config, self.dtype
        width, std = c.image_width, c.image_width**-0.5
        x = patches(normalise(images) if c.pixel_norm else images, c.patch_px)
        # A convolution with stride = kernel is a matmul on patches, and much faster as one on CPU.
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
            partition.whole(weight.astype(dtype.compute))
            for weight in (patch_embed, class_embed, positions)
        )
        x = cpu_products.matmul(x.astype(dtype.compute), patch_embed)  # [B, patches, D]
        first = jnp.broadcast_to(class_embed, (x.shape[0], 1, width))
        x = jnp.concatenate([first, x], axis=1) + positions[None]
        x = transformer.Norm("layer", dtype, name="norm_pre")(x)
        tower = c.image_tower(dtype)
        x = transformer.Transformer(tower, (None,) * c.image_layers, name="transformer")(x)
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
            (c.vocab_size, c.text_width),
            dtype.param,
        )
        positions = self.param(
            "positions",
            partition.param_with_axes(nn.initializers.normal(0.01), (axes.POSITIONS, axes.EMBED)),
            (c.text_len, c.text_width),
            dtype.param,
        )
        tokens, positions = (
            partition.whole(table.astype(dtype.compute)) for table in (tokens, positions)
        )
        x = tokens[text] + positions[None]
        causal = masks.Mask("full", c.text_len, 0)
        tower = c.text_tower(dtype)
        x = transformer.Transformer(tower, (causal,) * c.text_layers, name="transformer")(x)
        # One token per caption is read, so the final norm need not see the others.
        end = end_position(text, c.eos_id)
        x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]  # [B, D]
        x = transformer.Norm("layer", dtype, name="norm_final")(x)
        return _project(self, x, c.joint_width, dtype)


class Clip(nn.Module):
    """Both towers and the temperature.

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
        """Unit embeddings of both, and the log of the temperature's inverse.

        Args:
          images: [B, h, w, 3] float in [-1, 1].
          text: [B, T] int32.

        Returns:
          image [B, E] and text [B, E], float32, of unit length; logit_scale, float32 scalar, as
          it is stored (the clamp is the training step's).
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
    """Pixels in [-1, 1] [B, h, w, 3] to zero mean and unit deviation over CLIP's training set."""
    mean = np.asarray(PIXEL_MEAN, np.float32).reshape(1, 1, 1, 3)
    std = np.asarray(PIXEL_STD, np.float32).reshape(1, 1, 1, 3)
    return ((images + 1) / 2 - mean) / std


def patches(images: Array, patch_px: int) -> Array:
    """[B, h, w, C] -> [B, patches, patch_px * patch_px * C], raster order inside and outside."""
    b, h, w, c = images.shape
    rows, columns = h // patch_px, w // patch_px
    x = images.reshape(b, rows, patch_px, columns, patch_px, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * columns, patch_px * patch_px * c)


def end_position(text: Array, eos_id: int) -> Array:
    """Position of the first `eos_id` of each caption, [B, T] -> [B] int32.

    A caption without one (it should not exist: the tokenizer ends even truncated captions) is
    read at its last position.
    """
    is_end = text == eos_id
    return jnp.where(is_end.any(axis=1), is_end.argmax(axis=1), text.shape[1] - 1)


def unit(x: Array) -> Array:
    """x [..., E] divided by its length, float32.

    The 1e-12 under the root keeps the gradient of a zero vector finite; no embedding is near it.
    """
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


def flops(config: ClipConfig) -> float:
    """Forward matmul FLOPs of one picture with its caption (2 per multiply-add)."""
    c, dtype = config, DtypePolicy()
    image = transformer.flops(c.image_tower(dtype), (None,) * c.image_layers, c.num_patches + 1)
    causal = masks.Mask("full", c.text_len, 0)
    text = transformer.flops(c.text_tower(dtype), (causal,) * c.text_layers, c.text_len)
    stem = 2 * c.num_patches * c.patch_px**2 * 3 * c.image_width
    heads = 2 * c.joint_width * (c.image_width + c.text_width)
    return float(image + text + stem + heads)


def num_params(params: Params) -> int:
    """Number of values in a (possibly abstract, possibly boxed) parameter tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _project(module: nn.Module, x: Array, features: int, dtype: DtypePolicy) -> Array:
    """x [B, D] @ projection [D, E], no bias, out in float32."""
    init = nn.initializers.normal(x.shape[-1] ** -0.5)
    names = (axes.EMBED, axes.JOINT)
    w = module.param(
        "projection",
        partition.param_with_axes(init, names),
        (x.shape[-1], features),
        dtype.param,
    )
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32)
