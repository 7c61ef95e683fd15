"""A TPU kernel for sparse attention that computes only the blocks of scores that a mask needs.

Splash attention (`jax.experimental.pallas.ops.tpu.splash_attention`) for the masks of `nn.masks`: a
flash attention whose grid has only the blocks of scores that are not fully masked. No score reaches
memory. No compiler estimates the time of the kernel; `planning.kernel_estimates` does.

Column layers run on the transposed picture, as in the paper: for 32x32 codes after 256 text slots
the kernel computes 9 of 25 blocks of 256, instead of the 15 of a causal mask. Streams are padded to
full blocks; a padded query sees itself, because a row without keys would be NaN.
"""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as kernel_masks

from dalle_jax import layout
from dalle_jax.nn import masks
from dalle_jax.types import Array

# Smaller blocks skip more scores, but for a row layer of 1,280 positions blocks of 128 are 40 steps
# of the kernel's grid per head, those of 256 are 15.
_LONG_BLOCK, _LONG_STREAM = 256, 1024


def block_size(mask: masks.Mask) -> int:
    """Side of the square blocks of scores, in tokens."""
    return _LONG_BLOCK if mask.length >= _LONG_STREAM else layout.LANES


def attention(q: Array, k: Array, v: Array, mask: masks.Mask, *, interpret: bool = False) -> Array:
    """Attention of one device's examples and heads; gradients too.

    Args:
      q: [B, T, H, K] queries, scaled.
      k: [B, T, H, K] keys.
      v: [B, T, H, K] values.
      mask: over T positions.
      interpret: run step by step without a TPU, for tests.

    Returns:
      [B, T, H, K], dtype of q; softmax and sums are float32.
    """
    kernel = _kernel(mask, q.shape[2], interpret)
    padding = (0, -mask.length % block_size(mask))

    def into(x: Array) -> Array:  # [B, T, H, K] -> [B, H, padded T, K]
        x = jnp.pad(_by_kind(x, mask), ((0, 0), padding, (0, 0), (0, 0)))
        return x.transpose(0, 2, 1, 3)

    out = jax.vmap(kernel)(into(q), into(k), into(v))
    return _by_kind(out.transpose(0, 2, 1, 3)[:, : mask.length], mask, back=True)


def _by_kind(x: Array, mask: masks.Mask, back: bool = False) -> Array:
    """[B, T, H, K] with the picture in column-major order for a column layer, or the inverse."""
    if mask.kind != "column" or not mask.grid:
        return x
    sides = (mask.grid, mask.height) if back else (mask.height, mask.grid)
    text, picture = jnp.split(x, [mask.text_len], axis=1)
    transposed = picture.reshape(len(x), *sides, *x.shape[2:]).swapaxes(1, 2)
    return jnp.concatenate([text, transposed.reshape(picture.shape)], axis=1)


# Cached by kind of layer: at 12B it takes two seconds to sort the blocks of a mask.
@functools.lru_cache
def _kernel(mask: masks.Mask, num_heads: int, interpret: bool) -> kernels.SplashAttentionKernel:
    block, length = block_size(mask), mask.length
    order = np.arange(length)
    if mask.kind == "column":
        order[mask.text_len :] = order[mask.text_len :].reshape(mask.height, -1).T.ravel()
    padded = -(-length // block) * block
    table = np.eye(padded, dtype=bool)
    table[:length, :length] = mask.table()[np.ix_(order, order)]
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    build = functools.partial(
        kernels.make_splash_mha,
        kernel_masks.MultiHeadMask([kernel_masks.NumpyMask(table)] * num_heads),
        block_sizes=kernels.BlockSizes(**{f"block_{name}": block for name in names}),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    # The call turns the tables into arrays. A new thread is outside of any trace and any mesh; the
    # devices of a plan's mesh cannot hold arrays.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        kernel = thread.submit(build).result()
    return jax.tree.map(np.asarray, kernel)
