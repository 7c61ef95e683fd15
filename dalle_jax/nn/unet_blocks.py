"""The parts of an ADM U-Net: norm, residual block, attention with context, features of a step.

Pictures are `[B, h, w, C]` of any side. Convolutions are `lax`'s: of the other ways to write a
3 x 3 one, nine shifted matmuls and im2col, none came near it (32 px, 64 to 64 channels, batch 8,
one CPU core, forward and backward: 43 GFLOP/s against 22 and 21).

Source: Dhariwal & Nichol 2021 (arXiv:2105.05233), openai/guided-diffusion `unet.py`; attention with
context GLIDE (arXiv:2112.10741), openai/glide-text2im `unet.py`.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax import axes
from dalle_jax.nn import attention, conv, cpu_products, partition
from dalle_jax.types import Array, DtypePolicy, Key

NORM_GROUPS = 32
NORM_EPS = 1e-5
_LEAST_PER_GROUP = 4  # channels; 32 groups of 64 channels would have two each


class Linear(nn.Module):
    """x W + b along the last axis; a 1 x 1 convolution is one.

    `gain` 1 keeps the variance of independent inputs, 0 starts at zero.
    """

    in_features: int
    features: int
    gain: float = 1.0
    names: tuple[str | None, str | None] = (axes.CONV_IN, axes.CONV_OUT)
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., in_features] -> [..., features], dtype `self.dtype`."""
        std = self.gain * self.in_features**-0.5
        init = nn.initializers.normal(std) if std else nn.initializers.zeros
        shape = (self.in_features, self.features)
        kernel = self.param(
            "kernel", partition.param_with_axes(init, self.names), shape, self.param_dtype
        )
        zeros = partition.param_with_axes(nn.initializers.zeros, self.names[1:])
        bias = self.param("bias", zeros, shape[1:], self.param_dtype)
        kernel, bias = (partition.whole(w.astype(self.dtype)) for w in (kernel, bias))
        y = cpu_products.matmul(x.astype(self.dtype), kernel)
        return y + bias.reshape((1,) * (x.ndim - 1) + shape[1:])


class GroupNorm(nn.Module):
    """Group norm, optionally scaled and shifted once more by what a step says; then SiLU or not.

    32 groups, eps 1e-5; fewer groups where they would have under four channels. Statistics are
    float32.
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
        gain, bias = (partition.whole(w.astype(self.dtype.accum))[None] for w in (gain, bias))
        if scale_shift is not None:
            scale, shift = (y.astype(self.dtype.accum) for y in scale_shift)
            gain, bias = gain * (1 + scale), bias * (1 + scale) + shift
        x = x.astype(self.dtype.accum)
        groups = num_groups(self.features)
        x = x - _spread(jnp.mean(x, (1, 2)), groups)
        variance = _spread(jnp.mean(jnp.square(x), (1, 2)), groups)
        x = x * (jax.lax.rsqrt(variance + NORM_EPS) * gain[:, None, None]) + bias[:, None, None]
        return (jax.nn.silu(x) if self.activate else x).astype(self.dtype.compute)


class ResBlock(nn.Module):
    """x + conv(dropout(norm(conv(norm(x)), step))), the last convolution zero at the start.

    Attributes:
      in_features: channels of x.
      features: channels of the result.
      resample: "" keeps the size; "down" halves it by averages, "up" doubles it by repetition, in
        front of the first convolution and on the short cut alike.
      dropout: in front of the last convolution, only where a key is given.
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
        kinds = dict(dtype=self.dtype.compute, param_dtype=self.dtype.param)
        h = GroupNorm(self.in_features, dtype=self.dtype, name="norm_1")(x)
        if self.resample:
            change = average_pool if self.resample == "down" else conv.upsample
            h, x = change(h), change(x)
        h = conv.Conv(self.in_features, self.features, 3, name="conv_1", **kinds)(h)
        both = Linear(step.shape[-1], 2 * self.features, name="step", **kinds)(step)
        h = GroupNorm(self.features, dtype=self.dtype, name="norm_2")(h, jnp.split(both, 2, -1))
        h = _dropout(h, self.dropout, key)
        h = conv.Conv(self.features, self.features, 3, gain=0.0, name="conv_2", **kinds)(h)
        if self.in_features != self.features:
            x = Linear(self.in_features, self.features, name="identity", **kinds)(x)
        return laid_out(x + h)


