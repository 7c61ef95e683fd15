"""The parts of a layer: norms and MLP against numpy, refused sizes."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
import weights

from dalle_jax.nn import stack, transformer
from dalle_jax.types import UsageError

BASE = transformer.TransformerConfig(width=16, num_layers=1, num_heads=2, mlp_ratio=2)


def test_norms_equal_numpy(rng):
    x = rng.standard_normal((2, 3, 8)).astype(np.float32) * 3 + 1
    for kind in transformer.NORMS:
        norm = transformer.Norm(kind)
        params = nn.meta.unbox(norm.init(jax.random.key(0), x))
        y = x - x.mean(-1, keepdims=True) if kind == "layer" else x
        eps = 1e-5 if kind == "layer" else 1e-6
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + eps)
        np.testing.assert_allclose(norm.apply(params, x), y, atol=1e-5)


def test_a_gated_mlp_is_one_half_times_the_other_activated(rng):
    config = dataclasses.replace(BASE, gated=True, use_bias=False)
    x = rng.standard_normal((2, 3, config.width)).astype(np.float32)
    mlp = transformer.Mlp(config)
    params = nn.meta.unbox(weights.init(mlp, x))
    up, gate, down = (np.asarray(params["params"][name]) for name in ("up", "gate", "down"))
    expected = ((x @ up) * (x @ gate) / (1 + np.exp(-1.702 * (x @ gate)))) @ down
    np.testing.assert_allclose(jax.jit(mlp.apply)(params, x), expected, atol=1e-6)
    plain = stack.flops(BASE, (None,), 5)
    assert stack.flops(config, (None,), 5) - plain == 2 * 5 * up.size


def test_bad_values_are_refused():
    with pytest.raises(UsageError, match="width 10 is not a multiple of num_heads 4"):
        transformer.TransformerConfig(width=10, num_layers=1, num_heads=4)
    with pytest.raises(UsageError, match="remat='some' is unknown"):
        dataclasses.replace(BASE, remat="some")
    with pytest.raises(UsageError, match="dropout=1.0"):
        dataclasses.replace(BASE, dropout=1.0)
    with pytest.raises(UsageError, match="num_heads=0; expected 1 or more"):
        dataclasses.replace(BASE, num_heads=0)
