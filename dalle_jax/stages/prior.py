"""A trained prior of DALL-E 2 with the CLIP whose image embeddings it samples."""

import dataclasses

import jax
import jax.numpy as jnp

from dalle_jax import config as cfg
from dalle_jax.engine import checkpoint
from dalle_jax.models import build
from dalle_jax.models.prior_ar import ArPrior
from dalle_jax.models.prior_diffusion import DiffusionPrior
from dalle_jax.stages import pca, run
from dalle_jax.stages.clip import ClipStage
from dalle_jax.stages.pca import Pca
from dalle_jax.stages.run import Run, Stage
from dalle_jax.types import Array, UsageError


@dataclasses.dataclass(frozen=True, eq=False)
class PriorStage(Stage):
    """A trained prior.

    Attributes:
      clip: the CLIP that it was trained with.
      pca: of an AR prior; else None.
    """

    clip: ClipStage
    pca: Pca | None

    @classmethod
    def load(cls, folder: str, clip: str | ClipStage = "", step: int | None = None) -> "PriorStage":
        """The prior in the folder of a run, with its CLIP.

        Args:
          folder: the run's folder.
          clip: the CLIP, or its folder if it was moved; see `run.companion`.
          step: training step; the latest by default.

        Raises:
          UsageError: see `Run.open`; or if the CLIP is another one than the prior was trained with.
        """
        opened = Run.open(folder, "prior", step)
        if not isinstance(clip, ClipStage):
            clip = ClipStage.load(run.companion(folder, opened.config, "clip", clip))
        clip.check_trained_on(folder)
        components = None
        if opened.config.model.kind == "ar":
            file = checkpoint.absolute(folder) / checkpoint.PCA
            if not file.exists():
                raise UsageError(
                    f"{file} is missing; copy it from the original run, or train again."
                )
            components = pca.from_bytes(file.read_bytes(), str(file))
        model = cls.build(opened.config, clip, components)
        stage = cls(opened, model, clip, components)
        stage.check_shapes(
            lambda params, *inputs: model.apply({"params": params}, *inputs),
            *cls.example_inputs(model),
        )
        return stage

    @property
    def kind(self) -> str:
        """ "diffusion" or "ar"."""
        return self.config.model.kind

    @property
    def tables(self) -> dict[str, Array] | None:
        """Tables of the PCA for the model's dimensions; None without a PCA."""
        return None if self.pca is None else self.pca.tables(self.model.config.num_dims)

    @staticmethod
    def build(
        config: cfg.ConfigDict, clip: ClipStage, components: Pca | None
    ) -> DiffusionPrior | ArPrior:
        """The prior of a config over this CLIP and, for an AR prior, this PCA (None = by shape).

        Raises:
          UsageError: if the config asks for other buckets, or more dimensions, than the PCA has.
        """
        joint = clip.joint_width
        if config.model.get("kind") != "ar":
            return build.prior(config, joint)
        dims, buckets = config.model.num_dims, config.model.num_buckets
        if components is None:
            return build.prior(config, joint, dims or joint, buckets or 1024)
        if components.joint_width != joint:
            raise UsageError(
                f"the PCA is of embeddings of {components.joint_width} numbers, but the CLIP's "
                f"have {joint}; make it again with `python -m dalle_jax pca`."
            )
        if buckets not in (0, components.num_buckets):
            raise UsageError(
                f"model.num_buckets={buckets}, but the PCA has {components.num_buckets}; use "
                "--config.model.num_buckets=0 (as the PCA has), or make the PCA again."
            )
        return build.prior(config, joint, dims or components.num_dims, components.num_buckets)

    @staticmethod
    def example_inputs(model: DiffusionPrior | ArPrior) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of one example as a prior's `__call__` takes it."""
        c = model.config
        embedding = jax.ShapeDtypeStruct((1, c.joint_width), jnp.float32)
        number = jax.ShapeDtypeStruct((1,), jnp.int32)
        if c.kind == "ar":
            return run.ids(c.text_len), embedding, number, run.ids(c.num_dims)
        return run.ids(c.text_len), embedding, embedding, number
