"""The page of `report` for a demo of DALL·E 2.

No command itself; it has no SUMMARY. Reads of the folder

  clip, prior, decoder, inpainter, upsampler   the workdirs
  evaluation                                   `evaluate --suite=shapes --pipeline=unclip`
  samples                                      `sample --pipeline=unclip`
  variations, interpolation, edited, inpainted what `vary`, `interpolate`, `edit`, `inpaint` wrote
  logs                                         commands and times, by launch/demo.sh

Pictures that a text of the shapes grammar asked for are judged here too, where they are large
enough for the judge.
"""

import pathlib
from typing import Any

from dalle_jax.evaluation import results
from dalle_jax.pages import demo as parts
from dalle_jax.pages import evaluation, workdirs

# In the order of training; what each is, for the table of steps.
STAGES = {
    "clip": "CLIP: what the other stages see of pictures and captions",
    "prior": "prior: from a caption to the embedding of a picture",
    "decoder": "decoder: from an embedding to a picture",
    "inpainter": "inpainter: the decoder, shown what is to stay",
    "upsampler": "upsampler: from a small picture to a large one",
}
STEPS = {
    "prepare": "data",
    "prepare64": "data for the upsampler",
    **STAGES,
    "evaluate": "evaluation",
    "samples": "pictures for prompts",
    "variations": "variations of a picture",
    "interpolation": "pictures between two pictures",
    "edited": "a picture changed by a text",
    "inpainted": "part of a picture drawn anew",
}
# Folder and step -> heading, what it is, what is said if there is none.
MANIPULATIONS = {
    "variations": (
        "Variations",
        "Other pictures of the same CLIP embedding: what CLIP sees in a picture stays, the rest "
        "may change.",
        "No variations were drawn yet.",
    ),
    "interpolation": (
        "Between two pictures",
        "Embedding and noise go from one picture to the other along great circles.",
        "No pictures were interpolated yet.",
    ),
    "edited": (
        "An edit",
        "The embedding is turned towards what a text says; the noise stays, and with it what the "
        "texts do not speak of.",
        "No picture was edited yet.",
    ),
    "inpainted": (
        "An inpainting",
        "What is grey in the second picture is drawn anew, as the text says; the rest stays bit "
        "for bit.",
        "No picture was inpainted yet.",
    ),
}
_LOSSES = [
    parts.Chart("loss", ["loss"], y_log=True),
    parts.Chart("mean square error", ["mse"], y_log=True),
    parts.Chart(
        "by quarters of the steps, q1 the least noisy",
        [f"mse_q{q}" for q in (1, 2, 3, 4)],
        y_log=True,
    ),
    parts.Chart("variational term, bits per dimension", ["vb"], y_log=True),
]
CHARTS = {
    "clip": parts.CLIP_CHARTS,
    "prior": [
        parts.Chart("loss", ["loss"], y_log=True),
        parts.Chart("cosine to the true embedding", ["cosine", "cosine_text", "cosine_shuffled"]),
        parts.Chart(
            "share that finds its picture",
            ["retrieval1", "retrieval1_text", "retrieval1_chance"],
        ),
    ],
    **dict.fromkeys(("decoder", "inpainter", "upsampler"), _LOSSES),
}
HONEST = (
    "A demo's training is short: its numbers show what these minutes teach and no more. The "
    "ceiling beside a score is what the judge says of pictures that the decoder draws from the "
    "embedding of the true picture: what is lost there, no prior gives back."
)
_NO_VERDICT = ("given", "masked")  # not drawn
_ENLARGED = 6  # prompts whose best picture is shown in both sizes


def gather(demo: pathlib.Path) -> dict[str, Any]:
    """Everything that has a number; as `report.gather`, with the folders of MANIPULATIONS."""
    found = parts.gather(demo, STAGES)
    for result in found["samples"]:
        for kept in (result or {}).get("kept", []):
            for kind, name in (("file", "right"), ("small", "small_right")):
                if kept.get(kind):
                    kept[name] = _judged(result["prompt"], _file(demo, "samples", kept[kind]))
    for name in MANIPULATIONS:
        written = workdirs.read_json(demo / name / "results.json") or {}
        found[name] = written.get("results", [])
        for result in found[name]:
            asked = result.get("to") or result.get("prompt")
            result["right"] = [
                None
                if asked is None or pathlib.Path(file).stem in _NO_VERDICT
                else _judged(asked, _file(demo, name, file))
                for file in result["files"]
            ]
        if written.get("command"):  # where launch/demo.sh noted none
            found["commands"].setdefault(name, written["command"])
    return found


def build(demo: pathlib.Path, found: dict[str, Any]):
    """The page of what `gather` found."""
    from dalle_jax.pages import html

    page = html.Page(
        "DALL·E 2, from nothing",
        "A CLIP, a prior, a decoder, its inpainter and an upsampler, trained here one after the "
        f"other, and what they draw after{parts.minutes(found, ('prepare', *STAGES))} training. "
        "Every number stands beside the command that made it.",
    )
    _headline(page, found)
    parts.pictures(page, demo, found)
    _enlarged(page, demo, found)
    for name in MANIPULATIONS:
        _manipulated(page, demo, found, name)
    parts.judged(page, found, _tables if _runs(found) else None)
    _previews(page, demo, found)
    parts.curves(page, found, STAGES, CHARTS)
    parts.steps(page, found, STEPS)
    return page


