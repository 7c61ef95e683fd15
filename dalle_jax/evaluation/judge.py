"""Reads exactly what a picture of shapes shows, by rendering it again.

No learned model. The background is the median of the border. Objects are what differs from it,
split into connected pieces. Each piece is fitted with every shape of the set's own renderer, at
several sizes and offsets and in its best colour. The smallest squared error names shape, size and
place; the colour of that fit, without the mixing at soft edges, names the colour. `judge` then
compares the reading with a caption.

A picture counts as right only if it matches everything in the caption: a near miss is a miss.
Always print `oracle_accuracy`, the judge's accuracy on the renderer's own pictures, beside its
verdicts (the habit of DALL-Eval, arXiv:2202.04053); the skills are GenEval's (arXiv:2310.11513).
"""

import collections
import dataclasses
import functools
import itertools
import math

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from dalle_jax.data import polygons, scenes
from dalle_jax.evaluation import progress
from dalle_jax.types import UsageError

MIN_ORACLE, NUM_ORACLE = 0.995, 400  # of `check_accuracy`: accuracy needed, scenes rendered
MIN_PX, FULL_PX = 32, 64  # larger pictures are reduced to FULL_PX first

# Distances are the largest channel's, of 255. The least contrast in the set, the darkest face of a
# pink cube on gray, is 50.
_BACKGROUND_TOLERANCE = 60
_CONTRAST = 45
_EDGE = 0.38  # of a piece's own contrast: the level of its outline
_MIN_AREA = 0.006  # of the picture: a third of the smallest star
_MIN_EXPLAINED = 0.7  # of a piece's squared contrast: clean 0.95 at least, 5 % noise 0.84
_MIN_BRIGHTNESS = 0.5  # of the named colour's
_RATIO = 1.045  # between neighbouring template sizes
_MAX_SIZE = 50.0  # sqrt(area) of the largest template; the set's largest square at 64 px is 44
_PAD = 48  # around the picture, so that a template may reach over the border


@dataclasses.dataclass(frozen=True)
class Piece:
    """One piece of a picture.

    `shape` or `color` is None if nothing fits; x, y, radius are as in `data.scenes.Object`;
    `explained` in [0, 1] is the part of the squared contrast that the best template explains.
    """

    color: str | None
    shape: str | None
    x: float
    y: float
    radius: float
    explained: float


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a picture shows; `background` is None if the border has none of the three colours."""

    background: str | None
    objects: tuple[Piece, ...]


def judge(scene: scenes.Scene | str, image: np.ndarray) -> dict[str, bool]:
    """Whether a picture matches a caption, by condition.

    Args:
      scene: a scene, of which only the words count, or a caption of the grammar.
      image: uint8 [h, h, 3], h at least 32.

    Returns:
      `count`, `color` and `shape` (the right numbers of each), `bind` (of each colour-shape pair),
      `background` (True if the caption names none), `relation` (only if the caption has one), and
      `all` of them.

    Raises:
      UsageError: for no caption of the grammar or no such image.
    """
    if isinstance(scene, str):
        scene = scenes.parse_caption(scene)
    return compare(scene, parse(image))


def compare(scene: scenes.Scene, reading: Reading) -> dict[str, bool]:
    """`judge` for a picture that `parse` has read."""
    pieces, expected = reading.objects, scene.objects

    def same(key) -> bool:
        return collections.Counter(map(key, pieces)) == collections.Counter(map(key, expected))

    def pair(item) -> tuple:
        return item.color, item.shape

    verdict = {
        "count": len(pieces) == len(expected),
        "color": same(lambda item: item.color),
        "shape": same(lambda item: item.shape),
        "bind": same(pair),
        "background": scene.background in (None, reading.background),
    }
    if scene.relation:
        verdict["relation"] = verdict["bind"] and _related(
            scene.relation,
            *(next(x for x in pieces if pair(x) == pair(item)) for item in expected),
        )
    return verdict | {"all": all(verdict.values())}


def parse(image: np.ndarray) -> Reading:
    """What a picture shows.

    Args:
      image: uint8 [h, h, 3], h at least 32; above 64 it is reduced to 64 first.

    Raises:
      UsageError: for another shape or dtype.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UsageError(f"the judge reads uint8 [h, h, 3], not {image.dtype} {image.shape}.")
    if image.shape[0] != image.shape[1] or image.shape[0] < MIN_PX:
        raise UsageError(
            f"the judge reads square pictures of at least {MIN_PX} px, not {image.shape[:2]}; "
            f"smaller shapes cannot be distinguished."
        )
    if image.shape[0] > FULL_PX:
        small = Image.fromarray(image).resize((FULL_PX, FULL_PX), Image.LANCZOS)
        image = np.asarray(small)
    pixels = image.astype(np.float32)
    border = np.median(
        np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]]), axis=0
    )
    contrast = np.abs(pixels - border).max(axis=-1)
    labels, num = _pieces(contrast)
    objects = []
    if num:
        # Soft edges belong to the nearest piece, two pixels out at most.
        away, nearest = ndimage.distance_transform_edt(labels == 0, return_indices=True)
        owner = np.where(away <= 2.1, labels[tuple(nearest)], 0)
        for label in range(1, num + 1):
            objects.append(_fit(pixels, border, labels == label, owner == label))
    return Reading(_background(border), tuple(objects))


