"""The items of an input, before any picture is decoded: formats.units."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dalle_jax.data.builders import formats, items, webdataset
from dalle_jax.types import UsageError


def read(kind, path, **fields):
    """Captions of good items by id, and reasons of bad ones."""
    good, bad = {}, {}
    total = 0.0
    for unit in formats.units(kind, path, items.Fields(**fields)):
        total += unit.share
        at = 0.0
        for raw in unit.read():
            assert at <= raw.at <= 1
            at = raw.at
            (bad if raw.problem else good)[raw.id] = raw.problem or list(raw.captions)
    assert total == pytest.approx(1, abs=0.06)  # for the time left; a byte-order mark has no share
    return good, bad


def add(tar, name, data=b"pixels", **changes):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in changes.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def test_tar_with_unsafe_names_and_links(tmp_path):
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("../../outside", "/abs/olute", "C:/drive", "ok/../../up"):
            add(tar, f"{name}.png")
            add(tar, f"{name}.txt", b"evil")
        add(tar, "link.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "link.txt", b"a link")
        add(tar, "hard.png", b"", type=tarfile.LNKTYPE, linkname="good.png")
        add(tar, "pipe.png", b"", type=tarfile.FIFOTYPE)
        add(tar, "./good.png")
        add(tar, "./good.txt", b"good")
        add(tar, "stats.json", b"{}")
        add(tar, "only_json.png")
        add(tar, "only_json.json", json.dumps({"caption": "from json"}).encode())
    before = sorted(tmp_path.rglob("*"))
    good, bad = read("wds", path)
    assert good == {"evil/good": ["good"], "evil/only_json": ["from json"]}
    reasons = sorted(bad.values())
    assert reasons.count("unsafe name in a tar") == 8
    assert reasons.count("link in a tar") == 2
    assert reasons.count("not a file in a tar") == 1
    assert bad["evil/link"] == bad["evil/stats"] == "caption file without a picture"
    assert sorted(tmp_path.rglob("*")) == before  # nothing was extracted


def test_truncated_tar_keeps_what_comes_before(tmp_path):
    path = tmp_path / "cut.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a", "b"):
            add(tar, f"{name}.png")
            add(tar, f"{name}.txt", b"words")
    path.write_bytes(path.read_bytes()[: 2 * 1024 + 600])  # inside b.png
    (tmp_path / "not.tar").write_bytes(b"not a tar at all" * 100)
    good, bad = read("wds", tmp_path)
    assert good == {"cut/a": ["words"]}
    assert bad == dict.fromkeys(("cut", "not"), "damaged tar: the rest is lost")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_would_fill_the_memory_ends_the_tar(tmp_path, kind):
    with tarfile.open(tmp_path / "bomb.tar", "w") as tar:
        for name in ("a", "b"):  # b might go on behind the header
            add(tar, f"{name}.png")
            add(tar, f"{name}.txt", b"words")
        header = tarfile.TarInfo("long")
        header.type, header.size = kind, webdataset.MAX_HEADER_BYTES + 1
        tar.fileobj.write(header.tobuf(tarfile.USTAR_FORMAT))
        tar.fileobj.write(b"x" * (webdataset.MAX_HEADER_BYTES + 512))
    assert read("wds", tmp_path) == (
        {"bomb/a": ["words"]},
        {"bomb": "damaged tar: the rest is lost"},
    )


def test_gzipped_tar_and_pattern(tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        add(tar, "a.b/p1.seg.jpg")  # webdataset: the name ends at the first dot
        add(tar, "a.b/p2.JPG")
        add(tar, "a.b/p2.txt", "ü".encode())
        add(tar, "a.b/._p2.txt", b"macOS")
        add(tar, "a.b/p3.jpg")
        add(tar, "a.b/p3.txt", b"caf\xe9")
    good, bad = read("wds", tmp_path / "*.tar.gz")
    assert good == {"x/a.b/p2": ["ü"]}
    assert bad == {"x/a.b/p3": "caption is not UTF-8"}


def test_oversized_members_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(items, "MAX_IMAGE_BYTES", 10)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "p1.png", b"x" * 11)
        add(tar, "p1.txt", b"one")
    assert read("wds", tmp_path)[1] == {"x/p1": "picture file over 256 MiB"}


@pytest.mark.parametrize(
    "text",
    [
        'image,caption\np0.png,a\np1.png,"b, with comma"\n',
        "image_name| comment_number| comment\np0.png| 0| a\np1.png| 0| b, with comma\n",
        "p0.png\ta\np1.png\tb, with comma\n",
        "\ufefftitle\tfilepath\r\na\tp0.png\r\nb, with comma\tp1.png\r\n",
        'filepath\ttitle\np0.png\ta\np1.png\t"b, with comma"\n',
    ],
)
def test_csv_variants(tmp_path, text):
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode())
    assert read("csv", path) == ({"p0.png": ["a"], "p1.png": ["b, with comma"]}, {})


def test_csv_problems_by_row(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(
        b"filepath\ttitle\n"
        b"p0.png\tfine\np0.png\ttwice\n"
        b'p1.png\t"open quote\n'
        b"p2.png\n"
        b"p3.png\tcaf\xe9\n"
        b"../secret.png\tout\n/etc/passwd\tout\nsub/../p4.png\tinside\n"
        b"http://x/y.png\tweb\n\n\tnameless\n"
    )
    outside = "file outside of the pictures' folder (--images=/ allows any)"
    good, bad = read("csv", path)
    captions = {id: [text.strip() for text in texts] for id, texts in good.items()}
    assert captions == {
        "p0.png": ["fine", "twice"],
        "p1.png": ["open quote"],
        "sub/../p4.png": ["inside"],
    }
    assert bad == {
        "line 5": "too few columns",
        "p3.png": "row is not UTF-8",
        "../secret.png": outside,
        "/etc/passwd": outside,
        "http://x/y.png": "a URL, not a file (download it first, e.g. with img2dataset)",
        "line 12": "row names no picture",
    }
    good, bad = read("csv", path, root="/")
    assert "/etc/passwd" in good and "../secret.png" in good


def test_ambiguous_columns_must_be_named(tmp_path):
    path = tmp_path / "u.csv"
    path.write_text("name,what\np0.png,words\n")
    with pytest.raises(UsageError, match="columns name, what.*--image_field=NAME"):
        read("csv", path)
    with pytest.raises(UsageError, match="is the caption.*--text_field=NAME"):
        read("csv", path, image="name")
    assert read("csv", path, image="name", text="what")[0] == {"p0.png": ["words"]}


def test_jsonl_variants_and_problems(tmp_path):
    lines = [
        b'\xef\xbb\xbf{"image": "p0.png", "caption": "zero"}',
        b'{"filepath": "p1.png", "captions": ["one", "uno"]}',
        b'{"file_name": "p2.png", "sentences": [{"raw": "two"}, {"raw": "dos"}]}',
        b'{"file_name": "p3.png"',
        b'{"text": "no picture"}',
        b'["p5.png"]',
        b'{"file_name": "p5.png", "text": "caf\xe9"}',
        b"[" * 100_000,
        b'{"file_name": "a\\u0000b.png", "text": "NUL"}',
    ]
    path = tmp_path / "v.jsonl"
    path.write_bytes(b"\n".join(lines))
    good, bad = read("jsonl", path)
    assert good == {"p0.png": ["zero"], "p1.png": ["one", "uno"], "p2.png": ["two", "dos"]}
    assert [reason for _, reason in sorted(bad.items())] == [
        "file outside of the pictures' folder (--images=/ allows any)",
        "broken JSON",
        "row names no picture",
        "row is not a JSON object",
        "row is not UTF-8",
        "broken JSON",
    ]
    path.write_text(json.dumps([{"file_name": "p0.png", "text": "list"}, 3]))
    assert read("jsonl", path) == ({"p0.png": ["list"]}, {"line 2": "row is not a JSON object"})
    path.write_text("[{")
    with pytest.raises(UsageError, match="starts like a JSON list but is broken"):
        read("jsonl", path)


def test_parquet_variants_and_problems(tmp_path):
    rows = [{"bytes": b"pixels", "path": None}, {"bytes": None, "path": "x"}]
    pq.write_table(pa.table({"image": rows, "text": ["one", "two"]}), tmp_path / "a.parquet")
    columns = {"jpg": [b"p", None], "caption": ["c", "d"], "key": ["7", "8"]}
    status = ["success", "failed_to_download"]
    pq.write_table(pa.table({**columns, "status": status}), tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 nothing")
    good, bad = read("parquet", tmp_path)
    assert good == {"a/0": ["one"], "b/7": ["c"]}
    missing = "no picture in the row"
    assert bad == {"a/1": missing, "b/8": missing, "c": "damaged parquet file"}
    pq.write_table(pa.table({"url": ["http://x"], "text": ["t"]}), tmp_path / "d.parquet")
    with pytest.raises(UsageError, match="d.parquet has columns url, text.*img2dataset"):
        read("parquet", tmp_path)


def test_folder_with_a_link_in_a_circle(tmp_path):
    for name in ("x", "y"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "p.png").write_bytes(b"pixels")
        (tmp_path / "in" / name / "p.txt").write_text(name)
    (tmp_path / "in" / "x" / "up").symlink_to(tmp_path / "in")
    assert read("folder", tmp_path / "in") == ({"x/p": ["x"], "y/p": ["y"]}, {})


def test_keys_change_with_the_files_only(tmp_path):
    (tmp_path / "p.png").write_bytes(b"pixels")
    (tmp_path / "p.txt").write_text("words")
    keys = [unit.key for unit in formats.units("folder", tmp_path)]
    assert keys == [unit.key for unit in formats.units("folder", tmp_path)]
    (tmp_path / "p.txt").write_text("other words")
    assert keys != [unit.key for unit in formats.units("folder", tmp_path)]


def test_wrong_format_is_hinted(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "p.png")
    with pytest.raises(UsageError, match="try --from=wds"):
        read("folder", tmp_path)
    with pytest.raises(UsageError, match="--from=zip is unknown; use one of folder, wds"):
        read("zip", tmp_path)
