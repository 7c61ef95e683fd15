"""The dVAE: the released network, the paper's objective, its exact descent from a VQ-VAE."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dalle_jax.engine import flops
from dalle_jax.models import dvae, vqvae
from dalle_jax.nn import codec_bodies, quantize
from dalle_jax.types import DtypePolicy, UsageError

PAPER = dvae.DvaeConfig(
    trunk="pyramid",
    image_px=256,
    halvings=3,
    width=256,
    num_blocks=2,
    num_codes=8192,
    n_init=128,
    likelihood="logit_laplace",
    kl_weight=6.6,
)
TINY = dvae.DvaeConfig(
    image_px=8, halvings=1, width=8, num_blocks=1, num_codes=12, temperature_steps=10
)
TINY_PYRAMID = dataclasses.replace(
    TINY, trunk="pyramid", width=4, n_init=6, likelihood="logit_laplace"
)


def _images(rng, c, n=2):
    return jnp.asarray(rng.uniform(-1, 1, (n, c.image_px, c.image_px, 3)), jnp.float32)


def _init(c, key, cls=dvae.Dvae):
    """Weights by numpy: compiling an init of threefry normals takes longer than all else here."""
    model = cls(c)
    image = jnp.zeros((1, c.image_px, c.image_px, 3))
    variables = nn.meta.unbox(jax.eval_shape(model.init, key, image))
    normal = np.random.default_rng(1).normal

    def fill(leaf):
        fan_in = max(1, np.prod(leaf.shape[:-1]))
        return jnp.asarray(normal(size=leaf.shape) / fan_in**0.5, leaf.dtype)

    params = jax.tree.map(fill, variables.pop("params"))
    return model, params, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), variables)


def _apply(model, variables, x, method):
    return jax.jit(functools.partial(model.apply, method=method))(variables, x)


def _loss(module, model, *args):
    return jax.jit(functools.partial(module.loss, model))(*args)


def _size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_the_paper_config_has_the_released_parameter_counts(key):
    model = dvae.Dvae(PAPER, DtypePolicy(compute=jnp.bfloat16))
    params = jax.eval_shape(model.init, key, jnp.zeros((1, 256, 256, 3)))["params"]
    assert _size(params["encoder"]) + _size(params["encoder_head"]) == 53_786_240
    assert _size(params["decoder_stem"]) + _size(params["decoder"]) == 43_829_766
    logits = jax.eval_shape(
        lambda p, x: model.apply({"params": p}, x, method="logits"),
        nn.meta.unbox(params),
        jnp.zeros((2, 256, 256, 3)),
    )
    assert logits.shape == (2, 32, 32, 8192)
    assert logits.dtype == jnp.float32


def _conv(x, p):
    """Same-padded correlation by explicit loops over the kernel, float64."""
    w, b = np.asarray(p["kernel"], np.float64), np.asarray(p["bias"], np.float64)
    k = w.shape[0]
    h = x.shape[1]
    padded = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    out = np.zeros((*x.shape[:3], w.shape[-1])) + b
    for i in range(k):
        for j in range(k):
            out += padded[:, i : i + h, j : j + h] @ w[i, j]
    return out


def _group(x, params, number, blocks, gain):
    for i in range(blocks):
        p = params[f"group_{number}_block_{i + 1}"]
        path = x
        for j in range(4):
            path = _conv(np.maximum(path, 0), p[f"conv_{j + 1}"])
        x = (_conv(x, p["identity"]) if "identity" in p else x) + gain * path
    return x


def test_the_pyramid_is_the_released_network(key, rng):
    """Against numpy written from openai/DALL-E's encoder.py and decoder.py."""
    c = dataclasses.replace(TINY_PYRAMID, num_blocks=2)
    model, params, _ = _init(c, key)
    kernels = {
        body: [
            params[body]["group_1_block_1"][f"conv_{i}"]["kernel"].shape[0] for i in (1, 2, 3, 4)
        ]
        for body in ("encoder", "decoder")
    }
    assert kernels == {"encoder": [3, 3, 3, 1], "decoder": [1, 3, 3, 3]}
    images = _images(rng, c)
    gain = 1 / 4**2  # two groups of two blocks

    x = np.asarray(images, np.float64) * 0.5 + 0.5
    x = _conv(0.8 * x + 0.1, params["encoder"]["input"])
    x = _group(x, params["encoder"], 1, 2, gain)
    x = x.reshape(2, 4, 2, 4, 2, -1).max((2, 4))
    x = _group(x, params["encoder"], 2, 2, gain)
    logits = _conv(np.maximum(x, 0), params["encoder_head"])
    got = _apply(model, {"params": params}, images, method="logits")
    np.testing.assert_allclose(got, logits, rtol=1e-3, atol=1e-4)

    codes = logits.argmax(-1)
    np.testing.assert_array_equal(_apply(model, {"params": params}, images, method="encode"), codes)
    x = _conv(np.eye(c.num_codes)[codes], params["decoder_stem"])
    x = _group(x, params["decoder"], 1, 2, gain)
    x = x.repeat(2, 1).repeat(2, 2)
    x = _group(x, params["decoder"], 2, 2, gain)
    out = _conv(np.maximum(x, 0), params["decoder"]["output"])
    pixels = np.clip((1 / (1 + np.exp(-out[..., :3])) - 0.1) / 0.8, 0, 1)
    got = _apply(model, {"params": params}, jnp.asarray(codes), method="decode_codes")
    np.testing.assert_allclose(got, 2 * pixels - 1, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("c", [TINY, TINY_PYRAMID], ids=["patch", "pyramid"])
def test_hard_codes_decode_like_one_hot_soft_codes(key, rng, c):
    model, params, _ = _init(c, key)
    codes = jnp.asarray(rng.integers(0, c.num_codes, (2, c.grid, c.grid)))
    soft = _apply(
        model, {"params": params}, jax.nn.one_hot(codes, c.num_codes), method="decode_soft"
    )
    hard = _apply(model, {"params": params}, codes, method="decode_codes")
    np.testing.assert_allclose(hard, dvae.to_images(soft, c.likelihood), atol=1e-6)
    assert hard.shape == (2, c.image_px, c.image_px, 3)
    assert (jnp.abs(hard) <= 1).all()


def test_logit_laplace_against_numpy(rng):
    images = rng.uniform(-1, 1, (2, 4, 4, 3)).astype(np.float32)
    images[0, 0, 0] = [-1, 0, 1]  # the ends are finite
    out = rng.normal(size=(2, 4, 4, 6)).astype(np.float32)
    x = 0.1 + 0.8 * (images.astype(np.float64) / 2 + 0.5)
    mu, b = out[..., :3].astype(np.float64), np.exp(out[..., 3:].astype(np.float64))
    density = np.exp(-np.abs(np.log(x / (1 - x)) - mu) / b) / (2 * b * x * (1 - x))
    got = dvae.negative_log_likelihood(out, images, "logit_laplace")
    np.testing.assert_allclose(got, -np.log(density).mean(), rtol=1e-5)


def test_logit_laplace_is_a_density():
    """Its integral over (0, 1) is 1: the Jacobian 1 / (x (1 - x)) is there."""
    x = np.linspace(1e-5, 1 - 1e-5, 40_001)
    pixels = ((x - 0.1) / 0.8 * 2 - 1).astype(np.float32)
    out = jnp.asarray([0.4, 0.4, 0.4, -0.5, -0.5, -0.5]).reshape(1, 1, 1, 6)

    def nll(pixel):  # a mean over three equal channels is one channel's value
        image = jnp.full((1, 1, 1, 3), pixel)
        return dvae.negative_log_likelihood(out, image, "logit_laplace")

    density = np.exp(-np.asarray(jax.jit(jax.vmap(nll))(pixels), np.float64))
    assert abs(np.trapezoid(density, x) - 1) < 2e-3


def test_to_images_inverts_map_pixels(rng):
    images = rng.uniform(-1, 1, (1, 4, 4, 3)).astype(np.float32)
    x = dvae.map_pixels(images)
    assert x.min() >= 0.1 and x.max() <= 0.9
    out = np.concatenate([np.log(x / (1 - x)), np.zeros_like(x)], -1)
    np.testing.assert_allclose(dvae.to_images(out, "logit_laplace"), images, atol=1e-5)


def test_the_loss_is_normalised_as_in_the_paper(key, rng):
    """nll / (h w 3) + beta * (sum over positions of KL) / (h w 3)."""
    c = dataclasses.replace(TINY_PYRAMID, kl_weight=3.0)
    model, params, extra = _init(c, key)
    images = _images(rng, c)
    total, metrics, _ = _loss(dvae, model, params, extra, images, key, jnp.int32(5))
    logits = np.asarray(_apply(model, {"params": params}, images, method="logits"), np.float64)
    q = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    kl = (q * np.log(q * c.num_codes)).sum(-1)  # [B, g, g]
    np.testing.assert_allclose(metrics["kl"], kl.mean(), rtol=1e-3, atol=1e-5)
    weight = 3.0  # kl_steps 0: no ramp
    expected = float(metrics["recon"]) + weight * kl.sum((1, 2)).mean() / (8 * 8 * 3)
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_the_kl_is_per_position_not_of_the_mean():
    """Two positions sure of different codes: KL ln V each, though their mean is uniform."""
    logits = jnp.eye(2) * 1e3
    np.testing.assert_allclose(quantize.kl_to_uniform(logits).mean(), np.log(2), rtol=1e-6)


def test_entropy_bonus_pushes_the_mean_distribution_apart(key, rng):
    c = dataclasses.replace(TINY, entropy_bonus=0.5, kl_weight=0.0)
    model, params, extra = _init(c, key)
    images = _images(rng, c)
    with_bonus, metrics, _ = _loss(dvae, model, params, extra, images, key, jnp.int32(0))
    logits = _apply(model, {"params": params}, images, method="logits")
    mean = np.asarray(jax.nn.softmax(logits)).mean((0, 1, 2))
    np.testing.assert_allclose(
        with_bonus, metrics["recon"] + 0.5 * (mean * np.log(mean)).sum(), rtol=1e-4
    )


def test_schedules_are_cosine():
    for step, expected in ((0, 1.0), (25, 0.5 + 0.5 * np.cos(np.pi / 4)), (50, 0.5), (100, 0.0)):
        np.testing.assert_allclose(dvae.cosine(1.0, 0.0, 100, jnp.int32(step)), expected, atol=1e-6)
    assert dvae.cosine(1.0, 0.25, 100, jnp.int32(1000)) == 0.25
    assert dvae.cosine(0.0, 6.6, 0, jnp.int32(0)) == np.float32(6.6)
    np.testing.assert_allclose(dvae.cosine(1, 1 / 16, 150_000, jnp.int32(150_000)), 1 / 16)


def test_gradients_reach_every_weight(key, rng):
    model, params, extra = _init(TINY, key)
    images = _images(rng, TINY)
    loss = jax.jit(jax.grad(lambda p: dvae.loss(model, p, extra, images, key, jnp.int32(0))[0]))
    grads = loss(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path


@pytest.mark.parametrize("trunk", ["patch", "pyramid"])
def test_a_dvae_made_from_a_vqvae_has_its_codes_and_pictures(key, rng, trunk):
    size = dict(trunk=trunk, image_px=8, halvings=1, width=8, num_blocks=1, num_codes=24)
    model, params, extra = _init(vqvae.VqvaeConfig(code_dim=6, **size), key, vqvae.Vqvae)
    images = _images(rng, model.config, 8)
    extra = _loss(vqvae, model, params, extra, images, key, jnp.int32(0))[2]
    variables = {"params": params, **extra}
    codes = _apply(model, variables, images, method="encode")
    assert len(np.unique(codes)) > 8

    ours = dvae.from_vqvae(jax.device_get(params), np.asarray(extra["codebook"]["vectors"]))
    soft = dvae.Dvae(dvae.DvaeConfig(**size))
    expected = nn.meta.unbox(jax.eval_shape(soft.init, key, images))["params"]
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, expected)
    np.testing.assert_array_equal(_apply(soft, {"params": ours}, images, method="encode"), codes)
    np.testing.assert_allclose(
        _apply(soft, {"params": ours}, codes, method="decode_codes"),
        _apply(model, variables, codes, method="decode_codes"),
        atol=1e-5,
    )


@pytest.mark.parametrize("c", [TINY, TINY_PYRAMID, PAPER], ids=["patch", "pyramid", "paper"])
def test_macs_are_those_of_the_traced_forward_pass(key, c):
    model = dvae.Dvae(c)
    image = jax.ShapeDtypeStruct((1, c.image_px, c.image_px, 3), jnp.float32)
    params = nn.meta.unbox(jax.eval_shape(model.init, key, image))

    def forward(params, image):
        logits = model.apply(params, image, method="logits")
        return model.apply(params, jax.nn.softmax(logits), method="decode_soft")

    assert flops.hardware(forward, params, image) == 2 * dvae.forward_macs(c)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("image_px", 9, ["9", "8 or 10"]),
        ("trunk", "resnet", ["resnet", "pyramid"]),
        ("likelihood", "l1", ["l1", "logit_laplace"]),
        ("num_codes", 1, ["num_codes 1"]),
        ("n_init", 5, ["n_init 5", "8"]),
        ("temperature_end", 0.0, ["temperature_end"]),
        ("kl_weight", -1.0, ["kl_weight -1.0"]),
        ("halvings", 0, ["halvings 0"]),
    ],
)
def test_bad_sizes_are_refused_with_the_cure(field, value, words):
    with pytest.raises(UsageError) as error:
        dataclasses.replace(TINY, **{field: value})
    for word in words:
        assert word in str(error.value)


def test_a_side_below_one_code_names_the_smallest():
    with pytest.raises(UsageError, match="use 8"):
        codec_bodies.check_image_px(4, 3)
