"""The `emoji` set: real pictures with human-written captions, in eight openly licensed styles.

`npm_packages` fetches the pictures, and the words from emojibase (Unicode CLDR labels and tags).
The set has about 11.5 thousand pairs and 1,949 labels. Most labels exist in five or more styles, so
that a pair of label and style can be held out while training sees both of its parts: a
compositional test.
"""

import concurrent.futures
import dataclasses
import io
import pathlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from dalle_jax.data.builders import npm_packages, store
from dalle_jax.types import UsageError

NAME = "emoji"
HELD_OUT_SHARE = 0.05
VALIDATION_SHARE = 0.02
# A held-out label has pictures in at least this many other styles, which training may use.
OTHER_STYLES = 4
_WINDOW = 256  # pictures rendered ahead of the writer


@dataclasses.dataclass(frozen=True)
class Meaning:
    """The meaning of one emoji: a Unicode sequence with its CLDR words."""

    hexcode: str
    label: str
    tags: tuple[str, ...]
    base: str  # label without skin tone
    has_tone: bool


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture: `svg` text or `webp` bytes."""

    style: str
    meaning: Meaning
    svg: str = ""
    webp: bytes = b""

    @property
    def id(self) -> str:
        """`twemoji/1F419`."""
        return f"{self.style.replace(' ', '-')}/{self.meaning.hexcode}"


def read_meanings(data: Iterable[Mapping[str, Any]]) -> dict[str, Meaning]:
    """emojibase's data.json as sequence (without variation selectors) -> Meaning."""
    meanings = {}
    for entry in data:
        tags = tuple(_plain(tag) for tag in entry.get("tags", ()))
        for item in (entry, *entry.get("skins", ())):
            meanings[_sequence(item["hexcode"])] = Meaning(
                hexcode=item["hexcode"],
                label=_plain(item["label"]),
                tags=tags,
                base=_plain(entry["label"]),
                has_tone=item is not entry,
            )
    return meanings


def join(
    archives: Mapping[npm_packages.Package, npm_packages.Archive],
    skin_tones: bool = False,
) -> tuple[list[Picture], Counter]:
    """Every picture with a known meaning, sorted by id, and counts of the others by reason.

    A picture is matched by its Unicode sequence, else by its name (`emojione`, `fxemoji` and
    `noto-v1` have no or few sequences). Of several pictures with the same style and meaning the
    first by name is used.
    """
    meanings = read_meanings(archives[npm_packages.LABELS].json("en/data.json"))
    by_name = {_slug(m.label): m for m in reversed(meanings.values())}
    pictures: dict[tuple[str, str], Picture] = {}
    left_out: Counter = Counter()
    for package, archive in archives.items():
        if not package.style:
            continue
        icons = _webps(archive) if "icons.json" not in archive.files else _icons(archive)
        for name, sequences, content in icons:
            matches = [meanings[s] for s in sequences if s in meanings]
            meaning = matches[0] if matches else by_name.get(_slug(name))
            if meaning is None:
                left_out[f"{package.style}: no such emoji"] += 1
            elif meaning.has_tone and not skin_tones:
                left_out[f"{package.style}: skin tone"] += 1
            elif (package.style, meaning.label) in pictures:
                left_out[f"{package.style}: drawn twice"] += 1
            else:
                picture = Picture(package.style, meaning, **content)
                pictures[package.style, meaning.label] = picture
    return sorted(pictures.values(), key=lambda p: p.id), left_out


def _icons(archive: npm_packages.Archive) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """The icons of a package in Iconify's format: name, Unicode sequences, an SVG document."""
    sequences = defaultdict(list)
    for hexcode, name in archive.json("chars.json").items():
        sequences[name].append(_sequence(hexcode))
    icons = archive.json("icons.json")
    for name, icon in sorted(icons["icons"].items()):
        left, top = (icon.get(k, icons.get(k, 0)) for k in ("left", "top"))
        width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
        # The document is square: the icon is centred in it, never stretched.
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="100" height="100" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )
        yield name, sequences[name], {"svg": svg}


