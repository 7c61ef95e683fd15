"""Turns records of any TFDS set into `Example`s, whatever the set calls its features.

A `Layout` is checked once against a set's features and a config's keys, and refuses keys that do
not fit; then it converts every decoded record to an Example.
"""

import dataclasses
import pathlib
import re
import string
from collections.abc import Iterable
from typing import Any

import numpy as np

from dalle_jax.data import catalogue
from dalle_jax.types import UsageError

# Feature names of the sets that `prepare` writes; also the config's defaults.
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
      scene: JSON of the rendered scene (shapes only), or None.
    """

    id: str
    image: bytes | np.ndarray | None
    captions: list[str]
    codes: np.ndarray | None = None
    scene: str | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which features become which fields of an Example, for one set.

    Attributes:
      image: path of the picture, or None.
      caption: path of the captions, or None.
      template: caption with names of features in braces, or "".
      label_names: template field -> names of its classes, None for plain numbers.
      raw_images: features to read as encoded bytes.
      extras: those of id, codes and scene that the set has.
    """

    image: list[str] | None
    caption: list[str] | None
    template: str
    label_names: dict[str, list[str] | None]
    raw_images: tuple[str, ...]
    extras: frozenset[str]

    @property
    def fields(self) -> frozenset[str]:
        """The fields of a batch that this set can fill, some of image, text, codes."""
        has_text = self.caption is not None or bool(self.template)
        pairs = (("image", self.image is not None), ("text", has_text))
        return frozenset([*(k for k, is_held in pairs if is_held), *(self.extras & {"codes"})])

    @staticmethod
    def of(features: Any, path: pathlib.Path, data_config: Any) -> "Layout":
        """The layout of the set at `path` for a config's data section.

        Raises:
          UsageError: for a key or a template field that is not a feature of the set.
        """
        import tensorflow_datasets as tfds

        name = next((part for part in reversed(path.parts) if part in catalogue.STOCK), "")
        known = catalogue.STOCK.get(name, catalogue.Stock(*_OWN_KEYS))
        extras = frozenset(key for key in ("id", "codes", "scene") if key in features)

        def key_of(field: str, value: str, default: str) -> list[str] | None:
            # A stock set is read by its own keys unless the config overrides `image`, `captions`.
            for key in (value, default if value in _OWN_KEYS else ""):
                if key and _has(features, key.split("/")):
                    return key.split("/")
            if not value or "codes" in extras:
                return None
            raise UsageError(
                f"data.{field} {value!r} is not a feature of {path}; it has "
                f"{listed(_paths(features))}. Set --config.data.{field}=… ([] is any element"
                + ("; '' is none) or data.label_template." if field == "caption_key" else ").")
            )

        template = data_config.label_template
        if not template and not _has(features, data_config.caption_key.split("/")):
            template = known.label_template
        labels = {}
        for field in _template_fields(template):
            if field not in features:
                raise UsageError(
                    f"data.label_template {template!r} uses {{{field}}}; {path} has "
                    f"{listed(_paths(features))}."
                )
            is_label = isinstance(features[field], tfds.features.ClassLabel)
            labels[field] = list(features[field].names) if is_label else None
        image = key_of("image_key", data_config.image_key, known.image_key)
        caption = None
        if not template:
            caption = key_of("caption_key", data_config.caption_key, known.caption_key)
        images = (tfds.features.Image, tfds.features.LabeledImage)
        raw = tuple(k for k in features if isinstance(features[k], images))
        return Layout(image, caption, template, labels, raw, extras)

    def example(self, record: dict[str, Any], position: str) -> Example:
        """A decoded record as an Example; `position` is its id if it stores none."""
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
    # The `captions` of coco_captions are a list of dictionaries: the text is one level further.
    return not hasattr(_inner(features), "keys")


def _paths(features: Any, prefix: str = "") -> list[str]:
    """Every key path of a feature tree, for an error message."""
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
    own: a list is entered wherever it occurs.
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
                "as {label} are allowed in braces."
            )
    return fields


def _text(value: Any) -> str:
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def listed(names: Iterable[Any]) -> str:
    """Names for a message: `a, b`, or `nothing`."""
    return ", ".join(str(n) for n in names) or "nothing"
