"""Pictures at the edges of the package: uint8 <-> [-1, 1], reading files, labelled grids, PNG.

Everywhere else a picture is float32 [B, h, w, 3] in [-1, 1]; uint8 occurs only in files, in input
batches and here. Nothing in this file depends on a model, a dataset or a flag.
"""

import base64
import io
import math
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from dalle_jax.types import Array, UsageError

# 8192 x 8192. Pillow only warns below 179 million pixels, which a PNG of 100 kilobytes can hold:
# half a gigabyte after decoding.
MAX_PIXELS = 2**26

# The formats in photo folders. Pillow reads more, but its EPS reader starts Ghostscript, and no
# input may run code.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

_INK, _PAPER = (24, 24, 27), (255, 255, 255)
_MAX_LABEL_LINES = 4


def to_float(images: Array) -> Array:
    """The pictures as float32 in [-1, 1]: 0 -> -1, 255 -> 1.

    Args:
      images: uint8, any shape. numpy in, numpy out; jax arrays and tracers stay in jax.

    Raises:
      TypeError: if `images` is not uint8 (a float picture is probably in [-1, 1] already).
    """
    if images.dtype != np.uint8:
        raise TypeError(f"to_float takes uint8 pictures in [0, 255]; got {images.dtype}.")
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(images: Array) -> Array:
    """The pictures as uint8: -1 -> 0, 1 -> 255, rounded to nearest, clipped outside.

    Exactly inverts `to_float` on all 256 values.

    Args:
      images: float, any shape. numpy in, numpy out; jax arrays and tracers stay in jax.

    Raises:
      TypeError: if `images` is not floating point.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"to_uint8 takes float pictures in [-1, 1]; got {images.dtype}.")
    xp = jnp if isinstance(images, jax.Array) else np
    levels = (images.astype(np.float32) + np.float32(1)) * np.float32(127.5)
    return xp.clip(xp.round(levels), 0, 255).astype(np.uint8)


def read(path: str | pathlib.Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The first frame of the picture in a file: uint8 [h, w, 3] RGB, turned by its EXIF.

    Raises:
      UsageError: if the file is missing, not a picture, damaged, or decodes to more than
        `max_pixels`.
    """
    path = pathlib.Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"image {path} cannot be read ({reason}); check the path.") from error
    return decode(data, name=str(path), max_pixels=max_pixels)


def decode(data: bytes, name: str = "image", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The picture in `data`: uint8 [h, w, 3] RGB; errors use `name`.

    A transparent picture is composited on white, because the transparent pixels of an icon are
    often black.

    Raises:
      UsageError: as `read`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:  # before a single pixel is decoded
                raise _too_large(name, f"{width} x {height}", max_pixels)
            image.draft("RGB", image.size)  # the decoder converts CMYK JPEGs
            image.load()
            return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    except UsageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, "far too many", max_pixels) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many types of error on damaged files
        kind = "is empty" if not data else "is not a picture that can be decoded"
        raise UsageError(
            f"{name} {kind} ({str(error) or type(error).__name__}); "
            f"expected one of {', '.join(FORMATS)}."
        ) from error


