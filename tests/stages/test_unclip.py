"""Priors from their folders: with their CLIP and PCA, or refused with a reason."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_stages

from dalle_jax import config as cfg
from dalle_jax.engine import checkpoint
from dalle_jax.sampling import prior
from dalle_jax.stages import pca, run
from dalle_jax.stages.clip import ClipStage
from dalle_jax.stages.prior import PriorStage
from dalle_jax.types import UsageError

SMALL = {"model.width": 16, "model.num_layers": 1, "model.num_heads": 1}
TOWER = {
    "image_width": 16, "image_layers": 1, "image_heads": 1, "text_width": 16, "text_layers": 1,
    "text_heads": 1, "joint_width": 8,
}  # fmt: skip


def write_clip(folder, seed=0):
    changes = {f"model.{name}": value for name, value in TOWER.items()}
    return tiny_stages.write_clip(folder, seed=seed, **changes)


def fitted_to(clip, num_dims=4):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, 40, 8))
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    return pca.fit(*z, num_dims=num_dims, num_buckets=8, fingerprint=clip.fingerprint)


def write_prior(folder, kind, clip, fitted=None, seed=0):
    """An exported folder as `train` and `export` leave it."""
    config = tiny_stages.config(f"prior_{kind}", **SMALL, **{"stages.clip": clip.folder})
    model = PriorStage.build(config, clip, fitted)
    inputs = [jnp.zeros(x.shape, x.dtype) for x in PriorStage.example_inputs(model)]
    params = jax.jit(model.init)(jax.random.key(seed), *inputs)
    path = tiny_stages.write(folder, config, nn.meta.unbox(params)["params"])
    files = run.identity_files(clip=clip, pca=pca.to_bytes(fitted) if fitted else b"")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("unclip")


@pytest.fixture(scope="module")
def clip(folder):
    return ClipStage.load(write_clip(folder / "clip"))


@pytest.fixture(scope="module")
def diffusion(folder, clip):
    return write_prior(folder / "diffusion", "diffusion", clip)


@pytest.fixture(scope="module")
def ar(folder, clip):
    return write_prior(folder / "ar", "ar", clip, fitted_to(clip))


def test_both_priors_draw_unit_embeddings(ar, diffusion):
    text = np.full((2, 12), 5, np.int32)
    z_t = np.eye(8, dtype=np.float32)[:2]
    for path, kind, options in ((ar, "ar", {}), (diffusion, "diffusion", {"steps": 2})):
        stage = PriorStage.load(path)
        assert (stage.kind, stage.text_len, stage.step) == (kind, 12, 7)
        assert stage.tokenizer.model_bytes == stage.clip.tokenizer.model_bytes
        assert (stage.pca is None) == (kind == "diffusion")
        z = prior.sample(
            stage.model, stage.on(), stage.tables, text, z_t, key=jax.random.key(0), **options
        )
        np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-5)


def test_a_prior_of_another_clip_is_refused_naming_both(folder, clip, diffusion):
    other = ClipStage.load(write_clip(folder / "other", seed=1))
    with pytest.raises(UsageError) as error:
        PriorStage.load(diffusion, clip=other.folder)
    for word in (clip.fingerprint, other.fingerprint, other.folder, "--clip"):
        assert word in str(error.value)


def test_the_clip_may_have_moved(folder, diffusion, clip):
    config = checkpoint.load_config(diffusion)
    lost = cfg.override(config, {"stages.clip": "no/such/folder"})
    assert run.companion(diffusion, lost, "clip") == str(folder / "clip")  # beside it
    with pytest.raises(UsageError, match="give its folder with --clip"):
        run.companion(str(folder / "elsewhere" / "prior"), lost, "clip")
    assert PriorStage.load(diffusion, clip=clip).clip is clip


def test_other_folders_are_refused(folder, ar, clip):
    with pytest.raises(UsageError, match="expected task 'prior'"):
        PriorStage.load(clip.folder)
    (folder / "ar" / "pca.npz").rename(folder / "ar" / "away")
    with pytest.raises(UsageError, match="pca.npz is missing"):
        PriorStage.load(ar)
    (folder / "ar" / "away").rename(folder / "ar" / "pca.npz")


def test_sizes_that_do_not_fit_the_pca_are_refused(clip):
    fitted = fitted_to(clip)
    config = tiny_stages.config("prior_ar", **SMALL)
    made = PriorStage.build(config, clip, fitted).config
    assert (made.num_dims, made.num_buckets) == (4, 8)
    fewer = cfg.override(config, {"model.num_dims": 3})
    assert PriorStage.build(fewer, clip, fitted).config.num_dims == 3
    with pytest.raises(UsageError, match="num_buckets=1024, but the PCA has 8"):
        PriorStage.build(cfg.override(config, {"model.num_buckets": 1024}), clip, fitted)


def test_a_picture_of_another_size_is_resized_for_the_clip(clip, rng):
    """Twice the size: nearly what the CLIP sees of the same picture at its own size."""
    small = rng.uniform(-1, 1, (2, 4, 4, 3)).repeat(4, axis=1).repeat(4, axis=2)
    large = small.repeat(2, axis=1).repeat(2, axis=2)
    text = np.full((2, 12), 3, np.int32)
    one, two = (clip.embeddings(clip.params, np.float32(x), text) for x in (small, large))
    np.testing.assert_allclose(np.sum(one[0] * two[0], axis=1), 1, atol=0.02)
    np.testing.assert_array_equal(one[1], two[1])
