"""What upsamplers are shown in training: against scipy, by key, in range."""

import jax
import numpy as np
import pytest
import scipy.fft
import scipy.ndimage

from dalle_jax.diffusion import corrupt
from dalle_jax.types import UsageError

bsr = jax.jit(lambda images, keys: corrupt.corrupt("bsr", images, keys))


def pictures(rng, count=3, px=16):
    """Blobs: something to lose."""
    noise = rng.normal(size=(count, px, px, 3))
    smooth = scipy.ndimage.gaussian_filter(noise, (0, 1.5, 1.5, 0))
    return np.clip(smooth * 3, -1, 1).astype(np.float32)


@pytest.mark.parametrize(("taps", "sigma"), [(3, 0.6), (7, 1.2)])
def test_blur_is_scipys(rng, taps, sigma):
    x = pictures(rng)
    got = corrupt.blur(x, np.full(3, sigma, np.float32), taps)
    places = np.arange(-(taps // 2), taps // 2 + 1)
    weights = np.exp(-0.5 * (places / sigma) ** 2)
    weights /= weights.sum()
    expected = x.astype(np.float64)
    for axis in (1, 2):
        expected = scipy.ndimage.correlate1d(expected, weights, axis, mode="mirror")
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_each_picture_has_a_blur_of_its_own(rng):
    x = np.repeat(pictures(rng, 1), 2, axis=0)
    weak, strong = np.asarray(corrupt.blur(x, np.array([0.1, 2.0], np.float32), 7))
    np.testing.assert_allclose(weak, x[0], atol=1e-5)
    assert np.abs(strong - x[0]).max() > 0.1


def test_corruption_is_a_function_of_the_key(rng, key):
    x = pictures(rng)
    keys = jax.random.split(key, 3)
    one = np.asarray(bsr(x, keys))
    np.testing.assert_array_equal(one, bsr(x, keys))
    np.testing.assert_array_equal(one[::-1], bsr(x[::-1], keys[::-1]))  # wherever it lies
    other = np.asarray(bsr(x, jax.random.split(jax.random.key(1), 3)))
    assert (np.abs(one - other).max(axis=(1, 2, 3)) > 0.02).all()


def test_corrupted_pictures_are_pictures_still(rng, key):
    x = pictures(rng)
    for kind in corrupt.KINDS:
        y = np.asarray(bsr(x, jax.random.split(key, 3)) if kind == "bsr" else
                       corrupt.corrupt(kind, x, jax.random.split(key, 3)))  # fmt: skip
        levels = (y + 1) * 127.5
        np.testing.assert_allclose(levels, np.round(levels), atol=1e-3)
        error = np.sqrt(np.mean((y - x) ** 2, axis=(1, 2, 3)))
        assert y.min() >= -1 and y.max() <= 1 and (error < 0.3).all()
        assert (error < 0.005).all() if kind == "none" else (error > 0.005).all()


def test_jpeg_is_the_quantised_cosine_transform(rng):
    """One square of grey: scipy's transform, the standard's table at quality 50."""
    grey = np.round(pictures(rng, 1, 8)[:, :, :, :1] * 127.5)
    x = np.repeat(grey, 3, axis=3).astype(np.float32) / 127.5
    got = np.asarray(corrupt.jpeg(x, np.array([50.0], np.float32)))
    table = corrupt._JPEG_TABLE.astype(np.float64)
    coefficients = scipy.fft.dctn(grey[0, :, :, 0], norm="ortho")
    expected = scipy.fft.idctn(np.round(coefficients / table) * table, norm="ortho") / 127.5
    np.testing.assert_allclose(got[0, :, :, 1], np.clip(expected, -1, 1), atol=1e-3)


def test_jpeg_of_any_size_loses_more_at_lower_quality(rng):
    x = pictures(rng, 1, 12)
    error = [
        np.abs(np.asarray(corrupt.jpeg(x, np.array([q], np.float32))) - x).mean()
        for q in (100.0, 75.0, 20.0)
    ]
    assert error[0] < 0.01 < error[1] < error[2]


def test_an_unknown_kind_is_refused():
    with pytest.raises(UsageError, match="none, blur, bsr"):
        corrupt.corrupt("jpeg", np.zeros((1, 8, 8, 3)), None)
