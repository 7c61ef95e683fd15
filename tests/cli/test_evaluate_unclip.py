"""`evaluate` by sets, variations and inpainting on tiny untrained stages: figures and refusals."""

import io
import json
import pathlib
import sys
import types

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "sampling"))
import tiny_stages  # noqa: E402

from dalle_jax.__main__ import main  # noqa: E402
from dalle_jax.data import tokenizers  # noqa: E402
from dalle_jax.data.builders import store  # noqa: E402
from dalle_jax.evaluation import judge  # noqa: E402
from dalle_jax.sampling import dalle as sampling  # noqa: E402
from dalle_jax.sampling import inversion, unclip  # noqa: E402
from dalle_jax.stages import pretrained  # noqa: E402
from dalle_jax.stages.dalle import DalleStage  # noqa: E402
from dalle_jax.stages.unclip import Unclip  # noqa: E402

NUM = 10
_LOADED, _LOAD = {}, Unclip.load  # equal folders are read once


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
def root(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("sets")
    clip = tiny_stages.write_clip(root / "tiny" / "clip")
    tiny_stages.write_unet(root / "tiny" / "decoder", clip)
    tiny_stages.write_unet(root / "tiny" / "inpaint", clip, **{"loss.inpaint": True})
    tiny_stages.write_unet(root / "tiny" / "upsampler_1")
    (root / "old" / "dalle").mkdir(parents=True)
    return root


@pytest.fixture(autouse=True)
def sets(root, monkeypatch):
    """The tiny stages as pretrained sets, and a judge that sees nothing in pictures of 8 px.

    Networks draw noise by index: what they really draw and keep is tested with the commands.
    """

    def draw(stage, cond, spacing, options, *, indices, x_t=None, keep=None, **more):
        shape = (stage.image_px, stage.image_px, 3)
        drawn = [np.random.default_rng(int(i)).uniform(-1, 1, shape) for i in indices]
        drawn = np.stack(drawn).astype(np.float32)
        if "clip" in cond:
            drawn *= np.where(cond["has_clip"], 1, 0.5)[:, None, None, None]
        if x_t is not None:
            drawn = x_t + options["eta"] * drawn
        return drawn if keep is None else np.where(keep[1], keep[0], drawn)

    def load(folders):
        name = tuple(folders.items())
        if name not in _LOADED:
            _LOADED[name] = _LOAD(folders)
        return _LOADED[name]

    monkeypatch.setattr(Unclip, "load", load)
    monkeypatch.setattr(unclip, "_sample", draw)
    monkeypatch.setattr(inversion, "invert", lambda model, params, cond, x, **options: x)
    monkeypatch.setattr(pretrained, "ROOT", root)
    monkeypatch.setattr(judge, "oracle_accuracy", lambda n, px: 1.0)
    nothing = judge.Reading("white", ())
    monkeypatch.setattr(judge, "parse", lambda image: nothing)


def evaluate(*flags: str) -> int:
    return main(["evaluate", "--compilation_cache=", *flags])


def by_unclip(suite: str, out, *flags: str) -> int:
    common = ("--pipeline=unclip", "--pretrained=tiny", "--steps=2", f"--out={out}", "--json")
    return evaluate(f"--suite={suite}", *common, *flags)


def test_drawn_and_real_pictures_as_sets(data_dir, tmp_path, capsys):
    set_flags = ("--source=pictures", f"--data_dir={data_dir}", "--split=held_out")
    flags = ("--ways=none,caption", "--guidances=1", "--batch=6", *set_flags)
    assert by_unclip("distribution", tmp_path, *flags) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["split"] == "held_out" and "--candidates=2" in result["command"]
    assert [(run["prior"], run["guidance"]) for run in result["runs"]] == [
        ("none", 1), ("caption", 1),
    ]  # fmt: skip
    one, other = result["runs"]
    assert one["n"] == NUM and one["candidates"] == 2
    assert one["frechet_clip"] > 0 and one["frechet_clip"] != other["frechet_clip"]
    assert one["frechet_clip_floor"] == other["frechet_clip_floor"] > 0
    assert 0 < one["diversity"] < 1 and 0 <= one["recall"] <= 1
    page = (tmp_path / "index.html").read_text()
    assert tiny_stages.CAPTIONS[0] in page and "no published FID" in page
    assert (tmp_path / "sheet.png").exists()


def test_dalle_draws_for_the_same_suite(data_dir, tmp_path, monkeypatch, capsys):
    calls = []

    def sample(model, params, text, *, num_candidates, first_prompt, **options):
        calls.append((text.shape[0], first_prompt))
        return np.broadcast_to(text[:, None, 2:3], (len(text), num_candidates, 16)) % 8

    codec = types.SimpleNamespace(
        image_px=16,
        num_codes=8,
        decode=lambda codes: np.broadcast_to(codes[:, :1, None, None] / 8, (len(codes), 16, 16, 3)),
    )
    config, words = tiny_stages.config("dalle"), tiny_stages.tokenizer_bytes()
    stage = types.SimpleNamespace(
        codec=codec,
        model=None,
        on=lambda where: {},
        config=config,
        tokenizer=tokenizers.Tokenizer(words),
    )
    monkeypatch.setattr(DalleStage, "load", lambda folder, codec: stage)
    monkeypatch.setattr(sampling, "sample", sample)
    flags = ("--suite=distribution", "--pretrained=old", "--features=pixels", "--batch=8")
    flags += ("--source=pictures", f"--data_dir={data_dir}", "--split=held_out", "--json")
    assert evaluate(*flags, "--num_examples=9", f"--out={tmp_path}") == 0
    run = json.loads(capsys.readouterr().out)["runs"][0]
    assert run["n"] == 9 and run["temperature"] == 1 and "frechet_pixels" in run
    assert run["diversity"] == pytest.approx(0, abs=1e-6)  # both candidates are one
    assert calls == [(4, 0), (4, 4), (4, 8)]
    assert evaluate(*flags[:2]) == 2
    assert "give --clip=DIR, or --features=pixels" in capsys.readouterr().err


def test_variations_at_each_eta(tmp_path, capsys):
    flags = ("--prompts_per_skill=1", "--candidates=2", "--batch=4")
    assert by_unclip("variations", tmp_path, *flags) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(run["guidance"], run["eta"]) for run in result["runs"]] == [(1, 0), (1, 1)]
    assert [run["variations"] for run in result["runs"]] == [1, 2]
    for run in result["runs"]:
        assert run["n"] == 4 and run["mean"]["right"] == 0 and run["mean"]["moved"] is None
        assert (run["mean"]["pixel_change"] == 0) == (run["eta"] == 0)
    pages = (tmp_path / "index.html").read_text()
    assert "guidance 1, eta 0" in pages and "by chance" in pages
    assert list(result["networks"]) == ["clip", "decoder"]


