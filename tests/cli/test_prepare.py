import io
import json
import re
import shlex

import numpy as np
import pytest
from PIL import Image

from dalle_jax import __main__
from dalle_jax import config as cfg
from dalle_jax.cli import prepare
from dalle_jax.data import sources, tokenizers


def jpeg(i, size):
    buffer = io.BytesIO()
    rng = np.random.default_rng(i)
    Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(9):
        (folder / f"{i}.jpg").write_bytes(jpeg(i, (40 + i, 50)))
        (folder / f"{i}.txt").write_text(f"a picture of the number {i}\nnumber {i}\n")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no")
    (folder / "broken.txt").write_text("broken")
    return folder


def pairs_command(photos, data_dir, *more):
    kind = ["--from=folder", f"--input={photos}", "--name=photos"]
    return ["prepare", "pairs", *kind, f"--data_dir={data_dir}", "--vocab_size=330", *more]


def test_pairs_end_to_end(tmp_path, photos, capsys):
    data_dir = tmp_path / "data"
    assert __main__.main(pairs_command(photos, data_dir, "--image_px=16", "--validation=0.2")) == 0
    out = capsys.readouterr().out
    assert "skipped: 1 x not a picture" in out and "broken: not a picture" in out
    assert re.search(r"\d  train\n", out)
    next_line = out.strip().splitlines()[-1]
    words = shlex.split(next_line.removeprefix("next: "))
    assert words[:4] == ["python", "-m", "dalle_jax", "train"]
    # The command's data section reads what was prepared.
    overrides = dict(w.removeprefix("--config.").split("=") for w in words if "--config." in w)
    path = next(w for w in words if w.startswith("--config=")).removeprefix("--config=")
    config = cfg.override(cfg.load(path), overrides)
    source = sources.open_split(config.data, config.data.split)
    held = sources.open_split(config.data, config.data.eval_split)
    assert len(source) + len(held) == 9
    with Image.open(data_dir / "photos" / "16px" / "16px.png") as sheet:
        assert sheet.width > 200
    assert tokenizers.Tokenizer(data_dir / "photos" / "tokenizer-330.model").vocab_size <= 330
    assert __main__.main(pairs_command(photos, data_dir, "--image_px=16", "--validation=0.2")) == 0
    assert re.search(r"\d  train\n", capsys.readouterr().out)


def test_overwriting_renews_the_tokenizer(tmp_path, photos):
    data_dir = tmp_path / "data"
    assert __main__.main(pairs_command(photos, data_dir)) == 0
    path = data_dir / "photos" / "tokenizer-330.model"
    before = path.read_bytes()
    for text in photos.glob("*.txt"):
        text.write_text("zzz qqq zzz " * 3)
    assert __main__.main(pairs_command(photos, data_dir, "--overwrite")) == 0
    assert path.read_bytes() != before


def test_reasons_are_summed_over_styles(capsys):
    summary = {"examples": {"train": 5}, "left_out": {"a: skin tone": 3, "b: skin tone": 4}}
    prepare._print_summary(summary)
    assert "left out: skin tone 7" in capsys.readouterr().out


def test_shapes(tmp_path, capsys):
    command = ["prepare", "shapes", f"--data_dir={tmp_path}", "--num_train=60", "--num_eval=4"]
    assert __main__.main([*command, "--vocab_size=330"]) == 0
    out = capsys.readouterr().out
    assert "next: python -m dalle_jax train --config=configs/vqvae.py:size=shapes" in out
    assert (tmp_path / "shapes" / "tokenizer-330.model").is_file()
    assert (tmp_path / "shapes" / "32px" / "32px.png").is_file()


def test_bad_input_ends_in_one_message_and_code_2(tmp_path, photos, capsys):
    cases = {
        "nowhere": pairs_command(tmp_path / "nowhere", tmp_path),
        "--image_px=3": pairs_command(photos, tmp_path, "--image_px=3"),
        "cannot name a set": pairs_command(photos, tmp_path, "--name=My Photos"),
        "8 to 1024": ["prepare", "emoji", "--image_px=5000", f"--data_dir={tmp_path}"],
        "--name=NAME": ["prepare", "tfds", f"--data_dir={tmp_path}"],
        "vocab_size=300": pairs_command(photos, tmp_path / "new", "--vocab_size=300"),
        "needs at least": ["prepare", "shapes", "--image_px=1", f"--data_dir={tmp_path}"],
    }
    for message, command in cases.items():
        assert __main__.main(command) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and "Traceback" not in error
    assert not (tmp_path / "new").exists()  # refused before anything was written
    for command in (["prepare"], ["prepare", "nothing"], pairs_command(photos, tmp_path)[:3]):
        with pytest.raises(SystemExit) as stop:
            __main__.main(command)
        assert stop.value.code == 2


def test_unwritable_data_dir(tmp_path, photos, capsys):
    (tmp_path / "file").write_text("")
    assert __main__.main(pairs_command(photos, tmp_path / "file")) == 2
    assert "choose another --data_dir" in capsys.readouterr().err


def test_prepare_json_has_the_recipe(tmp_path, photos):
    assert __main__.main(pairs_command(photos, tmp_path / "d")) == 0
    text = (tmp_path / "d" / "photos" / "original" / "1.0.0" / "prepare.json").read_text()
    recipe = json.loads(text)["recipe"]
    assert recipe["from"] == "folder" and recipe["input"] == str(photos)
