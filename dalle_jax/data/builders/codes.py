"""A set's pictures as stored codes: the same examples, in the same order, with a codec's codes.

Training DALL·E from stored codes skips the frozen codec in every step. The records have the order
of the source, and captions are chosen by position, so a run on the codes sees exactly the batches
that a run on the pictures with a deterministic crop would see. A picture that cannot be decoded
has a record with codes of -1: the pipeline skips that record as it skips the picture.
"""

import collections
import concurrent.futures
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from dalle_jax.data import preprocess, sources, tokenizers
from dalle_jax.data.builders import store
from dalle_jax.types import Array, UsageError

# uint8 [B, px, px, 3] -> codes int32 [B, g*g] or [B, g, g]; may return before they are computed.
Encode = Callable[[np.ndarray], Array]


def write(
    *,
    data_dir: str | pathlib.Path,
    name: str,
    splits: Mapping[str, Any],
    encode: Encode,
    codec: Mapping[str, Any],
    batch: int,
    image_px: int,
    crop: str = "none",
    threads: int = 2,
    overwrite: bool = False,
    stream: Any = None,
) -> tuple[pathlib.Path, dict[str, Any]]:
    """Encodes splits and stores them as the set DATA_DIR/NAME, unless an equal set is finished.

    Args:
      data_dir: parent of the prepared sets.
      name: of the new set.
      splits: split name -> sources.Source (len(), [i], as `sources.open_split` gives).
      encode: pictures to codes; always called with `batch` pictures.
      codec: identifies the codec, stored in metadata.json: fingerprint, grid, num_codes, …
      batch: pictures per call.
      image_px: side of the pictures.
      crop: a deterministic crop of `preprocess`.
      threads: decoding threads.
      overwrite: replace a finished set of that name.
      stream: text stream for progress; stderr by default.

    Returns:
      The version folder, and a summary: examples per split, skipped by reason.

    Raises:
      UsageError: for a random crop, a split without usable pictures, or a set of that name from
        other pictures or another codec.
    """
    import tensorflow_datasets as tfds

    if crop not in preprocess.DETERMINISTIC:
        raise UsageError(
            f"crop {crop!r} is random, and stored codes are of one crop; use "
            f"{' or '.join(sorted(preprocess.DETERMINISTIC))}."
        )
    target = store.folder(data_dir, store.check_name(name))
    recipe = {
        "codec": codec["fingerprint"],
        "crop": crop,
        "image_px": image_px,
        "splits": {split: len(source) for split, source in splits.items()},
        "sources": {
            # Relative, because the folder of all sets may be moved or mounted elsewhere.
            split: os.path.relpath(getattr(source, "path", data_dir), data_dir)
            for split, source in splits.items()
        },
    }
    if store.already_done(target, recipe, overwrite):
        return target, store.read_json(target / "prepare.json")
    features = {
        "codes": tfds.features.Tensor(shape=(codec["grid"] ** 2,), dtype=np.int32),
        "captions": tfds.features.Sequence(tfds.features.Text()),
        "id": tfds.features.Text(),
    }
    first = [preprocess.read(source, [0])[0] for source in splits.values()]
    has_scene = any(getattr(example, "scene", None) for example in first)
    if has_scene:
        features["scene"] = tfds.features.Text()
    skipped: collections.Counter[str] = collections.Counter()
    progress = store.Progress(sum(map(len, splits.values())), "pictures encoded", stream)

    class Codes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(store.VERSION)

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"Codes [{codec['grid']} x {codec['grid']}] of pictures.",
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,  # in the order of the source
                metadata=tfds.core.MetadataDict({**codec, "crop": crop, "image_px": image_px}),
            )

        def _split_generators(self, dl_manager):
            del dl_manager
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            source, before = splits[split], skipped.total()
            records = _records(source, encode, batch, image_px, crop, threads, skipped, progress)
            for index, record in enumerate(records):
                if has_scene:
                    record["scene"] = record["scene"] or ""
                else:
                    del record["scene"]
                yield index, record
            if skipped.total() - before == len(source):
                raise UsageError(
                    f"no picture of split {split!r} can be decoded ({dict(skipped)}); is "
                    "data.image_key right? Else prepare the set again."
                )

    Codes.name = name
    store.make_folder(target.parent)
    with store.quiet_tfds():
        Codes(data_dir=str(data_dir), file_format="array_record").download_and_prepare()
    seconds = progress.close()
    summary = {"skipped": dict(skipped), "seconds": round(seconds, 1)}
    store.finish(target, recipe, summary)
    return target, {"recipe": recipe, **summary}


