"""Attention of every layer in one function, `attention(q, k, v, mask, impl)`.

  dense       all T x S scores, masked: any mask, any backend. The reference for the others.
  auto        splash for streams of 512 and more positions, structured for shorter ones.
  structured  a layer with an image mask computes only the text and the window that its kind can
              reach: two rows for `row`, one column for `column`, kernel // 2 + 2 rows for `conv`.
              There is no T x S array. `full` layers and masks without an image part (CLIP's
              towers) are dense.
  splash      on a TPU the kernel of `nn.splash` for every static mask; elsewhere structured.
  cudnn       on an NVIDIA GPU the kernel of `nn.cudnn` for every static mask; elsewhere structured.

All implementations are the same function with the same gradients, up to rounding. `nn.kv_cache` has
the counterpart for decoding.

Source: the sparse layers of Ramesh et al. 2021 (arXiv:2102.12092), appendix B.1; the gradient as
in flash attention (arXiv:2205.14135, appendix B.2).
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from dalle_jax import axes
from dalle_jax.nn import cpu_products, cudnn, masks, partition, splash
from dalle_jax.types import Array

IMPLEMENTATIONS = ("auto", "dense", "structured", "splash", "cudnn")

# The shortest stream for which `auto` chooses splash, whose smallest block is 128.
LONG = 512

# Finite, because a row of -inf would be NaN. No mask here has one, but a caller's could.
FORBIDDEN = -1e30

# (k, v, allowed): k and v are [B, S, H, K] for all blocks of queries, or [B, N, S, H, K] with one
# set for each block; allowed is bool and broadcasts to [B, H, N, Q, S], or None = every key.
Group = tuple[Array, Array, Array | None]


def attention(
    q: Array, k: Array, v: Array, mask: masks.Mask | Array | None, *, impl: str = "auto"
) -> Array:
    """Scaled dot-product attention with one softmax over all allowed keys.

    Args:
      q: [B, T, H, K] queries.
      k: [B, S, H, K] keys.
      v: [B, S, H, K] values.
      mask: a static `masks.Mask` over T = S positions; or a bool array [T, S], or one that
        broadcasts to [B, H, T, S]; None = every key.
      impl: one of IMPLEMENTATIONS.

    Returns:
      [B, T, H, K], dtype of v. Scores and softmax are float32 whatever the inputs are.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"attention impl {impl!r} is unknown; use one of {IMPLEMENTATIONS}.")
    q = q * q.shape[-1] ** -0.5
    if run := _kernel(mask, impl):
        names = (axes.ACT_BATCH, None, axes.ACT_HEADS, None)
        kernel = functools.partial(run, mask=mask)
        return partition.by_device(kernel, names, q.shape)(q, k, v)
    if impl != "dense" and _is_sparse(mask):
        return _structured(q, k, v, mask)
    allowed = mask.graph() if isinstance(mask, masks.Mask) else mask
    return _dense(q, k, v, allowed)


def _kernel(mask: masks.Mask | Array | None, impl: str) -> Callable[..., Array] | None:
    """The kernel that runs on this platform, if one does."""
    if not isinstance(mask, masks.Mask):
        return None
    platform = partition.platform()
    if platform == "tpu" and (impl == "splash" or (impl == "auto" and mask.length >= LONG)):
        return splash.attention
    if platform in ("gpu", "cuda") and impl == "cudnn":
        return cudnn.attention
    return None


def _is_sparse(mask: masks.Mask | Array | None) -> bool:
    """Whether a window of raster rows, or a column, is smaller than the image."""
    if not isinstance(mask, masks.Mask) or not (mask.grid and mask.text_len):
        return False
    blocks = mask.grid if mask.kind == "column" else mask.height
    return mask.kind != "full" and _blocks_above(mask) + 1 < blocks


