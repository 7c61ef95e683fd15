"""The order: a permutation per epoch, the same in any number of calls, and well mixed."""

import numpy as np
import pytest

from dalle_jax.data import order


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 97, 1000, 30_000])
def test_each_epoch_is_a_permutation(size):
    for epoch in (0, 1, 7):
        seen = order.shuffled(np.arange(size) + epoch * size, size, seed=3)
        np.testing.assert_array_equal(np.sort(seen), np.arange(size))


def test_epochs_and_seeds_differ():
    rows = [order.shuffled(np.arange(100) + e * 100, 100, s) for e in (0, 1) for s in (0, 1, -1)]
    for i, a in enumerate(rows):
        for b in rows[:i]:
            assert (a == b).sum() < 10  # about 1 expected


def test_any_part_can_be_asked_for_alone():
    together = order.shuffled(np.arange(500), 77, seed=5)
    parts = [order.shuffled(np.arange(i, i + 25), 77, seed=5) for i in range(0, 500, 25)]
    np.testing.assert_array_equal(together, np.concatenate(parts))


def test_first_places_are_uniform():
    """Where the first two positions of 2000 epochs land: a 4 sigma band around equal counts."""
    epochs = np.arange(2000)
    first = order.shuffled(epochs * 10, 10, seed=0)
    assert np.abs(np.bincount(first, minlength=10) - 200).max() < 4 * np.sqrt(180)
    a, b = (order.shuffled(epochs * 5 + place, 5, seed=0) for place in (0, 1))
    counts = np.bincount(a * 5 + b, minlength=25).reshape(5, 5)
    off_diagonal = counts[~np.eye(5, dtype=bool)]
    assert np.diag(counts).sum() == 0 and np.abs(off_diagonal - 100).max() < 4 * np.sqrt(95)


def test_neighbours_are_not_neighbours_after():
    out = order.shuffled(np.arange(10_000), 10_000, seed=1)
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 0.04
    assert abs(np.corrcoef(out, np.arange(10_000))[0, 1]) < 0.04


def test_uniform_is_uniform_and_streams_are_independent():
    p = np.arange(20_000)
    a, b = order.uniform(p, 0, 1), order.uniform(p, 0, 2)
    assert 0 <= a.min() and a.max() < 1
    assert abs(a.mean() - 0.5) < 0.01 and abs(a.var() - 1 / 12) < 0.003
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03
    assert abs(np.corrcoef(a, order.uniform(p, 1, 1))[0, 1]) < 0.03


def test_order_never_changes():
    """A resumed run must go on as it began: these numbers are part of the checkpoint format."""
    assert order.shuffled(np.arange(8), 1000, seed=0).tolist() == EXPECTED
    assert int(order.hashed(np.array([5]), 7, 3)[0]) == HASHED


EXPECTED = [885, 785, 401, 893, 234, 689, 811, 817]
HASHED = 4928933696615782140