def check_accuracy(image_px: int, report: progress.Report = progress.silent) -> dict:
    """The judge's own accuracy on rendered scenes, which every result with verdicts contains.

    Raises:
      UsageError: if it is below MIN_ORACLE at this size.
    """
    accuracy = oracle_accuracy(NUM_ORACLE, image_px)
    report(f"judge: right on {accuracy:.2%} of {NUM_ORACLE} rendered scenes")
    if accuracy < MIN_ORACLE:
        raise UsageError(
            f"the judge confirms only {accuracy:.2%} of the renderer's own pictures at "
            f"{image_px} px, {MIN_ORACLE:.1%} is needed; evaluate pictures of 32 or 64 px."
        )
    return {"oracle_accuracy": accuracy, "n": NUM_ORACLE, "image_px": image_px}


def oracle_accuracy(n: int, image_px: int = 32, seed: int = 0) -> float:
    """Fraction of n rendered scenes, kinds in turn, all of whose conditions the judge confirms."""
    right = 0
    for index in range(n):
        rng = scenes.example_rng(seed, "oracle", index)
        scene = scenes.sample_scene(rng, scenes.KINDS[index % len(scenes.KINDS)], "any")
        right += judge(scene, scenes.render(scene, image_px))["all"]
    return right / n


def _related(relation: str, a: Piece, b: Piece) -> bool:
    """The second lies further along the relation than across it, by a tenth of the picture."""
    dx, dy = scenes.RELATIONS[relation]
    along = (b.x - a.x) * dx + (b.y - a.y) * dy
    across = abs((b.x - a.x) * dy) + abs((b.y - a.y) * dx)
    return along > 0.1 and along > across


def _background(border: np.ndarray) -> str | None:
    distances = {name: np.abs(border - color).max() for name, color in scenes.BACKGROUNDS.items()}
    name = min(distances, key=distances.get)
    return name if distances[name] <= _BACKGROUND_TOLERANCE else None


def _pieces(contrast: np.ndarray) -> tuple[np.ndarray, int]:
    """Labels int [h, w] of the pieces, 0 elsewhere, and their number.

    The outline follows a fraction of each piece's own contrast. With one level for all, two pale
    neighbours would lose their edges, or two strong ones 2 px apart would join.
    """
    rough, num = ndimage.label(contrast > _CONTRAST, np.ones((3, 3)))
    if not num:
        return rough, 0
    strength = np.zeros(num + 1, np.float32)
    for label in range(1, num + 1):
        strength[label] = np.percentile(contrast[rough == label], 85)
    inside = (rough > 0) & (contrast > _EDGE * strength[rough])
    labels, num = ndimage.label(inside)
    areas = np.bincount(labels.ravel(), minlength=num + 1)
    is_large = areas >= _MIN_AREA * contrast.size
    is_large[0] = False
    return (np.cumsum(is_large) * is_large)[labels], int(is_large.sum())


