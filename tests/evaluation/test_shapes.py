"""Suite shapes with fakes for trained networks, and its estimators against brute force."""

import itertools
import json

import numpy as np
import pytest

from dalle_jax.data import scenes
from dalle_jax.evaluation import judge, shapes
from dalle_jax.evaluation.settings import Settings
from dalle_jax.types import UsageError

PX = 32


@pytest.fixture
def known_judge(monkeypatch):
    """An exact judge: its accuracy is measured in test_judge."""
    monkeypatch.setattr(judge, "oracle_accuracy", lambda n, px: 1.0)


class Painter:
    """The scene of the prompt as candidate c where `right(c)`, and else an empty picture."""

    def __init__(self, right, per_skill=2, seed=0):
        prompts = shapes.make_prompts(per_skill, seed)
        self.pictures = {p.scene.caption: scenes.render(p.scene, PX) for p in prompts}
        self.right, self.calls = right, []

    def __call__(self, captions, num_candidates, first_prompt):
        self.calls.append((len(captions), first_prompt))
        empty = np.full((PX, PX, 3), 255, np.uint8)
        return np.stack(
            [
                [self.pictures[c] if self.right(i) else empty for i in range(num_candidates)]
                for c in captions
            ]
        )


def test_estimators_equal_all_subsets():
    rng = np.random.default_rng(0)
    for _ in range(5):
        right, scores = rng.random(7) < 0.4, rng.permutation(7).astype(float)
        for k in range(1, 8):
            subsets = [list(subset) for subset in itertools.combinations(range(7), k)]
            best = np.mean([right[s][scores[s].argmax()] for s in subsets])
            assert shapes.best_of(right, scores, k) == pytest.approx(best)
            assert shapes.any_of(right, k) == pytest.approx(
                np.mean([right[s].any() for s in subsets])
            )
        assert shapes.best_of(right, scores, 1) == pytest.approx(right.mean())


def test_nan_scores_never_win():
    right = np.array([True, False])
    assert shapes.best_of(right, np.array([np.nan, 0.1]), 2) == 0


def test_curve_points():
    assert shapes.powers(1) == [1]
    assert shapes.powers(8) == [1, 2, 4, 8]
    assert shapes.powers(12) == [1, 2, 4, 8, 12]


def test_prompts_are_halved_equal_in_number_and_seeded():
    prompts = shapes.make_prompts(30, seed=1)
    for kind in scenes.KINDS:
        for half in ("seen", "held_out"):
            part = [p.scene for p in prompts if (p.scene.kind, p.half) == (kind, half)]
            assert len(part) == 30
            assert all(bool(scenes.held_out_rules(s)) == (half == "held_out") for s in part)
            distinct = len({scene.caption for scene in part})
            assert distinct == (24 if (kind, half) == ("single", "held_out") else 30)
    assert prompts == shapes.make_prompts(30, seed=1) != shapes.make_prompts(30, seed=2)
    # A skill's prompts do not depend on which others are asked for.
    binding = [p for p in prompts if p.scene.kind == "binding"]
    assert shapes.make_prompts(30, seed=1, skills=("binding",)) == binding


def test_shapes_suite_counts_exactly(known_judge):
    painter = Painter(lambda candidate: candidate == 2)
    lines = []
    result, rows = shapes.suite(
        image_px=PX,
        reconstruct=lambda images: images,
        generate=painter,
        score=lambda images, captions: (images != 255).mean(axis=(1, 2, 3)),
        settings=Settings(prompts_per_skill=2, candidates=4, batch=12),
        report=lines.append,
    )
    assert list(result["skills"]) == list(scenes.KINDS)
    for skill in [*result["skills"].values(), result["mean"]]:
        assert skill["seen"] == skill["held_out"] == 0.25
        # The scorer is perfect, so that CLIP's choice is the oracle's.
        assert skill["best_of"] == skill["oracle"] == {"1": 0.25, "2": 0.5, "4": 1.0}
        assert skill["held_out_best_of"] == skill["held_out_oracle"] == skill["oracle"]
        assert skill["reconstruction"] == skill["held_out_reconstruction"] == 1.0
    assert result["skills"]["relation"]["conditions"]["relation"] == 0.25
    assert result["skills"]["single"]["n"] == 2
    assert result["judge"] == {"oracle_accuracy": 1.0, "n": 400, "image_px": PX}
    # 16 prompts in chunks of 3, the last one filled up to the same shape.
    assert painter.calls == [(3, start) for start in range(0, 16, 3)]
    seconds = result["seconds_per_picture"]
    assert list(seconds) == ["1", "2", "4"] and 0 < seconds["1"] < seconds["2"] < seconds["4"]
    assert "64 of 64 pictures" in lines[-1]
    assert len(rows) == 16 and rows[0].labels[0].startswith("right")
    assert json.loads(json.dumps(result)) == result


def test_shapes_suite_without_clip_and_without_dalle(known_judge):
    settings = Settings(prompts_per_skill=2, candidates=4)
    options = dict(image_px=PX, settings=settings)
    generate = Painter(lambda candidate: candidate < 2)
    result, _ = shapes.suite(reconstruct=lambda images: images, generate=generate, **options)
    assert result["mean"]["best_of"] == {"1": 0.5}
    assert result["mean"]["oracle"] == pytest.approx({"1": 0.5, "2": 5 / 6, "4": 1.0})

    result, rows = shapes.suite(reconstruct=lambda images: images // 2, **options)
    assert "best_of" not in result["mean"] and result["seconds_per_picture"] == {}
    assert result["mean"]["reconstruction"] < 1 and not rows


def test_shapes_suite_refuses_an_inexact_judge(monkeypatch):
    monkeypatch.setattr(judge, "oracle_accuracy", lambda n, px: 0.99)
    with pytest.raises(UsageError, match="99.00%"):
        shapes.suite(image_px=PX, reconstruct=lambda images: images, settings=Settings())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"candidates": 0}, "candidates=0"),
        ({"seed": -1}, "seed=-1"),
        ({"skills": ("single", "triple")}, "single, count, binding, relation"),
        ({"skills": ("single", "single")}, "each once"),
    ],
)
def test_settings_refuse_what_cannot_be_measured(options, text):
    with pytest.raises(UsageError, match=text):
        Settings(**options)
