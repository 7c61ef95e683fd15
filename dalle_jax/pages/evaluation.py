"""What `evaluate` shows: lines on a terminal, contact sheets and pages of --out=DIR."""

import json
import pathlib
from collections.abc import Sequence

import numpy as np

from dalle_jax import images
from dalle_jax.pages import html

SETTINGS = ("prior", "guidance", "eta", "temperature")  # of a run, where it has them
PICTURE_PX = 96  # pictures are enlarged to at least this
RANKED = "Best first by CLIP, each with its verdict and score."


def write_shapes(out: pathlib.Path, result: dict, examples) -> None:
    """sheet.png and index.html of the shapes suite; examples: `evaluation.shapes.Example`s."""
    page = html.Page("Shapes, judged", "Every picture is judged exactly; a near miss is a miss.")
    judge = result["judge"]
    page.section("Success").facts(
        [
            ("judge on ground truth", f"{judge['oracle_accuracy']:.1%}", f"{judge['n']} scenes"),
            *(
                (name, f"{_headline(skill):.0%}", f"{skill['n']} prompts")
                for name, skill in result["skills"].items()
            ),
        ]
    )
    page.table([row(n, s) for n, s in {**result["skills"], "mean": result["mean"]}.items()])
    if "best_of" in result["mean"]:
        curves = {
            "CLIP's choice, seen": "best_of",
            "any right (oracle), seen": "oracle",
            "CLIP's choice, held out": "held_out_best_of",
            "any right (oracle), held out": "held_out_oracle",
        }
        page.section("Reranking").chart(
            {title: _series(result["mean"][field]) for title, field in curves.items()},
            "Right pictures against candidates, mean of the four skills",
            "candidates",
            "share right",
            x_log=True,
            y_min=0,
            y_max=1,
        )
        page.chart(
            {"seconds": _series(result["seconds_per_picture"])},
            "Seconds per picture that is kept",
            "candidates",
            "seconds",
            x_log=True,
            y_log=True,
        )
    if examples:
        rows = [
            (f"{example.prompt.scene.caption} ({_half(example)})", example.images, example.labels)
            for example in examples
        ]
        pictures(page, out, rows, RANKED)
    page.section("Command").command(result["command"]).write(out / "index.html")


def pictures(page, out: pathlib.Path, rows: Sequence[tuple], text: str) -> None:
    """sheet.png, and the same pictures as a section of the page.

    Args:
      page: `pages.Page`.
      out: folder of sheet.png.
      rows: (title, uint8 [n, h, w, 3], n labels) each, at least one.
      text: what the labels are.
    """
    sheet = images.contact_sheet(rows, scale=_scale(rows[0][1]))
    (out / "sheet.png").write_bytes(images.png_bytes(sheet))
    page.section("Pictures", text)
    for title, shown, labels in rows:
        page.heading(title).gallery(list(zip(shown, labels, strict=True)), PICTURE_PX)


def write_recon(out: pathlib.Path, result: dict, pairs: np.ndarray) -> None:
    """sheet.png and index.html of the recon suite; pairs [2n, h, w, 3], originals first."""
    half = len(pairs) // 2
    sheet = images.grid(pairs, columns=half, scale=_scale(pairs))
    (out / "sheet.png").write_bytes(images.png_bytes(sheet))
    codebook = result["codebook"]
    page = html.Page("Reconstruction", f"{result['n']:,} pictures of the {result['split']} split")
    page.section("Figures").facts(
        [
            ("PSNR", f"{result['psnr']:.2f} dB", "mean over pictures"),
            ("SSIM", f"{result['ssim']:.4f}", "mean over pictures"),
            ("codes used", f"{codebook['used']}", f"of {codebook['codes']}"),
            ("perplexity", f"{codebook['perplexity']:.0f}", "of the code histogram"),
        ]
    )
    page.figure(sheet, "Above the pictures, below what the codec gives back.")
    page.section("Command").command(result["command"]).write(out / "index.html")


def write_retrieval(out: pathlib.Path, result: dict) -> None:
    """index.html of the retrieval suite."""
    page = html.Page("Retrieval", f"{result['n']:,} pictures of the {result['split']} split")
    page.section("Figures").table(
        retrieval_rows(result), f"{result['captions']:,} distinct captions"
    )
    page.section("Command").command(result["command"]).write(out / "index.html")


def retrieval_rows(result: dict) -> list[dict]:
    """A table of recall at each k in both directions, beside what chance would give."""
    return [
        {"direction": f"{name.replace('_', ' ')}{extra}"}
        | {f"recall@{k}": round(v, 4) for k, v in values[name].items()}
        for name in ("image_to_text", "text_to_image")
        for extra, values in (("", result), (" (chance)", result["chance"]))
    ]


def as_text(result: dict) -> str:
    """The figures as indented lines; a table for the skills."""
    lines = []
    if "runs" in result:
        return "\n".join(f"{run_title(run)}\n{as_text(run)}" for run in result["runs"])
    if "skills" in result:
        lines.append(
            "judge on ground truth: {oracle_accuracy:.2%} of {n}".format(**result["judge"])
        )
        for name, skill in {**result["skills"], "mean": result["mean"]}.items():
            parts = [f"reconstruction {skill['reconstruction']:.1%}"]
            if "best_of" in skill:
                for field in ("best_of", "oracle"):
                    curve = " ".join(f"{k}: {v:.1%}" for k, v in skill[field].items())
                    parts.append(f"{field.replace('_', '-')} {curve}")
                parts.append(f"held-out {skill['held_out']:.1%}")
            lines.append(f"{name:9} {' | '.join(parts)}")
        seconds = result["seconds_per_picture"]
        if seconds:
            lines.append("seconds   " + " ".join(f"{k}: {v:.3g}" for k, v in seconds.items()))
    else:
        shown = {k: v for k, v in result.items() if k not in ("networks", "command")}
        lines.append(json.dumps(shown, indent=2))
    return "\n".join(lines)


def run_title(run: dict) -> str:
    """The settings that tell a run from the others: `prior none, guidance 2`."""
    named = {name: run[name] for name in SETTINGS if name in run}
    return ", ".join(f"{k} {v if isinstance(v, str) else f'{v:g}'}" for k, v in named.items())


def _headline(skill: dict) -> float:
    return skill["seen"] if "seen" in skill else skill["reconstruction"]


def row(name: str, skill: dict) -> dict:
    """A skill's figures as a row of a table."""
    row = {"skill": name}
    for k, value in skill.get("best_of", {}).items():
        row[f"best of {k}"] = round(value, 3)
    for title, field in (("held out", "held_out"), ("reconstruction", "reconstruction")):
        if field in skill:
            row[title] = round(skill[field], 3)
    if "oracle" in skill:
        row[f"oracle {list(skill['oracle'])[-1]}"] = round(list(skill["oracle"].values())[-1], 3)
    return row


def _series(curve: dict[str, float]):
    return [int(k) for k in curve], list(curve.values())


def _half(example) -> str:
    return example.prompt.half.replace("_", "-")


def _scale(pictures: np.ndarray) -> int:
    return max(1, PICTURE_PX // pictures.shape[1])
