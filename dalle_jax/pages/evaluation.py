"""What `evaluate` shows: lines for a terminal; contact sheet and page for --out=DIR."""

import json
import pathlib
from collections.abc import Sequence

from dalle_jax import images
from dalle_jax.evaluation import results
from dalle_jax.evaluation.results import Row
from dalle_jax.pages import html

PICTURE_PX = 96  # pictures are enlarged to at least this
_RANKED = "Best first by CLIP, each with its verdict and score."
_PICTURES = {  # suite -> what the labels under its pictures are
    "shapes": _RANKED,
    "recon": "Each reconstruction with its PSNR.",
    "distribution": "The first pictures of the split, and those generated for their captions.",
    "variations": "Each with its verdict.",
    "inpainting": "Each with its verdict.",
}
_FEATURES = {
    "clip": "Fréchet distance on this CLIP's features",
    "pixels": "Fréchet distance on pixels",
}


def write(out: pathlib.Path, figures: dict, rows: Sequence[Row]) -> None:
    """metrics.json, index.html and, with pictures, sheet.png.

    Args:
      out: a folder, created if it is absent.
      figures: of `evaluation.suites.measure`, and `command`, the command line.
      rows: the pictures.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
    suite = figures["suite"]
    page = _PAGES[suite](figures)
    if rows:
        scale = max(1, PICTURE_PX // rows[0].images.shape[1])
        (out / "sheet.png").write_bytes(images.png_bytes(images.contact_sheet(rows, scale=scale)))
        page.section("Pictures", _PICTURES[suite])
    for title, pictures, labels in rows:
        page.heading(title).gallery(list(zip(pictures, labels, strict=True)), PICTURE_PX)
    page.section("Command").command(figures["command"]).write(out / "index.html")


def as_text(figures: dict) -> str:
    """The figures as lines; a table for the skills."""
    if "runs" in figures:
        return "\n".join(f"{results.run_title(run)}\n{as_text(run)}" for run in figures["runs"])
    if "skills" not in figures:
        shown = {k: v for k, v in figures.items() if k not in ("networks", "command")}
        return json.dumps(shown, indent=2)
    lines = ["judge on ground truth: {oracle_accuracy:.2%} of {n}".format(**figures["judge"])]
    for name, skill in {**figures["skills"], "mean": figures["mean"]}.items():
        parts = [f"reconstruction {skill['reconstruction']:.1%}"]
        if "best_of" in skill:
            for field in ("best_of", "oracle"):
                curve = " ".join(f"{k}: {v:.1%}" for k, v in skill[field].items())
                parts.append(f"{field.replace('_', '-')} {curve}")
            parts.append(f"held-out {skill['held_out']:.1%}")
        lines.append(f"{name:9} {' | '.join(parts)}")
    seconds = figures["seconds_per_picture"]
    if seconds:
        lines.append("seconds   " + " ".join(f"{k}: {v:.3g}" for k, v in seconds.items()))
    return "\n".join(lines)


def retrieval_rows(figures: dict) -> list[dict]:
    """A table of recall at each k in both directions, beside the level of random guessing."""
    return [
        {"direction": f"{name.replace('_', ' ')}{extra}"}
        | {f"recall@{k}": round(v, 4) for k, v in values[name].items()}
        for name in ("image_to_text", "text_to_image")
        for extra, values in (("", figures), (" (chance)", figures["chance"]))
    ]


def add_runs(page: html.Page, runs: Sequence[dict]) -> None:
    """A table of the runs of suite shapes: skills, their mean, the rerank curve and the ceiling.

    Several guidances become a chart: success against guidance, a line for each prior. DALL-E 1,
    which has a guidance of its own, is a constant there.
    """
    page.table(
        [
            {"prior": run["prior"], "guidance": run["guidance"]}
            | {kind: round(skill["seen"], 3) for kind, skill in run["skills"].items()}
            | {"mean": round(run["mean"]["seen"], 3), **_skill_row(run["mean"])}
            for run in runs
        ],
        "Share of right pictures: of single samples for each kind of prompt, then the mean of the "
        "skills. `reconstruction` is the ceiling: the share of scenes that are right after the "
        "decoder has sampled them from their own embedding.",
    )
    for run in runs:
        if run["prior"] == results.DALLE:
            page.text(
                "Prior `dalle` is a DALL-E 1, which has neither prior nor decoder, at temperature "
                f"{run['temperature']:g}, top_k {run['top_k']}, top_p {run['top_p']:g} and its own "
                "guidance; its ceiling is that of its codec. One CLIP ranks the pictures of both."
            )
    scales = sorted({run["guidance"] for run in runs if run["prior"] != results.DALLE})
    if len(scales) < 2:
        return
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for run in runs:
        x, y = curves.setdefault(run["prior"], ([], []))
        at = [scales[0], scales[-1]] if run["prior"] == results.DALLE else [run["guidance"]]
        x += at
        y += [run["mean"]["seen"]] * len(at)
    title = "Guidance: right pictures, mean of the skills"
    page.chart(curves, title, "guidance", "share", y_min=0)


def add_reranking(page: html.Page, figures: dict) -> None:
    """Charts of success against the number of candidates, and of their cost.

    Args:
      page: to add to.
      figures: of suite shapes, or of one of its runs.
    """
    mean, skills = figures.get("mean") or {}, figures["skills"]
    axes = dict(x_label="candidates per prompt", x_log=True)
    share = dict(y_label="share right", y_min=0, y_max=1)
    lines = {
        "CLIP's choice": mean.get("best_of"),
        "any right (oracle)": mean.get("oracle"),
        "CLIP's choice, held out": mean.get("held_out_best_of"),
        "any right, held out": mean.get("held_out_oracle"),
    }
    series = {name: _series(curve) for name, curve in lines.items() if curve}
    if series and mean.get("reconstruction") is not None:
        x, _ = next(iter(series.values()))
        series["ceiling"] = ([x[0], x[-1]], [mean["reconstruction"]] * 2)
    page.chart(series, "Right pictures, mean of the skills", **axes, **share)
    each = {name: _series(s["best_of"]) for name, s in skills.items() if s.get("best_of")}
    page.chart(each, "CLIP's choice, skill by skill", **axes, **share)
    if seconds := figures.get("seconds_per_picture"):
        page.chart({"seconds": _series(seconds)}, "Cost", y_label="seconds per prompt", **axes)


def _shapes(figures: dict) -> html.Page:
    if "runs" in figures:
        return _shapes_runs(figures["runs"])
    page = html.Page("Shapes, judged", "Every picture is judged exactly; a near miss is a miss.")
    judge, skills = figures["judge"], figures["skills"]
    facts = [("judge on ground truth", f"{judge['oracle_accuracy']:.1%}", f"{judge['n']} scenes")]
    for name, skill in skills.items():
        share = skill.get("seen", skill["reconstruction"])
        facts.append((name, f"{share:.0%}", f"{skill['n']} prompts"))
    page.section("Success").facts(facts)
    rows = {**skills, "mean": figures["mean"]}.items()
    page.table([{"skill": name, **_skill_row(skill)} for name, skill in rows])
    if "best_of" in figures["mean"]:
        add_reranking(page.section("Reranking"), figures)
    return page


def _shapes_runs(runs: Sequence[dict]) -> html.Page:
    models = "DALL-E 1 and 2" if any(run["prior"] == results.DALLE for run in runs) else "DALL-E 2"
    page = html.Page(
        f"Shapes by {models}, judged",
        "The same prompts for every prior and guidance; a near miss is a miss.",
    )
    add_runs(page.section("Success"), runs)
    return page


def _recon(figures: dict) -> html.Page:
    codebook = figures["codebook"]
    page = html.Page("Reconstruction", f"{figures['n']:,} pictures of the {figures['split']} split")
    return page.section("Figures").facts(
        [
            ("PSNR", f"{figures['psnr']:.2f} dB", "mean over pictures"),
            ("SSIM", f"{figures['ssim']:.4f}", "mean over pictures"),
            ("codes used", f"{codebook['used']}", f"of {codebook['codes']}"),
            ("perplexity", f"{codebook['perplexity']:.0f}", "of the code histogram"),
        ]
    )


def _retrieval(figures: dict) -> html.Page:
    page = html.Page("Retrieval", f"{figures['n']:,} pictures of the {figures['split']} split")
    caption = f"{figures['captions']:,} distinct captions"
    return page.section("Figures").table(retrieval_rows(figures), caption)


def _distribution(figures: dict) -> html.Page:
    runs = figures["runs"]
    page = html.Page(
        "Generated against real pictures",
        f"{runs[0]['n']:,} pictures of the {figures['split']} split and as many generated for "
        "their captions, compared as sets.",
    )
    page.section("Figures").table(
        runs,
        f"{_FEATURES[figures['features']]}: `halves` and `floor` compare generated and real "
        "pictures with real ones, half as many of each, so that the two are comparable.",
    )
    return page.note(
        "The distance is above 0 for any finite sample and depends on these features: it compares "
        "runs with equally many pictures, and no published FID."
    )


def _variations(figures: dict) -> html.Page:
    page = html.Page(
        "Variations, judged",
        f"Whether variations of {figures['runs'][0]['n']} rendered scenes still show number, "
        "colours, shapes, pairs and background.",
    )
    for run in figures["runs"]:
        page.section(results.run_title(run)).table(
            [
                {
                    "kind": kind,
                    "right": row["right"],
                    "by chance": row["chance"]["right"],
                    **row["conditions"],
                    "moved": row["moved"],
                    "pixel change": row["pixel_change"],
                }
                for kind, row in {**run["kinds"], "mean": run["mean"]}.items()
            ],
            "By chance: another scene of the kind judges the same pictures. Moved: in sides of the "
            "picture, where all objects are there.",
            ["kind", "right", "by chance", *run["kinds"]["relation"]["conditions"]]
            + ["moved", "pixel change"],
        )
    return page


def _inpainting(figures: dict) -> html.Page:
    page = html.Page(
        "Inpainting, judged",
        f"Another object in a masked rectangle, or one more, by the {figures['by']}.",
    )
    return page.section("Success").table(
        [
            {
                "run": results.run_title(run),
                "task": task,
                "right": row["right"],
                "CLIP's choice": row["chosen"],
                "right with the old prompt": row["baseline"]["right"],
                "old scene restored": row["baseline"]["restored"],
                "masked": row["drawn_anew"],
                "untouched": run["untouched"],
            }
            for run in figures["runs"]
            for task, row in run["tasks"].items()
        ],
        "Untouched: share of known pixels that returned bit for bit.",
    )


_PAGES = {  # suite -> figures to a page without pictures and command
    "shapes": _shapes,
    "recon": _recon,
    "retrieval": _retrieval,
    "distribution": _distribution,
    "variations": _variations,
    "inpainting": _inpainting,
}


def _skill_row(skill: dict) -> dict:
    """A skill's figures as columns of a table."""
    row = {f"best of {k}": round(value, 3) for k, value in skill.get("best_of", {}).items()}
    for title, field in (("held out", "held_out"), ("reconstruction", "reconstruction")):
        if field in skill:
            row[title] = round(skill[field], 3)
    if "oracle" in skill:
        k, value = list(skill["oracle"].items())[-1]
        row[f"oracle {k}"] = round(value, 3)
    return row


def _series(curve: dict[str, float]) -> tuple[list[int], list[float]]:
    counts = sorted(curve, key=int)
    return [int(k) for k in counts], [curve[k] for k in counts]
