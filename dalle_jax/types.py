"""Types that every storey shares, and the one exception whose text is written for the user."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray
Batch = dict[str, Array]
Params = Any  # a pytree of arrays
Key = jax.Array  # a typed key: jax.random.key


class UsageError(ValueError):
    """Bad input. The text names the value, what was expected and the cure.

    `python -m dalle_jax` prints it without a traceback and exits with code 2; raise it before
    anything compiles. A programming error is any other exception and keeps its traceback.
    """


@dataclasses.dataclass(frozen=True)
class DtypePolicy:
    """Where each number lives: parameters and optimiser, compute, and float32 islands.

    Islands (softmax, norm statistics, logits and loss, codebook distances, logit_scale, EMA) are
    float32 whatever `compute` says: they name `accum` where they cast.
    """

    param: Any = jnp.float32
    compute: Any = jnp.float32
    accum: Any = jnp.float32

    @staticmethod
    def from_names(param: str, compute: str) -> "DtypePolicy":
        """A policy from config strings.

        Raises:
          UsageError: for a name other than float32 or bfloat16.
        """
        known = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
        for name in (param, compute):
            if name not in known:
                raise UsageError(f"dtype {name!r} is not supported; use one of {sorted(known)}.")
        return DtypePolicy(known[param], known[compute], jnp.float32)
