"""Classifier-free guidance: a `predict` that evaluates the network on a doubled batch and mixes.

The rows of the doubled batch are pairs: row 2 b is example b with its condition, row 2 b + 1 the
same example without. Pairs are neighbours, so that each stays on one device of a sharded batch and
neither doubling nor mixing moves data between devices.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from dalle_jax.types import Array

T = TypeVar("T")  # a pytree of arrays


def pair(conditional: T, unconditional: T) -> T:
    """The conditions of the doubled batch: rows of the two alternate.

    Args:
      conditional: pytree of [B, ...].
      unconditional: the same tree of [B, ...], or of [1, ...] where all examples share the empty
        condition.

    Returns:
      the tree of [2 B, ...], the conditional row first in each pair.
    """

    def leaf(c: Array, u: Array) -> Array:
        rows = jnp.stack([c, jnp.broadcast_to(u, c.shape)], axis=1)  # [B, 2, ...]
        return rows.reshape(2 * c.shape[0], *c.shape[1:])

    return jax.tree.map(leaf, conditional, unconditional)


def mix(output: Array, scale: Array | float, num_channels: int) -> Array:
    """u + scale * (c - u) of the outputs of a doubled batch.

    Channels beyond num_channels hold the variance and are copied from the conditional output:
    mixed, they could leave the range in which they interpolate. eps, x_0 and v can all be mixed;
    with the same x_t each is an affine function of the others, so the mixture is the same.

    Args:
      output: [2 B, ..., C or 2 C], rows in the order of `pair`.
      scale: 1 is the conditional output bit for bit, 0 the unconditional one; a number, or [B] for
        a scale per example.
      num_channels: C.

    Returns:
      [B, ..., C or 2 C] float32.

    Source: Ho & Salimans 2022 (arXiv:2207.12598) in the notation of GLIDE (arXiv:2112.10741) §2.3;
    the variance as in openai/glide-text2im.
    """
    output = output.astype(jnp.float32)
    output = output.reshape(output.shape[0] // 2, 2, *output.shape[1:])
    c, u = output[:, 0], output[:, 1]
    scale = jnp.asarray(scale, jnp.float32)
    scale = scale.reshape(scale.shape + (1,) * (c.ndim - 1)) if scale.ndim else scale
    # Equal to u + scale * (c - u), without its rounding error at 1.
    mean = c[..., :num_channels] + (scale - 1) * (c - u)[..., :num_channels]
    return jnp.concatenate([mean, c[..., num_channels:]], axis=-1)


def guided(
    predict_pairs: Callable[[Array, Array], Array], scale: Array | float
) -> Callable[[Array, Array], Array]:
    """`predict` of the samplers for a network under guidance.

    Args:
      predict_pairs: (x [2 B, ..., C], t [2 B]) -> [2 B, ..., C or 2 C]; holds conditions from
        `pair`. Called once per step.
      scale: see `mix`; may be traced.

    Returns:
      (x [B, ..., C], t [B]) -> [B, ..., C or 2 C].
    """

    def predict(x: Array, t: Array) -> Array:
        return mix(predict_pairs(*pair((x, t), (x, t))), scale, x.shape[-1])

    return predict
