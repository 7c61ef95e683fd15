"""The network that a config describes: the one place that joins its data and model sections."""

from dalle_jax import config as cfg
from dalle_jax.models import clip as clip_model
from dalle_jax.models import dalle as dalle_model
from dalle_jax.models import dvae, prior_ar, prior_diffusion, unet_plan, vqvae
from dalle_jax.models import unet as unet_model
from dalle_jax.types import DtypePolicy, UsageError


def policy(config: cfg.ConfigDict) -> DtypePolicy:
    """The dtype policy that a config names."""
    return DtypePolicy.from_names(config.dtype.param, config.dtype.compute)


def autoencoder(config: cfg.ConfigDict) -> dvae.Dvae | vqvae.Vqvae:
    """The autoencoder module of a config: a dVAE or a VQ-VAE.

    Raises:
      UsageError: for an unknown model.kind, or sizes that do not fit.
    """
    kinds = {"dvae": (dvae.DvaeConfig, dvae.Dvae), "vqvae": (vqvae.VqvaeConfig, vqvae.Vqvae)}
    kind = config.model.get("kind", "")
    if kind not in kinds:
        raise UsageError(f"model.kind {kind!r} is unknown; use one of {', '.join(kinds)}.")
    made, module = kinds[kind]
    return module(cfg.build(made, config.model, image_px=config.data.image_px), policy(config))


def dalle(config: cfg.ConfigDict, grid: int, num_codes: int) -> dalle_model.Dalle:
    """The DALL·E module of a config over codes [g, g] of a codec with `num_codes` entries."""
    made = cfg.build(
        dalle_model.DalleConfig,
        config.model,
        text_len=config.data.text_len,
        vocab_size=config.data.vocab_size,
        grid=grid,
        num_codes=num_codes,
    )
    return dalle_model.Dalle(made, policy(config))


def clip(config: cfg.ConfigDict) -> clip_model.Clip:
    """The CLIP module of a config; the one place that joins its data and model sections."""
    made = cfg.build(
        clip_model.ClipConfig,
        config.model,
        image_px=config.data.image_px,
        text_len=config.data.text_len,
        vocab_size=config.data.vocab_size,
    )
    return clip_model.Clip(made, policy(config))


def prior(
    config: cfg.ConfigDict, joint_width: int, num_dims: int = 0, num_buckets: int = 0
) -> prior_diffusion.DiffusionPrior | prior_ar.ArPrior:
    """The prior of a config over the embeddings of a CLIP.

    Args:
      config: its `model.kind` chooses.
      joint_width: E of the CLIP.
      num_dims: of an AR prior, as its PCA has them.
      num_buckets: likewise.

    Raises:
      UsageError: for an unknown kind, or sizes that do not fit.
    """
    kinds = {
        "diffusion": (prior_diffusion.DiffusionPriorConfig, prior_diffusion.DiffusionPrior),
        "ar": (prior_ar.ArPriorConfig, prior_ar.ArPrior),
    }
    kind = config.model.get("kind", "")
    if kind not in kinds:
        raise UsageError(f"model.kind {kind!r} is unknown; use one of {', '.join(kinds)}.")
    made, module = kinds[kind]
    sizes = dict(
        text_len=config.data.text_len, vocab_size=config.data.vocab_size, joint_width=joint_width
    )
    if kind == "ar":
        sizes |= dict(num_dims=num_dims, num_buckets=num_buckets)
    return module(cfg.build(made, config.model, **sizes), policy(config))


def unet(config: cfg.ConfigDict, clip_width: int = 0) -> unet_model.Unet:
    """The U-Net of a config: a decoder for embeddings of clip_width numbers, or an upsampler.

    Args:
      config: an upsampler's has `loss.low_res_px` above 0.
      clip_width: E of a decoder's CLIP; 0 = no embedding (upsamplers).
    """
    text = {}
    if config.model.text_layers:
        text = dict(text_len=config.data.text_len, vocab_size=config.data.vocab_size)
    made = cfg.build(
        unet_plan.UnetConfig,
        config.model,
        image_px=config.data.image_px,
        clip_width=clip_width,
        low_res=config.loss.low_res_px > 0,
        inpaint=config.loss.inpaint,
        **text,
    )
    return unet_model.Unet(made, policy(config))
