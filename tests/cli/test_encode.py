"""`encode`: codes in the order of the pictures, the same batches, damaged pictures, messages."""

import io

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from PIL import Image

from dalle_jax import __main__
from dalle_jax.data import pipeline, sources, tokenizers
from dalle_jax.data.builders import codes, store
from dalle_jax.stages.codec import Codec
from dalle_jax.types import UsageError

PX, GRID, NUM_CODES = 8, 2, 16


class FakeCodec:
    """Codes are mean brightness per quarter: what a code must be can be computed by hand."""

    grid, num_codes, image_px, folder, step = GRID, NUM_CODES, PX, "runs/fake", 7

    def __init__(self, data_dir, fingerprint="0123456789abcdef", crop="none"):
        self.fingerprint, self.devices = fingerprint, set()
        data = dict(
            source="pictures", data_dir=str(data_dir), split="train", image_px=PX, crop=crop,
            image_key="image", caption_key="captions", label_template="", vocab_size=400,
            text_len=16, bpe_dropout=0.1, caption_drop=0.1, add_bos_eos=False, cache_mib=8,
            threads=1,
        )  # fmt: skip
        self.config = ml_collections.ConfigDict(dict(data=data))

    def encode(self, images):
        self.devices |= images.devices()
        return _encode(images)


