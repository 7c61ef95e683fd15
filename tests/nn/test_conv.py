"""Resizing: an untouched picture, a constant one, and values that stay in range."""

import numpy as np

from dalle_jax.nn import conv


def test_a_picture_of_the_right_size_is_returned_unchanged(rng):
    x = rng.uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    assert conv.resize(x, 8) is x


def test_resizing_is_antialiased_and_stays_in_range():
    """A checkerboard of single pixels becomes grey at half its side; an edge does not overshoot."""
    board = np.indices((16, 16)).sum(0) % 2 * 2.0 - 1.0
    x = np.broadcast_to(board[None, :, :, None], (1, 16, 16, 3)).astype(np.float32)
    assert np.abs(np.asarray(conv.resize(x, 8))[:, 2:-2, 2:-2]).max() < 0.1
    edge = np.where(np.arange(16) < 8, -1.0, 1.0).astype(np.float32)
    edge = np.broadcast_to(edge[None, None, :, None], (1, 16, 16, 3))
    large = np.asarray(conv.resize(edge, 64))
    assert large.shape == (1, 64, 64, 3) and large.min() == -1 and large.max() == 1
