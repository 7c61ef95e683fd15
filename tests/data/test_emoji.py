import dataclasses
import hashlib
import io
import json
import os
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dalle_jax.data import sources
from dalle_jax.data.builders import emoji, npm_packages
from dalle_jax.types import UsageError

SQUARE = '<path fill="#{}" d="M2 2h12v12H2z"/>'
DATA = [
    {"label": "octopus", "hexcode": "1F419", "tags": ["animal", "octopus", "sea"]},
    {"label": "man’s shoe", "hexcode": "1F45E", "tags": []},
    {"label": "rainbow flag", "hexcode": "1F3F3-FE0F-200D-1F308", "tags": ["pride"]},
    {
        "label": "waving hand",
        "hexcode": "1F44B",
        "tags": ["bye", "hello", "hand", "hi"],
        "skins": [{"label": "waving hand: dark skin tone", "hexcode": "1F44B-1F3FF"}],
    },
]


def tarball(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def iconify(icons, chars):
    files = {"icons.json": {"icons": icons, "height": 16}, "chars.json": chars}
    return npm_packages.Archive(tarball(files))


def webp(color, size=(20, 10)):
    buffer = io.BytesIO()
    Image.new("RGBA", size, color).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


@pytest.fixture
def archives():
    flat, named = npm_packages.STYLES[0], npm_packages.STYLES[5]
    three_d = npm_packages.STYLES[-1]
    by_code = {
        "octopus": {"body": SQUARE.format("ff0000")},
        "a-flag": {"body": SQUARE.format("00ff00"), "width": 32},
        "hand": {"body": SQUARE.format("0000ff")},
        "hand-dark": {"body": SQUARE.format("000080")},
        "octopus-again": {"body": SQUARE.format("ff00ff")},
        "unknown": {"body": ""},
    }
    codes = {
        "1f419": "octopus",
        "1f3f3-200d-1f308": "a-flag",
        "1f44b": "hand",
        "1f44b-1f3ff": "hand-dark",
        "1f419-fe0f": "octopus-again",
        "e000": "unknown",
    }
    by_name = {"mans-shoe": {"body": SQUARE.format("804000")}, "octopus": {"body": ""}}
    return {
        npm_packages.LABELS: npm_packages.Archive(tarball({"en/data.json": DATA})),
        flat: iconify(by_code, codes),
        named: iconify(by_name, {}),
        three_d: npm_packages.Archive(
            tarball({"assets/1f419.webp": webp((255, 0, 0, 255)), "assets/e001.webp": b"x"})
        ),
    }


def test_join_matches_by_sequence_then_by_name(archives):
    pictures, left_out = emoji.join(archives)
    assert [(p.id, p.meaning.label) for p in pictures] == [
        ("emojione/1F419", "octopus"),
        ("emojione/1F45E", "man's shoe"),
        ("fluent-3d/1F419", "octopus"),
        ("noto/1F3F3-FE0F-200D-1F308", "rainbow flag"),
        ("noto/1F419", "octopus"),
        ("noto/1F44B", "waving hand"),
    ]
    assert left_out == {
        "noto: no such emoji": 1,
        "noto: skin tone": 1,
        "noto: drawn twice": 1,
        "fluent 3d: no such emoji": 1,
    }
    toned, _ = emoji.join(archives, skin_tones=True)
    (dark,) = [p for p in toned if p.meaning.has_tone]
    assert dark.meaning.label == "waving hand: dark skin tone"
    assert dark.meaning.base == "waving hand"


def test_captions_hold_style_label_and_tags(archives):
    pictures = {p.id: p for p in emoji.join(archives)[0]}
    octopus = emoji.captions(pictures["noto/1F419"])
    assert octopus[:2] == ["noto style octopus", "octopus, noto style"]
    assert sorted(octopus[2].removeprefix("noto style octopus, ").split(", ")) == ["animal", "sea"]
    hand = emoji.captions(pictures["noto/1F44B"])
    assert len(hand) == 4
    tags = {t for text in hand[2:] for t in text.split(", ")[1:]}
    assert tags == {"bye", "hello", "hi"}  # "hand" is in the label
    assert len(emoji.captions(pictures["emojione/1F45E"])) == 2
    assert emoji.captions(pictures["fluent-3d/1F419"])[0] == "fluent 3d style octopus"


def fake_pictures(labels=400, styles=6):
    for i in range(labels):
        meaning = emoji.Meaning(f"{i:X}", f"thing {i}", (), f"thing {i}", False)
        for s in range(styles if i % 2 else 4):
            yield emoji.Picture(f"style {s}", meaning)


def test_held_out_labels_exist_in_four_other_styles():
    splits = emoji.assign_splits(fake_pictures())
    sizes = {k: len(v) for k, v in splits.items()}
    assert sum(sizes.values()) == 200 * 6 + 200 * 4
    assert 0.03 < sizes["held_out"] / 1200 < 0.07
    assert 0.01 < sizes["validation"] / 2000 < 0.03
    pairs = [(p.meaning.label, p.style) for part in splits.values() for p in part]
    assert len(set(pairs)) == len(pairs)
    assert all(int(p.meaning.label.split()[1]) % 2 for p in splits["held_out"])
    seen = {(p.meaning.label, p.style) for p in splits["train"]}
    for picture in splits["held_out"]:
        assert sum((picture.meaning.label, f"style {s}") in seen for s in range(6)) >= 2
    again = emoji.assign_splits(reversed(list(fake_pictures())))
    assert {p.id for p in again["held_out"]} == {p.id for p in splits["held_out"]}


def test_render_is_on_white_and_keeps_proportions(archives):
    pictures = {p.id: p for p in emoji.join(archives)[0]}
    red = emoji.render(pictures["noto/1F419"], 32)
    assert red.shape == (32, 32, 3) and red.dtype == np.uint8
    assert red[0, 0].tolist() == [255, 255, 255] and red[16, 16].tolist() == [255, 0, 0]
    flag = emoji.render(pictures["noto/1F3F3-FE0F-200D-1F308"], 32)  # 32 x 16, centred
    assert flag[4].min() == 255 and flag[16, 8].tolist() == [0, 255, 0]
    wide = emoji.render(pictures["fluent-3d/1F419"], 20)
    assert wide[2].min() == 255 and wide[10, 10].tolist() == [255, 0, 0]
    with pytest.raises(ValueError, match="blank"):
        emoji.render(pictures["emojione/1F419"], 32)


def data_config(data_dir, px=16):
    return SimpleNamespace(
        source="emoji",
        data_dir=str(data_dir),
        image_px=px,
        image_key="image",
        caption_key="captions",
        label_template="",
    )


def test_prepare_writes_a_set_and_counts_what_is_blank(tmp_path, archives):
    path, summary = emoji.prepare(tmp_path, 16, archives=archives)
    assert path == tmp_path / "emoji" / "16px" / "1.0.0"
    assert sum(summary["examples"].values()) == 5
    assert summary["skipped"] == {"emojione/1F419": "blank on white"}
    source = sources.open_split(data_config(tmp_path), "train")
    examples = {source[i].id: source[i] for i in range(len(source))}
    example = examples["noto/1F419"]
    assert example.captions[0] == "noto style octopus"
    assert Image.open(io.BytesIO(example.image)).size == (16, 16)
    again, stored = emoji.prepare(tmp_path, 16)  # there is no npm call: it is there
    assert again == path and stored["examples"] == summary["examples"]
    parallel, _ = emoji.prepare(tmp_path / "b", 16, archives=archives, workers=3)
    one, two = (sorted(p.glob("*array_record*")) for p in (path, parallel))
    assert [f.read_bytes() for f in one] == [f.read_bytes() for f in two]


def test_sizes_out_of_range():
    for px in (0, 7, 2048):
        with pytest.raises(UsageError, match="8 to 1024"):
            emoji.prepare("nowhere", px)


def test_missing_npm_names_the_cure(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="npm is not on the PATH.*apt-get install npm"):
        npm_packages.packages(tmp_path / "downloads")


def fake_npm(tmp_path, monkeypatch, script):
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:{os.environ['PATH']}")


def test_checksum_is_verified_and_downloads_are_reused(tmp_path, monkeypatch):
    data = tarball({"x.json": {"a": 1}})
    (tmp_path / "file.tgz").write_bytes(data)
    package = dataclasses.replace(npm_packages.STYLES[0], sha256=hashlib.sha256(data).hexdigest())
    assert package.file == "iconify-json-noto-1.2.9.tgz"
    fake_npm(tmp_path, monkeypatch, f'cp {tmp_path}/file.tgz {package.file}; echo "$@" >> ../log')
    downloads = tmp_path / "downloads"
    for _ in range(2):
        archive = npm_packages.Archive(npm_packages.fetch(package, downloads))
        assert archive.json("x.json") == {"a": 1}
    log = (tmp_path / "log").read_text()
    assert log == "pack --silent --ignore-scripts @iconify-json/noto@1.2.9\n"  # once
    with pytest.raises(UsageError, match="no icons.json; it has x.json"):
        archive.json("icons.json")
    (downloads / package.file).write_bytes(data[:-9])
    with pytest.raises(UsageError, match="sha256.*delete the file"):
        npm_packages.fetch(package, downloads)


def test_npm_failure_is_reported(tmp_path, monkeypatch):
    fake_npm(tmp_path, monkeypatch, "echo ENOTFOUND registry >&2; exit 1")
    with pytest.raises(UsageError, match="npm pack @iconify-json/noto@1.2.9.*ENOTFOUND"):
        npm_packages.fetch(npm_packages.STYLES[0], tmp_path / "downloads")


def test_pins_are_complete():
    pins = (npm_packages.LABELS, *npm_packages.STYLES)
    assert len({p.style for p in pins}) == len(pins) == 9
    for package in pins:
        assert len(package.sha256) == 64 and int(package.sha256, 16)
        assert package.licence in ("MIT", "Apache-2.0", "CC-BY-4.0", "CC-BY-SA-4.0")
        notice = (npm_packages.pathlib.Path(__file__).parents[2] / "NOTICE").read_text()
        assert package.name in notice and package.licence in notice and package.url in notice
