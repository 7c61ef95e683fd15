"""Captions of a batch compared with one another."""

import jax.numpy as jnp
import numpy as np

from dalle_jax.types import Array


def duplicates(tokens: Array) -> Array:
    """bool [B, B]: whether caption s is another example's copy of caption b.

    Two 32-bit hashes are compared instead of T ids: at the paper's batch the ids would be
    32,768**2 x 77 comparisons. Equal captions always match; unequal ones with chance 2**-64.
    """
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 2**32, size=(2, tokens.shape[1]), dtype=np.uint32) | np.uint32(1)
    # Ids are squared into the sum too: a sum linear in the ids has colliding shifts.
    ids = tokens.astype(jnp.uint32) * jnp.uint32(2654435761)  # Knuth's multiplicative hash
    ids = ids ^ (ids >> 15)
    digests = [jnp.sum(ids * w[None], axis=1, dtype=jnp.uint32) for w in jnp.asarray(weights)]
    same = [d[:, None] == d[None, :] for d in digests]
    return same[0] & same[1] & ~jnp.eye(len(tokens), dtype=bool)
