"""Masks for inpainting from a PNG's alpha channel, a black-and-white picture or a rectangle.

This is not a command; it has no SUMMARY. Masks are bool arrays, True for known pixels, as
everywhere in this package.
"""

import numpy as np
from PIL import Image

from dalle_jax import images
from dalle_jax.types import UsageError

_EDGE = 24  # levels that still count as black or white
_MAX_GREY = 0.05  # share of grey pixels: soft edges


def read(path: str, shape: tuple[int, int], name: str) -> np.ndarray:
    """The mask in a file.

    Args:
      path: a picture with an alpha channel, whose transparent pixels are to be sampled; or a
        black-and-white picture, whose white pixels are.
      shape: (h, w) of the masked picture.
      name: of the masked picture.

    Returns:
      [h, w] bool, True for known pixels.

    Raises:
      UsageError: for a mask with another size, or one without alpha that is not black and white.
    """
    images.read(path)  # checks that it is a picture and its size
    with Image.open(path) as image:
        width, height = image.size
        if (height, width) != tuple(shape):
            raise UsageError(
                f"the mask {path} is {width} x {height}, but {name} is {shape[1]} x {shape[0]}; "
                "resize the mask to the picture's size."
            )
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            return np.asarray(image.convert("RGBA"))[..., 3] == 255
        grey = np.asarray(image.convert("L"))
    between = (grey > _EDGE) & (grey < 255 - _EDGE)
    if between.mean() > _MAX_GREY:
        raise UsageError(
            f"the mask {path} has no alpha channel and is not black and white "
            f"({between.mean():.0%} of its pixels are grey); make the pixels to sample "
            "transparent, or white on black."
        )
    return grey <= _EDGE


def rectangle(text: str, shape: tuple[int, int], name: str) -> np.ndarray:
    """The mask for "x,y,w,h", in pixels from the upper left corner of the picture.

    Returns:
      [h, w] bool, False inside the rectangle.

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
