"""The page of a demo of DALL·E: VQ-VAE, discrete VAE, CLIP and DALL·E, trained and used in turn."""

import pathlib
from typing import Any

from dalle_jax.pages import demo, evaluation, html, workdirs
from dalle_jax.pages.demo import Chart, Demo

# In the order of training; what each is, for the table of steps.
STAGES = {
    "vqvae": "VQ-VAE: the discrete VAE starts from it",
    "dvae": "discrete VAE: pictures as a grid of codes",
    "clip": "CLIP: how well a picture matches a caption",
    "dalle": "DALL·E: captions, then codes, in one stream",
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
    "count": "number of objects",
    "binding": "two objects, colours not swapped",
    "relation": "their relative position",
}
LIMITS = (
    "A quarter of an hour on two cores teaches backgrounds, colours and, often, one object. "
    "Counting, two objects at once and their positions need longer training: their numbers here "
    "show a trend and no more. The ceiling beside a score is the share of true pictures that are "
    "still right after the discrete VAE: DALL·E cannot recover what is lost there."
)
_CODEC = [Chart("PSNR, dB", ["psnr"]), Chart("codes", ["codes_used", "perplexity"])]
CHARTS = {
    "vqvae": _CODEC,
    "dvae": [*_CODEC, Chart("temperature", ["temperature"])],
    "clip": demo.CLIP_CHARTS,
    "dalle": [
        Chart("nats per token", ["text_loss", "image_loss"]),
        Chart("image code accuracy", ["image_accuracy"]),
    ],
}


def read(folder: pathlib.Path) -> dict[str, Any]:
    """The numbers in the folder: `workdirs.read`, and `completion`, as its `samples`."""
    completion = workdirs.read_scores(folder / "completion")
    return workdirs.read(folder, STAGES) | {"completion": completion}


def build(folder: pathlib.Path, contents: dict[str, Any]) -> html.Page:
    """The page for what `read` returns."""
    minutes = demo.minutes(contents, ("prepare", "vqvae", "dvae", "dalle"))
    page = html.Page(
        "DALL·E, from nothing",
        "A discrete VAE, a CLIP and a DALL·E, trained here one after the other, and their pictures "
        f"after{minutes} training. Every number has its command beside it.",
    )
    tour = Demo(page, folder, contents)
    skills = demo.skills(contents["evaluation"])
    tour.headline(_facts(contents), LIMITS if skills else "")
    tour.samples()
    _completion(tour)
    tour.judged((lambda figures: _tables(page, figures)) if skills else None)
    _reconstructions(tour)
    tour.curves(STAGES, CHARTS)
    tour.steps(STEPS)
    return page


def _facts(contents: dict[str, Any]) -> list[demo.Fact]:
    facts, stages = [], contents["stages"]
    codec = (stages.get("dvae") or stages.get("vqvae") or {}).get("eval") or {}
    if codec.get("psnr") is not None:
        facts.append(("reconstruction", f"{codec['psnr']:.1f} dB", "PSNR of hard codes, held out"))
    if codec.get("codes_used") is not None:
        small = f"perplexity {codec['perplexity']:.0f}" if codec.get("perplexity") else ""
        facts.append(("codes in use", f"{codec['codes_used']:.0f}", small))
    dalle = (stages.get("dalle") or {}).get("eval") or {}
    if dalle.get("image_loss") is not None:
        facts.append(("DALL·E", f"{dalle['image_loss']:.2f}", "nats per image code, held out"))
    return facts + demo.judged_facts(contents["evaluation"])


def _completion(tour: Demo) -> None:
    page, results = tour.page, tour.contents["completion"]
    page.section(
        "A picture completed",
        "The first rows of codes come from a given picture and stay as they are, bit for bit; "
        "DALL·E samples the others.",
    )
    for result in results:
        settings = (result or {}).get("settings") or {}
        given = workdirs.picture([tour.folder / "samples"], settings.get("image"))
        if given is not None:
            label = f"given: {settings.get('keep_rows')} rows of its codes are used"
            page.gallery([(given.read_bytes(), label)])
        tour.prompt("completion", result)
    if not any(results):
        page.note("No picture was completed yet.")
    tour.command("completion")


def _tables(page: html.Page, figures: dict) -> None:
    page.table(
        [_row(name, skill) for name, skill in demo.skills(figures).items()],
        "Share of pictures with everything right, beside the ceiling of the discrete VAE; seen and "
        "held-out combinations apart. All but single objects need longer training.",
    )
    evaluation.add_reranking(page, figures)


def _row(name: str, skill: dict) -> dict[str, Any]:
    """A row of the judge's table, with the ceiling beside every score."""
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


def _reconstructions(tour: Demo) -> None:
    tour.page.section(
        "Reconstructions", "Held-out pictures, each above its reconstruction from discrete codes."
    )
    for name in ("dvae", "vqvae"):
        grid = workdirs.preview(tour.folder / name, "reconstructions")
        if grid is not None:
            tour.page.figure(grid.read_bytes(), pixelated=False, alt="originals and copies")
            tour.command(name)
            return
    tour.page.note("No reconstructions yet.")
