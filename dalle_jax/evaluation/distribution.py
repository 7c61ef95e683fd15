"""Suite distribution: generated against real pictures as sets.

Fréchet distance, precision, recall and diversity by numpy and scipy, on features of any kind. A
figure means nothing without its features and its number of pictures. The features here are those of
this project's own CLIP, or plain pixels, and not Inception's: they compare runs of this project and
no published FID.
"""

from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image
from scipy.spatial import distance

from dalle_jax import chunks, images
from dalle_jax.evaluation import progress
from dalle_jax.evaluation.results import Result, Row
from dalle_jax.evaluation.settings import Settings
from dalle_jax.stages.clip import ClipStage
from dalle_jax.types import UsageError

NEIGHBOURS = 3  # k of precision and recall, as in the paper
MIN_PICTURES = 2 * (NEIGHBOURS + 1)  # below this neighbours and halves mean nothing
_SHOWN = 8
_PIXELS = 8  # side to which pictures are averaged, for plain pixels

Features = Callable[[np.ndarray], np.ndarray]
Generate = Callable[[np.ndarray, int, int], np.ndarray]


def clip_features(clip: ClipStage) -> Features:
    """Unit embeddings [B, E] of uint8 [B, h, h, 3]."""
    return lambda pictures: clip.embed_images(images.to_float(pictures))


def pixel_features(clip: ClipStage | None = None) -> Features:
    """Pixels in [-1, 1] of uint8 [B, h, h, 3], averaged to 8 x 8: [B, 192]."""

    def small(picture):
        box = Image.fromarray(picture).resize((_PIXELS, _PIXELS), Image.Resampling.BOX)
        return np.asarray(box).reshape(-1)

    return lambda pictures: images.to_float(np.stack([small(x) for x in pictures]))


FEATURES = {"clip": clip_features, "pixels": pixel_features}


