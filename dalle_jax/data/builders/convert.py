"""Sets of the TFDS catalogue as array_record: built in that format, or converted from tfrecord.

Both formats hold the same serialised examples, so a conversion copies records from one container to
the other: it decodes no picture, interprets no feature and needs no TensorFlow.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import struct
from collections.abc import Iterator
from typing import Any

from dalle_jax.data import sources
from dalle_jax.data.builders import store
from dalle_jax.types import UsageError

_LENGTH = struct.Struct("<QI")
_MAX_RECORD = 2**31


def prepare(
    data_dir: str | pathlib.Path, name: str = "", path: str = ""
) -> tuple[pathlib.Path, dict[str, Any]]:
    """Builds or converts a set, so that `data.source=NAME` reads it.

    Args:
      data_dir: parent of all sets. A tfrecord set of that name under it is converted in place (its
        folder becomes VERSION.tfrecord); tfds's own builder builds any other name.
      name: in the catalogue, optionally `name/config`.
      path: a set's folder elsewhere, instead of a name; it is not changed.

    Returns:
      The version folder, and a summary: examples per split, …

    Raises:
      UsageError: if there is no such set, if its builder needs a package that is not installed, or
        if a file is damaged.
    """
    if not name and not path:
        raise UsageError(
            "prepare tfds needs --name=NAME of the TFDS catalogue or --input=FOLDER of a set."
        )
    source = _find(pathlib.Path(data_dir), name, path)
    if source is None:
        return _build(data_dir, name)
    with _readable(source):
        builder = _builder(source)
        splits = {split: info.num_examples for split, info in builder.info.splits.items()}
        file_format = builder.info.file_format.value
    relative = [builder.info.name, builder.info.config_name or "", source.name]
    target = pathlib.Path(data_dir).joinpath(*filter(None, relative))
    if file_format in ("array_record", "parquet"):
        return source, {"examples": splits, "note": f"already {file_format}"}
    if file_format != "tfrecord":
        raise UsageError(f"{source} is stored as {file_format}; only tfrecord can be converted.")
    in_place = target.exists() and target.samefile(source)
    if target.exists() and not in_place:
        raise UsageError(f"{target} exists; delete it or choose another --data_dir.")
    seconds = _convert(builder, source, target, in_place)
    return target, {"examples": splits, "converted": str(source), "seconds": seconds}


def _find(data_dir: pathlib.Path, name: str, path: str) -> pathlib.Path | None:
    for root in (path, data_dir / name if name else None):
        if root and pathlib.Path(root).is_dir():
            folders = sources.version_folders(pathlib.Path(root))
            if len(folders) > 1:
                names = ", ".join(folder.parent.name for folder in folders)
                raise UsageError(f"{root} holds several sets ({names}); name one: {root}/CONFIG.")
            if folders:
                return folders[0]
    if path:
        raise UsageError(f"--input={path} is not a prepared TFDS set: it has no features.json.")
    return None


def _builder(path: pathlib.Path) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(path)


def _build(data_dir: str | pathlib.Path, name: str) -> tuple[pathlib.Path, dict[str, Any]]:
    """Downloads and builds a set of the catalogue with tfds's own builder."""
    import tensorflow_datasets as tfds

    if not re.fullmatch(r"[a-z0-9_]+(/[\w.-]+)*(:[\d.]+)?", name):
        raise UsageError(
            f"--name={name!r} is not a TFDS name; expected a name such as coco_captions/2014."
        )
    store.make_folder(pathlib.Path(data_dir))
    try:
        builder = tfds.builder(name, data_dir=str(data_dir), file_format="array_record")
        print(f"  tfds builds {builder.info.full_name}; this may download a lot", flush=True)
        builder.download_and_prepare()
    except tfds.core.DatasetNotFoundError as error:
        raise UsageError(
            f"TFDS has no set {name!r} ({sources.first_line(error)}). docs/data.md lists sets with "
            "captions; pictures of your own go through `prepare pairs`."
        ) from error
    except ImportError as error:
        raise UsageError(
            f"building {name} needs a package that is not installed ({sources.first_line(error)}). "
            "Most such sets are built with TensorFlow: pip install 'dalle-jax[tf]'. Reading the "
            "finished set does not need it."
        ) from error
    except (
        AssertionError,
        OSError,
        ValueError,
        RuntimeError,
        tfds.download.DownloadError,
    ) as error:
        # Manual downloads, dead links, checksums: tfds's own message names the cure.
        text = " ".join(str(error).split())[:600]
        raise UsageError(f"TFDS could not build {name}: {text}") from error
    path = pathlib.Path(builder.data_dir)
    return path, {"examples": {s: i.num_examples for s, i in builder.info.splits.items()}}


