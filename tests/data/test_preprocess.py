"""Decoding and crops: sizes, determinism, which pixels can be reached, flips, bad pictures."""

import io

import numpy as np
import pytest
from PIL import Image

from dalle_jax.data import preprocess


def _gradient(height, width):
    """Channel 0 holds the column, channel 1 the row, so a crop says where it is from."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.arange(width)
    image[..., 1] = np.arange(height)[:, None]
    return image


def _encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("name", preprocess.CROPS)
@pytest.mark.parametrize("shape", [(32, 32), (40, 70), (70, 40), (9, 200), (1, 1), (33, 32)])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_every_crop_gives_the_size_asked_for(name, shape, seed):
    rng = None if seed is None else np.random.default_rng(seed)
    out = preprocess.CROPS[name](_gradient(*shape), 32, rng)
    assert out.shape == (32, 32, 3) and out.dtype == np.uint8


@pytest.mark.parametrize("name", preprocess.CROPS)
def test_same_generator_same_crop(name):
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    a, b, c = (preprocess.CROPS[name](image, 32, np.random.default_rng(s)) for s in (5, 5, 6))
    np.testing.assert_array_equal(a, b)
    assert (name in preprocess.DETERMINISTIC) == bool((a == c).all())
    alone = preprocess.CROPS[name](image, 32)
    np.testing.assert_array_equal(alone, preprocess.CROPS[name](image, 32))


def test_right_size_is_untouched():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    for name in preprocess.CROPS:
        np.testing.assert_array_equal(preprocess.CROPS[name](image, 32), image)


def test_area_resize_is_the_mean_of_the_area():
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    mean = image.reshape(32, 4, 32, 4, 3).mean(axis=(1, 3))
    assert np.abs(preprocess.crop_none(image, 32) - mean).max() <= 1.01


def test_only_the_dvae_crop_flips():
    """Columns grow to the right in the source, so a flipped crop has them falling."""
    image = _gradient(64, 64) * 2
    flipped = {}
    for name in ("dvae", "dalle", "clip"):
        crops = [preprocess.CROPS[name](image, 32, np.random.default_rng(s)) for s in range(100)]
        flipped[name] = np.mean([int(c[0, 0, 0]) > int(c[0, -1, 0]) for c in crops])
    assert flipped["dalle"] == flipped["clip"] == 0
    assert 0.3 < flipped["dvae"] < 0.7


def _scale_and_centre(crop):
    columns = np.sort(crop[16, :, 0].astype(float))
    return (columns[-1] - columns[0]) / (len(columns) - 1), columns.mean()


def test_crops_have_the_ranges_of_the_listings():
    """A 128 x 250 picture at px 32: step between pixels = 128 / t; centre within the slack."""
    image = _gradient(128, 250)
    for name, low, high in (("dvae", 36, 48), ("dalle", 32, 36)):
        seen = [
            _scale_and_centre(preprocess.CROPS[name](image, 32, np.random.default_rng(s)))
            for s in range(300)
        ]
        steps, centres = np.array(seen).T
        assert np.isclose(steps.min(), 128 / high, rtol=0.05)
        assert np.isclose(steps.max(), 128 / low, rtol=0.05)
        # Slack 122: squares of the transformer start at 45 to 76, those of the dVAE at 0 to 122.
        reach = (45 + 50, 76 + 78) if name == "dalle" else (40, 210)
        assert reach[0] <= centres.min() and centres.max() <= reach[1]
    assert centres.max() - centres.min() > 20


def test_clip_crop_keeps_the_aspect():
    crop = preprocess.crop_clip(_gradient(64, 200), 32)
    step, centre = _scale_and_centre(crop)
    assert np.isclose(step, 2, atol=0.1) and np.isclose(centre, 99.5, atol=1.5)


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGBA", (8, 8), (200, 0, 0, 0)),
        Image.new("LA", (8, 8), (0, 0)),
        Image.fromarray(np.full((8, 8), 65535, np.uint16)),
        Image.new("1", (8, 8), 1),
    ],
    ids=["rgba", "la", "16 bit", "1 bit"],
)
def test_modes_become_white_rgb(image):
    out = preprocess.decode(_encode(image))
    assert out.shape == (8, 8, 3) and (out == 255).all()


def test_cmyk_palette_and_grey():
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    for data in (
        _encode(red.convert("CMYK"), "JPEG"),
        _encode(red.convert("P")),
        _encode(red, "WEBP", lossless=True),
    ):
        out = preprocess.decode(data)
        assert out[..., 0].min() > 230 and out[..., 1:].max() < 30
    assert (preprocess.decode(_encode(Image.new("L", (8, 8), 77))) == 77).all()


def test_exif_orientation_turns():
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[274] = 6  # turned by a quarter
    assert preprocess.decode(_encode(image, "JPEG", exif=exif)).shape == (8, 4, 3)


@pytest.mark.parametrize("channels", [None, 1, 2, 3, 4])
def test_raw_arrays(channels):
    shape = (6, 5) if channels is None else (6, 5, channels)
    out = preprocess.decode(np.full(shape, 255, np.uint8))
    assert out.shape == (6, 5, 3) and (out == 255).all()
    assert (preprocess.decode(np.full(shape, 65535, np.uint16)) == 255).all()
    assert preprocess.crop_none(preprocess.decode(np.zeros(shape, np.uint8)), 4).shape == (4, 4, 3)


def _bomb():
    """A small PNG that claims 2^34 pixels."""
    data = bytearray(_encode(Image.new("L", (4, 4))))
    data[16:24] = (2**17).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (None, "no picture"),
        (b"", "unreadable picture"),
        (b"<html>not found</html>", "unreadable picture"),
        (_encode(Image.effect_noise((64, 64), 50))[:900], "unreadable picture"),
        (_bomb(), "unreadable picture"),
        (np.zeros((4, 4, 7), np.uint8), "unreadable picture"),
        (np.zeros((4, 4, 3), np.float32), "unreadable picture"),
        (_encode(Image.new("L", (1, 200))), "extreme aspect ratio"),
        (np.zeros((0, 4, 3), np.uint8), "extreme aspect ratio"),
    ],
    ids=["none", "empty", "html", "truncated", "bomb", "7 channels", "float", "banner", "zero"],
)
def test_bad_pictures_have_a_reason(image, reason):
    with pytest.raises(preprocess.BadRecord) as caught:
        preprocess.decode(image, "x.png")
    assert caught.value.reason == reason
