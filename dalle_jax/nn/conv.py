"""Convolution and the re-layouts around it, for pictures in `[B, h, w, C]`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dalle_jax import axes
from dalle_jax.nn import cpu_products, partition
from dalle_jax.types import Array, Key


class Conv(nn.Module):
    """A k x k convolution with bias, stride 1, output as large as the input.

    Weights start as N(0, gain / sqrt(in_features k^2)), bias 0; `gain` 1 is the released dVAE's, 0
    starts at zero.
    A 1 x 1 kernel is applied as a matmul, which is what it is.

    Source: openai/DALL-E dall_e/utils.py (`Conv2d`).
    """

    in_features: int
    features: int
    kernel_size: int = 1  # odd
    gain: float = 1.0
    names: tuple[str | None, str | None] = (axes.CONV_IN, axes.CONV_OUT)
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        """Declares kernel [k, k, in, out] and bias [out]."""
        k = self.kernel_size
        std = self.gain / (self.in_features * k * k) ** 0.5
        self.kernel = self.param(
            "kernel",
            partition.param_with_axes(_normal(std), (None, None, *self.names)),
            (k, k, self.in_features, self.features),
            self.param_dtype,
        )
        self.bias = self.param(
            "bias",
            partition.param_with_axes(nn.initializers.zeros_init(), (self.names[1],)),
            (self.features,),
            self.param_dtype,
        )

    def __call__(self, x: Array) -> Array:
        """[B, h, w, in_features] -> [B, h, w, features], dtype `self.dtype`."""
        kernel = partition.whole(self.kernel.astype(self.dtype))
        bias = partition.whole(self.bias.astype(self.dtype))[None, None, None]
        x = x.astype(self.dtype)
        if self.kernel_size == 1:
            return cpu_products.matmul(x, kernel[0, 0]) + bias
        return cpu_products.conv(x, kernel) + bias

    def lookup(self, indices: Array) -> Array:
        """The output of a 1 x 1 convolution for one-hot inputs: [...] ints -> [..., features].

        A gather instead of a product with `in_features` columns of zeros; bit for bit the same in
        float32, and not rounded to bfloat16 by a TPU's default matmul precision.
        """
        assert self.kernel_size == 1
        rows = jnp.take(partition.whole(self.kernel.astype(self.dtype))[0, 0], indices, axis=0)
        return rows + self.bias.astype(self.dtype).reshape((1,) * indices.ndim + (-1,))


def _normal(std: float):
    """`nn.initializers.normal`, the same numbers, drawn flat.

    XLA's CPU compiler takes 3 s over one rank-4 draw of threefry bits and minutes over a few of
    them in one program, 0.5 s over a flat one.
    """

    def init(key: Key, shape: tuple[int, ...], dtype: Any) -> Array:
        if not std:
            return jnp.zeros(shape, dtype)
        return std * jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)

    return init


def max_pool(x: Array) -> Array:
    """Halves the sides by the maximum of 2 x 2 squares: [B, h, w, C] -> [B, h/2, w/2, C].

    By reshape instead of reduce_window, whose gradient (select-and-scatter) is serial on a CPU.
    On exact ties the gradient is shared instead of going to the first.
    """
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))


def upsample(x: Array) -> Array:
    """Doubles the sides by repeating pixels: [B, h, w, C] -> [B, 2h, 2w, C]."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


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
