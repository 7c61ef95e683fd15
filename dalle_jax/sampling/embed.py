"""CLIP embeddings of captions and pictures on the host, in chunks of one shape.

Called by `sampling.unclip` and `sampling.manipulate`; training embeds inside the step.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.models import clip as clip_model
from dalle_jax.stages import run
from dalle_jax.types import Array

MAX_CHUNK = 64


def texts(clip: run.ClipStage, text: Array) -> np.ndarray:
    """CLIP text embeddings [B, E] of captions [B, T] int32; each distinct caption runs once."""
    captions, which = np.unique(np.asarray(text, np.int32), axis=0, return_inverse=True)
    return _apply(clip, "encode_text", captions)[which.reshape(-1)]


def images(clip: run.ClipStage, pictures: Array) -> np.ndarray:
    """CLIP image embeddings [B, E] of pictures [B, h, h, 3] in [-1, 1], resized to its size."""
    return _apply(clip, "encode_image", np.asarray(pictures, np.float32))


def _apply(clip: run.ClipStage, method: str, rows: np.ndarray) -> np.ndarray:
    """A CLIP tower on rows, in chunks of one shape."""
    size = min(MAX_CHUNK, 1 << (len(rows) - 1).bit_length())
    parts = []
    for start in range(0, len(rows), size):
        some = np.minimum(np.arange(start, start + size), len(rows) - 1)
        part = _tower(clip.model, method)(clip.on(), rows[some])
        parts.append(np.asarray(part)[: len(rows) - start])
    return np.concatenate(parts)


@functools.lru_cache(maxsize=8)
def _tower(model: clip_model.Clip, method: str):
    def apply(params, x):
        px = model.config.image_px
        if method == "encode_image" and x.shape[1:3] != (px, px):
            x = jax.image.resize(x, (len(x), px, px, 3), "cubic", antialias=True)
            x = jnp.clip(x, -1, 1)
        return model.apply({"params": params}, x, method=method)

    return jax.jit(apply)
