"""The autoregressive prior: a causal transformer over a CLIP image embedding in quantised numbers.

The embedding is rotated by PCA, and its leading dimensions, each quantised to V buckets, are the
tokens, the dimension of most variance first (stages/pca.py). The stream: T caption tokens, the
CLIP text embedding z_t, a token of the quantised dot product z_i . z_t, and the tokens of all
dimensions but the last. Each of the last K positions predicts the dimension that follows.

Source: Ramesh et al. 2022 (arXiv:2204.06125) §2.2. Left open there, decided here: as in the
diffusion prior there is no separate text encoder (the paper's table 3 has one of width 2048 beside
the 1664 of the latents' decoder, more than the 1B that it counts); the dot product's token is
dropped with caption and z_t, because without z_t it says nothing; one table of V buckets serves all
dimensions, since a bucket of any is a quantile, and a table of places tells them apart.
"""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp

from dalle_jax import axes
from dalle_jax.nn import condition, masks, partition, transformer
from dalle_jax.types import Array, DtypePolicy, Key, UsageError


@dataclasses.dataclass(frozen=True)
class ArPriorConfig:
    """Sizes of an autoregressive prior.

    Attributes:
      text_len: T, ids of a caption as the CLIP reads them, begin and end included.
      vocab_size: ids.
      joint_width: E of the CLIP.
      num_dims: K, dimensions that are drawn (319 of the paper's 1024).
      num_buckets: V, buckets of each and of the dot product.
      kind: "ar".
      width: D.
      num_layers: L.
      num_heads: H.
      mlp_ratio: F / D.
      norm: "layer" | "rms".
      activation: "gelu" (exact) | "quick_gelu".
      use_bias: biases on the blocks' matrices.
      dropout: on the branches' outputs while training.
      embed_std: deviation of the embedding tables at the start.
      scan_layers: scan over the layers (pods) or an unrolled loop (CPU).
      remat: "none" | "names" | "dots" | "full", see `nn.transformer`.
    """

    text_len: int
    vocab_size: int
    joint_width: int
    num_dims: int
    num_buckets: int = 1024
    kind: str = "ar"
    width: int = 128
    num_layers: int = 4
    num_heads: int = 2
    mlp_ratio: int = 4
    norm: str = "layer"
    activation: str = "gelu"
    use_bias: bool = True
    dropout: float = 0.0
    embed_std: float = 0.02
    scan_layers: bool = False
    remat: str = "none"

    def __post_init__(self):
        for field in ("text_len", "vocab_size", "joint_width", "width", "num_layers"):
            if getattr(self, field) < 1:
                raise UsageError(f"{field}={getattr(self, field)}; expected 1 or more.")
        if not 1 <= self.num_dims <= self.joint_width:
            raise UsageError(
                f"num_dims={self.num_dims}; expected 1 to {self.joint_width}, the width of the "
                "CLIP's embeddings."
            )
        if self.num_buckets < 2:
            raise UsageError(f"num_buckets={self.num_buckets}; expected 2 or more, paper 1024.")
        self.stack(DtypePolicy())

    @property
    def length(self) -> int:
        """Positions of the stream."""
        return self.text_len + 1 + self.num_dims

    @property
    def null_dot(self) -> int:
        """Id of the dot product's token where it is dropped; its real ones stand before it."""
        return 2 * self.num_buckets

    def layer_masks(self) -> tuple[masks.Mask, ...]:
        """Plain causal, in every layer."""
        return (masks.Mask("full", self.length, 0),) * self.num_layers

    def cache_mask(self) -> masks.Mask:
        """The same for `nn.kv_cache`, whose drawn positions are the rows of a square at least K."""
        return masks.Mask("full", self.text_len + 1, math.isqrt(self.num_dims - 1) + 1)

    def stack(self, dtype: DtypePolicy) -> transformer.TransformerConfig:
        """The transformer's own config."""
        return transformer.TransformerConfig(
            width=self.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            norm=self.norm,
            activation=self.activation,
            use_bias=self.use_bias,
            dropout=self.dropout,
            scan_layers=self.scan_layers,
            remat=self.remat,
            dtype=dtype,
        )


class ArPrior(nn.Module):
    """The network; `sampling/prior.py` draws from it.

    Attributes:
      config: sizes.
      dtype: parameters, compute, islands.
    """

    config: ArPriorConfig
    dtype: DtypePolicy = DtypePolicy()

    def setup(self):
        """Declares `condition`, the tokens' tables, `transformer`, `norm_final` and `head`."""
        c, dtype = self.config, self.dtype

        def param(name, std, shape, *names):
            init = partition.param_with_axes(nn.initializers.normal(std), names)
            return self.param(name, init, shape, dtype.param)

        self.condition = condition.Condition(
            c.width, c.vocab_size, c.text_len, c.joint_width, c.embed_std, dtype
        )
        rows = (c.null_dot + 1, c.width)  # a dimension's buckets, the dot product's, its null
        self.tokens = partition.whole(param("tokens", c.embed_std, rows, axes.VOCAB, axes.EMBED))
        shape = (c.num_dims, c.width)
        places = param("places", c.embed_std, shape, axes.POSITIONS, axes.EMBED)
        self.places = partition.whole(places)
        self.transformer = transformer.Transformer(
            c.stack(dtype), c.layer_masks(), num_out=c.num_dims
        )
        self.norm_final = transformer.Norm(c.norm, dtype)
        # A fifth of 1/sqrt(D): the first logits are near zero, the first loss near ln V.
        self.head = param(
            "head", 0.2 * c.width**-0.5, (c.width, c.num_buckets), axes.EMBED, axes.VOCAB
        )

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
          dropped: bool [B], True where caption, z_t and dot are nulls; None = nowhere.
          key: draws dropout; None = none.

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

    def tail(self, ids: Array, places: Array | None = None) -> Array:
        """Tokens at places [n] of the tail (None = 0 … n-1): [..., n] int32 -> [..., n, D].

        Place 0 holds num_buckets + the dot product's bucket (or `null_dot`), place k the bucket of
        dimension k - 1.
        """
        dtype = self.dtype.compute
        where = jnp.arange(ids.shape[-1]) if places is None else places
        place = self.places.astype(dtype)[where]
        return self.tokens.astype(dtype)[ids] + place.reshape((1,) * (ids.ndim - 1) + place.shape)

    def logits(self, x: Array) -> Array:
        """[..., D] after the last block -> [..., V] float32."""
        head = self.head.astype(self.dtype.compute)
        return jnp.matmul(self.norm_final(x), head, preferred_element_type=self.dtype.accum)


def flops(config: ArPriorConfig) -> float:
    """Forward matmul FLOPs of one example (2 per multiply-add), attention on allowed pairs."""
    c = config
    stack = transformer.flops(c.stack(DtypePolicy()), c.layer_masks(), c.length, c.num_dims)
    return stack + 2 * c.width * (c.joint_width + c.num_dims * c.num_buckets)
