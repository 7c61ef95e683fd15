"""The estimate for kernels written by hand, on products whose work is known."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from dalle_jax.engine import chips, flops
from dalle_jax.planning import kernel_estimates

SIDE, BLOCK, HEAD = 512, 256, 64
SLOW_MEMORY = chips.Chip("slow memory", 1e15, 1, 1.0, 1.0)
SLOW_PRODUCTS = chips.Chip("slow products", 1.0, 1, 1e15, 1.0)


def product(x, y):
    """x y^T by blocks: [S, K], [S, K] -> [S, S]; a block of x stays while those of y pass."""

    def body(x, y, out):
        out[...] = jax.lax.dot_general(x[...], y[...], (((1,), (1,)), ((), ())))

    return pl.pallas_call(
        body,
        grid=(SIDE // BLOCK, SIDE // BLOCK),
        in_specs=[
            pl.BlockSpec((BLOCK, HEAD), lambda i, j: (i, 0)),
            pl.BlockSpec((BLOCK, HEAD), lambda i, j: (j, 0)),
        ],
        out_specs=pl.BlockSpec((BLOCK, BLOCK), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((SIDE, SIDE), x.dtype),
    )(x, y)


X = jax.ShapeDtypeStruct((SIDE, HEAD), jnp.float32)


def test_flops_count_every_step_of_the_grid():
    assert flops.hardware(product, X, X) == 2 * SIDE * SIDE * HEAD


def test_a_head_of_64_takes_the_time_of_128():
    assert kernel_estimates.seconds(product, X, X, chip=SLOW_PRODUCTS) == 2 * SIDE * SIDE * 128


def test_a_block_that_stays_is_fetched_once():
    # Rows of 64 are stored as 128. x: once per block; y: once per step; the result: once.
    moved = 4 * (SIDE * 128 + 2 * SIDE * 128 + SIDE * SIDE)
    assert kernel_estimates.seconds(product, X, X, chip=SLOW_MEMORY) == moved


def test_loops_multiply_and_devices_do_not():
    def many(x, y):
        return jax.lax.scan(lambda c, _: (c + product(x, y).sum(), None), 0.0, length=3)[0]

    once = kernel_estimates.seconds(product, X, X, chip=SLOW_PRODUCTS)
    assert kernel_estimates.seconds(many, X, X, chip=SLOW_PRODUCTS) == 3 * once
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    shared = jax.shard_map(product, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    wide = jax.ShapeDtypeStruct((4 * SIDE, HEAD), jnp.float32)
    assert kernel_estimates.seconds(shared, wide, wide, chip=SLOW_PRODUCTS) == once


def test_other_programs_have_none():
    assert kernel_estimates.seconds(jnp.matmul, X, jax.ShapeDtypeStruct((64, 8), jnp.float32),
                           chip=SLOW_MEMORY) == pytest.approx(0)  # fmt: skip
