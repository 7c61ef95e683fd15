"""Converts a user's pictures and captions to a TFDS set: `prepare pairs`.

Items are checked, resized and staged (`staging`); the parts then become one array_record set. No
item is dropped silently: reasons are counted, and skipped.jsonl in the set names every skipped
item.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

from PIL import Image

from dalle_jax import images
from dalle_jax.data.builders import formats, items, staging, store
from dalle_jax.types import UsageError

# A model reads at most 256 ids, about 1,200 letters, and never sees the rest of a caption.
MAX_CAPTION_CHARS = 2000
MAX_CAPTIONS = 64  # of one picture
# Up to this side pictures are stored losslessly: a PNG of 128 px has 25 kB, a JPEG 8 kB.
LOSSLESS_PX = 128
_FORMAT = 1  # version of staged items; part of their parts' names


@dataclasses.dataclass(frozen=True)
class Options:
    """How items become examples.

    Attributes:
      image_px: length of the shorter side; smaller pictures are not enlarged; 0 keeps all sizes.
      validation: share of pictures in the validation split, by a hash of their id.
      fields: names of columns, see items.Fields.
      workers: threads that decode. The result is the same for any number.
    """

    image_px: int = 0
    validation: float = 0.01
    fields: items.Fields = items.Fields()
    workers: int = 1

    def __post_init__(self):
        if self.image_px and not 8 <= self.image_px <= 4096:
            raise UsageError(
                f"--image_px={self.image_px} is out of range; use 8 to 4096, or 0 to keep sizes."
            )
        if not 0 <= self.validation < 1:
            raise UsageError(f"--validation={self.validation} is not a share; use 0 to 0.99.")
        if self.workers < 1:
            raise UsageError(f"--workers={self.workers}; at least one thread must work.")


def prepare(
    data_dir: str | pathlib.Path,
    name: str,
    kind: str,
    path: str | pathlib.Path,
    options: Options = Options(),  # noqa: B008
    overwrite: bool = False,
) -> tuple[pathlib.Path, dict[str, Any]]:
    """Writes the pairs at `path` as set `name`.

    Args:
      data_dir: the set goes to DATA_DIR/NAME/<image_px>px/1.0.0 ("original" for image_px 0).
      name: of the set; see `store.check_name`.
      kind: folder | wds | jsonl | csv | parquet.
      path: the input.
      options: sizes, splits, columns.
      overwrite: replace a finished set with other options or input.

    Returns:
      The version folder, and a summary: examples per split, skipped by reason, notes, …

    Raises:
      UsageError: for bad options, an input without a single good pair, a set of that name with
        another recipe, or another process that writes it.
    """
    config = f"{options.image_px}px" if options.image_px else "original"
    target = store.folder(data_dir, store.check_name(name), config)
    recipe = {
        "kind": "pairs",
        "from": kind,
        "input": os.path.abspath(path) if "://" not in str(path) else str(path),
        "image_px": options.image_px,
        "validation": options.validation,
        "fields": dataclasses.asdict(options.fields),
    }
    if store.already_done(target, recipe, overwrite):
        return target, store.read_json(target / "prepare.json")
    units = formats.units(kind, path, options.fields)
    units = itertools.chain([next(units)], units)  # refuses a wrong input before a folder exists
    folder = target.parent / "staging"
    with staging.locked(folder), _quiet_pictures():
        progress = store.Progress(None, "pairs")
        parts = staging.stage(
            units,
            folder,
            functools.partial(_convert, image_px=options.image_px),
            label=f"{_FORMAT} {options.image_px}",
            workers=options.workers,
            progress=progress,
        )
        seconds = progress.close()
        counts, skipped = Counter(), []
        sizes = _choose_splits(parts, options.validation, counts, skipped)
        if not sizes["train"]:
            reasons = "; ".join(f"{n} x {why}" for why, n in counts.most_common(6))
            raise UsageError(
                f"none of the {sum(counts.values())} items of --input={path} can be used: "
                f"{reasons or 'it is empty'}. See docs/data.md for what --from={kind} reads."
            )
        for stale in target.parent.glob("incomplete.*"):  # a run was killed while writing
            shutil.rmtree(stale, ignore_errors=True)
        store.write(
            data_dir=data_dir,
            name=name,
            config=config,
            features=store.image_text_features(),
            splits={
                split: (lambda split=split: _examples(parts, split, sizes["edge"]))
                for split in ("train", "validation")
                if sizes[split]
            },
            description=f"Image-caption pairs from {kind} {os.path.basename(str(path))}.",
        )
        with open(target / "skipped.jsonl", "w", encoding="utf-8") as file:
            for item in skipped:
                file.write(json.dumps(item, ensure_ascii=False) + "\n")
        summary = {
            "examples": {split: sizes[split] for split in ("train", "validation")},
            "skipped": {why: n for why, n in counts.most_common() if why not in _NOTES},
            "notes": {why: counts[why] for why in _NOTES if counts[why]},
            "first_skipped": [f"{item['id']}: {item['reason']}" for item in skipped[:5]],
            "resumed": progress.resumed,
            "seconds": round(seconds, 1),
        }
        store.finish(target, recipe, summary)
        shutil.rmtree(folder)
    return target, summary


_CUT = f"caption cut at {MAX_CAPTION_CHARS} characters"
_MANY = f"more than {MAX_CAPTIONS} captions: the first are kept"
_NOTES = (_CUT, _MANY)


def clean_caption(text: str) -> str:
    """One line without control characters, cut at a space before MAX_CAPTION_CHARS."""
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in text[: 2**20])
    text = " ".join(text.split())
    if len(text) > MAX_CAPTION_CHARS:
        head = text[:MAX_CAPTION_CHARS]
        text = head.rsplit(" ", 1)[0] if " " in head[-200:] else head
    return text


def encode(data: bytes, image_px: int) -> bytes:
    """The picture as it is stored: decoded once as a check, upright, RGB, resized.

    A picture that needs no change keeps its bytes.

    Args:
      data: an encoded picture.
      image_px: length of the shorter side; a smaller picture is not enlarged. 0 = its own size.

    Raises:
      _Problem: with the reason.
    """
    try:
        with Image.open(io.BytesIO(data), formats=images.FORMATS) as image:
            width, height = image.size
            kind, mode = image.format, image.mode
            # Without this check getexif would decode a PNG that has no EXIF here.
            turned = "exif" in image.info and image.getexif().get(0x0112, 1) != 1
    except Image.DecompressionBombError as error:
        raise _Problem("picture with too many pixels", str(error)) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise a dozen kinds on damaged files
        raise _Problem("not a picture", str(error)) from error
    if width * height > images.MAX_PIXELS:
        raise _Problem("picture with too many pixels", f"{width} x {height}")
    try:
        pixels = images.decode(data)
    except UsageError as error:
        raise _Problem("broken picture", str(error)) from error
    shrink = image_px and min(pixels.shape[:2]) > image_px
    if not shrink and not turned and kind in ("JPEG", "PNG", "WEBP") and mode in ("RGB", "L"):
        return data
    image = Image.fromarray(pixels)
    if shrink:
        factor = image_px / min(image.size)
        size = tuple(max(image_px, round(side * factor)) for side in image.size)
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if kind not in ("JPEG", "WEBP") or min(image.size) <= LOSSLESS_PX:
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


class _Problem(Exception):
    """Why an item is skipped: reason, detail."""


def _convert(raw: items.Raw, image_px: int) -> tuple[dict[str, Any], bytes]:
    """Header and picture of a staged item; the header of a skipped item has a reason."""
    head: dict[str, Any] = {"id": raw.id.encode("utf-8", "replace").decode()}
    try:
        if raw.problem:
            raise _Problem(raw.problem, raw.detail)
        captions = list(dict.fromkeys(filter(None, map(clean_caption, raw.captions))))
        if not captions:
            raise _Problem("empty caption", "")
        notes = [_CUT] if any(len(text) > MAX_CAPTION_CHARS for text in raw.captions) else []
        notes += [_MANY] if len(captions) > MAX_CAPTIONS else []
        image = encode(_bytes(raw.image), image_px)
    except _Problem as problem:
        reason, detail = problem.args
        return head | {"reason": reason, "detail": detail[:300]}, b""
    return head | {"captions": captions[:MAX_CAPTIONS], "notes": notes}, image


def _bytes(image: bytes | pathlib.Path) -> bytes:
    if isinstance(image, bytes):
        if len(image) > items.MAX_IMAGE_BYTES:
            raise _Problem("picture over 256 MiB", f"{len(image):,} bytes")
        return image
    try:
        if os.path.getsize(image) > items.MAX_IMAGE_BYTES:
            raise _Problem("picture file over 256 MiB", str(image))
        return image.read_bytes()
    except FileNotFoundError as error:
        raise _Problem("no such picture file", str(error)) from error
    except (OSError, ValueError) as error:
        raise _Problem("file cannot be read", str(error)) from error


def _choose_splits(
    parts: list[pathlib.Path], validation: float, counts: Counter, skipped: list[dict]
) -> dict[str, Any]:
    """Sizes of the splits, and the edge below which an id's hash means validation.

    A small set whose hashes are all above `validation` still gets one validation picture.
    """
    hashes = []
    for part in parts:
        for head, _, _ in staging.read(part):
            if "reason" in head:
                counts[head["reason"]] += 1
                skipped.append(head)
            else:
                counts.update(head["notes"])
                hashes.append(store.uniform_hash(head["id"]))
    edge = validation
    if validation and len(set(hashes)) > 1:  # few pictures: at least one on either side
        edge = min(max(edge, math.nextafter(min(hashes), 1)), max(hashes))
    held = sum(h < edge for h in hashes)
    return {"train": len(hashes) - held, "validation": held, "edge": edge}


def _examples(parts: list[pathlib.Path], split: str, edge: float) -> store.Examples:
    for i, part in enumerate(parts):
        for j, (head, file, length) in enumerate(staging.read(part)):
            if "reason" in head:
                continue
            is_held_back = store.uniform_hash(head["id"]) < edge
            if is_held_back != (split == "validation"):
                continue
            image = io.BytesIO(file.read(length))
            values = {"image": image, "captions": head["captions"], "id": head["id"]}
            # A file may be listed twice, so the key is its position and not its id alone.
            yield f"{i:06d}/{j:04d}/{head['id']}", values


@contextlib.contextmanager
def _quiet_pictures() -> Iterator[None]:
    """Without Pillow's warnings about odd metadata and large pictures, which are counted here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", module=re.escape("PIL."))
        yield
