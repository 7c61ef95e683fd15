"""`pca`: embeds a set with a CLIP, stores the fit; messages."""

import io
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

from dalle_jax import __main__
from dalle_jax.data.builders import store
from dalle_jax.stages import pca
from dalle_jax.stages.clip import ClipStage

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "sampling"))

import tiny_stages  # noqa: E402

PX, E = 8, 6


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data folder with a set `pictures` of 37 tinted pictures."""
    data_dir = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)

    def pictures():
        for i in range(37):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (PX, PX, 3), np.uint8)).save(buffer, "PNG")
            yield (
                f"{i:03}",
                {"image": io.BytesIO(buffer.getvalue()), "captions": [f"number {i}"], "id": str(i)},
            )

    store.write(
        data_dir=data_dir, name="pictures", features=store.image_text_features(),
        splits={"train": pictures}, description="test",
    )  # fmt: skip
    return data_dir


@pytest.fixture(scope="module")
def clip(prepared, tmp_path_factory):
    """A CLIP on disk that was trained on that set."""
    changes = {
        "model.joint_width": E, "model.patch_px": 4, "data.image_px": PX,
        "data.source": "pictures", "data.data_dir": str(prepared),
    }  # fmt: skip
    path = tiny_stages.write_clip(tmp_path_factory.mktemp("stages") / "clip", **changes)
    return ClipStage.load(path)


def fit(*args):
    return __main__.main(["pca", "--compilation_cache=", *args])


def test_it_fits_what_the_clip_makes_of_the_set(clip, tmp_path, capfd):
    out = tmp_path / "made" / "pca.npz"
    args = [f"--clip={clip.folder}", f"--out={out}", "--batch=16", "--buckets=5", "--dims=3"]
    assert fit(*args) == 0
    captured = capfd.readouterr()
    assert "3 of 6 components of 37 embeddings explain 0." in captured.out
    assert "37/37 pictures embedded" in captured.err
    fitted = pca.load(str(out))
    assert (fitted.num_dims, fitted.num_buckets, fitted.num_examples) == (3, 5, 37)
    assert fitted.clip == clip.fingerprint and fitted.joint_width == E
    np.testing.assert_allclose(np.linalg.norm(fitted.mean), 1, atol=0.5)
    bytes_ = out.read_bytes()
    assert fit(*args) == 0 and out.read_bytes() == bytes_
    assert fit(*args, "--max_examples=20") == 0
    assert pca.load(str(out)).num_examples == 20


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--buckets=100"], "100 buckets from 37"),
        (["--dims=7", "--buckets=4"], "7 dimensions"),
        (["--batch=0"], "--batch=0"),
        (["--buckets=1"], "--buckets=1"),
        (["--source=absent"], "'absent' is not a prepared set"),
        (["--out=pca.txt"], "must end in .npz"),
        (["--clip=no/such"], "does not exist"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(clip, tmp_path, capfd, args, says):
    assert fit(f"--clip={clip.folder}", f"--out={tmp_path / 'pca.npz'}", *args) == 2
    assert says in capfd.readouterr().err
