"""What DALL-E 2 keeps and what it changes, by the exact judge: variations and inpainting.

Plain callables in, plain dictionaries out, as in `evaluation.shapes`: scenes of the shapes set are
rendered, given to the network as pictures, and what comes back is read by the judge. Each figure
stands beside its baseline: what the judge would say by chance, or with the prompt that asks for
nothing new.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from scipy import optimize

from dalle_jax.data import polygons, scenes
from dalle_jax.evaluation import judge, progress, shapes
from dalle_jax.types import UsageError

Vary = Callable[[np.ndarray, int, int], np.ndarray]
Inpaint = Callable[[np.ndarray, np.ndarray, str, int, int], np.ndarray]

TASKS = ("replace", "add")
STAYS = ("count", "color", "shape", "bind", "background")
_SHOWN = 2  # scenes of each kind or task
_ROOM = 0.06  # around an object, in its mask: two pixels of 32, as soft edges need
_BORDER = 1 / 32  # that always stays known: the judge reads the background there
_MAX_RADIUS = 0.3  # of an object that is masked: with its room 0.72 of the side


@dataclasses.dataclass(frozen=True)
class Shown:
    """A picture given and what was drawn of it, for the sheet: uint8 [n, h, w, 3]."""

    title: str
    images: np.ndarray
    labels: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Edit:
    """A picture of which a part is to be drawn anew.

    Attributes:
      given: what it shows.
      asked: what it is to show then, laid out where there is room.
      known: bool [h, h, 1], False in the rectangle that is drawn anew.
    """

    given: scenes.Scene
    asked: scenes.Scene
    known: np.ndarray


def varied_scenes(per_kind: int, seed: int) -> list[scenes.Scene]:
    """per_kind scenes of each kind without held-out combinations: the shapes suite's seen ones."""
    return [p.scene for p in shapes.make_prompts(per_kind, seed) if p.half == "seen"]


