"""The DALL-E network: causality, padding, heads, loss, sizes."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import weights

from dalle_jax import config as cfg
from dalle_jax.engine import meshes, sharding
from dalle_jax.models import build, dalle
from dalle_jax.nn.transformer import TransformerConfig
from dalle_jax.types import DtypePolicy, UsageError

CONFIG = dalle.DalleConfig(
    text_len=4,
    vocab_size=12,
    num_codes=16,
    grid=3,
    transformer=TransformerConfig(width=16, num_layers=3, num_heads=2),
    attention=("row", "column"),
)
TEXT = np.array([[3, 4, 5, 0], [7, 0, 0, 0]], np.int32)
CODES = np.arange(18, dtype=np.int32).reshape(2, 9) % 16


def changed(stack=None, **fields) -> dalle.DalleConfig:
    """CONFIG with other fields, and other fields of its stack."""
    stack = dataclasses.replace(CONFIG.transformer, **(stack or {}))
    return dataclasses.replace(CONFIG, transformer=stack, **fields)


@pytest.fixture(scope="module")
def network():
    model = dalle.Dalle(CONFIG)
    boxed = weights.init(model, TEXT, CODES)
    return model, nn.meta.unbox(boxed)


def test_no_logit_sees_its_own_target_or_anything_later(network):
    """Gradient of every logit row with respect to the embedded stream, which is zero ahead.

    Text row t predicts text[t + 1] from text 0 .. t; image row i predicts code i from the text
    and codes 0 .. i-1. With full attention everything behind is seen.
    """
    model = dalle.Dalle(dataclasses.replace(CONFIG, attention=("full",), last_attention=""))
    params = network[1]
    text = model.apply(params, TEXT[:1], method="embed_text")
    image = model.apply(params, CODES[:1], method="embed_image")

    @jax.jit
    def reach(x):
        def rows(x):
            outs = model.apply(params, x[None, :4], x[None, 4:], method="logits")
            return [jnp.square(out[0]).sum(axis=-1) for out in outs]

        return [jnp.abs(j).max(axis=-1) > 0 for j in jax.jacrev(rows)(x)]

    text_reach, image_reach = reach(jnp.concatenate([text, image], axis=1)[0])
    position = np.arange(13)
    np.testing.assert_array_equal(text_reach, position[None] <= np.arange(3)[:, None])
    np.testing.assert_array_equal(image_reach, position[None] <= 3 + np.arange(9)[:, None])


def test_logits_exist_only_where_their_vocabulary_is_predicted(network):
    text_logits, image_logits = network[0].apply(network[1], TEXT, CODES)
    assert text_logits.shape == (2, 3, 12) and image_logits.shape == (2, 9, 16)
    assert text_logits.dtype == image_logits.dtype == jnp.float32


def test_logits_stay_float32_under_bfloat16(network):
    model = dalle.Dalle(CONFIG, DtypePolicy(compute=jnp.bfloat16))
    outs = model.apply(network[1], TEXT, CODES)
    assert all(out.dtype == jnp.float32 for out in outs)
    for out, exact in zip(outs, network[0].apply(network[1], TEXT, CODES), strict=True):
        np.testing.assert_allclose(out, exact, atol=0.05)


def test_padding_is_a_learned_vector_of_its_position_and_is_not_masked(network):
    model, variables = network
    tables = variables["params"]["embed"]
    embedded = model.apply(variables, TEXT, method="embed_text")
    expected = tables["text"][12 + 3] + tables["position"][3]
    np.testing.assert_allclose(embedded[0, 3], expected, rtol=1e-6)
    changed = jax.tree.map(lambda x: x, variables)
    changed["params"]["embed"]["text"] = tables["text"].at[12 + 3].add(1.0)
    before, after = (model.apply(v, TEXT, CODES)[1] for v in (variables, changed))
    assert not np.allclose(before, after)


def test_image_embedding_is_code_plus_row_plus_column(network):
    model, variables = network
    tables = variables["params"]["embed"]
    embedded = model.apply(variables, CODES, method="embed_image")
    expected = tables["image"][CODES[1, 5]] + tables["row"][1] + tables["column"][2]
    np.testing.assert_allclose(embedded[1, 5], expected, rtol=1e-6)


def test_loss_equals_numpy(network, rng):
    text_logits = rng.standard_normal((2, 3, 12)).astype(np.float32)
    image_logits = rng.standard_normal((2, 9, 16)).astype(np.float32)
    total, metrics = dalle.loss(text_logits, image_logits, TEXT, CODES)

    def nll(logits, label):
        return np.log(np.exp(logits.astype(np.float64)).sum()) - logits[label]

    # Real text targets: 4, 5 of the first caption; 7 is at slot 0, which is never predicted.
    text_loss = (nll(text_logits[0, 0], 4) + nll(text_logits[0, 1], 5)) / 2
    image_loss = np.mean([nll(image_logits[i, j], CODES[i, j]) for i, j in np.ndindex(2, 9)])
    np.testing.assert_allclose(metrics["text_loss"], text_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["image_loss"], image_loss, rtol=1e-5)
    np.testing.assert_allclose(total, text_loss / 8 + image_loss * 7 / 8, rtol=1e-5)
    right = (image_logits.argmax(-1) == CODES).mean()
    np.testing.assert_allclose(metrics["image_accuracy"], right, rtol=1e-6)


def test_loss_of_captions_without_targets_is_finite(network):
    logits = network[0].apply(network[1], TEXT[1:], CODES[1:])
    total, metrics = dalle.loss(*logits, TEXT[1:], CODES[1:])
    assert np.isfinite(total) and metrics["text_loss"] == 0


def test_first_loss_is_near_uniform(network):
    @jax.jit
    def first(key):
        params = network[0].init(key, TEXT, CODES)
        return network[0].apply(params, TEXT, CODES)

    logits = first(jax.random.key(0))
    metrics = dalle.loss(*logits, TEXT, CODES)[1]
    np.testing.assert_allclose(metrics["image_loss"], np.log(16), atol=0.15)


def test_eight_examples_are_learnt_by_heart():
    """60 steps of Adam at 3e-3 bring the image loss from ln 16 = 2.8 to below 0.5."""
    rng = np.random.default_rng(0)
    text = rng.integers(1, 12, (8, 4)).astype(np.int32)
    codes = rng.integers(0, 16, (8, 9)).astype(np.int32)
    model = dalle.Dalle(changed(dict(width=32), embed_std=0.5))
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), text, codes))
    tx = optax.adam(3e-3)

    @jax.jit
    def train(params):
        def step(state, _):
            params, opt = state

            def loss(p):
                total, metrics = dalle.loss(*model.apply(p, text, codes), text, codes)
                return total, metrics["image_loss"]

            (_, image_loss), gradient = jax.value_and_grad(loss, has_aux=True)(params)
            updates, opt = tx.update(gradient, opt)
            return (optax.apply_updates(params, updates), opt), image_loss

        return jax.lax.scan(step, (params, tx.init(params)), length=60)[1]

    losses = train(params)
    assert losses[0] > 2.5 and losses[-1] < 0.5


@pytest.mark.parametrize(
    "table, sizes", [("dp", (8, 1, 1)), ("fsdp", (2, 4, 1)), ("fsdp_tp", (2, 2, 2))]
)
def test_sharded_loss_and_gradients_are_those_of_one_device(table, sizes):
    """With the layers scanned and recomputed, as a pod runs them."""
    config = changed(dict(num_layers=5, scan_layers=True, remat="full"))
    model = dalle.Dalle(config)
    text, codes = np.tile(TEXT, (4, 1)), np.tile(CODES, (4, 1))
    boxed = weights.init(model, text, codes)
    params = sharding.unbox(boxed)

    def value_and_grad(params, text, codes):
        def loss(params):
            return dalle.loss(*model.apply(params, text, codes), text, codes)[0]

        return jax.value_and_grad(loss)(params)

    value, gradient = jax.jit(value_and_grad)(params, text, codes)
    mesh_config = cfg.ConfigDict(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    mesh_config.rules = table
    mesh = meshes.make_mesh(mesh_config)
    rules = sharding.rules(mesh_config)
    placed = sharding.shardings(boxed, mesh, rules)
    batch = sharding.batch_sharding(mesh)
    with sharding.use(mesh, rules):
        step = jax.jit(
            value_and_grad, in_shardings=(placed, batch, batch), out_shardings=(None, placed)
        )
        other, other_gradient = step(
            jax.device_put(params, placed), *(jax.device_put(x, batch) for x in (text, codes))
        )
    np.testing.assert_allclose(other, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), other_gradient, gradient)
    if table != "dp":
        blocks = other_gradient["params"]["transformer"]["blocks"]
        assert not blocks["mlp"]["up"].sharding.is_fully_replicated


def test_the_papers_model_has_12_292_808_448_parameters(root):
    """64 blocks of 12 D^2 + 13 D, tables of 25,152 rows, two heads, one final norm.

    Per block: q, k, v, o and the mlp are 12 D^2; their biases 4 D + 4 D + D; two norms 4 D.
    Rows: 16,384 ids + 256 paddings, 256 positions, 8,192 codes, 32 rows, 32 columns.
    The paper says "12 billion".
    """
    config = cfg.load(f"{root}/configs/dalle_12b.py")
    model = build.dalle(config, grid=32, num_codes=8192)
    text, codes = jnp.zeros((1, 256), jnp.int32), jnp.zeros((1, 1024), jnp.int32)
    tree = jax.eval_shape(model.init, jax.random.key(0), text, codes)
    d = 3968
    blocks = 64 * (12 * d * d + 13 * d)
    rows = 16_384 + 256 + 256 + 8_192 + 32 + 32
    expected = blocks + rows * d + (16_384 + 8_192) * d + 2 * d
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == expected == 12_292_808_448


def test_flops_count_allowed_keys_only():
    """By hand for one layer: projections 8 TD^2, mlp 16 TD^2, attention 4 D a pair, two heads."""
    config = changed(dict(num_layers=1), last_attention="row")
    pairs = 4 * 5 // 2 + 9 * 4 + (1 + 2 + 3 + 6 * 4)
    expected = 13 * 24 * 16**2 + 4 * 16 * pairs + 2 * 16 * (3 * 12 + 9 * 16)
    assert dalle.flops(config) == expected


def test_bad_values_are_refused(network):
    with pytest.raises(UsageError, match="'diagonal' is unknown"):
        dataclasses.replace(CONFIG, attention=("diagonal",))
    with pytest.raises(UsageError, match="grid=0"):
        dataclasses.replace(CONFIG, grid=0)
    with pytest.raises(UsageError, match="width 17 is not a multiple"):
        changed(dict(width=17))
    with pytest.raises(ValueError, match=r"expected \[B, 4\]"):
        network[0].apply(network[1], TEXT[:, :3], CODES)
