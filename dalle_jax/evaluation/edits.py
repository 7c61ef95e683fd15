"""Suites variations and inpainting: what DALL-E 2 preserves and what it changes, judged exactly.

Plain callables in, plain dictionaries out, as in `evaluation.shapes`. Scenes of the shapes set are
rendered and given to the network as pictures; the judge reads the pictures that it returns. Each
figure has a baseline: the verdict of an unrelated scene, or the same task with a prompt that asks
for nothing new.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from scipy import optimize

from dalle_jax import chunks
from dalle_jax.data import polygons, scenes
from dalle_jax.evaluation import judge, progress, shapes
from dalle_jax.evaluation.results import Result, Row
from dalle_jax.evaluation.settings import Settings
from dalle_jax.types import UsageError

Vary = Callable[[np.ndarray, int, int], np.ndarray]
Inpaint = Callable[[np.ndarray, np.ndarray, str, int, int], np.ndarray]

TASKS = ("replace", "add")
PRESERVED = ("count", "color", "shape", "bind", "background")
_SHOWN = 2  # scenes of each kind or task
_ROOM = 0.06  # around an object, in its mask: two pixels of 32, as soft edges need
_BORDER = 1 / 32  # that is never masked: the judge reads the background there
_MAX_RADIUS = 0.3  # of an object that is masked: with its room 0.72 of the side


@dataclasses.dataclass(frozen=True)
class Edit:
    """A picture of which a part is to be replaced.

    Attributes:
      given: the scene of the picture.
      asked: the scene that the prompt asks for; its new object is inside the mask.
      known: bool [h, h, 1], False in the rectangle that is replaced.
    """

    given: scenes.Scene
    asked: scenes.Scene
    known: np.ndarray


def varied_scenes(per_kind: int, seed: int) -> list[scenes.Scene]:
    """per_kind scenes of each kind without held-out combinations: the shapes suite's seen ones."""
    return [p.scene for p in shapes.make_prompts(per_kind, seed) if p.half == "seen"]


