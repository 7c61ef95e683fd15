"""How a stack of transformer layers runs: unrolled or scanned, with remat, with folded weights.

The parameters of all layers are one stacked tree (leading axis L, logical name `layers`). Whether
the stack runs as an unrolled loop or as a scan over periods of its mask pattern never changes the
tree, so a checkpoint that was trained one way also loads the other way.

  unrolled  22 % faster on a CPU core; the program grows with L.
  scan      one period is compiled whatever L is; the choice for pods. Mask kinds are static
            inside a period (a lax.switch would compile every branch in every layer).

Cached sampling runs the layers itself, one at a time: `layers` cuts the stack and `apply_block`
applies one slice.
"""

import functools
from collections.abc import Iterable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax import axes, layout
from dalle_jax.nn import attention, masks, partition, transformer
from dalle_jax.nn.transformer import Attend, TransformerConfig
from dalle_jax.types import Array, DtypePolicy, Key, Params


class Stack(nn.Module):
    """A stack of blocks, each with its own mask; no embedding and no final norm.

    Attributes:
      config: sizes and execution.
      layer_masks: one static mask per layer, e.g. from `masks.pattern`; None = every key.
      num_out: only the last num_out positions are returned; 0 = all. The last layer then computes
        nothing but keys and values for the other positions, which saves 14 % of a stack of 6
        layers if one of 36 positions is returned.
      dtype: parameters, compute, islands.
    """

    config: TransformerConfig
    layer_masks: tuple[masks.Mask | None, ...]
    num_out: int = 0
    dtype: DtypePolicy = DtypePolicy()

    def setup(self):
        """Declares the stacked parameters `blocks`."""
        c = self.config
        if len(self.layer_masks) != c.num_layers:
            raise ValueError(f"{len(self.layer_masks)} masks for {c.num_layers} layers.")
        self.blocks = self.param("blocks", functools.partial(init_blocks, c, self.dtype))

    def __call__(self, x: Array, key: Key | None = None) -> Array:
        """[B, T, D] -> [B, T or num_out, D].

        Args:
          x: [B, T, D]; T is the length of the masks.
          key: samples the dropout; None = no dropout.
        """
        c = self.config
        x = partition.constrain(
            x.astype(self.dtype.compute), axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_EMBED
        )
        keys = None if key is None or not c.dropout else jax.random.split(key, c.num_layers)
        # Linen freezes dicts that are attributes.
        blocks = layout.stored(flax.core.unfreeze(self.blocks), self._storage())
        start, alike = 0, c.num_layers - bool(self.num_out)
        if c.scan_layers and alike:
            period, repeats = _periods(self.layer_masks[:alike])
            start = period * repeats
            kinds = self.layer_masks[:period]

            def body(x, blocks_and_keys):
                for i, mask in enumerate(kinds):
                    x = self._layer(x, mask, i, *blocks_and_keys)
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
        return partition.storage(_boxed_blocks(self.config, self.dtype))

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
            allowed = mask.graph()[-num_out:] if mask is not None and num_out else mask
            return attention.attention(q, k, v, allowed, impl=c.attention_impl), None

        def run(params, x, keys):
            return apply_block(c, self.dtype, params, x, attend, keys, num_out)[0]

        storage = self._storage()
        device_layer = partition.layer(run, storage, self.dtype.compute)

        # The slice is inside the remat, so that a scan saves its own input and no copies of layers.
        def layer(stack, x, keys):
            return device_layer(jax.tree.map(lambda a: a[i], stack), x, keys)

        gathers = any(s.gathered for s in jax.tree.leaves(storage))
        if c.remat != "none" or gathers:
            policies = jax.checkpoint_policies
            policy = {
                "full": policies.nothing_saveable,
                "dots": policies.dots_with_no_batch_dims_saveable,
                "names": policies.save_only_these_names("attn_out"),
                "none": partition.keep_all_but_gathered,
            }[c.remat]
            # prevent_cse also inside a scan, whose body is a period of several layers: without the
            # barrier XLA recomputes all of them at once in the backward pass.
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=True)
        # One key per example, so that dropout does not depend on the device of the example.
        keys = None if keys is None else jax.random.split(keys[i], len(x))
        return layer(stack, x, keys)


