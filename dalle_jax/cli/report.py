"""Gathers what a demo left behind into one page: index.html, and metrics.json with its numbers.

  python -m dalle_jax report --demo=runs/demo

Reads the workdirs vqvae, dvae, clip and dalle of the folder, what `evaluate` and `sample` wrote
there, and the commands and times that launch/demo.sh noted under logs/. A part that is missing is
left out with a sentence. The page stands alone: it opens from a mail or a bucket.
"""

import argparse
import json
import pathlib
from typing import Any

from dalle_jax.cli import demo_files

SUMMARY = "one page of everything a demo made"

# In the order of training; what each is, for the table of steps.
STAGES = {
    "vqvae": "VQ-VAE: where the discrete VAE starts",
    "dvae": "discrete VAE: pictures as a grid of codes",
    "clip": "CLIP: how well a picture fits a caption",
    "dalle": "DALL·E: captions, then codes, one stream",
}
OTHER_STEPS = {
    "prepare": "data",
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
    found = gather(demo)
    out = pathlib.Path(args.out) if args.out else demo / "index.html"
    build(demo, found).write(out)
    numbers = {name: value for name, value in found.items() if name != "events"}
    (demo / "metrics.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    print(out)
    return 0


def gather(demo: pathlib.Path) -> dict[str, Any]:
    """Everything that has a number: stages, evaluation, samples, commands, seconds, events."""
    from dalle_jax.engine import metrics

    events = {name: metrics.read(str(demo / name)) for name in STAGES}
    stages = {}
    for name, lines in events.items():
        if lines:
            stages[name] = {
                kind: next((e for e in reversed(lines) if e["kind"] == kind), None)
                for kind in ("train", "eval")
            }
    commands, seconds = demo_files.notes(demo / "logs")
    return {
        "stages": stages,
        "evaluation": demo_files.read_json(demo / "evaluation" / "metrics.json"),
        "samples": [demo_files.read_json(path) for path in demo_files.scores(demo / "samples")],
        "completion": [
            demo_files.read_json(path) for path in demo_files.scores(demo / "completion")
        ],
        "commands": commands,
        "seconds": seconds,
        "events": events,
    }


def build(demo: pathlib.Path, found: dict[str, Any]):
    """The page of what `gather` found."""
    from dalle_jax import pages

    total = sum(found["seconds"].get(name, 0) for name in ("prepare", "vqvae", "dvae", "dalle"))
    minutes = f" {total / 60:.0f} minutes of" if total >= 60 else ""
    page = pages.Page(
        "DALL·E, from nothing",
        "A discrete VAE, a CLIP and a DALL·E, trained here one after the other, and what they "
        f"draw after{minutes} training. Every number stands beside the command that made it.",
    )
    _headline(page, found)
    _pictures(page, demo, found)
    _completion(page, demo, found)
    _evaluation(page, found)
    _reconstructions(page, demo, found)
    _curves(page, found)
    _steps(page, found)
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
    retrieval = found["evaluation"] or {}
    if retrieval.get("suite") == "retrieval":
        first, chance = (v["image_to_text"]["1"] for v in (retrieval, retrieval["chance"]))
        small = f"of {retrieval['n']} pictures; by chance {100 * chance:.1f} %"
        facts.append(("CLIP finds the caption", _percent(first), small))
    for name, skill in _skills(found).items():
        if name == "mean":
            continue
        best = skill.get("best_of") or {}
        if best:
            most = max(best, key=int)
            ceiling = skill.get("reconstruction")
            small = f"at best of 1; {_percent(best[most])} at best of {most} by CLIP"
            small += f"; ceiling {_percent(ceiling)}" if ceiling is not None else ""
            facts.append((f"{name} right", _percent(best[min(best, key=int)]), small))
    if facts:
        page.section("In numbers").facts(facts)
        if _skills(found):
            page.note(HONEST)
    else:
        page.section("In numbers").note("Nothing is trained yet: `bash launch/demo.sh`.")


def _pictures(page, demo, found) -> None:
    page.section(
        "Drawn for prompts",
        "Each row: the best of all candidates by CLIP's score, which stands under the picture. "
        "Nothing else was picked.",
    )
    shown = [result for result in found["samples"] if _drawn(page, result, demo / "samples")]
    if not shown:
        page.note("No pictures were drawn yet.")
    _command(page, found, "samples")


def _completion(page, demo, found) -> None:
    page.section(
        "A picture completed",
        "The first rows of codes are those of a given picture and stay as they are, bit for bit; "
        "DALL·E writes the rest.",
    )
    for result in found["completion"]:
        given = ((result or {}).get("settings") or {}).get("image")
        given = demo_files.beside(demo / "samples", given) if given else None
        if given is not None:
            rows = result["settings"].get("keep_rows")
            page.gallery([(given.read_bytes(), f"given: {rows} rows of codes are kept")])
        _drawn(page, result, demo / "completion")
    if not any(found["completion"]):
        page.note("No picture was completed yet.")
    _command(page, found, "completion")


def _drawn(page, result, folder: pathlib.Path) -> bool:
    """Heading and ranked gallery of one prompt's scores.json; False if it is not readable."""
    if not result or not result.get("kept"):
        return False
    items = []
    for kept in result["kept"]:
        file = demo_files.beside(folder, kept["file"])
        if file is not None:
            score = "" if kept.get("score") is None else f" · {kept['score']:.3f}"
            items.append((file.read_bytes(), f"{kept['rank']}{score}"))
    drawn = len(result.get("scores") or result["kept"])
    page.heading(f"{result['prompt']} ({len(items)} of {drawn})")
    page.gallery(items, cell_px=96)
    return bool(items)


def _evaluation(page, found) -> None:
    from dalle_jax.cli import evaluate_page

    page.section("Judged")
    evaluation, skills = found["evaluation"], _skills(found)
    if not evaluation:
        page.note("There is no evaluation yet.")
    elif evaluation.get("suite") == "retrieval":
        page.text("How often CLIP finds the caption of a picture it has not seen, and the reverse.")
        page.table(
            evaluate_page.retrieval_rows(evaluation),
            f"{evaluation['n']} pictures of the {evaluation['split']} split",
        )
    elif not skills:
        page.table([{"what": k, "value": v} for k, v in _flat(evaluation).items()])
    else:
        accuracy = (evaluation.get("judge") or {}).get("oracle_accuracy")
        words = "An exact judge finds the scene that explains a picture; no network is asked."
        if accuracy is not None:
            words += f" On true pictures it is right in {100 * accuracy:.1f} %."
        page.text(words).table(
            [_row(name, skill) for name, skill in skills.items()],
            "Share of pictures with everything right, beside the ceiling of the discrete VAE; seen "
            "and held-out combinations apart. All but single objects need longer training.",
        )
        _rerank_curves(page, evaluation, skills)
    _command(page, found, "evaluate")


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


def _rerank_curves(page, evaluation, skills) -> None:
    def curve(values: dict) -> tuple[list[int], list[float]]:
        counts = sorted(values, key=int)
        return [int(count) for count in counts], [values[count] for count in counts]

    axes = dict(x_label="candidates per prompt", x_log=True)
    scale = dict(y_label="share right", y_min=0, y_max=1)
    mean, each = skills.get("mean") or {}, {k: s for k, s in skills.items() if k != "mean"}
    lines = {"best by CLIP": mean.get("best_of"), "any is right (oracle)": mean.get("oracle")}
    series = {name: curve(values) for name, values in lines.items() if values}
    if series and mean.get("reconstruction") is not None:
        ends = next(iter(series.values()))[0]
        series["ceiling"] = ([ends[0], ends[-1]], [mean["reconstruction"]] * 2)
    page.chart(series, "Reranking, mean of the skills", **axes, **scale)
    each = {name: curve(s["best_of"]) for name, s in each.items() if s.get("best_of")}
    page.chart(each, "Best by CLIP, skill by skill", **axes, **scale)
    seconds = evaluation.get("seconds_per_picture")
    if isinstance(seconds, dict) and seconds and all(count.isdigit() for count in seconds):
        page.chart({"seconds": curve(seconds)}, "What it costs", y_label="s a picture", **axes)
    elif seconds:
        page.table([{"what": k, "seconds a picture": v} for k, v in _flat(seconds).items()])


def _reconstructions(page, demo, found) -> None:
    page.section(
        "Reconstructions",
        "Held-out pictures, and under each what the discrete VAE keeps of it in its codes.",
    )
    name = next((n for n in ("dvae", "vqvae") if demo_files.preview(demo / n) is not None), None)
    if name is None:
        page.note("No reconstructions yet.")
        return
    page.figure(
        demo_files.preview(demo / name).read_bytes(), pixelated=False, alt="originals and copies"
    )
    _command(page, found, name)


def _curves(page, found) -> None:
    page.section("How they learnt")
    charts = {
        "vqvae": {"PSNR, dB": ["psnr"], "codes": ["codes_used", "perplexity"]},
        "dvae": {
            "PSNR, dB": ["psnr"],
            "codes": ["codes_used", "perplexity"],
            "temperature": ["temperature"],
        },
        "clip": {
            "loss, nats": ["loss"],
            "batch accuracy": ["accuracy_image_to_text", "recall1_image_to_text"],
        },
        "dalle": {
            "nats per token": ["text_loss", "image_loss"],
            "image code accuracy": ["image_accuracy"],
        },
    }
    for stage, wanted in charts.items():
        events = found["events"].get(stage)
        page.heading(STAGES[stage])
        if not events:
            page.note("Not trained yet.")
            continue
        for label, names in wanted.items():
            series = {}
            for kind, suffix in (("train", ""), ("eval", ", held out")):
                for name in names:
                    points = [
                        (e["step"], e[name]) for e in events if e["kind"] == kind and name in e
                    ]
                    if points:
                        plain = name.replace("_", " ") + suffix
                        series[plain] = tuple(zip(*points, strict=True))
            if series:
                page.chart(series, label, x_label="step")
        _command(page, found, stage)


def _steps(page, found) -> None:
    page.section("Every step", "In this order, from an empty folder; times are of this machine.")
    names = OTHER_STEPS | STAGES
    order = ["prepare", *STAGES, *(n for n in OTHER_STEPS if n != "prepare")]
    rows = []
    for name in order:
        if name in found["seconds"]:
            lasted = found["seconds"][name]
            time = f"{lasted // 60}:{lasted % 60:02d}"
            rows.append({"step": f"{name}: {names[name]}", "minutes": time})
    if not rows:
        page.note("launch/demo.sh notes the steps it runs; it ran none in this folder.")
        return
    page.table(rows, "The last run of each; a step that was interrupted counts its last part.")
    page.command("\n".join(found["commands"][name] for name in order if name in found["commands"]))


def _command(page, found, name: str) -> None:
    if name in found["commands"]:
        page.command(found["commands"][name])


def _skills(found) -> dict[str, dict]:
    """Skill -> its figures, and their `mean` last; empty for another suite."""
    evaluation = found["evaluation"]
    skills = evaluation.get("skills") if isinstance(evaluation, dict) else None
    if not isinstance(skills, dict):
        return {}
    return {**skills, "mean": evaluation["mean"]} if "mean" in evaluation else skills


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as `a / b` -> leaf."""
    if not isinstance(value, dict):
        return {prefix: value}
    out: dict[str, Any] = {}
    for name, item in value.items():
        out |= _flat(item, f"{prefix} / {name}" if prefix else str(name))
    return out
