"""Parameters for tests without compiling an initialiser: numpy noise in the right shapes.

XLA's CPU compiler takes seconds over a network's threefry draws, which was a fifth of the suite.
Biases and gains are noisy too, as after training: a forgotten one would not show at 0 and 1.
"""

import jax
import jax.numpy as jnp
import numpy as np


def noise(tree, seed: int = 0):
    """`tree` of shapes, boxed or not, with numbers: the same for the same names and seed.

    Matrices are N(0, 1 / rows), gains N(1, 0.01), biases and other vectors N(0, 0.01).
    """

    def one(path, leaf):
        name = jax.tree_util.keystr(path)
        rng = np.random.default_rng([seed, *name.encode()])
        is_gain = "'scale'" in name
        is_vector = is_gain or "bias" in name or leaf.ndim < 2
        std = 0.1 if is_vector else leaf.shape[-2] ** -0.5
        return jnp.asarray(is_gain + std * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, tree)


def init(module, *args, seed: int = 0, **kwargs):
    """What `module.init(key, *args)` would give, boxes included, with `noise` for numbers."""
    key = jax.random.key(seed)
    return noise(jax.eval_shape(lambda *a: module.init(key, *a, **kwargs), *args), seed)
