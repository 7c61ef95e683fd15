"""The task of both priors: what is trained, on one device and on eight; metrics; refusals."""

import dataclasses
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dalle_jax import config as cfg
from dalle_jax import tasks
from dalle_jax.engine import sharding
from dalle_jax.engine.program import Program
from dalle_jax.models.clip import Clip, ClipConfig
from dalle_jax.nn.transformer import TransformerConfig
from dalle_jax.sampling import prior
from dalle_jax.stages import pca
from dalle_jax.stages.clip import ClipStage
from dalle_jax.stages.prior import PriorStage
from dalle_jax.stages.run import Run
from dalle_jax.types import UsageError

PX, T, VOCAB, E, B = 4, 5, 16, 8, 16
KEY = jax.random.key(1)
TOWER = TransformerConfig(width=16, num_layers=1, num_heads=1)


@pytest.fixture(scope="module")
def clip():
    """An untrained CLIP."""
    config = ClipConfig(
        image_px=PX, text_len=T, vocab_size=VOCAB, patch_px=2, image=TOWER, text=TOWER,
        joint_width=E, pixel_norm=False,
    )  # fmt: skip
    model = Clip(config)
    pictures, text = jnp.zeros((1, PX, PX, 3)), jnp.zeros((1, T), jnp.int32)
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(3), pictures, text))["params"]
    config = cfg.ConfigDict(dict(data=dict(image_px=PX, text_len=T)))
    variables = {"params": jax.tree.map(np.asarray, params)}
    tokenizer = types.SimpleNamespace(model_bytes=b"tok")
    return ClipStage(Run("runs/clip", config, variables, tokenizer, "0123", step=1), model)


@pytest.fixture(scope="module")
def fitted():
    z = np.random.default_rng(1).normal(size=(2, 100, E))
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    return pca.fit(*z, num_dims=4, num_buckets=8, fingerprint="0123")


def tiny(root, kind, **overrides):
    small = {
        "data.batch": B, "data.image_px": PX, "data.text_len": T, "data.vocab_size": VOCAB,
        "model.width": 16, "model.num_layers": 1, "model.num_heads": 1, "stages.clip": "runs/clip",
        "loss.text_drop": 0.5,
    }  # fmt: skip
    path = f"{root}/configs/prior_{kind}.py:size=smoke"
    return cfg.override(cfg.load(path), small | overrides)


def build(root, kind, clip, fitted, **overrides):
    config = tiny(root, kind, **overrides)
    return tasks.prior.assemble(config, clip, None, fitted if kind == "ar" else None)


@pytest.fixture
def batch(rng):
    text = rng.integers(4, VOCAB, (B, T), np.int32)
    text[:, 0], text[:, -1] = 2, 3
    return {"image": rng.integers(0, 256, (B, PX, PX, 3), np.uint8), "text": text}


def on(devices, root, kind, clip, fitted):
    """The program of a run on these devices, the weights scattered over fsdp, and its state."""
    fsdp = 4 if len(devices) > 1 else 1
    # With so large an eps the update is the gradient, not its sign, which rounding can turn.
    changes = {"mesh.fsdp": fsdp, "mesh.rules": "fsdp", "optim.lr": 1.0, "optim.eps": 1.0}
    config = tiny(root, kind, **changes)
    task = tasks.prior.assemble(config, clip, None, fitted if kind == "ar" else None)
    program = Program.build(config, task, devices)
    with program.use():
        state = program.init(jax.device_put(jax.random.key(0), program.replicated))
    return program, state, sharding.place(sharding.unbox(task.frozen), program.frozen_shardings)


def test_eight_devices_train_like_one(root, clip, batch):
    """Same loss and same weights after a step; CLIP and prior lie scattered."""
    weights = []
    for devices in (jax.devices()[:1], jax.devices()):
        program, state, frozen = on(devices, root, "diffusion", clip, None)
        arguments = (
            jax.device_put(batch, program.batch_sharding),
            jax.device_put(KEY, program.replicated),
        )
        with program.use():
            state, metrics = program.step(state, frozen, *arguments)
        shapes = program.folding.unfolded_shapes.params
        params = jax.tree.map(lambda x, t: np.asarray(x).reshape(t.shape), state.params, shapes)
        weights.append((metrics["loss"], params))
    kernel = frozen["clip"]["text"]["tokens"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *weights)


def test_eight_devices_judge_like_one(root, clip, fitted, batch):
    results = []
    for devices in (jax.devices()[:1], jax.devices()):
        program, state, frozen = on(devices, root, "ar", clip, fitted)
        arguments = (
            jax.device_put(batch, program.batch_sharding),
            jax.device_put(KEY, program.replicated),
        )
        with program.use():
            results.append(
                program.evaluate(state.params, state.extra, frozen, *arguments, jnp.int32(0))
            )
    assert results[0].keys() >= {"loss", "accuracy", "cosine", "cosine_text", "retrieval1"}
    for name, value in results[0].items():
        np.testing.assert_allclose(value, results[1][name], atol=1e-4, err_msg=name)


def test_the_clip_gets_no_gradient(root, clip, batch):
    task = build(root, "diffusion", clip, None)
    params = nn.meta.unbox(jax.jit(task.init)(KEY)[0])
    frozen = nn.meta.unbox(task.frozen)

    def loss(frozen):
        return task.loss(params, None, frozen, batch, KEY, jnp.int32(0))[0]

    gradient = jax.jit(jax.grad(loss))(frozen)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_text_is_dropped_by_the_key_in_a_share_of_the_examples(root, clip, batch, monkeypatch):
    """All dropped: captions make no difference to the loss. None dropped: they do."""
    other = dict(batch, text=np.roll(batch["text"], 1, axis=1))
    for share, differs in ((1.0, False), (0.0, True)):
        task = build(root, "diffusion", clip, None, **{"loss.text_drop": share})
        params = nn.meta.unbox(jax.jit(task.init)(KEY)[0])
        frozen = jax.tree.map(jnp.asarray, nn.meta.unbox(task.frozen))
        run = jax.jit(lambda batch, task=task, params=params, frozen=frozen: task.loss(
            params, None, frozen, batch, KEY, jnp.int32(0)
        )[0])  # fmt: skip
        assert (run(batch) != run(other)) == differs


