"""The exact judge: right on what the renderer draws, never fooled by a wrong caption."""

import numpy as np
import pytest

from dalle_jax.data import scenes
from dalle_jax.evaluation import judge
from dalle_jax.types import UsageError


def sampled(n, kinds=scenes.KINDS):
    for kind in kinds:
        for index in range(n):
            yield scenes.sample_scene(scenes.example_rng(5, "judge", index), kind, "any")


@pytest.mark.parametrize("image_px, n", [(32, 80), (64, 40)])
def test_oracle_accuracy(image_px, n):
    """The full claim, 400 at each size, takes 20 s: see `evaluate --suite=shapes`."""
    assert judge.oracle_accuracy(n, image_px) == 1.0


def test_reads_place_and_size():
    for scene in sampled(6):
        pieces = judge.parse(scenes.render(scene, 64)).objects
        for item in scene.objects:
            near = min(pieces, key=lambda f: np.hypot(f.x - item.x, f.y - item.y))  # noqa: B023
            assert (near.color, near.shape) == (item.color, item.shape)
            assert np.hypot(near.x - item.x, near.y - item.y) < 0.02
            assert near.radius == pytest.approx(item.radius, rel=0.08)
            assert near.explained > 0.94


@pytest.mark.parametrize("degrade", ["noise", "tint", "soft"])
def test_forgives_what_a_decoder_does(degrade):
    rng = np.random.default_rng(0)
    right = []
    for scene in sampled(10):
        image = scenes.render(scene, 32).astype(np.float32)
        if degrade == "noise":
            image += rng.normal(0, 13, image.shape)
        elif degrade == "tint":
            image = 12 + 0.9 * image
        else:  # a quarter of every pixel from its neighbours
            image = 0.75 * image + 0.0625 * sum(
                np.roll(image, step, axis) for axis in (0, 1) for step in (-1, 1)
            )
        right.append(judge.judge(scene, image.clip(0, 255).astype(np.uint8))["all"])
    assert np.mean(right) >= 0.95


def test_wrong_captions_are_never_accepted():
    rng = np.random.default_rng(0)
    for scene in sampled(8):
        reading = judge.parse(scenes.render(scene, 32))
        assert judge.compare(scene, reading)["all"]
        for caption in scenes.hard_negatives(scene, rng, 12):
            assert not judge.compare(scenes.parse_caption(caption), reading)["all"], caption


def test_conditions_are_independent():
    scene = next(
        scene
        for scene in sampled(20, ["relation"])
        if len({item.color for item in scene.objects} | {i.shape for i in scene.objects}) == 4
    )
    a, b = scene.objects
    image = scenes.render(scene, 64)

    def verdict(things, relation=None, background=scene.background, kind="relation"):
        return judge.judge(scenes.caption_of(kind, things, background, relation), image)

    pair = [(a.color, a.shape), (b.color, b.shape)]
    assert verdict(pair, scene.relation)["all"]
    assert verdict(pair[::-1], scenes.OPPOSITE[scene.relation])["all"]
    assert verdict(pair, kind="binding")["all"] and "relation" not in verdict(pair, kind="binding")
    assert verdict(pair, scene.relation, None)["background"]

    mirrored = verdict(pair, scenes.OPPOSITE[scene.relation])
    assert mirrored["bind"] and not mirrored["relation"] and not mirrored["all"]
    crossed = verdict([(a.color, b.shape), (b.color, a.shape)], scene.relation)
    assert crossed["color"] and crossed["shape"] and crossed["count"] and not crossed["bind"]
    other = next(name for name in scenes.BACKGROUNDS if name != scene.background)
    assert not verdict(pair, scene.relation, other)["background"]
    alone = verdict(pair[:1], kind="single")
    assert not alone["count"] and alone["background"]


@pytest.mark.parametrize("seed", range(3))
def test_pictures_of_nothing_show_nothing(seed):
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    stripes = np.tile(rng.integers(0, 256, (32, 1, 3), dtype=np.uint8), (1, 32, 1))
    full = np.full((32, 32, 3), scenes.COLORS["red"], np.uint8)
    for image in (noise, stripes, full, np.zeros_like(full)):
        for scene in sampled(3):
            assert not judge.judge(scene, image)["all"]
    assert judge.parse(full).background is None
    assert judge.parse(np.zeros_like(full)) == judge.Reading("black", ())


def test_smear_is_no_shape():
    image = np.full((32, 32, 3), 255, np.uint8)
    image[6:9, 4:28] = scenes.COLORS["red"]
    (piece,) = judge.parse(image).objects
    assert piece.color == "red" and piece.shape is None


def test_largest_and_larger_pictures():
    square = scenes.Object("blue", "square", 0.5, 0.5, 0.48)
    scene = scenes.Scene("single", "a blue square", (square,), "white")
    for image_px in (32, 64, 128, 200):
        assert judge.judge(scene, scenes.render(scene, image_px))["all"]


def test_is_deterministic():
    scene = next(sampled(1, ["count"]))
    image = scenes.render(scene, 32)
    assert judge.parse(image) == judge.parse(image.copy())


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((32, 32, 3), np.float32),
        np.zeros((32, 32), np.uint8),
        np.zeros((32, 40, 3), np.uint8),
        np.zeros((16, 16, 3), np.uint8),
    ],
)
def test_refuses_what_it_cannot_read(image):
    with pytest.raises(UsageError, match="the judge reads"):
        judge.parse(image)


def test_refuses_captions_outside_the_grammar():
    with pytest.raises(UsageError, match="not a caption of the shapes set"):
        judge.judge("an armchair", np.zeros((32, 32, 3), np.uint8))
