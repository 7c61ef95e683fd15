"""A pre-norm transformer stack: DALL-E's, and both towers of CLIP.

The parameters of all layers are one stacked tree (leading axis L, logical name `layers`). How
the stack runs, as an unrolled loop or as a scan over periods of its mask pattern, is a config
choice that never changes the tree: a checkpoint trained one way loads the other way.

  unrolled  22 % faster on a CPU core; the program grows with L.
  scan      one period is compiled whatever L is; what a pod wants. Mask kinds are static
            inside a period (a lax.switch would compile every branch in every layer).

Weights are stored as plain matrices, (D, D) and (D, F): a minor axis of head_dim 64 would be
padded to 128 lanes on TPU (measured at 12B: 1.45 instead of 1.10 GiB of state per device).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.ad_checkpoint
import jax.numpy as jnp

from dalle_jax import axes, layout
from dalle_jax.nn import attention, cpu_products, masks, partition
from dalle_jax.types import Array, DtypePolicy, Key, Params, UsageError

REMAT = ("none", "names", "dots", "full")
NORMS = ("rms", "layer")
ACTIVATIONS = ("quick_gelu", "gelu")

# (q, k, v) [B, T, H, K] -> (mixed values [B, T, H, K], anything to hand out of the layer).
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and execution of a stack.

    Attributes:
      width: D.
      num_layers: L.
      num_heads: H; head_dim is width / num_heads.
      mlp_ratio: F / D.
      gated: the MLP multiplies its hidden F with F more, activated (GLU variants,
        arXiv:2002.05202): half as many parameters again.
      norm: "rms" (gain, eps 1e-6) or "layer" (gain and bias, eps 1e-5).
      activation: "quick_gelu" x * sigmoid(1.702 x), or "gelu", exact.
      use_bias: biases on the six matrices.
      dropout: on both branches' outputs, only where a key is given.
      scan_layers: scan over periods of the mask pattern instead of an unrolled loop.
      remat: what the backward pass keeps of a layer: "none" (no remat: everything),
        "names" (the branch input to the mlp), "dots" (matmul outputs), "full" (only its input).
      attention_impl: one of `attention.IMPLEMENTATIONS`.
      dtype: parameters, compute, islands.
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
    dtype: DtypePolicy = DtypePolicy()

    def __post_init__(self):
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
        """[..., D] -> [..., D] in the compute dtype."""
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
    """Projections to q, k, v, whatever `attend` does with them, and the projection back."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array, attend: Attend, num_out: int = 0) -> tuple[Array, Any]:
        """[B, T, D] -> ([B, T or the last num_out, D], what attend hands out)."""
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
    """Two matrices around an activation, or around one half times the other half activated."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]."""
        c = self.config
        wide = c.width * c.mlp_ratio
        names = (axes.EMBED, axes.MLP)
        hidden = _linear(self, "up", x, wide, names, c.width**-0.5)
        gate = _linear(self, "gate", x, wide, names, c.width**-0.5) if c.gated else hidden
        gate = partition.constrain(gate, axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_MLP)
        x = (
            quick_gelu(gate)
            if c.activation == "quick_gelu"
            else jax.nn.gelu(gate, approximate=False)
        )
        if c.gated:
            x = x * partition.constrain(hidden, axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_MLP)
        std = (2 * c.num_layers * wide) ** -0.5
        return _linear(self, "down", x, c.width, names[::-1], std)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Array, attend: Attend, keys: Key | None = None, num_out: int = 0
    ) -> tuple[Array, Any]:
        """One layer.

        Args:
          x: [B, T, D].
          attend: (q, k, v), each [B, T, H, K] -> (values [B, T, H, K], out).
          keys: [B], one per example, draw dropout; None = none.
          num_out: only the last num_out positions ask (q, and so the values, have no others)
            and are returned; all are keys. 0 = all.

        Returns:
          ([B, T or num_out, D], out).
        """
        c = self.config
        attn_keys = mlp_keys = None
        if keys is not None and c.dropout:
            attn_keys, mlp_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        h = Norm(c.norm, c.dtype, name="norm_attn")(x)
        y, out = Attention(c, name="attn")(h, attend, num_out)
        x = _last(x, num_out) + _dropout(y, c.dropout, attn_keys)
        x = partition.constrain(x, axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_EMBED)
        x = jax.ad_checkpoint.checkpoint_name(x, "attn_out")
        h = Norm(c.norm, c.dtype, name="norm_mlp")(x)
        x = x + _dropout(Mlp(c, name="mlp")(h), c.dropout, mlp_keys)
        return partition.constrain(x, axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_EMBED), out


