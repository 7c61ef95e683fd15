"""Bottlenecks: identities first, then independent numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.nn import quantize


def test_nearest_is_the_smallest_distance(rng):
    z = rng.normal(size=(3, 4, 4, 8)).astype(np.float32)
    book = rng.normal(size=(32, 8)).astype(np.float32)
    distance = np.square(z[..., None, :] - book).sum(-1)
    codes = quantize.nearest(z, book)
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, distance.argmin(-1))
    # bfloat16 inputs are compared in float32
    low = jnp.asarray(z, jnp.bfloat16)
    distance = np.square(np.asarray(low, np.float32)[..., None, :] - book).sum(-1)
    np.testing.assert_array_equal(quantize.nearest(low, book), distance.argmin(-1))


def test_likeliest_is_argmax_with_the_lower_index_on_ties(rng):
    logits = rng.integers(0, 4, (5, 6, 7)).astype(np.float32)
    np.testing.assert_array_equal(quantize.likeliest(logits), logits.argmax(-1))


def test_straight_through_has_the_value_of_q_and_the_gradient_of_z(rng):
    z = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    q = jnp.asarray(rng.normal(size=(4, 8)) * 1e3, jnp.float32)
    w = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    np.testing.assert_array_equal(quantize.straight_through(z, q), q)
    grad_z, grad_q = jax.grad(lambda z, q: (quantize.straight_through(z, q) * w).sum(), (0, 1))(
        z, q
    )
    np.testing.assert_array_equal(grad_z, w)  # exactly the identity
    np.testing.assert_array_equal(grad_q, 0)


def test_gumbel_softmax_sums_to_one_and_picks_codes_with_their_probability(key, rng):
    logits = jnp.asarray(rng.normal(size=8) * 1.5, jnp.float32)
    many = jnp.broadcast_to(logits, (40_000, 8))
    for temperature in (1.0, 1 / 16):
        z = quantize.gumbel_softmax(key, many, temperature)
        np.testing.assert_allclose(z.sum(-1), 1.0, atol=1e-5)
        # Whatever the temperature, the largest entry is a sample of softmax(logits) (Gumbel-max).
        share = np.bincount(np.asarray(z.argmax(-1)), minlength=8) / len(z)
        np.testing.assert_allclose(share, jax.nn.softmax(logits), atol=0.012)  # > 4 sigma
    # Cold: the sample itself is nearly one-hot, so its mean is the distribution.
    cold = quantize.gumbel_softmax(key, many, 0.01)
    np.testing.assert_allclose(cold.mean(0), jax.nn.softmax(logits), atol=0.012)
    assert cold.max(-1).mean() > 0.98


def test_gumbel_softmax_of_bfloat16_logits_is_float32(key):
    assert quantize.gumbel_softmax(key, jnp.zeros((2, 4), jnp.bfloat16), 1.0).dtype == jnp.float32


def test_kl_to_uniform(rng):
    logits = rng.normal(size=(5, 16)).astype(np.float32) * 3
    q = np.exp(logits.astype(np.float64))
    q /= q.sum(-1, keepdims=True)
    expected = (q * (np.log(q) - np.log(1 / 16))).sum(-1)
    np.testing.assert_allclose(quantize.kl_to_uniform(logits), expected, rtol=1e-5)
    np.testing.assert_allclose(quantize.kl_to_uniform(jnp.zeros((1, 16))), 0, atol=1e-6)
    one_hot = jnp.eye(16) * 1e4  # ln V, and no NaN from 0 ln 0
    np.testing.assert_allclose(quantize.kl_to_uniform(one_hot), np.log(16), rtol=1e-6)


def test_usage(rng):
    codes = rng.integers(0, 5, (4, 3, 3))
    metrics = quantize.usage(jnp.asarray(codes), 10)
    p = np.bincount(codes.ravel(), minlength=10) / codes.size
    p = p[p > 0]
    assert metrics["codes_used"] == len(p)
    np.testing.assert_allclose(metrics["codes_fraction"], len(p) / 10, rtol=1e-6)
    np.testing.assert_allclose(metrics["perplexity"], np.exp(-(p * np.log(p)).sum()), rtol=1e-5)


def _numpy_ema(count, total, z, codes, decay, eps):
    """Another derivation: one-hot matrices in float64."""
    hot = np.eye(len(count))[codes]
    count = decay * count + (1 - decay) * hot.sum(0)
    total = decay * total + (1 - decay) * hot.T @ z
    smooth = (count + eps) / (count.sum() + len(count) * eps) * count.sum()
    return count, total, total / smooth[:, None]


def test_codebook_averages_match_numpy_over_steps(key, rng):
    z = rng.normal(size=(64, 4)).astype(np.float32)
    book = quantize.start(quantize.empty_codebook(8, 4), key, z)
    assert book["ready"] == 1
    # Fresh codes are 8 different encoder outputs, each with a fair share of the batch.
    assert {tuple(v) for v in np.asarray(book["vectors"])} <= {tuple(v) for v in z}
    assert len({tuple(v) for v in np.asarray(book["vectors"])}) == 8
    np.testing.assert_allclose(book["count"], 8.0)
    count, total = np.full(8, 8.0), np.asarray(book["vectors"], np.float64) * 8
    for _ in range(3):
        z = rng.normal(size=(64, 4)).astype(np.float32)
        codes = np.asarray(quantize.nearest(z, book["vectors"]))
        book = quantize.ema_update(book, z, codes, 0.9)
        count, total, vectors = _numpy_ema(count, total, z, codes, 0.9, 1e-5)
        np.testing.assert_allclose(book["count"], count, rtol=1e-5)
        np.testing.assert_allclose(book["total"], total, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(book["vectors"], vectors, rtol=1e-4, atol=1e-4)


def test_a_ready_codebook_is_not_drawn_again(key, rng):
    z = rng.normal(size=(16, 4)).astype(np.float32)
    book = quantize.start(quantize.empty_codebook(4, 4), key, z)
    again = quantize.start(book, jax.random.key(1), z + 5)
    jax.tree.map(np.testing.assert_array_equal, book, again)


@pytest.mark.parametrize("positions", [3, 8, 20])
def test_a_codebook_starts_from_any_number_of_positions(key, rng, positions):
    z = rng.normal(size=(positions, 4)).astype(np.float32)
    book = quantize.start(quantize.empty_codebook(8, 4), key, z)
    assert {tuple(v) for v in np.asarray(book["vectors"])} <= {tuple(v) for v in z}
    assert np.isfinite(book["vectors"]).all()


def test_revival_replaces_dead_codes_only(key, rng):
    z = rng.normal(size=(40, 4)).astype(np.float32)
    book = quantize.start(quantize.empty_codebook(4, 4), key, z)
    book["count"] = jnp.asarray([10.0, 0.0, 10.0, 0.1])
    new = quantize.revive(book, jax.random.key(3), z, share=0.05)  # threshold 0.05 * 40 / 4 = 0.5
    np.testing.assert_array_equal(new["vectors"][::2], book["vectors"][::2])
    np.testing.assert_array_equal(new["count"][::2], book["count"][::2])
    for i in (1, 3):
        assert (z == np.asarray(new["vectors"][i])).all(-1).any()
        np.testing.assert_allclose(new["total"][i] / new["count"][i], new["vectors"][i], rtol=1e-5)
    assert (new["count"] >= 0.5).all()  # no code is dead again at once


def test_an_unused_code_stays_where_it_is(key):
    """total / count decay together: smoothing must not pull a rare code to the origin at once."""
    z = jnp.ones((32, 2))
    book = quantize.start(quantize.empty_codebook(2, 2), key, z)
    book["vectors"] = jnp.asarray([[1.0, 1.0], [-3.0, 2.0]])
    book["total"] = book["vectors"] * book["count"][:, None]
    for _ in range(20):
        book = quantize.ema_update(book, z, jnp.zeros(32, jnp.int32), 0.9)
    np.testing.assert_allclose(book["vectors"][1], [-3, 2], rtol=1e-3)
