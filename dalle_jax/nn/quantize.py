"""Discrete bottlenecks: nearest code with a straight-through gradient, and Gumbel-softmax.

Everything here is float32 whatever the model computes in: distances, softmax and code statistics
are islands. Positions are the leading axes; M is their product, V the number of codes.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.types import Array, Key


def nearest(z: Array, codebook: Array) -> Array:
    """Index of the code nearest to each vector, by |z|^2 - 2 z.e + |e|^2 without its constant.

    Args:
      z: [..., D] encoder outputs.
      codebook: [V, D].

    Returns:
      [...] int32; on a tie the lower index.

    Source: van den Oord et al. 2017 (arXiv:1711.00937), eq. 1.
    """
    z, e = z.astype(jnp.float32), codebook.astype(jnp.float32)
    half_norm = 0.5 * jnp.sum(e * e, -1)
    # HIGHEST: a bfloat16 product (a TPU's default) swaps near neighbours.
    score = jnp.einsum("...d,vd->...v", z, e, precision=jax.lax.Precision.HIGHEST)
    return likeliest(score - half_norm.reshape((1,) * (z.ndim - 1) + (-1,)))


def likeliest(logits: Array) -> Array:
    """argmax over the last axis, int32; on a tie the lower index.

    A maximum and then a minimum of indices: XLA's argmax on a CPU is not vectorised and takes
    twice the time (5.6 against 3.0 ms for 2048 x 512 on one core).
    """
    top = jnp.max(logits, -1, keepdims=True)
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.min(jnp.where(logits >= top, index, logits.shape[-1] - 1), -1)


def straight_through(z: Array, q: Array) -> Array:
    """q in the forward pass, the identity of z in the backward pass.

    Written q + (z - sg(z)), so that the value is q bit for bit; z + sg(q - z) is not.
    """
    return jax.lax.stop_gradient(q) + (z - jax.lax.stop_gradient(z))


def gumbel_softmax(key: Key, logits: Array, temperature: Array | float) -> Array:
    """A relaxed one-hot sample: softmax((logits + Gumbel noise) / temperature).

    Args:
      key: noise key.
      logits: [..., V] unnormalised log-probabilities.
      temperature: > 0; towards 0 the sample becomes one-hot.

    Returns:
      [..., V] float32, sums to 1.

    Source: Jang et al. 2016 (arXiv:1611.01144); no straight-through, as in arXiv:2102.12092 §2.1.
    """
    logits = logits.astype(jnp.float32)
    # The barrier keeps XLA from drawing the noise anew in each of softmax's three passes (CPU).
    noise = jax.lax.optimization_barrier(jax.random.gumbel(key, logits.shape, jnp.float32))
    return jax.nn.softmax((logits + noise) / temperature, -1)


def kl_to_uniform(logits: Array) -> Array:
    """KL(q || uniform) of each position in nats: [..., V] -> [...] in [0, ln V]."""
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
    return jnp.sum(jnp.exp(log_q) * log_q, -1) + np.log(logits.shape[-1])


def entropy(p: Array) -> Array:
    """Entropy in nats of a distribution [V]."""
    return -jnp.sum(p * jnp.log(p + 1e-10))


def counts(codes: Array, num_codes: int) -> Array:
    """How often each code occurs: [...] ints -> [V] float32."""
    return jnp.zeros(num_codes, jnp.float32).at[codes.ravel()].add(1.0)


def usage(codes: Array, num_codes: int) -> dict[str, Array]:
    """Code statistics of a batch as metrics.

    Returns:
      codes_used: how many of the V codes occur; codes_fraction: the same over the most that could
      occur, min(V, M); perplexity: exp of the entropy of their histogram.
    """
    n = counts(codes, num_codes)
    used = jnp.sum(n > 0).astype(jnp.float32)
    return {
        "codes_used": used,
        "codes_fraction": used / min(num_codes, codes.size),
        "perplexity": jnp.exp(entropy(n / codes.size)),
    }


Codebook = dict[str, Array]  # plain, so that a checkpoint of it can be read without this class


def empty_codebook(num_codes: int, dim: int) -> Codebook:
    """A codebook that learns by moving averages and waits for its first batch.

    Returns:
      vectors: [V, D] float32 codes. count: [V] moving average of how many positions of a batch
      chose the code. total: [V, D] moving average of the sum of those positions' encoder outputs.
      ready: int32 scalar, 0 until the vectors were drawn from encoder outputs.
    """
    return {
        "vectors": jnp.zeros((num_codes, dim), jnp.float32),
        "count": jnp.zeros(num_codes, jnp.float32),
        "total": jnp.zeros((num_codes, dim), jnp.float32),
        "ready": jnp.zeros((), jnp.int32),
    }


def start(book: Codebook, key: Key, z: Array) -> Codebook:
    """Draws the codes from encoder outputs [M, D] unless the codebook is ready.

    Each code starts with its fair share M / V of a batch, so the averages are in their steady
    state from the first step and need no bias correction.

    Source: openai/jukebox (`BottleneckBlock.init_k`).
    """
    num_codes = book["vectors"].shape[0]
    share = z.shape[0] / num_codes
    z = jnp.asarray(z, jnp.float32)

    def fresh():
        order = jax.random.permutation(key, z.shape[0])
        picks = z[order[jnp.arange(num_codes) % z.shape[0]]]
        return {
            "vectors": picks,
            "count": jnp.full(num_codes, share, jnp.float32),
            "total": picks * share,
            "ready": jnp.ones((), jnp.int32),
        }

    return jax.lax.cond(book["ready"] > 0, lambda: book, fresh)


def ema_update(book: Codebook, z: Array, codes: Array, decay: float, eps: float = 1e-5) -> Codebook:
    """One step of the moving averages; the codes become total / count.

    Args:
      book: the codebook that chose `codes`.
      z: [M, D] encoder outputs of the *global* batch (under jit a sharded array is global).
      codes: [M] the chosen indices.
      decay: gamma, 0.99 in the paper.
      eps: Laplace smoothing of the counts.

    Source: arXiv:1711.00937 App. A.1; smoothing as in deepmind/sonnet `VectorQuantizerEMA`.
    """
    z = jnp.asarray(z, jnp.float32)
    num_codes = book["vectors"].shape[0]
    total = jnp.zeros_like(book["total"]).at[codes].add(z)
    count = decay * book["count"] + (1 - decay) * counts(codes, num_codes)
    total = decay * book["total"] + (1 - decay) * total
    mass = count.sum()
    smoothed = (count + eps) / (mass + num_codes * eps) * mass
    return {**book, "vectors": total / smoothed[:, None], "count": count, "total": total}


def revive(book: Codebook, key: Key, z: Array, share: float) -> Codebook:
    """Replaces codes that almost nothing chooses by random encoder outputs of this batch.

    A code is dead when its moving count is below `share` of the fair share M / V; the newcomer
    starts at five times that, so that it is not dead again before it had a chance.

    Source: not in the VQ-VAE paper; openai/jukebox does it with a threshold of one position.
    """
    num_codes = book["vectors"].shape[0]
    threshold = share * z.shape[0] / num_codes
    picks = jnp.asarray(z, jnp.float32)[jax.random.randint(key, (num_codes,), 0, z.shape[0])]
    dead = book["count"] < threshold
    born = 5 * threshold
    return {
        **book,
        "vectors": jnp.where(dead[:, None], picks, book["vectors"]),
        "count": jnp.where(dead, born, book["count"]),
        "total": jnp.where(dead[:, None], picks * born, book["total"]),
    }
