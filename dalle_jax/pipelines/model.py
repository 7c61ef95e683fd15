"""The library's front door: a model is a set of trained stages, opened when they are needed.

model = dalle_jax.load("shapes")
pictures = model.sample("a red cube on a white background", candidates=32, keep=8, seed=0)
pictures[0].save("best.png")
"""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dalle_jax import images
from dalle_jax.diffusion import schedules
from dalle_jax.engine import checkpoint
from dalle_jax.pipelines import dalle, inputs, unclip
from dalle_jax.pipelines.inputs import Image
from dalle_jax.pipelines.pictures import Pictures
from dalle_jax.sampling import rerank
from dalle_jax.sampling.unclip import Settings
from dalle_jax.stages import pretrained
from dalle_jax.stages.clip import ClipStage
from dalle_jax.stages.codec import Codec
from dalle_jax.stages.dalle import DalleStage
from dalle_jax.stages.run import Stage
from dalle_jax.stages.unclip import Unclip
from dalle_jax.types import UsageError

ROLES = (*pretrained.STAGES, "pca")


def load(source: str | Mapping[str, str] = "", /, **folders: str) -> "Model":
    """A model from a pretrained set, the folder of a run, or several folders by their role.

        dalle_jax.load("shapes")
        dalle_jax.load("runs/dalle", clip="runs/clip")
        dalle_jax.load(decoder="runs/decoder", clip="runs/clip", prior="runs/prior")

    Args:
      source: name of a pretrained set, a folder whose config decides its role, or a mapping from
        role to folder.
      **folders: role -> folder, for the roles dvae, clip, dalle, prior, prior_ar, decoder, inpaint,
        upsampler_1, upsampler_2 and pca (a file). They take precedence over those of `source`.

    Raises:
      UsageError: for an unknown set or role, or a folder that holds no run.
    """
    if isinstance(source, Mapping):
        roles = dict(source)
    elif not source:
        roles = {}
    elif source in pretrained.names() or not checkpoint.absolute(source).is_dir():
        roles = pretrained.folders(source)
    else:
        roles = {role(source): source}
    roles |= {name: folder for name, folder in folders.items() if folder}
    unknown = sorted(set(roles) - set(ROLES))
    if unknown:
        raise UsageError(f"role {unknown[0]!r} is unknown; use one of {', '.join(ROLES)}.")
    return Model(roles)


def role(folder: str) -> str:
    """The role of the run in a folder: "dalle", "clip", "dvae", "prior", "decoder" and so on."""
    config = checkpoint.load_config(folder)
    if config.task == "prior":
        return {kind: name for name, kind in Unclip.PRIORS.items()}[config.model.kind]
    if config.task == "diffusion":
        return "upsampler_1" if config.loss.low_res_px else "decoder"
    return {"autoencode": "dvae"}.get(config.task, config.task)


