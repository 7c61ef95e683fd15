"""Types that every storey shares, and the one exception whose message is for the user."""

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
    """Bad input. The message names the value, what was expected and the cure.

    `python -m dalle_jax` prints the message without a traceback and exits with code 2. Raise it
    before anything compiles. Programming errors are other exceptions and keep their traceback.
    """


@dataclasses.dataclass(frozen=True)
class DtypePolicy:
    """The dtypes of a network; every module has one as its field `dtype`.

    Attributes:
      param: parameters and optimiser state.
      compute: activations and matrix products.
      accum: the float32 islands, whatever `compute` is: softmax, norm statistics, logits and loss,
        codebook distances, logit_scale, EMA. They name `accum` in the line that casts.
    """

    param: Any = jnp.float32
    compute: Any = jnp.float32
    accum: Any = jnp.float32

    @property
    def island(self) -> "DtypePolicy":
        """The policy of a layer that computes in `accum`."""
        return dataclasses.replace(self, compute=self.accum)

    @staticmethod
    def from_names(param: str, compute: str) -> "DtypePolicy":
        """The policy for two config strings.

        Raises:
          UsageError: for a name other than float32 or bfloat16.
        """
        known = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
        for name in (param, compute):
            if name not in known:
                raise UsageError(f"dtype {name!r} is not supported; use one of {sorted(known)}.")
        return DtypePolicy(known[param], known[compute], jnp.float32)
