"""Filters and samples against numpy, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.sampling import categorical
from dalle_jax.types import UsageError


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


@pytest.fixture
def logits(rng):
    return (rng.standard_normal((5, 4, 12)) * 3).astype(np.float32)


@pytest.mark.parametrize("k", [1, 3, 12])
def test_top_k_keeps_the_k_largest(logits, k):
    finite = np.isfinite(np.asarray(jax.jit(categorical.top_k)(logits, k)))
    for row, keep in zip(logits.reshape(-1, 12), finite.reshape(-1, 12), strict=True):
        np.testing.assert_array_equal(np.flatnonzero(keep), np.sort(np.argsort(-row)[:k]))


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 1.0])
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p):
    finite = np.isfinite(np.asarray(jax.jit(categorical.top_p)(logits, p)))
    for row, keep in zip(logits.reshape(-1, 12), finite.reshape(-1, 12), strict=True):
        order = np.argsort(-row)
        mass = np.cumsum(softmax(row.astype(np.float64))[order])
        count = min(int(np.searchsorted(mass, p)) + 1, 12)
        np.testing.assert_array_equal(np.flatnonzero(keep), np.sort(order[:count]))


def test_guide_mixes_linearly(logits):
    a, b = logits[0], logits[1]
    np.testing.assert_allclose(categorical.guide(a, b, 1.0), a, atol=1e-6)
    np.testing.assert_allclose(categorical.guide(a, b, 0.0), b, atol=1e-6)
    np.testing.assert_allclose(categorical.guide(a, b, 3.0), b + 3 * (a - b), atol=1e-5)


def test_draw_follows_the_filtered_and_tempered_distribution():
    """20,000 samples of one row; 4 sigma of the largest cell is 0.014."""
    row = np.array([2.0, 1.0, 0.5, -1.0, -3.0], np.float32)
    n, temperature = 20_000, 0.7
    noise = jax.random.gumbel(jax.random.key(0), (n, 5))
    tiled = jnp.broadcast_to(row, (n, 5))
    for options, alive in (({}, 5), ({"k": 3}, 3), ({"p": 0.9}, 2)):
        samples = np.asarray(categorical.sample(tiled, noise, temperature, **options))
        expected = softmax(np.where(np.arange(5) < alive, row / temperature, -np.inf))
        np.testing.assert_allclose(np.bincount(samples, minlength=5) / n, expected, atol=0.015)


def test_temperature_zero_takes_the_likeliest(logits):
    noise = jax.random.gumbel(jax.random.key(1), logits.shape)
    for options in ({}, {"k": 3}, {"p": 0.5}):
        samples = categorical.sample(logits, noise, 0.0, **options)
        np.testing.assert_array_equal(samples, logits.argmax(-1))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 513}, "top_k=513"),
        ({"top_p": 0.0}, r"top_p=0\.0"),
        ({"guidance": -0.5}, "guidance=-0.5"),
    ],
)
def test_bad_options_are_refused(change, message):
    good = dict(temperature=1.0, top_k=0, top_p=1.0, guidance=1.0, num_codes=512)
    categorical.check(**good)
    with pytest.raises(UsageError, match=message):
        categorical.check(**(good | change))