class Transformer(nn.Module):
    """A stack of blocks, each with its own mask; no embedding and no final norm.

    Attributes:
      config: shape and execution.
      layer_masks: one static mask (or None: every key) per layer; `masks.pattern` makes them.
      num_out: positions whose output is wanted, the last ones; 0 = all. The last layer then
        computes the others' keys and values only: with one of 36 positions, 14 % of a stack of 6.
    """

    config: TransformerConfig
    layer_masks: tuple[masks.Mask | None, ...]
    num_out: int = 0

    def setup(self):
        """Declares the stacked parameters `blocks`."""
        c = self.config
        if len(self.layer_masks) != c.num_layers:
            raise ValueError(f"{len(self.layer_masks)} masks for {c.num_layers} layers.")
        self.blocks = self.param("blocks", functools.partial(init_blocks, c))

    def __call__(self, x: Array, key: Key | None = None) -> Array:
        """[B, T, D] -> [B, T or num_out, D], T as the masks say; `key` draws dropout."""
        c = self.config
        x = partition.constrain(
            x.astype(c.dtype.compute), axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_EMBED
        )
        keys = None if key is None or not c.dropout else jax.random.split(key, c.num_layers)
        # Linen freezes the dicts of attributes.
        blocks = layout.stored(flax.core.unfreeze(self.blocks), self._storage())
        start, alike = 0, c.num_layers - bool(self.num_out)
        if c.scan_layers and alike:
            period, repeats = _periods(self.layer_masks[:alike])
            start = period * repeats
            kinds = self.layer_masks[:period]

            def body(x, layers):
                for i, mask in enumerate(kinds):
                    x = self._layer(x, mask, i, *layers)
                return x, None

            head = jax.tree.map(
                lambda a: a[:start].reshape(repeats, period, *a.shape[1:]), (blocks, keys)
            )
            x, _ = jax.lax.scan(body, x, head)
        for i in range(start, c.num_layers):
            num_out = self.num_out if i == alike else 0
            x = self._layer(x, self.layer_masks[i], i, blocks, keys, num_out)
        return x

    def _storage(self) -> Any:
        return partition.storage(_boxed_blocks(self.config))

    def _layer(
        self,
        x: Array,
        mask: masks.Mask | None,
        i: int,
        stack: Params,
        keys: Key | None,
        num_out: int = 0,
    ) -> Array:
        """Layer i of a stored stack with one key per layer."""
        c = self.config

        def attend(q, k, v):
            asked = mask.graph()[-num_out:] if mask is not None and num_out else mask
            return attention.attention(q, k, v, asked, impl=c.attention_impl), None

        def run(params, x, keys):
            return apply_block(c, params, x, attend, keys, num_out)[0]

        stored = self._storage()
        device_layer = partition.layer(run, stored, c.dtype.compute)

        # Cut inside the remat: what a scan keeps is then its own input and no copy of each layer.
        def layer(stack, x, keys):
            return device_layer(jax.tree.map(lambda a: a[i], stack), x, keys)

        gathers = any(s.gathered for s in jax.tree.leaves(stored))
        if c.remat != "none" or gathers:
            policies = jax.checkpoint_policies
            policy = {
                "full": policies.nothing_saveable,
                "dots": policies.dots_with_no_batch_dims_saveable,
                "names": policies.save_only_these_names("attn_out"),
                "none": partition.keep_all_but_gathered,
            }[c.remat]
            # In a scan too, whose body is a period of several layers: the barrier keeps XLA from
            # recomputing all of them at once in the backward pass.
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=True)
        # A key per example: the same dropout wherever the example lies.
        keys = None if keys is None else jax.random.split(keys[i], len(x))
        return layer(stack, x, keys)


