"""Norm and resampling of the U-Net against numpy."""

import numpy as np
import pytest

from dalle_jax.nn import unet_blocks


def test_group_norm_is_numpys(rng, key):
    x = rng.normal(2, 3, size=(2, 4, 4, 24)).astype(np.float32)
    norm = unet_blocks.GroupNorm(24, activate=False)
    groups = unet_blocks.num_groups(24)
    assert groups == 4  # gcd(32, 24) is 8, of three channels each
    gain, bias = rng.normal(size=(2, 24)).astype(np.float32)
    scale, shift = rng.normal(size=(2, 2, 24)).astype(np.float32)
    got = norm.apply({"params": {"scale": gain, "bias": bias}}, x, (scale, shift))
    y = x.astype(np.float64).reshape(2, 16, groups, -1)
    y = (y - y.mean((1, 3), keepdims=True)) / np.sqrt(y.var((1, 3), keepdims=True) + 1e-5)
    y = y.reshape(x.shape) * gain + bias
    y = y * (1 + scale[:, None, None]) + shift[:, None, None]
    np.testing.assert_allclose(got, y, atol=1e-4)


@pytest.mark.parametrize(
    ("features", "groups"), [(16, 4), (64, 16), (128, 32), (192, 32), (320, 32), (512, 32)]
)
def test_there_are_32_groups_where_channels_allow(features, groups):
    assert unet_blocks.num_groups(features) == groups


def test_pooling_is_the_mean_of_squares(rng):
    x = rng.normal(size=(2, 4, 6, 3)).astype(np.float32)
    got = np.asarray(unet_blocks.average_pool(x))
    np.testing.assert_allclose(got[:, 1, 2], x[:, 2:4, 4:6].mean((1, 2)), atol=1e-6)