def test_a_small_prior_learns_a_linear_map(root, clip, rng):
    """z_i = a rotation of z_t: drawn embeddings find it, the text embedding itself does not."""
    task = build(root, "diffusion", clip, None, **{"model.width": 32})
    rotation = np.linalg.qr(rng.normal(size=(E, E)))[0].astype(np.float32)
    params = nn.meta.unbox(jax.jit(task.init)(KEY)[0])
    config = tiny(root, "diffusion", **{"model.width": 32})
    model = PriorStage.build(config, clip, None)
    objective, tx = tasks.prior._Diffusion(model), optax.adam(3e-3)
    text = jnp.full((64, T), 3, jnp.int32)

    def pair(key):
        z_t = jax.random.normal(key, (64, E))
        z_t /= jnp.linalg.norm(z_t, axis=-1, keepdims=True)
        return z_t @ rotation, z_t

    @jax.jit
    def train(params):
        def step(carry, key):
            params, opt = carry
            z_i, z_t = pair(key)
            run = lambda p: objective.loss(p, None, text, z_i, z_t, None, key, None)[0]  # noqa: E731
            value, gradient = jax.value_and_grad(run)(params)
            updates, opt = tx.update(gradient, opt)
            return (optax.apply_updates(params, updates), opt), value

        keys = jax.random.split(KEY, 500)
        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), keys)
        return params, losses

    params, losses = train(params)
    z_i, z_t = pair(jax.random.key(9))
    drawn = prior.sample(model, params, None, text, z_t, key=KEY, steps=8)
    # Captions are all the same here, which `judge` would take for right answers: others.
    judged = tasks.prior.judge(drawn, z_i, z_t, jnp.arange(64 * T).reshape(64, T))
    assert losses[-20:].mean() < 0.4 * losses[:5].mean()
    assert judged["cosine"] > 0.8 > judged["cosine_text"] + 0.3
    assert abs(judged["cosine_shuffled"]) < 0.2 and judged["retrieval1"] > 0.6
    assert judged["retrieval1_text"] < 0.2


def test_judge_by_hand():
    """Three pictures; the third has the caption of the first, so they are right for each other."""
    z_i = np.eye(3, 4, dtype=np.float32)
    drawn = np.float32([[0.6, 0, 0.8, 0], [0, 1, 0, 0], [0.8, 0.6, 0, 0]])
    z_t = np.float32([[0, 0, 0, 1]] * 3)
    judged = tasks.prior.judge(drawn, z_i, z_t, np.array([[5, 6], [7, 8], [5, 6]]))
    np.testing.assert_allclose(judged["cosine"], (0.6 + 1 + 0) / 3, rtol=1e-6)
    np.testing.assert_allclose(judged["cosine_text"], 0)
    # Rolled: the third's drawing on the first picture, and so on.
    np.testing.assert_allclose(judged["cosine_shuffled"], (0.8 + 0 + 0) / 3, rtol=1e-6)
    np.testing.assert_allclose(judged["retrieval1"], 2 / 3)  # the third drew the second
    np.testing.assert_allclose(judged["retrieval1_chance"], 1 / 3)


def test_what_is_kept_binds_clip_and_pca(root, clip, fitted):
    assert build(root, "diffusion", clip, None).keeps == {"clip.fingerprint": b"0123"}
    keeps = build(root, "ar", clip, fitted).keeps
    assert keeps["pca.npz"] == pca.to_bytes(fitted)


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("diffusion", {"data.text_len": 6}, "data.text_len=6, but the CLIP runs/clip has 5"),
        ("diffusion", {"data.vocab_size": 99}, "data.vocab_size=99"),
        ("diffusion", {"data.add_bos_eos": False}, "add_bos_eos=False"),
        ("diffusion", {"data.caption_drop": 0.1}, "caption_drop=0.1"),
        ("diffusion", {"loss.text_drop": 1.5}, "loss.text_drop=1.5"),
        ("diffusion", {"model.kind": "vae"}, "model.kind 'vae' is unknown"),
        ("ar", {"model.num_dims": 9}, "num_dims=9"),
    ],
)
def test_configs_that_cannot_work_are_refused(root, clip, fitted, kind, overrides, message):
    with pytest.raises(UsageError, match=message):
        build(root, kind, clip, fitted, **overrides)


def test_missing_and_foreign_stages_are_refused(root, clip, fitted, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="stages.clip is empty"):
        tasks.prior.make(tiny(root, "diffusion", **{"stages.clip": ""}))
    monkeypatch.setattr(ClipStage, "load", lambda folder: clip)
    with pytest.raises(UsageError, match="stages.pca is empty"):
        tasks.prior.make(tiny(root, "ar"))
    path = tmp_path / "pca.npz"
    path.write_bytes(pca.to_bytes(dataclasses.replace(fitted, clip="ffff")))
    with pytest.raises(UsageError, match="CLIP ffff, but 'runs/clip' holds 0123"):
        tasks.prior.make(tiny(root, "ar", **{"stages.pca": str(path)}))
    with pytest.raises(UsageError, match="not that of the CLIP"):
        tasks.prior.make(
            tiny(root, "diffusion"), lambda: types.SimpleNamespace(model_bytes=b"other")
        )
