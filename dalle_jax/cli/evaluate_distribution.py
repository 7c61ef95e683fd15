"""`evaluate --suite=distribution`: drawn against real pictures of a split, for both pipelines.

No command itself; it has no SUMMARY.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable

from dalle_jax.cli import evaluate_parts as parts
from dalle_jax.cli import evaluate_unclip

_PIXELS = 8  # side that pictures are averaged to, for plain pixels


def _clip(clip) -> Callable:
    """Embeddings of unit length by a CLIP."""
    from dalle_jax import images

    return lambda pictures: clip.embed_images(images.to_float(pictures))


def _pixels(clip) -> Callable:
    """Pixels in [-1, 1] of pictures averaged to 8 x 8."""
    import numpy as np
    from PIL import Image

    from dalle_jax import images

    def small(picture):
        box = Image.fromarray(picture).resize((_PIXELS, _PIXELS), Image.Resampling.BOX)
        return np.asarray(box).reshape(-1)

    return lambda pictures: images.to_float(np.stack([small(x) for x in pictures]))


FEATURES = {
    "clip": _clip,
    "pixels": _pixels,
}  # name -> CLIP or None -> uint8 [B, h, h, 3] -> [B, F]
_TITLES = {"clip": "Fréchet distance on this CLIP's features", "pixels": "Fréchet distance, pixels"}


def check(args: argparse.Namespace) -> None:
    """What can be refused before anything is loaded."""
    from dalle_jax.evaluation import distribution
    from dalle_jax.types import UsageError

    if args.num_examples < distribution.MIN_PICTURES:
        raise UsageError(
            f"--num_examples={args.num_examples} is too few to compare sets; expected "
            f"{distribution.MIN_PICTURES} at least, and hundreds for figures that mean something."
        )


def of_dalle(args: argparse.Namespace, found: dict[str, str], *, report):
    """The figures of DALL-E, and a function of (folder, figures) that writes pictures and page."""
    from dalle_jax.stages.clip import ClipStage
    from dalle_jax.stages.dalle import DalleStage

    dalle = DalleStage.load(found["dalle"], codec=found.get("dvae", ""))
    clip = ClipStage.load(found["clip"]) if "clip" in found else None
    own = dalle.tokenizer
    settings = {"guidance": args.guidance, "temperature": args.temperature}
    draw = parts.dalle_generator(args, dalle)
    return _measure(args, dalle.config, own, clip, [(settings, draw)], report)


def of_unclip(args: argparse.Namespace, found: dict[str, str], *, report):
    """The figures of DALL-E 2 in each way and at each guidance; as `of_dalle`."""
    drawer = evaluate_unclip.prepare(args, found)
    ways = [
        (
            {"prior": way, "guidance": scale},
            functools.partial(drawer.generate, way, drawer.drawing(scale)),
        )
        for scale in evaluate_unclip.scales(args)
        for way in drawer.ways
    ]
    stages = drawer.stages
    return _measure(args, stages.decoder.config, drawer.tokenizer, stages.clip, ways, report)


def _measure(args, config, own, clip, ways, report):
    """Of each (settings, drawing), over the same real pictures.

    Args:
      args: of the command.
      config: of the network whose set it is.
      own: the tokenizer that it reads captions with.
      clip: of the features, or None.
      ways: (settings that name a run, (ids, N, first) -> pictures).
      report: takes lines of progress.
    """
    from dalle_jax.evaluation import distribution
    from dalle_jax.pages import evaluation

    name = args.features or "clip"
    embed = FEATURES[name](clip)
    split, batches = parts.batches(args, config, {"image", "text"}, own)
    real = distribution.Real(((x["image"], x["text"]) for x in batches), embed, report)
    runs, drawn = [], {}
    for settings, draw in ways:
        title = evaluation.run_title(settings)
        report(title)
        options = dict(candidates=args.candidates, seed=args.seed, max_pictures=args.batch)
        figures, shown = distribution.suite(real, draw, embed, name, **options, report=report)
        runs.append({**settings, **figures})
        drawn[title] = shown
    captions = [own.decode(row) for row in real.texts[: len(real.shown)]]
    result = {"split": split, "features": name, "runs": runs}
    return result, lambda out, full: _write(out, full, real.shown, drawn, captions)


def _write(out: pathlib.Path, result: dict, real, drawn: dict, captions: list[str]) -> None:
    """sheet.png and index.html: a table of the runs, and real pictures above drawn ones."""
    from dalle_jax.pages import evaluation, html

    runs, name = result["runs"], result["features"]
    page = html.Page(
        "Drawn against real pictures",
        f"{runs[0]['n']:,} pictures of the {result['split']} split and as many drawn for their "
        "captions, as sets.",
    )
    page.section("Figures").table(
        runs,
        f"{_TITLES[name]}: `halves` and `floor` are drawn and real pictures against real ones, "
        "with half as many of each, and can be compared.",
    )
    page.note(
        "The distance is above 0 for any finite sample, and of these features only: it compares "
        "runs with equally many pictures, and no published FID."
    )
    rows = [("real", real, captions), *((title, x, captions) for title, x in drawn.items())]
    text = "The first of the split, and what was drawn for their captions."
    evaluation.pictures(page, out, rows, text)
    page.section("Command").command(result["command"]).write(out / "index.html")
