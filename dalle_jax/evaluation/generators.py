"""How trained stages generate pictures for the suites: uint8 in, uint8 out, in chunks.

Both generators have `network`, the stage of their pictures (its size, its prepared set), and
`reader`, the stage that reads the captions.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dalle_jax import chunks, images
from dalle_jax.engine import distributed, meshes, sharding
from dalle_jax.evaluation import results
from dalle_jax.evaluation.settings import DalleSettings, UnclipSettings
from dalle_jax.sampling import autoregressive, categorical, manipulate, rerank, unclip
from dalle_jax.stages.clip import ClipStage
from dalle_jax.stages.codec import Codec
from dalle_jax.stages.dalle import DalleStage
from dalle_jax.stages.unclip import Unclip

CHUNK = 64  # pictures at a time through a codec

Generate = Callable[[np.ndarray, int, int], np.ndarray]


def round_trip(codec: Codec) -> Callable[[np.ndarray], np.ndarray]:
    """Pictures uint8 [B, h, h, 3] to their reconstructions, the same."""
    encode, decode = chunks.mapped(codec.encode, CHUNK), chunks.mapped(codec.decode, CHUNK)
    return lambda pictures: images.to_uint8(decode(encode(images.to_float(pictures))))


def score_by(clip: ClipStage) -> Callable[[np.ndarray, Sequence[str]], np.ndarray]:
    """(uint8 [M, h, h, 3], M captions) to CLIP scores [M]."""
    return lambda pictures, captions: rerank.score(
        clip, images.to_float(pictures), clip.tokenize(captions)
    )


def shared(generate: Generate) -> Generate:
    """`generate` with the captions divided among the processes; all of them get all pictures."""

    def apply(ids, num_candidates, first_prompt):
        share = -(-len(ids) // jax.process_count())
        start = jax.process_index() * share
        # Every process brings equally many rows: missing ones repeat the last caption.
        own = np.minimum(np.arange(start, start + share), len(ids) - 1)
        pictures = generate(ids[own], num_candidates, first_prompt + start)
        return distributed.gather_rows(pictures)[: len(ids)]

    return apply


@dataclasses.dataclass(frozen=True, eq=False)
class DalleGenerator:
    """DALL-E 1.

    Attributes:
      stage: the network with its codec.
      settings: how it samples; checked at once.
      seed: of all noise.
    """

    stage: DalleStage
    settings: DalleSettings = DalleSettings()
    seed: int = 0

    def __post_init__(self):
        s = self.settings
        num_codes = self.stage.codec.num_codes
        categorical.check(s.temperature, s.top_k, s.top_p, s.guidance, num_codes)

    network = reader = property(lambda self: self.stage)

    def generate(self, ids: np.ndarray, num_candidates: int, first_prompt: int) -> np.ndarray:
        """uint8 [P, N, h, h, 3] for ids [P, T]; the first one is prompt number first_prompt."""
        mesh = meshes.local()
        codes = autoregressive.sample(
            self.stage.model,
            self.stage.on(sharding.replicated(mesh)),
            ids,
            num_candidates=num_candidates,
            key=jax.random.key(self.seed),
            first_prompt=first_prompt,
            mesh=mesh,
            **dataclasses.asdict(self.settings),
        )
        codes = jax.device_get(codes)
        decode = chunks.mapped(self.stage.codec.decode, CHUNK)
        pictures = images.to_uint8(decode(codes.reshape(-1, codes.shape[-1])))
        return pictures.reshape(*codes.shape[:2], *pictures.shape[1:])

    def reconstruct(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 [B, h, h, 3] to the same, through the codec."""
        return round_trip(self.stage.codec)(pictures)


