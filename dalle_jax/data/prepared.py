"""A set that `prepare` has written: the data section that reads it, and its contact sheet."""

import pathlib

import numpy as np
from PIL import Image

from dalle_jax import config as cfg
from dalle_jax import images
from dalle_jax.data import sources

_SHEET = 24  # pictures


def data_section(
    folder: pathlib.Path, data_dir: str, vocab_size: int, *, with_config: bool = False
) -> cfg.ConfigDict:
    """The fields of a config's data section with which sources and tokenizers open a set.

    Args:
      folder: the set's version folder.
      data_dir: parent of all sets; `folder` may be elsewhere.
      vocab_size: of its tokenizer.
      with_config: whether `source` names the set's config too, because the set has several.
    """
    root, config = pathlib.Path(data_dir), folder.parent
    source = str(folder)
    if folder.is_relative_to(root):
        source = config.relative_to(root).as_posix()
        source = source if with_config else source.split("/")[0]
    size = config.name.removesuffix("_tones").removesuffix("px")
    return cfg.ConfigDict(
        dict(
            source=source,
            data_dir=data_dir,
            split="train",
            image_px=int(size) if size.isdigit() else 8,
            image_key="image",
            caption_key="captions",
            label_template="",
            vocab_size=vocab_size,
        )
    )


def contact_sheet(source: sources.Source, count: int = _SHEET) -> Image.Image:
    """`count` examples spread over the split, with one of their captions each."""
    count = min(count, len(source))
    pictures, labels, side = [], [], 0
    for i, index in enumerate(np.linspace(0, len(source) - 1, count).astype(int)):
        example = source[index]
        if isinstance(example.image, bytes):
            pixels = images.decode(example.image, example.id)
        else:
            pixels = np.asarray(example.image)
            pixels = np.repeat(pixels, 3, -1) if pixels.shape[-1] == 1 else pixels
        side = side or min(128, max(32, min(pixels.shape[:2])))
        picture = Image.fromarray(pixels)
        low = min(picture.size)
        left, top = (picture.width - low) // 2, (picture.height - low) // 2
        picture = picture.crop((left, top, left + low, top + low))
        if low != side:
            picture = picture.resize((side, side), Image.Resampling.LANCZOS)
        pictures.append(np.asarray(picture))
        labels.append(example.captions[i % len(example.captions)])
    return images.grid(np.stack(pictures), 8, labels, scale=max(1, 128 // side))
