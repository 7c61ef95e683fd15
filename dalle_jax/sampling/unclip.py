"""unCLIP, whole: caption -> text embedding -> prior -> image embedding -> decoder -> upsamplers.

What the latent space makes possible beside (variations, interpolations, edits) is
`sampling.manipulate`. Pictures are float32 in [-1, 1] on the host between the
stages: each stage runs in chunks that fit its own memory.

All noise is a function of (key, stage, global index of the picture, step), so that a picture is the
same alone, in any chunk and on any number of devices.

Source: Ramesh et al. 2022 (arXiv:2204.06125) §2.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle_jax import chunks
from dalle_jax.diffusion import corrupt, schedules
from dalle_jax.sampling import diffusion, prior, rerank
from dalle_jax.stages.unclip import Unclip
from dalle_jax.stages.unet import UnetStage
from dalle_jax.types import Array, Batch, Key, UsageError

# What the decoder is given beside the caption: an image embedding by one of the priors, the text
# embedding in its place ("none"), or no embedding at all ("caption").
PRIORS = ("diffusion", "ar", "none", "caption")
MAX_CANDIDATES = 2**16  # of one prompt: global indices are prompt * this + candidate
MAX_CHUNK = 64  # pictures at a time and device
_PRIOR, _DECODER, _UPSAMPLER = 0, 1, 2  # streams of noise; the i-th upsampler has 2 + i

Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the decoder and the upsamplers sample.

    Attributes:
      steps: of the decoder, a spacing of `diffusion.schedules`; paper 250.
      sampler: of the decoder, "ddim" | "ddpm" | "dpmpp".
      eta: of its ddim.
      guidance: classifier-free guidance of the decoder; 1 = off and half the work.
      upsample_steps: of each upsampler, the last one for all further; paper fast27 and 15, ddim.
      chunk: pictures at a time over all devices; 0 = what fits the memory.
    """

    steps: schedules.Spacing = "50"
    sampler: str = "ddim"
    eta: float = 0.0
    guidance: float = 1.0
    upsample_steps: tuple[schedules.Spacing, ...] = ("fast27", "15")
    chunk: int = 0

    def __post_init__(self):
        diffusion.check_eta(self.sampler, self.eta)
        if not 0 <= self.guidance < float("inf"):
            raise UsageError(f"guidance={self.guidance}; expected 0 or more, 1 = off.")
        if self.chunk < 0 or not self.upsample_steps:
            raise UsageError(f"chunk={self.chunk}, upsample_steps={self.upsample_steps}.")


@dataclasses.dataclass(frozen=True)
class Ranked:
    """The best of one prompt's candidates, best first.

    Attributes:
      candidates: [K] int, their global indices.
      images: [K, h, w, 3] float32 in [-1, 1], of the finished size.
      small: [K, s, s, 3] float32 by the decoder; without upsamplers the same.
      embeddings: [K, E] float32 image embeddings that they were sampled from; zeros without any.
      scores: [N] float32 of *all* candidates in the order sampled.
    """

    candidates: np.ndarray
    images: np.ndarray
    small: np.ndarray
    embeddings: np.ndarray
    scores: np.ndarray


def image_embeddings(
    stages: Unclip,
    prior_name: str,
    text: Array,
    *,
    key: Key,
    indices: Array,
    **options,
) -> tuple[np.ndarray, np.ndarray]:
    """Image embeddings for captions, as the decoder takes them.

    Args:
      stages: the stages.
      prior_name: one of PRIORS: a prior, "none" (the text embedding in the image embedding's place)
        or "caption" (no embedding: the decoder reads the caption only).
      text: [B, T] int32 by the CLIP's tokenizer.
      key: typed key.
      indices: [B] int, global indices of the pictures: each has its own noise.
      **options: of `prior.sample_diffusion` or `prior.sample_ar`.

    Returns:
      z_i [B, E] float32 of unit length, and has_clip [B] bool.

    Raises:
      UsageError: for an unknown prior, or one that these stages lack.
    """
    check_prior(stages, prior_name)
    text, indices = np.asarray(text, np.int32), np.asarray(indices, np.int32)
    z_t = stages.clip.embed_texts(text)
    if prior_name in ("none", "caption"):
        return z_t, np.full(len(text), prior_name == "none")
    # The prior numbers captions from `first` on; an array of firsts numbers them anyhow.
    first = indices - np.arange(len(indices), dtype=np.int32)
    stream = jax.random.fold_in(key, _PRIOR)
    stage = stages.priors[prior_name]
    z = prior.sample(
        stage.model,
        stage.on(),
        stage.tables,
        text,
        z_t,
        key=stream,
        first=jnp.asarray(first),
        **options,
    )
    return np.asarray(z), np.ones(len(text), bool)


def check_prior(stages: Unclip, name: str) -> None:
    """Raises UsageError for an unknown name of PRIORS, or one whose stage is missing."""
    if name not in PRIORS:
        raise UsageError(f"prior {name!r} is unknown; use one of {', '.join(PRIORS)}.")
    if name in Unclip.PRIORS.values() and name not in stages.priors:
        has = [*stages.priors, "none", "caption"]
        raise UsageError(f"there is no {name} prior among the stages; use one of {', '.join(has)}.")
    if name == "caption" and not stages.reads_captions:
        raise UsageError("this decoder reads no captions; it cannot sample from one alone.")


