"""Random access to the examples of any prepared TFDS set, without TensorFlow.

`open_split` finds the set that a config's data section names and gives examples by number;
`dalle_jax.data.pipeline` decides the order, decodes and batches. Nothing here decodes a picture.
"""

import dataclasses
import json
import pathlib
import re
import string
from bisect import bisect_right
from itertools import accumulate
from typing import Any

import numpy as np

from dalle_jax.data import stock
from dalle_jax.types import UsageError

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_SIZED = re.compile(r"(\d+)px")
# What the sets that `prepare` writes call their features; also the config's defaults.
_OWN_KEYS = ("image", "captions")


@dataclasses.dataclass(frozen=True)
class Example:
    """One record as stored.

    Attributes:
      id: the same for a record in every split, sub-split, process and run.
      image: encoded bytes (PNG, JPEG, WebP), uint8 [h, w, C] for sets that store raw pixels,
        or None for sets of codes.
      captions: at least one string, possibly empty, for sets with text.
      codes: [g*g] int32 in raster order, or None.
      scene: JSON of the scene that was drawn (shapes only), or None.
    """

    id: str
    image: bytes | np.ndarray | None
    captions: list[str]
    codes: np.ndarray | None = None
    scene: str | None = None


def find_set(data_config: Any) -> pathlib.Path:
    """The version folder (it holds features.json) that `data_config.source` names.

    A source is a folder, or a name under data_dir: `shapes`, `shapes/32px`, `coco_captions/2014`,
    each optionally with `/1.0.0`; the newest version is taken. Of several prepared sizes the one
    called `<image_px>px` is taken.

    Raises:
      UsageError: if there is none, or several and nothing to choose by.
    """
    source, data_dir = str(data_config.source), pathlib.Path(data_config.data_dir)
    if not source:
        raise UsageError(
            "data.source is empty; name a prepared set (shapes, emoji, …) or a folder."
        )
    for root in (data_dir / source, pathlib.Path(source)):
        if root.is_dir():
            found = version_folders(root)
            if found:
                return _choose(found, root, data_config)
    raise UsageError(
        f"data.source {source!r} is not a prepared set: neither {data_dir / source} nor the folder "
        f"{source} holds one. Found under {data_dir}: {_listed(prepared_sets(data_dir))}. "
        f"Prepare it with: {prepare_command(data_config)}"
    )


def prepared_sets(data_dir: str | pathlib.Path) -> list[str]:
    """Names of the prepared sets under data_dir, with their config: `shapes/32px`."""
    data_dir = pathlib.Path(data_dir)
    features = [*data_dir.glob("*/*/features.json"), *data_dir.glob("*/*/*/features.json")]
    folders = {p.parent.parent for p in features if _VERSION.fullmatch(p.parent.name)}
    return sorted(p.relative_to(data_dir).as_posix() for p in folders)


def prepare_command(data_config: Any) -> str:
    """The command that would prepare what `data_config` names, for error messages."""
    name = str(data_config.source).split("/")[0]
    command, where = "python -m dalle_jax prepare", f"--data_dir={data_config.data_dir}"
    if name in ("shapes", "emoji"):
        return f"{command} {name} {where} --image_px={data_config.image_px}"
    if name in stock.STOCK:
        return f"{command} tfds --name={name} {where}"
    name = name if re.fullmatch(r"[a-z]\w*", name) else "NAME"
    return f"{command} pairs --from=folder --input=YOUR_FOLDER --name={name} {where}"


