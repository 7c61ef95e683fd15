"""Stored records to square uint8 training pictures: reading, decoding and the papers' crops.

A crop is `(image uint8 [h, w, 3], image_px, rng or None) -> uint8 [px, px, 3]`. Every random choice
uses the given generator, so an example does not depend on the process, thread or order in which it
is computed. Without a generator the crop is the deterministic one for evaluation.

The papers resize with AREA, which is Pillow's BOX filter: the exact mean over the (fractional)
source area of each target pixel. Pillow rounds once per axis, so it can differ from a one-pass
float mean by one grey level. Enlarging is bicubic; the papers drop small pictures instead.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dalle_jax import images
from dalle_jax.types import UsageError

# Side 1 to 16,384 at least; a 1 x 60,000 banner would become a stripe of one colour.
MAX_ASPECT = 64


class BadRecord(ValueError):
    """A record that cannot be used: the pipeline skips, counts and names it.

    Attributes:
      reason: a few fixed words, the key under which skipped records are counted.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


# Errors of readers on a damaged record: tfds, protobuf and array_record each raise their own.
_DAMAGED = (ValueError, OSError, RuntimeError, KeyError, EOFError)


def read(source: Any, indices: Sequence[int]) -> list[Any]:
    """Examples of a source (`sources.Source`); a BadRecord in place of a damaged one.

    One call reads all of them if the source has `__getitems__`: array_record then takes 0.15 ms per
    record, and 0.8 ms one by one.
    """
    if hasattr(source, "__getitems__") and len(indices) > 1:
        try:
            return list(source.__getitems__(list(indices)))
        except _DAMAGED:
            pass  # at least one record is damaged; the others are read below

    def one(index: int):
        try:
            return source[index]
        except _DAMAGED as error:
            return BadRecord("damaged record", str(error))

    return [one(index) for index in indices]


def decode(image: bytes | np.ndarray | None, name: str = "image") -> np.ndarray:
    """A stored picture as uint8 [h, w, 3] RGB.

    Encoded pictures are turned by their EXIF orientation, composited on white if transparent, and
    refused above `images.MAX_PIXELS` before they are decompressed. Arrays may be [h, w] or
    [h, w, 1 to 4], uint8 or uint16.

    Raises:
      BadRecord: if there is no picture, or if it is damaged, too large, or not a picture.
    """
    if image is None:
        raise BadRecord("no picture")
    if isinstance(image, np.ndarray):
        rgb = _array_to_rgb(image)
    else:
        try:
            rgb = images.decode(bytes(image), name)
        except UsageError as error:
            raise BadRecord("unreadable picture", str(error)) from error
    short, long = sorted(rgb.shape[:2])
    if short == 0 or long > MAX_ASPECT * short:
        raise BadRecord("extreme aspect ratio", f"{name} is {rgb.shape[1]} x {rgb.shape[0]}")
    return rgb


def crop_none(image: np.ndarray, px: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """The full picture at px x px; a picture that is not square is squeezed."""
    del rng
    return _resize(image, px, px)


def crop_center(image: np.ndarray, px: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """The largest central square at px x px."""
    del rng
    side = min(image.shape[:2])
    top, left = (n // 2 for n in _slack(image, side))
    return _resize(image[top : top + side, left : left + side], px, px)


def crop_dvae(image: np.ndarray, px: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """The dVAE's augmentation; the central square without a generator.

    A random s x s square (s = shorter side), resized by area to a random t in
    [min(s, 9/8 px), min(s, 12/8 px)], a random px x px window, and a flip with probability 1/2.

    Source: DALL·E (2102.12092) A.1, Listing 1, where px = 256, so 288 and 384. Deliberate
    difference: a picture with s < px is enlarged to px; the paper's data has none.
    """
    if rng is None:
        return crop_center(image, px)
    side = min(image.shape[:2])
    top, left = (int(rng.integers(n + 1)) for n in _slack(image, side))
    low, high = min(side, round(px * 9 / 8)), min(side, round(px * 12 / 8))
    size = max(px, int(rng.integers(low, high + 1)))
    out = _window(image[top : top + side, left : left + side], size, px, rng)
    return out[:, ::-1] if rng.integers(2) else out


def crop_dalle(image: np.ndarray, px: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """The transformer's augmentation, no flip (text, left and right); central without a generator.

    An s x s square (s = shorter side) whose offset is uniform over the middle quarter of the slack,
    [3/8, 5/8], resized by area to a random t in [px, min(s, 9/8 px)], and a random px x px window.

    Source: DALL·E (2102.12092) B.1, Listing 2. Deliberate difference: as `crop_dvae`.
    """
    if rng is None:
        return crop_center(image, px)
    side = min(image.shape[:2])
    top, left = (
        int(rng.integers(3 * n // 8, max(3 * n // 8 + 1, 5 * n // 8))) for n in _slack(image, side)
    )
    size = int(rng.integers(px, max(px, min(side, round(px * 9 / 8))) + 1))
    return _window(image[top : top + side, left : left + side], size, px, rng)


def crop_clip(image: np.ndarray, px: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """CLIP's crop: shorter side to px, bicubic, then a random square; central without a generator.

    Source: CLIP (2103.00020) §2.4 "a random square crop from resized images is the only data
    augmentation"; evaluation as in openai/CLIP `_transform`.
    """
    height, width = image.shape[:2]
    scale = px / min(height, width)
    tall, wide = max(px, int(height * scale)), max(px, int(width * scale))
    image = _resize(image, tall, wide, Image.Resampling.BICUBIC)
    if rng is None:
        # torchvision's centre crop rounds half of the slack to even.
        top, left = (round(n / 2) for n in _slack(image, px))
    else:
        top, left = (int(rng.integers(n + 1)) for n in _slack(image, px))
    return image[top : top + px, left : left + px]


CROPS: dict[str, Callable[..., np.ndarray]] = {
    "none": crop_none,
    "center": crop_center,
    "dvae": crop_dvae,
    "dalle": crop_dalle,
    "clip": crop_clip,
}
DETERMINISTIC = frozenset({"none", "center"})  # also in training


def _slack(image: np.ndarray, side: int) -> tuple[int, int]:
    return image.shape[0] - side, image.shape[1] - side


def _window(image: np.ndarray, size: int, px: int, rng: np.random.Generator) -> np.ndarray:
    """A random px x px window of `image` resized to size x size."""
    image = _resize(image, size, size)
    top, left = (int(rng.integers(n + 1)) for n in _slack(image, px))
    return image[top : top + px, left : left + px]


def _resize(
    image: np.ndarray, height: int, width: int, resample: Image.Resampling | None = None
) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    if resample is None:
        smaller = height <= image.shape[0] and width <= image.shape[1]
        resample = Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image).resize((width, height), resample))


def _array_to_rgb(image: np.ndarray) -> np.ndarray:
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    if image.ndim == 2:
        image = image[..., None]
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 2, 3, 4):
        raise BadRecord("unreadable picture", f"an array {image.dtype} {list(image.shape)}")
    if image.shape[-1] in (2, 4):
        alpha = image[..., -1:].astype(np.uint32)
        colour = image[..., :-1].astype(np.uint32)
        image = ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.broadcast_to(image, (*image.shape[:2], 3)) if image.shape[-1] == 1 else image
