"""The diffusion prior: a causal transformer that denoises a CLIP image embedding after a caption.

The stream, in this order: T caption tokens, the CLIP text embedding z_t, the step, the noised image
embedding, a learned query. At the query the network predicts the image embedding itself (x_0), not
the noise. The noise process is in `diffusion/`, the loss in tasks/prior.py, sampling in
sampling/prior.py.

The stream is causal and ends with the positions of the step, so caption and z_t are computed only
once per prompt: they are the `stem`, the positions of the step are the `tail`.

Source: Ramesh et al. 2022 (arXiv:2204.06125) §2.2 and appendix C. Left open there, decided here:
"encoded text" is the caption tokens in the layers of this transformer (no separate encoder;
kakaobrain/karlo has CLIP's token states there); padding is an ordinary token; caption and z_t are
dropped together and replaced by learned nulls.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax import axes
from dalle_jax.nn import condition, embed, masks, partition, stack, transformer
from dalle_jax.nn.transformer import TransformerConfig
from dalle_jax.types import Array, DtypePolicy, Key, UsageError

TAIL = 3  # positions of a step: step, noised embedding, query


@dataclasses.dataclass(frozen=True)
class DiffusionPriorConfig:
    """Sizes of a diffusion prior.

    Attributes:
      text_len: T, text ids per caption in CLIP's form, with begin and end.
      vocab_size: text ids.
      joint_width: E of the CLIP.
      kind: "diffusion".
      transformer: sizes of the stack, and how it runs.
      embed_std: initial standard deviation of the embedding tables.
      schedule: name of the noise schedule, see `diffusion.schedules`.
      num_steps: steps of the schedule.
    """

    text_len: int
    vocab_size: int
    joint_width: int
    kind: str = "diffusion"
    transformer: TransformerConfig = TransformerConfig(
        width=128, num_layers=4, num_heads=2, activation="gelu"
    )
    embed_std: float = 0.02
    schedule: str = "cosine"
    num_steps: int = 1000

    def __post_init__(self):
        for field in ("text_len", "vocab_size", "joint_width", "num_steps"):
            if getattr(self, field) < 1:
                raise UsageError(f"{field}={getattr(self, field)}; expected 1 or more.")
        if self.transformer.width % 2:
            raise UsageError(
                f"width={self.transformer.width} is odd; expected an even number, because the "
                "features of a step are half sines and half cosines."
            )

    @property
    def length(self) -> int:
        """Positions of the stream."""
        return self.text_len + 1 + TAIL

    @property
    def scale(self) -> float:
        """Factor of unit embeddings before they are noised: 17.2 at E = 1024."""
        return condition.embedding_scale(self.joint_width)

    def layer_masks(self) -> tuple[masks.Mask, ...]:
        """Plain causal masks, one for each layer."""
        return (masks.Mask("full", self.length, 0),) * self.transformer.num_layers


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
        d, e = c.transformer.width, c.joint_width

        def param(name, std, shape, *names):
            init = nn.initializers.normal(std) if std else nn.initializers.zeros
            init = partition.param_with_axes(init, names)
            return partition.replicated(self.param(name, init, shape, dtype.param))

        self.condition = condition.Condition(d, c.vocab_size, c.text_len, e, c.embed_std, dtype)
        self.time_in = param("time_in", d**-0.5, (d, d), axes.EMBED, axes.MLP)
        self.time_in_bias = param("time_in_bias", 0, (d,), axes.MLP)
        self.time_out = param("time_out", d**-0.5, (d, d), axes.MLP, axes.EMBED)
        self.noised = param("noised", e**-0.5, (e, d), axes.JOINT, axes.EMBED)
        # Position vectors of step and noised embedding; the third is the learned query itself.
        self.positions = param("places", c.embed_std, (TAIL, d), axes.POSITIONS, axes.EMBED)
        self.transformer = stack.Stack(c.transformer, c.layer_masks(), num_out=1, dtype=dtype)
        self.norm_final = transformer.Norm(c.transformer.norm, dtype)
        # A fifth of 1/sqrt(D): the first estimate is near 0, the mean of the entries of embeddings.
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
          t: [B] int32 steps of the process; step 0 is the least noisy.
          dropped: bool [B], True = nulls replace caption and z_t; None = all False.
          key: samples the dropout; None = no dropout.

        Returns:
          [B, E] float32, of length about `config.scale`.

        Raises:
          ValueError: if the shapes are not the config's.
        """
        stem, tail = self.stem(text, z_t, dropped), self.tail(x_t, t)
        x = self.transformer(jnp.concatenate([stem, tail], axis=1), key)
        return self.estimate(x[:, -1])

    def stem(self, text: Array, z_t: Array, dropped: Array | None = None) -> Array:
        """The positions that do not depend on the step, [B, T + 1, D]; see `nn.condition`."""
        return self.condition(text, z_t, dropped)

    def tail(self, x_t: Array, t: Array) -> Array:
        """The positions of a step: x_t [..., E], t [...] -> [..., 3, D]."""
        c, dtype = self.config, self.dtype.compute
        if x_t.shape[-1] != c.joint_width or t.shape != x_t.shape[:-1]:
            raise ValueError(
                f"x_t {x_t.shape} and t {t.shape}; expected [..., {c.joint_width}] and [...]."
            )
        time = embed.timestep_features(t, c.transformer.width).astype(dtype)
        time = time @ self.time_in.astype(dtype)
        bias = self.time_in_bias.astype(dtype)
        time = jax.nn.silu(time + bias.reshape((1,) * t.ndim + bias.shape))
        time = time @ self.time_out.astype(dtype)
        noised = x_t.astype(dtype) @ self.noised.astype(dtype)
        x = jnp.stack([time, noised, jnp.zeros_like(time)], axis=-2)
        positions = self.positions.astype(dtype)
        return x + positions.reshape((1,) * t.ndim + positions.shape)

    def estimate(self, x: Array) -> Array:
        """Output of the last block at the query [..., D] -> x_0 [..., E] float32."""
        dtype = self.dtype
        y = jnp.matmul(
            self.norm_final(x), self.out.astype(dtype.compute), preferred_element_type=dtype.accum
        )
        return y + self.out_bias.astype(dtype.accum).reshape((1,) * (y.ndim - 1) + (y.shape[-1],))


def flops(config: DiffusionPriorConfig) -> float:
    """Forward matmul FLOPs of one example (2 per multiply-add), attention on allowed pairs."""
    c, width = config, config.transformer.width
    layers = stack.flops(c.transformer, c.layer_masks(), c.length, num_out=1)
    return layers + 2 * width * (3 * c.joint_width + 2 * width)
