"""What a traced function will compute and keep: counted in its jaxpr, before any compiler.

Hardware FLOPs are those of every matrix product and convolution that runs, 2 per multiply-add:
the backward pass, what recomputation repeats, and scores that a mask throws away. Elementwise work
is not counted (its time is memory traffic). The compiler's own `cost_analysis` cannot be used: it
counts the body of a loop once.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core


def hardware(fn: Callable, *arguments: Any) -> float:
    """FLOPs of one call on all devices together.

    Args:
      fn: jax-traceable; the arguments are arrays or ShapeDtypeStructs.

    Of the branches of a conditional the dearest counts, and a loop without a known length once.
    """
    return _count(jax.make_jaxpr(fn)(*arguments).jaxpr)


def kept_bytes(loss: Callable, params: Any, *rest: Any) -> int:
    """Bytes, over all devices, that the backward pass of `loss` needs from the forward pass.

    The activations: what remat is about. Values that are arguments anyway are left out.

    Args:
      loss: (params, *rest) -> (scalar, anything).
      params: what is differentiated.
      *rest: other arguments; all may be ShapeDtypeStructs.
    """

    def backward(params, rest):
        return jax.vjp(lambda p: loss(p, *rest), params, has_aux=True)[1]

    kept = jax.make_jaxpr(backward)(params, rest).jaxpr
    values = {v for v in kept.outvars if not isinstance(v, jax.extend.core.Literal)}
    return sum(v.aval.size * v.aval.dtype.itemsize for v in values - set(kept.invars))


def _count(jaxpr) -> float:
    return sum(_equation(eqn) for eqn in jaxpr.eqns)


def _equation(eqn) -> float:
    name = eqn.primitive.name
    if name == "dot_general":
        return _dot(eqn)
    if name == "conv_general_dilated":
        return _convolution(eqn)
    inside = [_count(jaxpr) for jaxpr in _inner(eqn)]
    if name == "cond":
        return max(inside)
    times = 1
    if name == "scan":
        times = eqn.params["length"]
    elif name == "shard_map":  # its body sees one device's part
        mesh = eqn.params["mesh"]
        times = math.prod(mesh.shape[axis] for axis in eqn.params["newly_manual_axes"])
    return times * sum(inside)


def _inner(eqn) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)  # of a ClosedJaxpr
            if hasattr(item, "eqns"):
                yield item


def _dot(eqn) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2.0 * eqn.outvars[0].aval.size * math.prod(left[i] for i in contracted)


def _convolution(eqn) -> float:
    """The zeros that a dilation of the input inserts are not multiplied; padding is."""
    kernel = eqn.invars[1].aval
    outputs = eqn.params["dimension_numbers"].rhs_spec[0]
    taps = kernel.size // kernel.shape[outputs]
    return 2.0 * eqn.outvars[0].aval.size * taps / math.prod(eqn.params["lhs_dilation"])
