"""The contrastive loss: symmetric, global, clamped; duplicates, codec pictures, config checks."""

import math
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dalle_jax import axes, tasks
from dalle_jax import config as cfg
from dalle_jax.engine import meshes, sharding
from dalle_jax.models import clip
from dalle_jax.planning import hlo
from dalle_jax.tasks import captions
from dalle_jax.types import UsageError

LIMIT = clip.MAX_LOGIT_SCALE
contrastive = jax.jit(tasks.clip.contrastive)


def unit_rows(rng, n=16, e=8):
    x = rng.normal(size=(n, e)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def tiny_config(root, **overrides):
    small = {
        "data.batch": 8, "data.eval_batch": 8, "data.image_px": 16, "data.text_len": 8,
        "data.vocab_size": 64, "model.image_width": 32, "model.text_width": 32,
    }  # fmt: skip
    return cfg.override(cfg.load(f"{root}/configs/clip.py:size=smoke"), small | overrides)


def test_loss_is_the_mean_of_both_cross_entropies(rng):
    image, text, scale = unit_rows(rng), unit_rows(rng), 2.0
    got, metrics = contrastive(image, text, jnp.float32(scale))
    logits = np.exp(scale) * image.astype(np.float64) @ text.T.astype(np.float64)
    rows = np.log(np.exp(logits).sum(1)) - np.diag(logits)
    columns = np.log(np.exp(logits).sum(0)) - np.diag(logits)
    np.testing.assert_allclose(got, (rows.mean() + columns.mean()) / 2, rtol=1e-5)
    right = (logits.argmax(1) == np.arange(16)).mean()
    np.testing.assert_allclose(metrics["accuracy_image_to_text"], right, rtol=1e-6)
    np.testing.assert_allclose(metrics["logit_scale"], np.exp(scale), rtol=1e-6)


def test_loss_is_symmetric_under_swap(rng):
    image, text = unit_rows(rng), unit_rows(rng)
    one, a = contrastive(image, text, jnp.float32(2.0))
    two, b = contrastive(text, image, jnp.float32(2.0))
    np.testing.assert_allclose(one, two, rtol=1e-6)
    assert a["accuracy_image_to_text"] == b["accuracy_text_to_image"]


def test_sharded_loss_and_gradient_are_the_unsharded_ones(rng):
    """Negatives come from the whole batch, not from a device's own part of it."""
    image, text, tokens = unit_rows(rng, 32), unit_rows(rng, 32), rng.integers(4, 9, (32, 2))

    def loss(image, text, tokens):
        return contrastive(image, text, jnp.float32(3.0), tokens)[0]

    grad = jax.value_and_grad(loss, argnums=(0, 1))
    expected, wanted = jax.jit(grad)(image, text, tokens)
    mesh_config = cfg.ConfigDict(dict(data=4, fsdp=2, tensor=1, rules="dp"))
    mesh = meshes.make_mesh(mesh_config)
    split = NamedSharding(mesh, PartitionSpec((axes.DATA, axes.FSDP)))
    with sharding.use(mesh, sharding.rules(mesh_config)):
        compiled = jax.jit(grad, in_shardings=(split,) * 3, out_shardings=(None, (split, split)))
        got, gradient = compiled(*jax.device_put((image, text, tokens), split))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    for a, b in zip(gradient, wanted, strict=True):
        assert len(a.sharding.device_set) == 8
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_only_embeddings_travel(rng):
    """B x E numbers are gathered, their gradient comes back; no picture's row of B logits moves."""
    batch, joint = 64, 8
    image, text = unit_rows(rng, batch, joint), unit_rows(rng, batch, joint)
    tokens = rng.integers(4, 9, (batch, 2))
    mesh_config = cfg.ConfigDict(dict(data=2, fsdp=4, tensor=1, rules="fsdp"))
    mesh = meshes.make_mesh(mesh_config)
    split = sharding.batch_sharding(mesh)

    def loss(image, text, tokens):
        return contrastive(image, text, jnp.float32(3.0), tokens)

    with sharding.use(mesh, sharding.rules(mesh_config)):
        grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        step = jax.jit(grad, in_shardings=(split,) * 3, out_shardings=(None, (split, split)))
        program = step.lower(image, text, tokens).compile().as_text()
    moved = hlo.collectives(program, mesh.shape)
    large = [(c.kind, c.axis) for c in moved if math.prod(c.shape) > 2 * batch]
    assert max(math.prod(c.shape) for c in moved) == batch * joint
    assert large.count(("all-gather", "data+fsdp")) == 1 and len(large) == 2


def test_identical_captions_are_not_negatives(rng):
    image, text = unit_rows(rng, 4), unit_rows(rng, 4)
    tokens = np.asarray([[5, 6, 0], [5, 6, 0], [5, 6, 7], [9, 9, 9]], np.int32)
    masked = contrastive(image, text, jnp.float32(1.0), tokens)[0]
    logits = np.e * image @ text.T
    keep = ~((tokens[:, None] == tokens[None]).all(-1) & ~np.eye(4, dtype=bool))
    exp = np.exp(logits) * keep
    rows, columns = (np.log(exp.sum(axis)) - np.diag(logits) for axis in (1, 0))
    np.testing.assert_allclose(masked, (rows.mean() + columns.mean()) / 2, rtol=1e-5)
    # All the same: nothing to tell apart, and nothing that is not a number.
    alone = contrastive(image, text, jnp.float32(1.0), np.full((4, 3), 5, np.int32))[0]
    np.testing.assert_allclose(alone, 0, atol=1e-6)


def test_duplicates_by_hash_are_those_by_comparison(rng):
    tokens = rng.integers(0, 3, (200, 4)).astype(np.int32)
    expected = (tokens[:, None] == tokens[None]).all(-1) & ~np.eye(200, dtype=bool)
    np.testing.assert_array_equal(jax.jit(captions.duplicates)(tokens), expected)
    # Permuted and shifted captions, on which a plain sum would collide.
    tokens = np.asarray([[4, 5, 6], [6, 5, 4], [5, 4, 6], [3, 6, 6]], np.int32)
    assert not np.asarray(jax.jit(captions.duplicates)(tokens)).any()


def test_temperature_is_clamped_at_100():
    np.testing.assert_allclose(np.exp(tasks.clip.clamp(jnp.float32(9.0))), 100, rtol=1e-5)
    assert tasks.clip.clamp(jnp.float32(1.5)) == 1.5


def test_stored_temperature_stays_at_the_bound_and_can_come_back():
    """As the paper's clamp after each step: an outward push is dropped, an inward one works."""
    lr = 0.02
    optimiser = optax.adam(lr)

    @jax.jit
    def step(scale, state, target):
        gradient = jax.grad(lambda s: (tasks.clip.clamp(s) - target) ** 2)(scale)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(scale, updates), state

    def run(scale, target, steps):
        state = optimiser.init(scale)
        path = []
        for _ in range(steps):
            scale, state = step(scale, state, target)
            path.append(float(scale))
        return path

    outwards = run(jnp.float32(4.3), 10.0, 150)
    # Momentum goes on for 1 / (1 - beta1) = 10 steps at most, then the pull back sets in.
    assert max(outwards) < LIMIT + 10 * lr and outwards[-1] < max(outwards)
    assert run(jnp.float32(LIMIT), 3.0, 150)[-1] < 3.5


def test_decay_leaves_gains_biases_and_temperature_alone(root):
    task = tasks.clip.make(tiny_config(root))
    params = nn.meta.unbox(jax.eval_shape(task.init, jax.random.key(0))[0])
    mask = task.decay_mask(params)
    assert mask["text"]["tokens"] and mask["image"]["patch_embed"] and mask["text"]["projection"]
    blocks = mask["image"]["transformer"]["blocks"]
    assert blocks["attn"]["q"] and blocks["mlp"]["up"]
    assert not (blocks["attn"]["q_bias"] or blocks["norm_mlp"]["scale"] or mask["logit_scale"])
    assert not (mask["image"]["class_embed"] or mask["image"]["norm_pre"]["bias"])


def test_a_tiny_clip_learns_eight_pairs(root, rng):
    task = tasks.clip.make(tiny_config(root))
    batch = {
        "image": rng.integers(0, 256, (8, 16, 16, 3)).astype(np.uint8),
        "text": np.concatenate(
            [np.full((8, 1), 2), rng.integers(4, 64, (8, 3)), np.full((8, 1), 3), np.zeros((8, 3))],
            axis=1,
        ).astype(np.int32),
    }
    for name, spec in task.batch_spec.items():
        assert (batch[name].shape, batch[name].dtype) == (spec.shape, spec.dtype)
    params, extra = jax.jit(task.init)(jax.random.key(0))
    params = nn.meta.unbox(params)
    optimiser = optax.adam(3e-3)
    state = optimiser.init(params)

    @jax.jit
    def step(params, state):
        (value, _), gradient = jax.value_and_grad(task.loss, has_aux=True)(
            params, extra, None, batch, jax.random.key(1), 0
        )
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    for _ in range(60):
        params, state, value = step(params, state)
    assert value < 0.3, f"loss {value} after 60 steps on 8 pairs; chance is {np.log(8):.2f}"
    metrics = jax.jit(task.evaluate)(params, extra, None, batch, jax.random.key(2))
    assert metrics["recall1_text_to_image"] == 1 and metrics["recall1_chance"] == 1 / 8
    (grid,) = task.preview(params, extra, None, batch, jax.random.key(3)).values()
    assert grid.shape == (6 * 5, 16, 16, 3)
    np.testing.assert_array_equal(grid[0], grid[1])  # its own picture matches best


def test_a_share_of_the_pictures_goes_through_the_codec(rng):
    codec = types.SimpleNamespace(
        encode_fn=lambda params, x: x, decode_fn=lambda params, codes: codes * params
    )
    pictures = rng.uniform(0.1, 1, (16, 4, 4, 3)).astype(np.float32)
    got = np.asarray(tasks.clip.reconstruct_some(codec, -1.0, jnp.asarray(pictures), 0.5))
    changed = (got != pictures).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(got[changed], -pictures[changed])
    # Evenly spread: each of 8 devices has one.
    np.testing.assert_array_equal(changed.reshape(8, 2).sum(axis=1), 1)
    assert tasks.clip.reconstruct_some(codec, -1.0, pictures, 0.0) is pictures


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"data.add_bos_eos": False}, "add_bos_eos=true"),
        ({"loss.recon_prob": 0.5}, "stages.dvae=DIR"),
        ({"loss.recon_prob": 1.5}, "not in"),
        ({"data.batch": 1}, "no negatives"),
        ({"data.image_px": 20}, "image_px=16"),
        ({"init_from": "nowhere"}, "does not exist"),
    ],
)
def test_values_that_do_not_fit_are_refused(root, overrides, says):
    with pytest.raises(UsageError, match=says):
        tasks.clip.make(tiny_config(root, **overrides))


def test_a_tokenizer_beyond_the_embedding_is_refused(root):
    with pytest.raises(UsageError, match="vocab_size=99"):
        tasks.clip.make(tiny_config(root), lambda: types.SimpleNamespace(vocab_size=99))


def test_unknown_size_is_refused(root):
    with pytest.raises(UsageError, match="b32"):
        cfg.load(f"{root}/configs/clip.py:size=huge")
