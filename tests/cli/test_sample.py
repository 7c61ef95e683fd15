"""The sample command: what it writes, what it repeats, what it refuses before compiling."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "sampling"))
import tiny_stages  # noqa: E402

from dalle_jax import images  # noqa: E402
from dalle_jax.__main__ import main  # noqa: E402
from dalle_jax.cli import _prompts  # noqa: E402
from dalle_jax.data import preprocess  # noqa: E402
from dalle_jax.sampling import rerank
from dalle_jax.stages.codec import Codec
from dalle_jax.stages.dalle import DalleStage

PROMPT = "a red cube on a white background"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("sample")
    codec = tiny_stages.write_codec(root / "dvae")
    return {
        "codec": codec,
        "clip": tiny_stages.write_clip(root / "clip"),
        "dalle": tiny_stages.write_dalle(root / "dalle", codec),
    }


@pytest.fixture
def picture(tmp_path, rng) -> str:
    path = tmp_path / "given.png"
    Image.fromarray(rng.integers(0, 256, (40, 30, 3), np.uint8)).save(path)
    return str(path)


def draw(folders, out, *more, prompt=PROMPT, clip=True):
    flags = [f"--workdir={folders['dalle']}", f"--out={out}", "--compilation_cache="]
    flags += [f"--clip={folders['clip']}"] if clip else []
    flags += [f"--prompt={prompt}"] if prompt is not None else []
    return main(["sample", *flags, *more])


def test_writes_ranked_pictures_scores_codes_sheet_and_page(folders, tmp_path, capsys):
    out = tmp_path / "out"
    more = ("--candidates=12", "--keep=3", "--batch=1", "--prompt=two blue stars", "--json")
    assert draw(folders, out, *more) == 0
    folder = out / "a-red-cube-on-a-white-background"
    result = json.loads((folder / "scores.json").read_text())
    scores = np.asarray(result["scores"])
    assert scores.shape == (12,)
    kept = [k["candidate"] for k in result["kept"]]
    np.testing.assert_array_equal(kept, rerank.order(scores)[:3])
    assert [k["score"] for k in result["kept"]] == [scores[i] for i in kept]
    codec = Codec.load(folders["codec"])
    codes = np.load(folder / "codes.npy")
    assert codes.shape == (3, codec.grid**2)
    for rank in (1, 2, 3):
        with Image.open(folder / f"{rank:02d}.png") as image:
            assert image.size == (codec.image_px, codec.image_px)
    assert (out / "two-blue-stars" / "03.png").exists()
    assert (out / "sheet.png").exists()
    page = (out / "index.html").read_text()
    assert PROMPT in page and "--candidates=12" in page and "http" not in page.split("<main>")[1]
    captured = capsys.readouterr()
    assert [r["prompt"] for r in json.loads(captured.out)] == [PROMPT, "two blue stars"]
    assert "12/12 sampled" in captured.err


def test_same_seed_same_pictures_whatever_the_batch(folders, tmp_path):
    """And of fewer candidates those of more, so that a search can go on where it stopped."""
    for name, more in {
        "a": ["--candidates=10", "--batch=1"],
        "b": ["--candidates=10", "--batch=2"],
        "c": ["--candidates=4"],
        "d": ["--candidates=10", "--seed=1"],
    }.items():
        assert draw(folders, tmp_path / name, "--keep=1", *more) == 0
    scores = {
        name: np.asarray(
            json.loads(next((tmp_path / name).glob("*/scores.json")).read_text())["scores"]
        )
        for name in "abcd"
    }
    np.testing.assert_allclose(scores["a"], scores["b"], atol=2e-5)
    np.testing.assert_allclose(scores["a"][:4], scores["c"], atol=2e-5)
    assert np.abs(scores["a"] - scores["d"]).max() > 1e-3


def test_two_processes_share_the_prompts_and_draw_the_same(folders, tmp_path, compile_flags):
    flags = ("--prompt=two blue stars", "--prompt=a cat", "--candidates=4", "--keep=2")
    assert draw(folders, tmp_path / "one", *flags) == 0
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    root = pathlib.Path(__file__).resolve().parents[2]
    env = os.environ | {
        "PYTHONPATH": str(root),
        "XLA_FLAGS": compile_flags,
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }
    command = [sys.executable, "-m", "dalle_jax", "sample", f"--workdir={folders['dalle']}"]
    command += [f"--clip={folders['clip']}", f"--out={tmp_path / 'two'}", f"--prompt={PROMPT}"]
    command += [*flags, f"--coordinator=localhost:{port}", "--process_count=2"]
    processes = [
        subprocess.Popen(
            [*command, f"--process_id={i}"],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    out = [process.communicate(timeout=150)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], out
    assert "1/3 a red cube" in out[0] and "2/3 two blue stars" in out[1]
    assert "2/3" not in out[0]
    files = sorted(path.relative_to(tmp_path / "one") for path in tmp_path.glob("one/*/codes.npy"))
    assert len(files) == 3
    for file in files:
        codes = [np.load(tmp_path / name / file) for name in ("one", "two")]
        np.testing.assert_array_equal(*codes)
    page = (tmp_path / "two" / "index.html").read_text()
    assert "a cat" in page and "two blue stars" in page and "coordinator" not in page


def test_completion_keeps_the_given_rows_bit_for_bit(folders, tmp_path, picture):
    out = tmp_path / "out"
    flags = ("--candidates=8", "--keep=8", f"--image={picture}", "--keep_rows=1")
    assert draw(folders, out, *flags) == 0
    codes = np.load(next(out.glob("*/codes.npy")))
    dalle = DalleStage.load(folders["dalle"])
    g = dalle.codec.grid
    seen = preprocess.crop_center(images.read(picture), dalle.codec.image_px)
    given = np.asarray(dalle.codec.encode(images.to_float(seen)[None]))[0, 0]
    np.testing.assert_array_equal(codes[:, :g], np.broadcast_to(given, (8, g)))
    assert len(np.unique(codes[:, g:], axis=0)) > 1
    settings = json.loads(next(out.glob("*/scores.json")).read_text())["settings"]
    assert settings["keep_rows"] == 1 and settings["image"] == picture
    assert "given" in (out / "index.html").read_text()


def test_without_a_clip_the_kept_are_those_drawn(folders, tmp_path, capsys):
    out = tmp_path / "out"
    assert draw(folders, out, "--keep=2", "--candidates=9", clip=False) == 0
    result = json.loads(next(out.glob("*/scores.json")).read_text())
    assert result["scores"] is None and [k["candidate"] for k in result["kept"]] == [0, 1]
    assert "nothing ranks without a CLIP" in capsys.readouterr().err


def test_a_smaller_second_run_leaves_no_stale_pictures(folders, tmp_path):
    out = tmp_path / "out"
    assert draw(folders, out, "--keep=3", clip=False) == 0
    assert draw(folders, out, "--keep=1", clip=False) == 0
    assert [p.name for p in out.glob("*/*.png")] == ["01.png"]


def test_prompts_come_from_a_file_too(folders, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one green ring\n\n  two blue stars  \n", encoding="utf-8")
    flags = (f"--prompts_file={file}", "--keep=1")
    assert draw(folders, tmp_path / "out", *flags, prompt=None, clip=False) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "one-green-ring", "two-blue-stars", "sheet.png", "index.html",
    }  # fmt: skip


def test_warnings_name_what_is_not_read(folders, tmp_path, capsys):
    long = "a red cube on a white background " * 4
    assert draw(folders, tmp_path / "a", "--keep=1", prompt=long, clip=False) == 0
    assert "reads only the first 12 of" in capsys.readouterr().err
    assert draw(folders, tmp_path / "b", "--keep=1", prompt="a red Ж cube", clip=False) == 0
    assert "never saw Ж in training" in capsys.readouterr().err
    assert draw(folders, tmp_path / "c", "--keep=1", "--guidance=2", clip=False) == 0
    assert "caption_drop=0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--keep=9", "--candidates=4"], "--keep=9 is more than --candidates=4"),
        (["--candidates=0"], "--candidates=0; expected 1 or more"),
        (["--prompt= "], "is empty"),
        (["--prompt=" + "a" * 10_000], "10,000 characters"),
        (["--prompt=🎉🎊"], "knows no character"),
        (["--prompt=Ж Щ"], "knows no character"),
        (["--keep_rows=2"], "needs --image"),
        (["--image={picture}", "--keep_rows=4"], "4 rows of codes: keep 1 to 3"),
        (["--image={picture}", "--keep_rows=0"], "keep 1 to 3"),
        (["--image={text}"], "not a picture"),
        (["--image=nowhere.png"], "nowhere.png"),
        (["--prompts_file=nowhere.txt"], "nowhere.txt"),
        (["--temperature=-1"], "temperature=-1"),
        (["--top_p=0"], "top_p=0"),
        (["--top_k=100000"], "top_k=100000"),
        (["--seed=-1"], "--seed=-1"),
        (["--workdir={clip}"], "task 'clip'; expected task 'dalle'"),
        (["--clip={dalle}"], "task 'dalle'; expected task 'clip'"),
        (["--dvae={clip}"], "task 'clip'; expected task 'autoencode'"),
        (["--workdir=nowhere"], "does not exist"),
        (["--pretrained=shapes"], "either --workdir=DIR or --pretrained=NAME"),
        (["--out={text}"], "is a file"),
    ],
)
def test_bad_input_exits_2_before_anything_is_drawn(
    folders, tmp_path, picture, capsys, monkeypatch, flags, says
):
    monkeypatch.setattr(rerank, "sample_best", lambda *a, **k: pytest.fail("it drew"))
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    names = {**folders, "picture": picture, "text": str(text)}
    out = tmp_path / "out"
    assert draw(folders, out, *(flag.format(**names) for flag in flags)) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()


def test_nothing_to_draw_is_told(folders, tmp_path, capsys):
    assert draw(folders, tmp_path / "out", prompt=None) == 2
    assert "--prompt" in capsys.readouterr().err


def test_folders_are_distinct_and_never_leave_out():
    out = pathlib.Path("out")
    names = _prompts.folders(out, ["A cube!", "a cube", "../../etc", "Ж", "x" * 300])
    assert [n.name for n in names[:4]] == ["a-cube", "a-cube-2", "etc", "prompt"]
    assert all(n.parent == out and len(n.name) <= 60 for n in names)
