"""images: exact conversions, safe reading, grids that a person can read."""

import io
import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dalle_jax import images
from dalle_jax.types import UsageError


@pytest.fixture
def picture(rng) -> np.ndarray:
    return rng.integers(0, 256, (12, 20, 3), dtype=np.uint8)


def encoded(picture, format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def test_uint8_and_float_invert_each_other_in_numpy_and_under_jit():
    levels = np.arange(256, dtype=np.uint8)
    floats = images.to_float(levels)
    assert isinstance(floats, np.ndarray) and floats.dtype == np.float32
    assert floats[0] == -1 and floats[255] == 1
    np.testing.assert_array_equal(images.to_uint8(floats), levels)
    traced = jax.jit(images.to_float)(levels)
    np.testing.assert_allclose(traced, floats, atol=1e-6)
    np.testing.assert_array_equal(jax.jit(images.to_uint8)(traced), levels)


def test_to_uint8_clips_and_takes_bfloat16():
    np.testing.assert_array_equal(images.to_uint8(np.array([-7.0, 7.0])), [0, 255])
    assert images.to_uint8(jnp.zeros((2,), jnp.bfloat16)).dtype == np.uint8


def test_conversions_refuse_the_other_kind():
    with pytest.raises(TypeError, match="uint8"):
        images.to_float(np.zeros(3, np.float32))
    with pytest.raises(TypeError, match="float"):
        images.to_uint8(np.zeros(3, np.uint8))


def test_png_round_trip_and_equal_bytes(picture, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(images.png_bytes(picture))
    np.testing.assert_array_equal(images.read(path), picture)
    assert images.png_bytes(picture) == images.png_bytes(Image.fromarray(picture))
    assert images.data_uri(picture).startswith("data:image/png;base64,iVBOR")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, picture):
    exif = Image.Exif()
    exif[0x0112] = orientation
    read = images.decode(encoded(picture, "PNG", exif=exif))
    turned = {1: picture, 3: picture[::-1, ::-1], 6: np.rot90(picture, -1), 8: np.rot90(picture)}
    if orientation in turned:
        np.testing.assert_array_equal(read, turned[orientation])
    assert read.shape == ((20, 12, 3) if orientation >= 5 else (12, 20, 3))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "I"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new(mode, (6, 4))
    read = images.decode(encoded(image, "TIFF" if mode in ("CMYK", "I") else "PNG"))
    assert read.shape == (4, 6, 3) and read.dtype == np.uint8


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = np.array([[0, 32768, 65535]], np.uint16)
    read = images.decode(encoded(Image.fromarray(grey)))
    np.testing.assert_array_equal(read[0, :, 0], [0, 128, 255])


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (1, 2), (0, 0, 0, 0))
    image.putpixel((0, 1), (200, 10, 10, 255))
    read = images.decode(encoded(image))
    np.testing.assert_array_equal(read[:, 0], [[255, 255, 255], [200, 10, 10]])


def test_the_first_frame_of_an_animation_counts(picture):
    frames = [Image.fromarray(picture), Image.fromarray(255 - picture)]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(images.decode(data), picture)


def png_header(width: int, height: int) -> bytes:
    """A valid PNG start that promises width x height pixels in a few bytes."""

    def chunk(name: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_000, 11_000, 60_000])  # ours, Pillow's warning, Pillow's error
def test_bombs_are_refused_before_decoding(side):
    with pytest.raises(UsageError, match="pixels; at most"):
        images.decode(png_header(side, side), "bomb.png")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("empty.jpg", b""),
        ("text.jpg", b"not a picture"),
        ("page.png", b"<html><body>404</body></html>"),
        ("script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        ("cut.png", png_header(50, 50)),
    ],
)
def test_what_is_no_picture_is_named(name, data, tmp_path):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UsageError, match=name):
        images.read(path)


def test_a_truncated_jpeg_is_refused(rng):
    data = encoded(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), "JPEG")
    with pytest.raises(UsageError, match="cannot|not a picture"):
        images.decode(data[: len(data) // 2])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match="nowhere.png"):
        images.read(tmp_path / "nowhere.png")


def test_grid_places_every_picture_unblurred(rng):
    pictures = rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    sheet = np.asarray(images.grid(pictures, columns=3, scale=2, pad=4))
    assert sheet.shape == (4 + 2 * (16 + 4), 4 + 3 * (16 + 4), 3)
    for i, picture in enumerate(pictures):
        top, left = 4 + (i // 3) * 20, 4 + (i % 3) * 20
        np.testing.assert_array_equal(sheet[top : top + 16 : 2, left : left + 16 : 2], picture)


def test_labels_are_under_the_picture(rng):
    pictures = np.zeros((2, 32, 32, 3), np.uint8)
    bare = np.asarray(images.grid(pictures, columns=2, scale=4))
    sheet = np.asarray(images.grid(pictures, 2, ["a red cube", ""], scale=4))
    assert sheet.shape[1] == bare.shape[1] and sheet.shape[0] > bare.shape[0]
    under = sheet[bare.shape[0] :]
    assert (under[:, :132] < 128).any(), "no ink under the first picture"
    assert (under[:, 136:] == 255).all(), "ink under the second, which has no label"


@pytest.mark.parametrize("label", ["word " * 3000, "x" * 10_000, "🐙" * 500, "\n\t", "снег"])
def test_labels_of_any_kind_stay_within_four_lines(label):
    pictures = np.zeros((1, 16, 16, 3), np.uint8)
    sheet = images.grid(pictures, labels=[label], scale=4)
    assert sheet.width == 64 + 2 * 4 and sheet.height < 64 + 4 * 20


def test_grid_refuses_what_does_not_fit(picture):
    with pytest.raises(ValueError, match="labels"):
        images.grid(picture[None], labels=["a", "b"])
    with pytest.raises(ValueError, match="uint8"):
        images.grid(images.to_float(picture)[None])


def test_contact_sheet_stacks_titled_rows(rng):
    pictures = rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    rows = [("a prompt " * 30, pictures, ["0.1"] * 4), ("short", pictures[:1], None)]
    sheet = images.contact_sheet(rows, columns=4, scale=4)
    one = images.contact_sheet(rows[:1], columns=4, scale=4)
    assert sheet.width == one.width and sheet.height > one.height