class AttentionBlock(nn.Module):
    """Every position looks at all positions and at the context; zero at the start.

    Keys and values of the context stand in front of the picture's own, under one softmax.

    Attributes:
      features: C.
      head_width: channels of a head.
      context_width: of the context; 0 = there is none.
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
        kinds = dict(dtype=self.dtype.compute, param_dtype=self.dtype.param)
        heads = (-1, self.features // self.head_width, self.head_width)

        def project(name: str, y: Array) -> Array:
            names = (axes.CONV_IN, axes.HEADS)
            y = Linear(y.shape[-1], c, names=names, name=name, **kinds)(y)
            return y.reshape(b, *heads)

        y = GroupNorm(c, activate=False, dtype=self.dtype, name="norm")(x).reshape(b, h * w, c)
        q, k, v = (project(name, y) for name in ("q", "k", "v"))
        if self.context_width:
            k = jnp.concatenate([project("context_k", context), k], axis=1)
            v = jnp.concatenate([project("context_v", context), v], axis=1)
        names = (axes.ACT_BATCH, None, axes.ACT_HEADS, None)
        q, k, v = (partition.constrain(y, *names) for y in (q, k, v))
        y = attention.attention(q, k, v, None).reshape(b, h, w, c)
        names = (axes.HEADS, axes.CONV_OUT)
        return laid_out(x + Linear(c, c, gain=0.0, names=names, name="o", **kinds)(y))


def num_groups(features: int) -> int:
    """Groups of the norm of so many channels."""
    groups = math.gcd(NORM_GROUPS, features)
    while groups > 1 and features // groups < _LEAST_PER_GROUP:
        groups //= 2
    return groups


def step_features(t: Array, width: int) -> Array:
    """Cosines, then sines of a step at width / 2 frequencies: [B] int -> [B, width] float32.

    Source: openai/guided-diffusion `nn.py` (`timestep_embedding`).
    """
    half = width // 2
    frequencies = jnp.exp(-math.log(10_000) / half * jnp.arange(half, dtype=jnp.float32))
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def average_pool(x: Array) -> Array:
    """Halves the sides by the mean of 2 x 2 squares: [B, h, w, C] -> [B, h/2, w/2, C]."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def laid_out(x: Array) -> Array:
    """x [B, h, w, C] where the rules want activations."""
    return partition.constrain(x, axes.ACT_BATCH, axes.ACT_H, axes.ACT_W, axes.ACT_CHAN)


def block_macs(pixels: int, n_in: int, n_out: int, step_width: int) -> int:
    """Multiply-adds of a `ResBlock` on so many positions (after resampling)."""
    identity = n_in * n_out if n_in != n_out else 0
    return pixels * (9 * n_in * n_out + 9 * n_out**2 + identity) + step_width * 2 * n_out


def attention_macs(pixels: int, features: int, context_width: int, context_len: int) -> int:
    """Multiply-adds of an `AttentionBlock` on so many positions."""
    own = 4 * pixels * features**2 + 2 * context_len * context_width * features
    return own + 2 * pixels * (pixels + context_len) * features


def _spread(means: Array, groups: int) -> Array:
    """Means of channels [B, C] -> of their groups [B, 1, 1, C].

    Channels first, groups after: a sum along the last axis, which XLA does not vectorise on a CPU,
    is then one over a few numbers.
    """
    b, c = means.shape
    means = means.reshape(b, groups, c // groups)
    means = jnp.broadcast_to(means.mean(2, keepdims=True), means.shape)
    return means.reshape(b, 1, 1, c)


def _dropout(x: Array, rate: float, key: Key | None) -> Array:
    """Zeros a share `rate` of x's entries and scales the others; the same wherever x lies."""
    if key is None or not rate:
        return x
    # Flat: XLA's CPU compiler takes seconds over a rank-4 draw.
    keep = jax.random.bernoulli(key, 1 - rate, (x.size,)).reshape(x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))
