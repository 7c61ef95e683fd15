"""What `sample` leaves on disk: a folder per prompt, a contact sheet and a page."""

import argparse
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from dalle_jax import images
from dalle_jax.pages import html
from dalle_jax.sampling import rerank
from dalle_jax.stages.clip import ClipStage
from dalle_jax.stages.dalle import DalleStage
from dalle_jax.types import UsageError

_SHEET_PX = 128  # small pictures are enlarged to about this on the contact sheet


def write(
    args: argparse.Namespace,
    folder: pathlib.Path,
    prompt: str,
    drawn: rerank.Ranked,
    seconds: float,
    dalle: DalleStage,
    clip: ClipStage | None,
    rows: int,
) -> dict:
    """Pictures, codes and scores.json of one prompt.

    Args:
      args: of the command.
      folder: of this prompt; made if absent.
      prompt: what was drawn.
      drawn: the pictures that are kept.
      seconds: that it took.
      dalle: what drew.
      clip: what ranked; None = nothing.
      rows: how many rows of codes were given.

    Returns:
      What scores.json holds, and "pictures": uint8 [K, h, w, 3].
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9][0-9]*.png"):  # of an earlier call that kept more
        old.unlink()
    pictures = images.to_uint8(drawn.images)
    kept = []
    for rank, (index, picture) in enumerate(zip(drawn.candidates, pictures, strict=True), 1):
        file = folder / f"{rank:02d}.png"
        file.write_bytes(images.png_bytes(picture))
        score = None if drawn.scores is None else round(float(drawn.scores[index]), 5)
        kept.append(dict(rank=rank, candidate=int(index), score=score, file=str(file)))
    np.save(folder / "codes.npy", drawn.codes, allow_pickle=False)
    names = ("seed", "temperature", "top_k", "top_p", "guidance", "image")
    scores = drawn.scores
    result = {
        "prompt": prompt,
        "settings": {name: getattr(args, name) for name in names} | {"keep_rows": rows},
        "dalle": dict(workdir=dalle.folder, step=dalle.step, fingerprint=dalle.fingerprint),
        "clip": clip and dict(workdir=clip.folder, step=clip.step, fingerprint=clip.fingerprint),
        "kept": kept,
        "scores": scores if scores is None else [round(float(s), 5) for s in scores],
        "seconds": round(seconds, 2),
    }
    (folder / "scores.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return {**result, "pictures": pictures}


def read(folder: pathlib.Path) -> dict:
    """What `write` returned to the process that drew this prompt.

    Raises:
      UsageError: if the folder is not on a disk that both processes see.
    """
    try:
        result = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        pictures = [
            images.read(folder / pathlib.Path(kept["file"]).name) for kept in result["kept"]
        ]
    except (OSError, UsageError) as error:
        raise UsageError(
            f"another process has drawn into {folder}, but this one cannot read it ({error}); "
            "--out must be on a disk that all hosts share."
        ) from error
    return {**result, "pictures": np.stack(pictures)}


def write_pages(
    args: argparse.Namespace,
    out: pathlib.Path,
    results: Sequence[dict],
    given: np.ndarray | None,
    dalle: DalleStage,
    clip: ClipStage | None,
    command: str,
) -> None:
    """sheet.png and index.html over all prompts.

    Args:
      args: of the command.
      out: folder for both.
      results: of `write` or `read`, in the order of the prompts.
      given: the picture that was completed, uint8 [h, w, 3], or None.
      dalle: what drew.
      clip: what ranked; None = nothing.
      command: the command line that draws all this again.
    """

    def label(kept) -> str:
        return f"{kept['rank']}" + ("" if kept["score"] is None else f" · {kept['score']:.3f}")

    first = [] if given is None else [given]
    blocks = []
    page = html.Page("Pictures from captions", f"Seed {args.seed}, temperature {args.temperature}")
    for result in results:
        labels = (["given"] if first else []) + [label(kept) for kept in result["kept"]]
        pictures = np.stack(first + list(result["pictures"]))
        blocks.append((result["prompt"], pictures, labels))
        ranked = "in the order drawn" if clip is None else "ranked by CLIP, best first"
        num_drawn = len(result["scores"] or result["kept"])
        page.section(
            result["prompt"],
            f"{len(result['kept'])} of {num_drawn} pictures, {ranked}; "
            f"{result['seconds']:.1f} seconds."
            + (
                f" The first {result['settings']['keep_rows']} rows of codes are given."
                * bool(first)
            ),
        )
        page.gallery(list(zip(pictures, labels, strict=True)))
    page.section("Command").command(command)
    source = f"DALL-E {dalle.folder}, step {dalle.step:,}"
    page.text(source + ("." if clip is None else f"; CLIP {clip.folder}, step {clip.step:,}."))
    scale = max(1, _SHEET_PX // dalle.codec.image_px)
    sheet = images.contact_sheet(blocks, scale=scale)
    (out / "sheet.png").write_bytes(images.png_bytes(sheet))
    page.write(out / "index.html")
