"""Random masks for inpainting: the pixels of a training picture that the network sees.

True means known, as everywhere in this package and in GLIDE. Each mask is a function of its own
key.

Source: GLIDE (arXiv:2112.10741) §4.3 erases "random regions" and gives no details. Ours: half of
the masks erase a rectangle, four in ten a stroke of a thick pen, one in ten everything, so that the
network can still sample full pictures.
"""

import jax
import jax.numpy as jnp

from dalle_jax.types import Array, Key

# Shares of the kinds of masks.
SHARES = {"rectangle": 0.5, "stroke": 0.4, "everything": 0.1}
RECTANGLE_SIDE = (0.25, 0.8)  # of the picture's side, height and width
STROKE_POINTS = 5
STROKE_WIDTH = (0.12, 0.35)


def random_masks(keys: Key, px: int) -> Array:
    """Masks of all kinds.

    Args:
      keys: [B].
      px: side of the pictures.

    Returns:
      [B, px, px, 1] bool, True for known pixels. Every mask erases at least one pixel.
    """

    def one(key: Key) -> Array:
        kind, key = jax.random.split(key)
        chance = jax.random.uniform(kind)
        rectangle, stroke = rectangle_mask(key, px), stroke_mask(key, px)
        known = jnp.where(chance < SHARES["rectangle"], rectangle, stroke)
        return known & (chance < 1 - SHARES["everything"])

    return jax.vmap(one)(keys)[..., None]


def rectangle_mask(key: Key, px: int) -> Array:
    """[px, px] bool: False in a rectangle inside the picture."""
    sides, corner = jax.random.split(key)
    low, high = RECTANGLE_SIDE
    sides = jnp.ceil(jax.random.uniform(sides, (2,), minval=low, maxval=high) * px)
    corner = jnp.floor(jax.random.uniform(corner, (2,)) * (px + 1 - sides))
    place = jnp.arange(px)
    inside = [(place >= c) & (place < c + s) for c, s in zip(corner, sides, strict=True)]
    return ~(inside[0][:, None] & inside[1][None, :])


def stroke_mask(key: Key, px: int) -> Array:
    """[px, px] bool: False under a pen's stroke through random points."""
    points, width = jax.random.split(key)
    points = jax.random.uniform(points, (STROKE_POINTS, 2))
    low, high = STROKE_WIDTH
    radius = jax.random.uniform(width, minval=low, maxval=high) / 2
    radius = jnp.maximum(radius, 0.75 / px)  # a pen is at least as wide as a pixel's diagonal
    place = (jnp.arange(px) + 0.5) / px
    place = jnp.stack(jnp.meshgrid(place, place, indexing="ij"), axis=-1)[:, :, None]  # h w 1 2
    start, line = points[:-1][None, None], jnp.diff(points, axis=0)[None, None]
    along = jnp.sum((place - start) * line, -1) / jnp.maximum(jnp.sum(line * line, -1), 1e-8)
    nearest = start + jnp.clip(along, 0, 1)[..., None] * line
    distance = jnp.sqrt(jnp.sum(jnp.square(place - nearest), -1)).min(-1)
    return distance > radius
