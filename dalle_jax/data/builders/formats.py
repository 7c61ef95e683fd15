"""Reading what users have on disk: folders, webdataset tars, jsonl, csv, parquet.

A format turns an input path into `Unit`s, pieces of work with a fingerprint, each of which yields
`Raw` items in a fixed order. No picture is decoded here and nothing is extracted to disk; what
cannot be used is yielded with its reason, so that it is counted and not lost.
"""

import dataclasses
import glob
import hashlib
import itertools
import json
import os
import pathlib
import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dalle_jax.data.builders import tables
from dalle_jax.types import UsageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
TEXT_SUFFIXES = (".txt", ".caption", ".text")
MAX_IMAGE_BYTES = 2**28  # 256 MiB of encoded picture
MAX_HEADER_BYTES = 2**20  # of a tar member: its name and times
MAX_TEXT_BYTES = 2**20  # of caption file
_GROUP = 512  # files or rows in one unit


@dataclasses.dataclass(frozen=True)
class Raw:
    """One item as found.

    Attributes:
      id: where it is, relative to the input: the same in every run.
      image: encoded bytes, or a file to read them from.
      captions: as written; cleaned later.
      problem: why it cannot be used; "" for a good item.
      detail: more about the problem, for skipped.jsonl.
      at: share of the unit that is read with this item, for the time left.
    """

    id: str
    image: bytes | pathlib.Path | None = None
    captions: tuple[str, ...] = ()
    problem: str = ""
    detail: str = ""
    at: float = 1.0


@dataclasses.dataclass(frozen=True)
class Unit:
    """A piece of the input.

    Attributes:
      key: changes when the piece's files change (names, sizes, times), so that work done on it
        can be used again.
      share: of the input's whole work; all of an input add up to 1.
      read: yields its items.
    """

    key: str
    share: float
    read: Callable[[], Iterator[Raw]]


@dataclasses.dataclass(frozen=True)
class Fields:
    """Names of columns or JSON fields; "" = found by the usual names."""

    image: str = ""
    text: str = ""
    root: str = ""  # folder that file names start from; "" = the folder of the table


def units(kind: str, path: str | pathlib.Path, fields: Fields = Fields()) -> Iterator[Unit]:  # noqa: B008
    """The pieces of an input, in a fixed order.

    Args:
      kind: folder | wds | jsonl | csv | parquet.
      path: a folder or a file; for wds and parquet also a folder of shards or a glob pattern.
      fields: for jsonl, csv and parquet.

    Raises:
      UsageError: if there is nothing of that kind at `path`.
    """
    if kind not in KINDS:
        raise UsageError(f"--from={kind} is unknown; use one of {', '.join(KINDS)}.")
    return KINDS[kind](str(path), fields)


def _folder_units(path: str, fields: Fields) -> Iterator[Unit]:
    del fields
    root = pathlib.Path(path)
    if not root.is_dir():
        raise UsageError(
            f"--input={path} is not a folder; --from=folder needs one with x.jpg + x.txt pairs."
        )
    stems: dict[str, dict[str, list[str]]] = {}
    for name in _walk(root):
        stem, suffix = os.path.splitext(name)
        kind = {**dict.fromkeys(IMAGE_SUFFIXES, "image"), **dict.fromkeys(TEXT_SUFFIXES, "text")}
        if suffix.lower() in kind:
            stems.setdefault(stem, {}).setdefault(kind[suffix.lower()], []).append(name)
    if not any("image" in found for found in stems.values()):
        raise UsageError(
            f"--input={path} holds no picture ({', '.join(IMAGE_SUFFIXES)}).{_hint(root)}"
        )
    if not any("text" in found for found in stems.values()):
        raise UsageError(
            f"--input={path} holds pictures but no caption file; every x.jpg needs an x.txt beside "
            f"it with one caption per line.{_hint(root)}"
        )
    for group in _groups(sorted(stems)):
        share = len(group) / len(stems)
        members = [(stem, stems[stem]) for stem in group]
        files = [root / n for _, found in members for names in found.values() for n in names]
        yield Unit(
            _fingerprint("folder", *map(_stat, files)),
            share,
            lambda members=members: _read_stems(root, members),
        )


def _read_stems(root: pathlib.Path, members: list) -> Iterator[Raw]:
    for i, (stem, found) in enumerate(members):
        at = (i + 1) / len(members)
        pictures, texts = found.get("image", []), found.get("text", [])
        if not pictures:
            yield Raw(texts[0], problem="caption file without a picture", at=at)
            continue
        for extra in pictures[1:]:
            yield Raw(extra, problem="second picture of one name", detail=pictures[0], at=at)
        if not texts:
            yield Raw(stem, problem="no caption file", at=at)
            continue
        try:
            if os.path.getsize(root / texts[0]) > MAX_TEXT_BYTES:
                yield Raw(stem, problem="caption file over 1 MiB", at=at)
                continue
            captions = tuple(decode((root / texts[0]).read_bytes()).splitlines())
        except UnicodeDecodeError as error:
            yield Raw(stem, problem="caption is not UTF-8", detail=str(error), at=at)
        except OSError as error:
            yield Raw(stem, problem="file cannot be read", detail=str(error), at=at)
        else:
            yield Raw(stem, root / pictures[0], captions, at=at)


