"""FLOPs and saved activations of a traced function, counted in its jaxpr before any compilation.

Hardware FLOPs are those of every matrix product and convolution that runs, 2 per multiply-add. They
include the backward pass, recomputation, and scores that a mask discards. Elementwise work is not
counted, because its time is memory traffic. The compiler's own `cost_analysis` is no alternative:
it counts the body of a loop once.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core

# Number of T x S x K products in cuDNN's attention kernels; the gradient recomputes the scores.
_FUSED = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def hardware(fn: Callable, *arguments: Any) -> float:
    """FLOPs of one call on all devices together.

    Args:
      fn: jax-traceable; the arguments are arrays or ShapeDtypeStructs.

    A conditional counts as its most expensive branch, and a loop of unknown length counts once. A
    Pallas kernel counts for every step of its grid, a cuDNN kernel for every score.
    """
    return count(jax.make_jaxpr(fn)(*arguments).jaxpr)


def kept_bytes(loss: Callable, params: Any, *rest: Any) -> int:
    """Bytes, over all devices, that the backward pass of `loss` needs from the forward pass.

    These are the activations, which remat reduces. Values that are arguments are not counted.

    Args:
      loss: (params, *rest) -> (scalar, anything).
      params: the differentiated argument.
      *rest: other arguments; all may be ShapeDtypeStructs.
    """

    def backward(params, rest):
        return jax.vjp(lambda p: loss(p, *rest), params, has_aux=True)[1]

    jaxpr = jax.make_jaxpr(backward)(params, rest).jaxpr
    saved = {v for v in jaxpr.outvars if not isinstance(v, jax.extend.core.Literal)}
    return sum(v.aval.size * v.aval.dtype.itemsize for v in saved - set(jaxpr.invars))


def count(jaxpr: Any, lanes: int = 1) -> float:
    """`hardware` of a jaxpr, with the sides of products rounded up to a multiple of `lanes`."""
    return sum(_equation(eqn, lanes) for eqn in jaxpr.eqns)


def inner(eqn: Any) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)  # a ClosedJaxpr has one
            if hasattr(item, "eqns"):
                yield item


def _equation(eqn, lanes: int) -> float:
    name = eqn.primitive.name
    if name == "dot_general":
        return _dot(eqn, lanes)
    if name == "conv_general_dilated":
        return _convolution(eqn)
    if name in _FUSED:
        b, t, h, k = eqn.invars[0].aval.shape
        return 2.0 * _FUSED[name] * b * h * t * eqn.invars[1].aval.shape[1] * k
    inside = [count(jaxpr, lanes) for jaxpr in inner(eqn)]
    if name == "cond":
        return max(inside)
    times = 1
    if name == "pallas_call":
        times = math.prod(eqn.params["grid_mapping"].grid)
    elif name == "scan":
        times = eqn.params["length"]
    elif name == "shard_map":  # its body sees one device's part
        mesh = eqn.params["mesh"]
        times = math.prod(mesh.shape[axis] for axis in eqn.params["newly_manual_axes"])
    return times * sum(inside)


def _dot(eqn, lanes: int) -> float:
    (left, right), (batch, other) = eqn.params["dimension_numbers"]
    x, y = (v.aval.shape for v in eqn.invars)

    def side(shape, dims):
        return -(-math.prod(shape[i] for i in dims) // lanes) * lanes

    rows = side(x, set(range(len(x))) - {*left, *batch})
    columns = side(y, set(range(len(y))) - {*right, *other})
    return 2.0 * math.prod(x[i] for i in batch) * rows * columns * side(x, left)


def _convolution(eqn) -> float:
    """Counts products with padding, but not with the zeros of a dilated input."""
    kernel = eqn.invars[1].aval
    outputs = eqn.params["dimension_numbers"].rhs_spec[0]
    taps = kernel.size // kernel.shape[outputs]
    return 2.0 * eqn.outvars[0].aval.size * taps / math.prod(eqn.params["lhs_dilation"])
