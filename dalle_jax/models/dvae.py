"""dVAE: pictures as a grid of categorical codes, trained through a Gumbel-softmax relaxation.

It is the picture tokenizer of DALL·E, with the interface of the VQ-VAE: `encode(images) -> codes`,
`decode_codes(codes) -> images`, and a pure `loss` for `tasks/autoencode.py`.

Source: Ramesh et al. 2021 (arXiv:2102.12092) §2.1 and App. A; architecture of the pyramid trunk
from openai/DALL-E.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dalle_jax import axes
from dalle_jax.models import vqvae
from dalle_jax.nn import codec_bodies, conv, quantize
from dalle_jax.types import Array, DtypePolicy, Key, Params, UsageError

# Pictures are mapped to [eps, 1 - eps] so that their logits are finite.
LOGIT_LAPLACE_EPS = 0.1
# Lower bound of ln b. The paper has none; rendered pictures with perfectly flat backgrounds would
# drive b to 0 and the loss to minus infinity. e^-7 = 0.0009 in logits is a quarter of a grey level,
# finer than the steps of 8-bit photographs.
LOG_SCALE_MIN = -7.0
LIKELIHOODS = ("logit_laplace", "mse")


@dataclasses.dataclass(frozen=True)
class DvaeConfig(codec_bodies.TrunkConfig):
    """A dVAE; `TrunkConfig` has the sizes of its two bodies. Schedules are cosine, in steps.

    Attributes:
      kind: "dvae".
      num_codes: V, entries of the codebook.
      n_init: width of the decoder's input (128 in the paper); 0 = width, the only one for the
        patch trunk.
      likelihood: "logit_laplace" (paper) or "mse".
      kl_weight: beta, reached after kl_steps; the KL of each position has the weight
        beta / (image_px^2 * 3). The paper's 6.6 is for "logit_laplace".
      kl_steps: steps of the ramp 0 -> kl_weight; 0 = no ramp.
      temperature_start, temperature_end, temperature_steps: schedule of the relaxation's
        temperature.
      entropy_bonus: weight of the entropy of the batch's mean code distribution; it counters
        collapse and is 0 in the paper.
    """

    kind: str = "dvae"
    num_codes: int = 512
    n_init: int = 0
    likelihood: str = "mse"
    kl_weight: float = 0.1
    kl_steps: int = 0
    temperature_start: float = 1.0
    temperature_end: float = 1 / 16
    temperature_steps: int = 1000
    entropy_bonus: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        vqvae.check_codes(self.num_codes)
        vqvae.check_n_init(self)
        if self.likelihood not in LIKELIHOODS:
            raise UsageError(
                f"likelihood {self.likelihood!r} is unknown; use {' or '.join(LIKELIHOODS)}."
            )
        for name in ("temperature_start", "temperature_end"):
            if getattr(self, name) <= 0:
                raise UsageError(
                    f"{name} {getattr(self, name)} is not above 0; the paper goes from 1 to 1/16."
                )
        for name in ("kl_weight", "kl_steps", "temperature_steps", "entropy_bonus"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} {getattr(self, name)} is negative; 0 turns it off.")

    @property
    def channels(self) -> int:
        """Output channels of the decoder: 3 means, and 3 log-scales for logit-Laplace."""
        return 6 if self.likelihood == "logit_laplace" else 3


class Dvae(nn.Module):
    """The network: `encoder`, `encoder_head` to V logits, `decoder_stem` from V, `decoder`.

    The rows of the kernel of `decoder_stem` correspond to the codebook of a VQ-VAE.
    """

    config: DvaeConfig
    dtype: DtypePolicy = DtypePolicy()

    def setup(self):
        """Declares the layers."""
        c, dtype = self.config, self.dtype
        self.encoder = codec_bodies.build_encoder(c, dtype)
        # The two layers next to the relaxation are float32, as in the released model.
        names = (axes.CONV_IN, axes.CODES)
        self.encoder_head = conv.Conv(c.features, c.num_codes, names=names, dtype=dtype.island)
        # For a one-hot input the output is a single row. With gain 1, as released, it is
        # N(0, 1/sqrt V): the many steps of the pyramid's training repair that, the patch trunk
        # trains for few.
        gain = 1.0 if c.trunk == "pyramid" else c.num_codes**0.5
        n_init, names = c.n_init or c.width, (axes.CODES, None)
        self.decoder_stem = conv.Conv(
            c.num_codes, n_init, gain=gain, names=names, dtype=dtype.island
        )
        self.decoder = codec_bodies.build_decoder(c, c.channels, dtype)

    def __call__(self, images: Array) -> Array:
        """The reconstruction [B, h, w, 3] through hard codes."""
        return self.decode_codes(self.encode(images))

    def logits(self, images: Array) -> Array:
        """Code logits [B, g, g, V] float32 of images [B, h, w, 3] in [-1, 1]."""
        if self.config.likelihood == "logit_laplace":
            images = map_pixels(images)  # the released encoder reads the squeezed range
        return self.encoder_head(self.encoder(images))

    def encode(self, images: Array) -> Array:
        """The likeliest codes [B, g, g] int32 of images [B, h, w, 3] in [-1, 1], without noise."""
        return quantize.likeliest(self.logits(images))

    def decode_soft(self, z: Array) -> Array:
        """Soft codes [B, g, g, V] -> decoder outputs [B, h, w, channels] float32."""
        return self.decoder(self.decoder_stem(z)).astype(self.dtype.accum)

    def decode_codes(self, codes: Array) -> Array:
        """Codes [B, g, g] int -> images [B, h, w, 3] float32 in [-1, 1]."""
        out = self.decoder(self.decoder_stem.lookup(codes)).astype(self.dtype.accum)
        return to_images(out, self.config.likelihood)


def loss(
    model: Dvae, params: Params, extra: Any, images: Array, key: Key, step: Array
) -> tuple[Array, dict[str, Array], Any]:
    """The negative ELBO per pixel channel, with beta on the KL.

    Args:
      model: the network.
      params: its parameters.
      extra: passed through; a dVAE has no other variables.
      images: [B, h, w, 3] in [-1, 1], the global batch.
      key: samples the Gumbel noise.
      step: int32 scalar, for the schedules.

    Returns:
      scalar float32 loss, metrics, `extra`.

    Source: arXiv:2102.12092 §2.1, App. A.2: nll / (h w 3) + beta KL / (h w 3), the KL summed over
    positions, against the uniform prior. entropy_bonus is ours, 0 in the paper.
    """
    c = model.config
    temperature = cosine(c.temperature_start, c.temperature_end, c.temperature_steps, step)
    kl_weight = cosine(0.0, c.kl_weight, c.kl_steps, step)
    logits = model.apply({"params": params}, images, method="logits")
    z = quantize.gumbel_softmax(key, logits, temperature)
    out = model.apply({"params": params}, z, method="decode_soft")
    recon = negative_log_likelihood(out, images, c.likelihood)
    kl = jnp.mean(quantize.kl_to_uniform(logits))  # of one position
    total = recon + kl_weight * kl * c.grid**2 / (c.image_px**2 * 3)
    if c.entropy_bonus:
        mean = jnp.mean(jax.nn.softmax(logits, -1), (0, 1, 2))
        total -= c.entropy_bonus * quantize.entropy(mean)
    error = jnp.mean(jnp.square(to_images(out, c.likelihood) - images))
    metrics = {
        "recon": recon,
        "kl": kl,
        "temperature": temperature,
        "kl_weight": kl_weight,
        "psnr": vqvae.psnr(error),
        **quantize.usage(quantize.likeliest(logits), c.num_codes),
    }
    return total, jax.lax.stop_gradient(metrics), extra


evaluate = vqvae.evaluate


def negative_log_likelihood(out: Array, images: Array, likelihood: str) -> Array:
    """Mean over batch, pixels and channels of -ln p(images | out).

    Args:
      out: decoder outputs [B, h, w, 6] (means and log-scales in logit space), or [B, h, w, 3].
      images: [B, h, w, 3] in [-1, 1].
      likelihood: "logit_laplace" or "mse" (then the squared error in [-1, 1], no constant).

    Source: arXiv:2102.12092 §2.1, eq. 2 and 3, at x = map_pixels(images):
    ln(2 b x (1 - x)) + |logit x - mu| / b.
    """
    if likelihood == "mse":
        return jnp.mean(jnp.square(out - images))
    x = map_pixels(images)
    mu, log_b = out[..., :3], jnp.maximum(out[..., 3:], LOG_SCALE_MIN)
    logit = jnp.log(x) - jnp.log1p(-x)
    nll = jnp.log(2 * x * (1 - x)) + log_b + jnp.abs(logit - mu) * jnp.exp(-log_b)
    return jnp.mean(nll)


def map_pixels(images: Array) -> Array:
    """Pixels in [-1, 1] -> [eps, 1 - eps], where logits are finite."""
    return (1 - 2 * LOGIT_LAPLACE_EPS) * 0.5 * (images + 1) + LOGIT_LAPLACE_EPS


def to_images(out: Array, likelihood: str) -> Array:
    """Decoder outputs -> images [B, h, w, 3] in [-1, 1]; the log-scales are ignored."""
    if likelihood == "mse":
        return jnp.clip(out, -1.0, 1.0)
    x = (jax.nn.sigmoid(out[..., :3]) - LOGIT_LAPLACE_EPS) / (1 - 2 * LOGIT_LAPLACE_EPS)
    return 2 * jnp.clip(x, 0.0, 1.0) - 1


def cosine(start: float, end: float, steps: int, step: Array) -> Array:
    """A half cosine from start at step 0 to end at `steps`, constant after; 0 steps = end."""
    if steps == 0:
        return jnp.float32(end)
    progress = jnp.clip(step / steps, 0.0, 1.0)
    return end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * progress))


def forward_macs(c: DvaeConfig) -> int:
    """Multiply-adds of one picture's forward pass."""
    n_init = c.n_init or c.width
    bottleneck = c.features * c.num_codes + c.num_codes * n_init
    return codec_bodies.body_macs(c, n_init, c.channels) + c.grid**2 * bottleneck