class Source:
    """The examples of one split: `len(source)`, `source[i]`. Safe to share between threads.

    array_record reads by position from several threads at once (its reader keeps no cursor), and
    decoding of the record is a pure function, so no lock and no source per thread is needed.
    """

    def __init__(self, path: pathlib.Path, split: str, layout: "_Layout", builder: Any):
        """Opens; `open_split` is the way in."""
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

    def _position(self, index: int) -> str:
        """`file[position]`: the name of a record that has no id, equal in every sub-split."""
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
      UsageError: if the set, the split or a key is not there, if the split is empty, or if the
        set is stored as tfrecord.
    """
    import tensorflow_datasets as tfds

    path = find_set(data_config)
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
    layout = _Layout.of(builder.info.features, path, data_config)
    known = sorted(builder.info.splits)
    try:
        count = builder.info.splits[split].num_examples
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"split {split!r} of {path} cannot be read ({first_line(error)}); it has "
            f"{_listed(known)}, and parts such as '{known[0] if known else 'train'}[:99%]'."
        ) from error
    if not count:
        raise UsageError(f"split {split!r} of {path} holds no example; it has {_listed(known)}.")
    try:
        return Source(path, split, layout, builder)
    except OSError as error:
        raise UsageError(
            f"the files of {path} are incomplete ({first_line(error)}). Delete the folder and "
            f"prepare it again: {prepare_command(data_config)}"
        ) from error


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Which features become which fields of an Example, checked against the set once."""

    image: list[str] | None
    caption: list[str] | None
    template: str
    label_names: dict[str, list[str] | None]  # template field -> names, None for plain numbers
    raw_images: tuple[str, ...]
    extras: frozenset[str]  # of id, codes, scene: those that the set has

    @property
    def fields(self) -> frozenset[str]:
        """Of image, text, codes: what examples of this set hold."""
        has_text = self.caption is not None or bool(self.template)
        pairs = (("image", self.image is not None), ("text", has_text))
        return frozenset([*(k for k, there in pairs if there), *(self.extras & {"codes"})])

    @staticmethod
    def of(features: Any, path: pathlib.Path, data_config: Any) -> "_Layout":
        import tensorflow_datasets as tfds

        name = next((part for part in reversed(path.parts) if part in stock.STOCK), "")
        known = stock.STOCK.get(name, stock.Stock(*_OWN_KEYS))
        extras = frozenset(key for key in ("id", "codes", "scene") if key in features)

        def key_of(field: str, wanted: str, default: str) -> list[str] | None:
            # A stock set is found by its own keys while the config still says `image`, `captions`.
            for key in (wanted, default if wanted in _OWN_KEYS else ""):
                if key and _has(features, key.split("/")):
                    return key.split("/")
            if not wanted or "codes" in extras:
                return None
            raise UsageError(
                f"data.{field} {wanted!r} is not a feature of {path}; it has "
                f"{_listed(_paths(features))}. Set --config.data.{field}=… ([] is any element)"
                + (
                    ", or data.label_template for a labelled set."
                    if field == "caption_key"
                    else "."
                )
            )

        template = data_config.label_template
        if not template and not _has(features, data_config.caption_key.split("/")):
            template = known.label_template
        labels = {}
        for field in _template_fields(template):
            if field not in features:
                raise UsageError(
                    f"data.label_template {template!r} uses {{{field}}}; {path} has "
                    f"{_listed(_paths(features))}."
                )
            is_label = isinstance(features[field], tfds.features.ClassLabel)
            labels[field] = list(features[field].names) if is_label else None
        image = key_of("image_key", data_config.image_key, known.image_key)
        caption = None
        if not template:
            caption = key_of("caption_key", data_config.caption_key, known.caption_key)
        images = (tfds.features.Image, tfds.features.LabeledImage)
        raw = tuple(k for k in features if isinstance(features[k], images))
        return _Layout(image, caption, template, labels, raw, extras)

    def example(self, record: dict[str, Any], position: str) -> Example:
        if self.template:
            values = {}
            for field, names in self.label_names.items():
                value = np.asarray(record[field]).item()
                values[field] = names[value].replace("_", " ") if names else _text(value)
            captions = [self.template.format(**values)]
        else:
            captions = [_text(v) for v in _leaves(record, self.caption)] if self.caption else []
        image = next(iter(_leaves(record, self.image)), None) if self.image else None
        if isinstance(image, np.ndarray) and image.ndim == 4:  # a list of pictures of one size
            image = image[0]
        codes = record["codes"] if "codes" in self.extras else None
        return Example(
            id=_text(record["id"]) if "id" in self.extras else position,
            image=image,
            captions=captions or [""],
            codes=None if codes is None else np.asarray(codes, np.int32).reshape(-1),
            scene=_text(record["scene"]) if "scene" in self.extras else None,
        )


