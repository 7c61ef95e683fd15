"""DALL·E as people use it: pictures for a caption, completions of a picture."""

import warnings
from collections.abc import Callable

import jax
import numpy as np

from dalle_jax import images
from dalle_jax.engine import meshes
from dalle_jax.pipelines import inputs, reading
from dalle_jax.pipelines.inputs import Image
from dalle_jax.pipelines.pictures import Pictures
from dalle_jax.sampling import categorical, rerank
from dalle_jax.stages.clip import ClipStage
from dalle_jax.stages.dalle import DalleStage
from dalle_jax.types import Array, UsageError

CANDIDATES, KEEP = 32, 8


def sample(
    dalle: DalleStage,
    ranker: ClipStage | None,
    prompt: str,
    *,
    candidates: int | None = None,
    keep: int | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance: float = 1.0,
    batch: int = 0,
    use_cache: bool = True,
    prefix: Array | None = None,
    progress: Callable[[int], None] = lambda done: None,
    warn: Callable[[str], None] = warnings.warn,
) -> Pictures:
    """Pictures for a caption, ranked by CLIP, best first.

    Args:
      dalle: samples.
      ranker: ranks; None = the pictures come in the order sampled.
      prompt: the caption.
      candidates: pictures that are sampled; by default CANDIDATES, without a ranker as many as are
        kept.
      keep: pictures that are returned; KEEP by default.
      seed: of all noise. The same seed gives the same pictures, whatever the batch and the number
        of devices; more candidates only add to those of fewer.
      temperature: 0 = always the likeliest code; 1 = the model's own distribution.
      top_k: sample from the k likeliest codes; 0 = off.
      top_p: sample from the likeliest codes that hold this mass; 1 = off.
      guidance: scale of classifier-free guidance; 1 = off.
      batch: candidates at a time; 0 = what fits the memory.
      use_cache: False recomputes the whole stream for every code: slow, the same pictures.
      prefix: [1, n] int32, first codes that are kept as they are; see `encode_rows`.
      progress: called with the number of candidates so far.
      warn: called with every warning.

    Returns:
      Pictures with score, seed, codes and provenance.

    Raises:
      UsageError: for a prompt or an option that cannot be used.
    """
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance)
    check(dalle, **options, warn=warn)
    candidates, keep = inputs.counts(candidates, keep, CANDIDATES, KEEP, ranker is not None, warn)
    mesh = meshes.local()
    ranked = rerank.sample_best(
        dalle,
        ranker,
        reading.read(dalle, [prompt], "DALL-E", warn)[0],
        None if ranker is None else reading.read(ranker, [prompt], "CLIP", warn)[0],
        num_candidates=candidates,
        keep=keep,
        chunk=batch or rerank.fitting_chunk(dalle, guidance) * mesh.size,
        key=jax.random.key(seed),
        mesh=mesh,
        progress=progress,
        prefix=prefix,
        use_cache=use_cache,
        **options,
    )
    stages = {"dalle": dalle, "dvae": dalle.codec, "clip": ranker}
    rows = 0 if prefix is None else np.shape(prefix)[1] // dalle.codec.grid
    return Pictures.of(
        ranked.images,
        prompt=reading.checked(prompt),
        seed=seed,
        settings=options | {"keep_rows": rows},
        stages={name: stage for name, stage in stages.items() if stage is not None},
        candidates=ranked.candidates,
        scores=ranked.scores,
        codes=ranked.codes,
    )


def encode_rows(dalle: DalleStage, image: Image, keep_rows: int | None = None) -> Array:
    """The first rows of a picture's codes, as `sample` takes them for a prefix.

    Args:
      dalle: whose codec encodes.
      image: the picture, cut to its central square.
      keep_rows: how many; half of them by default.

    Returns:
      [1, keep_rows * g] int32.

    Raises:
      UsageError: for a number out of range.
    """
    codec = dalle.codec
    rows = codec.grid // 2 if keep_rows is None else keep_rows
    if not 0 < rows < codec.grid:
        raise UsageError(
            f"keep_rows={rows}; this codec has {codec.grid} rows of codes: keep 1 to "
            f"{codec.grid - 1} of them."
        )
    picture = images.to_float(inputs.square(image, codec.image_px))[None]
    return np.asarray(codec.encode(picture)).reshape(1, -1)[:, : rows * codec.grid]


def check(
    dalle: DalleStage,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance: float = 1.0,
    warn: Callable[[str], None] = warnings.warn,
) -> None:
    """Raises UsageError for options out of range; warns of guidance that was never trained."""
    categorical.check(temperature, top_k, top_p, guidance, dalle.codec.num_codes)
    if guidance != 1 and not dalle.config.data.caption_drop:
        warn("guidance has little meaning: this DALL-E was trained with data.caption_drop=0.")
