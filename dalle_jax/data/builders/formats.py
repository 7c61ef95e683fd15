"""The formats that `prepare pairs` reads: folders, webdataset tars, jsonl, csv, parquet.

Each format turns an input path into `items.Unit`s, pieces of work with a fingerprint. No picture is
decoded here, and nothing is extracted to disk.
"""

import dataclasses
import glob
import hashlib
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dalle_jax.data.builders import items, parquet, tables, webdataset
from dalle_jax.data.builders.items import Fields, Raw, Unit
from dalle_jax.types import UsageError

UNIT_ITEMS = 512  # files or rows in one unit
_KIND_OF_SUFFIX = dict.fromkeys(items.IMAGE_SUFFIXES, "image") | dict.fromkeys(
    items.TEXT_SUFFIXES, "text"
)


def units(kind: str, path: str | pathlib.Path, fields: Fields = Fields()) -> Iterator[Unit]:  # noqa: B008
    """The pieces of an input in a fixed order.

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
        kind = _KIND_OF_SUFFIX.get(suffix.lower())
        if kind:
            stems.setdefault(stem, {}).setdefault(kind, []).append(name)
    if not any("image" in files for files in stems.values()):
        raise UsageError(
            f"--input={path} holds no picture ({', '.join(items.IMAGE_SUFFIXES)}).{_hint(root)}"
        )
    if not any("text" in files for files in stems.values()):
        raise UsageError(
            f"--input={path} holds pictures but no caption file; every x.jpg needs an x.txt beside "
            f"it with one caption per line.{_hint(root)}"
        )
    for group in _groups(sorted(stems)):
        share = len(group) / len(stems)
        members = [(stem, stems[stem]) for stem in group]
        files = [root / n for _, kinds in members for names in kinds.values() for n in names]
        yield Unit(
            _fingerprint("folder", *map(_stat, files)),
            share,
            lambda members=members: _read_stems(root, members),
        )


def _read_stems(root: pathlib.Path, members: list) -> Iterator[Raw]:
    for i, (stem, files) in enumerate(members):
        at = (i + 1) / len(members)
        pictures, texts = files.get("image", []), files.get("text", [])
        if not pictures:
            yield Raw(texts[0], problem="caption file without a picture", at=at)
            continue
        for extra in pictures[1:]:
            yield Raw(extra, problem="second picture of one name", detail=pictures[0], at=at)
        if not texts:
            yield Raw(stem, problem="no caption file", at=at)
            continue
        try:
            if os.path.getsize(root / texts[0]) > items.MAX_TEXT_BYTES:
                yield Raw(stem, problem="caption file over 1 MiB", at=at)
                continue
            captions = tuple(items.decode_text((root / texts[0]).read_bytes()).splitlines())
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
            lambda shard=shard, name=name: webdataset.read_shard(shard, name),
        )


def _table_units(kind: str) -> Callable[[str, Fields], Iterator[Unit]]:
    def read(path: str, fields: Fields) -> Iterator[Unit]:
        if not os.path.isfile(path):
            raise UsageError(f"--input={path} is not a file; --from={kind} needs a .{kind} file.")
        root = os.path.abspath(fields.root or os.path.dirname(path) or ".")
        rows = (tables.jsonl_rows if kind == "jsonl" else tables.csv_rows)(path, fields)
        total = max(1, os.path.getsize(path))
        done = 0.0
        for group in _groups(rows):
            raws = [_row_item(row, root) for row in _merged(group)]
            files = [raw.image for raw in raws if raw.image is not None]
            texts = [repr((raw.id, raw.captions, raw.problem)) for raw in raws]
            share, done = (group[-1].end - done) / total, group[-1].end
            yield Unit(
                _fingerprint(kind, *texts, *map(_stat, files)),
                share,
                lambda raws=raws: iter(raws),
            )
        if not done:
            raise UsageError(f"--input={path} is empty; expected one pair per row.")

    return read


def _merged(rows: list[tables.Row]) -> Iterator[tables.Row]:
    """Neighbouring rows of the same picture as one row: COCO's captions list each five times."""
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
        # A downloaded table decides which files are read, so it may not leave its folder.
        return Raw(id, problem="file outside of the pictures' folder (--images=/ allows any)")
    return Raw(id, pathlib.Path(path), row.captions)


def _parquet_units(path: str, fields: Fields) -> Iterator[Unit]:
    shards = _shards(path, (".parquet",), "parquet files such as 00000.parquet")
    for shard, share in zip(shards, _shares(shards), strict=True):
        name = os.path.basename(shard).removesuffix(".parquet")
        yield Unit(
            _fingerprint("parquet", _stat(shard), fields.image, fields.text),
            share,
            lambda shard=shard, name=name: parquet.read_shard(shard, name, fields),
        )


KINDS: dict[str, Callable[[str, Fields], Iterator[Unit]]] = {
    "folder": _folder_units,
    "wds": _wds_units,
    "jsonl": _table_units("jsonl"),
    "csv": _table_units("csv"),
    "parquet": _parquet_units,
}


def _shards(path: str, suffixes: tuple[str, ...], what: str) -> list[str]:
    if os.path.isdir(path):
        files = [os.path.join(path, name) for name in _walk(pathlib.Path(path))]
        files = [name for name in files if name.lower().endswith(suffixes)]
    else:
        files = [name for name in glob.glob(path) if os.path.isfile(name)]
    if not files and os.path.isfile(path):  # a name with [brackets]
        files = [path]
    if not files:
        raise UsageError(f"--input={path} holds no {what}; give a file, a folder or a pattern.")
    return sorted(files)


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
    """Advice for a folder that holds another format; "" if it holds none."""
    for pattern, kind in (
        ("*.tar", "wds"),
        ("*.parquet", "parquet"),
        ("*.jsonl", "jsonl"),
        ("*.csv", "csv"),
    ):
        file = next(iter(sorted(root.glob(pattern))), None)
        if file:
            path = root if kind in ("wds", "parquet") else file
            return f" It holds {file.name}: try --from={kind} --input={path}."
    return ""


def _groups(values: Iterable[Any]) -> Iterator[list[Any]]:
    values = iter(values)
    while group := list(itertools.islice(values, UNIT_ITEMS)):
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
