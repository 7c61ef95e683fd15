"""The page of a demo: the sections that the demos of both models share."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dalle_jax.pages import evaluation, html, workdirs


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart of a run's metrics.

    Attributes:
      title: above it.
      names: of the metrics, each with a line for training and one for held-out batches.
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


@dataclasses.dataclass(frozen=True)
class Demo:
    """A demo's folder and the page that is written about it.

    Attributes:
      page: the page; the methods append sections to it.
      folder: the demo's folder.
      contents: the numbers in it, of `workdirs.read`, and more.
    """

    page: html.Page
    folder: pathlib.Path
    contents: Mapping[str, Any]

    def command(self, step: str) -> None:
        """The command of a step, where it was noted."""
        if step in self.contents["commands"]:
            self.page.command(self.contents["commands"][step])

    def headline(self, facts: Sequence[Fact], note: str) -> None:
        """The section of headline numbers, with a note on them; a sentence if there are none."""
        self.page.section("In numbers")
        if not facts:
            self.page.note("Nothing is trained yet: `bash launch/demo.sh`.")
            return
        self.page.facts(facts)
        if note:
            self.page.note(note)

    def samples(self) -> None:
        """The section of pictures for prompts."""
        self.page.section(
            "Pictures for prompts",
            "Each row shows the best of all candidates by CLIP's score, which is below each "
            "picture. There was no other selection.",
        )
        shown = [self.prompt("samples", result) for result in self.contents["samples"]]
        if not any(shown):
            self.page.note("There are no pictures yet.")
        self.command("samples")

    def prompt(self, folder: str, result: Any) -> bool:
        """Heading and ranked gallery for one prompt's scores.json; False if it is not readable."""
        if not result or not result.get("kept"):
            return False
        items = []
        for best in result["kept"]:
            file = workdirs.picture([self.folder / folder], best.get("file"))
            if file is not None:
                score = "" if best.get("score") is None else f" · {best['score']:.3f}"
                label = f"{best['rank']}{score}{verdict(best.get('right'))}"
                items.append((file.read_bytes(), label))
        count = len(result.get("scores") or result["kept"])
        self.page.heading(f"{result['prompt']} ({len(items)} of {count})")
        self.page.gallery(items, cell_px=96)
        return bool(items)

    def judged(self, tables: Callable[[dict], None] | None) -> None:
        """The section of the evaluation.

        Args:
          tables: adds the judge's tables for the figures; None = a flat table of all figures.
        """
        page, figures = self.page.section("Judged"), self.contents["evaluation"]
        if not figures:
            page.note("There is no evaluation yet.")
        elif figures.get("suite") == "retrieval":
            page.text("How often CLIP ranks the right caption first for a new picture, and back.")
            page.table(
                evaluation.retrieval_rows(figures),
                f"{figures['n']} pictures of the {figures['split']} split",
            )
        elif tables is None:
            page.table([{"what": k, "value": v} for k, v in _flat(figures).items()])
        else:
            first = (figures.get("runs") or [figures])[0]
            accuracy = (first.get("judge") or {}).get("oracle_accuracy")
            text = "An exact judge fits the scene that explains a picture, without a network."
            if accuracy is not None:
                text += f" Its accuracy on rendered scenes is {100 * accuracy:.1f} %."
            page.text(text)
            tables(figures)
        self.command("evaluate")

    def curves(self, stages: Mapping[str, str], charts: Mapping[str, Sequence[Chart]]) -> None:
        """The section of learning curves: a heading, charts and the command of each stage."""
        self.page.section("Learning curves")
        for stage, several in charts.items():
            self.page.heading(stages[stage])
            events = self.contents["events"].get(stage)
            if not events:
                self.page.note("Not trained yet.")
                continue
            for chart in several:
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
                    self.page.chart(series, chart.title, x_label="step", y_log=chart.y_log)
            self.command(stage)

    def steps(self, names: Mapping[str, str]) -> None:
        """The section of steps with their minutes and commands, in the order of `names`."""
        self.page.section("Every step", "In this order, from an empty folder, on this machine.")
        commands, seconds = self.contents["commands"], self.contents["seconds"]
        rows = [
            {
                "step": f"{step}: {text}",
                "minutes": f"{seconds[step] // 60}:{seconds[step] % 60:02d}",
            }
            for step, text in names.items()
            if step in seconds
        ]
        if not rows:
            self.page.note("launch/demo.sh notes its steps; it ran none in this folder.")
            return
        self.page.table(rows, "The last run of each; an interrupted step counts its last part.")
        self.page.command("\n".join(commands[name] for name in names if name in commands))


def judged_facts(figures: Any) -> list[Fact]:
    """Headline numbers of an evaluation: of suite retrieval, or skill by skill."""
    facts = []
    if isinstance(figures, dict) and figures.get("suite") == "retrieval":
        first, chance = (v["image_to_text"]["1"] for v in (figures, figures["chance"]))
        small = f"{figures['n']} pictures; random guessing gives {100 * chance:.1f} %"
        facts.append(("CLIP, top-1 captions", percent(first), small))
    for name, skill in skills(figures).items():
        best = skill.get("best_of") or {}
        if best and name != "mean":
            most = max(best, key=int)
            ceiling = skill.get("reconstruction")
            small = f"at best of 1; {percent(best[most])} at best of {most} by CLIP"
            small += f"; ceiling {percent(ceiling)}" if ceiling is not None else ""
            facts.append((f"{name} right", percent(best[min(best, key=int)]), small))
    return facts


def skills(figures: Any) -> dict[str, dict]:
    """Skill -> its figures, and their `mean` last; empty for another suite."""
    each = figures.get("skills") if isinstance(figures, dict) else None
    if not isinstance(each, dict):
        return {}
    return {**each, "mean": figures["mean"]} if "mean" in figures else each


def verdict(right: bool | None) -> str:
    """The end of the label of a picture that was judged."""
    return "" if right is None else " · right" if right else " · wrong"


def minutes(contents: Mapping[str, Any], steps: Iterable[str]) -> str:
    """` 12 minutes of`, the time of the steps; empty below one."""
    total = sum(contents["seconds"].get(step, 0) for step in steps)
    return f" {total / 60:.0f} minutes of" if total >= 60 else ""


def percent(share: float | None) -> str:
    """`25 %`; a dash for None."""
    return "–" if share is None else f"{100 * share:.0f} %"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as `a / b` -> leaf."""
    if not isinstance(value, dict):
        return {prefix: value}
    out: dict[str, Any] = {}
    for name, item in value.items():
        out |= _flat(item, f"{prefix} / {name}" if prefix else str(name))
    return out
