"""The stored shapes set: what is in it, that it is reproducible, and that it is written once."""

import io
import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dalle_jax.data import scenes
from dalle_jax.data.builders import rendering, shapes
from dalle_jax.types import UsageError

SIZES = dict(image_px=32, num_train=80, num_eval=16, seed=3)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return shapes.prepare(tmp_path_factory.mktemp("data"), **SIZES, stream=io.StringIO())


def source(path, split, **decoders):
    return tfds.builder_from_directory(path).as_data_source(split, decoders=decoders or None)


def raw(path, split):
    return list(source(path, split, image=tfds.decode.SkipDecoding()))


def test_the_folder_is_the_one_that_sources_opens(path):
    assert path.parts[-3:] == ("shapes", "32px", "1.0.0")
    assert (path / "features.json").is_file()


def test_records_hold_picture_caption_and_scene(path):
    assert {name: len(source(path, name)) for name in rendering.HELD_OUT} == {
        "train": 80,
        "validation": 16,
        "held_out": 16,
    }
    kinds = []
    for index, record in enumerate(source(path, "train")):
        scene = shapes.scene_of(record)
        kinds.append(scene.kind)
        assert record["id"] == f"train-{index:07d}".encode()
        assert [text.decode() for text in record["captions"]] == [scene.caption]
        np.testing.assert_array_equal(record["image"], scenes.render(scene, 32))
    assert {kinds.count(kind) for kind in scenes.KINDS} == {20}


def test_held_out_combinations_are_in_their_split_only(path):
    for split, expected in (("train", False), ("validation", False), ("held_out", True)):
        for record in raw(path, split):
            assert bool(scenes.held_out_rules(shapes.scene_of(record))) is expected


def test_same_bytes_from_two_processes(path, tmp_path):
    # The files differ in the order of protocol buffer fields; the records in nothing.
    other = shapes.prepare(tmp_path, **SIZES, workers=2, stream=io.StringIO())
    for split in rendering.HELD_OUT:
        for a, b in zip(raw(path, split), raw(other, split), strict=True):
            assert a == b


def test_sets_are_a_function_of_the_seed():
    pngs = [rendering.render_example(0, split="train", seed=s, image_px=32).png for s in (0, 0, 1)]
    assert pngs[0] == pngs[1] != pngs[2]
    assert Image.open(io.BytesIO(pngs[0])).size == (32, 32)


def test_second_call_writes_nothing(path):
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    assert shapes.prepare(path.parents[2], **SIZES, stream=io.StringIO()) == path
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == before


@pytest.mark.parametrize(
    "change, value",
    [
        ({"num_train": 81}, "81"),
        ({"seed": 4}, "4"),
        ({"kinds": ["single", "count"]}, "single,count"),
    ],
)
def test_set_of_other_arguments_is_not_passed_off_as_this_one(path, change, value):
    with pytest.raises(UsageError, match=f", not {value};"):
        shapes.prepare(path.parents[2], **SIZES | change, stream=io.StringIO())


def test_a_set_from_before_there_were_kinds_has_all_of_them(path, tmp_path):
    version = tmp_path / path.relative_to(path.parents[2])
    shutil.copytree(path, version)
    metadata = json.loads((version / "metadata.json").read_text())
    del metadata["kinds"]
    (version / "metadata.json").write_text(json.dumps(metadata))
    assert shapes.prepare(tmp_path, **SIZES, stream=io.StringIO()) == version


def test_kinds_take_turns_in_the_train_split_only(tmp_path):
    turns = ["single", "count", "single", "relation"]
    path = shapes.prepare(tmp_path, **SIZES | {"num_train": 8}, kinds=turns, stream=io.StringIO())

    def kinds(split):
        return [shapes.scene_of(record).kind for record in source(path, split)]

    assert kinds("train") == turns * 2
    assert set(kinds("validation")) == set(kinds("held_out")) == set(scenes.KINDS)


@pytest.mark.parametrize("kinds", [[], ["single", "triple"], [""]])
def test_unknown_kinds_are_refused(tmp_path, kinds):
    with pytest.raises(UsageError, match="expected one or more of single,count"):
        shapes.prepare(tmp_path, **SIZES, kinds=kinds, stream=io.StringIO())


def test_interrupted_set_is_rendered_again(tmp_path, monkeypatch):
    sizes = SIZES | {"num_train": 8, "num_eval": 4}
    render = rendering.render_example

    def stop_in_the_middle(index, **example):
        if index == 5:
            raise KeyboardInterrupt
        return render(index, **example)

    monkeypatch.setattr(rendering, "render_example", stop_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        shapes.prepare(tmp_path, **sizes, stream=io.StringIO())
    monkeypatch.setattr(rendering, "render_example", render)
    stream = io.StringIO()
    path = shapes.prepare(tmp_path, **sizes, stream=stream)
    assert len(source(path, "train")) == 8
    assert "16/16 pictures" in stream.getvalue().splitlines()[-1]


@pytest.mark.parametrize("change", [{"image_px": 4}, {"num_train": 0}, {"seed": -1}])
def test_impossible_sizes_are_refused(tmp_path, change):
    with pytest.raises(UsageError, match="at least"):
        shapes.prepare(tmp_path, **SIZES | change, stream=io.StringIO())


def test_stdout_stays_empty(tmp_path, capfd):
    shapes.prepare(tmp_path, **SIZES | {"num_train": 4, "num_eval": 4})
    captured = capfd.readouterr()
    assert not captured.out and "12/12 pictures" in captured.err