def _wds_units(path: str, fields: Fields) -> Iterator[Unit]:
    del fields
    shards = _shards(path, (".tar", ".tar.gz", ".tgz"), "webdataset tars such as 00000.tar")
    root = os.path.commonpath([os.path.dirname(os.path.abspath(s)) for s in shards])
    for shard, share in zip(shards, _shares(shards), strict=True):
        name = os.path.relpath(os.path.abspath(shard), root)
        yield Unit(
            _fingerprint("wds", _stat(shard)),
            share,
            lambda shard=shard, name=name: _read_tar(shard, name),
        )


def _read_tar(path: str, name: str) -> Iterator[Raw]:
    """Samples of one shard: neighbouring members with the same name up to the first dot.

    The tar is only ever streamed: names that point elsewhere and links are counted and passed
    over, never followed, and no member is written to disk.
    """
    size = max(1, os.path.getsize(path))
    prefix = name.removesuffix(".gz").removesuffix(".tgz").removesuffix(".tar")
    try:
        with open(path, "rb") as file, _open_tar(file) as tar:
            key, parts = None, {}
            for member in tar:
                at = min(1.0, file.tell() / size)
                problem = _unsafe(member)
                if problem:
                    yield Raw(f"{prefix}/{member.name}", problem=problem, at=at)
                if problem or not member.isreg():
                    continue
                folder, _, base = member.name.removeprefix("./").rpartition("/")
                if base.startswith("."):  # ._x.jpg: macOS leaves one beside every file
                    continue
                stem, _, suffix = base.partition(".")
                stem = f"{folder}/{stem}" if folder else stem
                if stem != key:
                    if key is not None:
                        yield from _sample(f"{prefix}/{key}", parts, at)
                    key, parts = stem, {}
                suffix = f".{suffix.lower()}"
                is_image = suffix in IMAGE_SUFFIXES
                if is_image or suffix in (*TEXT_SUFFIXES, ".json"):
                    limit = MAX_IMAGE_BYTES if is_image else MAX_TEXT_BYTES
                    parts[suffix] = None if member.size > limit else tar.extractfile(member).read()
            if key is not None:
                yield from _sample(f"{prefix}/{key}", parts, 1.0)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        yield Raw(prefix, problem="damaged tar: the rest is lost", detail=str(error))


class _BoundedHeader(tarfile.TarInfo):
    """Headers that name the next member (pax, GNU long names) are read whole into memory."""

    _LONG = tarfile.XHDTYPE + tarfile.XGLTYPE + tarfile.GNUTYPE_LONGNAME + tarfile.GNUTYPE_LONGLINK

    def _proc_member(self, tar):
        # Called for every header, as tarfile.py says for subclasses that add or replace types.
        if self.type in self._LONG and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(tar)


def _open_tar(file) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode="r|*", tarinfo=_BoundedHeader)


def _unsafe(member: tarfile.TarInfo) -> str:
    """Why a member is passed over; "" for harmless ones."""
    parts = member.name.replace("\\", "/").split("/")
    if member.issym() or member.islnk():
        return "link in a tar"
    if member.name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
        return "unsafe name in a tar"
    return "" if member.isreg() or member.isdir() else "not a file in a tar"


def _sample(id: str, parts: dict[str, bytes | None], at: float) -> Iterator[Raw]:
    images = [s for s in parts if s in IMAGE_SUFFIXES]
    texts = [s for s in parts if s in TEXT_SUFFIXES] or [s for s in parts if s == ".json"]
    if not images and not texts:
        return  # embeddings, statistics: nothing of ours
    if not images or not texts:
        problem = "no caption file" if images else "caption file without a picture"
        yield Raw(id, problem=problem, at=at)
        return
    image, text = parts[images[0]], parts[texts[0]]
    if image is None or text is None:
        too_big = "picture file over 256 MiB" if image is None else "caption file over 1 MiB"
        yield Raw(id, problem=too_big, at=at)
        return
    try:
        text = decode(text)
        captions = tables.captions_of(json.loads(text), "") if texts[0] == ".json" else None
        captions = tuple(text.splitlines()) if captions is None else captions
    except UnicodeDecodeError as error:
        yield Raw(id, problem="caption is not UTF-8", detail=str(error), at=at)
    except (ValueError, RecursionError) as error:
        yield Raw(id, problem="broken JSON", detail=str(error), at=at)
    else:
        yield Raw(id, image, captions, at=at)


