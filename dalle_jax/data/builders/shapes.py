"""The TFDS set `shapes`: captioned scenes of `dalle_jax.data.scenes`, stored as array_record.

`prepare` writes DATA_DIR/shapes/32px/1.0.0 and returns at once when it is there. No TensorFlow:
pictures are handed over as PNG bytes, since TFDS would encode arrays with tf.image.
"""

import contextlib
import dataclasses
import io
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

import tensorflow_datasets as tfds
from absl import logging

from dalle_jax.data import scenes
from dalle_jax.data.builders import rendering
from dalle_jax.types import UsageError

_REPORT_SECONDS = 2.0
_IDENTITY = ("image_px", "num_train", "num_eval", "seed", "kinds")
_ALL_KINDS = ",".join(scenes.KINDS)


@dataclasses.dataclass
class ShapesConfig(tfds.core.BuilderConfig):
    """What the pictures are a function of; the config's name is their size, "32px"."""

    image_px: int = 32
    num_train: int = 30_000
    num_eval: int = 800
    seed: int = 0
    kinds: str = _ALL_KINDS  # of the train split, with commas


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Captioned shapes: splits train, validation, and held_out (only held-out combinations)."""

    VERSION = tfds.core.Version("1.0.0")

    # Set by `prepare` before building; neither changes a byte of the result.
    processes = None  # of rendering.pool
    report: Callable[[str], None] | None = None

    def _info(self) -> tfds.core.DatasetInfo:
        px = self.builder_config.image_px
        return tfds.core.DatasetInfo(
            builder=self,
            description="Procedural captioned shapes: single, count, binding and relation scenes.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(px, px, 3), encoding_format="png"),
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                    "id": tfds.features.Text(),
                    "scene": tfds.features.Text(),  # JSON: data.shapes.Scene.from_json
                }
            ),
            supervised_keys=None,
            disable_shuffling=True,  # stored in order of index; the pipeline shuffles
            metadata=tfds.core.MetadataDict(
                {name: getattr(self.builder_config, name) for name in _IDENTITY}
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        config = self.builder_config
        sizes = {name: config.num_eval for name in rendering.HELD_OUT} | {"train": config.num_train}
        progress = _Progress(sum(sizes.values()), self.report)
        return {
            name: self._generate_examples(name, sizes[name], progress) for name in rendering.HELD_OUT
        }

    def _generate_examples(self, split: str, num: int, progress: "_Progress"):
        config = self.builder_config
        drawn = rendering.draw_examples(
            num,
            self.processes,
            split=split,
            seed=config.seed,
            image_px=config.image_px,
            kinds=config.kinds.split(",") if split == "train" else scenes.KINDS,
        )
        for index, example in enumerate(drawn):
            progress.add_one()
            yield (
                index,
                {
                    "image": io.BytesIO(example.png),
                    "captions": [example.caption],
                    "id": example.id,
                    "scene": example.scene,
                },
            )


def to_stderr(line: str) -> None:
    """The default progress report."""
    print(line, file=sys.stderr, flush=True)


def prepare(
    data_dir: str | pathlib.Path,
    image_px: int = 32,
    num_train: int = 30_000,
    num_eval: int = 800,
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[str], None] | None = to_stderr,
    kinds: Sequence[str] = scenes.KINDS,
) -> pathlib.Path:
    """Draws and stores the set unless it is there; returns its version folder.

    A set whose writing was interrupted does not count as there and is drawn again.

    Args:
      data_dir: the set goes to DATA_DIR/shapes/<image_px>px/1.0.0.
      image_px: side of the pictures, at least 8; 32 or more can be judged.
      num_train: pictures of the train split.
      num_eval: pictures of validation and of held_out, each.
      seed: of everything drawn.
      workers: processes that draw. The bytes are the same for any number; with more than one the
        calling program must be importable (`if __name__ == "__main__":`).
      progress: called with a line of text every two seconds; None is silent.
      kinds: of the scenes of the train split, which take turns; one that is named more often gets
        more of them. Validation and held_out have all kinds in equal parts.

    Raises:
      UsageError: for sizes below the least, an unknown kind, or if the folder holds a set of other
        arguments.
    """
    wanted = dict(image_px=image_px, num_train=num_train, num_eval=num_eval, seed=seed)
    for name, least in (("image_px", 8), ("num_train", 1), ("num_eval", 1), ("seed", 0)):
        if wanted[name] < least:
            raise UsageError(f"{name} is {wanted[name]}; the shapes set needs at least {least}.")
    if not kinds or set(kinds) - set(scenes.KINDS):
        raise UsageError(
            f"kinds is {','.join(kinds)!r}; expected one or more of {_ALL_KINDS}, with commas."
        )
    wanted["kinds"] = ",".join(kinds)
    path = pathlib.Path(data_dir) / "shapes" / f"{image_px}px" / str(Shapes.VERSION)
    if path.is_dir():
        _check_same(path, wanted)
        return path
    tfds.disable_progress_bar()  # a bar for each shard; `progress` says more
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # TFDS warns of every config made at run time
    try:
        # TFDS prints what it does to stdout, which belongs to the results of commands.
        with contextlib.redirect_stdout(io.StringIO()), rendering.pool(workers) as processes:
            config = ShapesConfig(name=f"{image_px}px", **wanted)
            builder = Shapes(data_dir=str(data_dir), config=config, file_format="array_record")
            builder.processes, builder.report = processes, progress
            builder.download_and_prepare()
    finally:
        logging.set_verbosity(verbosity)
    return path


class _Progress:
    """Counts examples over all splits and reports rate and time left."""

    def __init__(self, total: int, report: Callable[[str], None] | None):
        self._total, self._report, self._done = total, report, 0
        self._start = self._last = time.monotonic()

    def add_one(self) -> None:
        self._done += 1
        now = time.monotonic()
        finished = self._done == self._total
        if self._report is None or (now - self._last < _REPORT_SECONDS and not finished):
            return
        self._last = now
        rate = self._done / max(now - self._start, 1e-9)
        left = f"{(self._total - self._done) / rate:.0f} s left"
        self._report(
            f"shapes: {self._done:,} of {self._total:,} pictures, {rate:,.0f}/s, "
            f"{f'{now - self._start:.0f} s' if finished else left}"
        )


def _check_same(path: pathlib.Path, wanted: dict[str, int | str]) -> None:
    # A set from before there were `kinds` has all of them.
    stored = {"kinds": _ALL_KINDS} | json.loads((path / "metadata.json").read_text())
    for name, value in wanted.items():
        if stored.get(name) != value:
            raise UsageError(
                f"{path} was prepared with {name}={stored.get(name)}, asked is {value}; delete "
                f"that folder, use another --data_dir, or ask for {name}={stored.get(name)}."
            )


def scene_of(record: dict) -> scenes.Scene:
    """The scene of a stored record (`as_data_source` gives text as bytes)."""
    text = record["scene"]
    return scenes.Scene.from_json(text.decode() if isinstance(text, bytes) else text)
