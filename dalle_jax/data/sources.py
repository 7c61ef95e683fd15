"""Random access to the examples of any prepared TFDS set, without TensorFlow.

`open_split` opens the set that a config's data section names and returns its examples by number;
`dalle_jax.data.pipeline` orders, decodes and batches them. Nothing here decodes a picture.
"""

import json
import pathlib
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from dalle_jax.data import catalogue, records
from dalle_jax.data.records import Example
from dalle_jax.types import UsageError

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_SIZED = re.compile(r"(\d+)px")


def find_set(data_config: Any) -> pathlib.Path:
    """The version folder (it holds features.json) that `data_config.source` names.

    A source is a folder, or a name under data_dir: `shapes`, `shapes/32px`, `coco_captions/2014`,
    each optionally with `/1.0.0`. The newest version is chosen, and of several prepared sizes the
    one called `<image_px>px`.

    Raises:
      UsageError: if there is no such set, or several and none has the config's size.
    """
    source, data_dir = str(data_config.source), pathlib.Path(data_config.data_dir)
    if not source:
        raise UsageError(
            "data.source is empty; name a prepared set (shapes, emoji, …) or a folder."
        )
    for root in (data_dir / source, pathlib.Path(source)):
        if root.is_dir():
            folders = version_folders(root)
            if folders:
                return _choose(folders, root, data_config)
    raise UsageError(
        f"data.source {source!r} is not a prepared set: neither {data_dir / source} nor the folder "
        f"{source} holds one. Sets under {data_dir}: {records.listed(prepared_sets(data_dir))}. "
        f"Prepare it with: {prepare_command(data_config)}"
    )


def prepared_sets(data_dir: str | pathlib.Path) -> list[str]:
    """Names of the prepared sets under data_dir, with their config: `shapes/32px`."""
    data_dir = pathlib.Path(data_dir)
    features = [*data_dir.glob("*/*/features.json"), *data_dir.glob("*/*/*/features.json")]
    folders = {p.parent.parent for p in features if _VERSION.fullmatch(p.parent.name)}
    return sorted(p.relative_to(data_dir).as_posix() for p in folders)


def prepare_command(data_config: Any) -> str:
    """The command that prepares the set which `data_config` names, for error messages."""
    name = str(data_config.source).split("/")[0]
    command, folder = "python -m dalle_jax prepare", f"--data_dir={data_config.data_dir}"
    if name in ("shapes", "emoji"):
        return f"{command} {name} {folder} --image_px={data_config.image_px}"
    if name in catalogue.STOCK:
        return f"{command} tfds --name={name} {folder}"
    name = name if re.fullmatch(r"[a-z]\w*", name) else "NAME"
    return f"{command} pairs --from=folder --input=YOUR_FOLDER --name={name} {folder}"


