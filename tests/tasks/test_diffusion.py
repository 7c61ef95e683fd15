"""The task of the picture networks: conditions, losses, crops, devices, refusals."""

import dataclasses
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax import config as cfg
from dalle_jax import tasks
from dalle_jax.diffusion import gaussian, schedules
from dalle_jax.engine import meshes, sharding
from dalle_jax.models import unet
from dalle_jax.sampling import diffusion
from dalle_jax.stages import by_shape
from dalle_jax.tasks import conditions
from dalle_jax.types import UsageError

PX = 8


def tiny(root, name="decoder", **overrides):
    small = {
        "data.batch": 8, "data.eval_batch": 8, "data.image_px": PX, "model.width": 16,
        "model.patch_px": 1, "model.channel_mults": (1,), "loss.preview_spacing": "2",
    }  # fmt: skip
    if name == "decoder":
        small |= {"model.attention_px": (PX,), "model.head_width": 16, "model.text_width": 16}
    else:
        small |= {"loss.low_res_px": 4, "loss.corruption": "blur"}
    return cfg.override(cfg.load(f"{root}/configs/{name}.py:size=smoke"), small | overrides)


@pytest.fixture(scope="module")
def clip(root):
    """A CLIP of the smoke size with random weights."""
    stage = by_shape.clip_of(f"{root}/configs/clip.py:size=smoke")
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.2, stage.params)
    run = dataclasses.replace(
        stage.run, variables={"params": params}, fingerprint="0123", folder="runs/clip"
    )
    return dataclasses.replace(stage, run=run)


def batch_of(task, rng):
    made = {}
    for name, spec in task.batch_spec.items():
        high = 256 if name == "image" else 20
        made[name] = rng.integers(1, high, spec.shape).astype(spec.dtype)
    return made


def start(task, rng, scale=0.1):
    """Random parameters: those of `init` say nothing."""
    fresh = nn.meta.unbox(jax.eval_shape(task.init, jax.random.key(0))[0])
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * scale, fresh)


def test_the_sharded_loss_is_the_loss_of_one_device(root, clip, rng, key):
    """And with it the drops, the masks, the steps and the noise of every example."""
    config = tiny(root, **{"loss.inpaint": True})
    task = tasks.diffusion.assemble(config, clip)
    params, batch = start(task, rng), batch_of(task, rng)
    frozen = nn.meta.unbox(task.frozen)
    arguments = (params, None, frozen, batch, key, np.int32(0))
    expected, output = jax.jit(task.loss)(*arguments)
    assert set(output.metrics) == {"loss", "mse", "vb", "mse_q1", "mse_q2", "mse_q3", "mse_q4"}
    mesh_config = cfg.ConfigDict(dict(data=4, fsdp=2, tensor=1, rules="fsdp"))
    mesh = meshes.make_mesh(mesh_config)
    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    where = (whole, whole, whole, split, whole, whole)
    with sharding.use(mesh, sharding.rules(mesh_config)):
        sharded = jax.jit(task.loss, in_shardings=where)
        got, spread = sharded(*jax.device_put(arguments, where))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for name, value in output.metrics.items():
        np.testing.assert_allclose(spread.metrics[name], value, rtol=1e-4, atol=1e-6)


def test_the_variance_learns_without_moving_eps(rng):
    """The gradient of the variational term reaches the last layer's variance channels only."""
    p = diffusion.parameterisation(unet.UnetConfig(PX, learned_variance=True))
    schedule = schedules.make("cosine")
    x_0, eps = rng.normal(size=(2, 2, PX, PX, 3)).astype(np.float32).clip(-1, 1)
    t = np.array([0, 500], np.int32)

    def vb(kernel):
        out = jnp.einsum("bhwc,cd->bhwd", jnp.full((2, PX, PX, 4), 0.1), kernel)
        return gaussian.losses(p, schedule, out, x_0, t, eps)["vb"].sum()

    gradient = np.asarray(jax.jit(jax.grad(vb))(rng.normal(size=(4, 6)).astype(np.float32)))
    assert not gradient[:, :3].any() and np.abs(gradient[:, 3:]).min() > 0


