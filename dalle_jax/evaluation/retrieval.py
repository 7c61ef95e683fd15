"""How well pictures and captions find each other in CLIP's space: recall at k, both ways."""

from collections.abc import Sequence

import numpy as np


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
      ks: how many nearest keys to look at.
      block: queries at a time, so that no [N, M] matrix is held.

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
            raise ValueError("a query's group is not among the keys'; nothing could be right.")
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
        drawn = np.arange(min(k, num))
        missed = np.clip((wrong[:, None] - drawn) / (num - drawn), 0, None).prod(axis=1)
        result[str(k)] = float(1 - missed.mean())
    return result


def group(rows: np.ndarray) -> np.ndarray:
    """Numbers [N] that are equal where rows [N, ...] are equal, e.g. captions as token ids."""
    rows = np.asarray(rows).reshape(len(rows), -1)
    return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
