"""Samples of a webdataset tar: neighbouring members with the same name up to the first dot.

A tar is only ever streamed. No member is written to disk; links and names that point outside the
tar are counted and passed over, never followed.
"""

import json
import os
import tarfile
from collections.abc import Iterator

from dalle_jax.data.builders import items, tables
from dalle_jax.data.builders.items import Raw

MAX_HEADER_BYTES = 2**20  # of a tar member: its name and times


def read_shard(path: str, name: str) -> Iterator[Raw]:
    """The samples of one tar, `.tar`, `.tar.gz` or `.tgz`; ids begin with `name`, its path."""
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
                is_image = suffix in items.IMAGE_SUFFIXES
                if is_image or suffix in (*items.TEXT_SUFFIXES, ".json"):
                    limit = items.MAX_IMAGE_BYTES if is_image else items.MAX_TEXT_BYTES
                    parts[suffix] = None if member.size > limit else tar.extractfile(member).read()
            if key is not None:
                yield from _sample(f"{prefix}/{key}", parts, 1.0)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        yield Raw(prefix, problem="damaged tar: the rest is lost", detail=str(error))


class _BoundedHeader(tarfile.TarInfo):
    """Refuses huge headers: tarfile reads those with a long name (pax, GNU) into memory whole."""

    _LONG = tarfile.XHDTYPE + tarfile.XGLTYPE + tarfile.GNUTYPE_LONGNAME + tarfile.GNUTYPE_LONGLINK

    def _proc_member(self, tar):
        # tarfile.py documents this hook, called for every header, for subclasses of TarInfo.
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
    images = [s for s in parts if s in items.IMAGE_SUFFIXES]
    texts = [s for s in parts if s in items.TEXT_SUFFIXES] or [s for s in parts if s == ".json"]
    if not images and not texts:
        return  # embeddings, statistics
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
        text = items.decode_text(text)
        captions = tables.captions_of(json.loads(text), "") if texts[0] == ".json" else None
        captions = tuple(text.splitlines()) if captions is None else captions
    except UnicodeDecodeError as error:
        yield Raw(id, problem="caption is not UTF-8", detail=str(error), at=at)
    except (ValueError, RecursionError) as error:
        yield Raw(id, problem="broken JSON", detail=str(error), at=at)
    else:
        yield Raw(id, image, captions, at=at)