@jax.jit
def _encode(images):
    b = images.shape[0]
    means = images.reshape(b, GRID, PX // GRID, GRID, PX // GRID, 3).mean(axis=(2, 4, 5))
    return jnp.clip((means + 1) * (NUM_CODES / 2), 0, NUM_CODES - 1).astype(jnp.int32)


def _png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _pictures(split, size, broken=()):
    rng = np.random.default_rng(len(split))
    for i in range(size):
        tint = rng.integers(0, 256, (GRID, GRID, 1))
        pixels = np.kron(tint, np.ones((PX // GRID, PX // GRID, 3))).astype(np.uint8)
        yield (
            f"{split}-{i:03}",
            {
                "image": io.BytesIO(_png(pixels)[: 60 if i in broken else None]),
                "captions": [f"picture number {i}", f"tint number {i}"],
                "id": f"{split}-{i:03}",
                "scene": f'{{"number": {i}}}',
            },
        )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data folder with a set `pictures`: 37 + 10 examples, one of them damaged."""
    import tensorflow_datasets as tfds

    data_dir = tmp_path_factory.mktemp("data")
    store.write(
        data_dir=data_dir,
        name="pictures",
        features=store.image_text_features(scene=tfds.features.Text()),
        splits={
            "train": lambda: _pictures("train", 37, broken=(5,)),
            "validation": lambda: _pictures("validation", 10),
        },
        description="test",
    )
    tokenizers.train(["picture number 12"], 400, tokenizers.model_path(data_dir, "pictures", 400))
    return data_dir


@pytest.fixture
def codec(prepared, monkeypatch):
    codec = FakeCodec(prepared)
    monkeypatch.setattr(Codec, "load", lambda folder: codec)
    return codec


def encode(*args):
    return __main__.main(["encode", "--workdir=runs/fake", "--compilation_cache=", *args])


def test_codes_have_the_order_of_the_pictures(prepared, codec, capfd):
    assert encode("--name=coded", "--batch=10") == 0
    assert len(codec.devices) == len(jax.local_devices())
    captured = capfd.readouterr()
    assert "46 pictures" in captured.out and "1 skipped" in captured.out
    assert "pictures encoded" in captured.err
    config = ml_collections.ConfigDict(codec.config.data.to_dict())
    for split in ("train", "validation"):
        config.source = "pictures"
        pictures = sources.open_split(config, split)
        config.source = "coded"
        coded = sources.open_split(config, split)
        assert len(coded) == len(pictures) and coded.fields == {"codes", "text"}
        for i in range(len(coded)):
            a, b = pictures[i], coded[i]
            assert (a.id, a.captions, a.scene) == (b.id, b.captions, b.scene)
            assert b.image is None and b.codes.shape == (GRID * GRID,)
            if a.id == "train-005":
                assert (b.codes == -1).all()
                continue
            pixels = np.asarray(Image.open(io.BytesIO(a.image))).astype(np.float32)
            expected = _encode(jnp.asarray(pixels / 127.5 - 1)[None])
            np.testing.assert_array_equal(b.codes, np.asarray(expected).reshape(-1))
    copied = tokenizers.model_path(prepared, "coded", 400)
    assert copied.read_bytes() == tokenizers.model_path(prepared, "pictures", 400).read_bytes()
    stored = codes.metadata(config)
    assert (stored["fingerprint"], stored["grid"], stored["crop"]) == (codec.fingerprint, 2, "none")
    codes.check_codec(config, codec.fingerprint)
    with pytest.raises(UsageError, match="ffff.*encode"):
        codes.check_codec(config, "ffff", "runs/other")


def test_training_on_codes_sees_the_batches_of_training_on_pictures(prepared, codec):
    """Same captions, same BPE-dropout, same order, and the damaged picture skipped alike."""
    assert encode("--name=coded_two", "--split=train") == 0
    config = ml_collections.ConfigDict(codec.config.data.to_dict())
    batches = {}
    for source, field in (("pictures", "image"), ("coded_two", "codes")):
        config.source = source
        batches[field] = pipeline.make(
            config, 0, split="train", fields={field, "text"}, training=True, batch=8
        )
    for step in range(12):
        a, b = batches["image"](step), batches["codes"](step)
        np.testing.assert_array_equal(a["text"], b["text"])
        encoded = _encode(jnp.asarray(a["image"].astype(np.float32) / 127.5 - 1))
        np.testing.assert_array_equal(np.asarray(encoded).reshape(8, -1), b["codes"])
        assert batches["image"].ids(step) == batches["codes"].ids(step)
    assert batches["image"].skipped == {"unreadable picture": 1}
    assert batches["codes"].skipped == {"no codes": 1}


def test_again_is_a_no_op_and_another_codec_is_refused(prepared, codec, capfd):
    assert encode("--name=coded_three", "--split=validation") == 0
    file = prepared / "coded_three" / store.VERSION / "features.json"
    written = file.stat().st_mtime_ns
    assert encode("--name=coded_three", "--split=validation") == 0
    assert file.stat().st_mtime_ns == written
    codec.fingerprint = "f" * 16
    assert encode("--name=coded_three", "--split=validation") == 2
    assert "--overwrite" in capfd.readouterr().err
    assert encode("--name=coded_three", "--split=validation", "--overwrite") == 0
    assert file.stat().st_mtime_ns != written


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--name=Bad-Name"], "--name='Bad-Name'"),
        (["--name=x", "--batch=0"], "--batch=0"),
        (["--name=x", "--threads=0"], "--threads=0"),
        (["--name=x", "--split=,"], "names no split"),
        (["--name=x", "--split=test"], "split 'test'"),
        (["--name=x", "--source=absent"], "'absent' is not a prepared set"),
        (["--name=pictures"], "is the set to encode"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(codec, capfd, args, says):
    assert encode(*args) == 2
    assert says in capfd.readouterr().err


def test_a_random_crop_cannot_be_stored(tmp_path):
    with pytest.raises(UsageError, match="crop 'dvae' is random"):
        codes.write(
            data_dir=tmp_path, name="x", splits={}, encode=None, codec={}, batch=1, image_px=8,
            crop="dvae",
        )  # fmt: skip


def test_nothing_decodable_is_one_message_and_leaves_no_set(tmp_path):
    class Broken:
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return sources.Example(f"x{i}", b"<html>", ["a"])

    with pytest.raises(UsageError, match="no picture of split 'train'"):
        codes.write(
            data_dir=tmp_path, name="x", splits={"train": Broken()}, batch=2, image_px=8,
            encode=lambda pictures: np.zeros((2, 4), np.int32),
            codec=dict(fingerprint="0", grid=2, num_codes=4),
        )  # fmt: skip
    assert not list(tmp_path.rglob("features.json"))


def test_a_set_that_is_not_of_codes_says_so(prepared, codec):
    with pytest.raises(UsageError, match="encode"):
        codes.metadata(codec.config.data)
