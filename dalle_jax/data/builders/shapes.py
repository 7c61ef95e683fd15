"""The TFDS set `shapes`: captioned scenes of `dalle_jax.data.scenes`, stored as array_record.

`prepare` writes DATA_DIR/shapes/32px/1.0.0 and returns at once if it exists. It passes pictures to
TFDS as PNG bytes, because TFDS would encode arrays with TensorFlow.
"""

import dataclasses
import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import tensorflow_datasets as tfds

from dalle_jax.data import scenes
from dalle_jax.data.builders import rendering, store
from dalle_jax.types import UsageError

_IDENTITY = ("image_px", "num_train", "num_eval", "seed", "kinds")
_ALL_KINDS = ",".join(scenes.KINDS)


@dataclasses.dataclass
class ShapesConfig(tfds.core.BuilderConfig):
    """The arguments that the pictures are a function of; the config's name is their size, 32px."""

    image_px: int = 32
    num_train: int = 30_000
    num_eval: int = 800
    seed: int = 0
    kinds: str = _ALL_KINDS  # of scenes in the train split, with commas


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Captioned shapes: splits train, validation, and held_out (only held-out combinations)."""

    VERSION = tfds.core.Version("1.0.0")

    # Set by `prepare` before building; neither changes a byte of the result.
    processes = None  # from rendering.pool
    progress: store.Progress

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
                    "scene": tfds.features.Text(),  # JSON: data.scenes.Scene.from_json
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
        return {name: self._generate_examples(name, size) for name, size in sizes.items()}

    def _generate_examples(self, split: str, num: int):
        config = self.builder_config
        examples = rendering.render_examples(
            num,
            self.processes,
            split=split,
            seed=config.seed,
            image_px=config.image_px,
            kinds=config.kinds.split(",") if split == "train" else scenes.KINDS,
        )
        for index, example in enumerate(examples):
            self.progress.add()
            yield (
                index,
                {
                    "image": io.BytesIO(example.png),
                    "captions": [example.caption],
                    "id": example.id,
                    "scene": example.scene,
                },
            )


def prepare(
    data_dir: str | pathlib.Path,
    image_px: int = 32,
    num_train: int = 30_000,
    num_eval: int = 800,
    seed: int = 0,
    workers: int = 1,
    kinds: Sequence[str] = scenes.KINDS,
    stream: Any = None,
) -> pathlib.Path:
    """Renders and stores the set unless it exists; returns its version folder.

    A set whose writing was interrupted does not exist, and is rendered again.

    Args:
      data_dir: the set goes to DATA_DIR/shapes/<image_px>px/1.0.0.
      image_px: side of the pictures, at least 8; 32 or more can be judged.
      num_train: pictures of the train split.
      num_eval: pictures of validation, and as many of held_out.
      seed: of all random choices.
      workers: processes that render. The bytes are the same for any number; with more than one the
        calling program must be importable (`if __name__ == "__main__":`).
      kinds: of scenes in the train split, in turn; a kind that is named twice gets twice as many
        scenes. Validation and held_out have all kinds in equal parts.
      stream: text stream for progress; stderr by default.

    Raises:
      UsageError: for sizes below the least, an unknown kind, or if the folder holds a set with
        other arguments.
    """
    arguments = dict(image_px=image_px, num_train=num_train, num_eval=num_eval, seed=seed)
    for name, least in (("image_px", 8), ("num_train", 1), ("num_eval", 1), ("seed", 0)):
        if arguments[name] < least:
            raise UsageError(f"{name} is {arguments[name]}; the shapes set needs at least {least}.")
    if not kinds or set(kinds) - set(scenes.KINDS):
        raise UsageError(
            f"kinds is {','.join(kinds)!r}; expected one or more of {_ALL_KINDS}, with commas."
        )
    arguments["kinds"] = ",".join(kinds)
    path = pathlib.Path(data_dir) / "shapes" / f"{image_px}px" / str(Shapes.VERSION)
    if path.is_dir():
        _check_same(path, arguments)
        return path
    progress = store.Progress(num_train + 2 * num_eval, "pictures", stream)
    with store.quiet_tfds(), rendering.pool(workers) as processes:
        config = ShapesConfig(name=f"{image_px}px", **arguments)
        builder = Shapes(data_dir=str(data_dir), config=config, file_format="array_record")
        builder.processes, builder.progress = processes, progress
        builder.download_and_prepare()
    progress.close()
    return path


def _check_same(path: pathlib.Path, arguments: dict[str, int | str]) -> None:
    # A set that an older version wrote has no `kinds` and holds all of them.
    stored = {"kinds": _ALL_KINDS} | json.loads((path / "metadata.json").read_text())
    for name, value in arguments.items():
        if stored.get(name) != value:
            raise UsageError(
                f"{path} was prepared with {name}={stored.get(name)}, not {value}; delete "
                f"that folder, use another --data_dir, or ask for {name}={stored.get(name)}."
            )


def scene_of(record: dict) -> scenes.Scene:
    """The scene of a stored record (`as_data_source` gives text as bytes)."""
    text = record["scene"]
    return scenes.Scene.from_json(text.decode() if isinstance(text, bytes) else text)
