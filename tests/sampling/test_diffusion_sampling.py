"""Drawing with a U-Net: noise by index, guidance, known pixels, devices."""

import functools

import jax
import numpy as np
import pytest

from dalle_jax import config as cfg
from dalle_jax.diffusion import schedules
from dalle_jax.engine import meshes
from dalle_jax.models import unet
from dalle_jax.sampling import diffusion
from dalle_jax.types import UsageError

PX, COUNT = 8, 4
STEPS = schedules.respace(schedules.make("cosine"), 3)


@pytest.fixture(scope="module")
def drawer():
    """(draw with a tiny decoder of random weights, its conditions)."""
    c = unet.UnetConfig(
        PX, width=16, channel_mults=(1,), num_blocks=1, attention_px=(8,), head_width=16,
        context_width=8, clip_width=4,
    )  # fmt: skip
    model, rng = unet.Unet(c), np.random.default_rng(0)
    z = rng.normal(size=(COUNT, 4)).astype(np.float32)
    cond = {"clip": z, "has_clip": np.ones(COUNT, bool)}
    x = np.zeros((1, PX, PX, 3), np.float32)
    few = jax.tree.map(lambda a: a[:1], cond)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, np.zeros(1, np.int32), few)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.2, shapes)
    params = jax.tree.map(lambda a: a, params["params"])
    draw = functools.partial(diffusion.draw, model, params, schedule=STEPS, key=jax.random.key(5))
    return draw, cond


def rows(cond, which):
    return jax.tree.map(lambda a: a[which], cond)


def test_a_picture_is_the_same_in_any_batch_and_on_any_devices_and_guided_by_1(drawer):
    """One program draws with a scale of each picture's own, one without guidance on 8 devices."""
    draw, cond = drawer
    indices = np.arange(COUNT)
    drawn = np.asarray(draw(cond, indices=indices, scale=np.array([1.0, 0.0, 3.0, 1.0])))
    assert drawn.shape == (COUNT, PX, PX, 3) and np.abs(drawn).max() <= 1
    assert np.abs(drawn[0] - drawn[3]).max() > 0.1
    order = np.array([2, 0, 3, 1])
    scales = np.array([1.0, 0.0, 3.0, 1.0])[order]
    shuffled = draw(rows(cond, order), indices=order, scale=scales)
    np.testing.assert_allclose(shuffled, drawn[order], atol=1e-4)
    mesh = meshes.make_mesh(cfg.ConfigDict(dict(data=8, fsdp=1, tensor=1, rules="dp")))
    plain = np.asarray(draw(cond, indices=indices, mesh=mesh))  # padded to 8
    np.testing.assert_allclose(drawn[[0, 3]], plain[[0, 3]], atol=1e-4)
    without = draw(unet.null_cond(cond), indices=indices, mesh=mesh)
    np.testing.assert_allclose(drawn[1], without[1], atol=1e-4)
    assert np.abs(drawn[2] - plain[2]).max() > 0.05


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp"])
def test_known_pixels_come_back_bit_for_bit_and_starts_may_be_given(drawer, rng, sampler):
    draw, cond = drawer
    picture = rng.uniform(-1, 1, (COUNT, PX, PX, 3)).astype(np.float32)
    known = rng.random((COUNT, PX, PX, 1)) < 0.5
    options = dict(indices=np.arange(COUNT), sampler=sampler, keep=(picture, known))
    drawn = np.asarray(draw(cond, **options))
    where = np.broadcast_to(known, picture.shape)
    np.testing.assert_array_equal(drawn[where], picture[where])
    assert np.abs(drawn - picture)[~where].max() > 0.1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sampler": "euler"}, "ddim, ddpm, dpmpp"),
        ({"eta": 2.0}, "eta=2.0"),
        ({"sampler": "dpmpp", "eta": 0.5}, "draws no noise"),
    ],
)
def test_options_out_of_range_are_refused(drawer, options, says):
    draw, cond = drawer
    with pytest.raises(UsageError, match=says):
        draw(cond, indices=np.arange(COUNT), **options)
