"""What an evaluation measures, on how many pictures, and how these are sampled."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dalle_jax.data import scenes
from dalle_jax.sampling import unclip
from dalle_jax.types import UsageError


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of a prepared set that the suites recon, retrieval and distribution read.

    Attributes:
      source: a prepared set; "" = the one that the network was trained on.
      data_dir: folder of prepared sets; "" = as in training.
      split: "" = the eval split of the network's config.
      num: how many, at most.
    """

    source: str = ""
    data_dir: str = ""
    split: str = ""
    num: int = 1000


@dataclasses.dataclass(frozen=True)
class DalleSettings:
    """How DALL-E 1 samples, as in `sampling.autoregressive.sample`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0


@dataclasses.dataclass(frozen=True)
class UnclipSettings:
    """How DALL-E 2 samples; every combination of prior, guidance and eta is a run of its own.

    Attributes:
      priors: some of `unclip.PRIORS`, and `results.DALLE` for a DALL-E 1 beside them; None = all
        that the stages support.
      guidances: scales of the decoder.
      etas: of suite variations, shares of fresh noise in each step.
      sampling: everything else about decoder and upsamplers.
      prior_options: "diffusion" and "ar" -> keyword arguments of `prior.sample_diffusion` and
        `prior.sample_ar`.
      upsamples: whether suite inpainting finishes its pictures with the upsamplers.
    """

    priors: tuple[str, ...] | None = None
    guidances: tuple[float, ...] = (2.0,)
    etas: tuple[float, ...] = (0.0, 1.0)
    sampling: unclip.Settings = unclip.Settings()
    prior_options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    upsamples: bool = True


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an evaluation measures.

    Attributes:
      seed: of prompts and noise.
      prompts_per_skill: seen prompts of each skill, and as many held-out ones; suite variations:
        scenes of each kind; inpainting: pictures of each task.
      skills: of suite shapes, some of `scenes.KINDS`.
      candidates: N pictures for each prompt or picture.
      batch: pictures sampled at a time.
      examples: see there.
      features: of suite distribution, a name of `distribution.FEATURES`.
      dalle: see there.
      unclip: see there.
    """

    seed: int = 0
    prompts_per_skill: int = 25
    skills: tuple[str, ...] = scenes.KINDS
    candidates: int = 64
    batch: int = 256
    examples: Examples = Examples()
    features: str = "clip"
    dalle: DalleSettings = DalleSettings()
    unclip: UnclipSettings = UnclipSettings()

    def __post_init__(self):
        least = dict(seed=0, prompts_per_skill=1, candidates=1, batch=1)
        values = {name: (getattr(self, name), lowest) for name, lowest in least.items()}
        values["num_examples"] = (self.examples.num, 1)
        for name, (value, lowest) in values.items():
            if value < lowest:
                raise UsageError(f"{name}={value}; expected {lowest} or more.")
        if set(self.skills) - set(scenes.KINDS) or len(set(self.skills)) < len(self.skills):
            raise UsageError(
                f"skills={','.join(self.skills)}; expected some of {', '.join(scenes.KINDS)}, "
                "each once."
            )
