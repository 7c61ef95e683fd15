"""The decoding cache against the full-stream mask and attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.nn import attention, kv_cache, masks

TEXT, HEADS, HEAD_DIM = 3, 2, 4


# Codes across and down; conv: narrower and wider than its kernel.
@pytest.mark.parametrize("grid", [(4, 4), (12, 12), (4, 6), (6, 4)])
@pytest.mark.parametrize("kind", masks.KINDS)
@pytest.mark.parametrize("prefix", [0, 2])
def test_cache_reads_exactly_the_allowed_keys(kind, grid, prefix):
    """Write each position's own number into the cache; what is read must be the mask's row."""
    mask = masks.Mask(kind, TEXT, grid[0], rows=grid[1])
    cache, table = kv_cache.ImageCache(mask), mask.table()[TEXT:, TEXT:]
    n = prefix * grid[0]
    numbers = 1.0 + np.arange(mask.num_codes, dtype=np.float32)
    state = cache.fill(jnp.asarray(numbers[:n]).reshape(1, n, 1, 1), 1)
    assert state.shape == (1, 1, cache.num_slots, 1)

    @jax.jit
    def step(state, position, number):
        state = cache.write(state, position, jnp.broadcast_to(number, (1, 1, 1, 1)))
        return state, cache.read(state, position), cache.allowed(position)

    for position in range(n, mask.num_codes):
        state, seen, allowed = step(state, position, numbers[position])
        seen = np.sort(np.asarray(seen).reshape(-1)[np.asarray(allowed)])
        np.testing.assert_array_equal(seen, numbers[table[position]])


def test_cache_keeps_no_more_than_the_mask_reaches():
    sizes = {
        kind: (c.num_slots, c.num_read)
        for kind in masks.KINDS
        for c in [kv_cache.ImageCache(masks.Mask(kind, 256, 32))]
    }
    expected = {"row": (33, 33), "column": (1024, 32), "conv": (166, 166), "full": (1024, 1024)}
    assert sizes == expected


def test_cached_step_equals_dense(rng):
    """Two prompts, three candidates; the last position of a full stream."""
    mask = masks.Mask("full", TEXT, 3)
    n = mask.length - TEXT
    q, k, v = rng.standard_normal((3, 6, mask.length, HEADS, HEAD_DIM)).astype(np.float32)
    shape = (3, 2, mask.length, HEADS, HEAD_DIM)  # candidates first
    k, v = k.reshape(shape), v.reshape(shape)
    k[:, :, :TEXT], v[:, :, :TEXT] = k[:1, :, :TEXT], v[:1, :, :TEXT]  # the shared text
    flat = [x.reshape(6, *shape[2:]) for x in (k, v)]
    expected = attention.attention(q, *flat, mask)[:, -1]
    got = kv_cache.cached(
        q[:, -1].reshape(3, 2, HEADS, HEAD_DIM),
        *(x[0, :, :TEXT].transpose(0, 2, 1, 3) for x in (k, v)),
        *(x[:, TEXT:].transpose(0, 2, 1, 3) for x in flat),
        jnp.ones(n, bool),
    )
    np.testing.assert_allclose(got.reshape(expected.shape), expected, atol=2e-6)