@pytest.mark.parametrize("more", [(), ("--no_upsample",)])
def test_inpainting_leaves_what_is_known(tmp_path, capsys, more):
    flags = ("--prompts_per_skill=1", "--candidates=2", "--ways=none", "--guidances=1")
    steps = () if more else ("--upsample_steps=2",)
    assert by_unclip("inpainting", tmp_path, *flags, *steps, *more) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["by"] == "inpainter" and result["judge"]["image_px"] == (8 if more else 16)
    assert ("upsampler_1" in result["networks"]) == (not more)
    run = result["runs"][0]
    assert run["untouched"] == 1 and run["candidates"] == 2 and run["prior"] == "none"
    for figures in run["tasks"].values():
        assert figures["right"] == figures["baseline"]["restored"] == 0
        assert 0 < figures["drawn_anew"] < 1
    assert "old scene restored" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--suite=shapes", "--skills=single,triple"], "single, count, binding, relation"),
        (["--suite=variations", "--skills=single"], "--skills is of --suite=shapes"),
        (["--suite=variations"], "add --pipeline=unclip"),
        (["--suite=distribution", "--num_examples=3"], "--num_examples=3 is too few"),
        (["--suite=shapes", "--features=clip"], "--features is of --suite=distribution"),
        (["--suite=shapes", "--no_upsample"], "--no_upsample is of --suite=inpainting"),
        (["--suite=recon", "--pipeline=unclip"], "shapes, distribution, variations, inpainting"),
        (["--suite=variations", "--pipeline=unclip", "--etas=0,2"], "--etas=0,2; expected"),
        (["--suite=variations", "--pipeline=unclip", "--ways=none"], "have no caption"),
        (["--suite=variations", "--pipeline=unclip", "--eta=1"], "leave --eta and --sampler"),
        (["--suite=shapes", "--pipeline=unclip", "--guidance=3"], "--guidances=3, or several"),
        (["--suite=inpainting", "--pipeline=unclip", "--ways=ar"], "there is no ar prior"),
        (["--suite=inpainting", "--pipeline=unclip", "--steps=x"], "spacing 'x'"),
    ],
)
def test_bad_input_exits_2_before_anything_is_drawn(capsys, flags, says):
    assert evaluate("--pretrained=tiny", *flags) == 2
    assert says in capsys.readouterr().err