def version_folders(root: pathlib.Path) -> list[pathlib.Path]:
    """Version folders at, one or two levels below `root`: the newest of each config."""
    for pattern in ("features.json", "*/features.json", "*/*/features.json"):
        folders = [p.parent for p in root.glob(pattern)]
        folders = [p for p in folders if p == root or _VERSION.fullmatch(p.name)]
        newest: dict[pathlib.Path, pathlib.Path] = {}
        for folder in sorted(folders, key=lambda p: _numbers(p.name)):
            newest[folder.parent] = folder
        if newest:
            return sorted(newest.values())
    return []


def _choose(found: list[pathlib.Path], root: pathlib.Path, data_config: Any) -> pathlib.Path:
    """The one config, or the one of the config's image size."""
    wanted = f"{data_config.image_px}px"
    exact = [p for p in found if p.parent.name == wanted]
    names = [p.parent.relative_to(root.parent).as_posix() for p in found]
    if not exact:
        exact = [p for p in found if p.parent.name == "original"]  # kept at full size
    if exact:
        return exact[0]
    if len(found) > 1:
        raise UsageError(
            f"data.source {data_config.source!r} is prepared as {_listed(names)}, and none is "
            f"{wanted} (data.image_px); set --config.data.source={names[0]}, or prepare it: "
            f"{prepare_command(data_config)}"
        )
    size = _SIZED.fullmatch(found[0].parent.name)
    if size and int(size[1]) < data_config.image_px:
        raise UsageError(
            f"data.image_px is {data_config.image_px}, but {names[0]} was stored at {size[1]} "
            f"pixels and would only be blown up; set --config.data.image_px={size[1]}, or prepare "
            f"it larger: {prepare_command(data_config)}"
        )
    return found[0]


def _inner(feature: Any) -> Any:
    """The element of a sequence feature; the feature itself otherwise."""
    return feature.feature if hasattr(feature, "feature") else feature


def _has(features: Any, path: list[str]) -> bool:
    """Whether `path` ends at a leaf (or a list of leaves) of a feature tree."""
    for key in path:
        if key == "[]":
            if not hasattr(features, "feature"):
                return False
            features = features.feature
        elif not hasattr(features, "feature") and hasattr(features, "keys") and key in features:
            features = features[key]
        else:
            return False
    # coco_captions' `captions` is a list of dictionaries: the text is one level further.
    return not hasattr(_inner(features), "keys")


def _paths(features: Any, prefix: str = "") -> list[str]:
    """Every key path of a feature tree: what an error message lists."""
    if hasattr(features, "feature"):
        inner = _paths(features.feature, f"{prefix}/[]")
        return inner or [f"{prefix}/[]"]
    if hasattr(features, "keys"):
        join = f"{prefix}/" if prefix else ""
        return [p for k in features for p in (_paths(features[k], f"{join}{k}") or [f"{join}{k}"])]
    return [prefix] if prefix else []


def _leaves(value: Any, path: list[str]) -> list[Any]:
    """Values at `path` of a decoded record, flattened.

    tfds turns a list of dictionaries into a dictionary of lists, so `[]` is not a level of its
    own: a list is entered wherever one is met.
    """
    path = [key for key in path if key != "[]"]
    if path and isinstance(value, dict):
        return _leaves(value[path[0]], path[1:])
    if isinstance(value, (list, tuple)) or (
        isinstance(value, np.ndarray) and value.dtype == object
    ):
        return [leaf for item in value for leaf in _leaves(item, path)]
    if hasattr(value, "flat_values"):  # a ragged list of lists
        return [leaf for item in np.asarray(value.flat_values) for leaf in _leaves(item, path)]
    return [value]


def _template_fields(template: str) -> list[str]:
    try:
        fields = [
            field for _, field, _, _ in string.Formatter().parse(template) if field is not None
        ]
    except ValueError as error:
        raise UsageError(f"data.label_template {template!r} is not a template: {error}.") from error
    for field in fields:
        # Attributes and items are refused: a template is data, not an expression.
        if not re.fullmatch(r"\w+", field):
            raise UsageError(
                f"data.label_template {template!r} holds {{{field}}}; only names of features such "
                "as {label} may stand in braces."
            )
    return fields


def _text(value: Any) -> str:
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version))


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a message of our own."""
    text = json.dumps(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0][:200].strip('"')


def _listed(names: Any) -> str:
    return ", ".join(str(n) for n in names) or "nothing"
