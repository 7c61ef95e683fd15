"""Staged parts: finished work on disk, so that an interrupted `prepare pairs` continues.

Items are converted in parts of two hundred. A part is one file that appears under its name only
when it is complete; the next run reads it instead of converting its items again.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import struct
from collections.abc import Callable, Iterator
from typing import Any

from dalle_jax.data.builders import store
from dalle_jax.data.builders.items import Raw, Unit
from dalle_jax.types import UsageError

PART_ITEMS = 200  # items: seconds of work, at most a minute on a busy machine
_SIZES = struct.Struct("<II")  # lengths of an item's header and picture

# An item -> its header (JSON) and its stored picture. A skipped item's header has a "reason".
Convert = Callable[[Raw], tuple[dict[str, Any], bytes]]


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """The folder of parts, for this process alone. A refused input leaves no empty folder.

    Raises:
      UsageError: if another process holds it.
    """
    with open(store.make_folder(folder) / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(
                f"another process is preparing {folder.parent}; wait for it, or use another --name."
            ) from error
        try:
            yield
        except UsageError:
            if not any(_count(part)[0] for part in folder.glob("*.part")):
                shutil.rmtree(folder)
                with contextlib.suppress(OSError):  # other sizes of the set, a tokenizer
                    folder.parent.rmdir()
                    folder.parent.parent.rmdir()
            raise


def stage(
    units: Iterator[Unit],
    folder: pathlib.Path,
    convert: Convert,
    *,
    label: str,
    workers: int,
    progress: store.Progress,
) -> list[pathlib.Path]:
    """Converts every item that has not been staged yet.

    Args:
      units: the pieces of the input.
      folder: of the parts, `locked`.
      convert: called in threads.
      label: changes whenever `convert` gives other results; part of the files' names.
      workers: threads. The result is the same for any number.
      progress: counts items.

    Returns:
      The parts, in the order of the input.
    """
    parts, before = [], 0.0
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for unit in units:
            stem = folder / hashlib.sha256(f"{label} {unit.key}".encode()).hexdigest()[:24]
            names = store.read_json(stem.with_suffix(".done")) or []
            if names and all((folder / name).is_file() for name in names):
                progress.fraction = before + unit.share
                for name in names:
                    progress.add(*_count(folder / name), resumed=True)
            else:
                names = _stage_unit(unit, stem, convert, progress, before, pool)
            parts += [folder / name for name in names]
            before += unit.share
    return parts


def read(part: pathlib.Path) -> Iterator[tuple[dict[str, Any], Any, int]]:
    """(header, file opened at the picture, the picture's length) for every item of a part."""
    with open(part, "rb") as file:
        while sizes := file.read(_SIZES.size):
            text, image = _SIZES.unpack(sizes)
            head = json.loads(file.read(text))
            after = file.tell() + image
            yield head, file, image
            file.seek(after)


def _stage_unit(
    unit: Unit,
    stem: pathlib.Path,
    convert: Convert,
    progress: store.Progress,
    before: float,
    pool: concurrent.futures.Executor,
) -> list[str]:
    """Names of the unit's parts. The items of an existing part are read but not converted."""
    names, raws = [], unit.read()
    while chunk := list(itertools.islice(raws, PART_ITEMS)):
        part = stem.with_name(f"{stem.name}-{len(names):05d}.part")
        if part.is_file():
            progress.fraction = before + unit.share * chunk[-1].at
            progress.add(*_count(part), resumed=True)
        else:
            with _complete(part) as file:
                for raw, (head, image) in zip(chunk, pool.map(convert, chunk), strict=True):
                    text = json.dumps(head, ensure_ascii=False).encode()
                    file.write(_SIZES.pack(len(text), len(image)) + text + image)
                    progress.fraction = before + unit.share * raw.at
                    progress.add(int("reason" not in head), int("reason" in head))
        names.append(part.name)
    with _complete(stem.with_suffix(".done")) as file:
        file.write(json.dumps(names).encode())
    return names


@contextlib.contextmanager
def _complete(path: pathlib.Path) -> Iterator[Any]:
    """A file that appears under its name only when all of it is on disk."""
    part = path.with_suffix(".writing")
    with open(part, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _count(part: pathlib.Path) -> tuple[int, int]:
    """How many items of a part are good, and how many are skipped."""
    bad = [("reason" in head) for head, _, _ in read(part)]
    return len(bad) - sum(bad), sum(bad)
