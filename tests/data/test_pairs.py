import contextlib
import csv
import io
import json
import struct
import tarfile
import zlib
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dalle_jax.data import sources
from dalle_jax.data.builders import formats, items, pairs, staging
from dalle_jax.types import UsageError


def picture(i, size=(24, 16), kind="PNG"):
    buffer = io.BytesIO()
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    pixels = np.stack([x * 9 % 256, y * 13 % 256, np.full_like(x, i * 7 % 256)], -1)
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


GOOD = 6
BROKEN = picture(0, size=(200, 200))
BROKEN = BROKEN[: len(BROKEN) // 2]  # ends inside its pixels


def bomb():
    """A PNG of 60,000 x 60,000 pixels in a few bytes."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def rows():
    """Name, bytes, captions of six good pairs and one broken picture."""
    good = [(f"p{i}", picture(i), [f"picture {i}", f"number {i} é😀"]) for i in range(GOOD)]
    return [*good, ("bad", BROKEN, ["a broken one"])]


def make_folder(root):
    for name, image, captions in rows():
        path = root / "pics" / ("a" if name < "p3" else "b") / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
        path.with_suffix(".txt").write_text("\n".join(captions) + "\n\n", encoding="utf-8")
    return root / "pics"


def add(tar, name, data, **changes):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in changes.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def make_wds(root):
    shards = root / "shards"
    shards.mkdir()
    for k in range(2):
        with tarfile.open(shards / f"{k:05d}.tar", "w") as tar:
            for name, image, captions in rows()[k::2]:
                add(tar, f"{name}.png", image)
                add(tar, f"{name}.txt", "\n".join(captions).encode())
                add(tar, f"{name}.json", json.dumps({"caption": "from json"}).encode())
    return shards


def make_jsonl(root):
    lines = []
    for name, image, captions in rows():
        (root / f"{name}.png").write_bytes(image)
        lines.append(json.dumps({"file_name": f"{name}.png", "text": captions}))
    (root / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return root / "captions.jsonl"


def make_csv(root):
    with open(root / "pairs.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["filepath", "title"])
        for name, image, captions in rows():
            (root / f"{name}.png").write_bytes(image)
            for caption in captions:
                writer.writerow([f"{name}.png", caption])
    return root / "pairs.csv"


def make_parquet(root):
    names, images, captions = zip(*rows(), strict=True)
    table = {"key": names, "jpg": images, "caption": captions, "status": ["success"] * len(names)}
    pq.write_table(pa.table({k: list(v) for k, v in table.items()}), root / "00000.parquet")
    return root / "00000.parquet"


MAKERS = {
    "folder": make_folder,
    "wds": make_wds,
    "jsonl": make_jsonl,
    "csv": make_csv,
    "parquet": make_parquet,
}


def run(tmp_path, kind, path, **changes):
    overwrite = changes.pop("overwrite", False)
    fields = items.Fields(**changes.pop("fields", {}))
    options = pairs.Options(fields=fields, **{"validation": 0.0, **changes})
    return pairs.prepare(tmp_path / "data", "mine", kind, path, options, overwrite)


def read(tmp_path, split="train", **changes):
    config = SimpleNamespace(
        source="mine",
        data_dir=str(tmp_path / "data"),
        image_px=8,
        image_key="image",
        caption_key="captions",
        label_template="",
    )
    vars(config).update(changes)
    source = sources.open_split(config, split)
    return {source[i].id: source[i] for i in range(len(source))}


def skipped_of(target):
    lines = (target / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    return {item["id"]: item["reason"] for item in map(json.loads, lines)}


@pytest.mark.parametrize("kind", MAKERS)
def test_every_format_keeps_good_pairs_and_names_the_broken_one(tmp_path, kind):
    target, summary = run(tmp_path, kind, MAKERS[kind](tmp_path))
    assert summary["examples"] == {"train": GOOD, "validation": 0}
    assert summary["skipped"] == {"broken picture": 1}
    (bad,) = skipped_of(target)
    assert "bad" in bad
    examples = read(tmp_path)
    by_image = {example.image: example.captions for example in examples.values()}
    assert by_image == {image: captions for _, image, captions in rows()[:GOOD]}
    assert len(examples) == GOOD  # ids are unique


@pytest.mark.parametrize("kind", MAKERS)
def test_same_input_same_ids_in_the_same_order(tmp_path, kind):
    path = MAKERS[kind](tmp_path)
    run(tmp_path, kind, path, workers=3)
    first = list(read(tmp_path))
    run(tmp_path, kind, path, overwrite=True)
    assert list(read(tmp_path)) == first


def test_again_is_a_no_op_and_other_options_are_refused(tmp_path):
    path = make_folder(tmp_path)
    target, _ = run(tmp_path, "folder", path)
    before = (target / "prepare.json").stat().st_mtime_ns
    run(tmp_path, "folder", path)
    assert (target / "prepare.json").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match="validation=0.0; now it is validation=0.5.*--overwrite"):
        run(tmp_path, "folder", path, validation=0.5)
    _, summary = run(tmp_path, "folder", path, validation=0.5, overwrite=True)
    assert summary["examples"]["validation"] > 0


def test_resizing_shorter_side_and_never_up(tmp_path):
    path = make_folder(tmp_path)
    target, _ = run(tmp_path, "folder", path, image_px=12)
    assert target.parent.name == "12px"
    for example in read(tmp_path, image_px=12).values():
        assert Image.open(io.BytesIO(example.image)).size == (18, 12)
    run(tmp_path, "folder", path, image_px=20)
    sizes = {Image.open(io.BytesIO(e.image)).size for e in read(tmp_path, image_px=20).values()}
    assert sizes == {(24, 16)}


def test_pictures_are_stored_upright_rgb_and_untouched_if_nothing_changes():
    jpeg = picture(1, (300, 200), "JPEG")
    assert pairs.encode(jpeg, 0) == jpeg
    image = Image.open(io.BytesIO(jpeg))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert Image.open(io.BytesIO(pairs.encode(buffer.getvalue(), 0))).size == (200, 300)
    buffer = io.BytesIO()
    Image.new("RGBA", (9, 9), (255, 0, 0, 0)).save(buffer, "PNG")
    stored = Image.open(io.BytesIO(pairs.encode(buffer.getvalue(), 0)))
    assert stored.mode == "RGB" and stored.getpixel((4, 4)) == (255, 255, 255)
    small = Image.open(io.BytesIO(pairs.encode(jpeg, 100)))
    large = Image.open(io.BytesIO(pairs.encode(jpeg, 150)))
    assert (small.format, small.size) == ("PNG", (150, 100))
    assert (large.format, large.size) == ("JPEG", (225, 150))


def test_validation_is_a_hash_of_the_id_and_disjoint(tmp_path):
    path = make_folder(tmp_path)
    run(tmp_path, "folder", path, validation=0.5)
    train, held = set(read(tmp_path)), set(read(tmp_path, "validation"))
    assert held and train and not held & train and len(held | train) == GOOD
    run(tmp_path, "folder", path, validation=1e-9, overwrite=True)
    assert len(read(tmp_path, "validation")) == 1  # a small set still gets one


def test_folder_problems_are_counted_by_reason(tmp_path):
    root = make_folder(tmp_path)
    (root / "alone.png").write_bytes(picture(9))
    (root / "only.txt").write_text("words")
    (root / "empty.png").write_bytes(picture(9))
    (root / "empty.txt").write_text(" \n\t\n")
    (root / "latin.png").write_bytes(picture(9))
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "bomb.png").write_bytes(bomb())
    (root / "bomb.txt").write_text("boom")
    (root / "text.png").write_bytes(b"I am not a picture")
    (root / "text.txt").write_text("x")
    (root / "none.png").write_bytes(b"")
    (root / "none.txt").write_text("x")
    (root / "long.png").write_bytes(picture(9))
    (root / "long.txt").write_text("word " * 2000)
    (root / "emoji.png").write_bytes(picture(9))
    (root / "emoji.txt").write_text("😀😀")
    (root / "utf16.png").write_bytes(picture(9))
    (root / "utf16.txt").write_bytes("día".encode("utf-16"))
    (root / "._p1.jpg").write_bytes(b"")
    (root / "twice.png").write_bytes(picture(9))
    (root / "twice.jpg").write_bytes(picture(8))
    (root / "twice.txt").write_text("two files")
    target, summary = run(tmp_path, "folder", root)
    assert skipped_of(target) == {
        "b/bad" if (root / "b/bad.png").exists() else "a/bad": "broken picture",
        "alone": "no caption file",
        "only.txt": "caption file without a picture",
        "empty": "empty caption",
        "latin": "caption is not UTF-8",
        "bomb": "picture with too many pixels",
        "text": "not a picture",
        "none": "not a picture",
        "twice.png": "second picture of one name",
    }
    assert summary["notes"] == {"caption cut at 2000 characters": 1}
    examples = read(tmp_path)
    assert len(examples) == GOOD + 4
    assert len(examples["long"].captions[0]) == 1999
    assert examples["emoji"].captions == ["😀😀"]
    assert examples["utf16"].captions == ["día"]


class Stop(BaseException):
    """Like a signal: nothing catches it."""


@pytest.mark.parametrize("kind", ["folder", "wds", "parquet"])
def test_interrupted_run_continues(tmp_path, kind, monkeypatch):
    path = MAKERS[kind](tmp_path)
    monkeypatch.setattr(staging, "PART_ITEMS", 2)
    monkeypatch.setattr(formats, "UNIT_ITEMS", 4)
    unbroken = tmp_path / "unbroken"
    pairs.prepare(unbroken, "mine", kind, path, pairs.Options(validation=0.3))
    encode, calls = pairs.encode, []

    def stopping(data, image_px):
        if len(calls) == 3:
            raise Stop
        calls.append(data)
        return encode(data, image_px)

    monkeypatch.setattr(pairs, "encode", stopping)
    with pytest.raises(Stop):
        run(tmp_path, kind, path, validation=0.3)
    assert not list((tmp_path / "data").rglob("features.json"))
    (tmp_path / "data" / "mine" / "original" / "incomplete.ABC_1.0.0").mkdir()  # a kill in tfds
    again = []
    monkeypatch.setattr(pairs, "encode", lambda d, px: again.append(d) or encode(d, px))
    _, summary = run(tmp_path, kind, path, validation=0.3)
    assert summary["resumed"] == 2
    assert len(again) == GOOD + 1 - 2  # two good ones were staged before
    monkeypatch.undo()
    contents = lambda root, split: [  # noqa: E731
        (e.id, e.image, e.captions) for e in read(root, split, data_dir=str(root)).values()
    ]
    for split in ("train", "validation"):
        assert contents(tmp_path / "data", split) == contents(unbroken, split)
    left = sorted(p.name for p in (tmp_path / "data" / "mine" / "original").iterdir())
    assert left == ["1.0.0"]


def test_changed_file_is_read_again_after_an_interruption(tmp_path, monkeypatch):
    path = make_folder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(pairs.store, "write", lambda **_: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            run(tmp_path, "folder", path)
    bad = next(path.rglob("bad.png"))
    bad.write_bytes(picture(3))
    _, summary = run(tmp_path, "folder", path)
    assert summary["examples"]["train"] == GOOD + 1


def test_two_processes_do_not_write_one_set(tmp_path):
    path = make_folder(tmp_path)
    with contextlib.ExitStack() as stack:
        stack.enter_context(staging.locked(tmp_path / "data" / "mine" / "original" / "staging"))
        with pytest.raises(UsageError, match="another process is preparing"):
            run(tmp_path, "folder", path)


@pytest.mark.parametrize("kind", MAKERS)
def test_missing_and_empty_inputs_are_usage_errors(tmp_path, kind):
    with pytest.raises(UsageError, match="nowhere"):
        run(tmp_path, kind, tmp_path / "nowhere")
    empty = tmp_path / "empty"
    if kind in ("jsonl", "csv"):
        empty.write_bytes(b"")
    else:
        empty.mkdir()
    with pytest.raises(UsageError, match="empty"):
        run(tmp_path, kind, empty)
    assert not (tmp_path / "data").exists()


def test_input_without_one_good_pair_says_why(tmp_path):
    root = tmp_path / "pics"
    root.mkdir()
    (root / "a.jpg").write_bytes(b"no")
    (root / "a.txt").write_text("x")
    with pytest.raises(UsageError, match="none of the 1 items.*1 x not a picture"):
        run(tmp_path, "folder", root)
    assert not (tmp_path / "data" / "mine").exists()


@pytest.mark.parametrize(
    "changes", [{"image_px": 4}, {"image_px": -1}, {"validation": 1.0}, {"workers": 0}]
)
def test_options_out_of_range(changes):
    with pytest.raises(UsageError, match="--"):
        pairs.Options(**changes)


def test_names_that_cannot_be_sets(tmp_path):
    for name in ("", "My Photos", "../x", "a/b", "1st"):
        with pytest.raises(UsageError, match="cannot name a set"):
            pairs.prepare(tmp_path, name, "folder", tmp_path)