def _table_units(kind: str) -> Callable[[str, Fields], Iterator[Unit]]:
    def read(path: str, fields: Fields) -> Iterator[Unit]:
        if not os.path.isfile(path):
            raise UsageError(f"--input={path} is not a file; --from={kind} needs a .{kind} file.")
        root = os.path.abspath(fields.root or os.path.dirname(path) or ".")
        rows = (tables.jsonl_rows if kind == "jsonl" else tables.csv_rows)(path, fields)
        total = max(1, os.path.getsize(path))
        done = 0.0
        for group in _groups(rows):
            items = [_row_item(row, root) for row in _merged(group)]
            files = [item.image for item in items if item.image is not None]
            texts = [repr((i.id, i.captions, i.problem)) for i in items]
            share, done = (group[-1].end - done) / total, group[-1].end
            yield Unit(
                _fingerprint(kind, *texts, *map(_stat, files)),
                share,
                lambda items=items: iter(items),
            )
        if not done:
            raise UsageError(f"--input={path} is empty; expected one pair per row.")

    return read


def _merged(rows: list[tables.Row]) -> Iterator[tables.Row]:
    """Neighbouring rows of the same picture as one row: captions files list each five times."""
    for _, same in itertools.groupby(rows, key=lambda row: (row.file or row.line, row.problem)):
        same = list(same)
        captions = tuple(caption for row in same for caption in row.captions)
        yield dataclasses.replace(same[0], captions=captions)


def _row_item(row: tables.Row, root: str) -> Raw:
    id = row.file or f"line {row.line}"
    if row.problem:
        return Raw(id, problem=row.problem, detail=f"line {row.line} {row.detail}".strip())
    if "://" in row.file:
        return Raw(id, problem="a URL, not a file (download it first, e.g. with img2dataset)")
    path = os.path.normpath(os.path.join(root, row.file))
    if "\0" in path or os.path.commonpath([path, root]) != root:
        # A table from elsewhere decides what is read here, so it may not leave its folder.
        return Raw(id, problem="file outside of the pictures' folder (--images=/ allows any)")
    return Raw(id, pathlib.Path(path), row.captions)


def _parquet_units(path: str, fields: Fields) -> Iterator[Unit]:
    shards = _shards(path, (".parquet",), "parquet files such as 00000.parquet")
    for shard, share in zip(shards, _shares(shards), strict=True):
        name = os.path.basename(shard).removesuffix(".parquet")
        yield Unit(
            _fingerprint("parquet", _stat(shard), fields.image, fields.text),
            share,
            lambda shard=shard, name=name: (
                Raw(**item) for item in tables.parquet_items(shard, name, fields)
            ),
        )


KINDS: dict[str, Callable[[str, Fields], Iterator[Unit]]] = {
    "folder": _folder_units,
    "wds": _wds_units,
    "jsonl": _table_units("jsonl"),
    "csv": _table_units("csv"),
    "parquet": _parquet_units,
}


def decode(data: bytes) -> str:
    """Text in UTF-8, with or without byte-order mark, or in UTF-16 with one.

    Raises:
      UnicodeDecodeError: for anything else.
    """
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16")
    return data.decode("utf-8-sig")


def _shards(path: str, suffixes: tuple[str, ...], what: str) -> list[str]:
    if os.path.isdir(path):
        found = [os.path.join(path, name) for name in _walk(pathlib.Path(path))]
        found = [name for name in found if name.lower().endswith(suffixes)]
    else:
        found = [name for name in glob.glob(path) if os.path.isfile(name)]
    if not found and os.path.isfile(path):  # a name with [brackets]
        found = [path]
    if not found:
        raise UsageError(f"--input={path} holds no {what}; give a file, a folder or a pattern.")
    return sorted(found)


def _shares(files: list[str]) -> list[float]:
    sizes = [os.path.getsize(name) + 1 for name in files]
    return [size / sum(sizes) for size in sizes]


def _walk(root: pathlib.Path) -> Iterator[str]:
    """Relative names of visible files, sorted; linked folders are entered once."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), root)


def _hint(root: pathlib.Path) -> str:
    """Another format that is there."""
    for pattern, kind in (
        ("*.tar", "wds"),
        ("*.parquet", "parquet"),
        ("*.jsonl", "jsonl"),
        ("*.csv", "csv"),
    ):
        found = next(iter(sorted(root.glob(pattern))), None)
        if found:
            where = root if kind in ("wds", "parquet") else found
            return f" It holds {found.name}: try --from={kind} --input={where}."
    return ""


def _groups(items: Iterable[Any]) -> Iterator[list[Any]]:
    items = iter(items)
    while group := list(itertools.islice(items, _GROUP)):
        yield group


def _stat(path: str | pathlib.Path) -> str:
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return f"{path} absent"
    return f"{path} {stat.st_size} {stat.st_mtime_ns}"


def _fingerprint(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()[:24]
