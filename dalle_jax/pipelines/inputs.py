"""What people give to a pipeline: pictures, masks, numbers of candidates."""

import pathlib
from collections.abc import Callable

import numpy as np
import PIL.Image

from dalle_jax import images
from dalle_jax.data import preprocess
from dalle_jax.types import UsageError

Image = str | pathlib.Path | PIL.Image.Image | np.ndarray  # uint8 [h, w, 3]


def square(image: Image, px: int) -> np.ndarray:
    """uint8 [px, px, 3]: the central square of a picture, resized.

    Raises:
      UsageError: for a file that is no picture, or an array of another shape or type.
    """
    if isinstance(image, str | pathlib.Path):
        image = images.read(image)
    elif isinstance(image, PIL.Image.Image):
        image = np.asarray(image.convert("RGB"))
    elif image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UsageError(
            f"a picture is an array of {image.dtype} {image.shape}; expected uint8 [h, w, 3]."
        )
    return preprocess.crop_center(image, px)


def fit_mask(known: np.ndarray, px: int) -> np.ndarray:
    """A mask cut and resized as `square` does the picture.

    Args:
      known: bool [h, w], True where the picture stays.
      px: side.

    Returns:
      [px, px, 1] bool: known where all that the pixel covers is.

    Raises:
      UsageError: if nothing is left to sample, or everything.
    """
    known = np.asarray(known, bool)
    side = min(known.shape)
    top, left = ((n - side) // 2 for n in known.shape)
    anew = ~known[top : top + side, left : left + side]
    if anew.shape != (px, px):
        method = PIL.Image.Resampling.BOX if px < side else PIL.Image.Resampling.NEAREST
        levels = PIL.Image.fromarray(anew.astype(np.float32)).resize((px, px), method)
        anew = np.asarray(levels) > 0
    if not anew.any():
        raise UsageError(
            "nothing is masked: the picture would not change. Make the pixels to sample "
            "transparent (or white) in the mask, inside the central square; or use --invert_mask."
        )
    if anew.all():
        raise UsageError(
            "everything is masked: no pixel of the picture would stay. Use --invert_mask, or "
            "`sample --pipeline=unclip` for a full picture."
        )
    return ~anew[..., None]


def counts(
    candidates: int | None,
    keep: int | None,
    default_candidates: int,
    default_keep: int,
    has_ranker: bool,
    warn: Callable[[str], None],
) -> tuple[int, int]:
    """(candidates, keep) with defaults; without a ranker only what is kept is sampled.

    Raises:
      UsageError: for numbers below 1, or more kept than sampled.
    """
    for name, value in (("candidates", candidates), ("keep", keep)):
        if value is not None and value < 1:
            raise UsageError(f"{name}={value}; expected 1 or more.")
    if keep and candidates and keep > candidates:
        raise UsageError(
            f"keep={keep} is more than candidates={candidates}; raise the candidates or keep fewer."
        )
    if has_ranker:
        candidates = candidates or max(default_candidates, keep or 0)
        return candidates, keep or min(default_keep, candidates)
    keep = keep or min(default_keep, candidates or default_keep)
    if candidates and candidates > keep:
        warn(f"nothing ranks without a CLIP: sampling only the {keep} pictures that are kept.")
    return keep, keep
