"""The page of a demo of DALL·E 2. It reads from the folder

  clip, prior, decoder, inpainter, upsampler   the workdirs
  evaluation                                   `evaluate --suite=shapes --pipeline=unclip`
  samples                                      `sample --pipeline=unclip`
  variations, interpolation, edited, inpainted `vary`, `interpolate`, `edit`, `inpaint`
  logs                                         commands and times, by launch/demo.sh

and judges the pictures for captions of the shapes grammar, where they are large enough.
"""

import io
import pathlib
from typing import Any

from PIL import Image

from dalle_jax import images
from dalle_jax.evaluation import judge, results
from dalle_jax.pages import demo, evaluation, html, workdirs
from dalle_jax.pages.demo import Chart, Demo
from dalle_jax.types import UsageError

# In the order of training; what each is, for the table of steps.
STAGES = {
    "clip": "CLIP: the space of pictures and captions that all stages share",
    "prior": "prior: from a caption to the embedding of a picture",
    "decoder": "decoder: from an embedding to a picture",
    "inpainter": "inpainter: a decoder that sees the part to preserve",
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
    "inpainted": "part of a picture replaced",
}
# Folder and step -> heading, what it is, the sentence if there is none.
MANIPULATIONS = {
    "variations": (
        "Variations",
        "Other pictures with the same CLIP embedding: what the embedding holds is preserved, the "
        "rest may change.",
        "There are no variations yet.",
    ),
    "interpolation": (
        "Between two pictures",
        "Embedding and noise follow great circles from one picture to the other.",
        "No pictures were interpolated yet.",
    ),
    "edited": (
        "An edit",
        "The embedding turns towards a text; the noise stays, and with it what the texts do not "
        "describe.",
        "No picture was edited yet.",
    ),
    "inpainted": (
        "An inpainting",
        "The grey part of the second picture is replaced according to the text; the rest stays bit "
        "for bit.",
        "No picture was inpainted yet.",
    ),
}
_LOSSES = [
    Chart("loss", ["loss"], y_log=True),
    Chart("mean square error", ["mse"], y_log=True),
    Chart(
        "by quarters of the steps, q1 the least noisy",
        [f"mse_q{q}" for q in (1, 2, 3, 4)],
        y_log=True,
    ),
    Chart("variational term, bits per dimension", ["vb"], y_log=True),
]
CHARTS = {
    "clip": demo.CLIP_CHARTS,
    "prior": [
        Chart("loss", ["loss"], y_log=True),
        Chart("cosine to the true embedding", ["cosine", "cosine_text", "cosine_shuffled"]),
        Chart("top-1 retrieval", ["retrieval1", "retrieval1_text", "retrieval1_chance"]),
    ],
    **dict.fromkeys(("decoder", "inpainter", "upsampler"), _LOSSES),
}
LIMITS = (
    "A demo's training is short: its numbers show the effect of these minutes and no more. The "
    "ceiling beside a score is the share of pictures that are right when the decoder samples from "
    "the embedding of the true picture: no prior can recover what is lost there."
)
_NO_VERDICT = ("given", "masked")  # not generated
_ENLARGED = 6  # prompts whose best picture is shown in both sizes


def read(folder: pathlib.Path) -> dict[str, Any]:
    """The numbers in the folder: `workdirs.read` with verdicts, and those of MANIPULATIONS."""
    contents = workdirs.read(folder, STAGES)
    for result in contents["samples"]:
        for best in (result or {}).get("kept", []):
            for kind, name in (("file", "right"), ("small", "small_right")):
                if best.get(kind):
                    best[name] = _judged(result["prompt"], _file(folder, "samples", best[kind]))
    for name in MANIPULATIONS:
        written = workdirs.read_json(folder / name / "results.json") or {}
        contents[name] = written.get("results", [])
        for result in contents[name]:
            asked = result.get("to") or result.get("prompt")
            result["right"] = [
                None
                if asked is None or pathlib.Path(file).stem in _NO_VERDICT
                else _judged(asked, _file(folder, name, file))
                for file in result["files"]
            ]
        if written.get("command"):  # for a folder in which launch/demo.sh noted none
            contents["commands"].setdefault(name, written["command"])
    return contents


def build(folder: pathlib.Path, contents: dict[str, Any]) -> html.Page:
    """The page for what `read` returns."""
    minutes = demo.minutes(contents, ("prepare", *STAGES))
    page = html.Page(
        "DALL·E 2, from nothing",
        "A CLIP, a prior, a decoder, its inpainter and an upsampler, trained here one after the "
        f"other, and their pictures after{minutes} training. Every number has its command beside "
        "it.",
    )
    tour, best = Demo(page, folder, contents), _best(contents["evaluation"])
    tour.headline(_facts(contents, best), LIMITS if best else "")
    tour.samples()
    _enlarged(tour)
    for name in MANIPULATIONS:
        _manipulated(tour, name)
    tour.judged((lambda figures: _tables(page, figures, best)) if best else None)
    _previews(tour)
    tour.curves(STAGES, CHARTS)
    tour.steps(STEPS)
    return page


