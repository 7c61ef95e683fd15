"""Stages from their folders alone, and every way in which a folder can be wrong."""

import json
import pathlib
import shutil

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_stages

from dalle_jax import config as cfg
from dalle_jax.engine import checkpoint, meshes, sharding
from dalle_jax.stages import pretrained, run
from dalle_jax.stages.clip import ClipStage
from dalle_jax.stages.codec import Codec
from dalle_jax.stages.dalle import DalleStage
from dalle_jax.types import UsageError


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("stages")
    codec = tiny_stages.write_codec(root / "dvae")
    return {
        "codec": codec,
        "clip": tiny_stages.write_clip(root / "clip"),
        "dalle": tiny_stages.write_dalle(root / "dalle", codec),
    }


@pytest.mark.parametrize("kind", ["vqvae", "dvae"])
def test_codec_encodes_and_decodes(tmp_path, rng, kind):
    codec = Codec.load(tiny_stages.write_codec(tmp_path / kind, kind))
    px, g = codec.image_px, codec.grid
    images = rng.uniform(-1, 1, (3, px, px, 3)).astype(np.float32)
    codes = np.asarray(codec.encode(images))
    assert codes.shape == (3, g, g) and codes.dtype == np.int32
    assert 0 <= codes.min() and codes.max() < codec.num_codes
    back = np.asarray(codec.decode(codes))
    assert back.shape == images.shape and np.abs(back).max() <= 1
    np.testing.assert_array_equal(back, codec.decode(codes.reshape(3, -1)))
    assert codec.step == 7


def test_codec_functions_are_pure_in_their_params(folders, rng):
    """What a task jits: weights come in as an argument, so other weights give other codes."""
    codec = Codec.load(folders["codec"])
    images = rng.uniform(-1, 1, (2, codec.image_px, codec.image_px, 3)).astype(np.float32)
    encode = jax.jit(codec.encode_fn)
    np.testing.assert_array_equal(encode(codec.params, images), codec.encode(images))
    other = jax.tree.map(lambda x: -x if x.dtype == np.float32 else x, codec.params)
    assert (np.asarray(encode(other, images)) != np.asarray(codec.encode(images))).any()


@pytest.mark.parametrize("kind", ["vqvae", "dvae"])
def test_frozen_weights_know_their_axes(tmp_path, kind):
    """So that a frozen codec is spread over the devices that train on its codes."""
    codec = Codec.load(tiny_stages.write_codec(tmp_path / kind, kind))
    boxed = codec.frozen()
    jax.tree.map(np.testing.assert_array_equal, sharding.unbox(boxed), codec.params)
    sizes = cfg.ConfigDict(dict(data=2, fsdp=4, tensor=1, rules="fsdp"))
    where = sharding.shardings(boxed, meshes.make_mesh(sizes), sharding.rules(sizes))
    sizes = [
        (x.size, s.is_fully_replicated)
        for x, s in zip(jax.tree.leaves(codec.params), jax.tree.leaves(where), strict=True)
    ]
    whole = sum(size for size, is_whole in sizes if is_whole)
    # A VQ-VAE's codebook has no names: its moving averages are counted over the whole batch.
    assert whole < 0.1 * sum(size for size, _ in sizes)


def test_fingerprint_changes_with_a_weight_and_with_the_architecture_only(folders):
    codec = Codec.load(folders["codec"])
    assert codec.fingerprint == Codec.load(folders["codec"]).fingerprint
    assert len(codec.fingerprint) == 16
    leaves, tree = jax.tree.flatten(codec.params)
    changed = [leaves[0] + np.float32(1e-3), *leaves[1:]]
    assert run.fingerprint(jax.tree.unflatten(tree, changed), codec.config) != codec.fingerprint
    longer = cfg.override(codec.config, {"train.steps": 999})
    assert run.fingerprint(codec.params, longer) == codec.fingerprint
    other = cfg.override(codec.config, {"model.width": 999})
    assert run.fingerprint(codec.params, other) != codec.fingerprint


def test_clip_and_dalle_load_with_their_tokenizers(folders):
    clip = ClipStage.load(folders["clip"])
    assert (
        clip.tokenizer.model_bytes == tiny_stages.tokenizer_bytes()
        and clip.image_px == tiny_stages.PX
    )
    dalle = DalleStage.load(folders["dalle"])
    assert dalle.codec.fingerprint == Codec.load(folders["codec"]).fingerprint
    text = jnp.zeros((1, dalle.text_len), jnp.int32)
    codes = jnp.zeros((1, dalle.codec.grid**2), jnp.int32)
    _, logits = dalle.model.apply({"params": dalle.params}, text, codes)
    assert logits.shape == (1, dalle.codec.grid**2, dalle.codec.num_codes)


def test_a_codec_that_was_trained_on_is_refused(folders, tmp_path):
    moved = tmp_path / "dalle"
    shutil.copytree(folders["dalle"], moved)
    file = moved / checkpoint.CODEC
    file.write_text(Codec.load(folders["codec"]).fingerprint)
    assert DalleStage.load(str(moved)).codec.folder == folders["codec"]
    file.write_text("0123456789abcdef")
    with pytest.raises(UsageError, match="codec 0123456789abcdef, but.*--dvae"):
        DalleStage.load(str(moved))


