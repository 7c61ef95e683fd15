"""Products as everyone writes them, on a CPU as it multiplies fast: matmul, convolution, einsum.

The gradient of a weight contracts over positions, the slow axis of both its factors, and a CPU's
library wants one of them the other way round. Left to differentiation XLA copies the wrong one, or
calls a convolution whose window is the whole picture. One factor is therefore transposed here, into
an array of its own (a barrier keeps XLA from folding that back). One thread of an AMD EPYC,
float32, GFLOP/s: matmuls [2304, 256] x [256, 1024] 29 -> 61 and [2560, 256] x [256, 2048] 25 -> 62;
3x3 convolutions of 128 channels at 32 px 21 -> 50, of 256 at 16 px 32 -> 59. Forward is 60 to 75,
but where there are few rows (`_few_rows`) or heads behind positions (`einsum`).

On other platforms nothing differs from `@`, `jnp.einsum` and `lax.conv_general_dilated`; on a CPU
neither do convolutions forward nor gradients of activations.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from dalle_jax.nn import partition
from dalle_jax.types import Array

# Below this a product per tap of the window is too thin: the stem's 3 channels of a picture.
_LEAST_CHANNELS = 16
# Up to so many rows a large matrix is multiplied from the left.
_FEW_ROWS, _LARGE = 32, 2**17


def matmul(x: Array, w: Array, dtype: DTypeLike | None = None) -> Array:
    """x @ w.

    Args:
      x: [..., D].
      w: [D, F] of the same dtype.
      dtype: of the result; None = theirs.

    Returns:
      [..., F].
    """
    dtype = dtype or x.dtype
    if partition.platform() == "cpu" and x.dtype == dtype:
        return _matmul(x, w)
    return jnp.matmul(x, w, preferred_element_type=dtype)


def conv(x: Array, kernel: Array) -> Array:
    """A convolution of stride 1 whose output is as large as its input.

    Args:
      x: [B, h, w, C].
      kernel: [k, k, C, F] of the same dtype; k odd.

    Returns:
      [B, h, w, F].
    """
    if partition.platform() == "cpu" and x.shape[-1] >= _LEAST_CHANNELS:
        return _conv(x, kernel)
    return _plain_conv(x, kernel)


@jax.custom_vjp
def _matmul(x: Array, w: Array) -> Array:
    if 1 < x.size // x.shape[-1] <= _FEW_ROWS and w.size >= _LARGE:
        return _few_rows(x, w)
    return x @ w


def _few_rows(x: Array, w: Array) -> Array:
    """x @ w as (w.T @ x.T).T: what stands right is packed anew in every call, here 16 rows of x.

    Drawing turns w once, before its loop. 16 rows times [256, 1024] 480 -> 260 microseconds, times
    [1024, 256] 310 -> 200.
    """
    product = lax.optimization_barrier(w.T) @ _turned(x)
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
    """`jnp.einsum` of two factors; on a CPU they are laid out anew first, and the result after it.

    Attention keeps heads behind positions. XLA's CPU backend then steps through memory by all
    heads, or turns the larger factor: 320 positions, 64 heads of 32, weights times values 26 -> 50
    GFLOP/s.

    Args:
      subscripts: such as BQHK,BSHK->BHQS.
      x: first factor.
      y: second one.
      dtype: of the result; None = theirs.
      on_cpu: the same in the order in which a CPU multiplies fast, BHQK,BHSK->BHQS: batch, then
        rows and columns of matrices. The factors may be swapped.
    """
    if partition.platform() != "cpu":
        return jnp.einsum(subscripts, x, y, preferred_element_type=dtype)
    *given, result = subscripts.replace("->", ",").split(",")
    *wanted, product = on_cpu.replace("->", ",").split(",")
    named = {frozenset(term): (term, z) for term, z in zip(given, (x, y), strict=True)}
    factors = [_laid_out(*named[frozenset(term)], term) for term in wanted]
    made = jnp.einsum(on_cpu, *factors, preferred_element_type=dtype)
    if result == product:
        return made
    return jnp.einsum(f"{product}->{result}", lax.optimization_barrier(made))


def _laid_out(term: str, x: Array, wanted: str) -> Array:
    if term == wanted:
        return x
    return lax.optimization_barrier(jnp.einsum(f"{term}->{wanted}", x))


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
    padded, turned = jnp.pad(x, ((0, 0), pad, pad, (0, 0))), _turned(g)
    taps = [
        turned @ padded[:, i : i + height, j : j + width].reshape(-1, channels)  # [F, C]
        for i in range(k)
        for j in range(k)
    ]
    return to_x, jnp.stack(taps).reshape(k, k, features, channels).swapaxes(2, 3)


_conv.defvjp(_conv_forward, _conv_backward)


def _across(x: Array, g: Array) -> Array:
    """[..., D] and [..., F] -> [D, F], summed over all positions.

    The narrower one is turned: what made it may be computed again there, element by element in the
    wrong order (41 ms for the GELU of [2304, 1024]; a product is 20).
    """
    if x.shape[-1] <= g.shape[-1]:
        return _turned(x) @ g.reshape(-1, g.shape[-1])
    return lax.optimization_barrier(_turned(g) @ x.reshape(-1, x.shape[-1])).T


def _turned(x: Array) -> Array:
    """[..., D] -> [D, N], laid out so."""
    return lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
