"""Distances between sets of features: closed forms, naive loops, and the suite with fakes."""

import itertools

import numpy as np
import pytest
from scipy import linalg

from dalle_jax.evaluation import distribution
from dalle_jax.evaluation.settings import Settings
from dalle_jax.types import UsageError


def exact(rng, n, mean, std):
    """Rows whose sample mean and covariance are just these (a diagonal one)."""
    x = rng.normal(size=(n, len(mean)))
    x -= x.mean(axis=0)
    x = np.linalg.svd(x, full_matrices=False)[0] * np.sqrt(n - 1)
    return x * np.asarray(std) + np.asarray(mean)


def test_frechet_equals_the_closed_form_of_diagonal_gaussians(rng):
    mean_a, mean_b = rng.normal(size=(2, 5))
    std_a, std_b = rng.uniform(0.1, 3, (2, 5))
    a, b = exact(rng, 40, mean_a, std_a), exact(rng, 70, mean_b, std_b)
    expected = np.square(mean_a - mean_b).sum() + np.square(std_a - std_b).sum()
    assert distribution.frechet(a, b) == pytest.approx(expected, rel=1e-10)
    assert distribution.frechet(b, a) == pytest.approx(expected, rel=1e-10)


def test_frechet_equals_the_matrix_square_root(rng):
    a, b = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(30, 6)) + 0.5
    covs = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(covs[0] @ covs[1]).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covs[0] + covs[1] - 2 * root)
    assert distribution.frechet(a, b) == pytest.approx(expected, rel=1e-8)
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]  # no direction is special
    assert distribution.frechet(a @ turn + 3, b @ turn + 3) == pytest.approx(expected, rel=1e-8)


def test_frechet_of_fewer_samples_than_features(rng):
    x = rng.normal(size=(4, 20))
    assert distribution.frechet(x, x[::-1]) == pytest.approx(0, abs=1e-12)
    assert distribution.frechet(x, x + 2) == pytest.approx(4 * 20, rel=1e-12)
    # Two lines at a right angle share no direction: variances add up.
    a, b = np.zeros((2, 3, 20))
    a[:, 0], b[:, 1] = (-1, 0, 1), (-2, 0, 2)
    assert distribution.frechet(a, b) == pytest.approx(1 + 4, rel=1e-12)


def test_frechet_of_few_samples_is_biased_upwards(rng):
    def mean(n):
        return np.mean([distribution.frechet(*rng.normal(size=(2, n, 8))) for _ in range(20)])

    few, many = mean(20), mean(80)
    assert few > 2 * many > 0


def naive_precision_recall(real, samples, k):
    def share(points, among):
        balls = []
        for i, x in enumerate(among):
            others = sorted(np.linalg.norm(x - y) for j, y in enumerate(among) if j != i)
            balls.append(others[k - 1])
        inside = [
            any(np.linalg.norm(p - x) <= r for x, r in zip(among, balls, strict=True))
            for p in points
        ]
        return np.mean(inside)

    return share(samples, real), share(real, samples)


@pytest.mark.parametrize(("k", "block"), [(1, 7), (3, 1024)])
def test_precision_and_recall_equal_a_naive_loop(rng, k, block):
    real, samples = rng.normal(size=(25, 3)), 0.6 * rng.normal(size=(19, 3)) + 0.4
    result = distribution.precision_recall(real, samples, k, block)
    assert result == pytest.approx(naive_precision_recall(real, samples, k))
    assert 0 < result[1] < 1


def test_precision_and_recall_of_equal_far_and_narrow_sets(rng):
    x = rng.normal(size=(40, 4))
    assert distribution.precision_recall(x, x) == (1, 1)
    assert distribution.precision_recall(x, x + 100) == (0, 0)
    precision, recall = distribution.precision_recall(x, 0.05 * rng.normal(size=(40, 4)))
    assert precision > 0.9 and recall < 0.2  # good pictures, always the same
    copies = np.repeat(x[:1], 10, axis=0)
    assert distribution.precision_recall(copies, copies) == (1, 1)


