"""Frozen networks by their shapes alone: a plan or a dry run needs no weights, no folder.

`stages.dvae_config` of a config names the config file of the codec that `stages.dvae` will hold one
day, `stages.clip_config` that of the CLIP of `stages.clip`. Called by tasks/, whose `make(...,
shapes_only=True)` is what `plan` compiles.
"""

import flax.linen as nn
import jax

from dalle_jax import config as cfg
from dalle_jax.models import build
from dalle_jax.stages import run
from dalle_jax.stages.clip import ClipStage
from dalle_jax.stages.codec import Codec
from dalle_jax.stages.run import Run
from dalle_jax.types import UsageError


def codec(config: cfg.ConfigDict) -> Codec:
    """The codec of a run: that of `stages.dvae` if it is given, else `stages.dvae_config`'s shape.

    Raises:
      UsageError: like `Codec.load` and `codec_of`.
    """
    if config.stages.dvae:
        return Codec.load(config.stages.dvae)
    return codec_of(config.stages.dvae_config)


def codec_of(path: str) -> Codec:
    """The codec that a config describes, without weights.

    Args:
      path: see `config.load`, e.g. `configs/dvae_paper.py` or `dvae:size=smoke`.

    Returns:
      A codec whose params are ShapeDtypeStructs, with step 0 and no folder and fingerprint.

    Raises:
      UsageError: if there is no such config, or it does not describe an autoencoder.
    """
    config = _load("stages.dvae_config", path, "autoencode", "a codec, e.g. configs/dvae_paper.py")
    return Codec.of(_run(config, build.autoencoder(config), run.picture(config.data.image_px)))


def clip(config: cfg.ConfigDict) -> ClipStage:
    """The CLIP of a run: that of `stages.clip` if it is given, else `stages.clip_config`'s shape.

    Raises:
      UsageError: like `ClipStage.load` and `clip_of`.
    """
    if config.stages.clip:
        return ClipStage.load(config.stages.clip)
    return clip_of(config.stages.clip_config)


def clip_of(path: str) -> ClipStage:
    """The CLIP that a config describes, without weights and tokenizer; see `codec_of`."""
    config = _load("stages.clip_config", path, "clip", "a CLIP, e.g. configs/clip.py:size=l14")
    data, model = config.data, build.clip(config)
    return ClipStage(_run(config, model, run.picture(data.image_px), run.ids(data.text_len)), model)


def _run(config: cfg.ConfigDict, model: nn.Module, *inputs: jax.ShapeDtypeStruct) -> Run:
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return Run.by_shape(config, nn.meta.unbox(variables))


def _load(field: str, path: str, task: str, expected: str) -> cfg.ConfigDict:
    config = cfg.load(path)
    if config.task != task:
        raise UsageError(
            f"{field}={path!r} is a config of task {config.task!r}; expected one of {expected}."
        )
    return config
