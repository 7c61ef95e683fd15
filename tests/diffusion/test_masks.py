"""Random masks of inpainting: what is erased, how often, by which key."""

import jax
import numpy as np

from dalle_jax.diffusion import masks

random_masks = jax.jit(masks.random_masks, static_argnames="px")


def test_masks_of_all_kinds_are_a_function_of_their_own_key(key):
    keys = jax.random.split(key, 400)
    known = np.asarray(random_masks(keys, px=16))
    assert known.shape == (400, 16, 16, 1) and known.dtype == bool
    np.testing.assert_array_equal(known[::-1], random_masks(keys[::-1], px=16))
    known = known[..., 0]
    share = known.mean(axis=(1, 2))
    assert (share < 1).all()  # something is erased
    assert 0.05 < (share == 0).mean() < 0.16  # everything: one in ten
    assert 0.4 < share.mean() < 0.8

    def is_rectangle(erased):
        rows, columns = erased.any(axis=1), erased.any(axis=0)
        return (erased == rows[:, None] & columns[None, :]).all()

    rectangles = [is_rectangle(~one) for one in known[share > 0]]
    assert 0.4 < np.mean(rectangles) < 0.75


def test_rectangles_keep_to_their_sizes(key):
    erased = ~np.asarray(jax.vmap(lambda k: masks.rectangle_mask(k, 16))(jax.random.split(key, 64)))
    for axis in (1, 2):
        sides = erased.any(axis=3 - axis).sum(axis=1)
        assert sides.min() >= 4 and sides.max() <= 13
    # Also at the border, so a picture can be continued outwards.
    assert erased[:, 0].any() and erased[:, :, -1].any()