@pytest.mark.parametrize("predicts", unet.PREDICTS)
def test_saying_nothing_costs_what_the_config_predicts(root, rng, key, predicts):
    """An output of zeros misses eps and v by 1 a pixel, x_0 by the picture's own mean square."""
    overrides = {"model.predicts": predicts, "data.batch": 64, "loss.crop": 1.0}
    task = tasks.diffusion.assemble(tiny(root, "upsampler", **overrides))
    batch = {"image": np.full(task.batch_spec["image"].shape, 191, np.uint8)}  # 191 -> 0.498
    silent = jax.tree.map(np.zeros_like, start(task, rng))
    _, output = jax.jit(task.loss)(silent, None, None, batch, key, np.int32(0))
    # v is eps at the least noisy step and x_0 at the noisiest.
    low, high = {"eps": (0.97, 1.03), "x_0": (0.247, 0.249), "v": (0.45, 0.8)}[predicts]
    assert low < output.metrics["mse"] < high


def test_conditions_are_dropped_independently_and_captions_become_padding(root, key):
    c = tiny(root).loss
    text = np.full((4000, 3), 7, np.int32)
    has, kept = jax.jit(lambda *xs: conditions.drop(c, *xs))(np.ones(4000, bool), text, key)
    no_clip, no_text = ~np.asarray(has), ~np.asarray(kept).any(axis=1)
    np.testing.assert_array_equal(np.asarray(kept)[~no_text], 7)
    assert abs(no_clip.mean() - 0.1) < 0.02 and abs(no_text.mean() - 0.5) < 0.03
    assert abs((no_clip & ~no_text).mean() - 0.05) < 0.015  # the paper's 5 %


