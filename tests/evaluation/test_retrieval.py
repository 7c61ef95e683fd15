"""Recall against brute force, its level of chance against random orders, the suite with fakes."""

import numpy as np
import pytest

from dalle_jax.evaluation import retrieval


def test_recall_equals_brute_force_in_any_block(rng):
    groups = rng.integers(0, 6, 40)
    keys = np.unique(groups)
    a, b = rng.normal(size=(40, 3)), rng.normal(size=(len(keys), 3))
    expected = {}
    for k in (1, 3):
        hits = [groups[i] in keys[np.argsort(-(a[i] @ b.T))[:k]] for i in range(40)]
        expected[str(k)] = pytest.approx(np.mean(hits))
    for block in (1, 7, 100):
        assert retrieval.recall(a, b, groups, keys, (1, 3), block) == expected


def test_collapsed_embeddings_get_no_credit():
    same = np.ones((10, 4)) / 2
    assert retrieval.recall(same, same, np.arange(10), np.arange(10)) == {"1": 0, "5": 0}


def test_chance_equals_random_orders(rng):
    groups = np.array([0] * 5 + [1] * 3 + [2] * 2)
    expected = retrieval.chance(groups, groups, (1, 3))
    orders = [groups[rng.permutation(10)] for _ in range(4000)]
    for k in (1, 3):
        simulated = np.mean([[g in order[:k] for g in groups] for order in orders])
        assert expected[str(k)] == pytest.approx(simulated, abs=0.02)
    assert retrieval.chance(np.arange(4), np.arange(4), (1, 9)) == {"1": 0.25, "9": 1.0}


def test_suite_joins_equal_captions():
    tokens = np.array([[2, 5], [2, 6], [2, 5], [2, 7]])
    batches = [(np.eye(4)[i : i + 2, None], tokens[i : i + 2]) for i in (0, 2)]
    space = np.eye(3)
    result, _ = retrieval.suite(
        batches,
        lambda pictures: space[[[0, 1, 0, 2][i] for i in pictures[:, 0].argmax(-1)]],
        lambda ids: space[ids[:, 1] - 5],
    )
    assert result["n"] == 4 and result["captions"] == 3
    assert result["image_to_text"]["1"] == result["text_to_image"]["1"] == 1.0
    assert result["chance"]["image_to_text"]["1"] == pytest.approx(1 / 3)
    assert result["chance"]["text_to_image"]["1"] == pytest.approx(1 / 3)
