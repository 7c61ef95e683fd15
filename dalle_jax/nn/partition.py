"""The two touch points between a network and the mesh: named parameters, named activations.

A module says which logical axis (`dalle_jax.axes`) each dimension is; the engine's rules say which
mesh axes carry it. No other file under nn/ or models/ names a partitioning API of flax or jax.
"""

from collections.abc import Callable

import flax.linen as nn

from dalle_jax.types import Array


def param_with_axes(init: Callable[..., Array], names: tuple[str | None, ...]):
    """An initializer whose value is boxed with the logical axis name of each dimension.

    Args:
      init: (key, shape, dtype) -> array, e.g. `nn.initializers.normal(0.02)`.
      names: one name of `dalle_jax.axes` per dimension; None = never sharded.
    """
    return nn.with_logical_partitioning(init, names)


def constrain(x: Array, *names: str | None) -> Array:
    """`x`, laid out as the rules in force say for its logical axes; outside a mesh, `x` itself.

    Args:
      x: an activation of rank len(names).
      *names: one `ACT_...` name of `dalle_jax.axes` per dimension; None = replicated.

    Raises:
      ValueError: if there is not one name per dimension (flax would silently do nothing).
    """
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} axis names {names} for an array of shape {x.shape}.")
    return nn.with_logical_constraint(x, names)


def unconstrained():
    """A context in which `constrain` leaves everything to the partitioner.

    For decoding, whose arrays have other leading axes (few prompts, many candidates) than the
    training batch that the rules speak of.
    """
    return nn.logical_axis_rules(())
