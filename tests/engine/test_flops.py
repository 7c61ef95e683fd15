"""FLOPs and saved bytes, counted in the jaxpr, against arithmetic by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from dalle_jax.engine import flops

B, D, F, L = 8, 16, 32, 6
ONE = 2 * B * D * D  # a product [B, D] x [D, D]


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def stack(params, x, wrap=lambda f: f):
    """L layers x -> tanh(x @ w), scanned."""
    x, _ = jax.lax.scan(lambda x, w: (wrap(lambda x, w: jnp.tanh(x @ w))(x, w), None), x, params)
    return jnp.sum(x), None


def test_a_product_is_two_per_multiply_add():
    assert flops.hardware(lambda x, w: x @ w, shape(B, D), shape(D, F)) == 2 * B * D * F
    contract = "BTHK,BSHK->BHTS"
    q = shape(2, 10, 3, 4)
    assert flops.hardware(lambda q, k: jnp.einsum(contract, q, k), q, q) == 2 * 2 * 3 * 10 * 10 * 4


def test_a_loop_counts_as_often_as_it_turns_and_training_is_three_forwards():
    params, x = shape(L, D, D), shape(B, D)
    assert flops.hardware(stack, params, x) == L * ONE

    def train(params, x):
        return jax.grad(lambda p, x: stack(p, x)[0], argnums=(0, 1))(params, x)

    assert flops.hardware(jax.jit(train), params, x) == 3 * L * ONE


def test_recomputation_is_a_fourth_forward():
    def loss(params, x):
        return stack(params, x, jax.checkpoint)[0]

    train = jax.grad(loss, argnums=(0, 1))
    assert flops.hardware(train, shape(L, D, D), shape(B, D)) == pytest.approx(4 * L * ONE)


def test_a_convolution_counts_its_taps_and_no_inserted_zeros():
    dims = ("NHWC", "HWIO", "NHWC")
    x, w = shape(2, 8, 8, 4), shape(3, 3, 4, 6)

    def conv(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims)

    one = 2 * (2 * 8 * 8 * 6) * (3 * 3 * 4)
    assert flops.hardware(conv, x, w) == one

    def spread(x, w):  # as in the gradient of a convolution with stride 2
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), ((1, 2), (1, 2)), lhs_dilation=(2, 2), dimension_numbers=dims
        )

    # 16 x 16 outputs, each with a quarter of the taps on true inputs.
    assert flops.hardware(spread, x, w) == one


def test_the_dearest_branch_counts():
    def fn(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert flops.hardware(fn, shape(B, D), shape(D, D)) == 2 * ONE


def test_a_shard_map_is_the_work_of_all_its_devices():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    rows = PartitionSpec(("data", "fsdp"))
    fn = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows
    )
    assert flops.hardware(fn, shape(B, D), shape(D, D)) == ONE


def test_recomputation_keeps_a_layers_input_only():
    """Without it the layer's output is saved too: tanh's gradient needs it."""
    params, x = shape(L, D, D), shape(B, D)
    layer = B * D * 4

    def saved(wrap):
        return flops.kept_bytes(lambda p, x: stack(p, x, wrap), params, x)

    assert saved(jax.checkpoint) == L * layer
    assert L * layer < saved(lambda f: f) <= 3 * L * layer


def test_arguments_are_not_kept_twice():
    def loss(w, x):
        return jnp.sum(x @ w), None

    assert flops.kept_bytes(loss, shape(D, D), shape(B, D)) == 0
