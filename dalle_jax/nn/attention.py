"""Attention behind one function, so that a fused or structured implementation can slot in.

`attention(q, k, v, mask, impl)` is what every layer of every tower calls while training;
`cached` is its counterpart for one decoding step over a prefix that many candidates share.
"""

import jax
import jax.numpy as jnp

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