def variations(
    vary: Vary,
    *,
    image_px: int,
    num: int,
    per_kind: int,
    seed: int = 0,
    max_pictures: int = 256,
    report: shapes.Report = lambda line: None,
) -> tuple[dict, list[Shown]]:
    """What of a rendered scene its variations keep.

    Args:
      vary: (uint8 [P, h, h, 3], N, index of the first picture) -> uint8 [P, N, h, h, 3].
      image_px: side of the pictures, at least 32.
      num: N of each scene.
      per_kind: scenes of each of the four kinds.
      seed: of the scenes.
      max_pictures: drawn at a time.
      report: called with lines of progress.

    Returns:
      `{"n", "variations", "mean", "kinds": {kind: figures}}` and pictures of some scenes. Figures:

      right         share of variations with number, colours, shapes, their pairing and background
                    of the scene (where the objects are is free, so a relation does not count here)
      conditions    share with each of these; for kind relation also whether it still holds
      chance        `right` and `conditions` if the variations are judged by another scene of the
                    kind: what pictures that know nothing of theirs reach
      moved         mean distance that an object has moved, in sides of the picture, over variations
                    whose objects are all there (`bind`); None if there are none
      pixel_change  mean absolute difference of a pixel's channel from the scene's, 0 to 1
    """
    chosen = varied_scenes(per_kind, seed)
    size = min(len(chosen), max(1, max_pictures // num))
    timer = progress.Clock("vary", len(chosen) * num, report)
    rows, shown = collections.defaultdict(list), []
    for start in range(0, len(chosen), size):
        # One shape for all chunks, one compilation: the last one is filled up.
        part = [chosen[min(i, len(chosen) - 1)] for i in range(start, start + size)]
        pictures = np.stack([scenes.render(scene, image_px) for scene in part])
        drawn = np.asarray(vary(pictures, num, start))
        for i in range(min(size, len(chosen) - start)):
            index, scene = start + i, part[i]
            readings = [judge.parse(picture) for picture in drawn[i]]
            rows[scene.kind].append(
                [
                    {
                        **_stays(scene, reading),
                        "chance": _stays(_other(chosen, index), reading),
                        "moved": _moved(scene, reading),
                        "pixel_change": _change(pictures[i], picture),
                    }
                    for reading, picture in zip(readings, drawn[i], strict=True)
                ]
            )
            if len(rows[scene.kind]) <= _SHOWN:
                verdicts = ["right" if row["right"] else "wrong" for row in rows[scene.kind][-1]]
                both = np.concatenate([pictures[i : i + 1], drawn[i]])
                shown.append(Shown(scene.caption, both, ("given", *verdicts)))
        timer.add(min(size, len(chosen) - start) * num)
    kinds = {kind: _figures([row for some in rows[kind] for row in some]) for kind in scenes.KINDS}
    mean = _mean(list(kinds.values()))
    return {"n": len(chosen), "variations": num, "mean": mean, "kinds": kinds}, shown


def edits(task: str, num: int, image_px: int, seed: int) -> list[Edit]:
    """Pictures to inpaint, without held-out combinations; the mask never touches the border.

    Args:
      task: "replace": one object on a background; the mask covers it, and another shape in another
        colour is asked for. "add": the first of two objects; the mask covers where the second would
        stand, and both are asked for.
      num: how many.
      image_px: side of the picture.
      seed: of the scenes.

    Raises:
      UsageError: for an unknown task.
    """
    if task not in TASKS:
        raise UsageError(f"task {task!r} is unknown; use one of {', '.join(TASKS)}.")
    rng, made = scenes.example_rng(seed, f"inpainting {task}", 0), []
    while len(made) < num:
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
        made.append(Edit(given, asked, _mask(last, image_px)))
    return made


def inpainting(
    inpaint: Inpaint,
    *,
    image_px: int,
    num: int,
    per_task: int,
    seed: int = 0,
    report: shapes.Report = lambda line: None,
) -> tuple[dict, list[Shown]]:
    """Whether what was asked for stands in the hole, and all else is untouched.

    Args:
      inpaint: (picture uint8 [h, h, 3], known bool [h, h, 1], caption, N, number of the picture)
        -> uint8 [N, h, h, 3], best first.
      image_px: side of the finished pictures, at least 32.
      num: N of each picture.
      per_task: pictures of each of TASKS.
      seed: of the pictures.
      report: called with lines of progress.

    Returns:
      `{"n", "candidates", "untouched", "tasks": {task: figures}}` and some of the pictures.
      `untouched` is the share of all known pixels that came back with just their three values:
      anything but 1 is an error. Figures of each task:

      n           pictures
      right       share of drawings that show the whole scene that was asked for
      chosen      share of the first of each N
      conditions  share of drawings with each condition of the judge
      drawn_anew  share of the picture that is masked
      baseline    the same pictures and noise with the prompt of what is there already: `right` as
                  above, the level of chance, and `restored`, share that show the old scene
    """
    result, shown, equal = {}, [], []
    timer = progress.Clock("inpaint", 2 * len(TASKS) * per_task * num, report)
    for task in TASKS:
        verdicts, old_verdicts, masked = [], [], []
        for i, edit in enumerate(edits(task, per_task, image_px, seed)):
            picture, known = scenes.render(edit.given, image_px), edit.known[..., 0]
            both = [
                np.asarray(inpaint(picture, edit.known, scene.caption, num, i))
                for scene in (edit.asked, edit.given)
            ]
            equal += [(x[:, known] == picture[known]).all(axis=-1).mean() for x in both]
            verdicts.append([judge.judge(edit.asked, x) for x in both[0]])
            for x in both[1]:
                reading = judge.parse(x)
                found = [judge.compare(s, reading)["all"] for s in (edit.asked, edit.given)]
                old_verdicts.append(found)
            masked.append(1 - known.mean())
            if i < 2 * _SHOWN:
                words = ["right" if v["all"] else "wrong" for v in verdicts[-1]]
                hole = np.where(edit.known, picture, np.uint8(128))
                sheet = np.concatenate([picture[None], hole[None], both[0], both[1][:1]])
                labels = ("given", "masked", *words, "old prompt")
                shown.append(Shown(f"{task}: {edit.asked.caption}", sheet, labels))
            timer.add(2 * num)
        right = np.array([[v["all"] for v in row] for row in verdicts])
        result[task] = {
            "n": per_task,
            "right": float(right.mean()),
            "chosen": float(right[:, 0].mean()),
            "conditions": _share([v for row in verdicts for v in row], STAYS),
            "drawn_anew": float(np.mean(masked)),
            "baseline": {
                name: float(np.mean(column))
                for name, column in zip(
                    ("right", "restored"), zip(*old_verdicts, strict=True), strict=True
                )
            },
        }
    shares = {"n": len(TASKS) * per_task, "candidates": num, "untouched": float(np.mean(equal))}
    return {**shares, "tasks": result}, shown


def _stays(scene: scenes.Scene, reading: judge.Reading) -> dict[str, bool]:
    """The judge's conditions; `right` if those hold that do not say where the objects are."""
    verdict = judge.compare(scene, reading)
    verdict.pop("all")
    return {"right": all(verdict[name] for name in STAYS), **verdict}


def _other(chosen: Sequence[scenes.Scene], index: int) -> scenes.Scene:
    """Another scene: the next of the kind with another caption, or else the next at all."""
    turned = [*chosen[index + 1 :], *chosen[:index]]
    here = chosen[index]
    others = [scene for scene in turned if scene.caption != here.caption]
    return next((scene for scene in others if scene.kind == here.kind), others[0])


def _moved(scene: scenes.Scene, reading: judge.Reading) -> float | None:
    """Mean distance from each object to its nearest like, one to one; None if one is missing."""
    if not judge.compare(scene, reading)["bind"]:
        return None
    far = 1e3  # of an object that is another
    cost = [
        [
            np.hypot(a.x - b.x, a.y - b.y) if (a.color, a.shape) == (b.color, b.shape) else far
            for b in reading.objects
        ]
        for a in scene.objects
    ]
    rows, columns = optimize.linear_sum_assignment(cost)
    return float(np.asarray(cost)[rows, columns].mean())


def _change(picture: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(picture.astype(np.float64) - other).mean() / 255)


def _figures(rows: list[dict]) -> dict:
    names = [*STAYS, *(["relation"] if "relation" in rows[0] else [])]
    moved = [row["moved"] for row in rows if row["moved"] is not None]
    chance = [row["chance"] for row in rows]
    return {
        "right": _share(rows, ["right"])["right"],
        "conditions": _share(rows, names),
        "chance": {
            "right": _share(chance, ["right"])["right"],
            "conditions": _share(chance, STAYS),
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
        "conditions": _share([kind["conditions"] for kind in kinds], STAYS),
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