@functools.lru_cache
def _boxed_blocks(config: TransformerConfig, dtype: DtypePolicy) -> Params:
    key = jax.eval_shape(jax.random.key, 0)
    return jax.eval_shape(functools.partial(init_blocks, config, dtype), key)


def init_blocks(config: TransformerConfig, dtype: DtypePolicy, key: Key) -> Params:
    """Boxed parameters of all L blocks, stacked on a leading axis named `layers`."""
    block = transformer.Block(config, dtype, parent=None)
    x = jnp.zeros((1, 1, config.width), dtype.compute)

    def one(key):
        return block.init(key, x, lambda q, k, v: (v, None))["params"]

    stacked = jax.vmap(one)(jax.random.split(key, config.num_layers))
    return nn.meta.add_axis(stacked, 0, {nn.PARTITION_NAME: axes.LAYERS})


def layers(config: TransformerConfig, dtype: DtypePolicy, blocks: Params) -> list[Params]:
    """The parameters of each layer, for `apply_block`.

    Args:
      config: sizes of the stack.
      dtype: matrices are cast to its compute dtype; vectors keep theirs.
      blocks: the stacked tree `blocks`, as plain arrays.
    """
    blocks = jax.tree.map(lambda w: w.astype(dtype.compute) if w.ndim == 3 else w, blocks)
    return [jax.tree.map(lambda w, i=i: w[i], blocks) for i in range(config.num_layers)]


def apply_block(
    config: TransformerConfig,
    dtype: DtypePolicy,
    params: Params,
    x: Array,
    attend: Attend,
    keys: Key | None = None,
    num_out: int = 0,
) -> tuple[Array, Any]:
    """One layer as a function of its slice of the stacked tree; see `transformer.Block`."""
    block = transformer.Block(config, dtype, parent=None)
    return block.apply({"params": params}, x, attend, keys, num_out)


def prefill(
    config: TransformerConfig,
    dtype: DtypePolicy,
    params: list[Params],
    x: Array,
    allowed: Iterable[Array],
) -> tuple[Array, list[tuple[Array, Array]]]:
    """Runs a prefix of a stream through all layers and returns the keys and values to cache.

    Args:
      config: sizes of the stack.
      dtype: parameters, compute, islands.
      params: `layers`.
      x: [B, T, D] the embedded prefix.
      allowed: for each layer bool [T, T], which keys each query sees.

    Returns:
      ([B, T, D] after the last layer, and for each layer its keys and values, [B, T, H, K] each).
    """
    keys_and_values = []
    for layer, mask in zip(params, allowed, strict=True):

        def attend(q, k, v, mask=mask):
            return attention.attention(q, k, v, mask), (k, v)

        x, kv = apply_block(config, dtype, layer, x, attend)
        keys_and_values.append(kv)
    return x, keys_and_values


def flops(
    config: TransformerConfig,
    layer_masks: tuple[masks.Mask | None, ...],
    length: int,
    num_out: int = 0,
) -> float:
    """Forward matmul FLOPs of one sequence (2 per multiply-add), attention on allowed pairs.

    A formula, because `engine.flops` counts the scores that a mask discards.

    Args:
      config: sizes of the stack.
      layer_masks: as in `Stack`.
      length: T.
      num_out: as in `Stack`; the attention of the last layer is counted for all positions.
    """
    d = config.width
    matrices = 4 + (3 if config.gated else 2) * config.mlp_ratio
    dense = 2 * length * d * d * matrices * config.num_layers
    if num_out:
        dense -= 2 * (length - num_out) * d * d * (matrices - 2)
    pairs = {m: length**2 if m is None else m.num_allowed() for m in set(layer_masks)}
    return float(dense + sum(4 * d * pairs[m] for m in layer_masks))


def _periods(layer_masks: tuple) -> tuple[int, int]:
    """(period, repeats) of the leading layers to scan over; compiles the fewest layers."""
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
