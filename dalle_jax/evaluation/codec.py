"""How well a codec gives pictures back: PSNR, SSIM, and how much of its codebook it uses.

Numpy and scipy on uint8 pictures, as they would be saved: the numbers that papers compare.
"""

import numpy as np
from scipy import ndimage

_PERFECT_DB = 100.0  # what equal pictures count as, so that a mean stays finite
_SIGMA, _RADIUS = 1.5, 5  # SSIM's 11 x 11 window
_K1, _K2 = 0.01, 0.03


def psnr(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair, in dB: float64 [B]; equal pictures give 100.

    Args:
      images: uint8 [B, h, w, C].
      others: uint8 [B, h, w, C].
    """
    _check(images, others)
    error = np.square(images.astype(np.float64) - others).mean(axis=(1, 2, 3))
    floor = 255.0**2 / 10 ** (_PERFECT_DB / 10)
    return 10 * np.log10(255.0**2 / np.maximum(error, floor))


def ssim(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Structural similarity of each pair, at most 1: float64 [B].

    Gaussian window of 11 x 11 with sigma 1.5, only where it lies wholly inside; the mean over
    pixels and channels.

    Args:
      images: uint8 [B, h, w, C], h and w at least 11.
      others: uint8 [B, h, w, C].

    Raises:
      ValueError: for smaller pictures, or arrays that do not match.

    Source: Wang et al. 2004 (Image quality assessment: from error visibility to structural
    similarity), eq. 13. Deliberate difference: colour channels are averaged, the paper has gray.
    """
    _check(images, others)
    if min(images.shape[1:3]) < 2 * _RADIUS + 1:
        raise ValueError(f"pictures are {images.shape[1:3]}; SSIM's window needs 11 px.")
    x, y = images.astype(np.float64), others.astype(np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x**2
    var_y = _blur(y * y) - mean_y**2
    cov = _blur(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * 255) ** 2, (_K2 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * cov + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean(axis=(1, 2, 3))


def codebook_usage(counts: np.ndarray) -> dict[str, float]:
    """What a histogram of codes says about the codebook.

    Args:
      counts: [V] how often each entry was used.

    Returns:
      `codes`: V; `used`: entries used at all; `perplexity`: exp of the histogram's entropy, the
      number of entries used evenly that would be as diverse. Read both: 79 used entries were seen
      with a perplexity of 8.
    """
    share = counts[counts > 0] / max(counts.sum(), 1)
    return {
        "codes": len(counts),
        "used": int((counts > 0).sum()),
        "perplexity": float(np.exp(-(share * np.log(share)).sum())),
    }


def _blur(x: np.ndarray) -> np.ndarray:
    """[B, h, w, C] to the window's mean where it fits: [B, h - 10, w - 10, C]."""
    blurred = ndimage.gaussian_filter(x, (0, _SIGMA, _SIGMA, 0), truncate=_RADIUS / _SIGMA)
    return blurred[:, _RADIUS:-_RADIUS, _RADIUS:-_RADIUS]


def _check(images: np.ndarray, others: np.ndarray) -> None:
    for array in (images, others):
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape != images.shape:
            raise ValueError(
                f"expected two arrays uint8 [B, h, w, C]; got {images.dtype} {images.shape} and "
                f"{others.dtype} {others.shape}."
            )
