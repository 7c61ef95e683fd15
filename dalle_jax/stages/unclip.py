"""The stages of DALL-E 2 that fit together, from their folders, as one object.

What is done with them is `sampling.unclip` and `sampling.manipulate`. All of them were trained with
one CLIP, and each takes what the one before gives; anything else is refused here, before anything
compiles.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

from dalle_jax.engine import checkpoint
from dalle_jax.stages import pca, run
from dalle_jax.stages.clip import ClipStage
from dalle_jax.stages.pca import Pca
from dalle_jax.stages.prior import PriorStage
from dalle_jax.stages.run import Run, Stage
from dalle_jax.stages.unet import UnetStage
from dalle_jax.types import UsageError


@dataclasses.dataclass(frozen=True, eq=False)
class Unclip:
    """Trained stages that fit together.

    Attributes:
      clip: the CLIP that all of them were trained with.
      decoder: embedding and caption -> small picture.
      priors: "diffusion" and "ar" -> the prior of that kind, where there is one.
      inpainter: a decoder that was tuned to inpaint, or None.
      upsamplers: in order, each for the pictures of the one before.
      pca: of the CLIP's embeddings, an AR prior's or one of its own; None without.
    """

    PRIORS: ClassVar[dict[str, str]] = {"prior": "diffusion", "prior_ar": "ar"}  # stage -> kind
    UPSAMPLERS: ClassVar[tuple[str, ...]] = ("upsampler_1", "upsampler_2")

    clip: ClipStage
    decoder: UnetStage
    priors: Mapping[str, PriorStage]
    inpainter: UnetStage | None = None
    upsamplers: tuple[UnetStage, ...] = ()
    pca: Pca | None = None

    @classmethod
    def load(cls, folders: Mapping[str, str | Stage], only: Sequence[str] = ()) -> "Unclip":
        """The stages in these folders.

        Args:
          folders: stage -> workdir or exported folder: `decoder`, and any of `clip`, `prior` (the
            diffusion prior), `prior_ar`, `inpaint`, `upsampler_1`, `upsampler_2`, and `pca` (a
            file). A stage that is open already may take its folder's place. Without a clip, it is
            where the decoder's config says or in the folder beside it.
          only: names to load, beside clip and decoder; () = all of them.

        Raises:
          UsageError: if a folder is not what its name says, if two stages were trained with
            different CLIPs (naming both), or if their sizes do not follow one another.
        """
        folders = {
            name: folder
            for name, folder in folders.items()
            if not only or name in only or name in ("clip", "decoder")
        }
        if not folders.get("decoder"):
            raise UsageError(
                "there is no decoder; give --decoder=DIR (the workdir of a run of "
                "configs/decoder.py) or a pretrained set that holds one."
            )
        decoder, clip = folders["decoder"], folders.get("clip", "")
        # Opened first: a folder that is missing or of another task is reported as such.
        opened = decoder.run if isinstance(decoder, Stage) else Run.open(decoder, "diffusion")
        if not isinstance(clip, Stage):
            clip = ClipStage.load(run.companion(opened.folder, opened.config, "clip", clip))
        unopened = {k: v for k, v in folders.items() if not isinstance(v, Stage)}
        _check_one_clip({k: v for k, v in unopened.items() if k not in ("clip", "pca")}, clip)
        if not isinstance(decoder, Stage):
            decoder = UnetStage.of(opened, clip)
        decoder.check_is_decoder()
        priors = {
            kind: _prior(folders[name], clip, kind)
            for name, kind in cls.PRIORS.items()
            if name in folders
        }
        components = pca.load(folders["pca"]) if folders.get("pca") else None
        if components is None and "ar" in priors:
            components = priors["ar"].pca
        if components is not None and components.clip and components.clip not in clip.fingerprints:
            raise UsageError(
                f"the PCA is of the embeddings of a CLIP {components.clip}, but {clip.folder!r} "
                f"holds {clip.fingerprint}; make it again with `python -m dalle_jax pca`."
            )
        inpainter = _inpainter(folders["inpaint"], clip) if "inpaint" in folders else None
        upsamplers = _upsamplers(cls.UPSAMPLERS, folders, decoder.image_px)
        return cls(clip, decoder, priors, inpainter, upsamplers, components)

    @property
    def image_px(self) -> int:
        """Side of the finished pictures."""
        return (self.decoder, *self.upsamplers)[-1].image_px

    @property
    def reads_captions(self) -> bool:
        """Whether the decoder has a text encoder of its own."""
        return bool(self.decoder.model.config.text_encoder)

    @property
    def parts(self) -> dict[str, Stage]:
        """Name, as `load` knows it, -> stage: all that there are."""
        names = {kind: name for name, kind in self.PRIORS.items()}
        parts = {"clip": self.clip, "decoder": self.decoder, "inpaint": self.inpainter}
        parts |= {names[kind]: stage for kind, stage in self.priors.items()}
        parts |= dict(zip(self.UPSAMPLERS, self.upsamplers, strict=False))
        return {name: stage for name, stage in parts.items() if stage is not None}


def _check_one_clip(folders: Mapping[str, str], clip: ClipStage) -> None:
    """Raises UsageError if two stages record that they were trained with different CLIPs."""
    recorded = {}
    for name, folder in folders.items():
        file = checkpoint.absolute(folder) / checkpoint.CLIP
        if file.exists():
            recorded[name] = file.read_text()
    first = next(iter(recorded), None)
    for name, fingerprint in recorded.items():
        both = {fingerprint, recorded[first]}
        if len(both) > 1 and not both <= clip.fingerprints:  # an export rounds its weights
            raise UsageError(
                f"{first} {folders[first]!r} was trained on the embeddings of a CLIP "
                f"{recorded[first]}, but {name} {folders[name]!r} on those of {fingerprint}; "
                "stages of one pipeline share one CLIP: train one of them again."
            )


def _prior(folder: str | Stage, clip: ClipStage, kind: str) -> PriorStage:
    stage = folder if isinstance(folder, Stage) else PriorStage.load(folder, clip)
    if stage.kind != kind:
        raise UsageError(
            f"{stage.folder!r} holds a prior of kind {stage.kind!r}; expected {kind!r}: give it as "
            f"--prior_{stage.kind}."
        )
    return stage


def _inpainter(folder: str | Stage, clip: ClipStage) -> UnetStage:
    stage = folder if isinstance(folder, Stage) else UnetStage.load(folder, clip)
    if not stage.check_is_decoder().model.config.inpaint:
        raise UsageError(
            f"{stage.folder!r} holds a decoder that is shown no masks; train one with "
            "--config.loss.inpaint=true, or leave it out: the plain decoder inpaints too."
        )
    return stage


def _upsamplers(
    names: Sequence[str], folders: Mapping[str, str | Stage], px: int
) -> tuple[UnetStage, ...]:
    stages = []
    for name in names:
        if name not in folders:
            continue
        folder = folders[name]
        stage = folder if isinstance(folder, Stage) else UnetStage.load(folder)
        if stage.low_res_px != px:
            takes = f"pictures of {stage.low_res_px} px" if stage.low_res_px else "no pictures"
            raise UsageError(
                f"{name} {stage.folder!r} takes {takes}, but the stage before it gives {px} px; "
                "give upsamplers in order, each trained on the size before it."
            )
        stages.append(stage)
        px = stage.image_px
    return tuple(stages)
