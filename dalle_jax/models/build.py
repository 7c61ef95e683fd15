"""The network that a config describes: joins its data and model sections."""

import dataclasses
from typing import TypeVar

from dalle_jax import config as cfg
from dalle_jax.models.clip import Clip, ClipConfig
from dalle_jax.models.dalle import Dalle, DalleConfig
from dalle_jax.models.dvae import Dvae, DvaeConfig
from dalle_jax.models.prior_ar import ArPrior, ArPriorConfig
from dalle_jax.models.prior_diffusion import DiffusionPrior, DiffusionPriorConfig
from dalle_jax.models.unet import Unet, UnetConfig
from dalle_jax.models.vqvae import Vqvae, VqvaeConfig
from dalle_jax.nn.transformer import TransformerConfig
from dalle_jax.types import DtypePolicy, UsageError

T = TypeVar("T")
# Key of a flat model section -> field of a TransformerConfig. Where a model has one stack, the keys
# are the fields; `_tower` has those of a named stack.
_STACK = {field.name: field.name for field in dataclasses.fields(TransformerConfig)}


def policy(config: cfg.ConfigDict) -> DtypePolicy:
    """The dtype policy of a config."""
    return DtypePolicy.from_names(config.dtype.param, config.dtype.compute)


def autoencoder(config: cfg.ConfigDict) -> Dvae | Vqvae:
    """The dVAE or VQ-VAE of a config.

    Raises:
      UsageError: for an unknown model.kind, or sizes that do not fit.
    """
    kinds = {"dvae": (DvaeConfig, Dvae), "vqvae": (VqvaeConfig, Vqvae)}
    config_class, module = _of_kind(config, kinds)
    model_config = cfg.build(config_class, config.model, image_px=config.data.image_px)
    return module(model_config, policy(config))


def dalle(config: cfg.ConfigDict, grid: int, num_codes: int) -> Dalle:
    """The DALL·E of a config over codes [g, g] of a codec with `num_codes` entries."""
    sizes = dict(grid=grid, num_codes=num_codes, **_text(config))
    return Dalle(_nested(DalleConfig, config.model, {"transformer": _STACK}, sizes), policy(config))


def clip(config: cfg.ConfigDict) -> Clip:
    """The CLIP of a config."""
    sizes = dict(image_px=config.data.image_px, **_text(config))
    stacks = {name: _tower(name) for name in ("image", "text")}
    return Clip(_nested(ClipConfig, config.model, stacks, sizes), policy(config))


def prior(
    config: cfg.ConfigDict, joint_width: int, num_dims: int = 0, num_buckets: int = 0
) -> DiffusionPrior | ArPrior:
    """The prior of a config over the embeddings of a CLIP.

    Args:
      config: its `model.kind` is "diffusion" or "ar".
      joint_width: E of the CLIP.
      num_dims: K of an AR prior's PCA.
      num_buckets: V of an AR prior's PCA.

    Raises:
      UsageError: for an unknown kind, or sizes that do not fit.
    """
    kinds = {
        "diffusion": (DiffusionPriorConfig, DiffusionPrior),
        "ar": (ArPriorConfig, ArPrior),
    }
    config_class, module = _of_kind(config, kinds)
    sizes = dict(joint_width=joint_width, **_text(config))
    if config.model.kind == "ar":
        sizes |= dict(num_dims=num_dims, num_buckets=num_buckets)
    model_config = _nested(config_class, config.model, {"transformer": _STACK}, sizes)
    return module(model_config, policy(config))


def unet(config: cfg.ConfigDict, clip_width: int = 0) -> Unet:
    """The U-Net of a config: a decoder for embeddings of clip_width numbers, or an upsampler.

    Args:
      config: that of an upsampler has `loss.low_res_px` above 0.
      clip_width: E of a decoder's CLIP; 0 = no embedding (upsamplers).
    """
    model = config.model
    sizes = dict(
        image_px=config.data.image_px,
        clip_width=clip_width,
        low_res=config.loss.low_res_px > 0,
        inpaint=config.loss.inpaint,
        context_width=model.text_width,
    )
    if model.text_layers:
        keys = _tower("text").items()
        text = {field: model[key] for key, field in keys if key in model}
        sizes |= dict(text_encoder=TransformerConfig(**text, activation="gelu"), **_text(config))
    rest = {key: model[key] for key in model if key == "remat" or key not in _tower("text")}
    return Unet(cfg.build(UnetConfig, cfg.ConfigDict(rest), **sizes), policy(config))


def _of_kind(config: cfg.ConfigDict, kinds: dict[str, T]) -> T:
    kind = config.model.get("kind", "")
    if kind not in kinds:
        raise UsageError(f"model.kind {kind!r} is unknown; use one of {', '.join(kinds)}.")
    return kinds[kind]


def _text(config: cfg.ConfigDict) -> dict[str, int]:
    return dict(text_len=config.data.text_len, vocab_size=config.data.vocab_size)


def _tower(name: str) -> dict[str, str]:
    """The keys of the stack `name`, such as image_width; all stacks share scan_layers and remat."""
    sizes = {"width": "width", "layers": "num_layers", "heads": "num_heads"}
    prefixed = {f"{name}_{key}": field for key, field in sizes.items()}
    return {**prefixed, "scan_layers": "scan_layers", "remat": "remat"}


def _nested(
    config_class: type[T],
    section: cfg.ConfigDict,
    stacks: dict[str, dict[str, str]],
    sizes: dict[str, int],
) -> T:
    """A model config, with its stacks, from a flat section.

    Args:
      config_class: a dataclass whose defaults have the stacks.
      section: the model section of a config.
      stacks: field of config_class -> its keys, {key of the section: field of TransformerConfig}.
      sizes: fields that other sections or other models decide.

    Raises:
      UsageError: for unknown keys, or sizes that do not fit.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    keys = {key for names in stacks.values() for key in names}
    known = keys | defaults.keys() - stacks.keys()
    if unknown := sorted(set(section) - known):
        raise UsageError(
            f"model.{unknown[0]} is unknown; {config_class.__name__} takes "
            f"{', '.join(sorted(known))}."
        )
    for name, names in stacks.items():
        fields = {field: section[key] for key, field in names.items() if key in section}
        sizes = {**sizes, name: dataclasses.replace(defaults[name], **fields)}
    rest = {key: section[key] for key in section if key not in keys}
    return cfg.build(config_class, cfg.ConfigDict(rest), **sizes)
