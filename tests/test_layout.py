"""The fold: a reshape that comes back, never pads, and gives shards of whole tiles if any does."""

import jax
import numpy as np
import pytest

from dalle_jax import layout


@pytest.mark.parametrize("ways", [2, 3, 8, 31, 128])
def test_any_width_folds_and_comes_back(ways, rng):
    for rows in ways * np.array([1, 2, 3, 5, 8, 31]):
        for columns in (1, 6, 24, 62, 96):
            fold = layout.choose_fold(rows, columns, ways)
            storage = layout.Storage(fold, gathered=True)
            x = rng.normal(size=(2, rows, columns)).astype(np.float32)
            stored = storage.stored(x)
            assert stored.shape == (2, rows * fold, columns // fold)
            assert storage.plain(stored).shape == x.shape
            np.testing.assert_array_equal(storage.plain(stored), x)
            shard = stored.shape[1] // ways
            tiles = [m for m in range(1, 9) if columns % m == 0 and rows // ways * m % 8 == 0]
            assert (shard % layout.ROW_TILE == 0) == bool(tiles)
            assert fold == (tiles[0] if tiles else 1)


def test_a_shard_is_the_same_numbers_folded_and_plain():
    """So that unfolding for a checkpoint moves nothing between devices."""
    x = np.arange(24 * 40).reshape(24, 40)
    stored = layout.Storage(layout.choose_fold(24, 40, 8)).stored(x)
    for part, plain_part in zip(np.split(stored, 8), np.split(x, 8), strict=True):
        np.testing.assert_array_equal(part.ravel(), plain_part.ravel())


def test_the_12b_matrices_over_128_chips():
    width, ways = 3968, 128
    for rows, columns, fold in [(1, 1, 8), (1, 4, 8), (4, 1, 2)]:
        got = layout.choose_fold(rows * width, columns * width, ways)
        assert got == fold and rows * width * fold // ways == 248


def test_shapes_fold_without_arrays():
    storage = layout.Storage(4)
    folded = storage.stored(jax.ShapeDtypeStruct((3, 6, 8), np.float32))
    assert folded.shape == (3, 24, 2) and folded.dtype == np.float32
    assert storage.plain(folded).shape == (3, 6, 8)


def test_context_ends_with_its_block():
    how = layout.Gathers(None, "fsdp", ("fsdp",), lambda *_: layout.PLAIN)
    with layout.gathering(how):
        assert layout.gathers() is how
    assert layout.gathers() is None
