"""The commands of DALL-E 2 on tiny untrained stages: what they write, repeat and refuse."""

import json
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "sampling"))
import tiny_stages  # noqa: E402

from dalle_jax import images  # noqa: E402
from dalle_jax.__main__ import main  # noqa: E402
from dalle_jax.cli import _unclip  # noqa: E402
from dalle_jax.data import preprocess  # noqa: E402
from dalle_jax.evaluation import shapes  # noqa: E402
from dalle_jax.evaluation.results import Result, Row  # noqa: E402
from dalle_jax.pipelines import inputs  # noqa: E402
from dalle_jax.sampling import inversion, unclip  # noqa: E402
from dalle_jax.stages import pretrained  # noqa: E402
from dalle_jax.types import UsageError  # noqa: E402

PROMPT = "a red cube on a white background"
FAST = ("--steps=2", "--upsample_steps=2", "--compilation_cache=")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("sets")
    tiny_stages.write_unclip(root / "tiny")
    (root / "old" / "dalle").mkdir(parents=True)
    return root


@pytest.fixture(scope="module")
def dalle(tmp_path_factory) -> str:
    """A DALL-E 1; its codec lies where its config says."""
    folder = tmp_path_factory.mktemp("dalle-1")
    return tiny_stages.write_dalle(folder / "dalle", tiny_stages.write_codec(folder / "codec"))


@pytest.fixture(autouse=True)
def sets(root, monkeypatch):
    monkeypatch.setattr(pretrained, "ROOT", root)


@pytest.fixture
def picture(tmp_path, rng) -> str:
    """Of odd size and mode."""
    path = tmp_path / "room.png"
    pixels = rng.integers(0, 256, (21, 27, 4), np.uint8)
    pixels[..., 3] |= 128
    Image.fromarray(pixels).save(path)
    return str(path)


def call(command: str, *flags: str) -> int:
    return main([command, "--pretrained=tiny", *FAST, *flags])


