"""Features of a step against numpy."""

import numpy as np
import pytest

from dalle_jax.nn import embed


@pytest.mark.parametrize("shape", [(3,), (1, 3)])
def test_timestep_features_are_cosines_then_sines(shape):
    t = np.array([0, 7, 999]).reshape(shape)
    got = embed.timestep_features(t, 8)
    angles = t[..., None] * 10_000.0 ** (-np.arange(4) / 4)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    np.testing.assert_allclose(got, expected, atol=1e-4)