def test_diversity_equals_all_pairs(rng):
    x, groups = rng.normal(size=(9, 5)), np.array([4, 4, 4, 7, 7, 1, 4, 7, 1])
    expected = []
    for group in (1, 4, 7):
        pairs = itertools.combinations(x[groups == group], 2)
        expected.append(
            np.mean([1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs])
        )
    assert distribution.diversity(x, groups) == pytest.approx(np.mean(expected))
    assert distribution.diversity(np.repeat(x, 2, 0), np.arange(18) // 2) == pytest.approx(0)
    assert distribution.diversity(np.eye(3), np.zeros(3)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: distribution.frechet(x[:1], x), "at least 2"),
        (lambda x: distribution.frechet(x, x[:, :2]), "3 and 2 numbers"),
        (lambda x: distribution.frechet(x * np.nan, x), "not finite"),
        (lambda x: distribution.precision_recall(x[:3], x), "at least 4"),
        (lambda x: distribution.precision_recall(x, x, 0), "k=0"),
        (lambda x: distribution.diversity(x, np.arange(len(x))), "two pictures"),
        (lambda x: distribution.diversity(0 * x, np.zeros(len(x))), "all zeros"),
        (lambda x: distribution.diversity(x, np.zeros(2)), "one of 6 rows"),
    ],
)
def test_what_cannot_be_compared_is_refused(rng, call, text):
    with pytest.raises(ValueError, match=text):
        call(rng.normal(size=(6, 3)))


def embed(pictures):
    return pictures.reshape(len(pictures), -1)[:, :4].astype(float) + 1


def batches(rng, *sizes):
    pictures = rng.integers(0, 256, (sum(sizes), 4, 4, 3), np.uint8)
    ids, start = np.arange(len(pictures))[:, None], 0
    for size in sizes:
        yield pictures[start : start + size], ids[start : start + size]
        start += size


def caption(ids):
    return f"caption {ids[0]}"


def test_suite_of_a_perfect_and_of_a_poor_painter(rng):
    given = list(batches(rng, 16, 16, 8))
    pictures = np.concatenate([part for part, _ in given])
    real, calls = distribution.Real(given, embed, caption), []
    assert real.row.labels[7] == "caption 7"

    def perfect(ids, num, first):
        assert ids[0, 0] == first
        calls.append(len(ids))
        return pictures[ids[:, 0]][:, None].repeat(num, 1)

    settings = Settings(candidates=2, batch=32, features="pixels")
    result, (row,) = distribution.suite(real, perfect, embed, settings)
    assert result["n"] == 40 and calls == [16, 16, 16]  # the last one filled up
    assert result["frechet_pixels"] == pytest.approx(0, abs=1e-6)
    assert result["precision"] == result["recall"] == 1
    assert result["diversity"] == pytest.approx(0, abs=1e-12)
    assert result["frechet_pixels_floor"] > 0 and result["diversity_real"] > 0
    # What is generated for the other half is that half itself: the very floor.
    assert result["frechet_pixels_halves"] == pytest.approx(result["frechet_pixels_floor"])
    np.testing.assert_array_equal(row.images, real.row.images)
    np.testing.assert_array_equal(row.images, pictures[:8])

    def grey(ids, num, first):
        return np.full((len(ids), num, 4, 4, 3), 128, np.uint8)

    settings = Settings(candidates=1, features="pixels")
    result, _ = distribution.suite(real, grey, embed, settings)
    assert result["recall"] == 0 and "diversity" not in result
    assert result["frechet_pixels_halves"] > 2 * result["frechet_pixels_floor"]


def test_suite_needs_pictures(rng):
    with pytest.raises(UsageError, match="7 real pictures are too few .* 8 at least"):
        distribution.Real(batches(rng, 7), embed, caption)


def test_pixel_features_are_means_of_blocks(rng):
    pictures = rng.integers(0, 256, (2, 16, 16, 3), np.uint8)
    features = distribution.pixel_features()(pictures).reshape(2, 8, 8, 3)
    blocks = pictures.reshape(2, 8, 2, 8, 2, 3).mean(axis=(2, 4)) / 127.5 - 1
    np.testing.assert_allclose(features, blocks, atol=1 / 127.5 + 1e-6)  # rounded twice to levels
