"""Keys and values while decoding: what each layer keeps of the image drawn so far, and their use.

The text of a prompt is kept once for all its candidates; `ImageCache` lays out what each has drawn,
and `cached` is `attention.attention` for the one query of a decoding step.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.nn import attention, masks
from dalle_jax.types import Array


@dataclasses.dataclass(frozen=True)
class ImageCache:
    """Where one layer keeps the keys and values of drawn image tokens while decoding.

    An array [N * R, H, slots, K], candidates first: every head is one small matrix, exactly the
    operand of a batched matrix-vector product. (One CPU core, 64 candidates, 64 slots: 0.4 ms;
    with the slots leading, where a step writes one contiguous slab, 7 ms. With N and R as two
    axes XLA updates two copies of the cache.) A layer keeps what its mask can still reach:

      row, conv, full  a ring of the last `num_slots` positions, read whole: g + 1 slots for row
                       (33 instead of 1024 on the paper's grid), every position for full.
      column           every position, column after column; a step reads its own column.

    Attributes:
      mask: the layer's mask.
    """

    mask: masks.Mask

    @property
    def num_slots(self) -> int:
        """Slots that are stored."""
        g, half, whole = self.mask.grid, self.mask.kernel // 2, self.mask.num_codes
        reach = {"row": g + 1, "conv": half * g + half + 1}
        return min(reach.get(self.mask.kind, whole), whole)

    @property
    def num_read(self) -> int:
        """S, slots that a step reads."""
        return self.mask.height if self.mask.kind == "column" else self.num_slots

    def slot(self, position: Array) -> Array:
        """Slot of a raster position; numpy in, numpy out."""
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
          [N * R, H, num_slots, K]; slots not yet reached are zero.
        """
        n = prefix.shape[1]
        # Position that ends up in each slot: later ones overwrite earlier ones. n = a row of zeros.
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
        """What the query at `position` may look at, [N * R, H, S, K]."""
        if self.mask.kind != "column":
            return cache
        start = position % self.mask.grid * self.mask.height
        return jax.lax.dynamic_slice_in_dim(cache, start, self.num_read, axis=2)

    def allowed(self, position: Array) -> Array:
        """bool [S]: which of the slots read are filled and allowed."""
        slots = jnp.arange(self.num_read)
        if self.mask.kind == "column":
            return slots <= position // self.mask.grid
        # The latest position at or before this one that lives in the slot; negative = unfilled.
        key = position - (position - slots) % self.num_slots
        first = self.mask.text_len
        return (key >= 0) & self.mask.allowed(position + first, key + first)


def cached(
    q: Array, text_k: Array, text_v: Array, image_k: Array, image_v: Array, allowed: Array
) -> Array:
    """Attention of one decoding step: one softmax over shared text keys and own image keys.

    Args:
      q: [N, R, H, K], the current image token of N candidates of each of R prompts.
      text_k: [R, H, T, K], keys of the prompt, shared by its candidates.
      text_v: [R, H, T, K].
      image_k: [N * R, H, S, K], keys of each one's own image tokens, the current included.
      image_v: [N * R, H, S, K].
      allowed: bool [S].

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
