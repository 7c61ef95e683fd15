"""Convolutions, pooling, resizing and patches, for pictures in `[B, h, w, C]`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dalle_jax import axes
from dalle_jax.nn import cpu_products, partition
from dalle_jax.types import Array, DtypePolicy, Key


class Conv(nn.Module):
    """A k x k convolution with bias and stride 1, whose output has the size of its input.

    A 1 x 1 convolution is computed as a matmul.

    Attributes:
      in_features: channels of the input.
      features: channels of the output.
      kernel_size: k, odd.
      gain: the initial weights are N(0, gain / sqrt(in_features k^2)), the bias is 0. The released
        dVAE has gain 1; with gain 0 the layer starts at zero.
      names: logical axes of in_features and features.
      dtype: parameters and compute.

    Source: openai/DALL-E dall_e/utils.py (`Conv2d`).
    """

    in_features: int
    features: int
    kernel_size: int = 1
    gain: float = 1.0
    names: tuple[str | None, str | None] = (axes.CONV_IN, axes.CONV_OUT)
    dtype: DtypePolicy = DtypePolicy()

    def setup(self):
        """Declares kernel [k, k, in, out] and bias [out]."""
        k = self.kernel_size
        std = self.gain / (self.in_features * k * k) ** 0.5
        self.kernel = self.param(
            "kernel",
            partition.param_with_axes(_normal(std), (None, None, *self.names)),
            (k, k, self.in_features, self.features),
            self.dtype.param,
        )
        self.bias = self.param(
            "bias",
            partition.param_with_axes(nn.initializers.zeros_init(), (self.names[1],)),
            (self.features,),
            self.dtype.param,
        )

    def __call__(self, x: Array) -> Array:
        """[B, h, w, in_features] -> [B, h, w, features], compute dtype."""
        dtype = self.dtype.compute
        kernel = partition.replicated(self.kernel.astype(dtype))
        bias = partition.replicated(self.bias.astype(dtype))[None, None, None]
        x = x.astype(dtype)
        if self.kernel_size == 1:
            return cpu_products.matmul(x, kernel[0, 0]) + bias
        return cpu_products.conv(x, kernel) + bias

    def lookup(self, indices: Array) -> Array:
        """The output of a 1 x 1 convolution for one-hot inputs: [...] int -> [..., features].

        A gather instead of a product with one-hot rows. In float32 both are equal bit for bit, and
        a gather is not rounded to bfloat16 by a TPU's default matmul precision.
        """
        assert self.kernel_size == 1
        dtype = self.dtype.compute
        rows = jnp.take(partition.replicated(self.kernel.astype(dtype))[0, 0], indices, axis=0)
        return rows + self.bias.astype(dtype).reshape((1,) * indices.ndim + (-1,))


def _normal(std: float):
    """The same numbers as `nn.initializers.normal`, sampled as one flat array.

    XLA's CPU compiler takes 3 s for one rank-4 array of threefry bits, and minutes for a few of
    them in one program. A flat array takes 0.5 s.
    """

    def init(key: Key, shape: tuple[int, ...], dtype: Any) -> Array:
        if not std:
            return jnp.zeros(shape, dtype)
        return std * jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)

    return init


def constrain(x: Array) -> Array:
    """`x` [B, h, w, C] in the layout that the rules in force give to pictures."""
    return partition.constrain(x, axes.ACT_BATCH, axes.ACT_H, axes.ACT_W, axes.ACT_CHAN)


def max_pool(x: Array) -> Array:
    """Halves the sides by the maximum of 2 x 2 squares: [B, h, w, C] -> [B, h/2, w/2, C].

    Computed by a reshape, because the gradient of reduce_window (select-and-scatter) is serial on
    a CPU. If several pixels are equal and largest, they share the gradient.
    """
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))


def upsample(x: Array) -> Array:
    """Doubles the sides by repeating pixels: [B, h, w, C] -> [B, 2h, 2w, C]."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


def resize(x: Array, px: int) -> Array:
    """[B, h, w, C] in [-1, 1] -> [B, px, px, C] in [-1, 1], bicubic with antialiasing.

    A picture that already has this size is returned unchanged.
    """
    if x.shape[1:3] == (px, px):
        return x
    x = jax.image.resize(x, (len(x), px, px, x.shape[3]), "cubic", antialias=True)
    return jnp.clip(x, -1, 1)  # a cubic kernel overshoots at edges


def to_patches(x: Array, patch_px: int) -> Array:
    """Cuts into squares of patch_px: [B, h, w, C] -> [B, h/p, w/p, p p C]."""
    b, h, w, c = x.shape
    p = patch_px
    x = x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // p, w // p, p * p * c)


def from_patches(x: Array, patch_px: int) -> Array:
    """The inverse of `to_patches`: [B, g, g, p p C] -> [B, g p, g p, C]."""
    b, h, w, d = x.shape
    p = patch_px
    x = x.reshape(b, h, w, p, p, d // (p * p)).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * p, w * p, d // (p * p))