class Source:
    """The examples of one split: `len(source)`, `source[i]`. Safe to share between threads.

    array_record reads by position from several threads at once (its reader has no cursor), and
    decoding a record is a pure function, so threads need neither a lock nor a source each.
    """

    def __init__(self, path: pathlib.Path, split: str, layout: records.Layout, builder: Any):
        """Opens the split; call `open_split` instead."""
        import tensorflow_datasets as tfds

        self.path = path
        self.split = split
        self.fields = layout.fields
        self._layout = layout
        self._records = builder.as_data_source(
            split, decoders={key: tfds.decode.SkipDecoding() for key in layout.raw_images}
        )
        instructions = builder.info.splits[split].file_instructions
        self._files = [(pathlib.Path(i.filename).name, i.skip) for i in instructions]
        self._ends = list(accumulate(i.take for i in instructions))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        """Example `index` in [0, len); IndexError outside.

        Raises:
          ValueError: if the stored record itself is damaged.
        """
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {self.path} {self.split}, which has {len(self)}")
        return self._layout.example(self._records[index], self._position(index))

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Examples read in one call: 0.15 ms each, against 0.8 ms one by one (array_record).

        Raises:
          ValueError: if any of the records is damaged.
        """
        examples = self._records.__getitems__(list(indices))
        return [
            self._layout.example(record, self._position(index))
            for record, index in zip(examples, indices, strict=True)
        ]

    def _position(self, index: int) -> str:
        """`file[position]`: the id of a record that stores none, the same in every sub-split."""
        file = bisect_right(self._ends, index)
        first = self._ends[file - 1] if file else 0
        name, skip = self._files[file]
        return f"{name}[{index - first + skip}]"


def open_split(data_config: Any, split: str) -> Source:
    """Random access to `split` ("train", "train[:99%]", "train+validation") of the config's set.

    Args:
      data_config: the `data` section of a config (configs/base.py): source, data_dir, image_px,
        image_key, caption_key, label_template are read.
      split: a TFDS split expression.

    Raises:
      UsageError: if the set, the split or a key does not exist, if the split is empty, or if the
        set is stored as tfrecord.
    """
    import tensorflow_datasets as tfds

    path = find_set(data_config)
    _check_features(path)
    try:
        builder = tfds.builder_from_directory(path)
        file_format = builder.info.file_format.value
    except (ValueError, KeyError, AttributeError, OSError) as error:
        raise UsageError(
            f"{path} is damaged: its description cannot be read ({first_line(error)}). Delete the "
            f"folder and prepare it again: {prepare_command(data_config)}"
        ) from error
    if file_format not in ("array_record", "parquet"):
        raise UsageError(
            f"{path} is stored as {file_format}, which has no random access. Convert it once: "
            f"python -m dalle_jax prepare tfds --input={path} --data_dir={data_config.data_dir}"
        )
    layout = records.Layout.of(builder.info.features, path, data_config)
    known = sorted(builder.info.splits)
    try:
        count = builder.info.splits[split].num_examples
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"split {split!r} of {path} cannot be read ({first_line(error)}); it has "
            f"{records.listed(known)}, and parts such as '{known[0] if known else 'train'}[:99%]'."
        ) from error
    if not count:
        splits = records.listed(known)
        raise UsageError(f"split {split!r} of {path} holds no example; it has {splits}.")
    try:
        return Source(path, split, layout, builder)
    except OSError as error:
        raise UsageError(
            f"the files of {path} are incomplete ({first_line(error)}). Delete the folder and "
            f"prepare it again: {prepare_command(data_config)}"
        ) from error


def _check_features(path: pathlib.Path) -> None:
    """Refuses a description that would make TFDS import classes from outside its own package."""
    try:
        described = json.loads((path / "features.json").read_text())
    except (OSError, ValueError):
        return  # TFDS reports the damage
    names: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            for key in ("pythonClassName", "python_class_name"):
                if key in value:
                    names.add(str(value[key]))
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, dict | list):
                collect(item)

    collect([described])
    foreign = sorted(name for name in names if not name.startswith("tensorflow_datasets."))
    if foreign:
        raise UsageError(
            f"{path / 'features.json'} names classes outside of tensorflow_datasets "
            f"({', '.join(foreign)}), and reading it would import them; expected a set of plain "
            "TFDS features: prepare its pictures again, e.g. with `prepare pairs`."
        )


def version_folders(root: pathlib.Path) -> list[pathlib.Path]:
    """The newest version folder of each config, at `root` or up to two levels below."""
    for pattern in ("features.json", "*/features.json", "*/*/features.json"):
        folders = [p.parent for p in root.glob(pattern)]
        folders = [p for p in folders if p == root or _VERSION.fullmatch(p.name)]
        newest: dict[pathlib.Path, pathlib.Path] = {}
        for folder in sorted(folders, key=lambda p: _numbers(p.name)):
            newest[folder.parent] = folder
        if newest:
            return sorted(newest.values())
    return []


def _choose(folders: list[pathlib.Path], root: pathlib.Path, data_config: Any) -> pathlib.Path:
    """The only folder, or the one with the config's image size."""
    size = f"{data_config.image_px}px"
    exact = [p for p in folders if p.parent.name == size]
    names = [p.parent.relative_to(root.parent).as_posix() for p in folders]
    if not exact:
        exact = [p for p in folders if p.parent.name == "original"]  # stored at full size
    if exact:
        return exact[0]
    if len(folders) > 1:
        raise UsageError(
            f"data.source {data_config.source!r} is prepared as {records.listed(names)}, and none "
            f"is {size} (data.image_px); set --config.data.source={names[0]}, or prepare it: "
            f"{prepare_command(data_config)}"
        )
    stored = _SIZED.fullmatch(folders[0].parent.name)
    if stored and int(stored[1]) < data_config.image_px:
        raise UsageError(
            f"data.image_px is {data_config.image_px}, but {names[0]} was stored at {stored[1]} "
            f"pixels and would only be enlarged; set --config.data.image_px={stored[1]}, or "
            f"prepare it larger: {prepare_command(data_config)}"
        )
    return folders[0]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version))


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for another message."""
    text = json.dumps(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0][:200].strip('"')
