"""Decoders and upsamplers from their workdirs, as callable stages. See `stages`."""

import dataclasses

import jax
import jax.numpy as jnp

from dalle_jax import config as cfg
from dalle_jax.diffusion import schedules
from dalle_jax.models import build, unet
from dalle_jax.sampling import diffusion
from dalle_jax.stages import prior, run
from dalle_jax.types import Array, Batch, Key, Params


@dataclasses.dataclass(frozen=True, eq=False)
class UnetStage(run.Weights):
    """A trained decoder or upsampler.

    Attributes:
      model: the linen module; its `config` says what it takes (`unet.cond_spec`).
      params: its parameters, host arrays (no collection level).
      schedule: all steps of the process that it was trained on.
      config: its run's config.
      tokenizer_bytes: the SentencePiece model it was trained with, a decoder's CLIP's; b"" of an
        upsampler.
      clip: a decoder's CLIP, loaded; None of an upsampler.
      image_px: side of the pictures it draws.
      low_res_px: side of the pictures that an upsampler takes; 0 of a decoder.
      fingerprint: 16 hex digits of weights and architecture.
      workdir: where it came from.
      step: training step of the weights.
    """

    model: unet.Unet
    params: Params
    schedule: schedules.Schedule
    config: cfg.ConfigDict
    tokenizer_bytes: bytes
    clip: run.ClipStage | None
    image_px: int
    low_res_px: int
    fingerprint: str
    workdir: str
    step: int

    def draw(
        self, cond: Batch, *, key: Key, indices: Array, spacing: schedules.Spacing, **options
    ) -> Array:
        """Pictures [B, px, px, 3] float32 in [-1, 1]; see `diffusion.draw`.

        Args:
          cond: what `unet.cond_spec` names, [B, …] each.
          key: typed key.
          indices: [B] global index of each picture.
          spacing: which steps to take, see `schedules.spaced_rows`: "ddim50", 250, "fast27".
          **options: of `diffusion.draw`.
        """
        steps = schedules.respace(self.schedule, spacing)
        return diffusion.draw(
            self.model, self.on(), cond, schedule=steps, key=key, indices=indices, **options
        )


def load_unet(workdir: str, clip: str | run.ClipStage = "", step: int | None = None) -> UnetStage:
    """The decoder or upsampler that a diffusion run's workdir (or exported folder) holds.

    Args:
      workdir: the run's folder.
      clip: a decoder's CLIP, or its folder if it has moved; see `unclip_stages.clip_workdir`.
      step: training step; the latest by default.

    Raises:
      UsageError: if a folder is missing, of another task, not trained yet or damaged, or if the
        CLIP is another one than the decoder was trained with.
    """
    config, variables = run.open_run(workdir, "diffusion", step)
    is_decoder = not config.loss.low_res_px
    if is_decoder and not isinstance(clip, run.ClipStage):
        clip = run.load_clip(prior.clip_workdir(workdir, config, clip))
    if is_decoder:
        prior.check_clip(workdir, clip)
    model = build.unet(config, clip.model.config.joint_width if is_decoder else 0)
    params = run.floats(variables.params, config)
    px = config.data.image_px
    x = jax.ShapeDtypeStruct((1, px, px, 3), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    cond = unet.cond_spec(model.config, 1, px)
    run.trace(workdir, lambda p, *xs: model.apply({"params": p}, *xs), params, x, t, cond)
    return UnetStage(
        model=model,
        params=params,
        schedule=schedules.make(config.loss.schedule, config.loss.num_steps),
        config=config,
        tokenizer_bytes=run.read_tokenizer(workdir) if is_decoder else b"",
        clip=clip if is_decoder else None,
        image_px=px,
        low_res_px=config.loss.low_res_px,
        fingerprint=run.fingerprint(params, config),
        workdir=str(workdir),
        step=variables.step,
    )
