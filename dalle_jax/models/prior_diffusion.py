"""The diffusion prior: a causal transformer that denoises a CLIP image embedding after a caption.

The stream, in this order: T caption tokens, the CLIP text embedding z_t, the step, the noised image
embedding, a learned query. At the query the network predicts the image embedding itself (x_0), not
the noise. The noise arithmetic is `diffusion/`'s, the loss tasks/prior.py's, the sampling
sampling/prior.py's.

Because the stream is causal and step and noise come last, caption and z_t need to be read only once
per prompt: `stem` is their part, `tail` that of a step.

Source: Ramesh et al. 2022 (arXiv:2204.06125) §2.2 and appendix C. Left open there, decided here:
"encoded text" is what this transformer's own layers make of the caption tokens (no separate
encoder; kakaobrain/karlo puts CLIP's token states there); padding is a token like others; caption
and z_t are dropped together, for learned nulls.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax import axes
from dalle_jax.nn import condition, masks, partition, transformer
from dalle_jax.types import Array, DtypePolicy, Key, UsageError

TAIL = 3  # positions of a step: time, noised embedding, query


@dataclasses.dataclass(frozen=True)
class DiffusionPriorConfig:
    """Sizes of a diffusion prior.

    Attributes:
      text_len: T, ids of a caption as the CLIP reads them, begin and end included.
      vocab_size: ids.
      joint_width: E of the CLIP.
      kind: "diffusion".
      width: D.
      num_layers: L.
      num_heads: H.
      mlp_ratio: F / D.
      norm: "layer" | "rms".
      activation: "gelu" (exact) | "quick_gelu".
      use_bias: biases on the blocks' matrices.
      dropout: on the branches' outputs while training.
      embed_std: deviation of the embedding tables at the start.
      schedule: name of the noise schedule, see `diffusion.schedules`.
      num_steps: of that schedule.
      scan_layers: scan over the layers (pods) or an unrolled loop (CPU).
      remat: "none" | "names" | "dots" | "full", see `nn.transformer`.
    """

    text_len: int
    vocab_size: int
    joint_width: int
    kind: str = "diffusion"
    width: int = 128
    num_layers: int = 4
    num_heads: int = 2
    mlp_ratio: int = 4
    norm: str = "layer"
    activation: str = "gelu"
    use_bias: bool = True
    dropout: float = 0.0
    embed_std: float = 0.02
    schedule: str = "cosine"
    num_steps: int = 1000
    scan_layers: bool = False
    remat: str = "none"

    def __post_init__(self):
        for field in ("text_len", "vocab_size", "joint_width", "width", "num_layers", "num_steps"):
            if getattr(self, field) < 1:
                raise UsageError(f"{field}={getattr(self, field)}; expected 1 or more.")
        if self.width % 2:
            raise UsageError(f"width={self.width} is odd; time needs as many sines as cosines.")
        self.stack(DtypePolicy())

    @property
    def length(self) -> int:
        """Positions of the stream."""
        return self.text_len + 1 + TAIL

    @property
    def scale(self) -> float:
        """What unit embeddings are multiplied by before they are noised: 17.2 at E = 1024."""
        return condition.embedding_scale(self.joint_width)

    def layer_masks(self) -> tuple[masks.Mask, ...]:
        """Plain causal, in every layer."""
        return (masks.Mask("full", self.length, 0),) * self.num_layers

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


class DiffusionPrior(nn.Module):
    """The network.

    Attributes:
      config: sizes.
      dtype: parameters, compute, islands.
    """

    config: DiffusionPriorConfig
    dtype: DtypePolicy = DtypePolicy()

    def setup(self):
        """Declares `condition`, the tail's weights, `transformer`, `norm_final` and `out`."""
        c, dtype = self.config, self.dtype
        d, e = c.width, c.joint_width

        def param(name, std, shape, *names):
            init = nn.initializers.normal(std) if std else nn.initializers.zeros
            init = partition.param_with_axes(init, names)
            return partition.whole(self.param(name, init, shape, dtype.param))

        self.condition = condition.Condition(d, c.vocab_size, c.text_len, e, c.embed_std, dtype)
        self.time_in = param("time_in", d**-0.5, (d, d), axes.EMBED, axes.MLP)
        self.time_in_bias = param("time_in_bias", 0, (d,), axes.MLP)
        self.time_out = param("time_out", d**-0.5, (d, d), axes.MLP, axes.EMBED)
        self.noised = param("noised", e**-0.5, (e, d), axes.JOINT, axes.EMBED)
        # Positions of time and noised embedding; the third is the query, which is nothing else.
        self.places = param("places", c.embed_std, (TAIL, d), axes.POSITIONS, axes.EMBED)
        self.transformer = transformer.Transformer(c.stack(dtype), c.layer_masks(), num_out=1)
        self.norm_final = transformer.Norm(c.norm, dtype)
        # A fifth of 1/sqrt(D): the first estimate is near 0, the mean of all embeddings' entries.
        self.out = param("out", 0.2 * d**-0.5, (d, e), axes.EMBED, axes.JOINT)
        self.out_bias = param("out_bias", 0, (e,), axes.JOINT)

    def __call__(
        self,
        text: Array,
        z_t: Array,
        x_t: Array,
        t: Array,
        dropped: Array | None = None,
        key: Key | None = None,
    ) -> Array:
        """The estimate of x_0.

        Args:
          text: [B, T] int32.
          z_t: [B, E] CLIP text embeddings of unit length.
          x_t: [B, E] noised image embeddings; the clean ones have length `config.scale`.
          t: [B] int32 steps of the process, 0 the least noisy.
          dropped: bool [B], True where caption and z_t are nulls; None = nowhere.
          key: draws dropout; None = none.

        Returns:
          [B, E] float32, of length about `config.scale`.

        Raises:
          ValueError: if the shapes are not the config's.
        """
        stem, tail = self.stem(text, z_t, dropped), self.tail(x_t, t)
        x = self.transformer(jnp.concatenate([stem, tail], axis=1), key)
        return self.estimate(x[:, -1])

    def stem(self, text: Array, z_t: Array, dropped: Array | None = None) -> Array:
        """The positions that no step changes, [B, T + 1, D]; see `nn.condition`."""
        return self.condition(text, z_t, dropped)

    def tail(self, x_t: Array, t: Array) -> Array:
        """The positions of a step: x_t [..., E], t [...] -> [..., 3, D]."""
        c, dtype = self.config, self.dtype.compute
        if x_t.shape[-1] != c.joint_width or t.shape != x_t.shape[:-1]:
            raise ValueError(
                f"x_t {x_t.shape} and t {t.shape}; expected [..., {c.joint_width}] and [...]."
            )
        time = condition.timestep_features(t, c.width).astype(dtype) @ self.time_in.astype(dtype)
        bias = self.time_in_bias.astype(dtype)
        time = jax.nn.silu(time + bias.reshape((1,) * t.ndim + bias.shape))
        time = time @ self.time_out.astype(dtype)
        noised = x_t.astype(dtype) @ self.noised.astype(dtype)
        x = jnp.stack([time, noised, jnp.zeros_like(time)], axis=-2)
        places = self.places.astype(dtype)
        return x + places.reshape((1,) * t.ndim + places.shape)

    def estimate(self, x: Array) -> Array:
        """x_0 [..., E] float32 of what the last block puts out at the query, [..., D]."""
        dtype = self.dtype
        y = jnp.matmul(
            self.norm_final(x), self.out.astype(dtype.compute), preferred_element_type=dtype.accum
        )
        return y + self.out_bias.astype(dtype.accum).reshape((1,) * (y.ndim - 1) + (y.shape[-1],))


def flops(config: DiffusionPriorConfig) -> float:
    """Forward matmul FLOPs of one example (2 per multiply-add), attention on allowed pairs."""
    c = config
    stack = transformer.flops(c.stack(DtypePolicy()), c.layer_masks(), c.length, num_out=1)
    return stack + 2 * c.width * (3 * c.joint_width + 2 * c.width)
