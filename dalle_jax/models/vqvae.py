"""VQ-VAE: pictures as a grid of nearest codebook entries.

It has the interface of the dVAE: `encode(images) -> codes`, `decode_codes(codes) -> images`, and a
pure `loss` for `tasks/autoencode.py`. It trains in minutes where a Gumbel-softmax dVAE of the same
size collapses to a handful of codes, and `dvae.from_vqvae` converts it exactly to a dVAE.

Source: van den Oord et al. 2017 (arXiv:1711.00937).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dalle_jax import axes
from dalle_jax.nn import codec_bodies, conv, partition, quantize
from dalle_jax.types import Array, DtypePolicy, Key, Params, UsageError


@dataclasses.dataclass(frozen=True)
class VqvaeConfig(codec_bodies.TrunkConfig):
    """A VQ-VAE; `TrunkConfig` has the sizes of its two bodies.

    Attributes:
      kind: "vqvae".
      num_codes: V, entries of the codebook.
      code_dim: D, length of a code vector.
      n_init: width of the decoder's input; 0 = width, the only one for the patch trunk.
      commitment: weight of the term that pulls the encoder to the codes; 0.25 in the paper.
      codebook: "ema" (moving averages) or "loss" (gradient of the paper's second term).
      ema_decay: gamma of the moving averages; 0.99 in the paper.
      revive_share: random encoder outputs replace codes that are chosen less often than this
        fraction of their fair share; 0 = never. Needs "ema".
      revive_steps: the last step that replaces codes, so that they can settle at the end.
    """

    kind: str = "vqvae"
    num_codes: int = 512
    code_dim: int = 32
    n_init: int = 0
    commitment: float = 0.25
    codebook: str = "ema"
    ema_decay: float = 0.99
    revive_share: float = 0.02
    revive_steps: int = 1_000_000_000

    def __post_init__(self):
        super().__post_init__()
        check_codes(self.num_codes)
        check_n_init(self)
        if self.code_dim < 1:
            raise UsageError(f"code_dim {self.code_dim} is too small; it is at least 1.")
        if self.codebook not in ("ema", "loss"):
            raise UsageError(f"codebook {self.codebook!r} is unknown; use 'ema' or 'loss'.")
        if not 0 < self.ema_decay < 1:
            raise UsageError(f"ema_decay {self.ema_decay} is not in (0, 1); the paper's is 0.99.")
        if not 0 <= self.revive_share < 1:
            raise UsageError(
                f"revive_share {self.revive_share} is not in [0, 1); 0.02 works, 0 is off."
            )
        if self.revive_share and self.codebook != "ema":
            raise UsageError(
                f"revive_share {self.revive_share} needs the counts of codebook 'ema', but it is "
                f"{self.codebook!r}; set model.revive_share=0."
            )


class Vqvae(nn.Module):
    """The network. Variables: params, and with an EMA codebook the collection `codebook`."""

    config: VqvaeConfig
    dtype: DtypePolicy = DtypePolicy()

    def setup(self):
        """Declares the layers."""
        c, dtype = self.config, self.dtype
        self.encoder = codec_bodies.build_encoder(c, dtype)
        # float32 next to the bottleneck, as in the released dVAE: distances are an island.
        names = (axes.CONV_IN, None)
        self.encoder_head = conv.Conv(c.features, c.code_dim, names=names, dtype=dtype.island)
        n_init, names = c.n_init or c.width, (None, axes.CONV_OUT)
        self.decoder_stem = conv.Conv(c.code_dim, n_init, names=names, dtype=dtype.island)
        self.decoder = codec_bodies.build_decoder(c, 3, dtype)
        if c.codebook == "ema":
            empty = quantize.empty_codebook(c.num_codes, c.code_dim)
            state = {k: self.variable("codebook", k, lambda v=v: v) for k, v in empty.items()}
            self.vectors = state["vectors"].value
        else:
            self.vectors = self.param(
                "codebook",
                partition.param_with_axes(
                    nn.initializers.variance_scaling(1.0, "fan_in", "uniform", in_axis=1),
                    (axes.CODES, None),
                ),
                (c.num_codes, c.code_dim),
                dtype.param,
            )

    def __call__(self, images: Array) -> Array:
        """The reconstruction [B, h, w, 3] through hard codes."""
        return self.decode_codes(self.encode(images))

    def embed(self, images: Array) -> Array:
        """Encoder outputs [B, g, g, D] float32 of images [B, h, w, 3] in [-1, 1]."""
        return self.encoder_head(self.encoder(images))

    def encode(self, images: Array) -> Array:
        """Codes [B, g, g] int32 of images [B, h, w, 3] in [-1, 1]."""
        return quantize.nearest(self.embed(images), self.vectors)

    def decode_vectors(self, q: Array) -> Array:
        """Code vectors [B, g, g, D] -> images [B, h, w, 3] float32, not clipped."""
        return self.decoder(self.decoder_stem(q)).astype(self.dtype.accum)

    def decode_codes(self, codes: Array) -> Array:
        """Codes [B, g, g] int -> images [B, h, w, 3] float32 in [-1, 1]."""
        return jnp.clip(self.decode_vectors(jnp.take(self.vectors, codes, axis=0)), -1.0, 1.0)


def loss(
    model: Vqvae, params: Params, extra: Any, images: Array, key: Key, step: Array
) -> tuple[Array, dict[str, Array], Any]:
    """Squared error + codebook term + commitment, each a mean.

    Args:
      model: the network.
      params: its parameters.
      extra: {"codebook": ...} with an EMA codebook, else None.
      images: [B, h, w, 3] in [-1, 1], the global batch.
      key: key of this step; samples the encoder outputs that become codes.
      step: int32 scalar.

    Returns:
      scalar float32 loss, metrics, the next `extra`.

    Source: arXiv:1711.00937 eq. 3; means instead of sums as in deepmind/sonnet. The gradient of the
    first term reaches decoder and encoder, of the second the codebook, of the third the encoder.
    """
    c = model.config
    z = model.apply({"params": params, **(extra or {})}, images, method="embed")
    flat = z.reshape(-1, c.code_dim)
    key_start, key_revive = jax.random.split(key)
    if c.codebook == "ema":
        seen = jax.lax.stop_gradient(flat)
        book = quantize.start(extra["codebook"], key_start, seen)
        vectors = book["vectors"]
    else:
        vectors = params["codebook"]
    codes = quantize.nearest(z, jax.lax.stop_gradient(vectors))
    q = jnp.take(vectors, codes, axis=0)
    out = model.apply(
        {"params": params, **(extra or {})},
        quantize.straight_through(z, q),
        method="decode_vectors",
    )
    recon = jnp.mean(jnp.square(out - images))
    commitment = jnp.mean(jnp.square(z - jax.lax.stop_gradient(q)))
    total = recon + c.commitment * commitment
    metrics = {"recon": recon, "commitment": commitment}
    if c.codebook == "ema":
        book = quantize.ema_update(book, seen, codes.ravel(), c.ema_decay)
        if c.revive_share:
            book = jax.lax.cond(
                step < c.revive_steps,
                lambda: quantize.revive(book, key_revive, seen, c.revive_share),
                lambda: book,
            )
        extra = {"codebook": book}
    else:
        total += jnp.mean(jnp.square(jax.lax.stop_gradient(z) - q))
    error = jnp.mean(jnp.square(jnp.clip(out, -1, 1) - images))
    metrics |= {"psnr": psnr(error), **quantize.usage(codes, c.num_codes)}
    return total, jax.lax.stop_gradient(metrics), extra


def evaluate(model: Any, params: Params, extra: Any, images: Array) -> dict[str, Array]:
    """Metrics of reconstructions through hard codes: psnr, recon and `quantize.usage`.

    Args:
      model: a `Vqvae` or a `Dvae`.
      params, extra: its variables.
      images: [B, h, w, 3] in [-1, 1].
    """
    variables = {"params": params, **(extra or {})}
    codes = model.apply(variables, images, method="encode")
    error = jnp.mean(
        jnp.square(
            model.apply(variables, codes, method="decode_codes") - images.astype(jnp.float32)
        )
    )
    return {
        "psnr": psnr(error),
        "recon": error,
        **quantize.usage(codes, model.config.num_codes),
    }


def psnr(mean_square: Array) -> Array:
    """Peak signal-to-noise ratio in dB of a mean squared error between pictures in [-1, 1].

    It is the ratio for the batch. One perfect picture would make the mean over pictures infinite.
    """
    return 10 * jnp.log10(4.0 / jnp.maximum(mean_square, 1e-10))  # the peak is 2, squared


def forward_macs(c: VqvaeConfig) -> int:
    """Multiply-adds of one picture's forward pass, the distances to all codes included."""
    n_init = c.n_init or c.width
    bottleneck = c.features * c.code_dim + c.code_dim * c.num_codes + c.code_dim * n_init
    return codec_bodies.body_macs(c, n_init, 3) + c.grid**2 * bottleneck


def check_codes(num_codes: int) -> None:
    """Refuses a codebook without a choice.

    Raises:
      UsageError: if num_codes is below 2.
    """
    if num_codes < 2:
        raise UsageError(f"num_codes {num_codes} is too small; it is at least 2.")


def check_n_init(c: Any) -> None:
    """Refuses a decoder input that its trunk cannot take.

    Raises:
      UsageError: naming n_init.
    """
    if c.n_init < 0:
        raise UsageError(f"n_init {c.n_init} is negative; use 0 for the width of the trunk.")
    if c.trunk == "patch" and c.n_init not in (0, c.width):
        raise UsageError(
            f"n_init {c.n_init} does not fit the patch trunk, whose decoder starts at its width "
            f"{c.width}; use 0."
        )
