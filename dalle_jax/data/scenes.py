"""Captioned shapes: scenes, the grammar of their captions and an exact renderer.

Coloured shapes on a plain background, in four kinds of growing difficulty: `single` ("a red
cube"), `count` ("three green crosses"), `binding` ("a red cube and a green star") and `relation`
("a purple triangle above a green star"), each "on a ... background". Some combinations are held
out of training, so that an evaluation can ask for combinations that the model never saw.

`data.builders.shapes` stores rendered scenes; `evaluation.judge` decides which scene a picture
shows. numpy and Pillow only: processes that render a set start without loading JAX.

Source: the names of the skills are from GenEval (arXiv:2310.11513) and T2I-CompBench
(arXiv:2307.06350), the split by held-out attribute pairs from CLEVR-CoGenT (arXiv:1612.06890).
Deliberate difference: the judge needs no detector, because it renders with this file.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw

from dalle_jax.data import polygons

COLORS = {
    "red": (222, 32, 36),
    "orange": (250, 142, 16),
    "yellow": (244, 222, 24),
    "green": (24, 152, 56),
    "cyan": (32, 204, 216),
    "blue": (32, 72, 220),
    "purple": (128, 32, 172),
    "pink": (250, 122, 190),
}
BACKGROUNDS = {"white": (255, 255, 255), "gray": (128, 128, 128), "black": (0, 0, 0)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "cube", "ring", "diamond")
NUMBERS = ("one", "two", "three", "four", "five")
LEFT, RIGHT = "to the left of", "to the right of"
# Direction from the first object to the second, y pointing down.
RELATIONS = {LEFT: (1, 0), RIGHT: (-1, 0), "above": (0, 1), "below": (0, -1)}
OPPOSITE = {LEFT: RIGHT, RIGHT: LEFT, "above": "below", "below": "above"}
KINDS = ("single", "count", "binding", "relation")
HELD_OUT = ("exclude", "only", "any")

_COLOR_NAMES, _RELATION_NAMES = tuple(COLORS), tuple(RELATIONS)

# Held out in every kind of scene: 8 of the 64 (colour, shape) pairs, a Latin diagonal, so that
# every colour and every shape is held out exactly once and seen with seven partners.
HELD_OUT_PAIRS = frozenset(
    (color, SHAPES[(3 * i + 1) % len(SHAPES)]) for i, color in enumerate(COLORS)
)
# 4 of the 40 (count, shape) cells of `count`.
HELD_OUT_COUNTS = frozenset({(2, "diamond"), (3, "cube"), (4, "star"), (5, "circle")})
# 8 (shape, relation, shape) triples of `relation`. Their mirrors ("b below a" for "a above b") show
# the same layouts and are seen in training.
HELD_OUT_RELATIONS = frozenset(
    (shape, _RELATION_NAMES[i % 4], SHAPES[(i + 3) % len(SHAPES)]) for i, shape in enumerate(SHAPES)
)

# Radii in fractions of the side: small enough that five objects fit, large enough that a star
# differs from a circle at 32 px (3.8 px).
_RADII = {"single": (0.2, 0.4), "count": (0.12, 0.16), "binding": (0.16, 0.23)}
_RADII["relation"] = _RADII["binding"]
_GAP = 0.06  # between the circles around objects: 2 px at 32 px, so that soft edges do not join
_MARGIN = 0.02  # to the border, where the judge reads the background
_MIN_OFFSET, _MAX_DRIFT = 0.28, 0.18  # along and across a relation's direction
_SUPERSAMPLING = 4
_TRIES = 30  # positions tried for an object before the layout starts again


@dataclasses.dataclass(frozen=True)
class Object:
    """One coloured shape; x, y and radius are fractions of the side, None in a layout-free scene.

    (x, y) is the centre of the circle around the shape, y pointing down.
    """

    color: str
    shape: str
    x: float | None = None
    y: float | None = None
    radius: float | None = None


@dataclasses.dataclass(frozen=True)
class Scene:
    """A caption's objects and their places in a picture.

    `background` and `relation` are None if the caption does not name them.
    """

    kind: str
    caption: str
    objects: tuple[Object, ...]
    background: str | None
    relation: str | None = None

    def to_json(self) -> str:
        """One line of JSON; `from_json` gives an equal scene back."""
        values = {**vars(self), "objects": [vars(item) for item in self.objects]}
        return json.dumps(values, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "Scene":
        """The scene that `to_json` wrote."""
        values = json.loads(text)
        objects = tuple(Object(**item) for item in values.pop("objects"))
        return Scene(objects=objects, **values)


def example_rng(seed: int, stream: str, index: int) -> np.random.Generator:
    """The generator of one example: a function of (seed, stream, index) alone."""
    return np.random.default_rng([seed, *stream.encode(), index])


def sample_scene(rng: np.random.Generator, kind: str, held_out: str = "exclude") -> Scene:
    """A random scene of one kind, with its caption and layout.

    Args:
      rng: advanced in place.
      kind: one of KINDS.
      held_out: "exclude" (no held-out combination, for training), "only" (at least one; the rules
        that apply to the kind in equal parts) or "any".

    Raises:
      UsageError: for an unknown kind or `held_out`.
    """
    _check("kind", kind, KINDS)
    _check("held_out", held_out, HELD_OUT)
    rules = {"count": ("pair", "count"), "relation": ("pair", "relation")}.get(kind, ("pair",))
    rule = _choice(rng, rules) if held_out == "only" else None
    while True:  # 2 to 40 samples; one without a layout costs microseconds
        scene = _sample_content(rng, kind)
        broken = held_out_rules(scene)
        if held_out == "any" or (rule in broken if rule else not broken):
            return dataclasses.replace(scene, objects=_place(rng, scene))


def held_out_rules(scene: Scene) -> tuple[str, ...]:
    """The rules that exclude a scene from training: any of "pair", "count", "relation"."""
    rules, shapes = [], tuple(item.shape for item in scene.objects)
    if any((item.color, item.shape) in HELD_OUT_PAIRS for item in scene.objects):
        rules.append("pair")
    if scene.kind == "count" and (len(shapes), shapes[0]) in HELD_OUT_COUNTS:
        rules.append("count")
    if scene.relation and (shapes[0], scene.relation, shapes[1]) in HELD_OUT_RELATIONS:
        rules.append("relation")
    return tuple(rules)


def render(scene: Scene, image_px: int) -> np.ndarray:
    """The picture of a scene with a layout: uint8 [image_px, image_px, 3].

    Polygons are filled at four times the size and reduced by Lanczos. The result is a function of
    the scene alone, so that equal scenes give equal bytes in every process.

    Raises:
      UsageError: for a scene without a layout (from `parse_caption`) or fewer than 8 px.
    """
    if image_px < 8:
        raise _refusal(f"image_px is {image_px}; shapes need at least 8, and 32 to be judged.")
    if scene.background is None or any(item.radius is None for item in scene.objects):
        raise _refusal(
            f"the scene of caption {scene.caption!r} has no layout to render; use a scene from "
            "sample_scene, because parse_caption returns scenes without a layout."
        )
    side = image_px * _SUPERSAMPLING
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    canvas = ImageDraw.Draw(image)
    for item in scene.objects:
        center = np.array([item.x, item.y]) * side
        polygons.fill(canvas, item.shape, COLORS[item.color], center, item.radius * side)
    return np.asarray(image.resize((image_px, image_px), Image.LANCZOS))


def parse_caption(caption: str) -> Scene:
    """The layout-free scene that a caption of the grammar describes.

    "a red cube to the left of a green star on a white background". Without a background the
    scene's is None, which stands for any. Capitals, "grey" and a final full stop are accepted.

    Raises:
      UsageError: if the caption is not in the grammar.
    """
    words = " ".join(caption.lower().replace("grey", "gray").rstrip(" .!\n").split())
    match = _CAPTION.fullmatch(words)
    if match is None:
        shown = caption if len(caption) <= 80 else caption[:77] + "..."
        raise _refusal(
            f"{shown!r} is not a caption of the shapes set; write for example "
            f"{caption_of('relation', [('red', 'cube'), ('green', 'star')], 'white', 'above')!r}. "
            f"Colours: {', '.join(COLORS)}. Shapes: {', '.join(SHAPES)}, one of them, two with "
            f"'and', {', '.join(RELATIONS)} between them, or one to five alike. "
            f"Backgrounds: {', '.join(BACKGROUNDS)}."
        )
    background, relation = match["background"], None
    if match["number"]:
        count = NUMBERS.index(match["number"]) + 1
        kind, things = "count", [(match["color"], _SINGULAR[match["noun"]])] * count
    elif match["second"]:
        kind = "binding" if match["join"] == "and" else "relation"
        relation = None if kind == "binding" else match["join"]
        things = [tuple(match["first"].split()), tuple(match["second"].split())]
        if things[0] == things[1]:
            raise _refusal(
                f"{caption!r} names the same object twice; name two different ones, or write "
                f"'two {things[0][0]} {_plural(things[0][1])}'."
            )
    else:
        kind, things = "single", [tuple(match["first"].split())]
    return Scene(kind, words, tuple(Object(*thing) for thing in things), background, relation)


def caption_of(kind: str, things, background: str | None, relation: str | None = None) -> str:
    """The sentence of the grammar for (colour, shape) pairs, one entry for each object."""
    color, shape = things[0]
    if kind == "count":
        noun = shape if len(things) == 1 else _plural(shape)
        text = f"{NUMBERS[len(things) - 1]} {color} {noun}"
    else:
        join = f" {relation or 'and'} "
        text = join.join(f"{_article(color)} {color} {shape}" for color, shape in things)
    return text if background is None else f"{text} on a {background} background"


def hard_negatives(scene: Scene, rng: np.random.Generator, n: int) -> list[str]:
    """Up to n distinct captions, each one change away from the scene's and false for it.

    A change is another background, another colour or shape of one object, another number, colours
    swapped between two objects, another relation, or the two objects swapped around their
    relation. A mirror that is still true never occurs. A scene has at least 16 such captions.
    """
    things = [(item.color, item.shape) for item in scene.objects]
    kind, background, relation = scene.kind, scene.background, scene.relation
    backgrounds = [] if background is None else [b for b in BACKGROUNDS if b != background]
    changed = [(things, other, relation) for other in backgrounds]
    is_count = kind == "count"
    for i, (color, shape) in enumerate(things[:1] if is_count else things):
        replacements = [(other, shape) for other in COLORS if other != color]
        replacements += [(color, other) for other in SHAPES if other != shape]
        for thing in replacements:
            others = [thing if j == i or is_count else old for j, old in enumerate(things)]
            if is_count or len(set(others)) == len(others):
                changed.append((others, background, relation))
    if is_count:
        counts = [n for n in range(1, len(NUMBERS) + 1) if n != len(things)]
        changed += [([things[0]] * n, background, None) for n in counts]
    elif len(things) == 2:
        crossed = [(things[1][0], things[0][1]), (things[0][0], things[1][1])]
        changed += [(crossed, background, relation)] if set(crossed) != set(things) else []
    if relation:
        changed += [(things, background, other) for other in RELATIONS if other != relation]
        changed.append((things[::-1], background, relation))
    captions = list(dict.fromkeys(caption_of(kind, *parts) for parts in changed))
    return [captions[i] for i in rng.permutation(len(captions))[:n]]


def _sample_content(rng, kind: str) -> Scene:
    background, relation = _choice(rng, tuple(BACKGROUNDS)), None
    things = [first := (_choice(rng, _COLOR_NAMES), _choice(rng, SHAPES))]
    if kind == "count":
        things = [first] * int(rng.integers(1, len(NUMBERS) + 1))
    elif kind != "single":
        while (second := (_choice(rng, _COLOR_NAMES), _choice(rng, SHAPES))) == first:
            pass
        things = [first, second]
    if kind == "relation":
        relation = _choice(rng, _RELATION_NAMES)
    caption = caption_of(kind, things, background, relation)
    return Scene(kind, caption, tuple(Object(*thing) for thing in things), background, relation)


def _place(rng, scene: Scene) -> tuple[Object, ...]:
    """The scene's objects at places that neither overlap nor contradict the relation."""
    low, high = _RADII[scene.kind]
    while True:
        placed: list[tuple[float, float, float]] = []  # x, y, radius
        reached: list[float] = []
        for item in scene.objects:
            for u, v, w in rng.random((_TRIES, 3)).tolist():
                # Rounded before use, so that a scene read from its JSON renders to the same bytes.
                radius = round(low + (high - low) * w, 4)
                inset = radius + _MARGIN
                x, y = (round(inset + (1 - 2 * inset) * share, 4) for share in (u, v))
                reach = radius * polygons.EXTENT[item.shape]
                if all(
                    math.hypot(x - a, y - b) >= reach + other + _GAP
                    for (a, b, _), other in zip(placed, reached, strict=True)
                ):
                    placed.append((x, y, radius))
                    reached.append(reach)
                    break
        if len(placed) == len(scene.objects):
            if scene.relation:
                placed = _oriented(placed, *RELATIONS[scene.relation])
            if placed:
                pairs = zip(scene.objects, placed, strict=True)
                return tuple(Object(item.color, item.shape, *spot) for item, spot in pairs)


