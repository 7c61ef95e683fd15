"""Renders the stored examples of the shapes set, in this process or in several.

A file of its own beside the TFDS builder, so that a rendering process imports only numpy and
Pillow.
"""

import contextlib
import functools
import io
import multiprocessing
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from PIL import Image

from dalle_jax.data import scenes

# Examples handed out at a time: a bound on the memory (64 MB of 256 px PNG) that finished examples
# need when the rendering processes are faster than the writer.
_BLOCK, _CHUNK = 4096, 64
HELD_OUT = {"train": "exclude", "validation": "exclude", "held_out": "only"}


class StoredExample(NamedTuple):
    """One example as stored: its id, the PNG, the caption and the scene as JSON."""

    id: str
    png: bytes
    caption: str
    scene: str


def render_example(
    index: int, *, split: str, seed: int, image_px: int, kinds: Sequence[str] = scenes.KINDS
) -> StoredExample:
    """Example `index` of a split: a function of its arguments; `kinds` take turns."""
    rng = scenes.example_rng(seed, split, index)
    kind = kinds[index % len(kinds)]
    scene = scenes.sample_scene(rng, kind, HELD_OUT[split])
    png = io.BytesIO()
    Image.fromarray(scenes.render(scene, image_px)).save(png, "PNG")
    return StoredExample(f"{split}-{index:07d}", png.getvalue(), scene.caption, scene.to_json())


@contextlib.contextmanager
def pool(workers: int):
    """A pool of processes for `render_examples`; None, which renders here, for 0 or 1 workers.

    The processes are spawned, never forked: the caller may hold JAX's threads.
    """
    if workers <= 1:
        yield None
    else:
        with multiprocessing.get_context("spawn").Pool(workers) as processes:
            yield processes


def render_examples(num: int, processes, **example) -> Iterator[StoredExample]:
    """The first `num` examples of a split in order; the same bytes with any number of processes.

    Args:
      num: how many.
      processes: from `pool`.
      **example: split, seed and image_px of `render_example`.
    """
    render = functools.partial(render_example, **example)
    if processes is None:
        yield from map(render, range(num))
    else:
        for start in range(0, num, _BLOCK):
            yield from processes.imap(render, range(start, min(start + _BLOCK, num)), _CHUNK)