def test_the_encoders_half_encodes(folders, rng):
    codec = Codec.load(folders["codec"])
    pictures = rng.uniform(-1, 1, (2, tiny_stages.PX, tiny_stages.PX, 3)).astype(np.float32)
    half = sharding.unbox(codec.frozen_encoder())
    assert not any(name.startswith("decoder") for name in half["params"])
    np.testing.assert_array_equal(codec.encode_fn(half, pictures), codec.encode(pictures))


def test_half_precision_exports_come_back_as_the_configs_dtype(folders, tmp_path):
    config = ClipStage.load(folders["clip"]).config
    half = jax.tree.map(lambda x: x.astype(np.float16), ClipStage.load(folders["clip"]).params)
    clip = ClipStage.load(tiny_stages.write(tmp_path / "half", config, half))
    assert {leaf.dtype for leaf in jax.tree.leaves(clip.params)} == {np.dtype(np.float32)}


def test_a_moved_codec_is_found_beside_or_given(folders, tmp_path):
    """A shipped set is {dvae, clip, dalle} in one folder; the path in its config is long gone."""
    moved = tmp_path / "set"
    shutil.copytree(folders["dalle"], moved / "dalle")
    path = moved / "dalle" / "config.json"
    config = json.loads(path.read_text())
    config["stages"]["dvae"] = "runs/of/somebody/else"
    path.write_text(json.dumps(config))
    with pytest.raises(UsageError, match="--dvae"):
        DalleStage.load(str(moved / "dalle"))
    assert DalleStage.load(str(moved / "dalle"), codec=folders["codec"]).codec.grid
    shutil.copytree(folders["codec"], moved / "dvae")
    assert DalleStage.load(str(moved / "dalle")).codec.folder == str(moved / "dvae")


def test_stages_lie_in_a_bucket_too(folders, tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    monkeypatch.setattr(fsspec, "filesystem", lambda name, **options: memory)
    for name, stage in (("dalle", folders["dalle"]), ("dvae", folders["codec"])):
        checkpoint.export(stage, str(tmp_path / name), "float32")
        for file in (tmp_path / name).iterdir():
            memory.pipe(f"gs://bucket/{name}/{file.name}", file.read_bytes())
    there = DalleStage.load("gs://bucket/dalle")
    assert there.codec.folder == "gs://bucket/dvae"
    assert there.fingerprint == DalleStage.load(folders["dalle"]).fingerprint


def test_a_codec_of_other_size_is_refused(folders, tmp_path):
    other = tiny_stages.write_codec(tmp_path / "other", **{"model.num_codes": 64})
    with pytest.raises(UsageError, match="do not fit"):
        DalleStage.load(folders["dalle"], codec=other)


@pytest.mark.parametrize(
    ("load", "name", "says"),
    [
        (Codec.load, "clip", "task 'clip'; expected task 'autoencode'"),
        (ClipStage.load, "dalle", "task 'dalle'; expected task 'clip'"),
        (DalleStage.load, "codec", "task 'autoencode'; expected task 'dalle'"),
    ],
)
def test_a_workdir_of_another_task_names_both(folders, load, name, says):
    with pytest.raises(UsageError, match=says):
        load(folders[name])


@pytest.mark.parametrize("load", [Codec.load, ClipStage.load, DalleStage.load])
def test_missing_empty_and_untrained_workdirs_are_told_apart(tmp_path, load):
    with pytest.raises(UsageError, match="does not exist"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="not a workdir"):
        load(str(tmp_path))
    name = {Codec.load: "vqvae", ClipStage.load: "clip", DalleStage.load: "dalle"}[load]
    checkpoint.save_config(str(tmp_path / "fresh"), tiny_stages.config(name))
    with pytest.raises(UsageError, match="no checkpoint yet"):
        load(str(tmp_path / "fresh"))


def test_an_edited_config_is_refused_by_the_weights(folders, tmp_path):
    folder = tmp_path / "edited"
    shutil.copytree(folders["clip"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["joint_width"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="do not fit the model of its config"):
        ClipStage.load(str(folder))


def test_a_missing_tokenizer_is_named(folders, tmp_path):
    folder = tmp_path / "mute"
    shutil.copytree(folders["clip"], folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(UsageError, match="tokenizer.model is missing"):
        ClipStage.load(str(folder))


def test_pretrained_sets_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "ROOT", pathlib.Path(tmp_path))
    with pytest.raises(UsageError, match="none in this installation"):
        pretrained.folders("shapes")
    (tmp_path / "shapes" / "dalle").mkdir(parents=True)
    assert pretrained.folders("shapes") == {"dalle": str(tmp_path / "shapes" / "dalle")}
    with pytest.raises(UsageError, match="known sets: shapes"):
        pretrained.folders("photos")
    with pytest.raises(UsageError, match="no pretrained set"):
        pretrained.folders("../shapes")
