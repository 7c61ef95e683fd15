"""Writes TFDS sets in array_record format without TensorFlow: the last step of every `prepare`.

`write` wraps one GeneratorBasedBuilder whose name, features and examples are arguments. On disk a
user's folder and a fetched set then have the format of a set of the TFDS catalogue.
"""

import contextlib
import hashlib
import io
import json
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl import logging

from dalle_jax.types import UsageError

VERSION = "1.0.0"
# Examples of a split: (unique key, values by feature name). Pictures are encoded bytes: tfds
# would encode an array through TensorFlow.
Examples = Iterator[tuple[str, dict[str, Any]]]


def image_text_features(**extra: Any) -> Any:
    """The features of our sets: image, captions, id; `extra` adds others (scene, codes, …)."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "id": tfds.features.Text(),
            **extra,
        }
    )


def folder(data_dir: str | pathlib.Path, name: str, config: str = "", version: str = VERSION):
    """The folder of a set: DATA_DIR/NAME[/CONFIG]/VERSION."""
    return pathlib.Path(data_dir) / name / config / version


def check_name(name: str) -> str:
    """The name of a set, unchanged.

    Raises:
      UsageError: if it is not lower-case letters, digits and _ that start with a letter.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name or ""):
        raise UsageError(
            f"--name={name!r} cannot name a set; use lower-case letters, digits and _ and start "
            "with a letter, such as my_photos."
        )
    return name


def write(
    *,
    data_dir: str | pathlib.Path,
    name: str,
    config: str = "",
    version: str = VERSION,
    features: Any,
    splits: Mapping[str, Callable[[], Examples]],
    description: str,
    homepage: str = "",
    licence: str = "",
) -> pathlib.Path:
    """Writes a set and returns its version folder, which appears only when it is complete.

    Args:
      data_dir: parent of every prepared set; created.
      name: the set's name, `check_name`d.
      config: "" or the name of a variant, by habit `<image_px>px`.
      version: "1.2.3".
      features: a tfds FeaturesDict, e.g. `image_text_features()`.
      splits: split name to a function that yields its examples. tfds orders them by a hash of
        their keys: the same keys give the same order, and 'train[:1%]' is a random sample.
      description: one paragraph for dataset_info.json.
      homepage: URL, or "".
      licence: names of licences, or "".

    Raises:
      UsageError: if data_dir cannot be written, or no split yields an example.
    """
    import tensorflow_datasets as tfds

    target = folder(data_dir, name, config, version)

    class Set(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = (
            [tfds.core.BuilderConfig(name=config, description=description)] if config else []
        )

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description=description,
                features=features,
                homepage=homepage or None,
                license=licence or None,
            )

        def _split_generators(self, dl_manager):
            del dl_manager  # the caller fetches, with checksums and messages of our own
            return {split: self._generate_examples(read) for split, read in splits.items()}

        def _generate_examples(self, read):
            yield from read()

    Set.name = check_name(name)
    make_folder(target.parent)
    with quiet_tfds():
        builder = Set(data_dir=str(data_dir), config=config or None, file_format="array_record")
        builder.download_and_prepare()
    return target


def make_folder(path: pathlib.Path) -> pathlib.Path:
    """The folder, created if needed; UsageError if it cannot be created."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"folder {path} cannot be created ({error.strerror}); choose another --data_dir."
        ) from error
    return path


def already_done(target: pathlib.Path, recipe: dict[str, Any], overwrite: bool) -> bool:
    """Whether `target` holds a finished set with the same recipe; `overwrite` deletes it.

    Raises:
      UsageError: if it holds one with another recipe and `overwrite` is not set.
    """
    if not (target / "features.json").is_file():
        return False
    if overwrite:
        shutil.rmtree(target)
        return False
    stored = read_json(target / "prepare.json") or {}
    changed = [k for k, v in recipe.items() if stored.get("recipe", {}).get(k) != v]
    if changed:
        old = ", ".join(f"{k}={stored.get('recipe', {}).get(k)!r}" for k in changed)
        new = ", ".join(f"{k}={recipe[k]!r}" for k in changed)
        raise UsageError(
            f"{target} was prepared with {old}; now it is {new}. Add --overwrite to replace it, or "
            "choose another name or --data_dir."
        )
    return True


def finish(target: pathlib.Path, recipe: dict[str, Any], summary: dict[str, Any]) -> None:
    """Writes prepare.json into the set: its recipe and the counts of its summary."""
    text = json.dumps({"recipe": recipe, **summary}, indent=2, ensure_ascii=False)
    (target / "prepare.json").write_text(text + "\n", encoding="utf-8")


def read_json(path: pathlib.Path) -> Any:
    """The JSON in a file, or None if the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def uniform_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text only."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


class Progress:
    """A line of progress with rate and time left: rewritten on a terminal, every 10 s in a log."""

    def __init__(self, total: int | None, what: str, stream: Any = None):
        """Counts `total` items called `what`; without a total set `fraction` before `add`."""
        self.total, self.what = total, what
        self.done = self.skipped = self.resumed = 0
        self.fraction: float | None = None  # of the work
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._start = self._shown = time.monotonic()
        self._fraction_resumed = 0.0

    def add(self, done: int = 1, skipped: int = 0, resumed: bool = False) -> None:
        """Counts items; `resumed` items cost no time, so the rate leaves them out."""
        self.done += done
        self.skipped += skipped
        now = time.monotonic()
        if resumed:
            self.resumed += done + skipped
            self._start = now
            self._fraction_resumed = self._fraction()
        if now - self._shown >= (0.2 if self._live else 10.0):
            self._shown = now
            self._print(now)

    def close(self) -> float:
        """Prints the last line; returns the seconds since the start."""
        now = time.monotonic()
        self._print(now, last=True)
        return now - self._start

    def _fraction(self) -> float:
        if self.fraction is not None:
            return self.fraction
        return (self.done + self.skipped) / self.total if self.total else 0.0

    def _print(self, now: float, last: bool = False) -> None:
        seen = self.done + self.skipped
        seconds = max(now - self._start, 1e-3)
        of = f"/{max(self.total, seen):,}" if self.total else ""
        text = f"  {seen:,}{of} {self.what}  {(seen - self.resumed) / seconds:,.0f}/s"
        if self.skipped:
            text += f"  {self.skipped:,} skipped"
        if self.resumed:
            text += f"  {self.resumed:,} were done before"
        fraction = self._fraction()
        fresh = fraction - self._fraction_resumed
        if not last and fresh > 0:
            text += f"  {fraction:.0%}, {duration(seconds * (1 - fraction) / fresh)} left"
        if last:
            text += f"  in {duration(seconds)}"
        end = "\n" if last or not self._live else ""
        print(f"\r{text:<78}" if self._live else text, end=end, file=self._stream, flush=True)


def duration(seconds: float) -> str:
    """`48 s`, `3:05`, `2:03:05`."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minutes}:{second:02}"


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Without tfds's own bars, warnings and lines on stdout, which holds a command's results."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # tfds warns about configs created at run time
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
