"""cuDNN's flash attention for NVIDIA GPUs, under any static mask.

One kernel computes the full stream and no score reaches memory. The mask is one bias [T, T] that
all examples and heads share (`full` layers need none). The kernel saves memory traffic, but it also
computes the scores that a sparse mask discards: 5 % of a 12B step at 1,280 positions, 15 % at
4,352. `auto` never chooses it: its results are correct on an H100 (docs/performance.md), but it has
not been timed on any GPU.

Source: `jax.nn.dot_product_attention` with implementation="cudnn"; flash attention is
arXiv:2205.14135.
"""

import jax
import jax.numpy as jnp

from dalle_jax.nn import masks
from dalle_jax.types import Array, UsageError

_HALF = (jnp.bfloat16, jnp.float16)


def attention(
    q: Array, k: Array, v: Array, mask: masks.Mask, *, implementation: str = "cudnn"
) -> Array:
    """Attention of one device's examples and heads; gradients too.

    Args:
      q: [B, T, H, K] queries, scaled; bfloat16 or float16, K a multiple of 8 up to 128.
      k: [B, T, H, K] keys.
      v: [B, T, H, K] values.
      mask: over T positions.
      implementation: "xla" computes the same without cuDNN in any dtype, for tests.

    Returns:
      [B, T, H, K], dtype of q; softmax and sums are float32.

    Raises:
      UsageError: for a dtype that cuDNN has no kernel for, or without cuDNN.
    """
    if implementation == "cudnn" and q.dtype not in _HALF:
        raise UsageError(
            f"attention_impl=cudnn takes queries of 16 bits, not {q.dtype}: set "
            "dtype.compute=bfloat16, or another attention_impl."
        )
    padding = ((0, 0), (0, mask.length % 2), (0, 0), (0, 0))  # its gradient needs even lengths

    def attend(q: Array, k: Array, v: Array) -> Array:
        is_full = mask.kind == "full"
        return jax.nn.dot_product_attention(
            *(jnp.pad(x, padding) for x in (q, k, v)),
            mask=None if is_full else _allowed(mask),
            is_causal=is_full,
            scale=1.0,
            implementation=implementation,
        )

    try:
        return attend(q, k, v)[:, : mask.length]
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
        raise UsageError(
            "attention_impl=cudnn, but there is no cuDNN: pip install 'dalle_jax[cuda12]', or "
            "attention_impl=structured."
        ) from error


def _allowed(mask: masks.Mask) -> Array:
    """bool [1, 1, T, T], T even; a padded position sees itself and no other position sees it."""
    positions = jnp.arange(mask.length + mask.length % 2)
    query, key = positions[:, None], positions[None, :]
    real = jnp.maximum(query, key) < mask.length
    return (jnp.where(real, mask.allowed(query, key), query == key))[None, None]
