"""One layer of a pre-norm transformer: norm, attention, MLP, and the block that joins them.

DALL-E, both towers of CLIP, both priors and the U-Net's text encoder are stacks of this block;
`nn/stack.py` runs them.

Weights are stored as plain matrices, (D, D) and (D, F): a minor axis of head_dim 64 would be
padded to 128 lanes on TPU (measured at 12B: 1.45 instead of 1.10 GiB of state per device).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.ad_checkpoint
import jax.numpy as jnp

from dalle_jax import axes
from dalle_jax.nn import attention, cpu_products, partition
from dalle_jax.types import Array, DtypePolicy, Key, UsageError

REMAT = ("none", "names", "dots", "full")
NORMS = ("rms", "layer")
ACTIVATIONS = ("quick_gelu", "gelu")

# (q, k, v) [B, T, H, K] -> (mixed values [B, T, H, K], anything that the block's caller needs).
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a stack of layers, and how it runs.

    Attributes:
      width: D.
      num_layers: L.
      num_heads: H; head_dim is width / num_heads.
      mlp_ratio: F / D.
      gated: a second hidden layer of F units, activated, multiplies the first (GLU variants,
        arXiv:2002.05202); an MLP then has 1.5 times the parameters.
      norm: "rms" (gain, eps 1e-6) or "layer" (gain and bias, eps 1e-5).
      activation: "quick_gelu", x * sigmoid(1.702 x), or "gelu", the exact one.
      use_bias: the matrices of a layer have biases.
      dropout: rate on the outputs of both branches; applies only if the caller passes a key.
      scan_layers: the layers run as a scan over periods of the mask pattern, not unrolled.
      remat: what is saved of a layer for the backward pass: "none" (no remat, everything),
        "names" (the input of the MLP branch), "dots" (matmul outputs), "full" (the layer's input).
      attention_impl: one of `attention.IMPLEMENTATIONS`.
    """

    width: int
    num_layers: int
    num_heads: int
    mlp_ratio: int = 4
    gated: bool = False
    norm: str = "layer"
    activation: str = "quick_gelu"
    use_bias: bool = True
    dropout: float = 0.0
    scan_layers: bool = False
    remat: str = "none"
    attention_impl: str = "auto"

    def __post_init__(self):
        for field in ("width", "num_layers", "num_heads", "mlp_ratio"):
            if getattr(self, field) < 1:
                raise UsageError(f"{field}={getattr(self, field)}; expected 1 or more.")
        if self.width % self.num_heads:
            raise UsageError(
                f"width {self.width} is not a multiple of num_heads {self.num_heads}; "
                f"use a head size that divides it, e.g. num_heads={max(1, self.width // 64)}."
            )
        for field, known in (
            ("remat", REMAT),
            ("norm", NORMS),
            ("activation", ACTIVATIONS),
            ("attention_impl", attention.IMPLEMENTATIONS),
        ):
            if getattr(self, field) not in known:
                raise UsageError(
                    f"{field}={getattr(self, field)!r} is unknown; use one of {known}."
                )
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout={self.dropout} is not in [0, 1).")


