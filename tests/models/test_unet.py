"""The U-Net: sizes of the released and the paper's models, what it does before and without."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax import config as cfg
from dalle_jax.engine import flops
from dalle_jax.models import build, unet
from dalle_jax.nn.transformer import TransformerConfig
from dalle_jax.types import UsageError

PX = 8


def config(**changes) -> unet.UnetConfig:
    sizes = dict(
        image_px=PX, width=16, channel_mults=(1, 2), num_blocks=1, attention_px=(4,), head_width=8,
        text_len=4, vocab_size=16, context_width=16, text_encoder=text_encoder(16, 1, 2),
        clip_width=8,
    )  # fmt: skip
    return unet.UnetConfig(**(sizes | changes))


def text_encoder(width, num_layers, num_heads) -> TransformerConfig:
    return TransformerConfig(width, num_layers, num_heads, activation="gelu")


def inputs(c, rng, batch=3, px=PX):
    """x, t and conditions, none of them special."""
    cond = {}
    for name, spec in unet.cond_spec(c, batch, px).items():
        if spec.dtype == jnp.bool_:
            cond[name] = rng.random(spec.shape) < 0.5
        elif spec.dtype == jnp.int32:
            cond[name] = rng.integers(1, c.vocab_size, spec.shape, np.int32)
        else:
            cond[name] = rng.normal(size=spec.shape).astype(np.float32)
    x = rng.normal(size=(batch, px, px, 3)).astype(np.float32)
    return x, rng.integers(0, 1000, batch, np.int32), cond


def shapes(c, px=PX):
    x = jax.ShapeDtypeStruct((1, px, px, 3), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    key = jax.eval_shape(jax.random.key, 0)
    variables = jax.eval_shape(unet.Unet(c).init, key, x, t, unet.cond_spec(c, 1, px))
    return nn.meta.unbox(variables["params"])


def random_params(c, rng):
    """Nothing is zero, so everything has an effect."""
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.2, shapes(c))


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


_GLIDE = dict(
    width=192, text_len=128, vocab_size=50257, context_width=512,
    text_encoder=text_encoder(512, 16, 8), attention_px=(32, 16, 8), head_width=64, clip_width=0,
)  # fmt: skip
_LOW = dict(low_res=True)
_PLAIN = dict(_LOW, context_width=0, text_encoder=None, clip_width=0, attention_px=())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(_GLIDE, image_px=64, channel_mults=(1, 2, 3, 4), num_blocks=3), 385_030_726),
        (
            dict(
                _GLIDE, image_px=256, channel_mults=(1, 1, 2, 2, 4, 4), num_blocks=2, low_res=True
            ),
            398_361_286,
        ),
        (
            dict(_PLAIN, image_px=256, width=320, channel_mults=(1, 2, 3, 4), num_blocks=3),
            729_710_726,
        ),
        (
            dict(_PLAIN, image_px=1024, width=192, channel_mults=(1, 1, 2, 2, 4, 4), num_blocks=2),
            282_064_326,
        ),
    ],
    ids=["glide-base", "glide-upsampler", "unclip-256", "unclip-1024"],
)
def test_released_and_stated_sizes(changes, expected):
    """GLIDE's are those of its released weights; unCLIP's paper states 700M and 300M."""
    assert count(shapes(config(**changes), px=32)) == expected


def test_the_paper_decoder_has_three_and_a_half_billion():
    sizes = dict(
        _GLIDE, image_px=64, width=512, channel_mults=(1, 2, 3, 4), num_blocks=3, text_len=256,
        context_width=2048, text_encoder=text_encoder(2048, 24, 32), clip_width=1024,
    )  # fmt: skip
    params = shapes(config(**sizes), px=32)
    text = count(params["condition"]["text"])
    clip = count(params["condition"]) - text
    assert (text, clip) == (1_316_773_888, 10_497_024)
    assert count(params) - text - clip == 2_238_164_486


@pytest.fixture(scope="module")
def decoder():
    """(module, parameters without zeros) of the tiny decoder."""
    c = config()
    return unet.Unet(c), random_params(c, np.random.default_rng(1))


@pytest.fixture(scope="module")
def apply(decoder):
    return jax.jit(lambda params, *xs: decoder[0].apply({"params": params}, *xs))


def test_the_output_is_zero_at_the_start(decoder, apply, rng, key):
    model, params = decoder
    x, t, cond = inputs(model.config, rng)
    fresh = nn.meta.unbox(jax.jit(model.init)(key, x, t, cond)["params"])
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, params)
    out = apply(fresh, x, t, cond)
    assert out.shape == (3, PX, PX, 6) and out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 0)


def test_conditions_count_and_dropped_ones_do_not(decoder, apply, rng):
    model, params = decoder
    x, t, cond = inputs(model.config, rng)
    cond["has_clip"] = np.ones(3, bool)
    out = apply(params, x, t, cond)
    for name in ("text", "clip"):
        other = cond | {name: np.roll(cond[name], 1, axis=0)}
        assert not np.allclose(out, apply(params, x, t, other), atol=1e-3)
    null = unet.null_cond(cond)
    assert not null["text"].any() and not null["has_clip"].any()
    without = apply(params, x, t, null)
    assert not np.allclose(out, without, atol=1e-3)
    # What a dropped embedding would have been makes no difference.
    other = null | {"clip": np.roll(cond["clip"], 1, axis=0)}
    np.testing.assert_array_equal(without, apply(params, x, t, other))


def test_encoded_once_is_encoded_each_time(decoder, apply, rng):
    model, params = decoder
    x, t, cond = inputs(model.config, rng)
    encoded = model.apply({"params": params}, cond, method="encode")
    assert encoded["context"].shape == (3, 4 + 4, 16)
    np.testing.assert_allclose(
        apply(params, x, t, encoded), apply(params, x, t, cond), rtol=1e-4, atol=1e-4
    )


def test_an_inpainting_network_starts_as_the_plain_one(decoder, apply, rng):
    model, params = decoder
    wide = config(inpaint=True)
    widened = unet.widen(params, shapes(wide))
    assert jax.tree.map(np.shape, widened) == jax.tree.map(jnp.shape, shapes(wide))
    x, t, cond = inputs(wide, rng)
    run = jax.jit(unet.Unet(wide).apply)
    out = run({"params": widened}, x, t, cond)
    plain = {name: cond[name] for name in ("text", "clip", "has_clip")}
    np.testing.assert_array_equal(out, apply(params, x, t, plain))
    # And learns from there: what is hidden stays hidden, what is known is seen.
    widened["stem_known"]["kernel"] += rng.normal(size=(3, 3, 4, 16)).astype(np.float32)
    seen = run({"params": widened}, x, t, cond)
    assert not np.allclose(out, seen, atol=1e-3)
    hidden = np.where(cond["known"], cond["picture"], 7)
    np.testing.assert_array_equal(run({"params": widened}, x, t, cond | {"picture": hidden}), seen)
    with pytest.raises(UsageError, match="inpaint=true"):
        unet.widen(params, shapes(config(inpaint=True, num_blocks=2)))


def test_an_upsampler_of_crops_takes_whole_pictures(rng):
    c = config(**_PLAIN, learned_variance=False, patch_px=2, channel_mults=(1,))
    params = random_params(c, rng)
    run = jax.jit(unet.Unet(c).apply)
    x, t, cond = inputs(c, rng)
    assert run({"params": params}, x, t, cond).shape == (3, PX, PX, 3)
    # A larger picture, beside a small one that is stretched.
    x, t, cond = inputs(c, rng, px=2 * PX)
    small = {"low_res": cond["low_res"][:, ::2, ::2]}
    stretched = {"low_res": jax.image.resize(small["low_res"], x.shape, "bilinear")}
    out = run({"params": params}, x, t, small)
    assert out.shape == (3, 2 * PX, 2 * PX, 3)
    np.testing.assert_allclose(out, run({"params": params}, x, t, stretched), atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(image_px=9), "8 or 10"),
        (dict(image_px=12, patch_px=4), "8 or 16"),
        (dict(attention_px=(2,)), r"sides \[8, 4\]"),
        (dict(head_width=5), "head_width"),
        (dict(attention_px=()), "need attention_px"),
        (dict(channel_mults=()), "channel_mults"),
        (dict(remat="some"), "none, full"),
        (dict(predicts="noise"), "eps, x_0, v"),
        (dict(context_width=8), "the width of the text encoder"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        config(**changes)


def test_the_flat_section_of_a_config_fills_the_text_encoder(root):
    config = cfg.load(f"{root}/configs/decoder.py:size=smoke")
    changes = {"model.text_width": 32, "model.text_layers": 3, "model.text_heads": 4}
    config = cfg.override(config, changes | {"model.remat": "full"})
    c = build.unet(config, clip_width=8).config
    assert c.text_encoder == dataclasses.replace(text_encoder(32, 3, 4), remat="full")
    assert (c.context_width, c.remat, c.text_len) == (32, "full", config.data.text_len)
    c = build.unet(cfg.override(config, {"model.text_layers": 0}), clip_width=8).config
    assert c.text_encoder is None and c.context_len == c.clip_tokens
    with pytest.raises(UsageError, match="width 32 is not a multiple of num_heads 3"):
        build.unet(cfg.override(config, {"model.text_heads": 3}))


def test_a_picture_of_an_odd_size_is_refused_with_the_cure(decoder, rng):
    model, params = decoder
    x, t, cond = inputs(model.config, rng, px=7)
    with pytest.raises(UsageError, match="7 px.*use 6 or 8"):
        model.apply({"params": params}, x, t, cond)
    x, t, cond = inputs(model.config, rng)
    with pytest.raises(ValueError, match=r"this network takes \['clip', 'has_clip', 'text'\]"):
        model.apply({"params": params}, x, t, cond | {"low_res": x})


@pytest.mark.parametrize("changes", [{}, dict(inpaint=True, num_blocks=2, patch_px=2)])
def test_flops_are_those_of_the_traced_network(changes):
    c = config(**changes, attention_px=(4 // changes.get("patch_px", 1),))
    x = jax.ShapeDtypeStruct((1, PX, PX, 3), jnp.float32)
    t, cond = jax.ShapeDtypeStruct((1,), jnp.int32), unet.cond_spec(c, 1, PX)
    traced = flops.hardware(unet.Unet(c).apply, {"params": shapes(c)}, x, t, cond)
    np.testing.assert_allclose(unet.flops(c, PX), traced, rtol=1e-6)
