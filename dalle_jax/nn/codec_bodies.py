"""The encoder and decoder bodies of an image codec: pictures to a grid of features, and back.

`pyramid` is the released DALL·E dVAE: residual groups at every resolution, from full size down to
the code grid. `patch` computes everything on the code grid; it reaches 28 dB on 32 px pictures in
minutes on one CPU core, where the pyramid needs an accelerator. The bodies know nothing of codes:
the 1 x 1 layers next to the bottleneck belong to the models.
"""

import dataclasses

import jax
from flax import linen as nn

from dalle_jax.nn import conv
from dalle_jax.types import Array, DtypePolicy, UsageError

TRUNKS = ("patch", "pyramid")
_PATCH_HIDDEN = 2  # hidden layer of the patch perceptrons, in widths


@dataclasses.dataclass(frozen=True)
class TrunkConfig:
    """Sizes of both bodies of a codec.

    Attributes:
      trunk: "patch" or "pyramid".
      image_px: side of the square picture, from the data section.
      halvings: the code grid has image_px / 2**halvings positions a side.
      width: patch: channels everywhere. pyramid: channels at full size, doubled by each halving.
      num_blocks: residual blocks of each body (patch) or of each resolution (pyramid).
      use_remat: the backward pass recomputes blocks; it takes less memory and a third more time.
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
        """Channels of the output of the encoder's body."""
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


def build_encoder(config: TrunkConfig, dtype: DtypePolicy) -> nn.Module:
    """The body [B, h, w, 3] -> [B, g, g, config.features], whose output is rectified."""
    return {"pyramid": PyramidEncoder, "patch": PatchEncoder}[config.trunk](config, dtype)


def build_decoder(config: TrunkConfig, channels: int, dtype: DtypePolicy) -> nn.Module:
    """The body [B, g, g, C] -> [B, h, w, channels]; the patch trunk takes C = width only."""
    body = {"pyramid": PyramidDecoder, "patch": PatchDecoder}[config.trunk]
    return body(config, channels, dtype)


def body_macs(config: TrunkConfig, in_features: int, channels: int) -> int:
    """Multiply-adds of both bodies for one picture; elementwise work is not counted.

    A formula, because tracing the pyramid takes half a CPU second.

    Args:
      config: sizes.
      in_features: channels of the decoder's input.
      channels: channels of the decoder's output.
    """
    c, w = config, config.width
    if c.trunk == "patch":
        perceptrons = _PATCH_HIDDEN * w * (4**c.halvings * (3 + channels) + 2 * w)
        return c.grid**2 * (perceptrons + 2 * c.num_blocks * 10 * w * w)
    macs = c.image_px**2 * w * (49 * 3 + channels)
    groups = range(c.halvings + 1)
    for width, kernels, order in (
        (w, (3, 3, 3, 1), groups),
        (in_features, (1, 3, 3, 3), reversed(groups)),
    ):
        for group in order:
            for _ in range(c.num_blocks):
                macs += (c.image_px >> group) ** 2 * _block_macs(width, w << group, kernels)
                width = w << group
    return macs


def _block_macs(n_in: int, n_out: int, kernels: tuple[int, ...]) -> int:
    hidden = n_out // 4
    sizes = (n_in, hidden, hidden, hidden, n_out)
    path = sum(k * k * a * b for k, a, b in zip(kernels, sizes[:-1], sizes[1:], strict=True))
    return path + (n_in * n_out if n_in != n_out else 0)


