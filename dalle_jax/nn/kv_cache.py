"""Keys and values while decoding: the layout of each layer's cache, and attention over it.

All candidates of a prompt share the cache of its text. `ImageCache` is the layout of the cache of a
candidate's own image tokens, and `cached` is `attention.attention` for the one query of a decoding
step.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.nn import attention, masks
from dalle_jax.types import Array


@dataclasses.dataclass(frozen=True)
class ImageCache:
    """The cache of one layer for keys or values of sampled image tokens.

    It is an array [N * R, H, slots, K] with candidates first, so that every head is one small
    matrix, the operand of a batched matrix-vector product. (On one CPU core, with 64 candidates and
    64 slots: 0.4 ms. With slots first, where a step writes one contiguous slab: 7 ms. With N and R
    as two axes XLA updates two copies of the cache.) Its size is the reach of the layer's mask:

      row, conv, full  a ring of the last `num_slots` positions, of which a step reads all: g + 1
                       slots for row (33 instead of 1024 on the paper's grid), every position for
                       full.
      column           every position, column after column; a step reads its own column.

    Attributes:
      mask: the layer's mask.
    """

    mask: masks.Mask

    @property
    def num_slots(self) -> int:
        """Number of slots."""
        g, half, num_codes = self.mask.grid, self.mask.kernel // 2, self.mask.num_codes
        reach = {"row": g + 1, "conv": half * g + half + 1}
        return min(reach.get(self.mask.kind, num_codes), num_codes)

    @property
    def num_read(self) -> int:
        """S, the number of slots that a step reads."""
        return self.mask.height if self.mask.kind == "column" else self.num_slots

    def slot(self, position: Array) -> Array:
        """The slot of a raster position; numpy in, numpy out."""
        g = self.mask.grid
        if self.mask.kind == "column":
            return position % g * self.mask.height + position // g
        return position % self.num_slots

    def fill(self, prefix: Array, num_candidates: int) -> Array:
        """The cache after a prefix that all candidates share.

        Args:
          prefix: [R, n, H, K] keys or values of raster positions 0 .. n-1.
          num_candidates: N.

        Returns:
          [N * R, H, num_slots, K]; slots of later positions are zero.
        """
        n = prefix.shape[1]
        # The last position that is written to each slot; n is a row of zeros.
        source = np.full(self.num_slots, n)
        source[self.slot(np.arange(n))] = np.arange(n)
        rows = jnp.pad(prefix, ((0, 0), (0, 1), (0, 0), (0, 0)))[:, source]
        rows = rows.transpose(0, 2, 1, 3)  # [R, H, slots, K]
        return jnp.tile(rows, (num_candidates, 1, 1, 1))

    def write(self, cache: Array, position: Array, value: Array) -> Array:
        """`cache` with `value` [N, R, H, K] at a raster position (int32 scalar)."""
        value = value.reshape(-1, *value.shape[2:])
        return jax.lax.dynamic_update_index_in_dim(cache, value, self.slot(position), axis=2)

    def read(self, cache: Array, position: Array) -> Array:
        """The slots that the query at `position` reads, [N * R, H, S, K]."""
        if self.mask.kind != "column":
            return cache
        start = position % self.mask.grid * self.mask.height
        return jax.lax.dynamic_slice_in_dim(cache, start, self.num_read, axis=2)

    def allowed(self, position: Array) -> Array:
        """bool [S]: which slots of `read` are filled and allowed by the mask."""
        slots = jnp.arange(self.num_read)
        if self.mask.kind == "column":
            return slots <= position // self.mask.grid
        # The latest position at or before this one with this slot; negative = not filled.
        key = position - (position - slots) % self.num_slots
        first = self.mask.text_len
        return (key >= 0) & self.mask.allowed(position + first, key + first)


def cached(
    q: Array, text_k: Array, text_v: Array, image_k: Array, image_v: Array, allowed: Array
) -> Array:
    """Attention of one decoding step: one softmax over shared text keys and own image keys.

    Args:
      q: [N, R, H, K] queries of the current image token, N candidates of R prompts.
      text_k: [R, H, T, K] keys of the prompt, which its candidates share.
      text_v: [R, H, T, K] values of the prompt.
      image_k: [N * R, H, S, K] keys of the candidate's image tokens, the current one included.
      image_v: [N * R, H, S, K] values of the candidate's image tokens.
      allowed: bool [S], which image keys the query sees.

    Returns:
      [N, R, H, K], dtype of v.
    """
    f32, dtype = jnp.float32, image_v.dtype
    n, r, h, k = q.shape
    q = q * k**-0.5
    text = jnp.einsum("NRHK,RHTK->RHNT", q, text_k, preferred_element_type=f32)
    text = text.transpose(2, 0, 1, 3)  # [N, R, H, T]
    own = q.reshape(n * r, h, k)
    image = jnp.einsum("BHK,BHSK->BHS", own, image_k, preferred_element_type=f32)
    image = jnp.where(allowed.reshape(1, 1, -1), image, attention.FORBIDDEN).reshape(n, r, h, -1)
    weights = jax.nn.softmax(jnp.concatenate([text, image], axis=-1), axis=-1).astype(dtype)
    text, image = jnp.split(weights, [text.shape[-1]], axis=-1)
    text = text.transpose(1, 2, 0, 3)  # [R, H, N, T]
    text = jnp.einsum("RHNT,RHTK->RHNK", text, text_v, preferred_element_type=f32)
    image = image.reshape(n * r, h, -1)
    image = jnp.einsum("BHS,BHSK->BHK", image, image_v, preferred_element_type=f32)
    return (text.transpose(2, 0, 1, 3) + image.reshape(n, r, h, k)).astype(dtype)