def _blocks_above(mask: masks.Mask) -> int:
    """Number of rows (for `column`, of columns) before a query's own in its window."""
    half = mask.kernel // 2
    # The conv window's left half wraps around into the row above, on a narrow grid into several.
    return {"row": 1, "column": 0, "conv": half + -(-half // mask.grid)}[mask.kind]


def _dense(q: Array, k: Array, v: Array, allowed: Array | None) -> Array:
    """Every query against every key; q is scaled."""
    if allowed is not None:
        allowed = allowed.reshape((1,) * (4 - allowed.ndim) + allowed.shape)[:, :, None]
    return _joint(q[:, None], ((k, v, allowed),))[:, 0]


def _structured(q: Array, k: Array, v: Array, mask: masks.Mask) -> Array:
    """Text attends to text; image tokens, in blocks of a row or a column, to text and window."""
    t, above, is_column = mask.text_len, _blocks_above(mask), mask.kind == "column"
    text = _dense(q[:, :t], k[:, :t], v[:, :t], jnp.tril(jnp.ones((t, t), bool)))

    def blocks(x: Array) -> Array:  # [B, T + N*Q, H, K] -> [B, N, Q, H, K], rows or columns
        x = x[:, t:].reshape(len(x), mask.height, mask.grid, *x.shape[2:])
        return x.swapaxes(1, 2) if is_column else x

    def windows(x: Array) -> Array:  # [B, T + N*Q, H, K] -> [B, N, S, H, K], S = (above + 1) * Q
        x = blocks(x)
        padded = jnp.pad(x, ((0, 0), (above, 0), (0, 0), (0, 0), (0, 0)))
        n = x.shape[1]
        return jnp.concatenate([padded[:, i : i + n] for i in range(above + 1)], axis=2)

    window = (windows(k), windows(v), _window(mask, above)[None, None])
    image = _joint(blocks(q), ((k[:, :t], v[:, :t], None), window))
    image = image.swapaxes(1, 2) if is_column else image
    return jnp.concatenate([text, image.reshape(len(q), -1, *image.shape[3:])], axis=1)


def _window(mask: masks.Mask, above: int) -> Array:
    """bool [N, Q, S]: which keys of its window each query of each block sees."""
    g = mask.grid
    n, size = (g, mask.height) if mask.kind == "column" else (mask.height, g)
    block = jnp.arange(n).reshape(n, 1, 1)
    query = jnp.arange(size).reshape(1, size, 1)
    key = jnp.arange((above + 1) * size).reshape(1, 1, -1)
    if mask.kind == "column":  # a block is a column, a query or key a row of it
        query, key = query * g + block, key * g + block
    else:
        query, key = block * g + query, (block - above) * g + key
    return (key >= 0) & mask.allowed(mask.text_len + query, mask.text_len + key)


# A custom gradient, because that of autodiff makes more passes over the scores and saves them in
# float32. Here the division by the softmax's sum follows the product with v, the gradient's sum
# over keys comes from the output, and the saved weights have the dtype of v.
@jax.custom_vjp
def _joint(q: Array, groups: Sequence[Group]) -> Array:
    """One softmax over the allowed keys of all groups; q (scaled) and result [B, N, Q, H, K]."""
    return _joint_forward(q, groups)[0]


def _joint_forward(q, groups):
    scores = []
    for k, _, allowed in groups:
        s = _scores(q, k)
        scores.append(s if allowed is None else jnp.where(allowed, s, FORBIDDEN))
    peak = functools.reduce(jnp.maximum, [jnp.max(s, axis=-1, keepdims=True) for s in scores])
    weights = [jnp.exp(s - peak) for s in scores]
    total = _per_query(sum(jnp.sum(w, axis=-1) for w in weights))
    weights = [w.astype(v.dtype) for w, (_, v, _) in zip(weights, groups, strict=True)]
    out = sum(_mixed(w, v) for w, (_, v, _) in zip(weights, groups, strict=True))
    out = (out / total).astype(q.dtype)
    return out, (q, groups, weights, total, out)


def _joint_backward(saved, gradient):
    q, groups, weights, total, out = saved
    gradient = gradient.astype(jnp.float32) / total
    shift = jnp.sum(gradient * out, axis=-1).transpose(0, 3, 1, 2)[..., None]  # [B, H, N, Q, 1]
    gradient = gradient.astype(out.dtype)
    to_q, to_groups = 0.0, []
    for (k, v, _), w in zip(groups, weights, strict=True):
        to_v = _gathered(w, gradient, v)
        scores = _scores(gradient, v)
        scores = (w * (scores - shift)).astype(q.dtype)
        to_q += _mixed(scores, k)
        to_groups.append((_gathered(scores, q, k), to_v, None))
    return to_q.astype(q.dtype), tuple(to_groups)


_joint.defvjp(_joint_forward, _joint_backward)


def _scores(x: Array, keys: Array) -> Array:
    """[B, N, Q, H, K] times the keys or values of a group: [B, H, N, Q, S] in float32."""
    n = _block(keys)
    return cpu_products.einsum(
        f"BNQHK,B{n}SHK->BHNQS", x, keys, jnp.float32, on_cpu=f"BHNQK,BH{n}SK->BHNQS"
    )


def _mixed(weights: Array, values: Array) -> Array:
    """[B, H, N, Q, S] times the values or keys of a group: [B, N, Q, H, K] in float32."""
    n = _block(values)
    return cpu_products.einsum(
        f"BHNQS,B{n}SHK->BNQHK", weights, values, jnp.float32, on_cpu=f"BHNQS,BH{n}SK->BHNQK"
    )


def _gathered(weights: Array, x: Array, like: Array) -> Array:
    """[B, H, N, Q, S] times [B, N, Q, H, K], summed over queries: the shape of `like`."""
    n = _block(like)
    # A CPU would otherwise transpose the weights, the larger factor.
    on_cpu = f"BH{n}KQ,BHNQS->BH{n}KS" if n else "BHKNQ,BHNQS->BHKS"
    return cpu_products.einsum(f"BHNQS,BNQHK->B{n}SHK", weights, x, on_cpu=on_cpu)


def _block(keys: Array) -> str:
    """The letter N if each block of queries has its own keys."""
    return "" if keys.ndim == 4 else "N"


def _per_query(x: Array) -> Array:
    """[B, H, N, Q] -> [B, N, Q, H, 1]."""
    return x.transpose(0, 2, 3, 1)[..., None]
