"""Both towers of CLIP: sizes as released, pooling, causality, pixels."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import weights

from dalle_jax import config as cfg
from dalle_jax.models import build, clip
from dalle_jax.nn import conv
from dalle_jax.nn.transformer import TransformerConfig
from dalle_jax.types import UsageError

EOS = clip.SENTENCEPIECE_EOS
TINY = clip.ClipConfig(
    image_px=16,
    text_len=10,
    vocab_size=40,
    patch_px=8,
    image=TransformerConfig(width=16, num_layers=2, num_heads=2),
    text=TransformerConfig(width=12, num_layers=2, num_heads=3),
    joint_width=8,
)


def init(config, seed=0):
    model = clip.Clip(config)
    images = jnp.zeros((1, config.image_px, config.image_px, 3))
    params = weights.init(model, images, jnp.zeros((1, config.text_len), jnp.int32), seed=seed)
    return model, nn.meta.unbox(params)["params"]


@pytest.fixture(scope="module")
def tiny():
    return init(TINY)


@pytest.fixture(scope="module")
def encode_text(tiny):
    model, params = tiny
    return jax.jit(lambda text: model.apply({"params": params}, text, method="encode_text"))


def captions(rng, lengths, text_len=TINY.text_len):
    """bos, words, eos, padding."""
    text = np.zeros((len(lengths), text_len), np.int32)
    for row, n in zip(text, lengths, strict=True):
        row[0], row[1 : n - 1], row[n - 1] = 2, rng.integers(4, TINY.vocab_size, n - 2), EOS
    return text


@pytest.mark.parametrize(
    ("size", "count"), [("b32", 151_277_313), ("b16", 149_620_737), ("l14", 427_616_513)]
)
def test_released_sizes_have_the_released_parameter_counts(root, size, count):
    model = build.clip(cfg.load(f"{root}/configs/clip.py:size={size}"))
    c = model.config
    images = jax.ShapeDtypeStruct((1, c.image_px, c.image_px, 3), jnp.float32)
    text = jax.ShapeDtypeStruct((1, c.text_len), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), images, text)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    # No bias where the released model has none.
    assert set(params["image"]) == {
        "class_embed", "norm_post", "norm_pre", "patch_embed", "positions", "projection",
        "transformer",
    }  # fmt: skip


def test_patch_matmul_is_the_strided_convolution(rng):
    x = rng.normal(size=(2, 12, 12, 3)).astype(np.float32)
    kernel = rng.normal(size=(4, 4, 3, 5)).astype(np.float32)
    expected = jax.lax.conv_general_dilated(
        x, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    got = conv.to_patches(x, 4) @ kernel.reshape(-1, 5)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_normalise_maps_the_mean_pixel_to_zero_and_one_deviation_to_one():
    mean, std = np.asarray(clip.PIXEL_MEAN), np.asarray(clip.PIXEL_STD)
    pixels = np.stack([mean, mean + std, mean - 2 * std])[None, None].astype(
        np.float32
    )  # in [0, 1]
    got = np.asarray(clip.normalise(jnp.asarray(pixels * 2 - 1)))
    np.testing.assert_allclose(got[0, 0, :, 0], [0, 1, -2], atol=1e-5)
    np.testing.assert_allclose(got[0, 0, :, 2], [0, 1, -2], atol=1e-5)


def test_text_is_read_at_the_first_end_token():
    text = np.asarray([[2, 9, EOS, EOS, 0], [2, EOS, 0, 0, 0], [2, 8, 8, 8, 8]])
    np.testing.assert_array_equal(clip.end_position(text, EOS), [2, 1, 4])


def test_openai_ids_agree_with_the_argmax_of_ids(rng):
    text = rng.integers(0, 49406, (6, 12))
    for row, n in enumerate((3, 5, 7, 9, 10, 11)):
        text[row, n], text[row, n + 1 :] = clip.OPENAI_EOS, 0
    np.testing.assert_array_equal(clip.end_position(text, clip.OPENAI_EOS), text.argmax(axis=1))


def test_padding_changes_nothing(tiny, encode_text, rng):
    """The embedding of a padded caption is that of the caption at its own length."""
    model, params = tiny
    text = captions(rng, [6])
    short = clip.Clip(dataclasses.replace(TINY, text_len=6))
    cut = {**params["text"], "positions": params["text"]["positions"][:6]}
    cut = {"params": {**params, "text": cut}}
    expected = short.apply(cut, text[:, :6], method="encode_text")
    np.testing.assert_allclose(encode_text(text), expected, atol=1e-6)


def test_text_tower_is_causal(encode_text, rng):
    """What follows the end token does not matter; what stands before it does."""
    text = captions(rng, [5, 5])
    text[1] = text[0]
    text[1, 5:] = rng.integers(4, TINY.vocab_size, TINY.text_len - 5)
    same = np.asarray(encode_text(text))
    np.testing.assert_array_equal(same[0], same[1])
    text[1, 1] = (text[1, 1] + 1) % 30 + 4
    other = np.asarray(encode_text(text))
    assert np.abs(other[0] - other[1]).max() > 1e-4


def test_gradient_is_zero_after_the_end_token(tiny, rng):
    model, params = tiny
    text = captions(rng, [4])

    def first_value(positions):
        moved = {**params, "text": {**params["text"], "positions": positions}}
        return model.apply({"params": moved}, text, method="encode_text")[0, 0]

    gradient = np.asarray(jax.jit(jax.grad(first_value))(params["text"]["positions"]))
    assert np.abs(gradient[:4]).min(axis=1).min() > 0
    np.testing.assert_array_equal(gradient[4:], 0)


def test_embeddings_have_unit_length_and_scale_starts_at_the_papers(tiny, rng):
    model, params = tiny
    images = rng.uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)
    text_ids = captions(rng, [3, 6, 10])
    image, text, _ = jax.jit(model.apply)({"params": params}, images, text_ids)
    np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1, atol=1e-5)
    assert image.shape == text.shape == (3, TINY.joint_width)

    @jax.jit
    def initial(key):
        return nn.meta.unbox(model.init(key, images, text_ids))["params"]["logit_scale"]

    np.testing.assert_allclose(np.exp(initial(jax.random.key(3))), 1 / 0.07, rtol=1e-6)


def test_scan_is_the_unrolled_stack(tiny, rng):
    model, params = tiny
    towers = {"image": TINY.image, "text": TINY.text}
    towers = {k: dataclasses.replace(v, scan_layers=True, remat="full") for k, v in towers.items()}
    scanned = clip.Clip(dataclasses.replace(TINY, **towers))
    images = rng.uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    text = captions(rng, [4, 8])
    for a, b in zip(
        jax.jit(model.apply)({"params": params}, images, text),
        jax.jit(scanned.apply)({"params": params}, images, text),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("patch_px", 7, "image_px=14"),
        ("eos_id", 40, "vocabulary of 40"),
        ("text_len", 2, "text_len 2"),
    ],
)
def test_bad_sizes_are_refused_with_a_cure(field, value, message):
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(TINY, **{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_heads", 5, "num_heads 5"),
        ("remat", "some", "remat='some'"),
        ("image_layers", 0, "num_layers=0"),
    ],
)
def test_bad_sizes_of_a_flat_config_are_refused(root, field, value, message):
    config = cfg.load(f"{root}/configs/clip.py:size=smoke")
    with pytest.raises(UsageError, match=message):
        build.clip(cfg.override(config, {f"model.{field}": value}))


def test_the_flat_section_fills_both_towers(root):
    """Keys are those of a config file; absent ones have their default, unknown ones are refused."""
    config = cfg.load(f"{root}/configs/clip.py:size=smoke")
    model = dict(image_width=24, image_layers=3, image_heads=6, text_layers=4, remat="dots")
    config = cfg.ConfigDict(config.to_dict() | {"model": model | dict(patch_px=8)})
    c = build.clip(config).config
    assert c.image == TransformerConfig(width=24, num_layers=3, num_heads=6, remat="dots")
    assert c.text == TransformerConfig(width=512, num_layers=4, num_heads=8, remat="dots")
    config.model.image_widht = 3
    with pytest.raises(UsageError, match="model.image_widht is unknown; .*image_width"):
        build.clip(config)