class Model:
    """Trained stages by role; see `load`.

    Pictures go in as a path, a PIL image or a uint8 array [h, w, 3], cut to their central square,
    and come out as `Pictures`. Keyword options beyond those named are the pipelines': of
    `pipelines.dalle.sample` (temperature, top_k, top_p, guidance, batch) or, for DALL-E 2, of
    `sampling.unclip.Settings` (steps, sampler, eta, guidance, upsample_steps, chunk).

    Attributes:
      folders: role -> folder.
      warn: called with every warning.
    """

    def __init__(self, folders: Mapping[str, str], warn: Callable[[str], None] = warnings.warn):
        self.folders, self.warn = dict(folders), warn
        self._stages: dict[str, Stage] = {}  # DALL-E 2's that were opened

    def __repr__(self) -> str:
        return f"dalle_jax.Model({', '.join(f'{k}={v!r}' for k, v in self.folders.items())})"

    # ---- Stages, each opened once ----------------------------------------------------------------

    @functools.cached_property
    def dalle(self) -> DalleStage:
        """The DALL·E, with its codec."""
        return DalleStage.load(self._folder("dalle"), codec=self.folders.get("dvae", ""))

    @functools.cached_property
    def clip(self) -> "Clip":
        """The CLIP: `score(pictures, texts)`, `embed_images`, `embed_texts`."""
        return Clip(self._stages.get("clip") or ClipStage.load(self._folder("clip")))

    @functools.cached_property
    def codec(self) -> "PictureCodec":
        """The codec: `encode(pictures)`, `decode(codes)`."""
        if "dvae" in self.folders and "dalle" not in self.folders:
            return PictureCodec(Codec.load(self.folders["dvae"]))
        return PictureCodec(self.dalle.codec)

    @property
    def ranker(self) -> ClipStage | None:
        """The CLIP that ranks; None without one."""
        return self.clip.stage if "clip" in self.folders else None

    def unclip(self, *roles: str, upsample: bool = True) -> Unclip:
        """DALL-E 2's CLIP, decoder and upsamplers, and the stages of `roles` that there are."""
        roles = ("decoder", *roles, *(Unclip.UPSAMPLERS if upsample else ()))
        folders = {k: v for k, v in self.folders.items() if k not in ("dvae", "dalle")}
        stages = Unclip.load(folders | self._stages, roles)
        self._stages |= stages.parts
        return stages

    def unclip_with(self, prior: str, *roles: str, upsample: bool = True) -> Unclip:
        """`unclip` with the stage of a prior, one of `sampling.unclip.PRIORS`.

        Raises:
          UsageError: for an unknown prior, or one that is missing.
        """
        names = [name for name, kind in Unclip.PRIORS.items() if kind == prior]
        stages = self.unclip(*names, *roles, upsample=upsample)
        unclip.check_prior(stages, prior)
        return stages

    def choose_prior(self, name: str | None = None) -> str:
        """`name`, or the first of "diffusion", "ar" and "none" that there is."""
        kinds = [kind for stage, kind in Unclip.PRIORS.items() if stage in self.folders]
        return name or (kinds[0] if kinds else "none")

    # ---- DALL-E ----------------------------------------------------------------------------------

    def sample(
        self,
        prompt: str,
        *,
        candidates: int | None = None,
        keep: int | None = None,
        seed: int = 0,
        pipeline: str = "",
        **options,
    ) -> Pictures:
        """Pictures for a caption, ranked by CLIP, best first.

        Args:
          prompt: the caption.
          candidates: pictures that are sampled (DALL-E 32, DALL-E 2 8 by default).
          keep: pictures that are returned (8; 4).
          seed: of all noise.
          pipeline: "dalle" or "unclip"; by default DALL-E where there is one.
          **options: see the class; DALL-E 2 takes prior, prior_options and upsample too.

        Raises:
          UsageError: for a prompt or an option that cannot be used, or a missing stage.
        """
        common = dict(candidates=candidates, keep=keep, seed=seed, warn=self.warn)
        if pipeline == "dalle" or (not pipeline and "dalle" in self.folders):
            # CLIP first: it is the quicker one to find wrong.
            ranker = self.ranker
            return dalle.sample(self.dalle, ranker, prompt, **common, **options)
        return self._sample_unclip(prompt, None, common, **options)

    def complete(
        self, image: Image, prompt: str, *, keep_rows: int | None = None, **options
    ) -> Pictures:
        """Completions of a picture by DALL·E: its first rows of codes are kept, bit for bit.

        Args:
          image: the picture.
          prompt: a caption of the whole picture.
          keep_rows: rows of codes to keep; half of them by default.
          **options: of `pipelines.dalle.sample`.
        """
        ranker, prefix = self.ranker, dalle.encode_rows(self.dalle, image, keep_rows)
        return dalle.sample(self.dalle, ranker, prompt, prefix=prefix, warn=self.warn, **options)

    # ---- DALL-E 2 --------------------------------------------------------------------------------

    def vary(self, image: Image, n: int = 8, *, upsample: bool = True, **options) -> Pictures:
        """Variations of a picture, see `pipelines.unclip.vary`; eta is 1 by default."""
        stages = self.unclip(upsample=upsample)
        settings, rest = _settings(stages, options, eta=1.0)
        return unclip.vary(stages, image, n, settings, **rest)

    def interpolate(
        self, first: Image, second: Image, num: int = 7, *, upsample: bool = True, **options
    ) -> Pictures:
        """Pictures between two pictures, see `pipelines.unclip.interpolate`."""
        stages = self.unclip(upsample=upsample)
        settings, rest = _settings(stages, options)
        return unclip.interpolate(stages, first, second, num, settings, **rest)

    def edit(
        self,
        image: Image,
        to: str,
        from_: str | None = None,
        *,
        thetas: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
        upsample: bool = True,
        **options,
    ) -> Pictures:
        """A picture changed towards a caption, see `pipelines.unclip.edit`."""
        stages = self.unclip(upsample=upsample)
        settings, rest = _settings(stages, options)
        return unclip.edit(stages, image, to, from_, thetas, settings, warn=self.warn, **rest)

    def inpaint(self, image: Image, prompt: str, known: np.ndarray, **options) -> Pictures:
        """A part of a picture sampled anew; known pixels come back bit for bit.

        Args:
          image: the picture.
          prompt: a caption of the whole picture.
          known: bool [h, w] of the picture's size, False where it is to be sampled anew.
          **options: of `sample` with DALL-E 2.
        """
        common = dict(warn=self.warn)
        return self._sample_unclip(prompt, (image, known), common, **options)

    def reconstruct(
        self,
        image: Image,
        dims: Sequence[int] | None = None,
        *,
        upsample: bool = True,
        **options,
    ) -> Pictures:
        """Pictures from part of a CLIP embedding, see `pipelines.unclip.reconstruct`."""
        # The prior is opened for its PCA only.
        pca = "pca" if "pca" in self.folders else "prior_ar"
        stages = self.unclip(pca, upsample=upsample)
        settings, rest = _settings(stages, options)
        return unclip.reconstruct(stages, image, dims, settings, **rest)

    def _sample_unclip(
        self, prompt, image_and_mask, common, *, prior=None, upsample=True, **options
    ) -> Pictures:
        prior = self.choose_prior(prior)
        roles = ("inpaint",) if image_and_mask else ()
        stages = self.unclip_with(prior, *roles, upsample=upsample)
        settings, rest = _settings(stages, options, guidance=2.0)
        known = None
        if image_and_mask:
            image, mask = image_and_mask
            px = stages.image_px
            known = (images.to_float(inputs.square(image, px)), inputs.fit_mask(mask, px))
        return unclip.sample(stages, prompt, settings, prior=prior, known=known, **common, **rest)

    def _folder(self, name: str) -> str:
        if name not in self.folders:
            held = ", ".join(self.folders) or "nothing"
            raise UsageError(f"this model has no {name}, only {held}; give its folder: {name}=DIR.")
        return self.folders[name]