class Norm(nn.Module):
    """RMS norm or layer norm over the last axis; statistics in float32."""

    kind: str
    dtype: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D], compute dtype."""
        dtype = self.dtype
        shape = (x.shape[-1],)
        ones = partition.param_with_axes(nn.initializers.ones, (axes.EMBED,))
        scale = self.param("scale", ones, shape, dtype.param)
        x = x.astype(dtype.accum)
        if self.kind == "layer":
            zeros = partition.param_with_axes(nn.initializers.zeros, (axes.EMBED,))
            bias = self.param("bias", zeros, shape, dtype.param)
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        eps = 1e-5 if self.kind == "layer" else 1e-6
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
        x = x * _along(scale, x)
        if self.kind == "layer":
            x = x + _along(bias, x)
        return x.astype(dtype.compute)


class Attention(nn.Module):
    """Projections to q, k and v, the caller's `attend`, and the projection back to D."""

    config: TransformerConfig
    dtype: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, x: Array, attend: Attend, num_out: int = 0) -> tuple[Array, Any]:
        """[B, T, D] -> ([B, T or num_out, D], second result of `attend`); see `Block.__call__`."""
        c = self.config
        heads = (c.num_heads, c.width // c.num_heads)
        std = c.width**-0.5
        into = (axes.EMBED, axes.HEADS)
        q, k, v = (
            _linear(self, name, y, c.width, into, std).reshape(*y.shape[:-1], *heads)
            for name, y in (("q", _last(x, num_out)), ("k", x), ("v", x))
        )
        names = (axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_HEADS, None)
        q, k, v = (partition.constrain(y, *names) for y in (q, k, v))
        y, out = attend(q, k, v)
        y = partition.constrain(y, *names).reshape(*y.shape[:-2], c.width)
        # 1/sqrt(2L): the sum of 2L branches starts with the variance of one.
        std = std * (2 * c.num_layers) ** -0.5
        return _linear(self, "o", y, c.width, into[::-1], std), out


class Mlp(nn.Module):
    """Two matrices around an activation; `gated` has a third, whose output is activated."""

    config: TransformerConfig
    dtype: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]."""
        c = self.config
        hidden_width = c.width * c.mlp_ratio
        names = (axes.EMBED, axes.MLP)
        hidden = _linear(self, "up", x, hidden_width, names, c.width**-0.5)
        gate = _linear(self, "gate", x, hidden_width, names, c.width**-0.5) if c.gated else hidden
        gate = partition.constrain(gate, axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_MLP)
        x = (
            quick_gelu(gate)
            if c.activation == "quick_gelu"
            else jax.nn.gelu(gate, approximate=False)
        )
        if c.gated:
            x = x * partition.constrain(hidden, axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_MLP)
        std = (2 * c.num_layers * hidden_width) ** -0.5
        return _linear(self, "down", x, c.width, names[::-1], std)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: TransformerConfig
    dtype: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(
        self, x: Array, attend: Attend, keys: Key | None = None, num_out: int = 0
    ) -> tuple[Array, Any]:
        """One layer.

        Args:
          x: [B, T, D].
          attend: (q, k, v), each [B, T, H, K] -> (values [B, T, H, K], out).
          keys: [B], one dropout key per example; None = no dropout.
          num_out: only the last num_out positions are queries and are returned; all positions
            are keys and values. 0 = all positions.

        Returns:
          ([B, T or num_out, D], out).
        """
        c = self.config
        attn_keys = mlp_keys = None
        if keys is not None and c.dropout:
            attn_keys, mlp_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        h = Norm(c.norm, self.dtype, name="norm_attn")(x)
        y, out = Attention(c, self.dtype, name="attn")(h, attend, num_out)
        x = _last(x, num_out) + _dropout(y, c.dropout, attn_keys)
        x = partition.constrain(x, axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_EMBED)
        x = jax.ad_checkpoint.checkpoint_name(x, "attn_out")
        h = Norm(c.norm, self.dtype, name="norm_mlp")(x)
        x = x + _dropout(Mlp(c, self.dtype, name="mlp")(h), c.dropout, mlp_keys)
        return partition.constrain(x, axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_EMBED), out


def quick_gelu(x: Array) -> Array:
    """x * sigmoid(1.702 x), the approximation in DALL-E and OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


def _linear(
    module: nn.Module, name: str, x: Array, features: int, names: tuple[str, str], std: float
) -> Array:
    """x @ W (+ b) with W [D_in, features], initially N(0, std)."""
    dtype = module.dtype
    init = partition.param_with_axes(nn.initializers.normal(std), names)
    w = module.param(name, init, (x.shape[-1], features), dtype.param)
    y = cpu_products.matmul(x, w.astype(dtype.compute))
    if module.config.use_bias:
        init = partition.param_with_axes(nn.initializers.zeros, names[1:])
        b = module.param(f"{name}_bias", init, (features,), dtype.param)
        y = y + _along(b.astype(dtype.compute), y)
    return y


def _last(x: Array, num_out: int) -> Array:
    """The last num_out positions of [B, T, D]; 0 = all."""
    return x[:, -num_out:] if num_out else x


def _along(vector: Array, x: Array) -> Array:
    """`vector` [D] reshaped to the rank of x; rank promotion is an error in our tests."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def _dropout(x: Array, rate: float, keys: Key | None) -> Array:
    if keys is None:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))
