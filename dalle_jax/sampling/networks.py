"""The network that a config describes: the one place that joins its data and model sections."""

from dalle_jax import config as cfg
from dalle_jax.models import clip as clip_model
from dalle_jax.models import dalle as dalle_model
from dalle_jax.models import dvae, vqvae
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
