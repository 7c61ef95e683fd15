"""Both priors: who sees what, what dropping means, scales, sizes of the paper."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax import config as cfg
from dalle_jax import tasks
from dalle_jax.models import prior_ar, prior_diffusion
from dalle_jax.nn import condition
from dalle_jax.nn.transformer import TransformerConfig
from dalle_jax.types import UsageError

STACK = TransformerConfig(width=16, num_layers=2, num_heads=2, activation="gelu")
SIZES = dict(text_len=4, vocab_size=12, joint_width=8, transformer=STACK, embed_std=0.5)
DIFFUSION = prior_diffusion.DiffusionPriorConfig(**SIZES)
AR = prior_ar.ArPriorConfig(**SIZES, num_dims=5, num_buckets=6)
TEXT = np.array([[2, 7, 3, 0], [2, 5, 6, 3]], np.int32)
DOT, DIMS = np.array([1, 4]), np.array([[0, 1, 2, 3, 4], [5, 4, 3, 2, 1]])
T = np.array([10, 900])


def unit(seed, shape=(2, 8)):
    x = np.random.default_rng(seed).normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def diffusion():
    model = prior_diffusion.DiffusionPrior(DIFFUSION)
    params = jax.jit(model.init)(jax.random.key(0), TEXT, unit(0), unit(1), T)
    return model, nn.meta.unbox(params)


@pytest.fixture(scope="module")
def ar():
    model = prior_ar.ArPrior(AR)
    return model, nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), TEXT, unit(0), DOT, DIMS))


def test_a_dimension_is_predicted_from_earlier_ones_alone(ar):
    """By zero gradient: of each place's logits with respect to each token's embedding."""
    model, params = ar

    def logits(tail):
        def run(m):
            stem = m.stem(TEXT[:1], unit(0)[:1])
            return m.logits(m.transformer(jnp.concatenate([stem, tail[None]], axis=1)))

        return nn.apply(run, model)(params)[0].sum(axis=-1)  # [K]

    tail = jax.random.normal(jax.random.key(1), (AR.num_dims, STACK.width))
    reach = jnp.abs(jax.jit(jax.jacrev(logits))(tail)).max(axis=-1) > 0
    # Row k, the prediction of dimension k, sees the dot product and dimensions before k.
    np.testing.assert_array_equal(reach, np.tril(np.ones((5, 5), bool)))


def test_ar_logits_depend_on_caption_embedding_and_dot(ar):
    model, params = ar
    run = jax.jit(model.apply)
    logits = run(params, TEXT, unit(0), DOT, DIMS)
    assert logits.shape == (2, 5, 6) and logits.dtype == np.float32
    for other in ((TEXT[::-1], unit(0), DOT), (TEXT, unit(2), DOT), (TEXT, unit(0), DOT + 1)):
        assert np.abs(run(params, *other, DIMS) - logits).max() > 1e-3
    last = DIMS.copy()
    last[:, -1] = 0  # it is predicted, not read
    np.testing.assert_array_equal(run(params, TEXT, unit(0), DOT, last), logits)


def test_dropped_text_is_really_gone(ar, diffusion):
    """Row 0 is dropped: neither caption nor z_t (nor the dot product) changes it; row 1 is not."""
    dropped = np.array([True, False])
    other = (TEXT[:, ::-1], unit(3))
    model, params = diffusion
    run = jax.jit(model.apply)
    a = run(params, TEXT, unit(0), unit(1), T, dropped)
    b = run(params, *other, unit(1), T, dropped)
    np.testing.assert_array_equal(a[0], b[0])
    assert np.abs(a[1] - b[1]).max() > 1e-3
    model, params = ar
    run = jax.jit(model.apply)
    a = run(params, TEXT, unit(0), DOT, DIMS, dropped)
    b = run(params, *other, DOT[::-1], DIMS, dropped)
    np.testing.assert_array_equal(a[0], b[0])
    assert np.abs(a[1] - b[1]).max() > 1e-3
    undropped = run(params, TEXT, unit(0), DOT, DIMS, np.array([False, False]))
    np.testing.assert_allclose(undropped[1], a[1], atol=1e-5)
    assert np.abs(undropped[0] - a[0]).max() > 1e-3


def test_diffusion_output_sees_all_of_the_stream(diffusion):
    model, params = diffusion
    run = jax.jit(model.apply)
    x_0 = run(params, TEXT, unit(0), unit(1), T)
    assert x_0.shape == (2, 8) and x_0.dtype == np.float32
    for other in (
        (TEXT[:, ::-1], unit(0), unit(1), T),
        (TEXT, unit(2), unit(1), T),
        (TEXT, unit(0), unit(2), T),
        (TEXT, unit(0), unit(1), T + 50),
    ):
        assert np.abs(run(params, *other) - x_0).max() > 1e-4


@pytest.mark.parametrize("width", [64, 768, 1024])
def test_scaled_embeddings_have_the_variance_of_pictures(width):
    z = unit(0, (200, width)) * condition.embedding_scale(width)
    np.testing.assert_allclose(z.std(), 0.5375, rtol=2e-3)
    if width == 1024:
        np.testing.assert_allclose(condition.embedding_scale(width), 17.2)


@pytest.mark.parametrize(
    ("name", "blocks", "width"),
    [("prior_diffusion", 1_208_598_528, 2048), ("prior_ar", 797_961_216, 1664)],
)
def test_the_papers_priors_have_its_sizes(root, name, blocks, width):
    config = cfg.load(f"{root}/configs/{name}.py:size=paper")
    task = tasks.make(config, shapes_only=True)
    params = jax.eval_shape(task.init, jax.random.key(0))[0]
    assert sum(x.size for x in jax.tree.leaves(params["transformer"])) == blocks
    # Twelve matrices of width squared per layer, four gains and biases of norms, nine biases.
    assert blocks == 24 * (12 * width**2 + 13 * width)
    frozen = sum(x.size for x in jax.tree.leaves(task.frozen["clip"]))
    assert 985e6 < frozen < 988e6  # ViT-H/16 and its text tower


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (
            DIFFUSION,
            {"transformer": dataclasses.replace(STACK, width=15, num_heads=1)},
            "width=15 is odd",
        ),
        (DIFFUSION, {"num_steps": 0}, "num_steps=0"),
        (AR, {"num_dims": 9}, "num_dims=9; expected 1 to 8"),
        (AR, {"num_buckets": 1}, "num_buckets=1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(config, change, message):
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(config, **change)
