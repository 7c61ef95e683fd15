"""The parts of an ADM U-Net: linear layer, norm, residual block, attention with context.

Pictures are `[B, h, w, C]` with sides of any length. Convolutions are those of `lax`: a 3 x 3 one
runs at 43 GFLOP/s, as nine shifted matmuls at 22 and as im2col at 21 (forward and backward, 32 px,
64 to 64 channels, batch 8, one CPU core).

Source: Dhariwal & Nichol 2021 (arXiv:2105.05233), openai/guided-diffusion `unet.py`; attention with
context GLIDE (arXiv:2112.10741), openai/glide-text2im `unet.py`.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax import axes
from dalle_jax.nn import attention, conv, cpu_products, partition
from dalle_jax.types import Array, DtypePolicy, Key

NORM_GROUPS = 32
NORM_EPS = 1e-5
_MIN_GROUP = 4  # channels in a group; of 64 channels, 32 groups would have two each


class Linear(nn.Module):
    """x W + b along the last axis, which is also what a 1 x 1 convolution is.

    Attributes:
      in_features: width of the input.
      features: width of the output.
      gain: 1 keeps the variance of independent inputs; with 0 the layer starts at zero.
      names: logical axes of in_features and features.
      dtype: parameters and compute.
    """

    in_features: int
    features: int
    gain: float = 1.0
    names: tuple[str | None, str | None] = (axes.CONV_IN, axes.CONV_OUT)
    dtype: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., in_features] -> [..., features], compute dtype."""
        dtype = self.dtype
        std = self.gain * self.in_features**-0.5
        init = nn.initializers.normal(std) if std else nn.initializers.zeros
        shape = (self.in_features, self.features)
        kernel = self.param(
            "kernel", partition.param_with_axes(init, self.names), shape, dtype.param
        )
        zeros = partition.param_with_axes(nn.initializers.zeros, self.names[1:])
        bias = self.param("bias", zeros, shape[1:], dtype.param)
        kernel, bias = (partition.replicated(w.astype(dtype.compute)) for w in (kernel, bias))
        y = cpu_products.matmul(x.astype(dtype.compute), kernel)
        return y + bias.reshape((1,) * (x.ndim - 1) + shape[1:])


class GroupNorm(nn.Module):
    """Group norm with an optional second scale and shift, then SiLU.

    It has 32 groups and eps 1e-5; fewer groups if they would have under four channels each.
    Statistics are float32.

    Attributes:
      features: C.
      activate: SiLU follows.
      dtype: parameters, compute, islands.
    """

    features: int
    activate: bool = True
    dtype: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, x: Array, scale_shift: tuple[Array, Array] | None = None) -> Array:
        """x [B, h, w, C], scale and shift [B, C] -> silu(norm(x) (1 + scale) + shift)."""
        names = (axes.CONV_OUT,)
        ones = partition.param_with_axes(nn.initializers.ones, names)
        zeros = partition.param_with_axes(nn.initializers.zeros, names)
        gain = self.param("scale", ones, (self.features,), self.dtype.param)
        bias = self.param("bias", zeros, (self.features,), self.dtype.param)
        gain, bias = (partition.replicated(w.astype(self.dtype.accum))[None] for w in (gain, bias))
        if scale_shift is not None:
            scale, shift = (y.astype(self.dtype.accum) for y in scale_shift)
            gain, bias = gain * (1 + scale), bias * (1 + scale) + shift
        x = x.astype(self.dtype.accum)
        groups = num_groups(self.features)
        x = x - _group_means(jnp.mean(x, (1, 2)), groups)
        variance = _group_means(jnp.mean(jnp.square(x), (1, 2)), groups)
        x = x * (jax.lax.rsqrt(variance + NORM_EPS) * gain[:, None, None]) + bias[:, None, None]
        return (jax.nn.silu(x) if self.activate else x).astype(self.dtype.compute)


