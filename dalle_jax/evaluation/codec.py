"""Suite recon: how well a codec reconstructs pictures, and how much of its codebook it uses.

PSNR and SSIM by numpy and scipy on uint8 pictures, as they would be saved: the numbers that papers
compare.
"""

from collections.abc import Callable, Iterable

import numpy as np
from scipy import ndimage

from dalle_jax.evaluation import progress
from dalle_jax.evaluation.results import Result, Row
from dalle_jax.types import UsageError

_PERFECT_DB = 100.0  # of equal pictures, so that a mean stays finite
_SIGMA, _RADIUS = 1.5, 5  # SSIM's 11 x 11 window
_K1, _K2 = 0.01, 0.03
_SHOWN = 8


def suite(
    batches: Iterable[np.ndarray],
    encode: Callable[[np.ndarray], np.ndarray],
    decode: Callable[[np.ndarray], np.ndarray],
    num_codes: int,
    report: progress.Report = progress.silent,
) -> Result:
    """PSNR, SSIM and codebook usage of a codec.

    Args:
      batches: uint8 [B, h, w, 3] each.
      encode: pictures to codes, int [B, ...].
      decode: codes to pictures, uint8 [B, h, w, 3].
      num_codes: V.
      report: called with lines of progress.

    Returns:
      `{"n", "psnr", "ssim", "codebook": {"codes", "used", "perplexity"}}`, and the first 8 pictures
      above their reconstructions.

    Raises:
      UsageError: without pictures.
    """
    counts = np.zeros(num_codes, np.int64)
    psnrs, ssims, rows = [], [], []
    timer = progress.Clock("recon", None, report)
    for images in batches:
        codes = np.asarray(encode(images))
        others = np.asarray(decode(codes))
        counts += np.bincount(codes.ravel(), minlength=num_codes)
        psnrs.append(psnr(images, others))
        ssims.append(ssim(images, others))
        if not rows:
            shown = slice(_SHOWN)
            names = [f"picture {i + 1}" for i in range(len(images[shown]))]
            rows.append(Row("Pictures", images[shown], names))
            decibels = [f"{x:.1f} dB" for x in psnrs[0][shown]]
            rows.append(Row("Reconstructions", others[shown], decibels))
        timer.add(len(images))
    if not rows:
        raise UsageError("there are no pictures to reconstruct; give a split that holds some.")
    figures = {
        "n": sum(map(len, psnrs)),
        "psnr": float(np.concatenate(psnrs).mean()),
        "ssim": float(np.concatenate(ssims).mean()),
        "codebook": codebook_usage(counts),
    }
    return Result(figures, rows)


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

    The mean over pixels and channels, of Gaussian windows of 11 x 11 with sigma 1.5 that are
    completely inside the picture.

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
    """How much of a codebook is used, from a histogram of codes.

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
    """The mean over each window that fits: [B, h, w, C] -> [B, h - 10, w - 10, C]."""
    blurred = ndimage.gaussian_filter(x, (0, _SIGMA, _SIGMA, 0), truncate=_RADIUS / _SIGMA)
    return blurred[:, _RADIUS:-_RADIUS, _RADIUS:-_RADIUS]


def _check(images: np.ndarray, others: np.ndarray) -> None:
    for array in (images, others):
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape != images.shape:
            raise ValueError(
                f"expected two arrays uint8 [B, h, w, C]; got {images.dtype} {images.shape} and "
                f"{others.dtype} {others.shape}."
            )