class PyramidBlock(nn.Module):
    """identity(x) + post_gain * path(x); the path has four rectified convolutions.

    Source: openai/DALL-E dall_e/encoder.py and decoder.py, whose kernel sizes differ: 3-3-3-1 in
    the encoder, 1-3-3-3 in the decoder. The three hidden layers have a quarter of the channels.
    """

    in_features: int
    features: int
    kernels: tuple[int, ...]
    post_gain: float
    dtype: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, h, w, in_features] -> [B, h, w, features]."""
        dtype = self.dtype
        hidden = self.features // 4
        sizes = (self.in_features, hidden, hidden, hidden, self.features)
        path = x
        for i, k in enumerate(self.kernels):
            layer = conv.Conv(sizes[i], sizes[i + 1], k, dtype=dtype, name=f"conv_{i + 1}")
            path = layer(jax.nn.relu(path))
        if self.in_features != self.features:
            x = conv.Conv(self.in_features, self.features, dtype=dtype, name="identity")(x)
        return conv.constrain(x + self.post_gain * path)


def _pyramid_group(
    config: TrunkConfig,
    dtype: DtypePolicy,
    x: Array,
    name: str,
    features: int,
    kernels: tuple[int, ...],
) -> Array:
    """The blocks of one resolution: [B, h, w, C] -> [B, h, w, features]."""
    block = nn.remat(PyramidBlock) if config.use_remat else PyramidBlock
    # 1 / layers^2: the residual paths start small enough for a stable start (arXiv:2102.12092,
    # App. A.1); 1/64 in the released model.
    post_gain = 1.0 / ((config.halvings + 1) * config.num_blocks) ** 2
    for i in range(config.num_blocks):
        size = (x.shape[-1], features, kernels, post_gain)
        x = block(*size, dtype=dtype, name=f"{name}_block_{i + 1}")(x)
    return x


class PyramidEncoder(nn.Module):
    """The released dVAE's encoder without its last 1 x 1 layer: 7 x 7, groups, max-pooling.

    With halvings 3, num_blocks 2 and width 256 the groups have 256, 512, 1024 and 2048 channels.
    """

    config: TrunkConfig
    dtype: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, h, w, 3] -> [B, g, g, width 2**halvings], rectified."""
        c, dtype = self.config, self.dtype
        x = conv.constrain(conv.Conv(3, c.width, 7, dtype=dtype, name="input")(x))
        for i in range(c.halvings + 1):
            x = _pyramid_group(c, dtype, x, f"group_{i + 1}", c.width << i, (3, 3, 3, 1))
            if i < c.halvings:
                x = conv.max_pool(x)
        return jax.nn.relu(x)


class PyramidDecoder(nn.Module):
    """The released dVAE's decoder after its first 1 x 1 layer: groups, nearest upsampling."""

    config: TrunkConfig
    channels: int
    dtype: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, g, g, C] -> [B, h, w, channels]."""
        c, dtype = self.config, self.dtype
        for i in range(c.halvings + 1):
            features = c.width << (c.halvings - i)
            x = _pyramid_group(c, dtype, x, f"group_{i + 1}", features, (1, 3, 3, 3))
            if i < c.halvings:
                x = conv.upsample(x)
        return conv.Conv(c.width, self.channels, dtype=dtype, name="output")(jax.nn.relu(x))


class PatchBlock(nn.Module):
    """x + 1x1(relu(conv3x3(relu x))), the VQ-VAE paper's block (arXiv:1711.00937 §4.1)."""

    width: int
    dtype: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, g, g, width] -> [B, g, g, width]."""
        w, dtype = self.width, self.dtype
        y = conv.Conv(w, w, 3, 2**0.5, dtype=dtype, name="conv_1")(jax.nn.relu(x))
        y = conv.Conv(w, w, 1, 0.3, dtype=dtype, name="conv_2")(jax.nn.relu(y))
        return conv.constrain(x + y)


def _patch_blocks(config: TrunkConfig, dtype: DtypePolicy, x: Array) -> Array:
    """The blocks of one body: [B, g, g, width] -> [B, g, g, width], rectified."""
    block = nn.remat(PatchBlock) if config.use_remat else PatchBlock
    for i in range(config.num_blocks):
        x = block(config.width, dtype, name=f"block_{i + 1}")(x)
    return jax.nn.relu(x)


class PatchEncoder(nn.Module):
    """A perceptron of two layers on each patch, then residual blocks on the code grid."""

    config: TrunkConfig
    dtype: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, h, w, 3] -> [B, g, g, width], rectified."""
        c, dtype = self.config, self.dtype
        hidden = _PATCH_HIDDEN * c.width
        x = conv.constrain(conv.to_patches(x, 2**c.halvings))
        x = jax.nn.relu(conv.Conv(x.shape[-1], hidden, dtype=dtype, name="patch_1")(x))
        x = conv.Conv(hidden, c.width, gain=2**0.5, dtype=dtype, name="patch_2")(x)
        return _patch_blocks(c, dtype, x)


class PatchDecoder(nn.Module):
    """`PatchEncoder` in reverse."""

    config: TrunkConfig
    channels: int
    dtype: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, g, g, width] -> [B, h, w, channels]."""
        c, dtype = self.config, self.dtype
        hidden, out = _PATCH_HIDDEN * c.width, 4**c.halvings * self.channels
        x = _patch_blocks(c, dtype, x)
        x = conv.Conv(c.width, hidden, gain=2**0.5, dtype=dtype, name="patch_1")(x)
        x = conv.Conv(hidden, out, gain=0.5, dtype=dtype, name="patch_2")(jax.nn.relu(x))
        return conv.from_patches(x, 2**c.halvings)
