"""What `sample` leaves on disk: a folder per prompt, a contact sheet and a page."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dalle_jax import images
from dalle_jax.pages import gallery, html
from dalle_jax.types import UsageError

_SHEET_PX = 128  # small pictures are enlarged to about this on the contact sheet


@dataclasses.dataclass(frozen=True)
class Context:
    """What all prompts of a call share.

    Attributes:
      subtitle: of the page.
      settings: of the call.
      stages: role -> folder, step and fingerprint; None for a stage that is absent.
      given: uint8 [h, w, 3], the picture that is completed.
      is_unclip: whether DALL-E 2 sampled: its pictures come with embeddings instead of codes, and
        its page lists its stages.
    """

    subtitle: str
    settings: Mapping[str, Any]
    stages: Mapping[str, Any]
    given: np.ndarray | None = None
    is_unclip: bool = False


def write(
    folder: pathlib.Path, pictures, seconds: float, command: str, context: Context
) -> dict[str, Any]:
    """Pictures, their codes or embeddings, and scores.json of one prompt.

    Args:
      folder: of this prompt; made if absent.
      pictures: `pipelines.pictures.Pictures`.
      seconds: that they took.
      command: the command line that repeats the call.
      context: of the call.

    Returns:
      The content of scores.json, and "pictures": uint8 [K, h, w, 3].
    """
    folder.mkdir(parents=True, exist_ok=True)
    gallery.clear(folder)  # an earlier call may have left more
    ranked = []
    for rank, picture in enumerate(pictures, 1):
        file = folder / f"{rank:02d}.png"
        picture.save(file, command=command)
        row = dict(rank=rank, candidate=picture.candidate, score=picture.score, file=str(file))
        if picture.small is not None:
            small = folder / f"{rank:02d}_small.png"
            small.write_bytes(images.png_bytes(picture.small))
            row["small"] = str(small)
        ranked.append(row)
    name = "embedding" if context.is_unclip else "codes"
    file = folder / ("embeddings.npy" if context.is_unclip else "codes.npy")
    np.save(file, np.stack([getattr(p, name) for p in pictures]), allow_pickle=False)
    scores = pictures.scores
    result = {
        "prompt": pictures.prompt,
        "settings": dict(context.settings),
        "kept": ranked,
        "scores": None if scores is None else [round(float(x), 5) for x in scores],
        "seconds": round(seconds, 2),
    }
    if context.is_unclip:
        result["image_px"] = pictures[0].image.width
    else:
        result["settings"]["keep_rows"] = pictures.settings["keep_rows"]
        result |= context.stages
    (folder / "scores.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return {**result, "pictures": pictures.arrays}


def read(folder: pathlib.Path) -> dict[str, Any]:
    """The result of `write` in the process that sampled this prompt.

    Raises:
      UsageError: if the folder is not on a disk that both processes see.
    """
    try:
        result = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        pictures = [images.read(folder / pathlib.Path(row["file"]).name) for row in result["kept"]]
    except (OSError, UsageError) as error:
        raise UsageError(
            f"another process has written into {folder}, but this one cannot read it ({error}); "
            "--out must be on a disk that all hosts share."
        ) from error
    return {**result, "pictures": np.stack(pictures)}


def write_page(
    out: pathlib.Path, results: Sequence[dict[str, Any]], command: str, context: Context
) -> None:
    """sheet.png and index.html over all prompts of DALL·E.

    Args:
      out: folder for both.
      results: of `write` or `read`, in the order of the prompts.
      command: the command line that repeats the call.
      context: of the call.
    """
    first = [] if context.given is None else [context.given]
    rows, page = [], html.Page("Pictures from captions", context.subtitle)
    for result in results:
        labels = ["given"] * len(first) + [_label(row) for row in result["kept"]]
        pictures = np.stack(first + list(result["pictures"]))
        rows.append((result["prompt"], pictures, labels))
        page.section(result["prompt"], _text(result, context))
        page.gallery(list(zip(pictures, labels, strict=True)))
    page.section("Command").command(command)
    dalle, clip = context.stages["dalle"], context.stages["clip"]
    source = f"DALL-E {dalle['workdir']}, step {dalle['step']:,}"
    page.text(source + (f"; CLIP {clip['workdir']}, step {clip['step']:,}." if clip else "."))
    scale = max(1, _SHEET_PX // rows[0][1].shape[1])
    (out / "sheet.png").write_bytes(images.png_bytes(images.contact_sheet(rows, scale=scale)))
    page.write(out / "index.html")


def blocks(
    out: pathlib.Path, folders: Sequence[pathlib.Path], results: Sequence[dict[str, Any]]
) -> list[gallery.Block]:
    """The prompts of DALL-E 2 as blocks of `gallery.write`, whose files exist already."""
    return [
        gallery.Block(
            folder=str(folder.relative_to(out)),
            title=result["prompt"],
            text=f"{len(result['kept'])} of {len(result['scores'])} pictures, ranked by CLIP, best "
            f"first; {result['seconds']:.1f} seconds.",
            pictures=result["pictures"],
            names=[f"{row['rank']:02d}" for row in result["kept"]],
            labels=[_label(row) for row in result["kept"]],
            figures={name: value for name, value in result.items() if name != "pictures"},
            is_written=True,
        )
        for folder, result in zip(folders, results, strict=True)
    ]


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['rank']}" + ("" if row["score"] is None else f" · {row['score']:.3f}")


def _text(result: Mapping[str, Any], context: Context) -> str:
    order = (
        "in the order sampled" if context.stages["clip"] is None else "ranked by CLIP, best first"
    )
    count = len(result["scores"] or result["kept"])
    text = f"{len(result['kept'])} of {count} pictures, {order}; {result['seconds']:.1f} seconds."
    if context.given is None:
        return text
    return f"{text} The first {result['settings']['keep_rows']} rows of codes are given."
