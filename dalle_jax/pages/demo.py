"""Parts of `report`'s pages that the demos of both models have.

No command itself; it has no SUMMARY. `found` is what `gather` found, and what a page added to it.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dalle_jax.pages import evaluation, workdirs


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart of a run's metrics.

    Attributes:
      title: above it.
      names: of the metrics, each with a line while training and one for held-out batches.
      y_log: logarithmic vertical axis.
    """

    title: str
    names: Sequence[str]
    y_log: bool = False


CLIP_CHARTS = (
    Chart("loss, nats", ["loss"]),
    Chart("batch accuracy", ["accuracy_image_to_text", "recall1_image_to_text"]),
)
Fact = tuple[str, str, str]


def gather(demo: pathlib.Path, stages: Iterable[str]) -> dict[str, Any]:
    """Stages' last numbers, evaluation, samples, commands, seconds, events; of these workdirs."""
    from dalle_jax.engine import metrics

    events = {name: metrics.read(str(demo / name)) for name in stages}
    commands, seconds = workdirs.notes(demo / "logs")
    return {
        "stages": {
            name: {
                kind: next((e for e in reversed(lines) if e["kind"] == kind), None)
                for kind in ("train", "eval")
            }
            for name, lines in events.items()
            if lines
        },
        "evaluation": workdirs.read_json(demo / "evaluation" / "metrics.json"),
        "samples": [workdirs.read_json(path) for path in workdirs.scores(demo / "samples")],
        "commands": commands,
        "seconds": seconds,
        "events": events,
    }


def held_out(found: dict, stage: str, name: str) -> float | None:
    """A number of a stage's last evaluation; None if there is none."""
    return ((found["stages"].get(stage) or {}).get("eval") or {}).get(name)


def headline(page, facts: Sequence[Fact], note: str) -> None:
    """The section of headline numbers, with a note on them; a sentence if there are none."""
    page.section("In numbers")
    if not facts:
        page.note("Nothing is trained yet: `bash launch/demo.sh`.")
        return
    page.facts(facts)
    if note:
        page.note(note)


def judged_facts(evaluation: Any) -> list[Fact]:
    """Headline numbers of an evaluation: of suite retrieval, or skill by skill."""
    facts = []
    if isinstance(evaluation, dict) and evaluation.get("suite") == "retrieval":
        first, chance = (v["image_to_text"]["1"] for v in (evaluation, evaluation["chance"]))
        small = f"of {evaluation['n']} pictures; by chance {100 * chance:.1f} %"
        facts.append(("CLIP finds the caption", percent(first), small))
    for name, skill in skills(evaluation).items():
        best = skill.get("best_of") or {}
        if best and name != "mean":
            most = max(best, key=int)
            ceiling = skill.get("reconstruction")
            small = f"at best of 1; {percent(best[most])} at best of {most} by CLIP"
            small += f"; ceiling {percent(ceiling)}" if ceiling is not None else ""
            facts.append((f"{name} right", percent(best[min(best, key=int)]), small))
    return facts


def pictures(page, demo: pathlib.Path, found: dict) -> None:
    """The section of pictures for prompts."""
    page.section(
        "Drawn for prompts",
        "Each row: the best of all candidates by CLIP's score, which stands under the picture. "
        "Nothing else was picked.",
    )
    shown = [result for result in found["samples"] if drawn(page, result, demo / "samples")]
    if not shown:
        page.note("No pictures were drawn yet.")
    command(page, found, "samples")


def drawn(page, result: Any, folder: pathlib.Path) -> bool:
    """Heading and ranked gallery of one prompt's scores.json; False if it is not readable."""
    if not result or not result.get("kept"):
        return False
    items = []
    for kept in result["kept"]:
        file = workdirs.beside(folder, kept.get("file") or "")
        if file is not None:
            score = "" if kept.get("score") is None else f" · {kept['score']:.3f}"
            items.append((file.read_bytes(), f"{kept['rank']}{score}{verdict(kept.get('right'))}"))
    count = len(result.get("scores") or result["kept"])
    page.heading(f"{result['prompt']} ({len(items)} of {count})")
    page.gallery(items, cell_px=96)
    return bool(items)


def verdict(right: bool | None) -> str:
    """What stands under a picture that was judged."""
    return "" if right is None else " · right" if right else " · wrong"


