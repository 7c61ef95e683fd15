"""Drawing embeddings: equal to the uncached networks, to itself in parts, and on 8 devices."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from dalle_jax.diffusion import samplers, schedules
from dalle_jax.engine import meshes, sharding
from dalle_jax.models import prior_ar, prior_diffusion
from dalle_jax.nn.transformer import TransformerConfig
from dalle_jax.sampling import prior
from dalle_jax.stages import pca
from dalle_jax.types import UsageError

B, E, K, V = 8, 6, 5, 7
STACK = TransformerConfig(width=16, num_layers=2, num_heads=2, activation="gelu")
SIZES = dict(text_len=4, vocab_size=12, joint_width=E, transformer=STACK, embed_std=0.5)
KEY = jax.random.key(5)


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


RNG = np.random.default_rng(0)
TEXT = RNG.integers(1, 12, (B, 4), np.int32)
Z_T = unit(RNG.normal(size=(B, E)))
PCA = pca.fit(
    unit(RNG.normal(size=(200, E))), unit(RNG.normal(size=(200, E))), num_dims=K, num_buckets=V
)


def grown(params, *names):
    """Untrained, its outputs scaled up: a flat distribution would hide a wrong context."""
    params = nn.meta.unbox(params)["params"]
    return params | {name: params[name] * 12 for name in names}


@pytest.fixture(scope="module")
def ar():
    model = prior_ar.ArPrior(prior_ar.ArPriorConfig(**SIZES, num_dims=K, num_buckets=V))
    zeros = np.zeros((B, K), np.int32)
    params = jax.jit(model.init)(jax.random.key(0), TEXT, Z_T, zeros[:, 0], zeros)
    return model, grown(params, "head"), PCA.tables()


@pytest.fixture(scope="module")
def diffusion():
    model = prior_diffusion.DiffusionPrior(prior_diffusion.DiffusionPriorConfig(**SIZES))
    params = jax.jit(model.init)(jax.random.key(0), TEXT, Z_T, Z_T, TEXT[:, 0])
    return model, grown(params, "out")


def draw_ar(ar, text=TEXT, z_t=Z_T, **options):
    return np.asarray(prior.sample_ar(*ar, text, z_t, key=KEY, **options))


def draw_diffusion(diffusion, text=TEXT, z_t=Z_T, **options):
    options = dict(steps=3, num_samples=2) | options
    return np.asarray(prior.sample_diffusion(*diffusion, text, z_t, key=KEY, **options))


# Everything at once; few combinations, because each is a program to compile.
FULL = dict(num_samples=2, temperature=0.7, top_k=5, top_p=0.9)
ONE_STEP = dict(steps=1, sampler="ddim", num_samples=1)


def test_cached_ar_equals_uncached(ar):
    z = draw_ar(ar, guidance_scale=2.5, **FULL)
    assert z.shape == (B, E) and len(np.unique(z.round(4), axis=0)) > 4
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-5)
    uncached = draw_ar(ar, guidance_scale=2.5, use_cache=False, **FULL)
    np.testing.assert_allclose(z, uncached, atol=1e-6)


def test_greedy_ar_follows_the_logits(ar):
    """Every dimension is the argmax of the training-time logits, given a dot product in range."""
    model, params, tables = ar
    z = draw_ar(ar, temperature=0.0, dot_range=(5 / 7, 6 / 7))
    dims = np.stack([np.asarray(_nearest(tables, z, k)) for k in range(K)], axis=1)
    logits = model.apply({"params": params}, TEXT, Z_T, np.full(B, 5), dims)
    np.testing.assert_array_equal(dims, np.argmax(logits, axis=-1))


def _nearest(tables, z, k):
    """The levels behind a unit vector: its length before normalisation follows from the mean."""
    along = (z[:, None, :] * _length(tables, z)[:, None, None] - tables["mean"]) @ tables[
        "components"
    ][k]
    return np.abs(along - tables["levels"][k]).argmin(axis=1)


def _length(tables, z):
    """|mean + sum of components|: what is orthogonal to all components comes from the mean."""
    rest = np.eye(E) - tables["components"].T @ tables["components"]
    return (tables["mean"] @ rest @ tables["mean"]) / (z @ rest @ tables["mean"])


def test_diffusion_runs_the_whole_network_with_a_shared_stem(diffusion):
    """One DDIM step from pure noise is the network's own estimate there, guided or not."""
    model, params = diffusion
    c = model.config
    table = schedules.respace(schedules.make(c.schedule, c.num_steps), 1)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(KEY, i), 0))(np.arange(B))
    noise = samplers.start(table, keys, (E,))
    run = jax.jit(model.apply)
    t = np.full(B, table.timesteps[0])
    given = run({"params": params}, TEXT, Z_T, noise, t)
    null = run({"params": params}, TEXT, Z_T, noise, t, np.ones(B, bool))
    for scale in (1.0, 3.0):
        expected = np.asarray(null + scale * (given - null))
        z = draw_diffusion(diffusion, guidance_scale=scale, **ONE_STEP)
        np.testing.assert_allclose(z, unit(expected), atol=2e-5)


