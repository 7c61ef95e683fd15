"""Masks against a definition that walks over the grid, key by key."""

import numpy as np
import pytest

from dalle_jax.nn import masks
from dalle_jax.types import UsageError

TEXT = 3


def walk(kind: str, grid: int, kernel: int = 11) -> np.ndarray:
    """bool [n, n] over image tokens: every query steps through the keys its kind names."""
    n, half = grid * grid, kernel // 2
    table = np.zeros((n, n), bool)
    for query in range(n):
        if kind == "full":
            keys = range(query + 1)
        elif kind == "row":
            keys = [query - back for back in range(grid + 1)]
        elif kind == "column":
            keys = range(query % grid, query + 1, grid)
        else:
            rows = [query - grid * up for up in range(half + 1)]
            keys = [key + side for key in rows for side in range(-half, half + 1)]
        for key in keys:
            if 0 <= key <= query:
                table[query, key] = True
    return table


@pytest.mark.parametrize("kind", masks.KINDS)
@pytest.mark.parametrize("grid", [4, 11, 12, 32])
def test_image_to_image_equals_brute_force(kind, grid):
    table = masks.Mask(kind, TEXT, grid).table()
    np.testing.assert_array_equal(table[TEXT:, TEXT:], walk(kind, grid))


@pytest.mark.parametrize("kind", masks.KINDS)
def test_text_is_causal_and_seen_by_every_image_token(kind):
    table = masks.Mask(kind, TEXT, 4).table()
    np.testing.assert_array_equal(table[:TEXT, :TEXT], np.tril(np.ones((TEXT, TEXT), bool)))
    assert table[TEXT:, :TEXT].all()
    assert not table[:TEXT, TEXT:].any()


@pytest.mark.parametrize("kind", masks.KINDS)
def test_graph_equals_table(kind):
    mask = masks.Mask(kind, TEXT, 8)
    np.testing.assert_array_equal(np.asarray(mask.graph()), mask.table())
    assert mask.num_allowed() == mask.table().sum()


def test_keys_per_query_are_the_papers():
    """Ramesh et al. 2021, figure 11, on the 32x32 grid: 33, 32 and 61 keys at most."""
    most = {k: int(masks.Mask(k, 0, 32).table().sum(1).max()) for k in masks.KINDS}
    assert most == {"row": 33, "column": 32, "conv": 61, "full": 1024}


def test_row_window_reaches_the_previous_row_up_to_the_same_column():
    row = masks.Mask("row", 0, 4).table()[9].reshape(4, 4)  # query at row 2, column 1
    np.testing.assert_array_equal(
        row, np.array([[0, 0, 0, 0], [0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    )


def test_pattern_of_the_paper():
    kinds = [m.kind for m in masks.pattern(("row", "column", "row", "row"), "conv", 64, 256, 32)]
    assert [i + 1 for i, kind in enumerate(kinds) if kind == "column"] == list(range(2, 64, 4))
    assert kinds[-1] == "conv" and kinds.count("row") == 47 and kinds.count("column") == 16


def test_no_grid_is_plain_causal_text():
    table = masks.Mask("full", 5, 0).table()
    np.testing.assert_array_equal(table, np.tril(np.ones((5, 5), bool)))


def test_bad_values_are_refused():
    with pytest.raises(UsageError, match="'diagonal' is unknown"):
        masks.Mask("diagonal", 1, 4)
    with pytest.raises(UsageError, match="must be odd"):
        masks.Mask("conv", 1, 4, kernel=10)
    with pytest.raises(UsageError, match="is empty"):
        masks.pattern((), "", 2, 1, 4)