class ResBlock(nn.Module):
    """x + conv(dropout(norm(conv(norm(x)), step))), the last convolution zero at the start.

    Attributes:
      in_features: channels of x.
      features: channels of the result.
      resample: "" keeps the size, "down" halves it by averages, "up" doubles it by repetition:
        before the first convolution and on the shortcut.
      dropout: rate before the last convolution; applies only if the caller passes a key.
      dtype: parameters, compute, islands.
    """

    in_features: int
    features: int
    resample: str = ""
    dropout: float = 0.0
    dtype: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, x: Array, step: Array, key: Key | None = None) -> Array:
        """x [B, h, w, in_features], step [B, D] (activated) -> [B, h', w', features]."""
        dtype = self.dtype
        h = GroupNorm(self.in_features, dtype=dtype, name="norm_1")(x)
        if self.resample:
            resample = average_pool if self.resample == "down" else conv.upsample
            h, x = resample(h), resample(x)
        h = conv.Conv(self.in_features, self.features, 3, dtype=dtype, name="conv_1")(h)
        scale_shift = Linear(step.shape[-1], 2 * self.features, dtype=dtype, name="step")(step)
        h = GroupNorm(self.features, dtype=dtype, name="norm_2")(h, jnp.split(scale_shift, 2, -1))
        h = _dropout(h, self.dropout, key)
        h = conv.Conv(self.features, self.features, 3, gain=0.0, dtype=dtype, name="conv_2")(h)
        if self.in_features != self.features:
            x = Linear(self.in_features, self.features, dtype=dtype, name="identity")(x)
        return conv.constrain(x + h)


class AttentionBlock(nn.Module):
    """x + attention from every position to all positions and the context; x at the start.

    One softmax runs over the keys of the context, which come first, and those of the picture.

    Attributes:
      features: C.
      head_width: channels of a head.
      context_width: width of a context token; 0 = no context.
      dtype: parameters, compute, islands.
    """

    features: int
    head_width: int
    context_width: int = 0
    dtype: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None) -> Array:
        """x [B, h, w, C], context [B, S, context_width] -> [B, h, w, C]."""
        b, h, w, c = x.shape
        dtype = self.dtype
        heads = (-1, self.features // self.head_width, self.head_width)

        def project(name: str, y: Array) -> Array:
            names = (axes.CONV_IN, axes.HEADS)
            y = Linear(y.shape[-1], c, names=names, dtype=dtype, name=name)(y)
            return y.reshape(b, *heads)

        y = GroupNorm(c, activate=False, dtype=dtype, name="norm")(x).reshape(b, h * w, c)
        q, k, v = (project(name, y) for name in ("q", "k", "v"))
        if self.context_width:
            k = jnp.concatenate([project("context_k", context), k], axis=1)
            v = jnp.concatenate([project("context_v", context), v], axis=1)
        names = (axes.ACT_BATCH, None, axes.ACT_HEADS, None)
        q, k, v = (partition.constrain(y, *names) for y in (q, k, v))
        y = attention.attention(q, k, v, None).reshape(b, h, w, c)
        names = (axes.HEADS, axes.CONV_OUT)
        y = Linear(c, c, gain=0.0, names=names, dtype=dtype, name="o")(y)
        return conv.constrain(x + y)


def num_groups(features: int) -> int:
    """Number of groups of a `GroupNorm`."""
    groups = math.gcd(NORM_GROUPS, features)
    while groups > 1 and features // groups < _MIN_GROUP:
        groups //= 2
    return groups


def average_pool(x: Array) -> Array:
    """Halves the sides by the mean of 2 x 2 squares: [B, h, w, C] -> [B, h/2, w/2, C]."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def block_macs(pixels: int, n_in: int, n_out: int, step_width: int) -> int:
    """Multiply-adds of a `ResBlock`; `pixels` are the positions after resampling."""
    identity = n_in * n_out if n_in != n_out else 0
    return pixels * (9 * n_in * n_out + 9 * n_out**2 + identity) + step_width * 2 * n_out


def attention_macs(pixels: int, features: int, context_width: int, context_len: int) -> int:
    """Multiply-adds of an `AttentionBlock` on `pixels` positions."""
    own = 4 * pixels * features**2 + 2 * context_len * context_width * features
    return own + 2 * pixels * (pixels + context_len) * features


def _group_means(means: Array, groups: int) -> Array:
    """Means of channels [B, C] -> each channel's mean of its group [B, 1, 1, C].

    Means of channels come first because XLA's CPU backend does not vectorise a sum along the last
    axis, which here has only C / groups numbers.
    """
    b, c = means.shape
    means = means.reshape(b, groups, c // groups)
    means = jnp.broadcast_to(means.mean(2, keepdims=True), means.shape)
    return means.reshape(b, 1, 1, c)


def _dropout(x: Array, rate: float, key: Key | None) -> Array:
    """Zeros a share `rate` of the entries and scales the others; independent of the sharding."""
    if key is None or not rate:
        return x
    # One flat array: XLA's CPU compiler takes seconds for random bits of rank 4.
    keep = jax.random.bernoulli(key, 1 - rate, (x.size,)).reshape(x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))
