"""unCLIP from its folders: ways from caption to picture, chunks, devices, latents, refusals."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import tiny_stages

from dalle_jax import config as cfg
from dalle_jax.engine import checkpoint, meshes
from dalle_jax.sampling import latents, manipulate, unclip
from dalle_jax.stages.unclip import Unclip
from dalle_jax.stages.unet import UnetStage
from dalle_jax.tasks import diffusion
from dalle_jax.types import UsageError

FEW = unclip.Settings(steps="3", upsample_steps=("2",))
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return tiny_stages.write_unclip(tmp_path_factory.mktemp("unclip"))


@pytest.fixture(scope="module")
def stages(folders) -> Unclip:
    return Unclip.load(folders)


@pytest.fixture(scope="module")
def text(stages) -> np.ndarray:

    own = stages.clip.tokenizer
    return own.encode(tiny_stages.CAPTIONS[:2], stages.clip.text_len, add_bos_eos=True)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(1).uniform(-0.8, 0.8, (2, 8, 8, 3)).astype(np.float32)


def test_slerp_keeps_its_ends_bit_for_bit_and_the_length_between(rng):
    a, b = rng.normal(size=(2, 5, 16)).astype(np.float32)
    for theta, end in ((0.0, a), (1.0, b)):
        np.testing.assert_array_equal(latents.slerp(a, b, theta), end)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    for theta in (0.2, 0.5, 0.9):
        found = np.asarray(latents.slerp(*unit, theta))
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
        whole = np.arccos((unit[0] * unit[1]).sum(1))
        np.testing.assert_allclose(np.arccos((unit[0] * found).sum(1)), theta * whole, atol=1e-3)
    np.testing.assert_allclose(latents.slerp(a, a, 0.5), a, rtol=1e-5)
    noise = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
    way = np.asarray(latents.slerp_noise(*noise, np.array([0, 0.5, 1], np.float32)))
    np.testing.assert_array_equal(way[[0, 2]], noise)
    np.testing.assert_allclose(way[1].std(), 1, atol=0.08)  # 768 numbers: 3 sigma


def test_text_difference_is_a_direction(rng):
    new, old = rng.normal(size=(2, 3, 8)).astype(np.float32)
    found = np.asarray(latents.text_difference(new, old))
    gap = new - old
    np.testing.assert_allclose(found, gap / np.linalg.norm(gap, axis=1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(latents.text_difference(new), axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(latents.text_difference(new, new), np.zeros_like(new))


def test_every_way_gives_an_embedding_or_none(stages, text):
    z_t = stages.clip.embed_texts(text)
    options = dict(key=KEY, indices=np.arange(2))
    for way in ("diffusion", "ar"):
        few = {"steps": 2} if way == "diffusion" else {}
        z, has_clip = unclip.image_embeddings(stages, way, text, **options, **few)
        np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-4)
        assert has_clip.all() and np.abs(z - z_t).max() > 0.01
        # A draw belongs to its index and not to its place.
        swapped = dict(key=KEY, indices=np.array([1, 0]))
        again, _ = unclip.image_embeddings(stages, way, text[::-1], **swapped, **few)
        np.testing.assert_allclose(again[::-1], z, atol=1e-4)
    z, has_clip = unclip.image_embeddings(stages, "none", text, **options)
    np.testing.assert_array_equal(z, z_t)
    assert has_clip.all()
    assert not unclip.image_embeddings(stages, "caption", text, **options)[1].any()


def test_candidates_do_not_depend_on_chunks_and_devices(stages, text):
    draw = dict(prior_name="none", text=text[0], keep=3, key=KEY)
    one = unclip.sample_best(stages, settings=FEW, num_candidates=3, **draw)
    assert one.images.shape == (3, 16, 16, 3) and one.small.shape == (3, 8, 8, 3)
    np.testing.assert_array_equal(one.candidates, np.argsort(-one.scores, kind="stable"))
    mesh = meshes.make_mesh(cfg.ConfigDict(dict(data=8, fsdp=1, tensor=1, rules="dp")))
    small = unclip.Settings(steps="3", upsample_steps=("2",), chunk=2)
    for drawing, where in ((small, None), (FEW, mesh)):
        other = unclip.sample_best(stages, settings=drawing, num_candidates=3, mesh=where, **draw)
        np.testing.assert_array_equal(other.candidates, one.candidates)
        np.testing.assert_allclose(other.images, one.images, atol=2e-4)
        np.testing.assert_allclose(other.scores, one.scores, atol=1e-4)


def test_the_unchanged_latent_gives_the_picture_back(stages, pictures):
    """Of a network that finds no noise, whose way back is exact; another in tests/diffusion."""
    params = stages.decoder.params
    silent = {**params, "out": jax.tree.map(np.zeros_like, params["out"])}
    run = dataclasses.replace(stages.decoder.run, variables={"params": silent})
    decoder = dataclasses.replace(stages.decoder, run=run)
    stages = dataclasses.replace(stages, decoder=decoder)
    latent = manipulate.invert(stages, pictures, FEW)
    assert np.abs(latent.x_t).max() < 0.1 * np.abs(pictures).max()
    drawn = manipulate.sample(stages, latent, FEW, key=KEY, indices=np.arange(2))
    np.testing.assert_allclose(drawn, pictures, atol=1e-3)


def test_eta_says_whether_variations_differ(stages, pictures):
    latent = manipulate.invert(stages, pictures, FEW)
    one = manipulate.Latent(latent.z[:1], latent.x_t[:1])
    still = manipulate.vary(stages, one, 2, FEW, key=KEY)
    # Bit for bit on Intel's cores; on AMD's EPYC the rows of a batch differ by 2e-6.
    np.testing.assert_allclose(still[0], still[1], atol=1e-5)
    moved = manipulate.vary(stages, one, 2, dataclasses.replace(FEW, eta=1.0), key=KEY)
    assert np.abs(moved[0] - moved[1]).max() > 0.1


def test_an_interpolation_ends_at_the_pictures_own_reconstructions(stages, pictures):
    ends = manipulate.invert(stages, pictures, FEW)
    way = manipulate.between(stages, ends, [0, 0.5, 1], "slerp", key=KEY)
    np.testing.assert_array_equal(way.z[[0, 2]], ends.z)
    np.testing.assert_array_equal(way.x_t[[0, 2]], ends.x_t)
    drawn = manipulate.sample(stages, way, FEW, key=KEY, indices=np.arange(3))
    own = manipulate.sample(stages, ends, FEW, key=KEY, indices=np.arange(2))
    np.testing.assert_allclose(drawn[[0, 2]], own, atol=1e-4)
    fixed = manipulate.between(stages, ends, [0, 1], "fixed", key=KEY)
    np.testing.assert_array_equal(fixed.x_t[0], fixed.x_t[1])
    with pytest.raises(UsageError, match="slerp, fixed"):
        manipulate.between(stages, ends, [0], "other", key=KEY)
    with pytest.raises(UsageError, match=r"\[0, 1\]"):
        manipulate.between(stages, ends, [0, 2.0], "slerp", key=KEY)


def test_an_edit_turns_the_embedding_towards_the_caption(stages, pictures, text):
    latent = manipulate.Latent(stages.clip.embed_images(pictures[:1]), pictures[:1])
    new, old = stages.clip.embed_texts(text)
    way = manipulate.edit(stages, latent, text[0], text[1], [0, 0.3, 0.6])
    np.testing.assert_array_equal(way.z[0], latent.z[0])
    assert (np.diff(way.z @ (new - old)) > 0).all()
    np.testing.assert_array_equal(way.x_t, pictures[:1].repeat(3, 0))
    with pytest.raises(UsageError, match="same to CLIP"):
        manipulate.edit(stages, latent, text[0], text[0], [0.5])


def test_fewer_components_keep_less_of_an_embedding(stages, pictures):
    width = stages.pca.joint_width
    latent, cosines = manipulate.truncate(stages, pictures, [2, width // 2, width], key=KEY)
    assert latent.z.shape == (6, width) and cosines.shape == (2, 3)
    np.testing.assert_allclose(cosines[:, -1], 1, atol=1e-4)
    assert (np.diff(cosines) > 0).all()
    np.testing.assert_array_equal(latent.x_t[0], latent.x_t[5])


def test_known_pixels_survive_decoder_and_upsampler(stages, folders, text, rng):
    picture = rng.uniform(-1, 1, (16, 16, 3)).astype(np.float32)
    known = np.ones((16, 16, 1), bool)
    known[4:9, 3:11] = False
    small = unclip.known_parts(stages, picture, known)[0][1]
    assert small.sum() == 64 - 3 * 5  # a pixel is known where all four below it are
    for other in (stages, Unclip.load(folders, only=("upsampler_1",))):
        drawn = unclip.sample_best(
            other,
            "caption",
            text[0],
            FEW,
            num_candidates=2,
            keep=1,
            key=KEY,
            known=(picture, known),
        )
        where = np.broadcast_to(known, picture.shape)
        np.testing.assert_array_equal(drawn.images[0][where], picture[where])
        assert np.abs(drawn.images[0] - picture)[~where].max() > 0.1


def test_stages_of_two_clips_are_refused_naming_both(folders, tmp_path):
    other = tmp_path / "prior"
    shutil.copytree(folders["prior"], other)
    (other / checkpoint.CLIP).write_text("0123456789abcdef")
    with pytest.raises(UsageError, match="stages of one pipeline share one CLIP") as refused:
        Unclip.load({**folders, "prior": str(other)})
    own = Unclip.load(folders, only=("prior",)).clip.fingerprint
    assert "0123456789abcdef" in str(refused.value) and own in str(refused.value)
    clip = tiny_stages.write_clip(tmp_path / "clip", seed=5)
    with pytest.raises(UsageError, match="another one, or trained on since"):
        Unclip.load({**folders, "clip": clip})


def test_a_decoder_starts_from_one_of_another_clip_but_an_inpainter_does_not(folders, tmp_path):
    clip = tiny_stages.write_clip(tmp_path / "clip", seed=5)
    config = UnetStage.load(folders["decoder"]).config
    config = cfg.override(config, {"stages.clip": clip, "init_from": folders["decoder"]})
    start = diffusion.make(config).warm_start
    loaded = UnetStage.load(folders["decoder"]).params
    jax.tree.map(np.testing.assert_array_equal, start(None, None)[0], loaded)
    with pytest.raises(UsageError, match="another one, or trained on since"):
        diffusion.make(cfg.override(config, {"loss.inpaint": True}))


def test_an_exported_clip_goes_with_what_its_run_trained(folders, tmp_path):
    from dalle_jax.__main__ import main

    for name in ("clip", "prior_ar", "decoder", "upsampler_1"):
        assert main(["export", f"--workdir={folders[name]}", f"--out={tmp_path / name}"]) == 0
    names = ("clip", "prior_ar", "decoder", "upsampler_1")
    moved = Unclip.load({name: str(tmp_path / name) for name in names})
    assert moved.clip.origin != moved.clip.fingerprint and moved.pca is not None
    assert moved.decoder.clip.folder == str(tmp_path / "clip") and moved.image_px == 16


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"decoder": ""}, "there is no decoder"),
        ({"decoder": "{upsampler_1}"}, "has no|expected a decoder|nor at"),
        ({"inpaint": "{decoder}"}, "shown no masks"),
        ({"prior": "{prior_ar}"}, "kind 'ar'; expected 'diffusion'"),
        ({"upsampler_2": "{upsampler_1}"}, "takes pictures of 8 px, but the stage before it"),
        ({"prior": "{decoder}"}, "task 'diffusion'; expected task 'prior'"),
    ],
)
def test_folders_that_do_not_fit_are_refused(folders, changed, says):
    wrong = {name: folder.format(**folders) for name, folder in changed.items()}
    with pytest.raises(UsageError, match=says):
        Unclip.load({**folders, **wrong})


def test_a_way_without_its_stage_names_the_others(folders):
    few = Unclip.load(folders, only=("prior",))
    unclip.check_prior(few, "diffusion")
    with pytest.raises(UsageError, match="no ar prior.*diffusion, none, caption"):
        unclip.check_prior(few, "ar")
    with pytest.raises(UsageError, match="unknown"):
        unclip.check_prior(few, "other")
