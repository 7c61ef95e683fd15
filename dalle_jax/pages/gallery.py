"""What the commands of DALL-E 2 leave on disk: pictures, a contact sheet, a page, figures."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dalle_jax import images
from dalle_jax.pages import html

_SHEET_PX = 128  # small pictures are enlarged to about this on the contact sheet


@dataclasses.dataclass(frozen=True)
class Block:
    """Pictures that belong together: a row of the sheet and a section of the page.

    Attributes:
      folder: below --out; "" = --out itself.
      title: of the section.
      text: under it.
      pictures: uint8 [n, h, w, 3].
      names: of the files, without ending.
      labels: text under each picture.
      figures: its entry in results.json, beside the files.
      metadata: text in each PNG file; () = none.
      is_written: the files exist already.
    """

    folder: str
    title: str
    text: str
    pictures: np.ndarray
    names: Sequence[str]
    labels: Sequence[str]
    figures: dict
    metadata: Sequence[Mapping[str, str]] = ()
    is_written: bool = False


def write(
    out: pathlib.Path,
    title: str,
    subtitle: str,
    blocks: Sequence[Block],
    *,
    command: str,
    stages: Mapping[str, Mapping[str, Any]],
    notes: Sequence[str] = (),
) -> dict:
    """PNGs, sheet.png, index.html and results.json.

    Args:
      out: folder of all of it; made if absent.
      title: of the page.
      subtitle: of the page.
      blocks: the pictures.
      command: the command line that repeats all this.
      stages: role -> folder, step and fingerprint.
      notes: how given pictures were changed.

    Returns:
      The content of results.json.
    """
    results, sheet = [], []
    page = html.Page(title, subtitle)
    for block in blocks:
        folder = out / block.folder
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{name}.png" for name in block.names]
        metadata = block.metadata or [{}] * len(files)
        for file, picture, text in zip(files, block.pictures, metadata, strict=True):
            if block.is_written:
                continue
            file.write_bytes(images.png_bytes(picture, text and {**text, "command": command}))
        shown = {"files": [str(file) for file in files], "labels": list(block.labels)}
        results.append({"title": block.title, "text": block.text, **block.figures, **shown})
        sheet.append((block.title, block.pictures, list(block.labels)))
        page.section(block.title, block.text)
        page.gallery(list(zip(block.pictures, block.labels, strict=True)))
    for note in notes:
        page.note(note)
    page.section("Command").command(command)
    page.table([{"stage": name, **row} for name, row in stages.items()])
    scale = max(1, _SHEET_PX // blocks[0].pictures.shape[1])
    (out / "sheet.png").write_bytes(images.png_bytes(images.contact_sheet(sheet, scale=scale)))
    page.write(out / "index.html")
    result = {
        "results": results, "notes": list(notes), "stages": stages, "command": command,
    }  # fmt: skip
    (out / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def clear(folder: pathlib.Path) -> None:
    """Removes the numbered pictures of an earlier call, which may have sampled more."""
    for old in folder.glob("[0-9][0-9]*.png"):
        old.unlink()


def report(result: dict, out: pathlib.Path, as_json: bool) -> None:
    """Prints the figures, or where the pictures are."""
    if as_json:
        print(json.dumps(result, indent=1))
        return
    for block in result["results"]:
        print(f"{pathlib.Path(block['files'][0]).parent}  {block['title']}")
    print(f"{out / 'index.html'}")
