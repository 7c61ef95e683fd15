"""Variations and inpainting by the judge, with painters that do just what is asked, or do not."""

import dataclasses
import json

import numpy as np
import pytest

from dalle_jax.data import scenes
from dalle_jax.evaluation import edits, judge
from dalle_jax.evaluation.settings import Settings
from dalle_jax.types import UsageError

PX = 32


def mirrored(scene):
    items = tuple(dataclasses.replace(item, x=1 - item.x) for item in scene.objects)
    return dataclasses.replace(scene, objects=items)


def test_variations_that_are_the_picture_itself_keep_all():
    calls = []

    def vary(pictures, num, first):
        calls.append((len(pictures), first))
        return pictures[:, None].repeat(num, 1)

    settings = Settings(candidates=2, prompts_per_skill=3, batch=10)
    result, rows = edits.variations(vary, PX, settings)
    assert calls == [(5, 0), (5, 5), (5, 10)]  # the last one filled up
    assert result["n"] == 12 and result["variations"] == 2
    for figures in [result["mean"], *result["kinds"].values()]:
        assert figures["right"] == 1 and set(figures["conditions"].values()) == {1}
        assert figures["pixel_change"] == 0 and figures["moved"] < 0.03
        assert figures["chance"]["right"] == 0  # no two captions of a kind are one
    assert result["kinds"]["relation"]["conditions"]["relation"] == 1
    assert len(rows) == 8 and rows[0].labels == ("given", "right", "right")
    assert json.loads(json.dumps(result)) == result


def test_what_may_change_does_not_count_as_what_must_stay():
    chosen = edits.varied_scenes(3, 0)
    moved = [np.mean([abs(1 - 2 * item.x) for item in scene.objects]) for scene in chosen]

    def vary(pictures, num, first):
        some = [mirrored(scene) for scene in chosen[first : first + len(pictures)]]
        return np.stack([scenes.render(scene, PX) for scene in some])[:, None]

    settings = Settings(candidates=1, prompts_per_skill=3, batch=4)
    result, _ = edits.variations(vary, PX, settings)
    kinds = result["kinds"]
    assert result["mean"]["right"] == 1 and result["mean"]["pixel_change"] > 0.01
    sideways = [scene.relation in (scenes.LEFT, scenes.RIGHT) for scene in chosen[9:]]
    assert kinds["relation"]["conditions"]["relation"] == pytest.approx(1 - np.mean(sideways))
    for kind, start in (("single", 0), ("binding", 6)):
        expected = np.mean(moved[start : start + 3])
        assert kinds[kind]["moved"] == pytest.approx(expected, abs=0.02)
    # Of equal objects each is taken for the nearest.
    assert kinds["count"]["moved"] <= np.mean(moved[3:6]) + 0.02


def test_variations_that_show_nothing_are_wrong_and_have_not_moved():
    def vary(pictures, num, first):
        return np.zeros((len(pictures), num, PX, PX, 3), np.uint8)

    result, _ = edits.variations(vary, PX, Settings(candidates=1, prompts_per_skill=2))
    assert result["mean"]["right"] == 0 and result["mean"]["moved"] is None
    assert 0 <= result["mean"]["conditions"]["background"] < 1
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize("task", edits.TASKS)
@pytest.mark.parametrize("px", [32, 64])
def test_edits_have_room_for_what_is_asked_and_hide_only_that(task, px):
    chosen = edits.edits(task, 20, px, seed=1)
    assert [e.asked for e in chosen] == [e.asked for e in edits.edits(task, 20, px, seed=1)]
    for edit in chosen:
        old, new = scenes.render(edit.given, px), scenes.render(edit.asked, px)
        assert not scenes.held_out_rules(edit.asked) and not scenes.held_out_rules(edit.given)
        assert edit.given.background == edit.asked.background
        known = edit.known[..., 0]
        assert 0.2 < known.mean() < 0.9
        assert known[[0, -1]].all() and known[:, [0, -1]].all()
        # A filter's ringing reaches further than the mask, unseen.
        assert np.abs(old[known].astype(int) - new[known]).max() < 8
        done = np.where(edit.known, old, new)
        if px > 32:  # templates of another size would take the judge 15 seconds to draw
            continue
        assert judge.judge(edit.asked, done)["all"]
        assert not judge.judge(edit.asked, old)["all"]
        names = {(item.color, item.shape) for item in edit.given.objects}
        assert (names < {(item.color, item.shape) for item in edit.asked.objects}) == (
            task == "add"
        )


def test_edits_know_their_tasks():
    with pytest.raises(UsageError, match="use one of replace, add"):
        edits.edits("remove", 1, PX, 0)


def painter(by_prompt: bool, num_right: int = 1, harm: int = 0):
    """Paints the scene of the caption as the first candidates; or leaves the picture as it is."""
    chosen = [edit for task in edits.TASKS for edit in edits.edits(task, 3, PX, 0)]
    of = {scenes.render(edit.given, PX).tobytes(): edit.asked for edit in chosen}

    noise = np.random.default_rng(0).integers(0, 256, (PX, PX, 3), np.uint8)

    def inpaint(picture, known, caption, num, index):
        asked = of[picture.tobytes()]
        new = scenes.render(asked, PX) if by_prompt and caption == asked.caption else picture
        pictures = np.stack(
            [np.where(known, picture, new if i < num_right else noise) for i in range(num)]
        )
        rows = np.argwhere(known[..., 0])[:harm]
        pictures[:, rows[:, 0], rows[:, 1], 0] ^= 1
        return pictures

    return inpaint


def test_inpainting_counts_what_is_asked_for_and_its_baseline():
    settings = Settings(candidates=2, prompts_per_skill=3)
    result, rows = edits.inpainting(painter(True), PX, settings)
    assert result["untouched"] == 1 and result["n"] == 6
    for task in edits.TASKS:
        figures = result["tasks"][task]
        assert figures["right"] == 0.5 and figures["chosen"] == 1
        assert figures["conditions"]["bind"] == 0.5
        assert figures["baseline"] == {"right": 0, "restored": 0.5}
        assert 0.1 < figures["drawn_anew"] < 0.8
    assert len(rows) == 6 and rows[0].labels == (
        "given",
        "masked",
        "right",
        "wrong",
        "old prompt",
    )
    assert json.loads(json.dumps(result)) == result


def test_inpainting_that_does_not_listen_or_does_not_keep():
    settings = Settings(candidates=1, prompts_per_skill=3)
    result, _ = edits.inpainting(painter(False), PX, settings)
    assert all(figures["right"] == 0 for figures in result["tasks"].values())
    assert all(figures["baseline"]["restored"] == 1 for figures in result["tasks"].values())
    result, _ = edits.inpainting(painter(True, harm=5), PX, settings)
    assert 0.95 < result["untouched"] < 1
