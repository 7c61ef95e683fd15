"""From logits to a token: guidance, temperature, top-k, top-p. Pure functions of [..., V] arrays.

Guidance mixes the logits of two streams, the temperature divides them, top-k keeps k tokens, top-p
keeps the smallest set of the remaining ones whose mass reaches p, and the maximum after adding
Gumbel noise is the sample. Everything is float32.
"""

import jax
import jax.numpy as jnp

from dalle_jax.types import Array, Key, UsageError

_EXCLUDED = -jnp.inf


def check(temperature: float, top_k: int, top_p: float, guidance: float, num_codes: int) -> None:
    """Refuses values out of range.

    Raises:
      UsageError: naming the option, its value and what is expected.
    """
    if not temperature >= 0:
        raise UsageError(f"temperature={temperature}; expected 0 (always the likeliest) or more.")
    if not 0 <= top_k <= num_codes:
        raise UsageError(f"top_k={top_k}; expected 0 (off) to {num_codes}, the number of codes.")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p={top_p}; expected a probability mass in (0, 1]; 1 is off.")
    if not guidance >= 0:
        raise UsageError(f"guidance={guidance}; expected 1 (off) or more, or 0 to ignore the text.")


def guide(conditional: Array, unconditional: Array, scale: Array | float) -> Array:
    """u + scale * (c - u): scale 1 is the conditional stream, 0 the unconditional one.

    Source: Ho & Salimans 2022 (arXiv:2207.12598), applied to logits as dalle-mini's
    super-conditioning does.
    """
    return unconditional + scale * (conditional - unconditional)


def top_k(logits: Array, k: Array | int) -> Array:
    """Excludes all but the k largest logits; ties with the k-th remain.

    Args:
      logits: [..., V].
      k: int in [1, V]; may be traced.
    """
    ordered = jnp.sort(logits, axis=-1)
    threshold = jnp.take(ordered, logits.shape[-1] - k, axis=-1)
    return jnp.where(logits >= threshold[..., None], logits, _EXCLUDED)


def top_p(logits: Array, p: Array | float) -> Array:
    """Excludes all but the smallest set of likeliest tokens whose probability reaches p.

    The likeliest token always remains, and so do ties with the last token of the set.

    Args:
      logits: [..., V], already divided by the temperature.
      p: in (0, 1]; may be traced.
    """
    ordered = -jnp.sort(-logits, axis=-1)  # likeliest first
    weights = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(weights, axis=-1) - weights  # mass of all likelier tokens
    last = jnp.sum(before < p, axis=-1, keepdims=True) - 1
    # before[0] is 0 up to rounding; without the maximum a tiny p could exclude everything.
    threshold = jnp.take_along_axis(ordered, jnp.maximum(last, 0), axis=-1)
    return jnp.where(logits >= threshold, logits, _EXCLUDED)


def gumbel(key: Key, size: int) -> Array:
    """[size] standard Gumbel noise, float32."""
    return jax.random.gumbel(key, (size,), jnp.float32)


def sample(
    logits: Array,
    noise: Array,
    temperature: Array | float = 1.0,
    k: Array | int | None = None,
    p: Array | float | None = None,
) -> Array:
    """One token per row of logits.

    Args:
      logits: [..., V] float32.
      noise: [..., V] standard Gumbel noise. An argument, so that the noise of a candidate does not
        depend on the rest of the batch.
      temperature: 0 = the likeliest token, whatever the noise.
      k: top-k, None = off.
      p: top-p, None = off.

    Returns:
      [...] int32.
    """
    logits = logits.astype(jnp.float32)
    if k is not None:
        logits = top_k(logits, k)
    if p is not None:
        # 1e-6 replaces temperature 0, which the last line handles without a division.
        likeliest = top_p(logits / jnp.maximum(temperature, 1e-6), p)
        logits = jnp.where(likeliest == _EXCLUDED, _EXCLUDED, logits)
    # argmax(logits / t + noise) = argmax(logits + t noise), which is also right at t = 0.
    return jnp.argmax(logits + temperature * noise, axis=-1).astype(jnp.int32)