def _fit(pixels: np.ndarray, border: np.ndarray, inside: np.ndarray, owned: np.ndarray) -> Piece:
    """The best template for one piece.

    Args:
      pixels: float32 [h, h, 3].
      border: float32 [3], the background's colour.
      inside: bool [h, h], the piece within its outline.
      owned: bool [h, h], the piece with its soft edge.
    """
    side = len(pixels)
    ys, xs = np.nonzero(inside)
    row, column = int(round(ys.mean())), int(round(xs.mean()))
    size = min(math.sqrt(len(ys)), _MAX_SIZE)
    contrast = np.where(owned[..., None], pixels - border, 0)
    padded = np.pad(contrast, ((_PAD, _PAD), (_PAD, _PAD), (0, 0)))
    total = float(np.square(contrast).sum())
    best = (math.inf,)
    middle = round(math.log(size, _RATIO))
    largest = math.floor(math.log(_MAX_SIZE, _RATIO))
    for step in range(middle - 3, min(middle + 3, largest) + 1):
        bank = _bank(step)
        reach = bank.reach
        window = padded[
            row + _PAD - reach : row + _PAD + reach + 1,
            column + _PAD - reach : column + _PAD + reach + 1,
        ]
        error, color = bank.errors(window.reshape(-1, 3), border)
        at = int(error.argmin())
        if error[at] < best[0]:
            best = (float(error[at]), bank, at, color[at])
    error, bank, at, color = best
    shape, radius, dx, dy = bank.entries[at]
    explained = -error / max(total, 1e-6)  # the error is relative to an empty template
    if explained < _MIN_EXPLAINED:  # then the best template's colour means nothing either
        shape, color = None, np.median(pixels[inside], axis=0)
    return Piece(
        color=_color_name(color),
        shape=shape,
        x=(column + 0.5 + dx) / side,
        y=(row + 0.5 + dy) / side,
        radius=radius / side,
        explained=explained,
    )


def _color_name(color: np.ndarray) -> str | None:
    """The palette's nearest colour by direction, so that a shade of it keeps its name."""
    length = float(np.linalg.norm(color))
    cosines = _PALETTE_UNIT @ (color / max(length, 1e-6))
    at = int(cosines.argmax())
    return tuple(scenes.COLORS)[at] if length >= _MIN_BRIGHTNESS * _PALETTE_LENGTH[at] else None


_PALETTE = np.array(list(scenes.COLORS.values()), np.float32)
_PALETTE_LENGTH = np.linalg.norm(_PALETTE, axis=1)
_PALETTE_UNIT = _PALETTE / _PALETTE_LENGTH[:, None]