def _too_large(name: str, size: str, max_pixels: int) -> UsageError:
    return UsageError(
        f"{name} has {size} pixels; at most {max_pixels:,} are decoded. Shrink it before use."
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16L", "I;16B", "I", "F"):
        # Pillow's conversion clips at 255, which turns 16-bit greys white.
        grey = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode != "F" else max(float(grey.max()), 1e-12)
        levels = np.clip(np.nan_to_num(grey) / top, 0, 1) * 255
        return Image.fromarray(levels.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (*_PAPER, 255))
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")


def grid(
    images: np.ndarray,
    columns: int = 0,
    labels: Sequence[str] | None = None,
    scale: int = 1,
    pad: int = 4,
) -> Image.Image:
    """One RGB picture of all `images` in rows of `columns`, with labels under them.

    Args:
      images: uint8 [n, h, w, 3], n >= 1.
      columns: pictures in a row; 0 = as square as possible.
      labels: one text per picture, wrapped to its width, at most four lines. Small pictures need
        `scale` so that a word fits: labels under 32 px at scale 4 are readable.
      scale: every pixel becomes scale x scale pixels, unblurred.
      pad: white pixels between the pictures.

    Raises:
      ValueError: if shapes or counts do not fit.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not len(images):
        raise ValueError(f"expected uint8 [n, h, w, 3]; got {images.dtype} {images.shape}.")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"got {len(labels)} labels for {len(images)} images; expected as many.")
    n, height, width = len(images), images.shape[1] * scale, images.shape[2] * scale
    columns = min(columns, n) if columns > 0 else math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)

    font = _font(width)
    lines = [_wrap(label, font, width) for label in labels] if labels is not None else [[]] * n
    line_px = _line_px(font)
    text_px = [
        line_px * max(len(cell) for cell in lines[r * columns : (r + 1) * columns])
        for r in range(rows)
    ]
    sheet_size = (
        pad + columns * (width + pad),
        pad + rows * (height + pad) + sum(px + pad if px else 0 for px in text_px),
    )
    sheet = Image.new("RGB", sheet_size, _PAPER)
    canvas = ImageDraw.Draw(sheet)
    top = pad
    for row in range(rows):
        for column in range(min(columns, n - row * columns)):
            i, left = row * columns + column, pad + column * (width + pad)
            cell = Image.fromarray(images[i]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(cell, (left, top))
            for k, line in enumerate(lines[i]):
                canvas.text((left, top + height + pad // 2 + k * line_px), line, _INK, font)
        top += height + pad + (text_px[row] + pad if text_px[row] else 0)
    return sheet


def contact_sheet(
    rows: Sequence[tuple[str, np.ndarray, Sequence[str] | None]],
    columns: int = 8,
    scale: int = 4,
    pad: int = 6,
) -> Image.Image:
    """Titled grids below each other: a prompt, then its ranked pictures with their scores.

    Args:
      rows: (title, images uint8 [n, h, w, 3], labels or None) for each block, at least one.
      columns: as for `grid`.
      scale: as for `grid`.
      pad: as for `grid`.
    """
    blocks = [(title, grid(images, columns, labels, scale, pad)) for title, images, labels in rows]
    if not blocks:
        raise ValueError("a contact sheet needs at least one row of pictures; got none.")
    width = max(320, max(block.width for _, block in blocks))
    font = ImageFont.load_default(size=16)
    line_px = _line_px(font)
    titles = [_wrap(title, font, width - 2 * pad) for title, _ in blocks]
    heights = [
        len(lines) * line_px + pad + block.height + pad
        for lines, (_, block) in zip(titles, blocks, strict=True)
    ]
    sheet = Image.new("RGB", (width, sum(heights) + pad), _PAPER)
    canvas = ImageDraw.Draw(sheet)
    top = pad
    for lines, (_, block), height in zip(titles, blocks, heights, strict=True):
        for k, line in enumerate(lines):
            canvas.text((pad, top + k * line_px), line, _INK, font)
        sheet.paste(block, (0, top + len(lines) * line_px + pad // 2))
        canvas.line((pad, top + height - pad, width - pad, top + height - pad), (228, 228, 231))
        top += height
    return sheet


def png_bytes(image: np.ndarray | Image.Image, metadata: Mapping[str, str] | None = None) -> bytes:
    """PNG of a uint8 [h, w, 3] array or a PIL image; equal inputs give equal bytes.

    Args:
      image: the picture.
      metadata: text that the file carries, as iTXt chunks: PIL gives it back as `image.text`.
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image, dtype=np.uint8))
    info = PngImagePlugin.PngInfo()
    for name, text in (metadata or {}).items():
        info.add_itxt(name, text)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True, pnginfo=info)
    return buffer.getvalue()


def data_uri(image: np.ndarray | Image.Image | bytes) -> str:
    """`data:image/png;base64,…` for a picture (or for PNG bytes), for self-contained pages."""
    data = image if isinstance(image, bytes) else png_bytes(image)
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def _font(width: int) -> ImageFont.FreeTypeFont:
    """Pillow's font in a size at which about twelve letters fit the picture."""
    return ImageFont.load_default(size=min(16, max(9, width // 9)))


def _line_px(font: ImageFont.FreeTypeFont) -> int:
    ascent, descent = font.getmetrics()
    return ascent + descent + 1


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """`text` in at most four lines no wider than `width`; a longer text ends in an ellipsis."""
    text = " ".join(str(text)[:2000].split())  # cut a long caption before measuring
    lines = []
    while text and len(lines) < _MAX_LABEL_LINES:
        fits = len(text)
        while fits > 1 and font.getlength(text[:fits]) > width:
            fits = min(fits - 1, int(fits * width / font.getlength(text[:fits])) + 1)
        space = text.rfind(" ", 0, fits + 1)
        cut = fits if fits == len(text) or space <= 0 else space
        lines.append(text[:cut])
        text = text[cut:].strip()
    if text and lines:
        last = lines[-1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines[-1] = last.rstrip() + "…"
    return lines
