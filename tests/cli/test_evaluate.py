"""The command `evaluate`: flags into settings, JSON alone on stdout, pages, refusals."""

import json

import numpy as np
import pytest

from dalle_jax.__main__ import main
from dalle_jax.data import scenes
from dalle_jax.evaluation import judge, shapes, suites
from dalle_jax.evaluation.results import Result, Row
from dalle_jax.stages import pretrained

PX = 32


def evaluate(*flags: str) -> int:
    return main(["evaluate", "--compilation_cache=", *flags])


@pytest.fixture
def measured(monkeypatch):
    """Suite shapes for a generator that is right with every second candidate; its arguments."""
    calls = []
    monkeypatch.setattr(judge, "oracle_accuracy", lambda n, px: 1.0)

    def measure(pipeline, suite, folders, settings, report):
        calls.append((pipeline, suite, folders, settings))
        prompts = [p.scene for p in shapes.make_prompts(settings.prompts_per_skill, settings.seed)]
        paint = {scene.caption: scenes.render(scene, PX) for scene in prompts}

        def generate(captions, num, first):
            return np.stack([[paint[c] // (1 + i % 2) for i in range(num)] for c in captions])

        figures, rows = shapes.suite(
            image_px=PX,
            reconstruct=lambda pictures: pictures,
            generate=generate,
            score=lambda pictures, captions: pictures.mean(axis=(1, 2, 3)),
            settings=settings,
            report=report,
        )
        return Result({"suite": suite, **figures, "networks": folders}, rows)

    monkeypatch.setattr(suites, "measure", measure)
    return calls


def test_command_prints_json_alone_and_writes_its_pages(measured, tmp_path, capsys):
    flags = ("--suite=shapes", "--workdir=d", "--clip=c", "--prompts_per_skill=1", "--top_k=7")
    more = ("--candidates=4", "--temperature=0.5", "--json", f"--out={tmp_path / 'out'}")
    assert evaluate(*flags, *more) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert "judge: right on" in printed.err
    assert result["networks"] == {"dalle": "d", "clip": "c"}
    assert "--candidates=4" in result["command"] and "--json" not in result["command"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == result
    assert (tmp_path / "out" / "sheet.png").stat().st_size > 1000
    page = (tmp_path / "out" / "index.html").read_text()
    assert "candidates" in page and "(held-out)" in page and "oracle 4" in page
    (pipeline, suite, _, settings) = measured[0]
    assert (pipeline, suite, settings.candidates) == ("dalle", "shapes", 4)
    assert (settings.dalle.temperature, settings.dalle.top_k) == (0.5, 7)


def test_command_prints_a_table(measured, capsys):
    assert evaluate("--suite=shapes", "--dvae=v", "--prompts_per_skill=1", "--candidates=2") == 0
    out = capsys.readouterr().out
    assert "reconstruction 100.0%" in out and "best-of 1:" in out


def test_flags_of_dalle_2_become_settings(monkeypatch, tmp_path):
    for name in ("clip", "decoder"):
        (tmp_path / "set" / name).mkdir(parents=True)
    monkeypatch.setattr(pretrained, "ROOT", tmp_path)
    settings = []
    monkeypatch.setattr(suites, "measure", lambda *given: settings.append(given) or Result({}))
    flags = ("--pipeline=unclip", "--pretrained=set", "--json", "--prior_steps=9")
    assert evaluate("--suite=variations", "--etas=0,0.5", *flags) == 0
    assert evaluate("--suite=shapes", "--ways=none,dalle", "--guidance=3", *flags) == 0
    assert evaluate("--suite=inpainting", "--no_upsample", "--upsample_steps=4", *flags) == 0
    (_, _, folders, first, _), (_, _, _, second, _), (_, _, _, third, _) = settings
    assert set(folders) == {"clip", "decoder"}
    assert first.candidates == 4 and first.unclip.guidances == (1,)
    assert first.unclip.etas == (0, 0.5) and first.unclip.priors is None
    assert second.candidates == 64 and second.unclip.guidances == (2,)
    assert second.unclip.priors == ("none", "dalle") and second.dalle.guidance == 3
    assert second.unclip.prior_options["diffusion"] == {"guidance_scale": 1, "steps": "9"}
    assert not third.unclip.upsamples and third.unclip.sampling.upsample_steps == ("4",)


SKILL = {"n": 2, "seen": 0.5, "held_out": 0.25, "reconstruction": 1.0, "best_of": {"1": 0.5}}
EDIT = {"right": 0.5, "conditions": {"bind": 0.5, "relation": 0.5}, "chance": {"right": 0.1}}
RESULTS = {  # suite -> figures, and what its page shows
    "shapes": (
        {
            "runs": [
                {"prior": name, "guidance": g, "skills": {"single": SKILL}, "mean": SKILL}
                | {"temperature": 0.9, "top_k": 0, "top_p": 1}
                for name, g in (("none", 1), ("none", 2), ("dalle", 1))
            ]
        },
        ("DALL-E 1 and 2", "temperature 0.9", "Guidance: right pictures"),
    ),
    "recon": (
        {"n": 9, "split": "s", "psnr": 20.5, "ssim": 0.5}
        | {"codebook": {"codes": 8, "used": 7, "perplexity": 5.0}},
        ("20.50 dB", "9 pictures of the s split"),
    ),
    "retrieval": (
        {"n": 9, "split": "s", "captions": 3, "image_to_text": {"1": 0.25}}
        | {"text_to_image": {"1": 0.125}}
        | {"chance": {"image_to_text": {"1": 0.1}, "text_to_image": {"1": 0.2}}},
        ("recall@1", "text to image (chance)", "3 distinct captions"),
    ),
    "distribution": (
        {"split": "s", "features": "clip", "runs": [{"prior": "none", "n": 9, "precision": 0.5}]},
        ("no published FID", "9 pictures of the s split"),
    ),
    "variations": (
        {
            "runs": [
                {"guidance": 1, "eta": 0, "n": 4}
                | {"kinds": {"relation": {**EDIT, "moved": None, "pixel_change": 0.0}}}
                | {"mean": {**EDIT, "moved": None, "pixel_change": 0.0}}
            ]
        },
        ("guidance 1, eta 0", "by chance"),
    ),
    "inpainting": (
        {
            "by": "inpainter",
            "runs": [
                {"prior": "none", "guidance": 1, "untouched": 1.0}
                | {"tasks": {"add": {"right": 0.5, "chosen": 1.0, "drawn_anew": 0.25}
                             | {"baseline": {"right": 0.0, "restored": 1.0}}}}
            ],
        },
        ("old scene restored", "by the inpainter"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("suite", RESULTS)
def test_every_suite_has_its_page(monkeypatch, tmp_path, capsys, suite):
    figures, words = RESULTS[suite]
    has_pictures = suite != "retrieval"
    rows = [Row("a red cube", np.zeros((1, 8, 8, 3), np.uint8), ("wrong",))] * has_pictures
    monkeypatch.setattr(suites, "measure", lambda *given: Result({"suite": suite, **figures}, rows))
    monkeypatch.setattr(suites, "find", lambda *given: None)
    assert evaluate(f"--suite={suite}", f"--out={tmp_path}", "--json") == 0
    page = (tmp_path / "index.html").read_text()
    for text in (*words, f"--suite={suite}"):
        assert text in page, text
    assert (tmp_path / "sheet.png").exists() == ("a red cube" in page) == has_pictures


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--suite=shapes"], "--workdir=DIR"),
        (["--suite=retrieval", "--dvae=x"], "--clip=DIR"),
        (["--suite=shapes", "--workdir=x", "--candidates=0"], "candidates=0"),
        (["--suite=recon", "--pretrained=nothing"], "nothing"),
        (["--suite=recon", "--dvae=missing-folder"], "missing-folder"),
        (["--suite=shapes", "--skills=single,triple"], "single, count, binding, relation"),
        (["--suite=variations", "--skills=single"], "--skills belongs to --suite=shapes"),
        (["--suite=variations"], "or another --pipeline"),
        (["--suite=distribution", "--num_examples=3"], "3 examples are too few"),
        (["--suite=distribution", "--workdir=x"], "give --clip=DIR, or --features=pixels"),
        (["--suite=shapes", "--features=clip"], "--features belongs to --suite=distribution"),
        (["--suite=shapes", "--no_upsample"], "--no_upsample belongs to --suite=inpainting"),
        (["--suite=recon", "--pipeline=unclip"], "shapes, distribution, variations, inpainting"),
        (["--suite=variations", "--pipeline=unclip", "--etas=0,2"], "--etas=0,2; expected"),
        (["--suite=variations", "--pipeline=unclip", "--ways=none"], "have no caption"),
        (["--suite=variations", "--pipeline=unclip", "--eta=1"], "leave --eta and --sampler"),
        (["--suite=shapes", "--pipeline=unclip", "--guidance=3"], "--guidance belongs to DALL-E 1"),
    ],
)
def test_bad_input_exits_2_before_anything_is_sampled(flags, text, capsys):
    assert evaluate(*flags) == 2
    assert text in capsys.readouterr().err
