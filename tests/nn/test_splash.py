"""The TPU's kernel, interpreted, against dense attention; and that only a TPU's program has it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from dalle_jax import axes
from dalle_jax.engine import sharding
from dalle_jax.nn import attention, masks, partition, splash

# 70 + 12 * 10 positions are two blocks, the second one not full.
TEXT, GRID, ROWS, HEADS, HEAD_DIM = 70, 12, 10, 2, 8


@pytest.fixture
def qkv(rng):
    shape = (3, 1, TEXT + GRID * ROWS, HEADS, HEAD_DIM)
    return rng.standard_normal(shape).astype(np.float32)


@pytest.fixture
def on_tpu(monkeypatch):
    """As if the program were for a TPU, whose kernels this machine interprets."""
    monkeypatch.setattr(partition, "platform", lambda: "tpu")
    interpreted = functools.partial(splash.attention, interpret=True)
    monkeypatch.setattr(attention.splash, "attention", interpreted)


@pytest.mark.parametrize("kind", masks.KINDS)
def test_values_and_gradients_are_dense_ones(rng, qkv, on_tpu, kind):
    mask = masks.Mask(kind, TEXT, GRID, kernel=5, rows=ROWS)
    weight = rng.standard_normal(qkv.shape[1:]).astype(np.float32)

    def run(impl):
        @jax.jit
        def values_and_gradients(*x):
            out, pull = jax.vjp(lambda *x: attention.attention(*x, mask, impl=impl), *x)
            return out, *pull(jnp.asarray(weight))

        return values_and_gradients(*qkv)

    for got, expected in zip(run("splash"), run("dense"), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def lowered(mask, impl, length) -> str:
    """The program that a TPU would get."""
    x = jax.ShapeDtypeStruct((1, length, HEADS, HEAD_DIM), jnp.float32)
    attend = jax.jit(lambda q, k, v: attention.attention(q, k, v, mask, impl=impl))
    return attend.trace(x, x, x).lower(lowering_platforms=("tpu",)).as_text()


def test_only_a_program_for_a_tpu_has_the_kernel(monkeypatch):
    mask = masks.Mask("row", TEXT, GRID, rows=ROWS)
    assert "tpu_custom_call" not in lowered(mask, "splash", mask.length)
    monkeypatch.setattr(partition, "platform", lambda: "tpu")
    assert "tpu_custom_call" in lowered(mask, "splash", mask.length)
    assert "tpu_custom_call" not in lowered(mask, "auto", mask.length)  # too short to pay
    assert "tpu_custom_call" not in lowered(mask, "structured", mask.length)
    long = masks.Mask("row", 256, 16)
    assert long.length == attention.LONG
    assert "tpu_custom_call" in lowered(long, "auto", long.length)
    assert "tpu_custom_call" not in lowered(None, "splash", 512)  # no static mask: dense


def test_the_program_is_traced_for_the_devices_of_its_mesh():
    assert partition.platform() == "cpu"
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert partition.platform() == "cpu"


@pytest.mark.parametrize("batch", [8, 3])  # 3 examples: every device computes all of them
def test_devices_run_the_kernel_on_their_own_examples_and_heads(qkv, on_tpu, batch):
    mask = masks.Mask("column", TEXT, GRID, rows=ROWS)
    q, k, v = np.repeat(qkv, batch, axis=1) * np.arange(1, batch + 1).reshape(-1, 1, 1, 1)
    devices = np.array(jax.devices()).reshape(4, 1, 2)
    mesh = Mesh(devices, axes.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    rules = {axes.ACT_BATCH: ("data",), axes.ACT_HEADS: ("tensor",)}
    attend = jax.jit(lambda *x: attention.attention(*x, mask, impl="splash"))
    with sharding.use(mesh, rules):
        got = attend(q, k, v)
        text = attend.lower(q, k, v).as_text()
    assert ("manual_computation" in text) == (batch == 8)
    expected = attention.attention(q, k, v, mask, impl="dense")
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


def test_blocks_are_longer_for_long_streams():
    assert splash.block_size(masks.Mask("row", 256, 16)) == 128
    assert splash.block_size(masks.Mask("row", 256, 32)) == 256
