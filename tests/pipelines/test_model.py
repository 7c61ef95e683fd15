"""The front door: what three lines of Python do, on tiny untrained stages."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "sampling"))

import tiny_stages  # noqa: E402

import dalle_jax  # noqa: E402
from dalle_jax.pipelines import inputs  # noqa: E402
from dalle_jax.types import UsageError  # noqa: E402

PROMPT = "a red cube on a white background"
FEW = dict(steps="2", upsample_steps=("2",))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("model")
    codec = tiny_stages.write_codec(root / "dvae")
    clip = tiny_stages.write_clip(root / "clip")
    return {
        "dvae": codec,
        "clip": clip,
        "dalle": tiny_stages.write_dalle(root / "dalle", codec),
        "decoder": tiny_stages.write_unet(root / "decoder", clip),
        "upsampler_1": tiny_stages.write_unet(root / "upsampler_1"),
    }


@pytest.fixture(scope="module")
def model(folders) -> dalle_jax.Model:
    return dalle_jax.load(folders)


@pytest.fixture
def picture(rng) -> np.ndarray:
    return rng.integers(0, 256, (20, 16, 3), np.uint8)


def test_import_is_light():
    code = (
        "import sys, time; start = time.process_time(); import dalle_jax\n"
        "print(time.process_time() - start, 'jax' in sys.modules, dalle_jax.__version__)\n"
        "assert {'load', 'train', 'Model'} <= set(dir(dalle_jax))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    seconds, has_jax, version = done.stdout.split()
    assert has_jax == "False" and version == dalle_jax.__version__ and float(seconds) < 0.1


def test_samples_are_ranked_and_know_where_they_come_from(model, tmp_path):
    pictures = model.sample(PROMPT, candidates=4, keep=3, seed=5)
    assert [p.score for p in pictures] == sorted((p.score for p in pictures), reverse=True)
    assert len(pictures.scores) == 4 and pictures[0].image.size == (16, 16)
    assert pictures[0].score == pytest.approx(
        float(pictures.scores[pictures[0].candidate]), abs=1e-5
    )
    assert pictures.stages["dalle"]["fingerprint"] == model.dalle.fingerprint
    paths = pictures.save(tmp_path)
    assert [path.name for path in paths] == ["01.png", "02.png", "03.png"]
    with PIL.Image.open(paths[0]) as image:
        text = image.text
        np.testing.assert_array_equal(np.asarray(image), pictures[0].array)
    assert (text["prompt"], text["seed"]) == (PROMPT, "5")
    assert json.loads(text["stages"])["clip"]["fingerprint"] == model.clip.stage.fingerprint
    again = model.sample(PROMPT, candidates=6, keep=6, seed=5)
    by_index = {p.candidate: p for p in again}
    for p in pictures:  # more candidates only add to those of fewer
        np.testing.assert_array_equal(p.codes, by_index[p.candidate].codes)
    assert model.sample(PROMPT, candidates=2, seed=6)[0].seed == 6


def test_a_completion_keeps_the_given_rows(model, picture):
    grid = model.dalle.codec.grid
    done = model.complete(picture, PROMPT, keep_rows=1, candidates=2)
    given = model.codec.encode([picture])[0].reshape(-1)
    for p in done:
        np.testing.assert_array_equal(p.codes[:grid], given[:grid])
    with pytest.raises(UsageError, match=f"keep 1 to {grid - 1}"):
        model.complete(picture, PROMPT, keep_rows=grid)


def test_codec_and_clip_take_pictures_as_people_have_them(model, picture, tmp_path):
    path = tmp_path / "a.png"
    PIL.Image.fromarray(picture).save(path)
    codes = model.codec.encode([picture, PIL.Image.fromarray(picture), path])
    np.testing.assert_array_equal(codes[0], codes[1])
    np.testing.assert_array_equal(codes[0], codes[2])
    assert model.codec.decode(codes)[0].image.size == (16, 16)
    scores = model.clip.score([picture, path], PROMPT)
    z_i, z_t = model.clip.embed_images([picture]), model.clip.embed_texts([PROMPT])
    np.testing.assert_allclose(scores, [z_i[0] @ z_t[0]] * 2, atol=1e-5)


def test_dalle_2_varies_blends_edits_and_inpaints(model, picture):
    varied = model.vary(picture, 2, **FEW)
    assert len(varied) == 2 and all(-1 <= p.score <= 1 for p in varied)
    assert varied[0].image.size == (16, 16)
    small = model.vary(picture, 1, upsample=False, **FEW)
    assert small[0].image.size == (8, 8)
    path = model.interpolate(picture, picture[::-1], 3, upsample=False, **FEW)
    assert [p.figures["theta"] for p in path] == [0, 0.5, 1]
    edited = model.edit(picture, PROMPT, "a blue star", thetas=(0.0, 0.4), upsample=False, **FEW)
    assert set(edited[1].figures) == {"theta", "cosine_to", "cosine_from"}
    known = np.ones((20, 16), bool)
    known[6:14, 4:12] = False
    done = model.inpaint(picture, PROMPT, known, candidates=2, keep=1, **FEW)
    kept = inputs.fit_mask(known, 16)[..., 0]
    np.testing.assert_array_equal(done[0].array[kept], inputs.square(picture, 16)[kept])
    assert done[0].embedding is not None and done[0].small.size == (8, 8)


def test_a_folder_knows_its_role_and_what_is_missing_is_named(folders, tmp_path):
    alone = dalle_jax.load(folders["clip"])
    assert alone.folders == {"clip": folders["clip"]}
    with pytest.raises(UsageError, match="no dalle, only clip"):
        alone.sample(PROMPT, pipeline="dalle")
    with pytest.raises(UsageError, match="there is no decoder"):
        alone.vary(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UsageError, match="role 'decoders' is unknown"):
        dalle_jax.load(decoders="x")
    with pytest.raises(UsageError, match="no pretrained set 'shape'"):
        dalle_jax.load("shape")
    with pytest.raises(AttributeError):
        dalle_jax.sample  # noqa: B018


def test_inputs_that_are_no_pictures_are_refused(model):
    with pytest.raises(UsageError, match="float64"):
        model.codec.encode([np.zeros((8, 8, 3))])
    with pytest.raises(UsageError, match="keep=3 is more than candidates=2"):
        model.sample(PROMPT, candidates=2, keep=3)
    with pytest.raises(UsageError, match="is empty"):
        model.sample("  ")
