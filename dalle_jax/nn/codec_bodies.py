"""The two bodies of an image codec: from pictures to a grid of features, and back.

`pyramid` is the released DALL·E dVAE: residual groups at every resolution, from full size down to
the code grid. `patch` does all its work on the code grid; it reaches 28 dB on 32 px pictures in
minutes of one CPU core, where the pyramid needs an accelerator. Both know nothing of codes: the
1 x 1 layers next to the bottleneck belong to the model.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dalle_jax import axes
from dalle_jax.nn import conv, partition
from dalle_jax.types import Array, UsageError

TRUNKS = ("patch", "pyramid")
_HEADROOM = 2  # hidden layer of the patch stem, in widths


@dataclasses.dataclass(frozen=True)
class TrunkConfig:
    """Size of both bodies of a codec.

    Attributes:
      trunk: "patch" or "pyramid".
      image_px: side of the square picture, from the data section.
      halvings: the code grid has image_px / 2**halvings positions a side.
      width: patch: channels everywhere. pyramid: channels at full size, doubled by each halving.
      num_blocks: residual blocks of each body (patch) or of each resolution (pyramid).
      use_remat: recompute blocks in the backward pass: less memory, a third more time.
    """

    trunk: str = "patch"
    image_px: int = 32
    halvings: int = 2
    width: int = 96
    num_blocks: int = 2
    use_remat: bool = False

    def __post_init__(self):
        if self.trunk not in TRUNKS:
            raise UsageError(f"trunk {self.trunk!r} is unknown; use one of {', '.join(TRUNKS)}.")
        for name in ("image_px", "width", "num_blocks"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)} is too small; it is at least 1.")
        if self.halvings < 1:
            raise UsageError(f"halvings {self.halvings} is too small; it is at least 1.")
        if self.trunk == "pyramid" and self.width % 4:
            raise UsageError(
                f"width {self.width} is not a multiple of 4 (the pyramid's blocks are a quarter as"
                f" wide inside); use {max(4, self.width // 4 * 4)} or {self.width // 4 * 4 + 4}."
            )
        check_image_px(self.image_px, self.halvings)

    @property
    def grid(self) -> int:
        """Codes a side."""
        return self.image_px >> self.halvings

    @property
    def features(self) -> int:
        """Channels that the encoder's body gives."""
        return self.width << self.halvings if self.trunk == "pyramid" else self.width


def check_image_px(image_px: int, halvings: int) -> None:
    """Refuses a picture side that cannot be halved `halvings` times.

    Raises:
      UsageError: naming the nearest sides that can.
    """
    step = 2**halvings
    if image_px % step:
        low, high = image_px // step * step, image_px // step * step + step
        good = f"{low} or {high}" if low else f"{high}"
        raise UsageError(
            f"image_px {image_px} is not a multiple of 2**{halvings} ({halvings} halvings); "
            f"use {good}."
        )


def make_encoder(config: TrunkConfig, dtype: Any, param_dtype: Any) -> nn.Module:
    """The body [B, h, w, 3] -> [B, g, g, config.features]; the output is already rectified."""
    if config.trunk == "pyramid":
        cls = PyramidEncoder
        size = dict(halvings=config.halvings, blocks_per_group=config.num_blocks)
    else:
        cls = PatchEncoder
        size = dict(patch_px=2**config.halvings, num_blocks=config.num_blocks)
    return cls(
        width=config.width, **size, use_remat=config.use_remat, dtype=dtype, param_dtype=param_dtype
    )


def make_decoder(
    config: TrunkConfig, in_features: int, channels: int, dtype: Any, param_dtype: Any
) -> nn.Module:
    """The body [B, g, g, in_features] -> [B, h, w, channels]."""
    if config.trunk == "pyramid":
        cls = PyramidDecoder
        size = dict(halvings=config.halvings, blocks_per_group=config.num_blocks)
    else:
        cls = PatchDecoder
        size = dict(patch_px=2**config.halvings, num_blocks=config.num_blocks)
    return cls(
        in_features=in_features,
        channels=channels,
        width=config.width,
        **size,
        use_remat=config.use_remat,
        dtype=dtype,
        param_dtype=param_dtype,
    )