def test_quarters_are_right_on_average(rng):
    mse, t = rng.random(400).astype(np.float32), rng.integers(0, 1000, 400)
    got = tasks.diffusion.averages({"mse": mse}, t, 1000)
    for q in range(4):
        inside = t // 250 == q
        np.testing.assert_allclose(got[f"mse_q{q + 1}"], 4 * mse[inside].sum() / 400, rtol=1e-5)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_steps_come_as_often_as_the_power_says_and_quarters_know_it(power, key):
    c = types.SimpleNamespace(time_power=power, num_steps=1000)
    t = conditions.steps(c, key, 40_000)
    assert t.dtype == jnp.int32 and t.min() >= 0 and t.max() == 999
    shares = np.diff((np.arange(5) / 4) ** (1 / power))  # P(u^p < x) = x^(1/p)
    np.testing.assert_allclose(np.bincount(t // 250) / len(t), shares, atol=0.01)
    # An error that depends on the quarter alone is told as it is, however its steps were drawn.
    mse = 1.0 + t // 250
    got = tasks.diffusion.averages({"mse": mse}, t, 1000, power)
    np.testing.assert_allclose([got[f"mse_q{q}"] for q in (1, 2, 3, 4)], [1, 2, 3, 4], rtol=0.05)


def test_crops_are_cut_from_both_pictures_alike(root, rng, key):
    c = tiny(root, "upsampler", **{"loss.corruption": "none"}).loss
    pictures = rng.uniform(-1, 1, (16, PX, PX, 3)).astype(np.float32)
    both = jax.jit(
        lambda *xs: [conditions.upsampling(c, xs[0], crop, xs[1]) for crop in (0.5, 1.0)]
    )
    (x_0, cond), (full, stretched) = both(pictures, key)
    np.testing.assert_array_equal(full, pictures)
    corners = set()
    for b in range(16):
        found = [
            (i, j)
            for i in range(0, 5, 2)
            for j in range(0, 5, 2)
            if np.array_equal(x_0[b], pictures[b, i : i + 4, j : j + 4])
        ]
        ((i, j),) = found  # at whole pixels of the 4 px picture
        cut = stretched["low_res"][b, i : i + 4, j : j + 4]
        np.testing.assert_array_equal(cond["low_res"][b], cut)
        corners.add((i, j))
    assert len(corners) > 3


def test_an_upsampler_trains_on_crops_and_draws_whole_pictures(root, rng, key):
    config = tiny(root, "upsampler", **{"loss.crop": 0.5})
    task = tasks.diffusion.assemble(config)
    assert set(task.batch_spec) == {"image"} and task.frozen is None
    params, batch = start(task, rng), batch_of(task, rng)
    loss = jax.jit(task.loss)
    one, output = loss(params, None, None, batch, key, 0)
    assert one == output.metrics["mse"] and "vb" not in output.metrics
    again, _ = loss(params, None, None, batch, key, 0)
    other, _ = loss(params, None, None, batch, jax.random.key(9), 0)
    assert one == again and one != other
    (shown,) = task.preview(params, None, None, batch, key).values()
    assert shown.shape == (6, PX, 3 * PX, 3)
    np.testing.assert_allclose(shown[:, :, 2 * PX :], batch["image"][:6] / 127.5 - 1, atol=1e-5)


def test_a_decoder_previews_its_own_then_samples(root, clip, rng, key):
    task = tasks.diffusion.assemble(tiny(root), clip)
    params, batch = start(task, rng), batch_of(task, rng)
    shown = task.preview(params, None, nn.meta.unbox(task.frozen), batch, key)
    (strips,) = shown.values()
    assert strips.shape == (6, PX, 4 * PX, 3)
    np.testing.assert_allclose(strips[:, :, :PX], batch["image"][:6] / 127.5 - 1, atol=1e-5)
    assert np.abs(strips[:, :, PX : 2 * PX] - strips[:, :, 2 * PX : 3 * PX]).max() > 0.1
    assert task.keeps == {"clip.fingerprint": b"0123"}


@pytest.mark.parametrize(
    ("name", "overrides", "says"),
    [
        ("decoder", {}, "stages.clip is empty"),
        ("upsampler", {"loss.low_res_px": 3}, "no whole multiple"),
        ("upsampler", {"loss.crop": 0.4}, "loss.crop=0.4"),
        ("upsampler", {"loss.crop": 0.25, "model.channel_mults": (1, 2, 2)}, "2 px do not fit"),
        ("upsampler", {"loss.corruption": "fog"}, "none, blur, bsr"),
        ("upsampler", {"data.image_px": 20, "model.patch_px": 8}, "use 16 or 24"),
        ("decoder", {"loss.low_res_px": 4}, "nor attention"),
        ("upsampler", {"loss.schedule": "quadratic"}, "schedule 'quadratic'"),
        ("upsampler", {"init_from": "nowhere"}, "does not exist"),
    ],
)
def test_values_that_do_not_fit_are_refused(root, name, overrides, says):
    with pytest.raises(UsageError, match=says):
        tasks.diffusion.make(tiny(root, name, **overrides))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"data.text_len": 9}, "text_len=24"),
        ({"data.vocab_size": 400}, "vocab_size=512"),
        ({"data.add_bos_eos": False}, "add_bos_eos=true"),
        ({"loss.crop": 0.5}, "whole pictures"),
        ({"loss.text_drop": 1.5}, "text_drop=1.5"),
        ({"loss.time_power": 0.0}, "time_power=0.0; expected above 0"),
    ],
)
def test_a_decoder_reads_as_its_clip(root, clip, overrides, says):
    with pytest.raises(UsageError, match=says):
        tasks.diffusion.assemble(tiny(root, **overrides), clip)
    other = types.SimpleNamespace(model_bytes=b"other", vocab_size=512)
    with pytest.raises(UsageError, match="tokenizer"):
        tasks.diffusion.assemble(tiny(root), clip, other)
