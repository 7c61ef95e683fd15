"""CLIP scores by pmap: the pure function's values, on any number of devices; order; best of N."""

import types

import jax
import numpy as np
import pytest
import tiny_stages

from dalle_jax.config import ConfigDict
from dalle_jax.engine import meshes, sharding
from dalle_jax.sampling import rerank
from dalle_jax.stages.clip import ClipStage
from dalle_jax.stages.dalle import DalleStage


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> ClipStage:
    return ClipStage.load(tiny_stages.write_clip(tmp_path_factory.mktemp("rerank") / "clip"))


def pairs(rng, clip, n, prompts=3, px=tiny_stages.PX):
    images = rng.uniform(-1, 1, (n, px, px, 3)).astype(np.float32)
    text = np.zeros((prompts, clip.text_len), np.int32)
    text[:, 0], text[:, 1:4], text[:, 4] = 2, rng.integers(260, tiny_stages.VOCAB, (prompts, 3)), 3
    return images, text[rng.integers(0, prompts, n)]


def test_order_is_numpys_argsort(rng):
    scores = rng.normal(size=50).astype(np.float32)
    np.testing.assert_array_equal(rerank.order(scores), np.argsort(-scores))


def test_ties_stay_in_drawing_order_and_nan_goes_last():
    scores = np.asarray([0.5, np.nan, 0.5, 0.9, 0.5, -np.inf], np.float32)
    np.testing.assert_array_equal(rerank.order(scores), [3, 0, 2, 4, 5, 1])


def test_score_is_the_pure_function_on_1_and_8_devices(clip, rng):
    """11 pictures on 8 devices: padded to 16, and the padding is gone again."""
    images, text = pairs(rng, clip, 11)
    pure = jax.jit(rerank.score_fn, static_argnums=0)(clip.model, clip.params, images, text)
    eight = rerank.score(clip, images, text)
    one = rerank.score(clip, images, text, devices=jax.local_devices()[:1])
    assert len(jax.local_devices()) == 8 and eight.shape == (11,)
    np.testing.assert_allclose(eight, pure, atol=1e-5)
    np.testing.assert_allclose(eight, one, atol=1e-5)
    np.testing.assert_array_equal(rerank.order(eight), rerank.order(one))


def test_batches_do_not_change_the_scores(clip, rng):
    images, text = pairs(rng, clip, 11)
    np.testing.assert_allclose(
        rerank.score(clip, images, text, batch=1), rerank.score(clip, images, text), atol=1e-5
    )
    assert rerank.score(clip, images[:0], text[:0]).shape == (0,)


def test_larger_pictures_are_resized(clip, rng):
    """Pictures of constant colour score the same at any size."""
    images, text = pairs(rng, clip, 4)
    flat = np.broadcast_to(images[:, :1, :1], images.shape)
    large = np.broadcast_to(images[:, :1, :1], (4, 40, 40, 3))
    np.testing.assert_allclose(
        rerank.score(clip, large, text), rerank.score(clip, flat, text), atol=1e-4
    )


def test_counts_that_differ_are_refused(clip, rng):
    images, text = pairs(rng, clip, 4)
    with pytest.raises(ValueError, match="4 images"):
        rerank.score(clip, images, text[:3])
    with pytest.raises(ValueError, match="ids per image"):
        rerank.score(clip, images, text[:, :-1])


def test_best_of_n_on_eight_devices_is_that_of_one(clip, tmp_path):
    """Eleven candidates in chunks of 9, each rounded up to 16 for the decoder."""
    codec = tiny_stages.write_codec(tmp_path / "dvae")
    dalle = DalleStage.load(tiny_stages.write_dalle(tmp_path / "dalle", codec))
    mesh = meshes.make_mesh(ConfigDict(dict(data=8, fsdp=1, tensor=1)))
    text = np.zeros(dalle.text_len, np.int32)
    one, eight = (
        rerank.sample_best(
            dalle, clip, text, np.zeros(clip.text_len, np.int32), num_candidates=11, keep=4,
            chunk=9, key=jax.random.key(3), mesh=where,
        )
        for where in (None, mesh)
    )  # fmt: skip
    np.testing.assert_array_equal(eight.codes, one.codes)
    np.testing.assert_array_equal(eight.candidates, one.candidates)
    np.testing.assert_allclose(eight.images, one.images, atol=1e-5)
    np.testing.assert_allclose(eight.scores, one.scores, atol=1e-5)
    drawn = dalle.codec.decode(jax.device_put(one.codes, sharding.replicated(mesh)))
    assert len(drawn.sharding.device_set) == 8  # the decoder works where its codes lie


@pytest.mark.parametrize("chunk", [1, 4, 7, 20])
def test_best_of_n_does_not_depend_on_the_chunks(monkeypatch, rng, chunk):
    """The K best by one argsort over all candidates, with scores that contain ties."""
    values = rng.integers(0, 6, 20).astype(np.float32)

    def batches(model, params, text, *, num_candidates, chunk, key, mesh):
        for start in range(0, num_candidates, chunk):
            index = np.arange(start, min(start + chunk, num_candidates))
            yield start, np.repeat(index[None, :, None], 4, axis=2).astype(np.int32)

    def decode(codes):
        assert len(codes) == min(chunk, 20), "one shape for all chunks"
        return np.broadcast_to(codes[:, :1, None, None], (len(codes), 2, 2, 3)).astype(np.float32)

    monkeypatch.setattr(rerank.autoregressive, "sample_batches", batches)
    monkeypatch.setattr(
        rerank, "score", lambda _, drawn, text: values[drawn[:, 0, 0, 0].astype(int)]
    )
    dalle = types.SimpleNamespace(
        model=None, on=lambda where: None, codec=types.SimpleNamespace(decode=decode)
    )
    seen = []
    got = rerank.sample_best(
        dalle, object(), np.zeros(3), np.zeros(3), num_candidates=20, keep=5, chunk=chunk,
        key=None, progress=seen.append,
    )  # fmt: skip
    expected = np.argsort(-values, kind="stable")[:5]
    np.testing.assert_array_equal(got.candidates, expected)
    np.testing.assert_array_equal(got.codes[:, 0], expected)
    np.testing.assert_array_equal(got.images[:, 0, 0, 0], expected)
    np.testing.assert_array_equal(got.scores, values)
    assert seen[-1] == 20
    unranked = rerank.sample_best(
        dalle, None, np.zeros(3), None, num_candidates=20, keep=5, chunk=chunk, key=None
    )
    np.testing.assert_array_equal(unranked.candidates, np.arange(5))
    assert unranked.scores is None
