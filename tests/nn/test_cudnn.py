"""cuDNN's attention: the same function as dense attention, and in the programs of GPUs alone."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from dalle_jax.engine import flops
from dalle_jax.nn import attention, cudnn, masks, partition
from dalle_jax.types import UsageError

TEXT, HEADS, HEAD_DIM = 5, 2, 8


@pytest.fixture
def on_gpu(monkeypatch):
    """As if the program were for a GPU; what cuDNN computes, XLA computes."""
    monkeypatch.setattr(partition, "platform", lambda: "gpu")
    by_xla = functools.partial(cudnn.attention, implementation="xla")
    monkeypatch.setattr(attention.cudnn, "attention", by_xla)


@pytest.fixture
def has_cudnn(monkeypatch):
    """As if its library were installed: lowering asks for no more than the version."""
    library = types.SimpleNamespace(cudnn_get_version=lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", library)
    monkeypatch.setattr(partition, "platform", lambda: "gpu")


# 29 positions are an odd number, 28 an even one.
@pytest.mark.parametrize("text_len", [TEXT, TEXT - 1])
@pytest.mark.parametrize("kind", masks.KINDS)
def test_values_and_gradients_are_dense_ones(rng, on_gpu, kind, text_len):
    mask = masks.Mask(kind, text_len, 6, kernel=3, rows=4)
    shape = (3, 2, mask.length, HEADS, HEAD_DIM)
    qkv = rng.standard_normal(shape).astype(np.float32)
    weight = rng.standard_normal(shape[1:]).astype(np.float32)

    def run(impl):
        out, pull = jax.vjp(lambda *x: attention.attention(*x, mask, impl=impl), *qkv)
        return out, *pull(jnp.asarray(weight))

    for got, expected in zip(run("cudnn"), run("dense"), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def gradients(q, k, v, mask):
    def total(*x):
        return attention.attention(*x, mask, impl="cudnn").astype(jnp.float32).sum()

    return jax.grad(total, (0, 1, 2))(q, k, v)


def spec(mask, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((2, mask.length, HEADS, HEAD_DIM), dtype)


def test_a_gpus_program_has_the_kernel_and_no_scores(has_cudnn):
    mask = masks.Mask("row", TEXT, 6)
    x = spec(mask)
    traced = jax.jit(functools.partial(gradients, mask=mask)).trace(x, x, x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmax" in text and "fmhaScaleBiasSoftmaxBackward" in text
    assert set(re.findall(r"tensor<(\d+x\d+)x42x42x", text)) == {"1x1"}  # the mask


def test_a_causal_layer_needs_no_bias(has_cudnn):
    mask = masks.Mask("full", TEXT, 6)
    x = spec(mask)
    traced = jax.jit(functools.partial(gradients, mask=mask)).trace(x, x, x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text and "Bias" not in text


def test_its_products_are_counted(has_cudnn):
    mask = masks.Mask("row", TEXT + 1, 6)
    x = spec(mask)
    counted = flops.hardware(functools.partial(gradients, mask=mask), x, x, x)
    assert counted == 2 * 7 * 2 * HEADS * mask.length**2 * HEAD_DIM


def test_elsewhere_it_is_structured(rng):
    mask = masks.Mask("row", TEXT, 6)
    q = rng.standard_normal((1, mask.length, HEADS, HEAD_DIM)).astype(np.float32)
    got, expected = (attention.attention(q, q, q, mask, impl=i) for i in ("cudnn", "structured"))
    np.testing.assert_array_equal(got, expected)


def test_what_it_cannot_do_is_refused(has_cudnn, monkeypatch):
    mask = masks.Mask("row", TEXT, 6)
    x = spec(mask, jnp.float32)
    with pytest.raises(UsageError, match="16 bits, not float32: set dtype.compute=bfloat16"):
        jax.eval_shape(functools.partial(gradients, mask=mask), x, x, x)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", None)
    x = spec(mask)
    with pytest.raises(UsageError, match="there is no cuDNN"):
        jax.jit(functools.partial(gradients, mask=mask)).trace(x, x, x).lower(
            lowering_platforms=("cuda",)
        )
