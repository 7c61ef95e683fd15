"""Corruptions of an upsampler's small picture in training, so that it tolerates faults in samples.

  blur  the first upsampler: a Gaussian of 3 x 3 pixels, sigma 0.6.
  bsr   the second: blur, loss of resolution, noise and JPEG, each of random strength, in random
        order.

Pictures are [B, h, w, 3] float in [-1, 1]. All randomness of an example is a function of its own
key. Nothing here depends on a network.

Source: Ramesh et al. 2022 (arXiv:2204.06125) §2.2: "gaussian blur" and "a more diverse BSR
degradation", the latter as in Rombach et al. 2021 (arXiv:2112.10752), who shorten Zhang et al. 2021
(arXiv:2103.14006). Neither paper gives ranges: ours lie between the originals (noise to 25 of 255,
JPEG from 30) and the light version of CompVis/latent-diffusion, without anisotropic kernels and
camera noise. Our JPEG does not subsample colour, and it omits entropy coding, which is lossless.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.types import Array, Key, UsageError

KINDS = ("none", "blur", "bsr")

BLUR_TAPS, BLUR_SIGMA = 3, 0.6  # of the paper
BSR_TAPS, BSR_SIGMA = 7, (0.1, 1.2)  # pixels
BSR_SCALES = (1.0, 0.75, 0.5)  # of the side, down and up again, equally likely
BSR_NOISE = (0.0, 8 / 127.5)  # deviation: up to 8 of 255 levels
BSR_QUALITY = (50.0, 95.0)  # of JPEG

# The luminance table of the JPEG standard (ITU-T T.81, table K.1), used for colour too.
_JPEG_TABLE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ],
    np.float32,
)
# RGB -> luma and two differences of colour (ITU-T T.871).
_TO_YCC = np.array(
    [
        [0.299, 0.587, 0.114],
        [-0.168735892, -0.331264108, 0.5],
        [0.5, -0.418687589, -0.081312411],
    ],
    np.float32,
)


def corrupt(kind: str, images: Array, keys: Key) -> Array:
    """The pictures as the kind's upsampler sees them, rounded to 256 levels.

    Args:
      kind: one of KINDS.
      images: [B, h, w, 3] in [-1, 1].
      keys: [B]; only bsr is random.

    Raises:
      UsageError: for an unknown kind.
    """
    if kind not in KINDS:
        raise UsageError(f"corruption {kind!r} is unknown; use one of {', '.join(KINDS)}.")
    if kind == "blur":
        sigma = jnp.full((len(images),), BLUR_SIGMA)
        images = blur(images, sigma, BLUR_TAPS)
    if kind == "bsr":
        images = bsr(images, keys)
    return to_levels(images)


def to_levels(images: Array) -> Array:
    """The nearest of 256 levels in [-1, 1], as in a PNG of the picture."""
    return jnp.clip(jnp.round((images + 1) * 127.5) / 127.5 - 1, -1, 1)


def blur(images: Array, sigma: Array, taps: int) -> Array:
    """Gaussian blur, the picture mirrored at its edges.

    Args:
      images: [B, h, w, C]; sides of more than taps // 2.
      sigma: [B] pixels, above 0.
      taps: side of the square kernel, odd.
    """
    half = taps // 2
    places = jnp.arange(-half, half + 1, dtype=jnp.float32)[None]
    weights = jnp.exp(-0.5 * jnp.square(places / sigma[:, None]))
    weights = weights / weights.sum(1, keepdims=True)  # [B, taps]
    for axis in (1, 2):
        size = images.shape[axis]
        margin = [(half, half) if i == axis else (0, 0) for i in range(4)]
        wide = jnp.pad(images, margin, mode="reflect")
        images = sum(
            weights[:, i, None, None, None] * jax.lax.slice_in_dim(wide, i, i + size, axis=axis)
            for i in range(taps)
        )
    return images


def bsr(images: Array, keys: Key) -> Array:
    """Blur, loss of resolution, noise and JPEG, in a random order per example: [B, h, w, 3]."""

    def one(image: Array, key: Key) -> Array:
        key, order = jax.random.split(key)
        order = jax.random.permutation(order, len(_STEPS))

        def step(image: Array, which: Array) -> tuple[Array, None]:
            return jax.lax.switch(which, _STEPS, image, jax.random.fold_in(key, which)), None

        return jax.lax.scan(step, image, order)[0]

    return jax.vmap(one)(images, keys)


def jpeg(images: Array, quality: Array) -> Array:
    """The pictures after JPEG compression, not rounded to levels.

    Args:
      images: [B, h, w, 3] in [-1, 1], of any size.
      quality: [B] in [1, 100], on libjpeg's scale.
    """
    h, w = images.shape[1:3]
    margin = ((0, 0), (0, -h % 8), (0, -w % 8), (0, 0))
    x = jnp.pad(images * 127.5, margin, mode="edge")
    ycc = jnp.einsum("bhwc,dc->bhwd", x, _TO_YCC)
    b, height, width, _ = ycc.shape
    squares = ycc.reshape(b, height // 8, 8, width // 8, 8, 3)
    dct = _dct()
    coefficients = jnp.einsum("ui,bricjd,vj->brucvd", dct, squares, dct)
    scale = jnp.where(quality < 50, 50 / quality, 2 - quality / 50)  # libjpeg
    table = jnp.clip(jnp.round(_JPEG_TABLE[None] * scale[:, None, None]), 1, 255)
    table = table[:, None, :, None, :, None]
    coefficients = jnp.round(coefficients / table) * table
    squares = jnp.einsum("ui,brucvd,vj->bricjd", dct, coefficients, dct)
    x = jnp.einsum("bhwd,cd->bhwc", squares.reshape(ycc.shape), np.linalg.inv(_TO_YCC))
    return jnp.clip(x[:, :h, :w] / 127.5, -1, 1)


@functools.cache
def _dct() -> np.ndarray:
    """The orthonormal cosine transform of 8 numbers: [8 frequencies, 8 places]."""
    k, n = np.meshgrid(np.arange(8), np.arange(8), indexing="ij")
    basis = np.cos(np.pi * (2 * n + 1) * k / 16) / 2
    basis[0] /= np.sqrt(2)
    return basis.astype(np.float32)


def _uniform(key: Key, bounds: tuple[float, float]) -> Array:
    """A number within the bounds."""
    return jax.random.uniform(key, minval=bounds[0], maxval=bounds[1])


def _blurred(image: Array, key: Key) -> Array:
    return blur(image[None], _uniform(key, BSR_SIGMA)[None], BSR_TAPS)[0]


def _resized(image: Array, key: Key) -> Array:
    h, w, c = image.shape

    def down_and_up(scale: float) -> Array:
        small = (max(1, round(h * scale)), max(1, round(w * scale)), c)
        return jax.image.resize(jax.image.resize(image, small, "linear"), image.shape, "cubic")

    choices = jnp.stack([image if s == 1 else down_and_up(s) for s in BSR_SCALES])
    return choices[jax.random.randint(key, (), 0, len(BSR_SCALES))]


def _noised(image: Array, key: Key) -> Array:
    strength, key = jax.random.split(key)
    noise = jax.random.normal(key, (image.size,)).reshape(image.shape)
    return image + _uniform(strength, BSR_NOISE) * noise


def _compressed(image: Array, key: Key) -> Array:
    return jpeg(image[None], _uniform(key, BSR_QUALITY)[None])[0]


_STEPS = (_blurred, _resized, _noised, _compressed)
