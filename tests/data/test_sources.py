import io
import json
import pathlib
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dalle_jax.data import catalogue, sources
from dalle_jax.types import UsageError


def data_config(data_dir, source="toy", **changes):
    values = dict(
        source=source,
        data_dir=str(data_dir),
        image_px=8,
        image_key="image",
        caption_key="captions",
        label_template="",
    )
    return SimpleNamespace(**{**values, **changes})


def png(value):
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def prepare(data_dir, name, features, rows, config=None, version="1.0.0"):
    """A prepared set with splits train and validation; `rows(split)` yields examples."""
    configs = [tfds.core.BuilderConfig(name=config)] if config else []

    class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = configs

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {s: self._generate_examples(s) for s in ("train", "validation")}

        def _generate_examples(self, split):
            yield from enumerate(rows(split))

    Toy.name = name
    builder = Toy(data_dir=data_dir, config=config, file_format="array_record")
    builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


OWN = {
    "image": tfds.features.Image(shape=(None, None, 3)),
    "captions": tfds.features.Sequence(tfds.features.Text()),
    "id": tfds.features.Text(),
    "scene": tfds.features.Text(),
}


def own_rows(split):
    for i in range(20 if split == "train" else 3):
        yield {
            "image": io.BytesIO(png(i)),
            "captions": [f"number {i}", f"naïve {i} 😀"],
            "id": f"{split}-{i}",
            "scene": json.dumps({"i": i}),
        }


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("sets")
    prepare(data_dir, "toy", OWN, own_rows)
    return data_dir


def test_examples_come_back_as_stored(toy):
    source = sources.open_split(data_config(toy), "train")
    assert len(source) == 20
    assert source.fields == {"image", "text"}
    seen = set()
    for i in range(20):
        example = source[i]
        n = int(example.id.removeprefix("train-"))
        assert example.image == png(n)
        assert example.captions == [f"number {n}", f"naïve {n} 😀"]
        assert json.loads(example.scene) == {"i": n}
        assert example.codes is None
        seen.add(n)
    assert seen == set(range(20))
    with pytest.raises(IndexError):
        source[20]


def test_sub_splits_are_slices_and_keep_ids(toy):
    train = sources.open_split(data_config(toy), "train")
    head = sources.open_split(data_config(toy), "train[:50%]")
    tail = sources.open_split(data_config(toy), "train[50%:]")
    ids = [train[i].id for i in range(20)]
    assert [head[i].id for i in range(10)] == ids[:10]
    assert [tail[i].id for i in range(10)] == ids[10:]
    assert len(sources.open_split(data_config(toy), "train+validation")) == 23


def test_records_without_id_are_named_by_file_and_position(tmp_path):
    features = {k: OWN[k] for k in ("image", "captions")}
    prepare(tmp_path, "toy", features, lambda s: ({k: r[k] for k in features} for r in own_rows(s)))
    train = sources.open_split(data_config(tmp_path), "train")
    tail = sources.open_split(data_config(tmp_path), "train[5:]")
    assert train[7].id == tail[2].id
    assert "train" in train[7].id and train[7].id.endswith("[7]")
    assert len({train[i].id for i in range(20)}) == 20