def from_vqvae(params: Params, vectors: Array) -> Params:
    """The dVAE with the codes and pictures of a VQ-VAE, computed from the VQ-VAE's weights.

    argmin_v |h - e_v|^2 = argmax_v 2 s h.e_v - s |e_v|^2 is a linear layer after the encoder, and
    the decoder's input for code v is the VQ-VAE's for the vector e_v. So hard codes and pictures
    are the same, and Gumbel-softmax training continues from there without a collapse. The factor s
    only sets the entropy of the initial posterior. It is 1 / (mean squared deviation of the codes
    per dimension), so that the typical distance to a wrong code is 2 D nats.

    Args:
      params: of a `Vqvae`, host arrays.
      vectors: its codebook [V, D].

    Returns:
      params of a `Dvae` with the same trunk, host arrays.
    """
    e = jnp.asarray(vectors, jnp.float32)
    s = 1.0 / jnp.mean(jnp.square(e - e.mean(0, keepdims=True)))
    head, stem = params["encoder_head"], params["decoder_stem"]
    exact = jax.lax.Precision.HIGHEST
    kernel = jnp.matmul(head["kernel"][0, 0], 2 * s * e.T, precision=exact)
    bias = jnp.matmul(head["bias"], 2 * s * e.T, precision=exact) - s * jnp.sum(e * e, -1)
    rows = jnp.matmul(e, stem["kernel"][0, 0], precision=exact)
    dvae_params = {
        "encoder": params["encoder"],
        "encoder_head": {"kernel": kernel[None, None], "bias": bias},
        "decoder_stem": {"kernel": rows[None, None], "bias": stem["bias"]},
        "decoder": params["decoder"],
    }
    return jax.tree.map(jax.device_get, dvae_params)
