"""The table of suites: stages used, runs over priors, guidances and etas, both generators."""

import dataclasses
import io
import pathlib
import sys
import types

import jax
import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "sampling"))
import tiny_stages  # noqa: E402

from dalle_jax.cli import evaluate  # noqa: E402
from dalle_jax.data import scenes, tokenizers  # noqa: E402
from dalle_jax.data.builders import store  # noqa: E402
from dalle_jax.engine import distributed  # noqa: E402
from dalle_jax.evaluation import (  # noqa: E402
    distribution,
    generators,
    judge,
    progress,
    shapes,
    suites,
)
from dalle_jax.evaluation.settings import (  # noqa: E402
    DalleSettings,
    Examples,
    Settings,
    UnclipSettings,
)
from dalle_jax.sampling import diffusion, inversion, rerank, unclip  # noqa: E402
from dalle_jax.stages.codec import Codec  # noqa: E402
from dalle_jax.types import UsageError  # noqa: E402

NUM, PX = 10, 32


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> pathlib.Path:
    """A prepared set `pictures` of ten tinted pictures with captions."""
    data_dir, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)

    def pictures():
        for i in range(NUM):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(buffer, "PNG")
            picture = io.BytesIO(buffer.getvalue())
            yield (
                f"{i:03}",
                {"image": picture, "captions": [tiny_stages.CAPTIONS[i]], "id": str(i)},
            )

    store.write(
        data_dir=data_dir, name="pictures", features=store.image_text_features(),
        splits={"held_out": pictures}, description="test",
    )  # fmt: skip
    return data_dir


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> generators.UnclipGenerator:
    """DALL-E 2 of tiny untrained stages: pictures of 8 px, finished 16 px."""
    root = tmp_path_factory.mktemp("sets")
    clip = tiny_stages.write_clip(root / "clip")
    tiny_stages.write_unet(root / "decoder", clip)
    tiny_stages.write_unet(root / "inpaint", clip, **{"loss.inpaint": True})
    tiny_stages.write_unet(root / "upsampler_1")
    names = ("clip", "decoder", "inpaint", "upsampler_1")
    folders = {name: str(root / name) for name in names}
    return suites.Stages(folders, Settings()).unclip


@pytest.fixture
def exact_judge(monkeypatch):
    """Its accuracy is measured in test_judge."""
    monkeypatch.setattr(judge, "oracle_accuracy", lambda n, px: 1.0)


@pytest.fixture
def by_index(monkeypatch, exact_judge):
    """Networks that give noise by its index, and a judge that reads nothing in 8 px.

    What networks really sample and preserve is tested with the commands.
    """

    def sample(model, params, *, schedule, key, mesh, cond, indices, x_t, keep, **options):
        px = model.config.image_px
        noise = [np.random.default_rng(int(i)).uniform(-1, 1, (px, px, 3)) for i in indices]
        pictures = np.stack(noise).astype(np.float32)
        if "clip" in cond:
            pictures *= np.where(cond["has_clip"], 1, 0.5)[:, None, None, None]
        if x_t is not None:
            pictures = x_t + options["eta"] * pictures
        return pictures if keep is None else np.where(keep[1], keep[0], pictures)

    monkeypatch.setattr(diffusion, "sample", sample)
    monkeypatch.setattr(inversion, "invert", lambda model, params, cond, x, **options: x)
    monkeypatch.setattr(judge, "parse", lambda image: judge.Reading("white", ()))


def at(loaded, **options) -> types.SimpleNamespace:
    """The stages of a generator with these settings and two steps."""
    own = UnclipSettings(sampling=unclip.Settings(steps="2", upsample_steps=("2",)), **options)
    return types.SimpleNamespace(unclip=dataclasses.replace(loaded, settings=own))


def test_distributions_of_each_prior_against_the_same_real_pictures(data_dir, loaded, by_index):
    stages = at(loaded, priors=("none", "caption"), guidances=(1.0,))
    examples = Examples("pictures", str(data_dir), "held_out")
    settings = Settings(candidates=2, batch=6, examples=examples)
    result, rows = suites.distribution_by_unclip(stages, settings, progress.silent)
    assert result["split"] == "held_out" and result["features"] == "clip"
    assert [(run["prior"], run["guidance"]) for run in result["runs"]] == [
        ("none", 1), ("caption", 1),
    ]  # fmt: skip
    one, other = result["runs"]
    assert one["n"] == NUM and one["candidates"] == 2
    assert one["frechet_clip"] > 0 and one["frechet_clip"] != other["frechet_clip"]
    assert one["frechet_clip_floor"] == other["frechet_clip_floor"] > 0
    assert 0 < one["diversity"] < 1 and 0 <= one["recall"] <= 1
    titles = ["real", "prior none, guidance 1", "prior caption, guidance 1"]
    assert [row.title for row in rows] == titles
    assert set(rows[2].labels) < set(tiny_stages.CAPTIONS[:NUM])