def results(out: pathlib.Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_sample_draws_ranks_and_finishes(tmp_path, capsys):
    flags = ("--pipeline=unclip", f"--prompt={PROMPT}", "--prior=none", "--guidance=1")
    for name, more in (("a", "--candidates=2"), ("b", "--candidates=3")):
        assert call("sample", *flags, more, "--keep=2", f"--out={tmp_path / name}", "--json") == 0
        assert json.loads(capsys.readouterr().out)["results"][0]["prompt"] == PROMPT
    folder = next((tmp_path / "a").glob("*/"))
    assert images.read(folder / "01.png").shape == (16, 16, 3)
    assert images.read(folder / "01_small.png").shape == (8, 8, 3)
    assert np.load(folder / "embeddings.npy").shape[0] == 2
    best = json.loads((folder / "scores.json").read_text())["kept"][0]
    assert best["file"] == str(folder / "01.png")
    assert best["small"] == str(folder / "01_small.png")
    scores = [json.loads(next(tmp_path.glob(f"{n}/*/scores.json")).read_text()) for n in "ab"]
    np.testing.assert_allclose(scores[0]["scores"], scores[1]["scores"][:2], atol=1e-4)
    page = (tmp_path / "a" / "index.html").read_text()
    assert PROMPT in page and "--pipeline=unclip" in page and "<script" not in page


def test_vary_tells_what_it_does_to_a_picture_and_gives_it_back_at_eta_0(tmp_path, picture, capsys):
    out = tmp_path / "out"
    assert call("vary", f"--image={picture}", "--n=2", f"--out={out}") == 0
    said = capsys.readouterr().err
    assert "27 x 21; its central 21 x 21" in said and "mode RGBA" in said
    found = results(out)
    assert [pathlib.Path(f).stem for f in found["results"][0]["files"]] == [
        "given", "00", "01", "02",
    ]  # fmt: skip
    assert len(found["results"][0]["labels"]) == 4 and "seconds" in found["results"][0]["text"]
    given = preprocess.crop_center(images.read(picture), 16)
    np.testing.assert_array_equal(images.read(out / "room" / "given.png"), given)
    assert call("vary", f"--image={picture}", "--eta=0", f"--out={out}") == 0
    assert "picture itself" in capsys.readouterr().err
    assert not (out / "room" / "02.png").exists()
    still = [images.read(out / "room" / f"{name}.png") for name in ("00", "01")]
    np.testing.assert_array_equal(*still)


@pytest.mark.parametrize("how", ["alpha", "rect", "inverted"])
def test_inpaint_keeps_what_is_known_bit_for_bit(tmp_path, picture, how):
    out = tmp_path / "out"
    anew = np.zeros((21, 27), bool)
    anew[5:14, 8:20] = True
    mask = tmp_path / "mask.png"
    alpha = np.where(anew, 0, 255).astype(np.uint8)
    if how == "alpha":
        Image.fromarray(np.stack([alpha] * 4, axis=-1)).save(mask)
    else:
        Image.fromarray(alpha).save(mask)  # white where the picture stays
    flags = {
        "alpha": [f"--mask={mask}"],
        "inverted": [f"--mask={mask}", "--invert_mask"],
        "rect": ["--rect=8,5,12,9"],
    }[how]
    flags += [f"--prompt={PROMPT}", "--prior=none", "--candidates=2", "--keep=1"]
    assert call("inpaint", f"--image={picture}", *flags, f"--out={out}") == 0
    known = inputs.fit_mask(~anew, 16)[..., 0]
    given, drawn = (images.read(out / f"{name}.png") for name in ("given", "01"))
    np.testing.assert_array_equal(given[known], drawn[known])
    assert 0.2 < results(out)["results"][0]["drawn_anew"] < 0.6
    assert (given[~known] != drawn[~known]).any()


def test_interpolate_edit_and_reconstruct_write_their_pictures(tmp_path, picture):
    pair = (f"--image={picture}", f"--image={picture}", "--num=3")
    assert call("interpolate", *pair, f"--out={tmp_path / 'i'}") == 0
    assert results(tmp_path / "i")["results"][0]["theta"] == [0, 0.5, 1]
    texts = (f"--to={PROMPT}", "--from=a blue star", "--thetas=0,0.4,0.9")
    assert call("edit", f"--image={picture}", *texts, f"--out={tmp_path / 'e'}") == 0
    edit = results(tmp_path / "e")["results"][0]
    assert edit["from"] == "a blue star" and len(edit["cosine_to"]) == 4
    assert "'--from=a blue star'" in results(tmp_path / "e")["command"]
    out = tmp_path / "r"
    assert call("reconstruct", f"--image={picture}", "--dims=2,4", f"--out={out}") == 0
    near = results(out)["results"][0]["cosine"]
    assert near[0] < near[1] and (out / "room" / "004.png").exists()
    for folder in "ier":
        assert (tmp_path / folder / "sheet.png").exists()
        assert "python -m dalle_jax" in (tmp_path / folder / "index.html").read_text()


@pytest.fixture
def drawn(monkeypatch) -> list[np.ndarray]:
    """What `evaluate` generates for a suite that only looks at shapes."""
    drawn = []

    def suite(*, generate, score, reconstruct, image_px, settings, report):
        captions = tiny_stages.CAPTIONS[:2]
        pictures = generate(captions, 2, 3)
        assert pictures.shape == (2, 2, image_px, image_px, 3) and pictures.dtype == np.uint8
        assert reconstruct(pictures[:, 0]).shape == pictures[:, 0].shape
        assert score(pictures[:, 0], captions).shape == (2,)
        drawn.append(pictures)
        skill = {"seen": 0.5, "held_out": 0.25, "reconstruction": 1.0, "best_of": {"1": 0.5}}
        skill |= {"oracle": {"1": 0.5}, "n": 2}
        figures = {"skills": {"single": skill}, "mean": skill, "seconds_per_picture": {"1": 1.0}}
        figures["judge"] = {"oracle_accuracy": 1.0, "n": 1, "image_px": image_px}
        return Result(figures, [Row("a caption", pictures[0], ("right", "wrong"))])

    monkeypatch.setattr(shapes, "suite", suite)
    return drawn


def evaluate(capsys, *flags: str) -> dict:
    flags = ("--suite=shapes", "--json", "--steps=2", "--compilation_cache=", *flags)
    assert main(["evaluate", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_evaluate_measures_every_way_on_the_same_prompts(drawn, tmp_path, capsys):
    flags = ("--pretrained=tiny", "--pipeline=unclip", "--ways=none,caption", "--guidances=1,2")
    runs = evaluate(capsys, *flags, f"--out={tmp_path}")["runs"]
    assert [(run["prior"], run["guidance"]) for run in runs] == [
        ("none", 1), ("caption", 1), ("none", 2), ("caption", 2),
    ]  # fmt: skip
    assert all((a != b).any() for a, b in zip(drawn, drawn[1:], strict=False))
    assert "Guidance" in (tmp_path / "index.html").read_text()


def test_evaluate_puts_a_dalle_beside_them(root, dalle, drawn, tmp_path, capsys):
    clip = str(root / "tiny" / "clip")
    as_large = {"data.image_px": tiny_stages.PX, "model.attention_px": (8,)}
    decoder = tiny_stages.write_unet(tmp_path / "decoder", clip, **as_large)
    flags = (f"--clip={clip}", f"--workdir={dalle}", "--temperature=0.9")
    both = ("--pipeline=unclip", f"--decoder={decoder}", "--ways=dalle,none", "--guidances=1,2")
    result = evaluate(capsys, *flags, *both, f"--out={tmp_path}")
    assert [(run["prior"], run["guidance"]) for run in result["runs"]] == [
        ("none", 1), ("none", 2), ("dalle", 1),
    ]  # fmt: skip
    assert result["runs"][-1]["temperature"] == 0.9 and result["networks"]["dalle"] == dalle
    page = (tmp_path / "index.html").read_text()
    for said in (
        "DALL-E 1 and 2",
        ": prior dalle, guidance 1",
        ": prior none, guidance 2",
        "top_p 1",
    ):
        assert said in page, said
    evaluate(capsys, *flags)  # the same pictures as by itself
    np.testing.assert_array_equal(drawn[-1], drawn[-2])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--workdir=runs/dalle"], "with 'dalle' among --ways"),
        (["--dvae=runs/dvae", "--ways=none,caption"], "with 'dalle' among --ways"),
        (["--ways=none,dalle"], "there is no DALL-E 1: give --workdir"),
        (["--ways=dalle", "--workdir=nowhere"], "'nowhere' does not exist"),
        (["--ways=dalle", "--workdir={dalle}"], "samples 16 px, but the decoder"),
        (["--ways=dalle", "--workdir={dalle}", "--top_p=2"], "top_p"),
        (["--ways=dalle,zen"], "expected some of diffusion, ar, none, caption, dalle"),
    ],
)
def test_evaluate_refuses_a_dalle_that_cannot_stand_beside(dalle, drawn, flags, says, capsys):
    flags = ["--suite=shapes", "--pipeline=unclip", "--compilation_cache=", *flags]
    flags = [flag.format(dalle=dalle) for flag in flags]
    assert main(["evaluate", "--pretrained=tiny", *flags]) == 2
    assert says in capsys.readouterr().err and not drawn


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["inpaint", "--rect=1,1,40,4"], "not inside"),
        (["inpaint", "--rect=1,1,4"], "expected x,y,w,h"),
        (["inpaint", "--rect=0,0,27,21"], "everything is masked"),
        (["inpaint", "--rect=0,0,1,1"], "nothing is masked"),
        (["inpaint", "--mask={small}"], "is 5 x 5, but"),
        (["inpaint", "--mask={grey}"], "has no alpha channel and is not black and white"),
        (["inpaint", "--mask={opaque}"], "nothing is masked"),
        (["inpaint", "--mask=nowhere.png"], "nowhere.png"),
        (["inpaint"], "either --mask=FILE or --rect"),
        (["inpaint", "--rect=8,5,12,9", "--prompt= "], "is empty"),
        (["inpaint", "--rect=8,5,12,9", "--eta=2"], "eta=2"),
        (["vary", "--n=0"], "--n=0; expected 1"),
        (["vary", "--steps=none"], "spacing 'none' is unknown"),
        (["vary", "--pretrained=old"], "no decoder of DALL-E 2, only dalle"),
        (["vary", "--image=nowhere.png"], "nowhere.png"),
        (["vary", "--decoder={clip}"], "task 'clip'; expected task 'diffusion'"),
        (["interpolate"], "1 pictures; give"),
        (["edit", "--to=a cube", "--thetas=0,2"], "--thetas=0,2; expected numbers in"),
        (["edit", "--to=a cube", "--from=a cube"], "name no direction"),
        (["reconstruct", "--dims=a"], "--dims=a; expected whole"),
        (["reconstruct", "--dims=100000"], "100000 dimensions"),
        (["sample", "--prior=ar"], "belongs to --pipeline=unclip"),
        (["sample", "--pipeline=unclip", "--top_k=3"], "belongs to --pipeline=dalle"),
        (["sample", "--pipeline=unclip", "--guidance=-1"], "guidance=-1"),
    ],
)
def test_bad_input_exits_2_before_anything_is_drawn(
    tmp_path, picture, root, rng, capsys, monkeypatch, flags, says
):
    for module, name in ((unclip, "sample_base"), (inversion, "invert")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("it drew"))
    masks = {
        "small": np.zeros((5, 5), np.uint8),
        "grey": rng.integers(0, 256, (21, 27), np.uint8),
        "opaque": np.full((21, 27, 4), 255, np.uint8),
    }
    for name, mask in masks.items():
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    names = {name: tmp_path / f"{name}.png" for name in masks} | {"clip": root / "tiny" / "clip"}
    command, *flags = (flag.format(**names) for flag in flags)
    if command in ("inpaint", "sample") and not any("--prompt" in flag for flag in flags):
        flags.append(f"--prompt={PROMPT}")
    if command != "sample" and not any("--image" in flag for flag in flags):
        flags.append(f"--image={picture}")
    out = tmp_path / "out"
    fast = FAST if command != "sample" else ("--compilation_cache=",)
    assert main([command, "--pretrained=tiny", *fast, *flags, f"--out={out}"]) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()


def test_masks_are_known_where_everything_under_a_pixel_is():
    known = np.ones((20, 24), bool)
    known[3, 5] = False
    small = inputs.fit_mask(known, 10)[..., 0]
    assert small.sum() == 99 and not small[1, 1]
    large = inputs.fit_mask(known, 40)[..., 0]
    assert (~large).sum() == 4 and not large[6:8, 6:8].any()
    with pytest.raises(UsageError, match="nothing is masked"):
        outside = np.ones((20, 24), bool)
        outside[:, 0] = False  # cut away with the sides
        inputs.fit_mask(outside, 10)


def test_flags_know_every_way():
    assert _unclip.PRIORS == unclip.PRIORS
