"""Gathers what a demo left behind into one page: index.html, and metrics.json with its numbers.

  python -m dalle_jax report --demo=runs/demo

Reads the workdirs vqvae, dvae, clip and dalle of the folder, what `evaluate` and `sample` wrote
there, and the commands and times that launch/demo.sh noted under logs/. A folder with a workdir
decoder instead of dalle is a demo of DALL·E 2: pages/unclip_tour.py tells what is read there. A part
that is missing is left out with a sentence. The page stands alone: it opens from a mail or a
bucket.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

from dalle_jax.pages import demo as parts
from dalle_jax.pages import unclip_tour, workdirs

SUMMARY = "one page of everything a demo made"

# In the order of training; what each is, for the table of steps.
STAGES = {
    "vqvae": "VQ-VAE: where the discrete VAE starts",
    "dvae": "discrete VAE: pictures as a grid of codes",
    "clip": "CLIP: how well a picture fits a caption",
    "dalle": "DALL·E: captions, then codes, one stream",
}
STEPS = {
    "prepare": "data",
    **STAGES,
    "evaluate": "evaluation",
    "samples": "pictures for prompts",
    "completion": "completion of a picture",
}
SKILLS = {
    "single": "one object",
    "count": "how many",
    "binding": "two objects, colours not swapped",
    "relation": "where one is from the other",
}
HONEST = (
    "A quarter of an hour on two cores teaches backgrounds, colours and, often, one object. "
    "Counting, two objects at once and their positions need longer training: their numbers here "
    "show a trend and no more. The ceiling beside a score is what the judge says of the discrete "
    "VAE's reconstructions of true pictures: what is lost there, DALL·E cannot draw."
)
CHARTS = {
    "vqvae": [
        parts.Chart("PSNR, dB", ["psnr"]),
        parts.Chart("codes", ["codes_used", "perplexity"]),
    ],
    "dvae": [
        parts.Chart("PSNR, dB", ["psnr"]),
        parts.Chart("codes", ["codes_used", "perplexity"]),
        parts.Chart("temperature", ["temperature"]),
    ],
    "clip": parts.CLIP_CHARTS,
    "dalle": [
        parts.Chart("nats per token", ["text_loss", "image_loss"]),
        parts.Chart("image code accuracy", ["image_accuracy"]),
    ],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument(
        "--demo",
        default="runs/demo",
        metavar="DIR",
        help="default: %(default)s",
    )
    parser.add_argument("--out", metavar="FILE", help="the page (default: DIR/index.html)")


def run(args: argparse.Namespace) -> int:
    """Writes the page and the numbers; returns the exit code."""
    from dalle_jax.types import UsageError

    demo = pathlib.Path(args.demo)
    if not demo.is_dir():
        raise UsageError(f"--demo={demo} is no folder; make one with: bash launch/demo.sh")
    is_unclip = (demo / "decoder").is_dir() and not (demo / "dalle").is_dir()
    model = unclip_tour if is_unclip else sys.modules[__name__]
    found = model.gather(demo)
    out = pathlib.Path(args.out) if args.out else demo / "index.html"
    model.build(demo, found).write(out)
    numbers = {name: value for name, value in found.items() if name != "events"}
    (demo / "metrics.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    print(out)
    return 0


def gather(demo: pathlib.Path) -> dict[str, Any]:
    """Everything that has a number: stages, evaluation, samples, commands, seconds, events."""
    completion = [workdirs.read_json(path) for path in workdirs.scores(demo / "completion")]
    return parts.gather(demo, STAGES) | {"completion": completion}


def build(demo: pathlib.Path, found: dict[str, Any]):
    """The page of what `gather` found."""
    from dalle_jax.pages import html

    minutes = parts.minutes(found, ("prepare", "vqvae", "dvae", "dalle"))
    page = html.Page(
        "DALL·E, from nothing",
        "A discrete VAE, a CLIP and a DALL·E, trained here one after the other, and what they "
        f"draw after{minutes} training. Every number stands beside the command that made it.",
    )
    _headline(page, found)
    parts.pictures(page, demo, found)
    _completion(page, demo, found)
    tables = _skills if parts.skills(found["evaluation"]) else None
    parts.judged(page, found, tables)
    _reconstructions(page, demo, found)
    parts.curves(page, found, STAGES, CHARTS)
    parts.steps(page, found, STEPS)
    return page


def _headline(page, found) -> None:
    facts = []
    codec = (found["stages"].get("dvae") or found["stages"].get("vqvae") or {}).get("eval")
    if codec and codec.get("psnr") is not None:
        facts.append(("reconstruction", f"{codec['psnr']:.1f} dB", "PSNR of hard codes, held out"))
    if codec and codec.get("codes_used") is not None:
        small = f"perplexity {codec['perplexity']:.0f}" if codec.get("perplexity") else ""
        facts.append(("codes in use", f"{codec['codes_used']:.0f}", small))
    dalle = (found["stages"].get("dalle") or {}).get("eval")
    if dalle and dalle.get("image_loss") is not None:
        facts.append(("DALL·E", f"{dalle['image_loss']:.2f}", "nats per image code, held out"))
    facts += parts.judged_facts(found["evaluation"])
    parts.headline(page, facts, HONEST if parts.skills(found["evaluation"]) else "")


def _completion(page, demo, found) -> None:
    page.section(
        "A picture completed",
        "The first rows of codes are those of a given picture and stay as they are, bit for bit; "
        "DALL·E writes the rest.",
    )
    for result in found["completion"]:
        given = ((result or {}).get("settings") or {}).get("image")
        given = workdirs.beside(demo / "samples", given) if given else None
        if given is not None:
            rows = result["settings"].get("keep_rows")
            page.gallery([(given.read_bytes(), f"given: {rows} rows of codes are kept")])
        parts.drawn(page, result, demo / "completion")
    if not any(found["completion"]):
        page.note("No picture was completed yet.")
    parts.command(page, found, "completion")


def _skills(page, evaluation) -> None:
    page.table(
        [_row(name, skill) for name, skill in parts.skills(evaluation).items()],
        "Share of pictures with everything right, beside the ceiling of the discrete VAE; seen "
        "and held-out combinations apart. All but single objects need longer training.",
    )
    parts.rerank_curves(page, evaluation)


def _row(name: str, skill: dict) -> dict[str, Any]:
    """A row of the judge's table; the ceiling stands beside every score."""
    best, oracle = skill.get("best_of") or {}, skill.get("oracle") or {}
    row: dict[str, Any] = {"skill": f"{name}: {SKILLS[name]}" if name in SKILLS else name}
    row["prompts"] = skill.get("n")
    counts = sorted(best, key=int)
    for count in dict.fromkeys([*counts[:1], *(c for c in counts if c == "8"), *counts[-1:]]):
        row[f"best of {count}"] = best[count]
    if oracle:
        most = max(oracle, key=int)
        row[f"any of {most}"] = oracle[most]
    row["ceiling"] = skill.get("reconstruction")
    row["seen"], row["held out"] = skill.get("seen"), skill.get("held_out")
    return row


def _reconstructions(page, demo, found) -> None:
    page.section(
        "Reconstructions",
        "Held-out pictures, and under each what the discrete VAE keeps of it in its codes.",
    )
    name = next((n for n in ("dvae", "vqvae") if workdirs.preview(demo / n) is not None), None)
    if name is None:
        page.note("No reconstructions yet.")
        return
    page.figure(
        workdirs.preview(demo / name).read_bytes(), pixelated=False, alt="originals and copies"
    )
    parts.command(page, found, name)
