"""Which part of a picture is to be drawn anew: a PNG's alpha channel, black and white, a rectangle.

No command itself; it has no SUMMARY. Masks are bool arrays, True where the picture is known, as
everywhere in this house.
"""

import numpy as np
from PIL import Image

from dalle_jax import images
from dalle_jax.types import UsageError

_EDGE = 24  # levels from black or white that still are
_MAX_GREY = 0.05  # share of pixels between: soft edges


def read(path: str, shape: tuple[int, int], name: str) -> np.ndarray:
    """The mask in a file.

    Args:
      path: a picture with an alpha channel, see-through where it is to be drawn anew; or a black
        and white one, white there.
      shape: (h, w) of the picture that it is for.
      name: of that picture.

    Returns:
      [h, w] bool, True where the picture is known.

    Raises:
      UsageError: for a mask of another size, or neither with alpha nor black and white.
    """
    images.read(path)  # that it is a picture, and no larger than we decode
    with Image.open(path) as image:
        width, height = image.size
        if (height, width) != tuple(shape):
            raise UsageError(
                f"the mask {path} is {width} x {height}, but {name} is {shape[1]} x {shape[0]}; a "
                "mask has a pixel for each of the picture's: draw it at that size."
            )
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            return np.asarray(image.convert("RGBA"))[..., 3] == 255
        grey = np.asarray(image.convert("L"))
    between = (grey > _EDGE) & (grey < 255 - _EDGE)
    if between.mean() > _MAX_GREY:
        raise UsageError(
            f"the mask {path} has no alpha channel and is not black and white "
            f"({between.mean():.0%} of it is between); make what is to be drawn anew see-through, "
            "or white on black."
        )
    return grey <= _EDGE


def rectangle(text: str, shape: tuple[int, int], name: str) -> np.ndarray:
    """The mask of "x,y,w,h", pixels from the upper left corner of the picture.

    Returns:
      [h, w] bool, False inside.

    Raises:
      UsageError: for other text, or a rectangle that is not inside the picture.
    """
    try:
        x, y, w, h = (int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--rect={text}; expected x,y,w,h in pixels, as in 8,8,16,16.") from None
    height, width = shape
    if x < 0 or y < 0 or w < 1 or h < 1 or x + w > width or y + h > height:
        raise UsageError(f"--rect={text} is not inside {name}, which is {width} x {height}.")
    known = np.ones(shape, bool)
    known[y : y + h, x : x + w] = False
    return known
