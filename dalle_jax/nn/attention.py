"""Attention behind one function, so that a fused or structured implementation can slot in.

`attention(q, k, v, mask, impl)` is what every layer of every tower calls while training;
`cached` is its counterpart for one decoding step, over text that many candidates share and the
image tokens that each has drawn, which an `ImageCache` keeps.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.nn import masks
from dalle_jax.types import Array

IMPLEMENTATIONS = ("dense",)

# Finite: a row of -inf (which no mask here has, but a caller might build) would be NaN.
_FORBIDDEN = -1e30


def attention(
    q: Array, k: Array, v: Array, mask: masks.Mask | Array | None, *, impl: str = "dense"
) -> Array:
    """Scaled dot-product attention with one softmax over all allowed keys.

    Args:
      q: [B, T, H, K] queries.
      k: [B, S, H, K] keys.
      v: [B, S, H, K] values.
      mask: a static `masks.Mask` over T = S positions; or a bool array [T, S], or one that
        broadcasts to [B, H, T, S]; None = every key.
      impl: "dense": all T x S scores, masked.

    Returns:
      [B, T, H, K], dtype of v. Scores and softmax are float32 whatever the inputs are.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"attention impl {impl!r} is unknown; use one of {IMPLEMENTATIONS}.")
    allowed = mask.graph() if isinstance(mask, masks.Mask) else mask
    q = q * q.shape[-1] ** -0.5
    scores = jnp.einsum("BTHK,BSHK->BHTS", q, k, preferred_element_type=jnp.float32)
    if allowed is not None:
        allowed = allowed.reshape((1,) * (4 - allowed.ndim) + allowed.shape)
        scores = jnp.where(allowed, scores, _FORBIDDEN)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BHTS,BSHK->BTHK", weights, v)


@dataclasses.dataclass(frozen=True)
class ImageCache:
    """Where one layer keeps the keys and values of drawn image tokens while decoding.

    Slots are the leading axis, so that a step writes one contiguous slab and reads another. A
    layer keeps what its mask can still reach, and no more:

      row, conv, full  a ring of the last `num_slots` positions, read whole: g + 1 slots for row
                       (33 instead of 1024 on the paper's grid), every position for full.
      column           g * g slots, column after column; a step reads its own column, g slots.

    Attributes:
      mask: the layer's mask.
    """

    mask: masks.Mask

    @property
    def num_slots(self) -> int:
        """Slots that are stored."""
        g, half = self.mask.grid, self.mask.kernel // 2
        reach = {"row": g + 1, "conv": half * g + half + 1}
        return min(reach.get(self.mask.kind, g * g), g * g)

    @property
    def num_read(self) -> int:
        """S, slots that a step reads."""
        return self.mask.grid if self.mask.kind == "column" else self.num_slots

    def slot(self, position: Array) -> Array:
        """Slot of a raster position; numpy in, numpy out."""
        g = self.mask.grid
        if self.mask.kind == "column":
            return position % g * g + position // g
        return position % self.num_slots

    def fill(self, prefix: Array, num_candidates: int) -> Array:
        """The cache after a prefix that all candidates share.

        Args:
          prefix: [R, n, H, K] keys or values of raster positions 0 .. n-1.
          num_candidates: N.

        Returns:
          [num_slots, R, N, H, K]; slots not yet reached are zero.
        """
        r, n, *heads = prefix.shape
        cache = jnp.zeros((self.num_slots, r, num_candidates, *heads), prefix.dtype)
        positions = np.arange(n)
        if self.mask.kind != "column":
            positions = positions[-self.num_slots :]
        if not len(positions):
            return cache
        rows = jnp.moveaxis(prefix[:, positions], 1, 0)[:, :, None]  # [n, R, 1, H, K]
        rows = jnp.broadcast_to(rows, (len(positions), *cache.shape[1:]))
        return cache.at[self.slot(positions)].set(rows)

    def write(self, cache: Array, position: Array, value: Array) -> Array:
        """`cache` with `value` [R, N, H, K] at a raster position (int32 scalar)."""
        return jax.lax.dynamic_update_index_in_dim(cache, value, self.slot(position), axis=0)

    def read(self, cache: Array, position: Array) -> Array:
        """What the query at `position` may look at, [S, R, N, H, K]."""
        if self.mask.kind != "column":
            return cache
        start = position % self.mask.grid * self.mask.grid
        return jax.lax.dynamic_slice_in_dim(cache, start, self.num_read, axis=0)

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
      q: [R, N, H, K], the current image token of N candidates of each of R prompts.
      text_k: [R, T, H, K], keys of the prompt, shared by its candidates.
      text_v: [R, T, H, K].
      image_k: [S, R, N, H, K], keys of each candidate's own image tokens, the current included.
      image_v: [S, R, N, H, K].
      allowed: bool [S].

    Returns:
      [R, N, H, K], dtype of v.
    """
    f32 = jnp.float32
    q = q * q.shape[-1] ** -0.5
    text = jnp.einsum("RNHK,RTHK->RHNT", q, text_k, preferred_element_type=f32)
    # Not an einsum: on CPU that would transpose the cache, a copy as large as the read itself.
    image = jnp.sum(q[None].astype(f32) * image_k, axis=-1)  # [S, R, N, H]
    image = jnp.where(allowed.reshape(-1, 1, 1, 1), image, _FORBIDDEN)
    top = jnp.maximum(text.max(axis=-1).transpose(0, 2, 1), image.max(axis=0))  # [R, N, H]
    text = jnp.exp(text - top.transpose(0, 2, 1)[..., None])
    image = jnp.exp(image - top[None])
    total = text.sum(axis=-1).transpose(0, 2, 1) + image.sum(axis=0)
    dtype = image_v.dtype
    y = jnp.einsum("RHNT,RTHK->RNHK", text.astype(dtype), text_v, preferred_element_type=f32)
    y = y + jnp.sum(image[..., None] * image_v, axis=0)
    return (y / total[..., None]).astype(dtype)