def _oriented(placed: list[tuple], dx: int, dy: int) -> list[tuple]:
    """The layout under the symmetry of the square that brings the second object to (dx, dy).

    Empty if the two are not clearly in any of the four relations. Turning a layout that shows
    another relation needs a quarter of the samples.
    """
    (ax, ay, _), (bx, by, _) = placed
    along, across = bx - ax, by - ay
    transposed = abs(along) < abs(across)
    if transposed:
        along, across = across, along
    if abs(along) <= _MIN_OFFSET or abs(across) >= _MAX_DRIFT:
        return []
    turned = []
    flipped = (along > 0) != (dx + dy > 0)
    for x, y, radius in placed:
        x, y = (y, x) if transposed else (x, y)  # the gap is now along x
        x = round(1 - x, 4) if flipped else x
        turned.append((y, x, radius) if dy else (x, y, radius))
    return turned


def _choice(rng, values: tuple):
    return values[int(rng.integers(len(values)))]  # rng.choice on strings is 20 times slower


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


_SINGULAR = {form: shape for shape in SHAPES for form in (shape, _plural(shape))}
_THING = f"(?:{'|'.join(COLORS)}) (?:{'|'.join(SHAPES)})"
_CAPTION = re.compile(
    rf"(?:(?P<number>{'|'.join(NUMBERS)}) (?P<color>{'|'.join(COLORS)}) "
    rf"(?P<noun>{'|'.join(_SINGULAR)})"
    rf"|an? (?P<first>{_THING})(?: (?P<join>and|{'|'.join(RELATIONS)}) an? (?P<second>{_THING}))?)"
    rf"(?: on an? (?P<background>{'|'.join(BACKGROUNDS)}) background)?"
)


def _check(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise _refusal(f"{name} {value!r} is unknown; use one of {', '.join(known)}.")


def _refusal(text: str) -> Exception:
    from dalle_jax.types import UsageError  # imports JAX, which a rendering process never needs

    return UsageError(text)
