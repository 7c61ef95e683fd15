import io
import json
import pathlib
import shutil
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dalle_jax.data import sources
from dalle_jax.data.builders import convert, store
from dalle_jax.types import UsageError


def png(value):
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(buffer, "PNG")
    buffer.seek(0)
    return buffer


def array_record_set(data_dir, name="toy", config="2014"):
    def examples(split, n):
        for i in range(n):
            text = [f"{split} {i}", "ü"]
            yield str(i), {"image": png(i), "captions": text, "id": f"{split}-{i}"}

    return store.write(
        data_dir=data_dir,
        name=name,
        config=config,
        version="1.1.0",
        features=store.image_text_features(),
        splits={s: (lambda s=s: examples(s, 5)) for s in ("train", "test")},
        description="toy",
    )


def as_tfrecord(folder):
    """Rewrites a prepared set the way TensorFlow stores it."""
    builder = tfds.builder_from_directory(folder)
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    for split, info in builder.info.splits.items():
        (old,) = info.filepaths
        records = builder.as_data_source(split, deserialize_method=raw)
        with open(str(old).replace("array_record", "tfrecord"), "wb") as file:
            for i in range(len(records)):
                length = struct.pack("<Q", len(records[i]))
                file.write(length + struct.pack("<I", convert.masked_crc(length)))
                file.write(records[i] + struct.pack("<I", convert.masked_crc(records[i])))
        pathlib.Path(old).unlink()
    text = (folder / "dataset_info.json").read_text()
    info = json.loads(text.replace("array_record", "tfrecord"))
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def examples_of(data_dir, source="toy", split="train"):
    config = SimpleNamespace(
        source=source,
        data_dir=str(data_dir),
        image_px=8,
        image_key="image",
        caption_key="captions",
        label_template="",
    )
    examples = sources.open_split(config, split)
    return [examples[i] for i in range(len(examples))]


def test_crc_against_the_published_check_value():
    crc = convert.masked_crc(b"123456789")
    unmasked = (crc - 0xA282EAD8) & 0xFFFFFFFF
    assert ((unmasked >> 17) | (unmasked << 15)) & 0xFFFFFFFF == 0xE3069283  # CRC-32C "check"


def test_converted_set_equals_the_original(tmp_path):
    array_record_set(tmp_path / "a")
    want = {split: examples_of(tmp_path / "a", split=split) for split in ("train", "test")}
    folder = as_tfrecord(array_record_set(tmp_path / "b"))
    with pytest.raises(UsageError, match="stored as tfrecord.*prepare tfds --input="):
        examples_of(tmp_path / "b")
    target, summary = convert.prepare(tmp_path / "c", path=str(folder))
    assert target == tmp_path / "c" / "toy" / "2014" / "1.1.0"
    assert summary["examples"] == {"train": 5, "test": 5}
    assert {split: examples_of(tmp_path / "c", split=split) for split in want} == want
    assert (folder / "toy-train.tfrecord-00000-of-00001").is_file()  # the input is left alone
    with pytest.raises(UsageError, match="exists; delete it"):
        convert.prepare(tmp_path / "c", path=str(folder))


def test_conversion_in_place_keeps_the_old_folder(tmp_path):
    as_tfrecord(array_record_set(tmp_path))
    target, _ = convert.prepare(tmp_path, "toy")
    assert len(examples_of(tmp_path)) == 5
    assert (target.parent / "1.1.0.tfrecord").is_dir()
    again, summary = convert.prepare(tmp_path, "toy")
    assert again == target and summary["note"] == "already array_record"


def test_damaged_and_cut_files_are_refused(tmp_path):
    folder = as_tfrecord(array_record_set(tmp_path / "b"))
    file = folder / "toy-train.tfrecord-00000-of-00001"
    data = file.read_bytes()
    for bad in (data[:-3], data[:20] + b"xxxx" + data[24:100], b"not a tfrecord at all"):
        file.write_bytes(bad)
        with pytest.raises(UsageError, match="damaged or no tfrecord at byte"):
            convert.prepare(tmp_path / "c", path=str(folder))
        assert not (tmp_path / "c" / "toy" / "2014" / "1.1.0").exists()
    first = struct.unpack("<Q", data[:8])[0] + 16
    file.write_bytes(data[first:])
    with pytest.raises(UsageError, match="holds 4 records, its set counts 5"):
        convert.prepare(tmp_path / "c", path=str(folder))


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(UsageError, match="TFDS has no set 'no_such_set'"):
        convert.prepare(tmp_path, "no_such_set")
    with pytest.raises(UsageError, match="not a prepared TFDS set"):
        convert.prepare(tmp_path, path=str(tmp_path))
    with pytest.raises(UsageError, match="--name=NAME"):
        convert.prepare(tmp_path)
    with pytest.raises(UsageError, match="not a TFDS name"):
        convert.prepare(tmp_path, "../x")


def test_builder_that_needs_tensorflow_says_so(tmp_path, monkeypatch):
    def missing(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'tensorflow'")

    monkeypatch.setattr(tfds, "builder", missing)
    with pytest.raises(UsageError, match=r"not installed.*dalle-jax\[tf\]"):
        convert.prepare(tmp_path, "coco_captions")


def test_several_configs_must_be_named(tmp_path):
    array_record_set(tmp_path, config="2014")
    array_record_set(tmp_path, config="2017")
    with pytest.raises(UsageError, match="several sets"):
        convert.prepare(tmp_path, "toy")
    target, _ = convert.prepare(tmp_path, "toy/2017")
    assert target.parent.name == "2017"
    shutil.rmtree(target)
