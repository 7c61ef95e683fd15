"""The suites with fakes for trained networks, their estimators against brute force, the command."""

import itertools
import json
import types

import jax
import numpy as np
import pytest

from dalle_jax import __main__ as main
from dalle_jax.cli import evaluate
from dalle_jax.data import scenes
from dalle_jax.engine import distributed
from dalle_jax.evaluation import codec, judge, retrieval, shapes
from dalle_jax.sampling import dalle as sampling
from dalle_jax.sampling import rerank
from dalle_jax.stages.clip import ClipStage
from dalle_jax.stages.codec import Codec
from dalle_jax.stages.dalle import DalleStage
from dalle_jax.types import UsageError

PX = 32


@pytest.fixture
def known_judge(monkeypatch):
    """The judge's accuracy is measured in test_shapes_judge."""
    monkeypatch.setattr(judge, "oracle_accuracy", lambda n, px: 1.0)


class Painter:
    """Draws prompts right with candidate c where `right(c)`, and else an empty picture."""

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
    result, examples = shapes.shapes_suite(
        image_px=PX,
        reconstruct=lambda images: images,
        generate=painter,
        score=lambda images, captions: (images != 255).mean(axis=(1, 2, 3)),
        prompts_per_skill=2,
        candidates=4,
        max_pictures=12,
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
    assert len(examples) == 16 and examples[0].labels[0].startswith("right")
    assert json.loads(json.dumps(result)) == result


def test_shapes_suite_without_clip_and_without_dalle(known_judge):
    result, _ = shapes.shapes_suite(
        image_px=PX,
        reconstruct=lambda images: images,
        generate=Painter(lambda candidate: candidate < 2),
        prompts_per_skill=2,
        candidates=4,
    )
    assert result["mean"]["best_of"] == {"1": 0.5}
    assert result["mean"]["oracle"] == pytest.approx({"1": 0.5, "2": 5 / 6, "4": 1.0})

    result, examples = shapes.shapes_suite(
        image_px=PX, reconstruct=lambda images: images // 2, prompts_per_skill=2
    )
    assert "best_of" not in result["mean"] and result["seconds_per_picture"] == {}
    assert result["mean"]["reconstruction"] < 1 and not examples


def test_shapes_suite_refuses_an_inexact_judge(monkeypatch):
    monkeypatch.setattr(judge, "oracle_accuracy", lambda n, px: 0.99)
    with pytest.raises(UsageError, match="99.00%"):
        shapes.shapes_suite(image_px=PX, reconstruct=lambda images: images)


def test_psnr_and_ssim_of_equal_and_of_noisy_pictures(rng):
    images = rng.integers(0, 256, (3, 16, 20, 3), dtype=np.uint8)
    np.testing.assert_allclose(codec.psnr(images, images), 100)
    np.testing.assert_allclose(codec.ssim(images, images), 1)
    others = images.copy()
    others[1] = np.where(others[1] < 128, others[1] + 16, others[1] - 16)
    assert codec.psnr(images, others)[1] == pytest.approx(20 * np.log10(255 / 16))
    assert codec.psnr(images, others)[0] == 100 and codec.ssim(images, others)[1] < 1
    with pytest.raises(ValueError, match="uint8"):
        codec.psnr(images, images.astype(float))
    with pytest.raises(ValueError, match="11 px"):
        codec.ssim(images[:, :10], images[:, :10])


def test_ssim_equals_its_definition_window_by_window(rng):
    x, y = rng.integers(0, 256, (2, 1, 13, 12, 1), dtype=np.uint8)
    line = np.exp(-np.square(np.arange(-5, 6)) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    values = []
    for row, column in itertools.product(range(3), range(2)):
        a, b = (image[0, row : row + 11, column : column + 11, 0].astype(float) for image in (x, y))
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
        cov = (window * (a - mean_a) * (b - mean_b)).sum()
        c1, c2 = 2.55**2, 7.65**2
        values.append(
            (2 * mean_a * mean_b + c1)
            * (2 * cov + c2)
            / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
        )
    assert codec.ssim(x, y)[0] == pytest.approx(np.mean(values), rel=1e-6)


def test_codebook_usage():
    usage = codec.codebook_usage(np.array([5, 5, 0, 5, 5, 0]))
    assert usage == {"codes": 6, "used": 4, "perplexity": pytest.approx(4)}
    assert codec.codebook_usage(np.array([0, 9]))["perplexity"] == pytest.approx(1)


def test_recon_suite_streams(rng):
    batches = [rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8) for n in (8, 8, 3)]
    decoded = iter(batches)
    result, shown = shapes.recon_suite(
        batches, lambda x: x[:, :2, :2, 0] % 4, lambda codes: next(decoded), num_codes=4
    )
    assert result["n"] == 19
    assert result["psnr"] == pytest.approx(100) and result["ssim"] == pytest.approx(1)
    assert result["codebook"]["codes"] == 4 and shown.shape == (16, 16, 16, 3)
    with pytest.raises(UsageError, match="no pictures"):
        shapes.recon_suite([], None, None, 4)


def test_recall_equals_brute_force_in_any_block(rng):
    groups = rng.integers(0, 6, 40)
    keys = np.unique(groups)
    a, b = rng.normal(size=(40, 3)), rng.normal(size=(len(keys), 3))
    expected = {}
    for k in (1, 3):
        hits = [groups[i] in keys[np.argsort(-(a[i] @ b.T))[:k]] for i in range(40)]
        expected[str(k)] = pytest.approx(np.mean(hits))
    for block in (1, 7, 100):
        assert retrieval.recall(a, b, groups, keys, (1, 3), block) == expected


def test_collapsed_embeddings_get_no_credit():
    same = np.ones((10, 4)) / 2
    assert retrieval.recall(same, same, np.arange(10), np.arange(10)) == {"1": 0, "5": 0}


def test_chance_equals_random_orders(rng):
    groups = np.array([0] * 5 + [1] * 3 + [2] * 2)
    expected = retrieval.chance(groups, groups, (1, 3))
    drawn = [groups[rng.permutation(10)] for _ in range(4000)]
    for k in (1, 3):
        simulated = np.mean([[g in order[:k] for g in groups] for order in drawn])
        assert expected[str(k)] == pytest.approx(simulated, abs=0.02)
    assert retrieval.chance(np.arange(4), np.arange(4), (1, 9)) == {"1": 0.25, "9": 1.0}


def test_retrieval_suite_joins_equal_captions():
    tokens = np.array([[2, 5], [2, 6], [2, 5], [2, 7]])
    batches = [(np.eye(4)[i : i + 2, None], tokens[i : i + 2]) for i in (0, 2)]
    space = np.eye(3)
    result = shapes.retrieval_suite(
        batches,
        lambda pictures: space[[[0, 1, 0, 2][i] for i in pictures[:, 0].argmax(-1)]],
        lambda ids: space[ids[:, 1] - 5],
    )
    assert result["n"] == 4 and result["captions"] == 3
    assert result["image_to_text"]["1"] == result["text_to_image"]["1"] == 1.0
    assert result["chance"]["image_to_text"]["1"] == pytest.approx(1 / 3)
    assert result["chance"]["text_to_image"]["1"] == pytest.approx(1 / 3)


@pytest.fixture
def fake_stages(monkeypatch, known_judge):
    """A codec without loss and a DALL-E that is right with every second candidate."""
    captions = [p.scene.caption for p in shapes.make_prompts(1, 0)]
    paint = Painter(lambda candidate: True, per_skill=1).pictures
    palette = np.stack([paint[caption] for caption in captions] + [np.zeros((PX, PX, 3))])

    def decode(codes):
        codes = np.asarray(codes)
        found = palette[codes[:, 0]] if codes.ndim == 2 else codes
        return found.astype(np.float32) / 127.5 - 1

    data = types.SimpleNamespace(text_len=1, add_bos_eos=False)
    codec = types.SimpleNamespace(
        image_px=PX,
        num_codes=256,
        encode=lambda x: np.rint((np.asarray(x) + 1) * 127.5).astype(np.int32),
        decode=decode,
    )
    stage = types.SimpleNamespace(
        codec=codec, model=None, on=lambda where: {}, config=types.SimpleNamespace(data=data)
    )

    def sample(model, params, text, *, num_candidates, **options):
        assert options["temperature"] == 0.5
        right = np.arange(num_candidates) % 2 == 0
        return np.where(right[None], text, len(captions))[..., None]

    monkeypatch.setattr(Codec, "load", lambda folder: codec)
    monkeypatch.setattr(DalleStage, "load", lambda folder, codec: stage)
    monkeypatch.setattr(ClipStage, "load", lambda folder: stage)
    monkeypatch.setattr(sampling, "sample", sample)
    monkeypatch.setattr(
        rerank, "score", lambda clip, pictures, text: np.abs(pictures + 1).mean(axis=(1, 2, 3))
    )
    monkeypatch.setattr(
        "dalle_jax.cli.evaluate_parts.tokens",
        lambda stage: lambda texts: np.array([[captions.index(text)] for text in texts]),
    )


def test_command_prints_json_alone_and_writes_its_pages(fake_stages, tmp_path, capsys):
    code = main.main(
        ["evaluate", "--suite=shapes", "--workdir=d", "--clip=c", "--prompts_per_skill=1"]
        + ["--candidates=4", "--temperature=0.5", "--json", f"--out={tmp_path}"]
        + ["--compilation_cache="]
    )
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert code == 0 and "judge: right on" in printed.err
    assert result["mean"]["best_of"] == pytest.approx({"1": 0.5, "2": 5 / 6, "4": 1.0}, abs=1e-4)
    assert result["networks"] == {"dalle": "d", "clip": "c"}
    assert "--candidates=4" in result["command"] and "--json" not in result["command"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == result
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    assert "candidates" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_processes_share_the_prompts(monkeypatch, count):
    def generate(captions, num_candidates, first_prompt):
        rows = [[first_prompt + k, int(caption)] for k, caption in enumerate(captions)]
        return np.repeat(np.array(rows)[:, None], num_candidates, axis=1)

    parts = []
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(distributed, "gather_rows", lambda rows: parts.append(rows) or rows)
    for i in range(count):
        monkeypatch.setattr(jax, "process_index", lambda i=i: i)
        evaluate._shared(generate)("56789", 2, 10)
    assert len({len(part) for part in parts}) == 1  # a collective needs equal shapes
    np.testing.assert_array_equal(np.concatenate(parts)[:5], generate("56789", 2, 10))


def test_command_measures_a_codec_alone(fake_stages, capsys):
    arguments = ["--suite=shapes", "--dvae=v", "--prompts_per_skill=1", "--compilation_cache="]
    assert main.main(["evaluate", *arguments]) == 0
    assert "reconstruction 100.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--suite=shapes"], "--workdir=DIR"),
        (["--suite=retrieval", "--dvae=x"], "--clip=DIR"),
        (["--suite=shapes", "--workdir=x", "--candidates=0"], "--candidates is 0"),
        (["--suite=recon", "--pretrained=nothing"], "nothing"),
        (["--suite=recon", "--dvae=missing-folder"], "missing-folder"),
    ],
)
def test_command_refuses_bad_input(arguments, text, capsys):
    assert main.main(["evaluate", *arguments, "--compilation_cache="]) == 2
    assert text in capsys.readouterr().err