def frechet(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Squared Fréchet distance between the Gaussians fitted to two sets: 0 or more.

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), in the square of the features'
    unit. It falls to 0 for equal sets. Few samples bias it upwards, by about a constant over their
    number, so that two samples of one distribution do not give 0. Compare figures of equally many
    pictures only, and with the distance between two sets of real pictures.

    Args:
      features_a: [N, F], N at least 2; any float, taken as float64. Fewer samples than features
        are allowed: a rank-deficient covariance does no harm here.
      features_b: [M, F], M at least 2.

    Raises:
      ValueError: for arrays of other shapes, or with numbers that are not finite.

    Source: Dowson & Landau 1982; Heusel et al. 2017 (arXiv:1706.08500) eq. 6. The bias: Chong &
    Forsyth 2020 (arXiv:1911.07023). Deliberate difference: tr((cov_a cov_b)^(1/2)) is the sum of
    the singular values of cov_a^(1/2) cov_b^(1/2), from the centred features' own singular values;
    a square root of the product of covariances loses half of the digits, and is complex where they
    are rank-deficient.
    """
    a, b = _checked(features_a, 2), _checked(features_b, 2)
    _check_width(a, b)
    scale_a, axes_a = _principal(a)
    scale_b, axes_b = _principal(b)
    cross = scale_a[:, None] * (axes_a @ axes_b.T) * scale_b
    shared = np.linalg.svd(cross, compute_uv=False).sum()
    means = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    # Rounding may leave -1e-16 of equal sets.
    return float(max(0.0, means + np.square(scale_a).sum() + np.square(scale_b).sum() - 2 * shared))


def precision_recall(
    real: np.ndarray, samples: np.ndarray, k: int = NEIGHBOURS, block: int = 1024
) -> tuple[float, float]:
    """(share of samples that are among the real pictures, share of real ones among the samples).

    A picture is among a set if it is no further from a member than that member's k-th nearest
    neighbour in the set. Precision measures quality, recall variety; both in [0, 1], both 1 for
    equal sets. Both depend on the number of pictures: compare equal numbers only.

    Args:
      real: [N, F], N above k.
      samples: [M, F], M above k.
      k: neighbours; a picture is not its own.
      block: rows of distances at a time, which bounds the memory.

    Raises:
      ValueError: for arrays of other shapes, too few rows or numbers that are not finite.

    Source: Kynkäänniemi et al. 2019 (arXiv:1904.06991) §2. Deliberate difference: float64, so that
    copies of a picture have distance 0 and not a rounding error of it.
    """
    if k < 1:
        raise ValueError(f"k={k}; expected 1 or more neighbours.")
    real, samples = _checked(real, k + 1), _checked(samples, k + 1)
    _check_width(real, samples)
    return _share_within(samples, real, k, block), _share_within(real, samples, k, block)


def diversity(features: np.ndarray, groups: np.ndarray) -> float:
    """Mean cosine distance between two pictures of one prompt, averaged over prompts.

    0 if all candidates of a prompt are alike, 1 if they are as unlike as orthogonal features, 2 at
    most. Unbiased in the number of candidates.

    Args:
      features: [N, F], no row of zeros.
      groups: int [N], the prompt of each; prompts with one picture only do not count.

    Raises:
      ValueError: if no prompt has two pictures, or for arrays of other shapes.
    """
    x, groups = _checked(features, 2), np.asarray(groups)
    if groups.shape != (len(x),):
        raise ValueError(f"groups has shape {groups.shape}; expected one of {len(x)} rows each.")
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError("a row of features is all zeros and has no direction.")
    unit, (_, which, counts) = (
        x / lengths,
        np.unique(groups, return_inverse=True, return_counts=True),
    )
    several = counts > 1
    if not several.any():
        raise ValueError("no group has two rows; diversity needs two pictures of one prompt.")
    sums = np.zeros((len(counts), x.shape[1]))
    np.add.at(sums, which.reshape(-1), unit)
    # The sum of all cosines in a group is the square of its summed directions.
    m = counts[several]
    cosines = (np.square(sums[several]).sum(axis=1) - m) / (m * (m - 1))
    return float(np.clip(1 - cosines, 0, 2).mean())


class Real:
    """The real pictures of a suite, read once for all its runs.

    Attributes:
      features: float64 [n, F].
      texts: int32 [n, T], the token ids of their captions.
      row: the first 8 pictures with their captions.
    """

    def __init__(
        self,
        batches: Iterable[tuple[np.ndarray, np.ndarray]],
        embed: Features,
        decode: Callable[[np.ndarray], str],
        report: progress.Report = progress.silent,
    ):
        """Reads them.

        Args:
          batches: (uint8 [B, h, w, 3], token ids int32 [B, T]) each.
          embed: uint8 [B, h, w, 3] to features [B, F].
          decode: ids [T] to a caption.
          report: called with lines of progress.

        Raises:
          UsageError: if they are fewer than MIN_PICTURES.
        """
        features, texts, shown = [], [], []
        timer = progress.Clock("embed", None, report)
        for pictures, tokens in batches:
            features.append(np.asarray(embed(pictures), np.float64))
            texts.append(np.asarray(tokens))
            shown += list(pictures[: _SHOWN - len(shown)])
            timer.add(len(pictures))
        check_count(sum(map(len, features)), "real pictures")
        self.features, self.texts = np.concatenate(features), np.concatenate(texts)
        captions = [decode(row) for row in self.texts[: len(shown)]]
        self.row = Row("real", np.stack(shown), captions)


def check_count(num: int, name: str) -> None:
    """Raises UsageError if so few pictures cannot be compared as sets."""
    if num < MIN_PICTURES:
        raise UsageError(
            f"{num} {name} are too few to compare sets; expected {MIN_PICTURES} at least, and "
            "hundreds for figures that mean something: give a larger split or --num_examples."
        )


def suite(
    real: Real,
    generate: Generate,
    embed: Features,
    settings: Settings,
    report: progress.Report = progress.silent,
) -> Result:
    """How near generated pictures are to real ones with the same captions.

    Args:
      real: the real pictures with their captions.
      generate: (token ids [P, T], N, index of the first caption) -> uint8 [P, N, h, w, 3].
      embed: uint8 [B, h, w, 3] to features [B, F], as for `real`.
      settings: candidates (N for each caption), batch, seed (of the halves), and the name of the
        features, for the names of figures.
      report: called with lines of progress.

    Returns:
      The figures, and the first candidates for the captions of `real.row`.

      n, candidates              real pictures, and pictures generated for each of their captions
      frechet_NAME               between n real and n generated pictures, one for each caption; the
                                 mean over candidates
      frechet_NAME_halves        the same between one half of the real pictures and those generated
                                 for the other half's captions, to be compared with the floor
      frechet_NAME_floor         between the two halves of the real pictures: what a perfect model
                                 would reach there, above 0 because the sets are finite
      precision, recall          see `precision_recall`; the mean over candidates
      precision_floor            of one half of the real pictures in the other (recall is alike)
      diversity                  see `diversity`; only with two candidates or more
      diversity_real             cosine distance between any two real pictures, of any caption
    """
    name, candidates = settings.features, settings.candidates
    features, row = _generate(real, generate, embed, settings, report)
    n = len(real.features)
    order = np.random.default_rng([settings.seed, 1]).permutation(n)
    one, two = order[: n // 2], order[n // 2 : n // 2 * 2]
    per = range(candidates)
    near = np.mean([precision_recall(real.features, features[:, c]) for c in per], axis=0)
    halves = [frechet(real.features[one], features[two, c]) for c in per]
    figures = {
        "n": n,
        "candidates": candidates,
        f"frechet_{name}": float(np.mean([frechet(real.features, features[:, c]) for c in per])),
        f"frechet_{name}_halves": float(np.mean(halves)),
        f"frechet_{name}_floor": frechet(real.features[one], real.features[two]),
        "precision": float(near[0]),
        "recall": float(near[1]),
        "precision_floor": precision_recall(real.features[one], real.features[two])[0],
    }
    if candidates > 1:
        flat = features.reshape(-1, features.shape[-1])
        figures["diversity"] = diversity(flat, np.repeat(np.arange(n), candidates))
    figures["diversity_real"] = diversity(real.features, np.zeros(n, int))
    return Result(figures, [row])


def _generate(real, generate, embed, settings, report) -> tuple[np.ndarray, Row]:
    """Features float64 [n, N, F] of generated pictures, and some of these."""
    n, num = len(real.texts), settings.candidates
    timer = progress.Clock("generate", n * num, report)
    features, shown = [], []
    for rows, count in chunks.rows(n, min(n, max(1, settings.batch // num))):
        pictures = np.asarray(generate(real.texts[rows], num, int(rows[0])))[:count]
        shown += list(pictures[: len(real.row.images) - len(shown), 0])
        flat = np.asarray(embed(pictures.reshape(-1, *pictures.shape[2:])), np.float64)
        features.append(flat.reshape(*pictures.shape[:2], -1))
        timer.add(count * num)
    return np.concatenate(features), Row("", np.stack(shown), real.row.labels)


def _principal(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviations [R] and directions [R, F] of the principal axes of rows."""
    centred = x - x.mean(axis=0)
    _, scale, axes = np.linalg.svd(centred, full_matrices=False)
    return scale / np.sqrt(len(x) - 1), axes


def _share_within(points: np.ndarray, among: np.ndarray, k: int, block: int) -> float:
    """Share of points [M, F] inside the k-nearest-neighbour balls of `among` [N, F]."""
    radii = np.concatenate(
        [
            # The nearest of all is the point itself.
            np.partition(distance.cdist(among[i : i + block], among), k, axis=1)[:, k]
            for i in range(0, len(among), block)
        ]
    )
    inside = [
        (distance.cdist(points[i : i + block], among) <= radii).any(axis=1)
        for i in range(0, len(points), block)
    ]
    return float(np.concatenate(inside).mean())


def _checked(x: np.ndarray, least: int) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or len(x) < least:
        raise ValueError(f"features have shape {x.shape}; expected [N, F] with N at least {least}.")
    if not np.isfinite(x).all():
        raise ValueError("features hold numbers that are not finite.")
    return x


def _check_width(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features of {a.shape[1]} and {b.shape[1]} numbers cannot be compared.")
