"""Folded layer weights: the same numbers as on one device, whatever the mesh, and plain on disk."""

import folded
import jax
import numpy as np
import pytest

ONE = (1, 1)


def close(got, expected, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4), got, expected)


@pytest.mark.parametrize(
    "task, mesh, overrides",
    [
        ("dalle", (1, 8), {}),
        ("dalle", (2, 4), {"model.scan_layers": True, "model.remat": "full"}),
        ("dalle", (2, 4), {"model.dropout": 0.3, "model.remat": "dots", "model.use_bias": True}),
        ("dalle", (1, 8), {"model.dropout": 0.3, "model.remat": "names", "model.norm": "layer"}),
        ("clip", (1, 8), {"model.scan_layers": True}),
        ("clip", (2, 4), {"optim.grad_reduce_dtype": "float32"}),
    ],
)
def test_loss_and_gradients_are_those_of_one_device(root, task, mesh, overrides):
    config = folded.config_of(root, task, **overrides)
    one, many = folded.Run(config, *ONE), folded.Run(config, *mesh)
    a, b = one.init(), many.init()
    rows = {1: 96, 4: 24, 8: 24}[mesh[1]]  # of a shard of any matrix of the stack
    shards = [x.addressable_shards[0].data for x in jax.tree.leaves(b.params) if x.ndim == 3]
    assert {x.shape[1] for x in shards} == {rows}
    close(many.plain(b.params), one.plain(a.params), 1e-6)
    loss, gradients = one.gradients(a)
    got_loss, got = many.gradients(b)
    assert got_loss == pytest.approx(loss, abs=1e-5)
    close(got, gradients, 1e-5)