def _webps(archive: npm_packages.Archive) -> Iterator[tuple[str, list[str], dict[str, bytes]]]:
    for path, data in sorted(archive.files.items()):
        if path.endswith(".webp"):
            stem = pathlib.PurePosixPath(path).stem
            yield stem, [_sequence(stem)], {"webp": data}


def captions(picture: Picture) -> list[str]:
    """The picture's captions; the first is the plain one, which evaluation uses.

    "twemoji style octopus" · "octopus, twemoji style" · "twemoji style octopus, animal, ocean" …
    Training samples one of them per step, so half of the steps see tags (words that are not in the
    label).
    """
    style, label = picture.style, picture.meaning.label
    words = set(re.findall(r"\w+", label.lower()))
    tags = [t for t in picture.meaning.tags if not set(re.findall(r"\w+", t.lower())) <= words]
    tags.sort(key=lambda tag: store.uniform_hash(f"{picture.id} {tag}"))
    plain = f"{style} style {label}"
    out = [plain, f"{label}, {style} style"]
    if tags:
        out.append(f"{plain}, {', '.join(tags[:2])}")
    if len(tags) > 2:
        out.append(f"{plain}, {', '.join(tags[2:4])}")
    return out


def assign_splits(pictures: Iterable[Picture]) -> dict[str, list[Picture]]:
    """The splits train, validation and held_out, by a hash of each picture's own label and style.

    held_out: about 5 % of the (label, style) pairs whose label exists in four other styles; the
    skin tones of one label are in one split. validation: 2 % of the rest.
    """
    pictures = list(pictures)
    styles = defaultdict(set)
    for picture in pictures:
        styles[picture.meaning.base].add(picture.style)
    splits: dict[str, list[Picture]] = {"train": [], "validation": [], "held_out": []}
    for picture in pictures:
        key = f"{picture.meaning.base}\n{picture.style}"
        enough = len(styles[picture.meaning.base]) > OTHER_STYLES
        if enough and store.uniform_hash(f"held out\n{key}") < HELD_OUT_SHARE:
            splits["held_out"].append(picture)
        elif store.uniform_hash(f"validation\n{key}") < VALIDATION_SHARE:
            splits["validation"].append(picture)
        else:
            splits["train"].append(picture)
    return splits


