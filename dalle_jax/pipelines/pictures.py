"""Pictures with their provenance: what every pipeline returns."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from dalle_jax import __version__, images
from dalle_jax.stages.run import Stage


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture with its provenance.

    Attributes:
      image: uint8, RGB.
      score: CLIP's cosine to the prompt or the given picture; None where nothing scores.
      seed: of all noise.
      candidate: index among the candidates: with the seed it identifies the picture.
      codes: int32 [g*g] of a DALL·E; else None.
      embedding: float32 [E], from which DALL-E 2's decoder sampled; else None.
      small: the decoder's own picture, where upsamplers enlarged it; else None.
      figures: other numbers of the picture, e.g. its place between two pictures.
      metadata: what `save` writes into the file: prompt, seed, settings, fingerprints of stages.
    """

    image: PIL.Image.Image
    score: float | None = None
    seed: int = 0
    candidate: int = 0
    codes: np.ndarray | None = None
    embedding: np.ndarray | None = None
    small: PIL.Image.Image | None = None
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def array(self) -> np.ndarray:
        """uint8 [h, w, 3]."""
        return np.asarray(self.image)

    def save(self, path: str | pathlib.Path, **metadata: str) -> None:
        """Writes a PNG that carries `metadata`; PIL gives it back as `Image.open(path).text`."""
        data = images.png_bytes(self.image, {**self.metadata, **metadata})
        pathlib.Path(path).write_bytes(data)

    def label(self, rank: int) -> str:
        """Rank and score, as contact sheets show them."""
        return f"{rank}" if self.score is None else f"{rank} · {self.score:.3f}"

    def _repr_png_(self) -> bytes:
        return images.png_bytes(self.image)


class Pictures(list[Picture]):
    """Pictures of one call, best first where they are ranked.

    Attributes:
      scores: float32 [N] of all candidates in the order sampled; None where nothing ranks.
      prompt: of the call; "" without one.
      settings: of the call.
      stages: role -> folder, step and fingerprint of every stage that took part.
    """

    def __init__(self, pictures, scores=None, prompt="", settings=None, stages=None):
        super().__init__(pictures)
        self.scores, self.prompt = scores, prompt
        self.settings, self.stages = settings or {}, stages or {}

    @classmethod
    def of(
        cls,
        array: np.ndarray,
        *,
        prompt: str = "",
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
        stages: Mapping[str, Stage] | None = None,
        candidates: Sequence[int] | None = None,
        scores: Sequence[float] | None = None,
        codes: np.ndarray | None = None,
        embeddings: np.ndarray | None = None,
        small: np.ndarray | None = None,
        figures: Sequence[Mapping[str, float]] | None = None,
    ) -> "Pictures":
        """Pictures of arrays.

        Args:
          array: [K, h, w, 3] float in [-1, 1].
          prompt: the caption.
          seed: of all noise.
          settings: of the call.
          stages: role -> stage.
          candidates: [K] indices into scores; 0 to K - 1 by default.
          scores: [N] of all candidates.
          codes: [K, g*g].
          embeddings: [K, E].
          small: [K, s, s, 3] float.
          figures: K mappings.
        """
        provenance = {name: stage.provenance for name, stage in (stages or {}).items()}
        candidates = range(len(array)) if candidates is None else candidates
        scores = None if scores is None else np.asarray(scores, np.float32)
        common = {
            "prompt": prompt,
            "seed": str(seed),
            "settings": json.dumps(dict(settings or {}), default=str),
            "stages": json.dumps(provenance),
            "software": f"dalle_jax {__version__}",
        }

        def pil(pixels: np.ndarray) -> PIL.Image.Image:
            return PIL.Image.fromarray(images.to_uint8(pixels))

        pictures = [
            Picture(
                image=pil(array[i]),
                score=None if scores is None else round(float(scores[candidate]), 5),
                seed=seed,
                candidate=int(candidate),
                codes=None if codes is None else codes[i],
                embedding=None if embeddings is None else embeddings[i],
                small=None if small is None else pil(small[i]),
                figures={} if figures is None else figures[i],
                metadata={k: v for k, v in common.items() if v} | {"candidate": str(candidate)},
            )
            for i, candidate in enumerate(candidates)
        ]
        return cls(pictures, scores, prompt, dict(settings or {}), provenance)

    @property
    def arrays(self) -> np.ndarray:
        """uint8 [K, h, w, 3]."""
        return np.stack([picture.array for picture in self])

    def sheet(self, scale: int | None = None) -> PIL.Image.Image:
        """A contact sheet: the prompt, the pictures and their scores."""
        labels = [
            f"{n}" if p.score is None else f"{n} · {p.score:.3f}" for n, p in enumerate(self, 1)
        ]
        scale = scale or max(1, 128 // self[0].image.width)
        return images.contact_sheet([(self.prompt, self.arrays, labels)], scale=scale)

    def save(self, folder: str | pathlib.Path) -> list[pathlib.Path]:
        """Writes 01.png, 02.png, …; returns their paths."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{rank:02d}.png" for rank in range(1, len(self) + 1)]
        for path, picture in zip(paths, self, strict=True):
            picture.save(path)
        return paths

    def _repr_png_(self) -> bytes:
        return images.png_bytes(self.sheet())
