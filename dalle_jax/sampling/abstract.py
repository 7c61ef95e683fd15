"""Frozen networks by their shapes alone: a plan or a dry run needs no weights, no folder.

`stages.dvae_config` of a config names the config file of the codec that `stages.dvae` will hold one
day, `stages.clip_config` that of the CLIP of `stages.clip`. Called by tasks/, whose `make(...,
by_shape=True)` is what `plan` compiles.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax import config as cfg
from dalle_jax.sampling import networks, stages
from dalle_jax.types import UsageError


def codec(config: cfg.ConfigDict) -> stages.Codec:
    """The codec of a run: that of `stages.dvae` if it is given, else `stages.dvae_config`'s shape.

    Raises:
      UsageError: like `stages.load_codec` and `codec_of`.
    """
    if config.stages.dvae:
        return stages.load_codec(config.stages.dvae)
    return codec_of(config.stages.dvae_config)


def codec_of(path: str) -> stages.Codec:
    """The codec that a config file describes, without weights.

    Args:
      path: a file or a shipped config, e.g. `configs/dvae.py:size=smoke`; see `cfg.locate`.

    Returns:
      A codec whose params are ShapeDtypeStructs, with step 0 and no workdir and fingerprint.

    Raises:
      UsageError: if there is no such config, or it is not one of an autoencoder.
    """
    config = _load("stages.dvae_config", path, "autoencode", "a codec, e.g. configs/dvae_paper.py")
    px = config.data.image_px
    images = jax.ShapeDtypeStruct((1, px, px, 3), jnp.float32)
    variables = jax.eval_shape(networks.autoencoder(config).init, jax.random.key(0), images)
    return stages.make_codec(config, nn.meta.unbox(variables), digits="", workdir="", step=0)


def clip(config: cfg.ConfigDict) -> stages.ClipStage:
    """The CLIP of a run: that of `stages.clip` if it is given, else `stages.clip_config`'s shape.

    Raises:
      UsageError: like `stages.load_clip` and `clip_of`.
    """
    if config.stages.clip:
        return stages.load_clip(config.stages.clip)
    return clip_of(config.stages.clip_config)


def clip_of(path: str) -> stages.ClipStage:
    """The CLIP that a config file describes, without weights and tokenizer; see `codec_of`."""
    config = _load("stages.clip_config", path, "clip", "a CLIP, e.g. configs/clip.py:size=l14")
    data, model = config.data, networks.clip(config)
    images = jax.ShapeDtypeStruct((1, data.image_px, data.image_px, 3), jnp.float32)
    text = jax.ShapeDtypeStruct((1, data.text_len), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images, text)
    return stages.ClipStage(
        model=model,
        params=nn.meta.unbox(variables)["params"],
        config=config,
        tokenizer_bytes=b"",
        image_px=data.image_px,
        text_len=data.text_len,
        fingerprint="",
        workdir="",
        step=0,
    )


def _load(field: str, path: str, task: str, wanted: str) -> cfg.ConfigDict:
    config = cfg.load(path)
    if config.task != task:
        raise UsageError(
            f"{field}={path!r} is a config of task {config.task!r}; expected one of {wanted}."
        )
    return config