def _facts(contents: dict[str, Any], best: dict | None) -> list[demo.Fact]:
    facts = []
    for stage, name, title, form, small in (
        ("clip", "recall1_image_to_text", "CLIP, top-1 captions", "{:.0%}", "within a batch"),
        ("prior", "cosine", "prior", "{:.2f}", "cosine to the true embedding"),
        ("decoder", "mse", "decoder", "{:.4f}", "mean square error"),
        ("upsampler", "mse", "upsampler", "{:.4f}", "mean square error"),
    ):
        value = ((contents["stages"].get(stage) or {}).get("eval") or {}).get(name)
        if value is not None:
            facts.append((title, form.format(value), f"{small}, held out"))
    if best is None:
        return facts + demo.judged_facts(contents["evaluation"])
    seen = demo.percent(best["mean"].get("seen"))
    facts.append(("right pictures", seen, f"mean of the skills; best run: {_run(best)}"))
    return facts + demo.judged_facts(best)


def _enlarged(tour: Demo) -> None:
    tour.page.section(
        "Upsampled",
        "The best picture for a prompt, by the decoder and then by the upsampler. CLIP's score is "
        "that of the small one.",
    )
    shown = 0
    for result in tour.contents["samples"]:
        best = next(iter((result or {}).get("kept", [])), {})
        pair = [_file(tour.folder, "samples", best.get(kind)) for kind in ("small", "file")]
        if None in pair or shown == _ENLARGED:
            continue
        small, large = (file.read_bytes() for file in pair)
        score = "" if best.get("score") is None else f" · {best['score']:.3f}"
        labels = (
            f"{_px(small)} px{score}{demo.verdict(best.get('small_right'))}",
            f"{_px(large)} px{demo.verdict(best.get('right'))}",
        )
        tour.page.heading(result["prompt"]).gallery(zip((small, large), labels, strict=True), 256)
        shown += 1
    if not shown:
        tour.page.note("No picture was upsampled yet.")
    tour.command("samples")


def _manipulated(tour: Demo, name: str) -> None:
    heading, text, missing = MANIPULATIONS[name]
    tour.page.section(heading, text)
    is_empty = True
    for result in tour.contents[name]:
        several = zip(result["files"], result["labels"], result["right"], strict=True)
        items = [
            (path.read_bytes(), f"{label}{demo.verdict(right)}")
            for file, label, right in several
            if (path := _file(tour.folder, name, file)) is not None
        ]
        if items:
            tour.page.heading(result["title"]).text(result["text"]).gallery(items, 96)
            is_empty = False
    if is_empty:
        tour.page.note(missing)
    tour.command(name)


def _tables(page: html.Page, figures: dict, best: dict) -> None:
    evaluation.add_runs(page, figures["runs"])
    page.text(f"Details of the best run, {_run(best)}:")
    evaluation.add_reranking(page, best)


def _previews(tour: Demo) -> None:
    tour.page.section(
        "Previews of training",
        "The last preview of each stage for held-out pictures; its command is below its curves.",
    )
    grids = {stage: workdirs.preview(tour.folder / stage) for stage in STAGES}
    for stage, grid in grids.items():
        if grid is not None:
            words, _, step = grid.stem.rpartition("-")
            caption = f"{words.replace('_', ' ')}; step {int(step):,}"
            tour.page.heading(STAGES[stage]).figure(grid.read_bytes(), caption, pixelated=False)
    if not any(grids.values()):
        tour.page.note("No previews yet.")


def _best(figures: Any) -> dict | None:
    """The run that is right most often, of DALL·E 2 where it was measured; None without any."""
    runs = (figures.get("runs") or []) if isinstance(figures, dict) else []
    runs = [run for run in runs if run["prior"] != results.DALLE] or runs
    return max(runs, key=lambda run: run["mean"]["seen"], default=None)


def _run(run: dict) -> str:
    return f"prior {run['prior']} at guidance {run['guidance']:g}"


def _file(folder: pathlib.Path, name: str, file: str | None) -> pathlib.Path | None:
    """A picture in FOLDER/NAME, or in a folder of that."""
    return workdirs.picture([folder, folder / name], file)


def _px(png: bytes) -> int:
    return Image.open(io.BytesIO(png)).width


def _judged(caption: str, file: pathlib.Path | None) -> bool | None:
    """Whether a picture matches the caption; None if the judge cannot read one of them."""
    if file is None:
        return None
    try:
        return bool(judge.judge(caption, images.read(file))["all"])
    except UsageError:  # no caption of the grammar, or too small a picture
        return None