def test_distribution_of_dalle(data_dir):
    calls = []

    def generate(ids, num, first):
        calls.append((len(ids), first))
        pictures = np.broadcast_to(ids[:, 2, None, None, None], (len(ids), 16, 16, 3))
        return pictures[:, None].repeat(num, 1).astype(np.uint8)

    reader = types.SimpleNamespace(
        config=tiny_stages.config("dalle"),
        tokenizer=tokenizers.Tokenizer(tiny_stages.tokenizer_bytes()),
    )
    generator = types.SimpleNamespace(
        network=reader, reader=reader, generate=generate, settings=DalleSettings()
    )
    stages = types.SimpleNamespace(dalle=generator, clip=None)
    examples = Examples("pictures", str(data_dir), "held_out", num=9)
    settings = Settings(candidates=2, batch=8, examples=examples, features="pixels")
    result, _ = suites.distribution_by_dalle(stages, settings, progress.silent)
    run = result["runs"][0]
    assert run["n"] == 9 and run["temperature"] == 1 and "frechet_pixels" in run
    assert run["diversity"] == pytest.approx(0, abs=1e-6)  # both candidates are one
    assert calls == [(4, 0), (4, 4), (4, 8)]


def test_variations_at_each_eta(loaded, by_index):
    stages = at(loaded, guidances=(1.0,))
    settings = Settings(prompts_per_skill=1, candidates=2, batch=4)
    result, rows = suites.variations(stages, settings, progress.silent)
    assert [(run["guidance"], run["eta"]) for run in result["runs"]] == [(1, 0), (1, 1)]
    assert [run["variations"] for run in result["runs"]] == [1, 2]
    for run in result["runs"]:
        assert run["n"] == 4 and run["mean"]["right"] == 0 and run["mean"]["moved"] is None
        assert (run["mean"]["pixel_change"] == 0) == (run["eta"] == 0)
    assert [row.title.rpartition(": ")[2] for row in rows[:2]] == [
        "guidance 1, eta 0", "guidance 1, eta 1",
    ]  # fmt: skip
    assert rows[0].title.partition(": ")[0] == rows[1].title.partition(": ")[0]


@pytest.mark.parametrize("is_finished", [True, False])
def test_inpainting_preserves_what_is_known(loaded, by_index, is_finished):
    if not is_finished:
        small = dataclasses.replace(loaded.stages, upsamplers=())
        loaded = dataclasses.replace(loaded, stages=small)
    stages = at(loaded, priors=("none",), guidances=(1.0,))
    settings = Settings(prompts_per_skill=1, candidates=2)
    result, _ = suites.inpainting(stages, settings, progress.silent)
    assert result["by"] == "inpainter"
    assert result["judge"]["image_px"] == (16 if is_finished else 8)
    run = result["runs"][0]
    assert run["untouched"] == 1 and run["candidates"] == 2 and run["prior"] == "none"
    for figures in run["tasks"].values():
        assert figures["right"] == figures["baseline"]["restored"] == 0
        assert 0 < figures["drawn_anew"] < 1


def test_the_priors_of_a_generator(loaded):
    assert loaded.priors == ["none", "caption"]  # no prior network, but a text encoder
    assert at(loaded, priors=("dalle", "none")).unclip.priors == ["none"]
    with pytest.raises(UsageError, match="there is no ar prior"):
        at(loaded, priors=("ar",)).unclip.check()
    bad = UnclipSettings(sampling=unclip.Settings(steps="x"))
    with pytest.raises(UsageError, match="spacing 'x'"):
        dataclasses.replace(loaded, settings=bad).check()


class Lossless(Codec):
    """A codec whose codes are the pixels."""

    image_px, num_codes = PX, 256

    def encode(self, pictures):
        return np.rint((np.asarray(pictures) + 1) * 127.5).astype(np.int32)

    def decode(self, codes):
        return np.asarray(codes).astype(np.float32) / 127.5 - 1