class PictureCodec:
    """A codec for pictures as people have them.

    Attributes:
      stage: the trained codec, whose `encode` and `decode` take arrays.
    """

    def __init__(self, stage: Codec):
        self.stage = stage

    def encode(self, pictures: Sequence[Image]) -> np.ndarray:
        """Codes int32 [B, g, g] of pictures."""
        array = np.stack([inputs.square(picture, self.stage.image_px) for picture in pictures])
        return np.asarray(self.stage.encode(images.to_float(array)))

    def decode(self, codes: np.ndarray) -> Pictures:
        """Pictures of codes int32 [B, g, g] or [B, g*g]."""
        codes = np.asarray(codes, np.int32)
        array = np.asarray(self.stage.decode(codes))
        return Pictures.of(array, stages={"dvae": self.stage}, codes=codes.reshape(len(codes), -1))


class Clip:
    """A CLIP for pictures and texts as people have them.

    Attributes:
      stage: the trained CLIP, whose `embed_images` and `embed_texts` take arrays.
    """

    def __init__(self, stage: ClipStage):
        self.stage = stage

    def score(self, pictures: Sequence[Image], texts: str | Sequence[str]) -> np.ndarray:
        """Cosines float32 [M] between pictures and their texts; one text may serve all pictures."""
        texts = [texts] * len(pictures) if isinstance(texts, str) else list(texts)
        return rerank.score(self.stage, self._floats(pictures), self.stage.tokenize(texts))

    def embed_images(self, pictures: Sequence[Image]) -> np.ndarray:
        """Unit embeddings float32 [M, E] of pictures."""
        return self.stage.embed_images(self._floats(pictures))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit embeddings float32 [M, E] of texts."""
        return self.stage.embed_texts(self.stage.tokenize(texts))

    def _floats(self, pictures: Sequence[Image]) -> np.ndarray:
        px = self.stage.image_px
        return images.to_float(np.stack([inputs.square(picture, px) for picture in pictures]))


_FIELDS = tuple(Settings.__dataclass_fields__)


def _settings(stages: Unclip, options: dict, **defaults) -> tuple[Settings, dict]:
    """(Settings of the options that are its fields, the other options).

    Raises:
      UsageError: for steps that a stage cannot take, before anything compiles.
    """
    settings = Settings(**defaults | {k: v for k, v in options.items() if k in _FIELDS})
    schedules.respace(stages.decoder.schedule, settings.steps)
    for stage in stages.upsamplers:
        for steps in settings.upsample_steps:
            schedules.respace(stage.schedule, steps)
    return settings, {k: v for k, v in options.items() if k not in _FIELDS}
