"""Matrix products and convolutions; on CPUs, rewritten into the layout that XLA multiplies fastest.

The gradient of a weight contracts over positions, the slow axis of both factors, and the CPU
library needs one factor transposed. Under plain differentiation XLA copies the wrong factor, or
calls a convolution whose window is the full picture. Here one factor is transposed into a separate
array, and a barrier prevents XLA from folding the transpose back. GFLOP/s of weight gradients on
one thread of an AMD EPYC in float32, before -> after:

  matmul [2304, 256] x [256, 1024]       29 -> 61
  matmul [2560, 256] x [256, 2048]       25 -> 62
  3x3 convolution, 128 channels, 32 px   21 -> 50
  3x3 convolution, 256 channels, 16 px   32 -> 59

Forward products run at 60 to 75, except with few rows (`_few_rows`) or with heads after positions
(`einsum`). On other platforms all functions equal `@`, `jnp.einsum` and `lax.conv_general_dilated`;
on a CPU so do forward convolutions and gradients of activations.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from dalle_jax.nn import partition
from dalle_jax.types import Array

# With fewer channels (3 in a stem), a product per tap of the window is too thin.
_MIN_CHANNELS = 16
# With at most so many rows, a large matrix is multiplied from the left.
_FEW_ROWS, _LARGE = 32, 2**17


def matmul(x: Array, w: Array, dtype: DTypeLike | None = None) -> Array:
    """x @ w.

    Args:
      x: [..., D].
      w: [D, F] of the same dtype.
      dtype: dtype of the result; None = that of x.

    Returns:
      [..., F].
    """
    dtype = dtype or x.dtype
    if partition.platform() == "cpu" and x.dtype == dtype:
        return _matmul(x, w)
    return jnp.matmul(x, w, preferred_element_type=dtype)


def conv(x: Array, kernel: Array) -> Array:
    """A convolution with stride 1 whose output has the size of its input.

    Args:
      x: [B, h, w, C].
      kernel: [k, k, C, F] of the same dtype; k odd.

    Returns:
      [B, h, w, F].
    """
    if partition.platform() == "cpu" and x.shape[-1] >= _MIN_CHANNELS:
        return _conv(x, kernel)
    return _plain_conv(x, kernel)


@jax.custom_vjp
def _matmul(x: Array, w: Array) -> Array:
    if 1 < x.size // x.shape[-1] <= _FEW_ROWS and w.size >= _LARGE:
        return _few_rows(x, w)
    return x @ w


def _few_rows(x: Array, w: Array) -> Array:
    """x @ w as (w.T @ x.T).T: the library packs the right factor in every call, here 16 rows of x.

    Sampling transposes w once, before its loop. 16 rows times [256, 1024]: 480 -> 260 microseconds,
    times [1024, 256]: 310 -> 200.
    """
    product = lax.optimization_barrier(w.T) @ _transposed(x)
    return lax.optimization_barrier(product).T.reshape(*x.shape[:-1], -1)


def _matmul_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _matmul(x, w), (x, w)


def _matmul_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = saved
    return g @ w.T, _across(x, g)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def einsum(
    subscripts: str, x: Array, y: Array, dtype: DTypeLike | None = None, *, on_cpu: str
) -> Array:
    """`jnp.einsum` of two factors; on a CPU with transposed factors and result.

    In attention, heads come after positions. XLA's CPU backend then strides through memory by all
    heads, or transposes the larger factor. For 320 positions and 64 heads of 32, weights times
    values run at 50 instead of 26 GFLOP/s.

    Args:
      subscripts: such as BQHK,BSHK->BHQS.
      x: first factor.
      y: second factor.
      dtype: dtype of the result; None = that of the factors.
      on_cpu: the same product in a CPU's order, BHQK,BHSK->BHQS: batch, then the rows and columns
        of matrices. The factors may be swapped.
    """
    if partition.platform() != "cpu":
        return jnp.einsum(subscripts, x, y, preferred_element_type=dtype)
    *terms, result_term = subscripts.replace("->", ",").split(",")
    *cpu_terms, cpu_result_term = on_cpu.replace("->", ",").split(",")
    named = {frozenset(term): (term, z) for term, z in zip(terms, (x, y), strict=True)}
    factors = [_reordered(*named[frozenset(term)], term) for term in cpu_terms]
    result = jnp.einsum(on_cpu, *factors, preferred_element_type=dtype)
    if result_term == cpu_result_term:
        return result
    return jnp.einsum(f"{cpu_result_term}->{result_term}", lax.optimization_barrier(result))


def _reordered(term: str, x: Array, cpu_term: str) -> Array:
    if term == cpu_term:
        return x
    return lax.optimization_barrier(jnp.einsum(f"{term}->{cpu_term}", x))


def _plain_conv(x: Array, kernel: Array) -> Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)


@jax.custom_vjp
def _conv(x: Array, kernel: Array) -> Array:
    return _plain_conv(x, kernel)


def _conv_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _plain_conv(x, kernel), (x, kernel)


def _conv_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    [to_x] = jax.linear_transpose(lambda x: _plain_conv(x, kernel), x)(g)
    (_, height, width, channels), (k, _, _, features) = x.shape, kernel.shape
    pad = (k // 2, k // 2)
    padded, transposed = jnp.pad(x, ((0, 0), pad, pad, (0, 0))), _transposed(g)
    taps = [
        transposed @ padded[:, i : i + height, j : j + width].reshape(-1, channels)  # [F, C]
        for i in range(k)
        for j in range(k)
    ]
    return to_x, jnp.stack(taps).reshape(k, k, features, channels).swapaxes(2, 3)


_conv.defvjp(_conv_forward, _conv_backward)


def _across(x: Array, g: Array) -> Array:
    """[..., D] and [..., F] -> [D, F], summed over all positions.

    The narrower factor is transposed, because XLA may compute it again there, element by element in
    the wrong order (41 ms for the GELU of [2304, 1024]; the product itself takes 20 ms).
    """
    if x.shape[-1] <= g.shape[-1]:
        return _transposed(x) @ g.reshape(-1, g.shape[-1])
    return lax.optimization_barrier(_transposed(g) @ x.reshape(-1, x.shape[-1])).T


def _transposed(x: Array) -> Array:
    """[..., D] -> [D, N], as an array of its own."""
    return lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
