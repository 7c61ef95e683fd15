"""The VQ-VAE: who gets which gradient, and what a step does to the codebook."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dalle_jax.models import vqvae
from dalle_jax.nn import conv, quantize
from dalle_jax.types import DtypePolicy, UsageError

TINY = vqvae.VqvaeConfig(image_px=8, halvings=1, width=8, num_blocks=1, num_codes=12, code_dim=4)
BY_LOSS = dataclasses.replace(TINY, codebook="loss", revive_share=0.0)


def _made(c, key):
    """Weights by numpy: compiling an init of threefry normals takes longer than all else here."""
    model = vqvae.Vqvae(c)
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


def _loss(model, *args):
    return jax.jit(functools.partial(vqvae.loss, model))(*args)


@pytest.fixture
def images(rng):
    return jnp.asarray(rng.uniform(-1, 1, (4, 8, 8, 3)), jnp.float32)


def _grads(c, params, extra, images, key):
    model = vqvae.Vqvae(c)

    def loss(params):
        return vqvae.loss(model, params, extra, images, key, jnp.int32(0))[0]

    return jax.jit(jax.grad(loss))(params)


def test_gradient_routing(key, images):
    """Decoder: term 1. Encoder: terms 1 and 3. Codebook: term 2 alone."""
    model, params, extra = _made(BY_LOSS, key)
    z = _apply(model, {"params": params}, images, method="embed").reshape(-1, 4)
    e = params["codebook"]
    codes = np.asarray(quantize.nearest(z, e))
    grads = {
        beta: _grads(dataclasses.replace(BY_LOSS, commitment=beta), params, extra, images, key)
        for beta in (0.0, 0.25, 0.5)
    }
    for part in ("decoder", "decoder_stem", "codebook"):  # none of them feels the commitment
        jax.tree.map(np.testing.assert_array_equal, grads[0.0][part], grads[0.5][part])
    term_2 = np.zeros_like(e)  # d/de mean (z - e)^2
    np.add.at(term_2, codes, 2 * (np.asarray(e)[codes] - np.asarray(z)) / z.size)
    np.testing.assert_allclose(grads[0.0]["codebook"], term_2, rtol=1e-4, atol=1e-7)
    # The encoder's gradient is linear in beta: term 1 + beta * term 3, and both are there.
    at_0, at_half, at_1 = (grads[b]["encoder_head"]["kernel"] for b in (0.0, 0.25, 0.5))
    assert np.abs(at_0).max() > 0 and np.abs(at_1 - at_0).max() > 0
    np.testing.assert_allclose(at_half, (at_0 + at_1) / 2, rtol=1e-3, atol=1e-6)


def test_the_reconstruction_gradient_passes_straight_through(key, images):
    """Without commitment the encoder is trained as if the decoder's input were its own output."""
    c = dataclasses.replace(TINY, commitment=0.0)
    model, params, extra = _made(c, key)
    extra = _loss(model, params, extra, images, key, jnp.int32(0))[2]
    variables = {"params": params, **extra}
    z = _apply(model, variables, images, method="embed")
    q = extra["codebook"]["vectors"][quantize.nearest(z, extra["codebook"]["vectors"])]

    def expected(params):
        def recon(q):
            out = model.apply(variables, q, method="decode_vectors")
            return jnp.mean(jnp.square(out - images))

        def embed(params):
            return model.apply({**variables, "params": params}, images, method="embed")

        (grads,) = jax.vjp(embed, params)[1](jax.grad(recon)(q))
        return grads

    expected = jax.jit(expected)(params)
    got = _grads(c, params, extra, images, key)
    np.testing.assert_allclose(
        got["encoder_head"]["kernel"], expected["encoder_head"]["kernel"], rtol=1e-4, atol=1e-7
    )