def test_guidance_one_is_unguided_and_zero_ignores_the_text(ar, diffusion):
    """The test above covers guidance 1 for the diffusion prior."""
    plain = draw_ar(ar)
    np.testing.assert_array_equal(draw_ar(ar, guidance_scale=1.0), plain)
    assert np.abs(draw_ar(ar, text=TEXT[::-1]) - plain).max() > 1e-3
    # The text embedding chooses among several samples, so it is the same in all rows.
    z_t = np.broadcast_to(Z_T[:1], Z_T.shape)
    for sample, network, options in (
        (draw_ar, ar, FULL),
        (draw_diffusion, diffusion, ONE_STEP),
    ):
        texts = [
            sample(network, text=text, z_t=z_t, guidance_scale=0.0, **options)
            for text in (TEXT, TEXT[::-1])
        ]
        np.testing.assert_allclose(*texts, atol=1e-6)


@pytest.mark.parametrize("kind", ["ar", "diffusion"])
def test_drawn_the_same_in_other_company_and_on_eight_devices(kind, request):
    network = request.getfixturevalue(kind)
    if kind == "ar":
        sample, options = prior.sample_ar, FULL | dict(guidance_scale=2.5)
    else:
        sample, options = prior.sample_diffusion, dict(steps=3)
    together = sample(*network, TEXT, Z_T, key=KEY, **options)
    # Prompts 4 to 7 with others after them.
    rolled = np.roll(TEXT, 4, 0), np.roll(Z_T, 4, 0)
    part = sample(*network, *rolled, key=KEY, first=4, **options)
    np.testing.assert_allclose(part[:4], together[4:], atol=2e-6)
    split = jax.device_put((TEXT, Z_T), sharding.batch_sharding(meshes.local()))
    spread = sample(*network, *split, key=KEY, **options)
    assert len(spread.sharding.device_set) == 8
    np.testing.assert_allclose(spread, together, atol=2e-6)


def test_the_draw_nearest_to_the_text_is_kept():
    z = unit(RNG.normal(size=(B, 3, E)))
    best = np.argmax(np.sum(z * Z_T[:, None], axis=-1), axis=1)
    np.testing.assert_array_equal(prior._best(z, Z_T), z[np.arange(B), best])
    np.testing.assert_array_equal(prior._best(z[:, :1], Z_T), z[:, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "euler"}, "sampler 'euler' is unknown"),
        ({"eta": 2.0}, "eta=2.0"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0"),
        ({"steps": 2000}, "asks for 2000"),
    ],
)
def test_options_out_of_range_are_refused(diffusion, options, message):
    with pytest.raises(UsageError, match=message):
        draw_diffusion(diffusion, **options)


def test_ar_options_out_of_range_are_refused(ar):
    for options, message in (
        ({"top_k": V + 1}, "top_k"),
        ({"dot_range": (0.8, 0.2)}, "dot_range"),
        ({"temperature": -1.0}, "temperature"),
    ):
        with pytest.raises(UsageError, match=message):
            draw_ar(ar, **options)