def test_threads_share_one_source(toy):
    source = sources.open_split(data_config(toy), "train")
    want = [source[i] for i in range(20)]
    wrong = []

    def reader(seed):
        for i in np.random.default_rng(seed).integers(0, 20, 300):
            if source[i] != want[i]:
                wrong.append(i)

    threads = [threading.Thread(target=reader, args=(s,)) for s in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_folder_path_is_a_source(toy):
    for folder in (toy / "toy", toy / "toy" / "1.0.0"):
        assert len(sources.open_split(data_config("nowhere", str(folder)), "train")) == 20


def test_newest_version_and_config_by_image_px(tmp_path):
    prepare(tmp_path, "toy", OWN, own_rows, config="8px", version="1.0.0")
    prepare(tmp_path, "toy", OWN, own_rows, config="8px", version="1.10.0")
    prepare(tmp_path, "toy", OWN, own_rows, config="8px", version="1.9.0")

    def find(**k):
        return sources.find_set(data_config(tmp_path, **k)).relative_to(tmp_path).as_posix()

    assert find() == "toy/8px/1.10.0"
    with pytest.raises(UsageError, match="stored at 8 pixels.*image_px=8"):
        find(image_px=16)
    prepare(tmp_path, "toy", OWN, own_rows, config="16px")
    assert find(image_px=16) == "toy/16px/1.0.0"
    assert find(source="toy/8px/1.9.0") == "toy/8px/1.9.0"
    with pytest.raises(UsageError, match=r"toy/16px, toy/8px.*none is 32px"):
        find(image_px=32)
    assert sources.prepared_sets(tmp_path) == ["toy/16px", "toy/8px"]


def coco_features():
    return {
        "image": OWN["image"],
        "captions": tfds.features.Sequence(
            {"id": np.int64, "text": tfds.features.Text()},
        ),
    }


def coco_rows(split):
    for i in range(4):
        captions = [{"id": 10 * i + j, "text": f"caption {i} {j}"} for j in range(i + 1)]
        yield {"image": io.BytesIO(png(i)), "captions": captions}


def test_stock_set_needs_only_its_name(tmp_path):
    prepare(tmp_path, "coco_captions", coco_features(), coco_rows, config="2014", version="1.1.0")
    source = sources.open_split(data_config(tmp_path, "coco_captions"), "train")
    captions = sorted((source[i].captions for i in range(4)), key=len)
    assert captions[0] == ["caption 0 0"]
    assert captions[3] == [f"caption 3 {j}" for j in range(4)]


def test_any_set_by_keys(tmp_path):
    prepare(tmp_path, "mine", coco_features(), coco_rows)
    source = sources.open_split(
        data_config(tmp_path, "mine", caption_key="captions/[]/text"), "validation"
    )
    assert all(e.captions[0].startswith("caption") for e in (source[i] for i in range(4)))
    with pytest.raises(UsageError, match=r"caption_key 'title'.*captions/\[\]/text"):
        sources.open_split(data_config(tmp_path, "mine", caption_key="title"), "train")
    with pytest.raises(UsageError, match="image_key .picture..*it has .*image"):
        sources.open_split(data_config(tmp_path, "mine", image_key="picture"), "train")


def test_labels_through_a_template(tmp_path):
    features = {
        "image": OWN["image"],
        "label": tfds.features.ClassLabel(names=["cat", "polar_bear"]),
        "size": np.int64,
    }

    def rows(split):
        for i in range(2):
            yield {"image": io.BytesIO(png(i)), "label": i, "size": 5 + i}

    prepare(tmp_path, "animals", features, rows)
    template = "a photo of a {label}, size {size}"
    source = sources.open_split(data_config(tmp_path, "animals", label_template=template), "train")
    captions = {c for i in range(2) for c in source[i].captions}
    assert captions == {"a photo of a cat, size 5", "a photo of a polar bear, size 6"}
    for bad in ("{label.__class__}", "{label[0]}", "{", "{colour}"):
        with pytest.raises(UsageError, match="label_template"):
            sources.open_split(data_config(tmp_path, "animals", label_template=bad), "train")
    prepare(tmp_path, "cifar10", features, rows)
    source = sources.open_split(data_config(tmp_path, "cifar10"), "train")
    assert source[0].captions[0].startswith("a photo of a ")


def test_codes_stand_in_for_pictures(tmp_path):
    features = {
        "codes": tfds.features.Tensor(shape=(2, 2), dtype=np.int32),
        "captions": OWN["captions"],
        "id": OWN["id"],
    }

    def rows(split):
        for i in range(3):
            codes = np.arange(4, dtype=np.int32).reshape(2, 2) + i
            yield {"codes": codes, "captions": ["x"], "id": str(i)}

    prepare(tmp_path, "coded", features, rows)
    source = sources.open_split(data_config(tmp_path, "coded"), "train")
    assert source.fields == {"codes", "text"}
    example = source[1]
    assert example.image is None
    assert example.codes.dtype == np.int32
    np.testing.assert_array_equal(example.codes, np.arange(4) + int(example.id))


def test_list_of_pictures_gives_the_first(tmp_path):
    features = {
        "images": tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3))),
        "utterance": tfds.features.Text(),
    }

    def rows(split):
        yield {"images": [io.BytesIO(png(1)), io.BytesIO(png(2))], "utterance": "two"}

    prepare(tmp_path, "covr", features, rows)
    example = sources.open_split(data_config(tmp_path, "covr"), "train")[0]
    np.testing.assert_array_equal(example.image, np.full((8, 8, 3), 1, np.uint8))  # decoded by tfds
    assert example.captions == ["two"]


def test_missing_set_says_what_is_there_and_how_to_prepare(toy):
    with pytest.raises(UsageError, match="Sets under .*: toy.*prepare emoji .*--image_px=8"):
        sources.open_split(data_config(toy, "emoji"), "train")
    with pytest.raises(UsageError, match="prepare tfds --name=coco_captions"):
        sources.open_split(data_config(toy, "coco_captions"), "train")
    with pytest.raises(UsageError, match="prepare pairs .*--name=mycats"):
        sources.open_split(data_config(toy, "mycats"), "train")
    with pytest.raises(UsageError, match="source is empty"):
        sources.open_split(data_config(toy, ""), "train")


def test_unknown_and_empty_splits(toy):
    with pytest.raises(UsageError, match="'test'.*train, validation"):
        sources.open_split(data_config(toy), "test")
    with pytest.raises(UsageError, match="cannot be read|holds no example"):
        sources.open_split(data_config(toy), "train[:")
    with pytest.raises(UsageError, match="holds no example"):
        sources.open_split(data_config(toy), "train[:0]")


def test_tfrecord_set_names_the_conversion(tmp_path):
    folder = prepare(tmp_path, "toy", OWN, own_rows)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    for split in info["splits"]:
        split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UsageError, match="tfrecord.*prepare tfds --input="):
        sources.open_split(data_config(tmp_path), "train")


def test_damaged_set_is_named(tmp_path):
    folder = prepare(tmp_path, "toy", OWN, own_rows)
    (folder / "features.json").write_text("{")
    with pytest.raises(UsageError, match="damaged.*prepare it again"):
        sources.open_split(data_config(tmp_path), "train")


def test_classes_of_a_set_are_tfds_own_or_refused(toy, tmp_path, monkeypatch):
    """TFDS imports the module of a class it does not know: here one that would run."""
    config = data_config(toy)
    features = sources.find_set(config) / "features.json"
    marker = tmp_path / "ran"
    (tmp_path / "evil_features.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    original = features.read_text()
    evil = original.replace(
        "tensorflow_datasets.core.features.text_feature.Text", "evil_features.Text"
    )
    assert evil != original
    features.write_text(evil)
    try:
        with pytest.raises(UsageError, match="evil_features.Text"):
            sources.open_split(config, "train")
    finally:
        features.write_text(original)
    assert not marker.exists()


def test_stock_table_is_coherent():
    for name, entry in catalogue.STOCK.items():
        assert bool(entry.caption_key) != bool(entry.label_template), name
        assert name == name.lower()