def judged(page, found: dict, tables: Callable | None) -> None:
    """The section of the evaluation.

    Args:
      page: to add to.
      found: what there is.
      tables: adds the judge's tables of (page, evaluation); None = the evaluation has none, and
        becomes a table as it is.
    """
    page.section("Judged")
    result = found["evaluation"]
    if not result:
        page.note("There is no evaluation yet.")
    elif result.get("suite") == "retrieval":
        page.text("How often CLIP finds the caption of a picture it has not seen, and the reverse.")
        page.table(
            evaluation.retrieval_rows(result),
            f"{result['n']} pictures of the {result['split']} split",
        )
    elif tables is None:
        page.table([{"what": k, "value": v} for k, v in flat(result).items()])
    else:
        first = (result.get("runs") or [result])[0]
        accuracy = (first.get("judge") or {}).get("oracle_accuracy")
        words = "An exact judge finds the scene that explains a picture; no network is asked."
        if accuracy is not None:
            words += f" On true pictures it is right in {100 * accuracy:.1f} %."
        tables(page.text(words), result)
    command(page, found, "evaluate")


def skills(evaluation: Any) -> dict[str, dict]:
    """Skill -> its figures, and their `mean` last; empty for another suite."""
    found = evaluation.get("skills") if isinstance(evaluation, dict) else None
    if not isinstance(found, dict):
        return {}
    return {**found, "mean": evaluation["mean"]} if "mean" in evaluation else found


def rerank_curves(page, evaluation: dict) -> None:
    """Success against the number of candidates, and their cost."""

    def curve(values: dict) -> tuple[list[int], list[float]]:
        counts = sorted(values, key=int)
        return [int(count) for count in counts], [values[count] for count in counts]

    axes = dict(x_label="candidates per prompt", x_log=True)
    scale = dict(y_label="share right", y_min=0, y_max=1)
    each = skills(evaluation)
    mean = each.pop("mean", None) or {}
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
        page.table([{"what": k, "seconds a picture": v} for k, v in flat(seconds).items()])


def curves(
    page, found: dict, stages: Mapping[str, str], charts: Mapping[str, Sequence[Chart]]
) -> None:
    """The section of learning curves: a heading, charts and the command of each stage."""
    page.section("How they learnt")
    for stage, wanted in charts.items():
        events = found["events"].get(stage)
        page.heading(stages[stage])
        if not events:
            page.note("Not trained yet.")
            continue
        for chart in wanted:
            series = {}
            for kind, suffix in (("train", ""), ("eval", ", held out")):
                for name in chart.names:
                    points = [
                        (e["step"], e[name]) for e in events if e["kind"] == kind and name in e
                    ]
                    if points:
                        plain = name.replace("_", " ") + suffix
                        series[plain] = tuple(zip(*points, strict=True))
            if series:
                page.chart(series, chart.title, x_label="step", y_log=chart.y_log)
        command(page, found, stage)


def steps(page, found: dict, names: Mapping[str, str]) -> None:
    """The section of steps with their minutes and commands, in the order of `names`."""
    page.section("Every step", "In this order, from an empty folder; times are of this machine.")
    rows = []
    for name, what in names.items():
        if name in found["seconds"]:
            lasted = found["seconds"][name]
            rows.append({"step": f"{name}: {what}", "minutes": f"{lasted // 60}:{lasted % 60:02d}"})
    if not rows:
        page.note("launch/demo.sh notes the steps it runs; it ran none in this folder.")
        return
    page.table(rows, "The last run of each; a step that was interrupted counts its last part.")
    page.command("\n".join(found["commands"][name] for name in names if name in found["commands"]))


def command(page, found: dict, name: str) -> None:
    """The command of a step, where it was noted."""
    if name in found["commands"]:
        page.command(found["commands"][name])


def minutes(found: dict, names: Iterable[str]) -> str:
    """` 12 minutes of`, by the steps' times; empty below one."""
    total = sum(found["seconds"].get(name, 0) for name in names)
    return f" {total / 60:.0f} minutes of" if total >= 60 else ""


def percent(share: float | None) -> str:
    """`25 %`; a dash for None."""
    return "–" if share is None else f"{100 * share:.0f} %"


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as `a / b` -> leaf."""
    if not isinstance(value, dict):
        return {prefix: value}
    out: dict[str, Any] = {}
    for name, item in value.items():
        out |= flat(item, f"{prefix} / {name}" if prefix else str(name))
    return out