def encoder_macs(config: TrunkConfig) -> int:
    """Multiply-adds of the encoder's body for one picture; elementwise work is not counted."""
    if config.trunk == "patch":
        return _patch_macs(config, 3)
    total = config.image_px**2 * 49 * 3 * config.width
    width = config.width
    for group in range(config.halvings + 1):
        pixels = (config.image_px >> group) ** 2
        for _ in range(config.num_blocks):
            total += pixels * _block_macs(width, config.width << group, (3, 3, 3, 1))
            width = config.width << group
    return total


def decoder_macs(config: TrunkConfig, in_features: int, channels: int) -> int:
    """Multiply-adds of the decoder's body for one picture."""
    if config.trunk == "patch":
        return _patch_macs(config, channels)
    total = config.image_px**2 * config.width * channels
    width = in_features
    for group in reversed(range(config.halvings + 1)):
        pixels = (config.image_px >> group) ** 2
        for _ in range(config.num_blocks):
            total += pixels * _block_macs(width, config.width << group, (1, 3, 3, 3))
            width = config.width << group
    return total


def _patch_macs(config: TrunkConfig, channels: int) -> int:
    w, hidden = config.width, _HEADROOM * config.width
    stem = 4**config.halvings * channels * hidden + hidden * w
    return config.grid**2 * (stem + config.num_blocks * 10 * w * w)


def _block_macs(n_in: int, n_out: int, kernels: tuple[int, ...]) -> int:
    hidden = n_out // 4
    sizes = (n_in, hidden, hidden, hidden, n_out)
    path = sum(k * k * a * b for k, a, b in zip(kernels, sizes[:-1], sizes[1:], strict=True))
    return path + (n_in * n_out if n_in != n_out else 0)


class PyramidBlock(nn.Module):
    """y = identity(x) + post_gain * path(x), four rectified convolutions a quarter as wide.

    Source: openai/DALL-E dall_e/encoder.py and decoder.py; the order of kernel sizes differs
    between the two: 3-3-3-1 in the encoder, 1-3-3-3 in the decoder.
    """

    in_features: int
    features: int
    kernels: tuple[int, ...]
    post_gain: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, h, w, in_features] -> [B, h, w, features]."""
        kinds = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        hidden = self.features // 4
        sizes = (self.in_features, hidden, hidden, hidden, self.features)
        path = x
        for i, k in enumerate(self.kernels):
            layer = conv.Conv(sizes[i], sizes[i + 1], k, name=f"conv_{i + 1}", **kinds)
            path = layer(jax.nn.relu(path))
        if self.in_features != self.features:
            x = conv.Conv(self.in_features, self.features, name="identity", **kinds)(x)
        return _laid_out(x + self.post_gain * path)


class PyramidEncoder(nn.Module):
    """The released dVAE's encoder without its last 1 x 1 layer: 7 x 7, groups, max-pooling.

    With halvings 3, blocks_per_group 2 and width 256 the groups are 256, 512, 1024, 2048 wide.
    """

    halvings: int
    blocks_per_group: int
    width: int
    use_remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, h, w, 3] -> [B, g, g, width 2**halvings], rectified."""
        kinds = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        block = nn.remat(PyramidBlock) if self.use_remat else PyramidBlock
        # 1 / layers^2: the residual paths start small enough for a stable start (arXiv:2102.12092,
        # App. A.1); 1/64 in the released model.
        post_gain = 1.0 / ((self.halvings + 1) * self.blocks_per_group) ** 2
        x = _laid_out(conv.Conv(3, self.width, 7, name="input", **kinds)(x))
        for group in range(self.halvings + 1):
            for i in range(self.blocks_per_group):
                x = block(
                    in_features=x.shape[-1],
                    features=self.width << group,
                    kernels=(3, 3, 3, 1),
                    post_gain=post_gain,
                    name=f"group_{group + 1}_block_{i + 1}",
                    **kinds,
                )(x)
            if group < self.halvings:
                x = conv.max_pool(x)
        return jax.nn.relu(x)