def test_shapes_of_dalle_ranked_by_its_clip(exact_judge, monkeypatch):
    prompts = [p.scene for p in shapes.make_prompts(1, 0)]
    captions = [scene.caption for scene in prompts]
    reader = types.SimpleNamespace(
        image_px=PX, tokenize=lambda texts: np.array([[captions.index(x)] for x in texts])
    )

    def generate(ids, num, first):
        empty = np.zeros((PX, PX, 3), np.uint8)
        paint = [scenes.render(prompts[i], PX) for i in ids[:, 0]]
        return np.stack([[empty if c % 2 else x for c in range(num)] for x in paint])

    monkeypatch.setattr(
        rerank, "score", lambda clip, pictures, ids: np.abs(pictures + 1).mean(axis=(1, 2, 3))
    )
    generator = types.SimpleNamespace(
        network=reader, reader=reader, generate=generate, reconstruct=lambda x: x
    )
    stages = types.SimpleNamespace(dalle=generator, clip=reader)
    settings = Settings(prompts_per_skill=1, candidates=4)
    result, _ = suites.shapes_by_dalle(stages, settings, progress.silent)
    assert result["mean"]["best_of"] == pytest.approx({"1": 0.5, "2": 5 / 6, "4": 1.0})


def test_shapes_of_a_codec_alone_are_its_ceiling(exact_judge):
    stages = types.SimpleNamespace(dalle=None, codec=Lossless(None, None))
    result, rows = suites.shapes_by_dalle(stages, Settings(prompts_per_skill=1), progress.silent)
    assert result["mean"]["reconstruction"] == 1 and "seen" not in result["mean"] and not rows


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_processes_share_the_prompts(monkeypatch, count):
    def generate(ids, num_candidates, first_prompt):
        rows = [[first_prompt + k, int(row)] for k, row in enumerate(ids)]
        return np.repeat(np.array(rows)[:, None], num_candidates, axis=1)

    parts, ids = [], np.arange(5, 10)
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(distributed, "gather_rows", lambda rows: parts.append(rows) or rows)
    for i in range(count):
        monkeypatch.setattr(jax, "process_index", lambda i=i: i)
        generators.shared(generate)(ids, 2, 10)
    assert len({len(part) for part in parts}) == 1  # a collective needs equal shapes
    np.testing.assert_array_equal(np.concatenate(parts)[:5], generate(ids, 2, 10))


@pytest.mark.parametrize(
    ("pipeline", "suite", "options", "expected"),
    [
        ("dalle", "shapes", {}, "dvae clip dalle"),
        ("dalle", "recon", {}, "dvae dalle"),
        ("dalle", "retrieval", {}, "clip"),
        ("unclip", "shapes", {}, "clip prior decoder"),
        ("unclip", "shapes", {"priors": ("dalle",)}, "dvae clip dalle prior decoder"),
        ("unclip", "distribution", {}, "clip prior decoder"),
        ("unclip", "variations", {}, "clip decoder"),
        ("unclip", "inpainting", {}, "clip prior decoder inpaint upsampler_1"),
        ("unclip", "inpainting", {"upsamples": False}, "clip prior decoder inpaint"),
    ],
)
def test_a_suite_uses_only_its_stages(pipeline, suite, options, expected):
    names = ("dvae", "clip", "dalle", "prior", "decoder", "inpaint", "upsampler_1")
    settings = Settings(unclip=UnclipSettings(**options))
    used = suites.networks(pipeline, suite, dict.fromkeys(names, "folder"), settings)
    assert " ".join(used) == expected


def test_a_clip_without_dalle_is_not_opened():
    folders = {"dvae": "v", "clip": "c"}
    assert suites.networks("dalle", "shapes", folders, Settings()) == {"dvae": "v"}


@pytest.mark.parametrize(
    ("pipeline", "suite", "text"),
    [
        ("dalle", "variations", "one of shapes, recon, retrieval, distribution, or another"),
        ("unclip", "recon", "one of shapes, distribution, variations, inpainting"),
        ("dalle", "retrieval", "--clip=DIR"),
        ("dalle", "distribution", "--workdir=DIR"),
    ],
)
def test_what_cannot_be_measured_is_refused(pipeline, suite, text):
    with pytest.raises(UsageError, match=text):
        suites.measure(pipeline, suite, {"dvae": "folder"}, Settings())


def test_the_command_lists_all_suites_and_features():
    assert set(evaluate.SUITES) == {suite for _, suite in suites.SUITES}
    assert evaluate.FEATURES == tuple(distribution.FEATURES)
