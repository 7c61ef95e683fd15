"""Attention against numpy in float64, and the decoding cache against the whole-stream mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.nn import attention, masks

TEXT, HEADS, HEAD_DIM = 3, 2, 4


def reference(q, k, v, allowed):
    """Queries one by one, float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(*q.shape[:3]):
        scores = k[b, :, h] @ q[b, t, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max()) * allowed[t]
        out[b, t, h] = weights @ v[b, :, h] / weights.sum()
    return out


def random_qkv(rng, batch, length):
    shape = (3, batch, length, HEADS, HEAD_DIM)
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("kind", masks.KINDS)
def test_dense_equals_numpy(rng, kind):
    mask = masks.Mask(kind, TEXT, 4)
    q, k, v = random_qkv(rng, 2, mask.length)
    expected = reference(q, k, v, mask.table())
    np.testing.assert_allclose(attention.attention(q, k, v, mask), expected, atol=2e-6)
    given = attention.attention(q, k, v, jnp.asarray(mask.table()))
    np.testing.assert_allclose(given, expected, atol=2e-6)


def test_no_mask_sees_every_key(rng):
    q, k, v = random_qkv(rng, 2, 5)
    expected = reference(q, k, v, np.ones((5, 5), bool))
    np.testing.assert_allclose(attention.attention(q, k, v, None), expected, atol=2e-6)


def test_softmax_is_float32_under_bfloat16(rng):
    q, k, v = jnp.asarray(random_qkv(rng, 1, 6), jnp.bfloat16)
    text = jax.make_jaxpr(lambda *x: attention.attention(*x, None))(q, k, v).pretty_print()
    exps = [line for line in text.splitlines() if " exp " in line]
    assert exps and all("f32[" in line for line in exps)
    assert attention.attention(q, k, v, None).dtype == jnp.bfloat16


def test_unknown_implementation_is_refused(rng):
    q, k, v = random_qkv(rng, 1, 2)
    with pytest.raises(ValueError, match="'flash' is unknown"):
        attention.attention(q, k, v, None, impl="flash")


@pytest.mark.parametrize("grid", [4, 12])  # conv: narrower and wider than its kernel
@pytest.mark.parametrize("kind", masks.KINDS)
@pytest.mark.parametrize("prefix", [0, 2])
def test_cache_reads_exactly_the_allowed_keys(kind, grid, prefix):
    """Write each position's own number into the cache; what is read must be the mask's row."""
    mask = masks.Mask(kind, TEXT, grid)
    cache, table = attention.ImageCache(mask), mask.table()[TEXT:, TEXT:]
    n = prefix * grid
    numbers = 1.0 + np.arange(grid * grid, dtype=np.float32)
    state = cache.fill(jnp.asarray(numbers[:n]).reshape(1, n, 1, 1), 1)
    assert state.shape == (1, 1, cache.num_slots, 1)

    @jax.jit
    def step(state, position, number):
        state = cache.write(state, position, jnp.broadcast_to(number, (1, 1, 1, 1)))
        return state, cache.read(state, position), cache.allowed(position)

    for position in range(n, grid * grid):
        state, seen, allowed = step(state, position, numbers[position])
        seen = np.sort(np.asarray(seen).reshape(-1)[np.asarray(allowed)])
        np.testing.assert_array_equal(seen, numbers[table[position]])


def test_cache_keeps_no_more_than_the_mask_reaches():
    sizes = {
        kind: (c.num_slots, c.num_read)
        for kind in masks.KINDS
        for c in [attention.ImageCache(masks.Mask(kind, 256, 32))]
    }
    expected = {"row": (33, 33), "column": (1024, 32), "conv": (166, 166), "full": (1024, 1024)}
    assert sizes == expected


def test_cached_step_equals_dense(rng):
    """Two prompts, three candidates; the last position of a full stream."""
    mask = masks.Mask("full", TEXT, 3)
    n = mask.length - TEXT
    q, k, v = random_qkv(rng, 6, mask.length)
    shape = (3, 2, mask.length, HEADS, HEAD_DIM)  # candidates first
    k, v = k.reshape(shape), v.reshape(shape)
    k[:, :, :TEXT], v[:, :, :TEXT] = k[:1, :, :TEXT], v[:1, :, :TEXT]  # the shared text
    flat = [x.reshape(6, *shape[2:]) for x in (k, v)]
    expected = attention.attention(q, *flat, mask)[:, -1]
    drawn = attention.cached(
        q[:, -1].reshape(3, 2, HEADS, HEAD_DIM),
        *(x[0, :, :TEXT].transpose(0, 2, 1, 3) for x in (k, v)),
        *(x[:, TEXT:].transpose(0, 2, 1, 3) for x in flat),
        jnp.ones(n, bool),
    )
    np.testing.assert_allclose(drawn.reshape(expected.shape), expected, atol=2e-6)