def copy_tokenizers(data_dir: str | pathlib.Path, source: str, name: str) -> list[pathlib.Path]:
    """Copies the tokenizers of a set beside its codes; returns the copies."""
    target = tokenizers.folder(data_dir, name)
    target.mkdir(parents=True, exist_ok=True)
    files = sorted(tokenizers.folder(data_dir, source).glob("tokenizer-*.model"))
    return [pathlib.Path(shutil.copy2(file, target / file.name)) for file in files]


def metadata(data_config: Any) -> dict[str, Any]:
    """The metadata of a set of codes about its codec: fingerprint, grid, num_codes, crop, …

    Raises:
      UsageError: if the config's set is not prepared or holds no codes.
    """
    path = sources.find_set(data_config)
    try:
        stored = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stored = {}
    if "fingerprint" not in stored:
        raise UsageError(
            f"{path} does not name the codec of its codes; expected a set written by "
            "`python -m dalle_jax encode`."
        )
    return stored


def check_codec(data_config: Any, fingerprint: str, workdir: str = "") -> None:
    """Raises UsageError unless the config's set holds codes of the codec with this fingerprint."""
    stored = metadata(data_config)
    if stored["fingerprint"] != fingerprint:
        raise UsageError(
            f"data.source {data_config.source!r} holds codes of the codec "
            f"{stored['fingerprint']} ({stored.get('workdir', 'unknown folder')}), but "
            f"stages.dvae {workdir!r} is {fingerprint}; encode the pictures again with it: python "
            f"-m dalle_jax encode --workdir={workdir or 'DVAE_DIR'} --name={data_config.source} "
            "--overwrite"
        )


def _records(
    source, encode: Encode, batch: int, px: int, crop: str, threads: int, skipped, progress
) -> Iterator[dict[str, Any]]:
    """Records of a split in order; decodes the next batch while the last one is encoded."""
    cut = preprocess.CROPS[crop]

    def load(index: int, example):
        if isinstance(example, preprocess.BadRecord):
            return sources.Example(f"record {index}", None, [""]), None, example.reason
        try:
            return example, cut(preprocess.decode(example.image, example.id), px), ""
        except preprocess.BadRecord as error:
            return example, None, error.reason

    def finished(loaded, codes) -> Iterator[dict[str, Any]]:
        codes = np.asarray(codes, np.int32).reshape(batch, -1)
        for (example, picture, reason), row in zip(loaded, codes, strict=False):
            if picture is None:
                skipped[reason] += 1
            progress.add(done=picture is not None, skipped=picture is None)
            yield {
                "codes": row if picture is not None else np.full_like(row, -1),
                "captions": example.captions,
                "id": example.id,
                "scene": example.scene,
            }

    pending = None
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(source), batch):
            indices = range(start, min(start + batch, len(source)))
            loaded = list(pool.map(load, indices, preprocess.read(source, indices)))
            pictures = np.zeros((batch, px, px, 3), np.uint8)
            for row, (_, picture, _) in zip(pictures, loaded, strict=False):
                if picture is not None:
                    row[:] = picture
            codes = encode(pictures)
            if pending is not None:
                yield from finished(*pending)
            pending = loaded, codes
    if pending is not None:
        yield from finished(*pending)