def _convert(builder: Any, source: pathlib.Path, target: pathlib.Path, in_place: bool) -> float:
    """Copies every shard; the new folder appears when it is complete."""
    from array_record.python import array_record_module

    part = target.with_name(f"{target.name}.converting")
    shutil.rmtree(part, ignore_errors=True)
    store.make_folder(part)
    total = sum(info.num_examples for info in builder.info.splits.values())
    progress = store.Progress(total, "records")
    for info in builder.info.splits.values():
        shards = zip(sorted(map(str, info.filepaths)), info.shard_lengths, strict=True)
        for shard, length in shards:
            name = os.path.basename(shard).replace(".tfrecord", ".array_record")
            # group_size 1: every record can be read by itself
            writer = array_record_module.ArrayRecordWriter(str(part / name), "group_size:1")
            with contextlib.closing(writer):
                count = 0
                for record in read_tfrecord(shard):
                    writer.write(record)
                    count += 1
                    progress.add()
            if count != length:
                raise UsageError(
                    f"{shard} holds {count} records, its set counts {length}; fetch it again."
                )
    for file in source.iterdir():
        if file.is_file() and ".tfrecord" not in file.name:
            shutil.copy2(file, part / file.name)
    info_file = part / "dataset_info.json"
    described = json.loads(info_file.read_text(encoding="utf-8"))
    described["fileFormat"] = "array_record"
    for split in described.get("splits", ()):
        template = split.get("filepathTemplate", "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}")
        split["filepathTemplate"] = template.replace(".tfrecord", ".array_record")
    info_file.write_text(json.dumps(described, indent=2), encoding="utf-8")
    if in_place:
        source.rename(source.with_name(f"{source.name}.tfrecord"))
    part.rename(target)
    return round(progress.close(), 1)


@contextlib.contextmanager
def _readable(source: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except (ValueError, KeyError, AttributeError, OSError) as error:
        raise UsageError(
            f"{source} is damaged: its description cannot be read ({sources.first_line(error)})."
        ) from error


def read_tfrecord(path: str | os.PathLike) -> Iterator[bytes]:
    """The records of a tfrecord file.

    A record is its length (8 bytes), a masked CRC-32C of those 8 bytes, the data, a CRC of the
    data. Only the length's CRC is checked, which detects a damaged file or another format.

    Raises:
      UsageError: for a file that is damaged, cut, or not a tfrecord.

    Source: TensorFlow's lib/io/record_writer.h.
    """
    with open(path, "rb") as file:
        while start := file.read(_LENGTH.size):
            at = file.tell() - len(start)
            if len(start) == _LENGTH.size:
                length, crc = _LENGTH.unpack(start)
                if crc == masked_crc(start[:8]) and length <= _MAX_RECORD:
                    data = file.read(length + 4)
                    if len(data) == length + 4:
                        yield data[:length]
                        continue
            raise UsageError(
                f"{path} is damaged or no tfrecord at byte {at}: fetch it again and convert anew."
            )


def masked_crc(data: bytes) -> int:
    """TensorFlow's rotated CRC-32C (Castagnoli) of a short byte string."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 & -(crc & 1))
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
