"""Discrete bottlenecks: nearest code with a straight-through gradient, and Gumbel-softmax.

Everything here is float32 in every model: distances, softmax and code statistics are islands.
Positions are the leading axes; M is their product, V the number of codes.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.types import Array, Key


def nearest(z: Array, codebook: Array) -> Array:
    """Index of the code nearest to each vector, by |z|^2 - 2 z.e + |e|^2 without |z|^2.

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

    Computed as a maximum and then a minimum of indices: XLA's argmax is not vectorised on a CPU and
    takes 5.6 instead of 3.0 ms (2048 x 512, one core).
    """
    top = jnp.max(logits, -1, keepdims=True)
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.min(jnp.where(logits >= top, index, logits.shape[-1] - 1), -1)


def straight_through(z: Array, q: Array) -> Array:
    """q in the forward pass, the identity of z in the backward pass.

    Written q + (z - sg(z)), which equals q bit for bit; z + sg(q - z) does not.
    """
    return jax.lax.stop_gradient(q) + (z - jax.lax.stop_gradient(z))


def gumbel_softmax(key: Key, logits: Array, temperature: Array | float) -> Array:
    """A relaxed one-hot sample: softmax((logits + Gumbel noise) / temperature).

    Args:
      key: samples the noise.
      logits: [..., V] unnormalised log-probabilities.
      temperature: > 0; towards 0 the sample becomes one-hot.

    Returns:
      [..., V] float32, sums to 1.

    Source: Jang et al. 2016 (arXiv:1611.01144); no straight-through, as in arXiv:2102.12092 §2.1.
    """
    logits = logits.astype(jnp.float32)
    # Without the barrier XLA's CPU backend samples the noise in each of softmax's three passes.
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
    """Number of occurrences of each code: [...] int -> [V] float32."""
    return jnp.zeros(num_codes, jnp.float32).at[codes.ravel()].add(1.0)


def usage(codes: Array, num_codes: int) -> dict[str, Array]:
    """Code statistics of a batch as metrics.

    Returns:
      codes_used: number of different codes; codes_fraction: codes_used / min(V, M), the largest
      possible number; perplexity: exp of the entropy of the histogram.
    """
    n = counts(codes, num_codes)
    used = jnp.sum(n > 0).astype(jnp.float32)
    return {
        "codes_used": used,
        "codes_fraction": used / min(num_codes, codes.size),
        "perplexity": jnp.exp(entropy(n / codes.size)),
    }


Codebook = dict[str, Array]  # plain, so that a checkpoint can be read without a class


def empty_codebook(num_codes: int, dim: int) -> Codebook:
    """A codebook of moving averages before its first batch.

    Returns:
      vectors: [V, D] float32 codes. count: [V] moving average of the number of positions in a batch
      that choose the code. total: [V, D] moving average of the sum of their encoder outputs.
      ready: int32 scalar, 0 until `start` has chosen vectors.
    """
    return {
        "vectors": jnp.zeros((num_codes, dim), jnp.float32),
        "count": jnp.zeros(num_codes, jnp.float32),
        "total": jnp.zeros((num_codes, dim), jnp.float32),
        "ready": jnp.zeros((), jnp.int32),
    }


def start(book: Codebook, key: Key, z: Array) -> Codebook:
    """Chooses encoder outputs [M, D] at random as codes, unless the codebook is ready.

    The count of each code starts at its fair share M / V of a batch, so the averages are in their
    steady state from the first step and need no bias correction.

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
      book: the codebook before the step.
      z: [M, D] encoder outputs of the *global* batch (under jit a sharded array is global).
      codes: [M] indices of their nearest codes in `book`.
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
    """Replaces dead codes by random encoder outputs of this batch.

    A code is dead if its moving count is below `share` of the fair share M / V. The count of a new
    code starts at five times this threshold, so that it does not die at once.

    Source: not in the VQ-VAE paper; openai/jukebox does it with a threshold of one position.
    """
    num_codes = book["vectors"].shape[0]
    threshold = share * z.shape[0] / num_codes
    picks = jnp.asarray(z, jnp.float32)[jax.random.randint(key, (num_codes,), 0, z.shape[0])]
    dead = book["count"] < threshold
    new_count = 5 * threshold
    return {
        **book,
        "vectors": jnp.where(dead[:, None], picks, book["vectors"]),
        "count": jnp.where(dead, new_count, book["count"]),
        "total": jnp.where(dead[:, None], picks * new_count, book["total"]),
    }