class _Bank:
    """Templates of every shape with one area, at sub-pixel offsets around the window's middle.

    A picture of a shape in colour c on background b is b (1 - cover) + c light, with cover the
    share of a pixel that the shape takes and light that share times the shade of its face (they
    differ for cubes only).
    """

    def __init__(self, size: float):
        # In quarters of a pixel, which only small shapes need.
        offsets = range(-3, 4) if size < 8 else range(-4, 5, 2)
        # A star and the tip of a triangle go furthest for their area, 0.90 and 0.92 of its root.
        self.reach = math.ceil(0.92 * size) + 2
        self.entries, cover = [], []
        for shape in scenes.SHAPES:
            area, middle = _MOMENTS[shape]
            radius = size / math.sqrt(area)
            origin = -radius * middle
            for dy, dx in itertools.product(offsets, offsets):
                self.entries.append((shape, radius, origin[0] + dx / 4, origin[1] + dy / 4))
            cover.append(_templates(shape, radius, origin, offsets, self.reach, shaded=False))
            if shape == "cube":
                self._light = _templates(shape, radius, origin, offsets, self.reach, shaded=True)
        self._cover = np.concatenate(cover)  # [M, pixels]
        self._cube = np.array([entry[0] == "cube" for entry in self.entries])
        shaded = self._cover.copy()
        shaded[self._cube] = self._light
        self._cover_cover = np.square(self._cover).sum(axis=1)  # [M]
        self._light_cover = (shaded * self._cover).sum(axis=1)
        self._light_light = np.square(shaded).sum(axis=1)

    def errors(self, window: np.ndarray, border: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Squared error of each template in its best colour, less that of an empty template.

        Args:
          window: [pixels, 3], the piece's difference from the background.
          border: [3].

        Returns:
          float32 [M], and the colours [M, 3] in [0, 255].
        """
        covered = self._cover @ window  # [M, 3]
        lit = covered.copy()
        lit[self._cube] = self._light @ window
        lit += self._light_cover[:, None] * border
        color = np.clip(lit / self._light_light[:, None], 0, 255)
        error = 2 * border * covered + np.square(border) * self._cover_cover[:, None]
        error += color * (color * self._light_light[:, None] - 2 * lit)
        return error.sum(axis=1), color


@functools.cache
def _bank(step: int) -> _Bank:
    return _Bank(_RATIO**step)


def _templates(shape, radius, origin, offsets, reach, shaded) -> np.ndarray:
    """float32 [offsets**2, pixels]: a white shape on black at all offsets, y before x.

    The shape is rendered once, four times as large, and reduced by the renderer's Lanczos filter
    with its taps shifted by each offset, in two matrix products: 6 times faster than one by one.

    Args:
      shape: its name.
      radius: in pixels.
      origin: (x, y) of its centre from the middle of the window, in pixels.
      offsets: in quarters of a pixel.
      reach: the window has 2 reach + 1 pixels.
      shaded: faces in their shade, or all in white.
    """
    side = 2 * reach + 1
    image = Image.new("L", (4 * side, 4 * side))
    canvas = ImageDraw.Draw(image)
    center = 4 * (reach + 0.5 + np.asarray(origin))
    for shade, vertices in polygons.PARTS[shape]:
        points = (center + 4 * radius * vertices).ravel().tolist()
        canvas.polygon(points, fill=int(255 * shade) if shaded else 255)
    taps = _lanczos(side, tuple(offsets))
    small = taps @ (np.asarray(image, np.float32) / 255) @ taps.T  # [n * side, n * side]
    small = small.reshape(len(offsets), side, len(offsets), side).swapaxes(1, 2)
    return small.clip(0, 1).reshape(len(offsets) ** 2, -1)


@functools.cache
def _lanczos(side: int, offsets: tuple[int, ...]) -> np.ndarray:
    """Filter taps float32 [len(offsets) * side, 4 * side] of a reduction by four."""
    middles = 4 * (np.arange(side) + 0.5) - np.array(offsets)[:, None]  # [n, side]
    away = (np.arange(4 * side) + 0.5 - middles.reshape(-1, 1)) / 4
    taps = np.where(np.abs(away) < 3, np.sinc(away) * np.sinc(away / 3), 0)
    return (taps / taps.sum(axis=1, keepdims=True)).astype(np.float32)


def _moments(shape: str) -> tuple[float, np.ndarray]:
    """Area and centroid [2] of a shape of radius 1."""
    reach, radius = 42, 40.0
    cover = _templates(shape, radius, (0, 0), (0,), reach, False).reshape(2 * reach + 1, -1)
    ys, xs = np.indices(cover.shape)
    area = cover.sum()
    middle = np.array([(cover * xs).sum(), (cover * ys).sum()]) / area
    return float(area / radius**2), (middle - reach) / radius


_MOMENTS = {shape: _moments(shape) for shape in scenes.SHAPES}
