"""Chunks of a batch: the same rows, on every device its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dalle_jax import layout
from dalle_jax.nn import partition


def scaled(params, x):
    return x * params + jnp.arange(x.shape[-1])[None]


@pytest.mark.parametrize("size", [0, 1, 3, 8, 50])
def test_chunks_change_nothing(rng, size):
    x = jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)
    got = jax.jit(partition.in_chunks(scaled, size))(jnp.float32(2), x)
    np.testing.assert_array_equal(got, scaled(jnp.float32(2), x))


@pytest.mark.parametrize("batch", [16, 12])
def test_devices_work_on_their_own_examples(rng, batch):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    how = layout.Gathers(mesh=mesh, rows="fsdp", batch=("data", "fsdp"), storage=None)
    x_host = jnp.asarray(rng.normal(size=(batch, 5)), jnp.float32)
    split = batch % how.batch_shards == 0  # 12 examples are left to the partitioner
    spec = PartitionSpec(("data", "fsdp")) if split else PartitionSpec("fsdp")
    x = jax.device_put(x_host, NamedSharding(mesh, spec))

    def run(params, x):
        with layout.gathering(how):
            return partition.in_chunks(scaled, 1)(params, x)

    compiled = jax.jit(run).lower(jnp.float32(2), x).compile()
    np.testing.assert_array_equal(compiled(jnp.float32(2), x), scaled(jnp.float32(2), x_host))
    if split:
        text = compiled.as_text()
        assert "while" in text and not any(k in text for k in ("all-gather", "all-reduce"))
