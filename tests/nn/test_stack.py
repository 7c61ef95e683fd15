"""The stack: causality by zero gradients, scan = unrolled, remat changes nothing, shardings."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import weights

from dalle_jax import axes
from dalle_jax.nn import masks, stack, transformer
from dalle_jax.types import DtypePolicy

TEXT, GRID = 3, 4
BASE = transformer.TransformerConfig(width=16, num_layers=1, num_heads=2, mlp_ratio=2)
FLOAT32 = DtypePolicy()


def build(config, layer_masks, length, dtype=FLOAT32):
    model = stack.Stack(config, layer_masks, dtype=dtype)
    x = jax.random.normal(jax.random.key(1), (2, length, config.width))
    params = nn.meta.unbox(weights.init(model, x))
    return model, params, x


@pytest.mark.parametrize("kind", masks.KINDS)
def test_gradient_flows_along_the_mask_and_nowhere_else(kind):
    """One layer: output t depends on input s exactly where the mask allows it."""
    mask = masks.Mask(kind, TEXT, GRID)
    model, params, x = build(BASE, (mask,), mask.length)

    @jax.jit
    def reach(x):
        jacobian = jax.jacrev(lambda x: model.apply(params, x[None])[0].sum(axis=-1))(x)
        return jnp.abs(jacobian).max(axis=-1) > 0  # [T, S]

    np.testing.assert_array_equal(reach(x[0]), mask.table())


def test_scan_equals_unrolled_in_values_and_gradients():
    """Five layers: two periods of two scanned, and a tail of one conv layer."""
    config = dataclasses.replace(BASE, num_layers=5)
    layer_masks = masks.pattern(("row", "column"), "conv", 5, TEXT, GRID)
    assert stack._periods(layer_masks) == (2, 2)
    _, params, x = build(config, layer_masks, TEXT + GRID**2)
    weight = jax.random.normal(jax.random.key(2), x.shape)

    def run(config):
        model = stack.Stack(config, layer_masks)
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(model.apply(p, x) * weight)))(params)

    value, gradient = run(config)
    other, other_gradient = run(dataclasses.replace(config, scan_layers=True))
    np.testing.assert_allclose(other, value, rtol=1e-5)

    largest = max(jnp.abs(x).max() for x in jax.tree.leaves(gradient))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * largest), other_gradient, gradient
    )


@pytest.mark.parametrize("scan_layers", [False, True])
def test_num_out_returns_the_last_positions(scan_layers):
    """The last two of all, in values and gradients, from the same parameters."""
    config = dataclasses.replace(BASE, num_layers=3, scan_layers=scan_layers)
    layer_masks = (masks.Mask("full", 7, 0),) * 3
    model, params, x = build(config, layer_masks, 7)
    few = stack.Stack(config, layer_masks, num_out=2)
    weight = jax.random.normal(jax.random.key(2), (2, 2, config.width))

    def run(model):
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(model.apply(p, x)[:, -2:] * weight)))(
            params
        )

    (value, gradient), (other, other_gradient) = run(model), run(few)
    np.testing.assert_allclose(other, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), other_gradient, gradient)
    saved = stack.flops(config, layer_masks, 7) - stack.flops(config, layer_masks, 7, 2)
    assert saved == 2 * 5 * config.width**2 * (2 + 2 * config.mlp_ratio)


@pytest.mark.parametrize("remat", [name for name in transformer.REMAT if name != "none"])
def test_remat_changes_no_gradient(remat):
    config = dataclasses.replace(BASE, num_layers=2)
    mask = masks.Mask("row", TEXT, GRID)
    _, params, x = build(config, (mask,) * 2, mask.length)

    def gradient(config):
        model = stack.Stack(config, (mask,) * 2)
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(model.apply(p, x)))))(params)

    expected, got = gradient(config), gradient(dataclasses.replace(config, remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, expected)


def test_period_compiles_the_fewest_layers():
    def periods(num_layers, last="conv"):
        kinds = ("row", "column", "row", "row")
        return stack._periods(masks.pattern(kinds, last, num_layers, TEXT, GRID))

    assert periods(64) == (4, 15)  # and a tail of four: row, column, row, conv
    assert periods(64, last="") == (4, 16)
    assert stack._periods((None,) * 12) == (1, 12)


def test_parameters_are_stacked_matrices_with_names():
    config = dataclasses.replace(BASE, num_layers=3)
    boxed = jax.eval_shape(lambda key: stack.init_blocks(config, FLOAT32, key), jax.random.key(0))
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata)
        )
    }
    shapes = {name: (leaf.value.shape, leaf.names) for name, leaf in flat.items()}
    stacked = (axes.LAYERS, axes.EMBED)
    assert shapes["attn/q"] == ((3, 16, 16), (*stacked, axes.HEADS))
    assert shapes["attn/o"] == ((3, 16, 16), (axes.LAYERS, axes.HEADS, axes.EMBED))
    assert shapes["mlp/up"] == ((3, 16, 32), (*stacked, axes.MLP))
    assert shapes["mlp/down_bias"] == ((3, 16), stacked)
    assert shapes["norm_attn/scale"] == ((3, 16), stacked)
    assert len(shapes) == 16  # six matrices with biases, two norms with biases


def test_initial_branches_shrink_with_depth():
    """Attention-out and mlp-down start at 1/sqrt(2L) of their usual deviation."""
    config = transformer.TransformerConfig(width=64, num_layers=8, num_heads=2)
    init = jax.jit(lambda key: stack.init_blocks(config, FLOAT32, key))
    blocks = nn.meta.unbox(init(jax.random.key(0)))
    np.testing.assert_allclose(blocks["attn"]["q"].std(), 1 / 8, rtol=0.02)
    np.testing.assert_allclose(blocks["attn"]["o"].std(), 1 / 8 / 4, rtol=0.02)
    np.testing.assert_allclose(blocks["mlp"]["down"].std(), 1 / 16 / 4, rtol=0.02)
    assert not np.array_equal(blocks["attn"]["q"][0], blocks["attn"]["q"][1])


def test_dropout_needs_a_key_and_differs_between_layers():
    config = dataclasses.replace(BASE, num_layers=2, dropout=0.5)
    mask = masks.Mask("full", 6, 0)
    model, params, x = build(config, (mask,) * 2, 6)
    plain = dataclasses.replace(config, dropout=0.0)
    without = jax.jit(stack.Stack(plain, (mask,) * 2).apply)(params, x)
    np.testing.assert_array_equal(jax.jit(model.apply)(params, x), without)
    apply = jax.jit(model.apply)
    one, two, again = (apply(params, x, jax.random.key(i)) for i in (0, 1, 0))
    assert not np.allclose(one, two)
    np.testing.assert_array_equal(one, again)


def test_bfloat16_compute_keeps_float32_parameters():
    mask = masks.Mask("full", 6, 0)
    model, params, x = build(BASE, (mask,), 6, DtypePolicy(compute=jnp.bfloat16))
    assert model.apply(params, x).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_prefill_and_single_layers_are_the_stack():
    """The layers one by one, with the keys and values that cached sampling starts from."""
    config = dataclasses.replace(BASE, num_layers=3)
    layer_masks = masks.pattern(("row", "column"), "conv", 3, TEXT, GRID)
    model, params, x = build(config, layer_masks, TEXT + GRID**2)
    layers = stack.layers(config, FLOAT32, params["params"]["blocks"])
    allowed = [mask.graph() for mask in layer_masks]
    y, keys_and_values = stack.prefill(config, FLOAT32, layers, x, allowed)
    np.testing.assert_allclose(y, model.apply(params, x), atol=1e-5)
    assert [k.shape for k, _ in keys_and_values] == [(2, TEXT + GRID**2, 2, 8)] * 3


def test_each_layer_has_a_mask():
    with pytest.raises(ValueError, match="2 masks for 1 layers"):
        build(BASE, (None, None), 4)