def render(picture: Picture, image_px: int) -> np.ndarray:
    """The picture on white: uint8 [image_px, image_px, 3].

    Raises:
      ValueError: if it cannot be rendered, or is blank.
    """
    if picture.svg:
        import resvg_py

        png = resvg_py.svg_to_bytes(
            svg_string=picture.svg,
            width=image_px,
            height=image_px,
            background="#ffffff",
            skip_system_fonts=True,  # the same picture on every machine, and 10 ms sooner
        )
        image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    else:
        icon = Image.open(io.BytesIO(picture.webp)).convert("RGBA")
        side = max(icon.size)
        image = Image.new("RGBA", (side, side), (255, 255, 255, 255))
        corner = ((side - icon.width) // 2, (side - icon.height) // 2)
        image.alpha_composite(icon, corner)
        image = image.convert("RGB")
    if image.size != (image_px, image_px):
        image = image.resize((image_px, image_px), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    if pixels.min() > 250:
        raise ValueError("blank on white")
    return pixels


def prepare(
    data_dir: str | pathlib.Path,
    image_px: int,
    skin_tones: bool = False,
    overwrite: bool = False,
    workers: int = 1,
    archives: Mapping[npm_packages.Package, npm_packages.Archive] | None = None,
) -> tuple[pathlib.Path, dict[str, Any]]:
    """Fetches, joins, renders and writes the set.

    Args:
      data_dir: the set goes to DATA_DIR/emoji/<image_px>px/1.0.0, downloads to
        DATA_DIR/downloads (32 MB, once for every size).
      image_px: side of the pictures, 8 to 1024.
      skin_tones: about twice as many pictures, as config <image_px>px_tones.
      overwrite: replace an existing set.
      workers: threads that render (resvg releases Python's lock). The bytes are the same for any
        number.
      archives: opened packages instead of fetched ones (tests).

    Returns:
      The version folder, and a summary: examples per split, pictures per style, …

    Raises:
      UsageError: for a size out of range, or as `npm_packages.packages`.
    """
    if not 8 <= image_px <= 1024:
        raise UsageError(f"--image_px={image_px} is out of range; emoji take 8 to 1024 pixels.")
    if workers < 1:
        raise UsageError(f"--workers={workers}; at least one thread must work.")
    data_dir = pathlib.Path(data_dir)
    config = f"{image_px}px" + ("_tones" if skin_tones else "")
    target = store.folder(data_dir, NAME, config)
    pins = [f"{p.name}@{p.version}" for p in (npm_packages.LABELS, *npm_packages.STYLES)]
    recipe = {"kind": NAME, "image_px": image_px, "skin_tones": skin_tones, "packages": pins}
    if store.already_done(target, recipe, overwrite):
        return target, store.read_json(target / "prepare.json")
    archives = archives or npm_packages.packages(data_dir / "downloads")
    pictures, left_out = join(archives, skin_tones)
    splits = assign_splits(pictures)
    skipped: dict[str, str] = {}
    progress = store.Progress(len(pictures), "pictures")

    def encode(picture: Picture) -> tuple[io.BytesIO | None, str]:
        try:
            return _png(render(picture, image_px)), ""
        except (ValueError, OSError) as error:
            return None, str(error)

    def examples(part: list[Picture], pool: concurrent.futures.Executor) -> store.Examples:
        for start in range(0, len(part), _WINDOW):
            window = part[start : start + _WINDOW]
            for picture, (image, problem) in zip(window, pool.map(encode, window), strict=True):
                if problem:
                    skipped[picture.id] = problem
                    progress.add(0, skipped=1)
                    continue
                progress.add()
                text = captions(picture)
                yield picture.id, {"image": image, "captions": text, "id": picture.id}

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        store.write(
            data_dir=data_dir,
            name=NAME,
            config=config,
            features=store.image_text_features(),
            splits={
                split: (lambda part=part: examples(part, pool))
                for split, part in splits.items()
                if part
            },
            description="Emoji in eight openly licensed styles with their CLDR labels and tags.",
            homepage="https://emojibase.dev",
            licence=", ".join(sorted({p.licence for p in npm_packages.STYLES})) + "; see NOTICE",
        )
    summary = {
        "examples": {split: len(part) for split, part in splits.items()},
        "styles": dict(Counter(p.style for p in pictures)),
        "labels": len({p.meaning.label for p in pictures}),
        "left_out": dict(left_out),
        "skipped": skipped,
        "seconds": round(progress.close(), 1),
    }
    for split, part in splits.items():
        summary["examples"][split] -= sum(p.id in skipped for p in part)
    store.finish(target, recipe, summary)
    return target, summary


def _png(pixels: np.ndarray) -> io.BytesIO:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    buffer.seek(0)
    return buffer


def _sequence(hexcode: str) -> str:
    """`1f3f3-fe0f-200d-1f308` -> `1F3F3-200D-1F308`: many sets leave variation selectors out."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def _slug(text: str) -> str:
    """`Man’s shoe` and `mans-shoe` -> `mans-shoe`; `Côte d’Ivoire` -> `cote-divoire`."""
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("'", "")).strip("-")


def _plain(text: str) -> str:
    """Typographic apostrophes and quotes as typed on a keyboard."""
    return text.translate({0x2019: "'", 0x2018: "'", 0x201C: '"', 0x201D: '"'}).strip()
