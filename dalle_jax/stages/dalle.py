"""A trained DALL·E with the codec whose codes it learnt."""

import dataclasses

from dalle_jax.engine import checkpoint
from dalle_jax.models import build
from dalle_jax.stages import run
from dalle_jax.stages.codec import Codec
from dalle_jax.stages.run import Run, Stage
from dalle_jax.types import UsageError


@dataclasses.dataclass(frozen=True, eq=False)
class DalleStage(Stage):
    """A trained DALL·E.

    Attributes:
      codec: turns the codes that it samples into pictures.
    """

    codec: Codec

    @classmethod
    def load(cls, folder: str, codec: str | Codec = "", step: int | None = None) -> "DalleStage":
        """The DALL·E in the folder of a run, with its codec.

        Args:
          folder: the run's folder.
          codec: the codec, or its folder if it was moved; see `run.companion`.
          step: training step; the latest by default.

        Raises:
          UsageError: see `Run.open`; or if the codec is another one than the run was trained with.
        """
        opened = Run.open(folder, "dalle", step)
        if not isinstance(codec, Codec):
            codec = Codec.load(run.companion(folder, opened.config, "dvae", codec))
        trained_with = (opened.read(checkpoint.CODEC) or b"").decode()
        if trained_with and trained_with != codec.fingerprint:
            raise UsageError(
                f"{opened.folder!r} was trained on the codes of a codec {trained_with}, but "
                f"{codec.folder!r} holds {codec.fingerprint}: it was trained on or again. Give the "
                "folder of the old one with --dvae, or train the DALL-E again."
            )
        model = build.dalle(opened.config, codec.grid, codec.num_codes)
        stage = cls(opened, model, codec)
        stage.check_shapes(
            lambda params, *inputs: model.apply({"params": params}, *inputs),
            run.ids(stage.text_len),
            run.ids(codec.grid**2),
        )
        return stage

    @property
    def image_px(self) -> int:
        """Side of the pictures: the codec's."""
        return self.codec.image_px