def test_first_step_draws_the_codebook_and_later_steps_move_it(key, images):
    model, params, extra = _made(dataclasses.replace(TINY, revive_share=0.0), key)
    assert extra["codebook"]["ready"] == 0
    _, metrics, first = _loss(model, params, extra, images, key, jnp.int32(0))
    assert first["codebook"]["ready"] == 1
    assert metrics["codes_used"] == 12  # 12 of 64 outputs became codes: each finds itself
    _, _, second = _loss(model, params, first, images, key, jnp.int32(1))
    z = np.asarray(_apply(model, {"params": params, **first}, images, method="embed")).reshape(
        -1, 4
    )
    codes = np.asarray(quantize.nearest(z, first["codebook"]["vectors"]))
    expected = quantize.ema_update(first["codebook"], z, codes, 0.99)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        second["codebook"],
        expected,
    )


def test_revival_stops_at_its_step(key, images):
    c = dataclasses.replace(TINY, revive_share=0.5, revive_steps=10)
    model, params, extra = _made(c, key)
    extra = _loss(model, params, extra, images, key, jnp.int32(0))[2]
    extra["codebook"]["vectors"] = extra["codebook"]["vectors"].at[0].set(1e3)
    extra["codebook"]["total"] = extra["codebook"]["total"].at[0].set(1e-3)
    extra["codebook"]["count"] = extra["codebook"]["count"].at[0].set(1e-6)  # dead
    before = _loss(model, params, extra, images, key, jnp.int32(9))[2]["codebook"]
    after = _loss(model, params, extra, images, key, jnp.int32(10))[2]["codebook"]
    assert before["count"][0] > 0.1
    assert after["count"][0] < 1e-5


def test_the_socket(key, images):
    model, params, extra = _made(TINY, key)
    extra = _loss(model, params, extra, images, key, jnp.int32(0))[2]
    variables = {"params": params, **extra}
    codes = _apply(model, variables, images, method="encode")
    assert codes.shape == (4, 4, 4) and codes.dtype == jnp.int32
    pictures = _apply(model, variables, codes, method="decode_codes")
    assert pictures.shape == images.shape and (jnp.abs(pictures) <= 1).all()
    metrics = jax.jit(functools.partial(vqvae.evaluate, model))(params, extra, images)
    error = np.square(np.asarray(pictures) - np.asarray(images)).mean()
    np.testing.assert_allclose(metrics["psnr"], 10 * np.log10(4 / error), rtol=1e-5)


def test_bfloat16_compute_keeps_codes_float32(key, images):
    _, params, extra = _made(TINY, key)
    model = vqvae.Vqvae(TINY, DtypePolicy(compute=jnp.bfloat16))
    z = jax.eval_shape(
        lambda v, x: model.apply(v, x, method="embed"), {"params": params, **extra}, images
    )
    assert z.dtype == jnp.float32
    total, _, extra = _loss(model, params, extra, images, key, jnp.int32(0))
    assert total.dtype == jnp.float32 and np.isfinite(total)
    assert {v.dtype.name for v in extra["codebook"].values()} == {"float32", "int32"}


def test_patches_are_undone(rng):
    x = jnp.asarray(rng.normal(size=(2, 8, 12, 3)))
    patches = conv.to_patches(x, 4)
    assert patches.shape == (2, 2, 3, 48)
    np.testing.assert_array_equal(conv.from_patches(patches, 4), x)
    np.testing.assert_array_equal(patches[1, 1, 2].reshape(4, 4, 3), x[1, 4:8, 8:12])


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("codebook", "kmeans", ["kmeans", "ema"]),
        ("ema_decay", 1.0, ["ema_decay 1.0"]),
        ("revive_share", 1.5, ["revive_share 1.5"]),
        ("code_dim", 0, ["code_dim 0"]),
        ("codebook", "loss", ["revive_share", "model.revive_share=0"]),  # TINY revives
    ],
)
def test_bad_values_are_refused(field, value, words):
    with pytest.raises(UsageError) as error:
        dataclasses.replace(TINY, **{field: value})
    for word in words:
        assert word in str(error.value)