@functools.lru_cache
def _boxed_blocks(config: TransformerConfig) -> Params:
    key = jax.eval_shape(jax.random.key, 0)
    return jax.eval_shape(functools.partial(init_blocks, config), key)


def init_blocks(config: TransformerConfig, key: Key) -> Params:
    """Boxed parameters of all L blocks, stacked on a leading axis named `layers`."""
    block = Block(config, parent=None)
    x = jnp.zeros((1, 1, config.width), config.dtype.compute)

    def one(key):
        return block.init(key, x, lambda q, k, v: (v, None))["params"]

    stacked = jax.vmap(one)(jax.random.split(key, config.num_layers))
    return nn.meta.add_axis(stacked, 0, {nn.PARTITION_NAME: axes.LAYERS})


def apply_block(
    config: TransformerConfig,
    params: Params,
    x: Array,
    attend: Attend,
    keys: Key | None = None,
    num_out: int = 0,
) -> tuple[Array, Any]:
    """One block as a function of one slice of the stacked tree; see `Block.__call__`."""
    return Block(config, parent=None).apply({"params": params}, x, attend, keys, num_out)


def quick_gelu(x: Array) -> Array:
    """x * sigmoid(1.702 x), the approximation that DALL-E and OpenAI's CLIP were trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


def flops(
    config: TransformerConfig,
    layer_masks: tuple[masks.Mask | None, ...],
    length: int,
    num_out: int = 0,
):
    """Forward matmul FLOPs of one sequence of `length`; attention counted on allowed pairs.

    With `Transformer.num_out` the last layer's queries, outputs and MLP are counted for those
    positions only (its few attention pairs as if for all).
    """
    d = config.width
    matrices = 4 + (3 if config.gated else 2) * config.mlp_ratio
    dense = 2 * length * d * d * matrices * config.num_layers
    if num_out:
        dense -= 2 * (length - num_out) * d * d * (matrices - 2)
    pairs = {m: length**2 if m is None else m.num_allowed() for m in set(layer_masks)}
    return float(dense + sum(4 * d * pairs[m] for m in layer_masks))


def _periods(layer_masks: tuple) -> tuple[int, int]:
    """(period, repeats): the leading layers to scan over, so that the fewest are compiled."""
    n = len(layer_masks)
    best = (n, 1)
    for period in range(1, n):
        repeats = 1
        while layer_masks[period * repeats :][:period] == layer_masks[:period]:
            repeats += 1
        compiled = period + n - period * repeats
        if compiled < best[0] + n - best[0] * best[1]:
            best = (period, repeats)
    return best


def _linear(
    module: nn.Module, name: str, x: Array, features: int, names: tuple[str, str], std: float
) -> Array:
    """x @ W (+ b) with W [D_in, features] drawn from N(0, std)."""
    c = module.config
    init = partition.param_with_axes(nn.initializers.normal(std), names)
    w = module.param(name, init, (x.shape[-1], features), c.dtype.param)
    y = cpu_products.matmul(x, w.astype(c.dtype.compute))
    if c.use_bias:
        init = partition.param_with_axes(nn.initializers.zeros, names[1:])
        b = module.param(f"{name}_bias", init, (features,), c.dtype.param)
        y = y + _along(b.astype(c.dtype.compute), y)
    return y


def _last(x: Array, num_out: int) -> Array:
    """The last num_out positions of [B, T, D]; 0 = all."""
    return x[:, -num_out:] if num_out else x


def _along(vector: Array, x: Array) -> Array:
    """`vector` [D] with the rank of x, explicitly: rank promotion is an error in our tests."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def _dropout(x: Array, rate: float, keys: Key | None) -> Array:
    if keys is None:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))
