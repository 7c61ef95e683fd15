"""Suite retrieval: recall at k in CLIP's space, from pictures to captions and the reverse."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from dalle_jax.evaluation import progress
from dalle_jax.evaluation.results import Result
from dalle_jax.types import UsageError


def suite(
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    embed_images: Callable[[np.ndarray], np.ndarray],
    embed_texts: Callable[[np.ndarray], np.ndarray],
    ks: Sequence[int] = (1, 5),
    report: progress.Report = progress.silent,
) -> Result:
    """Recall at k in both directions, beside the level of random guessing.

    Args:
      batches: (uint8 [B, h, w, 3], token ids int32 [B, T]) each; equal rows of ids are one
        caption.
      embed_images: pictures to unit vectors [B, E].
      embed_texts: token ids to unit vectors [B, E].
      ks: how many nearest to consider.
      report: called with lines of progress.

    Returns:
      `{"n", "captions", "image_to_text", "text_to_image", "chance"}`, over the distinct captions.

    Raises:
      UsageError: without pictures.
    """
    pictures, texts = [], []
    timer = progress.Clock("embed", None, report)
    for images, tokens in batches:
        pictures.append(np.asarray(embed_images(images), np.float32))
        texts.append(np.asarray(tokens))
        timer.add(len(images))
    if not pictures:
        raise UsageError("there are no pictures to retrieve; give a split that holds some.")
    tokens, pictures = np.concatenate(texts), np.concatenate(pictures)
    groups = group(tokens)
    captions, first = np.unique(groups, return_index=True)
    embedded = np.asarray(embed_texts(tokens[first]), np.float32)
    return Result(
        {
            "n": len(pictures),
            "captions": len(captions),
            "image_to_text": recall(pictures, embedded, groups, captions, ks),
            "text_to_image": recall(embedded, pictures, captions, groups, ks),
            "chance": {
                "image_to_text": chance(groups, captions, ks),
                "text_to_image": chance(captions, groups, ks),
            },
        }
    )


def recall(
    queries: np.ndarray,
    keys: np.ndarray,
    query_groups: np.ndarray,
    key_groups: np.ndarray,
    ks: Sequence[int] = (1, 5),
    block: int = 1024,
) -> dict[str, float]:
    """Fraction of queries with a right key among their k nearest.

    Pictures often share a caption, so any key of the query's group is right. A wrong key that
    scores exactly as high as the best right one counts as ahead of it: collapsed embeddings get
    no credit.

    Args:
      queries: float [N, E], unit norm.
      keys: float [M, E], unit norm.
      query_groups: int [N], for example the number of each distinct caption.
      key_groups: int [M]; every query's group is among them.
      ks: how many nearest keys to consider.
      block: queries at a time, which bounds the memory.

    Returns:
      str(k) -> recall in [0, 1].

    Raises:
      ValueError: if a query has no right key.
    """
    ranks = []
    for start in range(0, len(queries), block):
        scores = queries[start : start + block] @ keys.T  # [block, M]
        right = query_groups[start : start + block, None] == key_groups[None]
        if not right.any(axis=1).all():
            raise ValueError("a query's group is not among the keys'; no key could be right.")
        best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
        ranks.append(((scores >= best) & ~right).sum(axis=1))
    ranks = np.concatenate(ranks)
    return {str(k): float((ranks < k).mean()) for k in ks}


def chance(
    query_groups: np.ndarray, key_groups: np.ndarray, ks: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """`recall` of keys in random order.

    A query with m right keys of M has one among the first k with probability
    1 - C(M - m, k) / C(M, k).
    """
    groups, counts = np.unique(key_groups, return_counts=True)
    num = len(key_groups)
    wrong = num - counts[np.searchsorted(groups, query_groups)].astype(np.float64)
    result = {}
    for k in ks:
        before = np.arange(min(k, num))
        missed = np.clip((wrong[:, None] - before) / (num - before), 0, None).prod(axis=1)
        result[str(k)] = float(1 - missed.mean())
    return result


def group(rows: np.ndarray) -> np.ndarray:
    """Numbers [N] that are equal where rows [N, ...] are equal, e.g. captions as token ids."""
    rows = np.asarray(rows).reshape(len(rows), -1)
    return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
