"""PSNR, SSIM and codebook usage against their definitions, and the suite with a fake codec."""

import itertools

import numpy as np
import pytest

from dalle_jax.evaluation import codec
from dalle_jax.types import UsageError


def test_psnr_and_ssim_of_equal_and_of_noisy_pictures(rng):
    images = rng.integers(0, 256, (3, 16, 20, 3), dtype=np.uint8)
    np.testing.assert_allclose(codec.psnr(images, images), 100)
    np.testing.assert_allclose(codec.ssim(images, images), 1)
    others = images.copy()
    others[1] = np.where(others[1] < 128, others[1] + 16, others[1] - 16)
    assert codec.psnr(images, others)[1] == pytest.approx(20 * np.log10(255 / 16))
    assert codec.psnr(images, others)[0] == 100 and codec.ssim(images, others)[1] < 1
    with pytest.raises(ValueError, match="uint8"):
        codec.psnr(images, images.astype(float))
    with pytest.raises(ValueError, match="11 px"):
        codec.ssim(images[:, :10], images[:, :10])


def test_ssim_equals_its_definition_window_by_window(rng):
    x, y = rng.integers(0, 256, (2, 1, 13, 12, 1), dtype=np.uint8)
    line = np.exp(-np.square(np.arange(-5, 6)) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    values = []
    for row, column in itertools.product(range(3), range(2)):
        a, b = (image[0, row : row + 11, column : column + 11, 0].astype(float) for image in (x, y))
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
        cov = (window * (a - mean_a) * (b - mean_b)).sum()
        c1, c2 = 2.55**2, 7.65**2
        values.append(
            (2 * mean_a * mean_b + c1)
            * (2 * cov + c2)
            / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
        )
    assert codec.ssim(x, y)[0] == pytest.approx(np.mean(values), rel=1e-6)


def test_codebook_usage():
    usage = codec.codebook_usage(np.array([5, 5, 0, 5, 5, 0]))
    assert usage == {"codes": 6, "used": 4, "perplexity": pytest.approx(4)}
    assert codec.codebook_usage(np.array([0, 9]))["perplexity"] == pytest.approx(1)


def test_suite_streams(rng):
    batches = [rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8) for n in (8, 8, 3)]
    decoded = iter(batches)
    result, rows = codec.suite(
        batches, lambda x: x[:, :2, :2, 0] % 4, lambda codes: next(decoded), num_codes=4
    )
    assert result["n"] == 19
    assert result["psnr"] == pytest.approx(100) and result["ssim"] == pytest.approx(1)
    assert result["codebook"]["codes"] == 4 and rows[1].labels[0] == "100.0 dB"
    np.testing.assert_array_equal(rows[0].images, batches[0])
    with pytest.raises(UsageError, match="no pictures"):
        codec.suite([], None, None, 4)