def check_steps(stages: Unclip, settings: Settings) -> None:
    """Raises UsageError for steps that the decoder or an upsampler cannot be respaced to."""
    schedules.respace(stages.decoder.schedule, settings.steps)
    for stage in stages.upsamplers:
        for steps in settings.upsample_steps:
            schedules.respace(stage.schedule, steps)


def sample_base(
    stage: UnetStage,
    z: Array,
    has_clip: Array,
    text: Array | None,
    settings: Settings,
    *,
    key: Key,
    indices: Array,
    x_t: Array | None = None,
    keep: tuple[Array, Array] | None = None,
    mesh: Mesh | None = None,
    progress: Progress = lambda done: None,
) -> np.ndarray:
    """Small pictures of embeddings and captions.

    Args:
      stage: a decoder.
      z: [B, E].
      has_clip: [B] bool, False = without the embedding.
      text: [B, T] int32; None = without captions.
      settings: how.
      key: typed key, of all stages.
      indices: [B] int, global.
      x_t: [B, h, h, 3] to start from instead of noise.
      keep: (pictures [B, h, h, 3], known [B, h, h, 1] bool), what comes back bit for bit.
      mesh: spreads the pictures over its devices; None = one.
      progress: called with the number of pictures so far.

    Returns:
      [B, h, h, 3] float32 in [-1, 1].
    """
    cond = conditions(stage, z, has_clip, text)
    options = dict(sampler=settings.sampler, eta=settings.eta, scale=settings.guidance)
    key = jax.random.fold_in(key, _DECODER)
    common = dict(key=key, indices=indices, mesh=mesh, progress=progress, chunk=settings.chunk)
    return _sample(stage, cond, settings.steps, options, x_t=x_t, keep=keep, **common)


def conditions(stage: UnetStage, z: Array, has_clip: Array, text: Array | None) -> Batch:
    """What a decoder is shown, `unet.cond_spec` without masks; see `sample_base`."""
    c = stage.model.config
    cond = {"clip": np.asarray(z, np.float32), "has_clip": np.asarray(has_clip, bool)}
    if c.text_encoder:
        nothing = np.zeros((len(z), c.text_len), np.int32)
        cond["text"] = nothing if text is None else np.asarray(text, np.int32)
    return cond


def nothing_known(stage: UnetStage, cond: Batch) -> Batch:
    """The conditions of whole pictures: an inpainting network is shown that nothing is known."""
    if not stage.model.config.inpaint:
        return cond
    shape = (len(next(iter(cond.values()))), stage.image_px, stage.image_px)
    nothing = {"picture": np.zeros((*shape, 3), np.float32), "known": np.zeros((*shape, 1), bool)}
    return cond | nothing


def upsample(
    stages: Unclip,
    pictures: Array,
    settings: Settings,
    *,
    key: Key,
    indices: Array,
    keep: Sequence[tuple[Array, Array]] = (),
    mesh: Mesh | None = None,
    progress: Progress = lambda done: None,
) -> np.ndarray:
    """Finished pictures of small ones, through all upsamplers at full size.

    Args:
      stages: the stages; without upsamplers the pictures come back as they are.
      pictures: [B, s, s, 3] float in [-1, 1].
      settings: how.
      key: see `sample_base`, as for all arguments not named here.
      indices: see there.
      keep: of each upsampler, see there; () = nothing is kept.
      mesh: see there.
      progress: called with the number that the last upsampler has finished so far.

    Returns:
      [B, h, h, 3] float32 in [-1, 1].
    """
    pictures = np.asarray(pictures, np.float32)
    for i, stage in enumerate(stages.upsamplers):
        is_last = i == len(stages.upsamplers) - 1
        # Rounded as in training, where the small picture is one of a file.
        cond = {"low_res": np.asarray(corrupt.to_levels(pictures))}
        steps = settings.upsample_steps[min(i, len(settings.upsample_steps) - 1)]
        pictures = _sample(
            stage,
            cond,
            steps,
            {},
            key=jax.random.fold_in(key, _UPSAMPLER + i),
            indices=indices,
            keep=keep[i] if keep else None,
            mesh=mesh,
            chunk=settings.chunk,
            progress=progress if is_last else lambda done: None,
        )
    return pictures


