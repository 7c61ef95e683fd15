"""The stages of DALL-E 2 that fit together, from their folders, as one object.

What is done with them is `sampling.unclip` and `sampling.manipulate`. All of them were trained with
one CLIP, and each takes what the one before gives; anything else is refused here, before anything
compiles.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dalle_jax.engine import checkpoint
from dalle_jax.stages import pca, prior, run, unet
from dalle_jax.stages.pca import Pca
from dalle_jax.types import UsageError

PRIORS = {"prior": "diffusion", "prior_ar": "ar"}  # stage -> kind
UPSAMPLERS = ("upsampler_1", "upsampler_2")


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

    clip: run.ClipStage
    decoder: unet.UnetStage
    priors: Mapping[str, prior.PriorStage]
    inpainter: unet.UnetStage | None = None
    upsamplers: tuple[unet.UnetStage, ...] = ()
    pca: Pca | None = None

    @property
    def image_px(self) -> int:
        """Side of the finished pictures."""
        return (self.decoder, *self.upsamplers)[-1].image_px

    @property
    def parts(self) -> dict[str, Any]:
        """Name, as `load` knows it, -> stage: all that there are."""
        kinds = {kind: name for name, kind in PRIORS.items()}
        found = {"clip": self.clip, "decoder": self.decoder, "inpaint": self.inpainter}
        found |= {kinds[kind]: stage for kind, stage in self.priors.items()}
        found |= dict(zip(UPSAMPLERS, self.upsamplers, strict=False))
        return {name: stage for name, stage in found.items() if stage is not None}


def load(folders: Mapping[str, str], only: Sequence[str] = ()) -> Unclip:
    """The stages that lie in these folders.

    Args:
      folders: stage -> workdir or exported folder: `decoder`, and any of `clip`, `prior` (the
        diffusion prior), `prior_ar`, `inpaint`, `upsampler_1`, `upsampler_2`, and `pca` (a file).
        Without a clip, it is where the decoder's config says or in the folder beside it.
      only: names to load, beside clip and decoder; () = all of them.

    Raises:
      UsageError: if a folder is not what its name says, if two stages were trained with different
        CLIPs (naming both), or if their sizes do not follow one another. Before anything compiles.
    """
    folders = {
        name: folder
        for name, folder in folders.items()
        if not only or name in only or name in ("clip", "decoder")
    }
    if not folders.get("decoder"):
        raise UsageError(
            "there is no decoder; give --decoder=DIR (the workdir of a run of configs/decoder.py) "
            "or a pretrained set that holds one."
        )
    # Opened first: a folder that is missing or of another task is told as such.
    config, _ = run.open_run(folders["decoder"], "diffusion", None)
    where = prior.clip_workdir(folders["decoder"], config, folders.get("clip", ""))
    clip = run.load_clip(where)
    trained = {name: folders[name] for name in folders if name not in ("clip", "pca")}
    _check_one_clip(trained, clip)
    decoder = _decoder(folders["decoder"], clip)
    priors, fitted = {}, pca.load(folders["pca"]) if folders.get("pca") else None
    for name, kind in PRIORS.items():
        if name in folders:
            priors[kind] = _prior(folders[name], clip, kind)
    if fitted is None and "ar" in priors:
        fitted = priors["ar"].pca
    if fitted is not None and fitted.clip and fitted.clip not in (clip.fingerprint, clip.origin):
        raise UsageError(
            f"the PCA is of the embeddings of a CLIP {fitted.clip}, but {clip.workdir!r} holds "
            f"{clip.fingerprint}; make it again with `python -m dalle_jax pca`."
        )
    inpainter = _decoder(folders["inpaint"], clip) if "inpaint" in folders else None
    if inpainter is not None and not inpainter.model.config.inpaint:
        raise UsageError(
            f"{folders['inpaint']!r} holds a decoder that is shown no masks; train one with "
            "--config.loss.inpaint=true, or leave it out: the plain decoder inpaints too."
        )
    upsamplers, px = [], decoder.image_px
    for name in UPSAMPLERS:
        if name not in folders:
            continue
        stage = unet.load_unet(folders[name])
        if stage.low_res_px != px:
            takes = f"pictures of {stage.low_res_px} px" if stage.low_res_px else "no pictures"
            raise UsageError(
                f"{name} {folders[name]!r} takes {takes}, but the stage before it draws {px} px; "
                "give upsamplers in order, each trained on the size before it."
            )
        upsamplers.append(stage)
        px = stage.image_px
    return Unclip(clip, decoder, priors, inpainter, tuple(upsamplers), fitted)


def _check_one_clip(folders: Mapping[str, str], clip: run.ClipStage) -> None:
    """Raises UsageError if two stages say that they were trained with different CLIPs."""
    said, accepted = {}, {clip.fingerprint, clip.origin}  # an export rounds its weights
    for name, folder in folders.items():
        file = checkpoint.absolute(folder) / checkpoint.CLIP
        if file.exists():
            said[name] = file.read_text()
    first = next(iter(said), None)
    for name, digits in said.items():
        if digits != said[first] and not {digits, said[first]} <= accepted:
            raise UsageError(
                f"{first} {folders[first]!r} was trained on the embeddings of a CLIP "
                f"{said[first]}, but {name} {folders[name]!r} on those of {digits}; stages of one "
                "pipeline share one CLIP: train one of them again."
            )


def _decoder(folder: str, clip: run.ClipStage) -> unet.UnetStage:
    stage = unet.load_unet(folder, clip)
    if stage.low_res_px:
        raise UsageError(
            f"{folder!r} holds an upsampler from {stage.low_res_px} px; expected a decoder."
        )
    return stage


def _prior(folder: str, clip: run.ClipStage, kind: str) -> prior.PriorStage:
    stage = prior.load_prior(folder, clip)
    if stage.kind != kind:
        raise UsageError(
            f"{folder!r} holds a prior of kind {stage.kind!r}; expected {kind!r}: give it as "
            f"--prior_{stage.kind}."
        )
    return stage
