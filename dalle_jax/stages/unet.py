"""A trained U-Net: DALL-E 2's decoder with its CLIP, or an upsampler."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from dalle_jax.diffusion import schedules
from dalle_jax.models import build, unet
from dalle_jax.stages import run
from dalle_jax.stages.clip import ClipStage
from dalle_jax.stages.run import Run, Stage
from dalle_jax.types import UsageError


@dataclasses.dataclass(frozen=True, eq=False)
class UnetStage(Stage):
    """A trained decoder or upsampler.

    Attributes:
      clip: the CLIP that a decoder was trained with; None for an upsampler.
    """

    clip: ClipStage | None

    @classmethod
    def load(cls, folder: str, clip: str | ClipStage = "", step: int | None = None) -> "UnetStage":
        """The decoder or upsampler in the folder of a diffusion run.

        Args:
          folder: the run's folder.
          clip: a decoder's CLIP, or its folder if it was moved; see `run.companion`.
          step: training step; the latest by default.

        Raises:
          UsageError: see `Run.open`; or if the CLIP is another one than the decoder was trained
            with.
        """
        return cls.of(Run.open(folder, "diffusion", step), clip)

    @classmethod
    def of(cls, opened: Run, clip: str | ClipStage = "") -> "UnetStage":
        """The decoder or upsampler of an opened run; see `load`."""
        config = opened.config
        if config.loss.low_res_px:
            clip = None
        else:
            if not isinstance(clip, ClipStage):
                clip = ClipStage.load(run.companion(opened.folder, config, "clip", clip))
            clip.check_trained_on(opened.folder)
        model = build.unet(config, 0 if clip is None else clip.joint_width)
        stage = cls(opened, model, clip)
        px = stage.image_px
        stage.check_shapes(
            lambda params, *inputs: model.apply({"params": params}, *inputs),
            run.picture(px),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            unet.cond_spec(model.config, 1, px),
        )
        return stage

    @functools.cached_property
    def schedule(self) -> schedules.Schedule:
        """All steps of the process that it was trained on."""
        return schedules.make(self.config.loss.schedule, self.config.loss.num_steps)

    @property
    def low_res_px(self) -> int:
        """Side of the pictures that an upsampler takes; 0 for a decoder."""
        return self.config.loss.low_res_px

    def check_is_decoder(self) -> "UnetStage":
        """This stage; UsageError if it is an upsampler."""
        if self.low_res_px:
            raise UsageError(
                f"{self.folder!r} holds an upsampler from {self.low_res_px} px; expected a decoder."
            )
        return self
