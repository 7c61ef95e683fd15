"""Arithmetic on what a picture is made of in unCLIP: its CLIP embedding and its noise x_T.

Pure functions of arrays; nothing here knows a network. PCA truncation is `pca.truncate`.

Source: Ramesh et al. 2022 (arXiv:2204.06125) §3.
"""

import jax.numpy as jnp

from dalle_jax.models import clip
from dalle_jax.types import Array

_PARALLEL = 1e-6  # sine of the angle below which two vectors are one direction


def slerp(a: Array, b: Array, theta: Array | float) -> Array:
    """The way from a to b on a great circle, at theta of its length.

    Vectors of other lengths than 1 are mixed with the same weights, so that noise of unit variance
    keeps it. (Almost) parallel and opposite vectors, between which there is no one great circle,
    are mixed linearly.

    Args:
      a: [..., E] float32.
      b: [..., E].
      theta: in [0, 1]; a number, or an array that broadcasts against [..., 1].

    Returns:
      [..., E] float32: a and b bit for bit at theta 0 and 1.
    """
    a, b, theta = (jnp.asarray(x, jnp.float32) for x in (a, b, theta))
    a, b = jnp.broadcast_arrays(a, b)
    if theta.ndim and theta.ndim < a.ndim:
        raise ValueError(f"theta has shape {theta.shape}; expected a number or {a.ndim} axes.")
    # Not arccos of the dot product, which in float32 sees no angle below 3e-4.
    ends = clip.unit(a), clip.unit(b)
    apart, along = (
        jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (ends[0] - ends[1], sum(ends))
    )
    angle = 2 * jnp.arctan2(apart, along)
    sine = jnp.sin(angle)
    is_line = sine < _PARALLEL
    safe = jnp.where(is_line, 1, sine)
    left = jnp.where(is_line, 1 - theta, jnp.sin((1 - theta) * angle) / safe)
    right = jnp.where(is_line, theta, jnp.sin(theta * angle) / safe)
    mixed = left * a + right * b
    return jnp.where(theta == 0, a, jnp.where(theta == 1, b, mixed))


def slerp_noise(a: Array, b: Array, theta: Array) -> Array:
    """`slerp` of whole pictures of noise, each one vector.

    Args:
      a: [h, w, C].
      b: [h, w, C].
      theta: [S] in [0, 1].

    Returns:
      [S, h, w, C] float32.
    """
    flat = slerp(a.reshape(1, -1), b.reshape(1, -1), jnp.asarray(theta)[:, None])
    return flat.reshape(-1, *a.shape)


def text_difference(z_t: Array, z_t0: Array | None = None) -> Array:
    """The direction from one caption to another: unit(z_t - z_t0).

    Args:
      z_t: [E] or [B, E] CLIP text embeddings of what the picture is to become.
      z_t0: of what it is; None = nothing is said of it, and the direction is z_t itself.

    Source: §3.3, which takes a description of the picture, "a photo", or nothing for z_t0. Of two
    equal captions the result is all zeros: they name no direction.
    """
    return clip.unit(z_t if z_t0 is None else jnp.asarray(z_t) - jnp.asarray(z_t0))
