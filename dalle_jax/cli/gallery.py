"""What the commands of DALL-E 2 leave on disk: pictures by name, a contact sheet, a page, figures.

No command itself; it has no SUMMARY.
"""

import argparse
import dataclasses
import json
import pathlib
import types
from collections.abc import Sequence

import numpy as np

from dalle_jax import images
from dalle_jax.cli import _prompts
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
      labels: what stands under each picture.
      figures: what results.json holds of it, beside the files.
    """

    folder: str
    title: str
    text: str
    pictures: np.ndarray
    names: Sequence[str]
    labels: Sequence[str]
    figures: dict


def write(
    out: pathlib.Path,
    title: str,
    subtitle: str,
    blocks: Sequence[Block],
    *,
    command: str,
    stages: dict,
    notes: Sequence[str] = (),
) -> dict:
    """PNGs, sheet.png, index.html and results.json.

    Args:
      out: folder of all of it; made if absent.
      title: of the page.
      subtitle: of the page.
      blocks: the pictures.
      command: the command line that draws all this again.
      stages: `Unclip.parts`.
      notes: what was done to the pictures that were given.

    Returns:
      What results.json holds.
    """
    made, sheet = [], []
    page = html.Page(title, subtitle)
    for block in blocks:
        folder = out / block.folder
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{name}.png" for name in block.names]
        for file, picture in zip(files, block.pictures, strict=True):
            file.write_bytes(images.png_bytes(picture))
        shown = {"files": [str(file) for file in files], "labels": list(block.labels)}
        made.append({"title": block.title, "text": block.text, **block.figures, **shown})
        sheet.append((block.title, block.pictures, list(block.labels)))
        page.section(block.title, block.text)
        page.gallery(list(zip(block.pictures, block.labels, strict=True)))
    for note in notes:
        page.note(note)
    page.section("Command").command(command)
    page.table([{"stage": name, **row} for name, row in described(stages).items()])
    scale = max(1, _SHEET_PX // blocks[0].pictures.shape[1])
    (out / "sheet.png").write_bytes(images.png_bytes(images.contact_sheet(sheet, scale=scale)))
    page.write(out / "index.html")
    result = {
        "results": made, "notes": list(notes), "stages": described(stages), "command": command,
    }  # fmt: skip
    (out / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def finish(
    args: argparse.Namespace,
    module: types.ModuleType,
    title: str,
    blocks: Sequence[Block],
    stages: dict,
    notes: Sequence[str] = (),
) -> int:
    """`write` and `report` for a command that edits pictures; returns its exit code."""
    name = module.__name__.rpartition(".")[2]
    out = pathlib.Path(args.out)
    subtitle = f"{args.steps} steps, guidance {args.guidance:g}, seed {args.seed}"
    command = _prompts.command(name, module.add_arguments, args)
    result = write(out, title, subtitle, blocks, command=command, stages=stages, notes=notes)
    report(result, out, args.json)
    return 0


def clear(folder: pathlib.Path) -> None:
    """Removes the numbered pictures of an earlier call, which may have drawn more."""
    for old in folder.glob("[0-9][0-9]*.png"):
        old.unlink()


def described(stages: dict) -> dict[str, dict]:
    """Folder, step and fingerprint of each stage."""
    return {
        name: dict(workdir=stage.folder, step=stage.step, fingerprint=stage.fingerprint)
        for name, stage in stages.items()
    }


def report(result: dict, out: pathlib.Path, as_json: bool) -> None:
    """Prints the figures, or where the pictures are."""
    if as_json:
        print(json.dumps(result, indent=1))
        return
    for block in result["results"]:
        print(f"{pathlib.Path(block['files'][0]).parent}  {block['title']}")
    print(f"{out / 'index.html'}")