@dataclasses.dataclass(frozen=True, eq=False)
class UnclipGenerator:
    """DALL-E 2 at one prior, guidance and eta; `at` gives the others.

    All suites but inpainting measure the decoder's own small pictures.

    Attributes:
      stages: the stages.
      settings: of all runs.
      seed: of all noise.
      prior: of this run, one of `unclip.PRIORS`.
      sampling: of this run; without `at`, as `settings` has it.
      cache: reconstructions and latents by their pictures, shared by the runs.
    """

    stages: Unclip
    settings: UnclipSettings = UnclipSettings()
    seed: int = 0
    prior: str = "none"
    sampling: unclip.Settings = unclip.Settings()
    cache: dict[Any, Any] = dataclasses.field(default_factory=dict)

    network = property(lambda self: self.stages.decoder)
    reader = clip = property(lambda self: self.stages.clip)

    def check(self) -> None:
        """Raises UsageError for priors or steps that these stages do not support."""
        for prior in self.priors:
            unclip.check_prior(self.stages, prior)
        unclip.check_steps(self.stages, self.settings.sampling)

    @property
    def priors(self) -> list[str]:
        """The priors to measure."""
        if self.settings.priors is None:
            own = ["caption"] if self.stages.reads_captions else []
            return [*self.stages.priors, "none", *own]
        return [prior for prior in self.settings.priors if prior != results.DALLE]

    def at(
        self, guidance: float, prior: str = "none", eta: float | None = None
    ) -> "UnclipGenerator":
        """The generator of one run; eta None = as in the settings."""
        sampling = self.settings.sampling
        eta = sampling.eta if eta is None else eta
        sampling = dataclasses.replace(sampling, guidance=guidance, eta=eta)
        return dataclasses.replace(self, prior=prior, sampling=sampling)

    def runs(self) -> list[tuple[dict[str, Any], "UnclipGenerator"]]:
        """(its settings, its generator) for each guidance and prior."""
        return [
            ({"prior": prior, "guidance": guidance}, self.at(guidance, prior))
            for guidance in self.settings.guidances
            for prior in self.priors
        ]

    def generate(self, ids: np.ndarray, num_candidates: int, first_prompt: int) -> np.ndarray:
        """As `DalleGenerator.generate`, by the decoder."""
        text = ids.repeat(num_candidates, axis=0)
        common = self._common(first_prompt, len(ids), num_candidates)
        z, has_clip = unclip.image_embeddings(
            self.stages, self.prior, text, **common, **self._prior_options()
        )
        pictures = unclip.sample_base(
            self.stages.decoder, z, has_clip, text, self.sampling, mesh=meshes.local(), **common
        )
        return images.to_uint8(pictures).reshape(len(ids), num_candidates, *pictures.shape[1:])

    def reconstruct(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 [B, h, h, 3] to the decoder's pictures for their own CLIP embeddings."""
        name = ("reconstruct", self.sampling, pictures.tobytes())
        if name not in self.cache:
            z = self.clip.embed_images(images.to_float(pictures))
            common = dict(key=jax.random.key(self.seed), indices=np.arange(len(z)))
            has_clip = np.ones(len(z), bool)
            samples = unclip.sample_base(
                self.stages.decoder, z, has_clip, None, self.sampling, mesh=meshes.local(), **common
            )
            self.cache[name] = images.to_uint8(samples)
        return self.cache[name]

    def vary(self, pictures: np.ndarray, num: int, first: int) -> np.ndarray:
        """uint8 [P, h, h, 3] to variations uint8 [P, N, h, h, 3], as the command `vary`."""
        still = dataclasses.replace(self.sampling, eta=0.0)  # one inversion serves all etas
        name = ("invert", still, pictures.tobytes())
        if name not in self.cache:
            self.cache[name] = manipulate.invert(self.stages, images.to_float(pictures), still)
        one = self.cache[name]
        many = manipulate.Latent(one.z.repeat(num, 0), one.x_t.repeat(num, 0))
        common = self._common(first, len(pictures), num)
        samples = manipulate.sample(self.stages, many, self.sampling, mesh=meshes.local(), **common)
        return images.to_uint8(samples).reshape(len(pictures), num, *samples.shape[1:])

    def inpaint(
        self, picture: np.ndarray, known: np.ndarray, caption: str, num: int, index: int
    ) -> np.ndarray:
        """uint8 [N, h, h, 3] of the finished size, the best by CLIP first, as `inpaint`."""
        best = unclip.sample_best(
            self.stages,
            self.prior,
            self.reader.tokenize([caption])[0],
            self.sampling,
            num_candidates=num,
            keep=num,
            key=jax.random.key(self.seed),
            first=index * unclip.MAX_CANDIDATES,
            known=(images.to_float(picture), known),
            mesh=meshes.local(),
            **self._prior_options(),
        )
        return images.to_uint8(best.images)

    def _prior_options(self) -> Mapping[str, Any]:
        return self.settings.prior_options.get(self.prior, {})

    def _common(self, first: int, num_prompts: int, num_candidates: int) -> dict[str, Any]:
        """Key, and global indices int [P * N] of the candidates of prompts from the first on."""
        prompts = first + np.arange(num_prompts)[:, None]
        indices = prompts * unclip.MAX_CANDIDATES + np.arange(num_candidates)[None]
        return dict(key=jax.random.key(self.seed), indices=indices.reshape(-1))
