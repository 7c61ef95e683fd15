"""The grammar, the layouts and the renderer of captioned shapes."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest

from dalle_jax.data import polygons, scenes
from dalle_jax.types import UsageError


def sampled(held_out="exclude", n=60):
    for kind in scenes.KINDS:
        for index in range(n):
            yield scenes.sample_scene(scenes.example_rng(7, held_out, index), kind, held_out)


def words(scene):
    """What a scene says, without where things are."""
    things = tuple((item.color, item.shape) for item in scene.objects)
    return scene.kind, things, scene.background, scene.relation


def test_held_out_pairs_are_a_latin_diagonal():
    colors, forms = zip(*scenes.HELD_OUT_PAIRS, strict=True)
    assert sorted(colors) == sorted(scenes.COLORS)
    assert sorted(forms) == sorted(scenes.SHAPES)
    assert len(scenes.HELD_OUT_COUNTS) / (5 * len(scenes.SHAPES)) == 0.1


def test_mirror_of_a_held_out_relation_is_seen():
    for first, relation, second in scenes.HELD_OUT_RELATIONS:
        assert first != second
        assert (second, scenes.OPPOSITE[relation], first) not in scenes.HELD_OUT_RELATIONS


def test_training_scenes_hold_nothing_held_out():
    seen = set()
    for scene in sampled("exclude", 500):
        assert not scenes.held_out_rules(scene)
        seen |= {(item.color, item.shape) for item in scene.objects}
    assert seen.isdisjoint(scenes.HELD_OUT_PAIRS)
    assert len(seen) == 56  # and every other pair is there


def test_held_out_scenes_use_every_rule():
    rules = [
        (scene.kind, rule) for scene in sampled("only") for rule in scenes.held_out_rules(scene)
    ]
    assert set(rules) == {
        *((kind, "pair") for kind in scenes.KINDS),
        ("count", "count"),
        ("relation", "relation"),
    }
    assert all(scenes.held_out_rules(scene) for scene in sampled("only"))


def test_layout_is_inside_apart_and_true():
    for scene in sampled("any"):
        for item in scene.objects:
            low, high = item.radius, 1 - item.radius
            assert low <= item.x <= high and low <= item.y <= high
        for a, b in itertools.combinations(scene.objects, 2):
            reach = sum(item.radius * polygons.EXTENT[item.shape] for item in (a, b))
            assert math.hypot(a.x - b.x, a.y - b.y) >= reach + 0.05
        if scene.relation:
            a, b = scene.objects
            along = {
                "to the left of": b.x - a.x,
                "to the right of": a.x - b.x,
                "above": b.y - a.y,
                "below": a.y - b.y,
            }
            across = {
                name: abs(b.y - a.y) if "to" in name else abs(b.x - a.x)
                for name in scenes.RELATIONS
            }
            assert along[scene.relation] > 0.25 and across[scene.relation] < 0.2


def test_json_returns_an_equal_scene_that_renders_to_equal_bytes():
    for scene in sampled("any", 10):
        copy = scenes.Scene.from_json(scene.to_json())
        assert copy == scene
        np.testing.assert_array_equal(scenes.render(copy, 24), scenes.render(scene, 24))


def test_example_is_a_function_of_seed_stream_and_index():
    def sample(*identity):
        return scenes.sample_scene(scenes.example_rng(*identity), "binding").to_json()

    assert sample(1, "train", 5) == sample(1, "train", 5)
    others = {sample(2, "train", 5), sample(1, "validation", 5), sample(1, "train", 6)}
    assert len(others) == 3 and sample(1, "train", 5) not in others


@pytest.mark.parametrize("image_px", [32, 48, 64])
def test_render_shows_background_and_objects(image_px):
    for scene in sampled("any", 8):
        image = scenes.render(scene, image_px)
        assert image.shape == (image_px, image_px, 3) and image.dtype == np.uint8
        corner = image[0, 0].astype(int) - scenes.BACKGROUNDS[scene.background]
        assert np.abs(corner).max() <= 3  # Lanczos rings
        for item in scene.objects:
            x, y = int(item.x * image_px), int(item.y * image_px)
            shown = image[y, x].astype(int)
            if item.shape == "ring":
                assert image_px < 64 or tuple(shown) == scenes.BACKGROUNDS[scene.background]
            elif image_px == 64 and item.shape != "cube":
                assert np.abs(shown - scenes.COLORS[item.color]).max() <= 3


def test_captions_parse_back():
    for scene in sampled("any"):
        parsed = scenes.parse_caption(scene.caption)
        assert words(parsed) == words(scene)
        assert parsed.caption == scene.caption
        assert all(item.radius is None for item in parsed.objects)


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("A Red  Cube.", ("single", (("red", "cube"),), None, None)),
        ("an orange star on a grey background", ("single", (("orange", "star"),), "gray", None)),
        ("two cyan crosses", ("count", (("cyan", "cross"),) * 2, None, None)),
        ("one pink ring", ("count", (("pink", "ring"),), None, None)),
        (
            "a red cube to the left of a green star on a white background",
            ("relation", (("red", "cube"), ("green", "star")), "white", "to the left of"),
        ),
    ],
)
def test_parse_forgives_small_things(caption, expected):
    assert words(scenes.parse_caption(caption)) == expected


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "an octopus",
        "six red cubes",
        "a red cube and",
        "a red cube and a red cube",
        "x" * 10_000,
    ],
)
def test_parse_refuses_what_is_no_caption(caption):
    with pytest.raises(UsageError) as refusal:
        scenes.parse_caption(caption)
    assert len(str(refusal.value)) < 700


def test_layout_free_scene_is_not_rendered():
    with pytest.raises(UsageError, match="no layout"):
        scenes.render(scenes.parse_caption("a red cube on a white background"), 32)


@pytest.mark.parametrize("arguments", [("circle",), ("single", "maybe")])
def test_unknown_names_are_refused(arguments):
    with pytest.raises(UsageError, match="unknown"):
        scenes.sample_scene(np.random.default_rng(0), *arguments)


def test_hard_negatives_are_distinct_false_captions():
    rng = np.random.default_rng(0)
    for scene in sampled("any", 30):
        negatives = scenes.hard_negatives(scene, rng, 1000)
        assert len(negatives) >= 16 and len(set(negatives)) == len(negatives)
        assert len(scenes.hard_negatives(scene, rng, 3)) == 3
        true = words(scene)
        for caption in negatives:
            kind, things, background, relation = words(scenes.parse_caption(caption))
            assert kind == true[0] and caption != scene.caption
            same_things = sorted(things) == sorted(true[1])
            if kind == "binding":
                assert not same_things or background != true[2]
            mirrored = things == true[1][::-1] and relation == scenes.OPPOSITE.get(true[3])
            assert kind != "relation" or not mirrored


def test_rendering_processes_need_no_jax():
    code = "import sys, dalle_jax.data.scenes; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