def variations(
    vary: Vary, image_px: int, settings: Settings, report: progress.Report = progress.silent
) -> Result:
    """What of a rendered scene its variations preserve.

    Args:
      vary: (uint8 [P, h, h, 3], N, index of the first picture) -> uint8 [P, N, h, h, 3].
      image_px: side of the pictures, at least 32.
      settings: candidates (N of each scene), prompts_per_skill (scenes of each kind), batch and
        seed.
      report: called with lines of progress.

    Returns:
      `{"n", "variations", "mean", "kinds": {kind: figures}}` and pictures of some scenes. Figures:

      right         share of variations with number, colours, shapes, their pairing and background
                    of the scene (positions are free, so a relation does not count here)
      conditions    share with each of these; for kind relation also whether it still holds
      chance        `right` and `conditions` if another scene of the kind judges the variations:
                    the level of pictures that are independent of theirs
      moved         mean distance that an object has moved, in sides of the picture, over variations
                    with all objects (`bind`); None without any
      pixel_change  mean absolute difference of a pixel's channel from the scene's, 0 to 1
    """
    num = settings.candidates
    chosen = varied_scenes(settings.prompts_per_skill, settings.seed)
    timer = progress.Clock("vary", len(chosen) * num, report)
    figures, rows = collections.defaultdict(list), []
    for indices, count in chunks.rows(len(chosen), min(len(chosen), max(1, settings.batch // num))):
        pictures = np.stack([scenes.render(chosen[i], image_px) for i in indices])
        varied = np.asarray(vary(pictures, num, int(indices[0])))
        for index, picture, others in zip(indices[:count], pictures, varied, strict=False):
            scene = chosen[index]
            verdicts = [_compare(chosen, index, picture, other) for other in others]
            figures[scene.kind].append(verdicts)
            if len(figures[scene.kind]) <= _SHOWN:
                words = ["right" if x["right"] else "wrong" for x in verdicts]
                both = np.concatenate([picture[None], others])
                rows.append(Row(scene.caption, both, ("given", *words)))
        timer.add(count * num)
    kinds = {kind: _figures([x for some in figures[kind] for x in some]) for kind in scenes.KINDS}
    mean = _mean(list(kinds.values()))
    return Result({"n": len(chosen), "variations": num, "mean": mean, "kinds": kinds}, rows)


def edits(task: str, num: int, image_px: int, seed: int) -> list[Edit]:
    """Pictures to inpaint, without held-out combinations; the mask never touches the border.

    Args:
      task: "replace": one object on a background; the mask covers it, and the prompt asks for
        another shape in another colour. "add": the first of two objects; the mask covers the place
        of the second, and the prompt asks for both.
      num: how many.
      image_px: side of the picture.
      seed: of the scenes.

    Raises:
      UsageError: for an unknown task.
    """
    if task not in TASKS:
        raise UsageError(f"task {task!r} is unknown; use one of {', '.join(TASKS)}.")
    rng, chosen = scenes.example_rng(seed, f"inpainting {task}", 0), []
    while len(chosen) < num:
        asked = scenes.sample_scene(rng, "single" if task == "replace" else "binding")
        first, last = asked.objects[0], asked.objects[-1]
        if not _can_be_masked(last):
            continue
        if task == "add":
            is_apart = _gap(first, last) > first.radius * polygons.EXTENT[first.shape]
            old = first if is_apart else None
        else:
            old = _another(rng, last)
        if old is None:
            continue
        caption = scenes.caption_of("single", [(old.color, old.shape)], asked.background)
        given = scenes.Scene("single", caption, (old,), asked.background)
        chosen.append(Edit(given, asked, _mask(last, image_px)))
    return chosen


def inpainting(
    inpaint: Inpaint, image_px: int, settings: Settings, report: progress.Report = progress.silent
) -> Result:
    """Whether the object that was asked for appears in the mask, and all else is untouched.

    Args:
      inpaint: (picture uint8 [h, h, 3], known bool [h, h, 1], caption, N, number of the picture)
        -> uint8 [N, h, h, 3], best first.
      image_px: side of the finished pictures, at least 32.
      settings: candidates (N of each picture), prompts_per_skill (pictures of each of TASKS), seed.
      report: called with lines of progress.

    Returns:
      `{"n", "candidates", "untouched", "tasks": {task: figures}}` and some of the pictures.
      `untouched` is the share of all known pixels that returned with just their three values:
      anything but 1 is an error. Figures of each task:

      n           pictures
      right       share of samples that show the complete scene that was asked for
      chosen      share of the first of each N
      conditions  share of samples with each condition of the judge
      drawn_anew  share of the picture that is masked
      baseline    the same pictures and noise with the prompt of the old scene: `right` as above,
                  the level of chance, and `restored`, share that show the old scene
    """
    num, per_task = settings.candidates, settings.prompts_per_skill
    tasks, rows, equal = {}, [], []
    timer = progress.Clock("inpaint", 2 * len(TASKS) * per_task * num, report)
    for task in TASKS:
        verdicts, old_verdicts, masked = [], [], []
        for i, edit in enumerate(edits(task, per_task, image_px, settings.seed)):
            picture, known = scenes.render(edit.given, image_px), edit.known[..., 0]
            new, old = (
                np.asarray(inpaint(picture, edit.known, scene.caption, num, i))
                for scene in (edit.asked, edit.given)
            )
            equal += [(x[:, known] == picture[known]).all(axis=-1).mean() for x in (new, old)]
            verdicts.append([judge.judge(edit.asked, x) for x in new])
            for reading in map(judge.parse, old):
                both = [judge.compare(s, reading)["all"] for s in (edit.asked, edit.given)]
                old_verdicts.append(both)
            masked.append(1 - known.mean())
            if i < 2 * _SHOWN:
                words = ["right" if v["all"] else "wrong" for v in verdicts[-1]]
                hole = np.where(edit.known, picture, np.uint8(128))
                sheet = np.concatenate([picture[None], hole[None], new, old[:1]])
                labels = ("given", "masked", *words, "old prompt")
                rows.append(Row(f"{task}: {edit.asked.caption}", sheet, labels))
            timer.add(2 * num)
        right = np.array([[v["all"] for v in row] for row in verdicts])
        baseline = np.mean(old_verdicts, axis=0)
        tasks[task] = {
            "n": per_task,
            "right": float(right.mean()),
            "chosen": float(right[:, 0].mean()),
            "conditions": _share([v for row in verdicts for v in row], PRESERVED),
            "drawn_anew": float(np.mean(masked)),
            "baseline": {"right": float(baseline[0]), "restored": float(baseline[1])},
        }
    shares = {"n": len(TASKS) * per_task, "candidates": num, "untouched": float(np.mean(equal))}
    return Result({**shares, "tasks": tasks}, rows)


def _compare(
    chosen: Sequence[scenes.Scene], index: int, picture: np.ndarray, other: np.ndarray
) -> dict:
    """The figures of one variation of a scene."""
    scene, reading = chosen[index], judge.parse(other)
    return {
        **_preserved(scene, reading),
        "chance": _preserved(_other(chosen, index), reading),
        "moved": _moved(scene, reading),
        "pixel_change": float(np.abs(picture.astype(np.float64) - other).mean() / 255),
    }


def _preserved(scene: scenes.Scene, reading: judge.Reading) -> dict[str, bool]:
    """The judge's conditions; `right` if all hold that are independent of position."""
    verdict = judge.compare(scene, reading)
    verdict.pop("all")
    return {"right": all(verdict[name] for name in PRESERVED), **verdict}


def _other(chosen: Sequence[scenes.Scene], index: int) -> scenes.Scene:
    """Another scene: the next of the kind with another caption, or else the next at all."""
    turned = [*chosen[index + 1 :], *chosen[:index]]
    here = chosen[index]
    others = [scene for scene in turned if scene.caption != here.caption]
    return next((scene for scene in others if scene.kind == here.kind), others[0])


def _moved(scene: scenes.Scene, reading: judge.Reading) -> float | None:
    """Mean distance from each object to its counterpart, one to one; None if one is missing."""
    if not judge.compare(scene, reading)["bind"]:
        return None
    far = 1e3  # between objects of different colour or shape
    cost = [
        [
            np.hypot(a.x - b.x, a.y - b.y) if (a.color, a.shape) == (b.color, b.shape) else far
            for b in reading.objects
        ]
        for a in scene.objects
    ]
    rows, columns = optimize.linear_sum_assignment(cost)
    return float(np.asarray(cost)[rows, columns].mean())


def _figures(rows: list[dict]) -> dict:
    names = [*PRESERVED, *(["relation"] if "relation" in rows[0] else [])]
    moved = [row["moved"] for row in rows if row["moved"] is not None]
    chance = [row["chance"] for row in rows]
    return {
        "right": _share(rows, ["right"])["right"],
        "conditions": _share(rows, names),
        "chance": {
            "right": _share(chance, ["right"])["right"],
            "conditions": _share(chance, PRESERVED),
        },
        "moved": float(np.mean(moved)) if moved else None,
        "pixel_change": float(np.mean([row["pixel_change"] for row in rows])),
    }


def _share(rows: Sequence[dict], names: Sequence[str]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in names}


def _mean(kinds: Sequence[dict]) -> dict:
    """The mean over kinds of what all of them have."""
    moved = [kind["moved"] for kind in kinds if kind["moved"] is not None]
    return {
        **_share(kinds, ["right"]),
        "conditions": _share([kind["conditions"] for kind in kinds], PRESERVED),
        "chance": _share([kind["chance"] for kind in kinds], ["right"]),
        "moved": float(np.mean(moved)) if moved else None,
        **_share(kinds, ["pixel_change"]),
    }


def _another(rng: np.random.Generator, item: scenes.Object) -> scenes.Object:
    """An object of another colour and shape in the same place, no held-out pair."""
    pairs = [
        (color, shape)
        for color in scenes.COLORS
        for shape in scenes.SHAPES
        if color != item.color and shape != item.shape
    ]
    pairs = [pair for pair in pairs if pair not in scenes.HELD_OUT_PAIRS]
    color, shape = pairs[int(rng.integers(len(pairs)))]
    return dataclasses.replace(item, color=color, shape=shape)


def _can_be_masked(item: scenes.Object) -> bool:
    inset = item.radius + _ROOM + _BORDER
    is_inside = all(inset <= middle <= 1 - inset for middle in (item.x, item.y))
    return is_inside and item.radius <= _MAX_RADIUS


def _gap(item: scenes.Object, masked: scenes.Object) -> float:
    """Distance from the middle of one object to the rectangle around the other."""
    half = masked.radius + _ROOM
    dx, dy = (max(0.0, abs(d) - half) for d in (item.x - masked.x, item.y - masked.y))
    return float(np.hypot(dx, dy))


def _mask(item: scenes.Object, px: int) -> np.ndarray:
    """Bool [px, px, 1], False in the rectangle around an object.

    No shape reaches further than its radius along x or y, though corners do on the diagonal.
    """
    half, known = item.radius + _ROOM, np.ones((px, px, 1), bool)
    top, left = (int(np.floor((middle - half) * px)) for middle in (item.y, item.x))
    bottom, right = (int(np.ceil((middle + half) * px)) for middle in (item.y, item.x))
    known[top:bottom, left:right] = False
    return known
