"""The autoregressive prior: a causal transformer over a quantised CLIP image embedding.

PCA rotates the embedding. Its leading dimensions, each quantised to V buckets, are the tokens, in
order of falling variance (stages/pca.py). The stream: T caption tokens, the CLIP text embedding
z_t, a token of the quantised dot product z_i . z_t, and the tokens of all dimensions but the last.
Each of the last K positions predicts the next dimension.

Source: Ramesh et al. 2022 (arXiv:2204.06125) §2.2. Left open there, decided here: as in the
diffusion prior there is no separate text encoder (the paper's table 3 has one of width 2048 beside
the decoder of width 1664, more than the 1B parameters that the paper counts); the token of the dot
product is dropped with caption and z_t, because without z_t it has no meaning; all dimensions share
one table of V buckets, since a bucket is a quantile of its dimension, and position vectors
distinguish the dimensions.
"""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp

from dalle_jax import axes
from dalle_jax.nn import condition, masks, partition, stack, transformer
from dalle_jax.nn.transformer import TransformerConfig
from dalle_jax.types import Array, DtypePolicy, Key, UsageError


@dataclasses.dataclass(frozen=True)
class ArPriorConfig:
    """Sizes of an autoregressive prior.

    Attributes:
      text_len: T, text ids per caption in CLIP's form, with begin and end.
      vocab_size: text ids.
      joint_width: E of the CLIP.
      num_dims: K, dimensions that are tokens (in the paper 319 of 1024).
      num_buckets: V, buckets of each dimension and of the dot product.
      kind: "ar".
      transformer: sizes of the stack, and how it runs.
      embed_std: initial standard deviation of the embedding tables.
    """

    text_len: int
    vocab_size: int
    joint_width: int
    num_dims: int
    num_buckets: int = 1024
    kind: str = "ar"
    transformer: TransformerConfig = TransformerConfig(
        width=128, num_layers=4, num_heads=2, activation="gelu"
    )
    embed_std: float = 0.02

    def __post_init__(self):
        for field in ("text_len", "vocab_size", "joint_width"):
            if getattr(self, field) < 1:
                raise UsageError(f"{field}={getattr(self, field)}; expected 1 or more.")
        if not 1 <= self.num_dims <= self.joint_width:
            raise UsageError(
                f"num_dims={self.num_dims}; expected 1 to {self.joint_width}, the width of the "
                "CLIP's embeddings."
            )
        if self.num_buckets < 2:
            raise UsageError(f"num_buckets={self.num_buckets}; expected 2 or more, paper 1024.")

    @property
    def length(self) -> int:
        """Positions of the stream."""
        return self.text_len + 1 + self.num_dims

    @property
    def null_dot(self) -> int:
        """Token id of a dropped dot product; the ids of its buckets come before it."""
        return 2 * self.num_buckets

    def layer_masks(self) -> tuple[masks.Mask, ...]:
        """Plain causal masks, one for each layer."""
        return (masks.Mask("full", self.length, 0),) * self.transformer.num_layers

    def cache_mask(self) -> masks.Mask:
        """The causal mask for `nn.kv_cache`, on the smallest square grid with K positions."""
        return masks.Mask("full", self.text_len + 1, math.isqrt(self.num_dims - 1) + 1)


class ArPrior(nn.Module):
    """The network; `sampling/prior.py` samples from it.

    Attributes:
      config: sizes.
      dtype: parameters, compute, islands.
    """

    config: ArPriorConfig
    dtype: DtypePolicy = DtypePolicy()

    def setup(self):
        """Declares `condition`, the tokens' tables, `transformer`, `norm_final` and `head`."""
        c, dtype, width = self.config, self.dtype, self.config.transformer.width

        def param(name, std, shape, *names):
            init = partition.param_with_axes(nn.initializers.normal(std), names)
            return self.param(name, init, shape, dtype.param)

        self.condition = condition.Condition(
            width, c.vocab_size, c.text_len, c.joint_width, c.embed_std, dtype
        )
        shape = (c.null_dot + 1, width)  # buckets of a dimension, of the dot product, its null
        tokens = param("tokens", c.embed_std, shape, axes.VOCAB, axes.EMBED)
        self.tokens = partition.replicated(tokens)
        shape = (c.num_dims, width)
        positions = param("places", c.embed_std, shape, axes.POSITIONS, axes.EMBED)
        self.positions = partition.replicated(positions)
        self.transformer = stack.Stack(
            c.transformer, c.layer_masks(), num_out=c.num_dims, dtype=dtype
        )
        self.norm_final = transformer.Norm(c.transformer.norm, dtype)
        # A fifth of 1/sqrt(D): the first logits are near zero and the first loss is near ln V.
        shape = (width, c.num_buckets)
        self.head = param("head", 0.2 * width**-0.5, shape, axes.EMBED, axes.VOCAB)

    def __call__(
        self,
        text: Array,
        z_t: Array,
        dot: Array,
        dims: Array,
        dropped: Array | None = None,
        key: Key | None = None,
    ) -> Array:
        """Logits of every dimension, teacher-forced.

        Args:
          text: [B, T] int32.
          z_t: [B, E] CLIP text embeddings of unit length.
          dot: [B] int32 bucket of z_i . z_t.
          dims: [B, K] int32 buckets of the dimensions.
          dropped: bool [B], True = nulls replace caption, z_t and dot; None = all False.
          key: samples the dropout; None = no dropout.

        Returns:
          [B, K, V] float32; row k predicts dims[:, k].

        Raises:
          ValueError: if the shapes are not the config's.
        """
        c = self.config
        if dims.shape[1:] != (c.num_dims,):
            raise ValueError(f"dims has shape {dims.shape}; expected [B, {c.num_dims}].")
        first = c.num_buckets + dot
        if dropped is not None:
            first = jnp.where(dropped, c.null_dot, first)
        ids = jnp.concatenate([first[:, None], dims[:, :-1]], axis=1)
        x = jnp.concatenate([self.stem(text, z_t, dropped), self.tail(ids)], axis=1)
        return self.logits(self.transformer(x, key))

    def stem(self, text: Array, z_t: Array, dropped: Array | None = None) -> Array:
        """The positions before the tokens, [B, T + 1, D]; see `nn.condition`."""
        return self.condition(text, z_t, dropped)

    def tail(self, ids: Array, positions: Array | None = None) -> Array:
        """Embedded tokens of the tail, [..., n, D].

        Args:
          ids: [..., n] int32: at position 0 `null_dot`, or num_buckets + the bucket of the dot
            product; at position k the bucket of dimension k - 1.
          positions: [n] int32 positions in the tail; None = 0 .. n-1.
        """
        dtype = self.dtype.compute
        positions = jnp.arange(ids.shape[-1]) if positions is None else positions
        x = self.positions.astype(dtype)[positions]
        return self.tokens.astype(dtype)[ids] + x.reshape((1,) * (ids.ndim - 1) + x.shape)

    def logits(self, x: Array) -> Array:
        """[..., D] after the last block -> [..., V] float32."""
        head = self.head.astype(self.dtype.compute)
        return jnp.matmul(self.norm_final(x), head, preferred_element_type=self.dtype.accum)


def flops(config: ArPriorConfig) -> float:
    """Forward matmul FLOPs of one example (2 per multiply-add), attention on allowed pairs."""
    c = config
    layers = stack.flops(c.transformer, c.layer_masks(), c.length, c.num_dims)
    return layers + 2 * c.transformer.width * (c.joint_width + c.num_dims * c.num_buckets)