def _headline(page, found) -> None:
    facts = []
    for stage, name, title, form, small in (
        ("clip", "recall1_image_to_text", "CLIP finds the caption", "{:.0%}", "of a batch"),
        ("prior", "cosine", "prior", "{:.2f}", "cosine to the true embedding"),
        ("decoder", "mse", "decoder", "{:.4f}", "mean square error"),
        ("upsampler", "mse", "upsampler", "{:.4f}", "mean square error"),
    ):
        value = parts.held_out(found, stage, name)
        if value is not None:
            facts.append((title, form.format(value), f"{small}, held out"))
    best = _best(found)
    if best is None:
        facts += parts.judged_facts(found["evaluation"])
    else:
        seen = parts.percent(best["mean"].get("seen"))
        facts.append(("right pictures", seen, f"mean of the skills; {_way(best)}, the best way"))
        facts += parts.judged_facts(best)
    parts.headline(page, facts, HONEST if best else "")


def _enlarged(page, demo, found) -> None:
    page.section(
        "Upsampled",
        "The best picture of a prompt as the decoder drew it, and beside it what the upsampler "
        "made of it. CLIP's score is of the small one.",
    )
    shown = 0
    for result in found["samples"]:
        best = next(iter((result or {}).get("kept", [])), {})
        pair = [_file(demo, "samples", best.get(kind)) for kind in ("small", "file")]
        if None in pair or shown == _ENLARGED:
            continue
        small, large = (file.read_bytes() for file in pair)
        score = "" if best.get("score") is None else f" · {best['score']:.3f}"
        labels = (
            f"{_px(small)} px{score}{parts.verdict(best.get('small_right'))}",
            f"{_px(large)} px{parts.verdict(best.get('right'))}",
        )
        page.heading(result["prompt"]).gallery(zip((small, large), labels, strict=True), 256)
        shown += 1
    if not shown:
        page.note("No picture was upsampled yet.")
    parts.command(page, found, "samples")


def _manipulated(page, demo, found, name) -> None:
    heading, text, missing = MANIPULATIONS[name]
    page.section(heading, text)
    shown = 0
    for result in found[name]:
        items = []
        for file, label, right in zip(
            result["files"], result["labels"], result["right"], strict=True
        ):
            path = _file(demo, name, file)
            if path is not None:
                items.append((path.read_bytes(), f"{label}{parts.verdict(right)}"))
        if items:
            page.heading(result["title"]).text(result["text"]).gallery(items, 96)
            shown += 1
    if not shown:
        page.note(missing)
    parts.command(page, found, name)


def _tables(page, figures) -> None:
    best = _best({"evaluation": figures})
    evaluation.add_runs(page, figures["runs"])
    page.text(f"More of the best way, {_way(best)}:")
    parts.rerank_curves(page, best)


def _previews(page, demo, found) -> None:
    page.section(
        "Previews of training",
        "What each stage drew of held-out pictures when it was last looked at; its command stands "
        "under its curves.",
    )
    shown = 0
    for stage, what in STAGES.items():
        grid = workdirs.preview(demo / stage, "*")
        if grid is not None:
            words, _, step = grid.stem.rpartition("-")
            caption = f"{words.replace('_', ' ')}; step {int(step):,}"
            page.heading(what).figure(grid.read_bytes(), caption, pixelated=False)
            shown += 1
    if not shown:
        page.note("No previews yet.")


def _runs(found) -> list[dict]:
    figures = found["evaluation"]
    return (figures.get("runs") or []) if isinstance(figures, dict) else []


def _best(found) -> dict | None:
    """The run that is right most often, of DALL·E 2 where it was measured; None without any."""
    runs = _runs(found)
    runs = [run for run in runs if run["prior"] != results.DALLE] or runs
    return max(runs, key=lambda run: run["mean"]["seen"], default=None)


def _way(run) -> str:
    return f"prior {run['prior']} at guidance {run['guidance']:g}"


def _file(demo: pathlib.Path, name: str, file: str | None) -> pathlib.Path | None:
    """A picture below DEMO/NAME, whether it lies there or a folder deeper."""
    if not file:
        return None
    return workdirs.beside(demo, file) or workdirs.beside(demo / name, file)


def _px(png: bytes) -> int:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(png)).width


def _judged(caption: str, file: pathlib.Path | None) -> bool | None:
    """Whether a picture is what the caption says; None if the judge cannot tell."""
    from dalle_jax import images
    from dalle_jax.evaluation import judge
    from dalle_jax.types import UsageError

    if file is None:
        return None
    try:
        return bool(judge.judge(caption, images.read(file))["all"])
    except UsageError:  # no caption of the grammar, or too small a picture
        return None
