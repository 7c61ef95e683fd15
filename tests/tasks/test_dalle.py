"""The task: codes from pictures or from the set, what is trained, previews, refusals."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import weights

from dalle_jax import config as cfg
from dalle_jax import tasks
from dalle_jax.models import build, dalle
from dalle_jax.stages.codec import Codec
from dalle_jax.types import UsageError

PX, GRID, CODES = 8, 2, 4


def quadrant_codec(**changes):
    """A codec by hand: a code is how bright a quadrant is, 0 to 3; `levels` are its weights."""

    def encode(params, images):
        bright = images.reshape(len(images), GRID, 4, GRID, 4, 3).mean(axis=(2, 4, 5))
        return jnp.argmin(jnp.abs(bright[..., None] - params["levels"][None, None, None]), axis=-1)

    def decode(params, codes):
        grey = params["levels"][codes].reshape(len(codes), GRID, GRID)
        return jnp.broadcast_to(
            grey.repeat(4, axis=1).repeat(4, axis=2)[..., None], (len(codes), PX, PX, 3)
        )

    params = {"levels": np.linspace(-1, 1, CODES, dtype=np.float32)}
    record = dict(
        params=params,
        frozen_encoder=lambda: params,
        fingerprint="0123",
        grid=GRID,
        num_codes=CODES,
        image_px=PX,
        encode_fn=encode,
        decode_fn=decode,
        decode=lambda codes: decode(params, codes),
    )
    return types.SimpleNamespace(**(record | changes))


def tiny(root, **overrides):
    small = {
        "data.batch": 4, "data.image_px": PX, "data.text_len": 3, "data.vocab_size": 16,
        "model.width": 16, "model.num_layers": 1, "stages.dvae": "codec",
    }  # fmt: skip
    return cfg.override(cfg.load(f"{root}/configs/dalle.py:size=smoke"), small | overrides)


@pytest.fixture
def pictures(rng):
    """uint8 pictures whose codes are known, and the codes."""
    codes = rng.integers(0, CODES, (4, GRID * GRID))
    levels = np.linspace(0, 255, CODES).round().astype(np.uint8)
    image = levels[codes].reshape(4, GRID, GRID).repeat(4, axis=1).repeat(4, axis=2)
    return np.broadcast_to(image[..., None], (4, PX, PX, 3)), codes.astype(np.int32)


@pytest.fixture
def text():
    return np.array([[3, 4, 5], [6, 0, 0], [7, 8, 0], [0, 0, 0]], np.int32)


def run(task, batch):
    params = nn.meta.unbox(weights.noise(jax.eval_shape(task.init, jax.random.key(0))[0]))
    loss = jax.jit(task.loss)
    return params, loss(params, None, task.frozen, batch, jax.random.key(1), jnp.int32(0))


def test_pictures_and_stored_codes_train_alike(root, pictures, text):
    image, codes = pictures
    from_images = tasks.dalle.assemble(tiny(root), quadrant_codec())
    stored = tasks.dalle.assemble(tiny(root, **{"stages.from_codes": True}), quadrant_codec())
    assert from_images.frozen is not None and stored.frozen is None
    params, (one, output) = run(from_images, {"image": image, "text": text})
    _, (two, _) = run(stored, {"codes": codes, "text": text})
    np.testing.assert_allclose(one, two, rtol=1e-6)
    chunked = tasks.dalle.assemble(tiny(root, **{"stages.encode_chunk": 3}), quadrant_codec())
    _, (three, _) = run(chunked, {"image": image, "text": text})
    np.testing.assert_allclose(one, three, rtol=1e-6)
    made = build.dalle(tiny(root), GRID, CODES)
    expected, _ = dalle.loss(*made.apply({"params": params}, text, codes), text, codes)
    np.testing.assert_allclose(one, expected, rtol=1e-6)
    assert set(output.metrics) == {"loss", "text_loss", "image_loss", "image_accuracy"}


def test_a_batch_holds_codes_or_pictures(root):
    for from_codes in (False, True):
        config = tiny(root, **{"stages.from_codes": from_codes})
        task = tasks.dalle.assemble(config, quadrant_codec())
        assert set(task.batch_spec) == {"codes" if from_codes else "image", "text"}
        assert {spec.shape[0] for spec in task.batch_spec.values()} == {4}
        assert task.unit == ("tokens", 3 + GRID**2)


def test_codec_gets_no_gradient_and_no_update(root, pictures, text):
    image, _ = pictures
    task = tasks.dalle.assemble(tiny(root), quadrant_codec())
    params, _ = run(task, {"image": image, "text": text})

    def loss(frozen):
        batch = {"image": image, "text": text}
        return task.loss(params, None, frozen, batch, jax.random.key(1), jnp.int32(0))[0]

    gradient = jax.jit(jax.grad(loss))(task.frozen)
    assert not np.any(gradient["levels"])


def test_dropout_acts_in_training_only(root, pictures, text):
    image, _ = pictures
    batch = {"image": image, "text": text}
    task = tasks.dalle.assemble(tiny(root, **{"model.dropout": 0.5}), quadrant_codec())
    params, (one, _) = run(task, batch)
    two, _ = jax.jit(task.loss)(params, None, task.frozen, batch, jax.random.key(2), jnp.int32(0))
    assert not np.isclose(one, two)
    evaluate = jax.jit(task.evaluate)
    held_out = [evaluate(params, None, task.frozen, batch, jax.random.key(i)) for i in (1, 2)]
    assert held_out[0]["loss"] == held_out[1]["loss"]


def test_preview_shows_the_reconstruction_then_samples(root, pictures, text):
    image, _ = pictures
    task = tasks.dalle.assemble(tiny(root), quadrant_codec())
    params = nn.meta.unbox(weights.noise(jax.eval_shape(task.init, jax.random.key(0))[0]))
    batch = {"image": image, "text": text}
    (shown,) = task.preview(params, None, task.frozen, batch, jax.random.key(0)).values()
    per_row = 1 + tasks.dalle.PREVIEW_CANDIDATES
    assert shown.shape == (4, PX, per_row * PX, 3)
    np.testing.assert_allclose(shown[:, :, :PX], image / 127.5 - 1, atol=0.01)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"stages.dvae": ""}, "stages.dvae is empty"),
        ({"data.add_bos_eos": True}, "add_bos_eos=True"),
        ({"stages.dvae": "no/such/run"}, "does not exist"),
    ],
)
def test_configs_that_cannot_work_are_refused(root, overrides, message):
    with pytest.raises(UsageError, match=message):
        tasks.dalle.make(tiny(root, **overrides))


def test_sizes_that_do_not_fit_are_refused(root):
    with pytest.raises(UsageError, match="has 17 pieces, but data.vocab_size is 16"):
        tasks.dalle.make(tiny(root), lambda: types.SimpleNamespace(vocab_size=17))
    with pytest.raises(UsageError, match="takes 64 px pictures, but data.image_px is 8"):
        Codec.check_px(quadrant_codec(image_px=64), tiny(root))