def sample_best(
    stages: Unclip,
    prior_name: str,
    text: Array,
    settings: Settings,
    *,
    num_candidates: int,
    keep: int,
    key: Key,
    first: int = 0,
    known: tuple[Array, Array] | None = None,
    mesh: Mesh | None = None,
    progress: Progress = lambda done: None,
    **options,
) -> Ranked:
    """Samples N candidates of one caption, ranks them by CLIP and finishes the best K.

    Args:
      stages: the stages.
      prior_name: see `image_embeddings`.
      text: [T] int32 by the CLIP's tokenizer.
      settings: how.
      num_candidates: N, at most MAX_CANDIDATES.
      keep: K; only these are upsampled.
      key: typed key. More candidates only add to those of fewer.
      first: global index of the first one.
      known: (picture [h, h, 3] float of the finished size, known [h, h, 1] bool): inpainting; with
        the inpainter where there is one. What is known comes back bit for bit.
      mesh: devices that share the work; None = one.
      progress: called with the number of candidates so far.
      **options: of the prior, see `image_embeddings`.
    """
    if not 1 <= keep <= num_candidates <= MAX_CANDIDATES:
        raise UsageError(f"{keep} of {num_candidates} candidates; expected 1 to all of them.")
    stage = stages.decoder
    if known is not None and stages.inpainter is not None:
        stage = stages.inpainter
    pyramid = [] if known is None else known_parts(stages, *known)
    chunk = settings.chunk or fitting_chunk(stage, settings.guidance != 1) * _shards(mesh)
    small, embeddings, scores = [], [], []
    for start in range(0, num_candidates, chunk):
        # One shape for all chunks: the last one is filled up with candidates that are dropped.
        rows = np.arange(start, start + min(chunk, num_candidates)) + first
        texts = np.broadcast_to(text, (len(rows), len(text)))
        z, has_clip = image_embeddings(stages, prior_name, texts, key=key, indices=rows, **options)
        part = [_repeated(x, len(rows)) for x in pyramid[0]] if pyramid else None
        pictures = sample_base(
            stage, z, has_clip, texts, settings, key=key, indices=rows, keep=part, mesh=mesh
        )
        left = num_candidates - start
        small.append(pictures[:left])
        embeddings.append((z * has_clip[:, None])[:left])
        scores.append(rerank.score(stages.clip, small[-1], texts[:left]))
        progress(min(start + chunk, num_candidates))
    small, embeddings, scores = (np.concatenate(x) for x in (small, embeddings, scores))
    best = rerank.order(scores)[:keep]
    finished = upsample(
        stages,
        small[best],
        settings,
        key=key,
        indices=first + best,
        keep=[tuple(_repeated(x, keep) for x in part) for part in pyramid[1:]],
        mesh=mesh,
    )
    return Ranked(first + best, finished, small[best], embeddings[best], scores)


def known_parts(stages: Unclip, picture: Array, known: Array) -> list[tuple[Array, Array]]:
    """The known pixels at each stage's size, decoder first: pictures, and bool masks.

    Args:
      stages: the stages.
      picture: [h, h, 3] float in [-1, 1], of the finished size.
      known: [h, h, 1] bool.

    A pixel of a smaller size is known where all that it covers is: nothing of what is to be sampled
    anew shows through.
    """
    parts = []
    for stage in (stages.decoder, *stages.upsamplers):
        px, times = stage.image_px, len(picture) // stage.image_px
        small, is_known = picture, known
        if times > 1:
            small = jax.image.resize(picture, (px, px, 3), "cubic", antialias=True)
            small = np.asarray(jnp.clip(small, -1, 1))
            is_known = np.asarray(known).reshape(px, times, px, times, 1).all(axis=(1, 3))
        parts.append((np.asarray(small, np.float32), np.asarray(is_known, bool)))
    return parts


def fitting_chunk(stage: UnetStage, is_guided: bool = False) -> int:
    """Pictures that one device samples at a time; see `chunks.fitting`."""
    c = stage.model.config
    # The maps that the way up takes from the way down, and a block's own: float32.
    maps = sum((c.num_blocks + 4) * m / 4**i for i, m in enumerate(c.channel_mults))
    each = 4 * c.width * (c.image_px // c.patch_px) ** 2 * maps * (2 if is_guided else 1)
    return chunks.fitting(each, MAX_CHUNK)


def _sample(
    stage, cond, spacing, options, *, key, indices, mesh, chunk, progress, x_t=None, keep=None
) -> np.ndarray:
    """`diffusion.sample` in chunks of one shape, each picture with its own conditions."""
    if keep is None:
        cond = nothing_known(stage, cond)
    elif stage.model.config.inpaint:
        cond = cond | {"picture": keep[0], "known": keep[1]}
    rows = dict(cond=cond, indices=np.asarray(indices, np.int32), x_t=x_t, keep=keep)
    replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    schedule = schedules.respace(stage.schedule, spacing)
    count = len(rows["indices"])
    is_guided = options.get("scale", 1) != 1
    size = min(chunk or fitting_chunk(stage, is_guided) * _shards(mesh), count)
    params, parts, done = stage.on(replicated), [], 0
    for some, n in chunks.rows(count, size):
        part = jax.tree.map(lambda x, some=some: np.asarray(x)[some], rows)
        pictures = diffusion.sample(
            stage.model, params, schedule=schedule, key=key, mesh=mesh, **part, **options
        )
        parts.append(np.asarray(pictures)[:n])
        done += n
        progress(done)
    return np.concatenate(parts)


def _shards(mesh: Mesh | None) -> int:
    return 1 if mesh is None else mesh.size


def _repeated(x: Array, count: int) -> np.ndarray:
    return np.broadcast_to(x, (count, *np.shape(x)))