class PyramidDecoder(nn.Module):
    """The released dVAE's decoder behind its first 1 x 1 layer: groups, nearest upsampling."""

    in_features: int
    channels: int
    halvings: int
    blocks_per_group: int
    width: int
    use_remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, g, g, in_features] -> [B, h, w, channels]."""
        kinds = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        block = nn.remat(PyramidBlock) if self.use_remat else PyramidBlock
        post_gain = 1.0 / ((self.halvings + 1) * self.blocks_per_group) ** 2
        for group in range(self.halvings + 1):
            for i in range(self.blocks_per_group):
                x = block(
                    in_features=x.shape[-1],
                    features=self.width << (self.halvings - group),
                    kernels=(1, 3, 3, 3),
                    post_gain=post_gain,
                    name=f"group_{group + 1}_block_{i + 1}",
                    **kinds,
                )(x)
            if group < self.halvings:
                x = conv.upsample(x)
        return conv.Conv(self.width, self.channels, name="output", **kinds)(jax.nn.relu(x))


class PatchBlock(nn.Module):
    """x + 1x1(relu(conv3x3(relu x))), the VQ-VAE paper's block (arXiv:1711.00937 §4.1)."""

    width: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, g, g, width] -> [B, g, g, width]."""
        kinds = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        y = conv.Conv(self.width, self.width, 3, 2**0.5, name="conv_1", **kinds)(jax.nn.relu(x))
        y = conv.Conv(self.width, self.width, 1, 0.3, name="conv_2", **kinds)(jax.nn.relu(y))
        return _laid_out(x + y)


class PatchEncoder(nn.Module):
    """Each square of patch_px through a two-layer perceptron, then blocks on the code grid."""

    patch_px: int
    num_blocks: int
    width: int
    use_remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, h, w, 3] -> [B, g, g, width], rectified."""
        kinds = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        block = nn.remat(PatchBlock) if self.use_remat else PatchBlock
        hidden = _HEADROOM * self.width
        x = _laid_out(conv.to_patches(x, self.patch_px))
        x = jax.nn.relu(conv.Conv(x.shape[-1], hidden, name="patch_1", **kinds)(x))
        x = conv.Conv(hidden, self.width, gain=2**0.5, name="patch_2", **kinds)(x)
        for i in range(self.num_blocks):
            x = block(width=self.width, name=f"block_{i + 1}", **kinds)(x)
        return jax.nn.relu(x)


class PatchDecoder(nn.Module):
    """`PatchEncoder` in reverse; `in_features` has to be `width`."""

    in_features: int
    channels: int
    patch_px: int
    num_blocks: int
    width: int
    use_remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, g, g, width] -> [B, h, w, channels]."""
        kinds = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        block = nn.remat(PatchBlock) if self.use_remat else PatchBlock
        hidden, out = _HEADROOM * self.width, self.patch_px**2 * self.channels
        for i in range(self.num_blocks):
            x = block(width=self.width, name=f"block_{i + 1}", **kinds)(x)
        x = conv.Conv(self.width, hidden, gain=2**0.5, name="patch_1", **kinds)(jax.nn.relu(x))
        x = conv.Conv(hidden, out, gain=0.5, name="patch_2", **kinds)(jax.nn.relu(x))
        return conv.from_patches(x, self.patch_px)


def _laid_out(x: Array) -> Array:
    return partition.constrain(x, axes.ACT_BATCH, axes.ACT_H, axes.ACT_W, axes.ACT_CHAN)
