"""The outlines of the eight shapes as polygons, and how far each of them reaches.

numpy and Pillow only. `scenes.render` draws with this file, and `evaluation.judge` compares a
picture with it.
"""

from collections.abc import Iterable

import numpy as np


def fill(canvas, shape: str, color: tuple[int, int, int], center: np.ndarray, radius: float):
    """Fills one shape on an ImageDraw canvas; center (x, y) and radius in its pixels."""
    for shade, vertices in PARTS[shape]:
        points = (center + radius * vertices).ravel().tolist()
        canvas.polygon(points, fill=tuple(int(shade * value) for value in color))


def _turn(angles: Iterable[float], radius=1.0) -> np.ndarray:
    """Points [n, 2] at clockwise angles from the top, in fractions of a full turn."""
    turns = 2 * np.pi * np.asarray(list(angles))
    return np.stack([np.sin(turns), -np.cos(turns)], axis=-1) * np.asarray(radius)[..., None]


def _parts() -> dict[str, list[tuple[float, np.ndarray]]]:
    """Each shape as (shade, polygon [n, 2]) parts, y pointing down; all look about equally large.

    A shape is inside the unit circle, except for the corners of squares and triangles: see EXTENT.
    """
    arm, reach = 0.32, 0.94
    cross = [(arm, -reach), (arm, -arm), (reach, -arm)]
    turns = [np.linalg.matrix_power(np.array([[0, -1], [1, 0]]), i) for i in range(4)]
    circle = _turn(np.arange(65) / 64, 0.92)
    hexagon = _turn(np.arange(6) / 6)
    star = _turn(np.arange(10) / 10, np.where(np.arange(10) % 2, 0.42, 1.0))
    return {
        "circle": [(1, circle)],
        "square": [(1, 0.78 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]))],
        "triangle": [(1, 0.92 * np.array([(0, -1), (0.95, 0.8), (-0.95, 0.8)]))],
        "star": [(1, star)],
        "cross": [(1, np.concatenate([np.array(cross) @ turn for turn in turns[::-1]]))],
        # The top, left and right face; each is darker than the one before.
        "cube": [
            (shade, np.concatenate([[(0, 0)], hexagon[[i, (i + 1) % 6, (i + 2) % 6]]]))
            for shade, i in ((1, 5), (0.82, 3), (0.64, 1))
        ],
        # A keyhole polygon: once around outside, a seam without width, back around inside.
        "ring": [(1, np.concatenate([circle, circle[::-1] * 0.58]))],
        "diamond": [(1, np.array([(0, -1), (0.7, 0), (0, 1), (-0.7, 0)]))],
    }


PARTS = _parts()
# The largest distance from the centre of a shape with radius 1: 1.10 for a square, 1.14 for a
# triangle, at most 1 for the others.
EXTENT = {
    shape: float(max(np.linalg.norm(vertices, axis=1).max() for _, vertices in parts))
    for shape, parts in PARTS.items()
}
