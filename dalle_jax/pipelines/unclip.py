"""DALL-E 2 as people use it: pictures for a caption, variations, blends, edits, inpainting.

Pictures come in as a path, a PIL image or a uint8 array [h, w, 3] and are cut to their central
square. The same seed gives the same pictures, whatever the batch and the number of devices.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dalle_jax import images
from dalle_jax.engine import meshes
from dalle_jax.pipelines import inputs, reading
from dalle_jax.pipelines.inputs import Image
from dalle_jax.pipelines.pictures import Pictures
from dalle_jax.sampling import manipulate, unclip
from dalle_jax.sampling.unclip import Settings
from dalle_jax.stages.clip import ClipStage
from dalle_jax.stages.unclip import Unclip
from dalle_jax.types import Array, UsageError

CANDIDATES, KEEP = 8, 4
Progress = Callable[[int], None]
Warn = Callable[[str], None]


def sample(
    stages: Unclip,
    prompt: str,
    settings: Settings,
    *,
    prior: str,
    prior_options: Mapping[str, Any] | None = None,
    candidates: int | None = None,
    keep: int | None = None,
    seed: int = 0,
    known: tuple[Array, Array] | None = None,
    progress: Progress = lambda done: None,
    warn: Warn = warnings.warn,
) -> Pictures:
    """Pictures for a caption, ranked by CLIP, best first.

    Args:
      stages: with the prior that is asked for.
      prompt: the caption.
      settings: how decoder and upsamplers sample.
      prior: one of `sampling.unclip.PRIORS`.
      prior_options: keyword arguments of the prior, see `sampling.prior`.
      candidates: pictures that are sampled; CANDIDATES by default. More only add to those of fewer.
      keep: pictures that are upsampled and returned; KEEP by default.
      seed: of all noise.
      known: (picture [h, h, 3] float, known [h, h, 1] bool) of the finished size: inpainting.
      progress: called with the number of candidates so far.
      warn: called with every warning.

    Raises:
      UsageError: for a prompt, a prior or a number that cannot be used.
    """
    unclip.check_prior(stages, prior)
    candidates, keep = inputs.counts(candidates, keep, CANDIDATES, KEEP, True, warn)
    ranked = unclip.sample_best(
        stages,
        prior,
        reading.read(stages.clip, [prompt], "CLIP", warn)[0],
        settings,
        num_candidates=candidates,
        keep=keep,
        key=jax.random.key(seed),
        known=known,
        mesh=meshes.local(),
        progress=progress,
        **(prior_options or {}),
    )
    return _pictures(
        stages,
        ranked.images,
        seed,
        settings,
        {"prior": prior},
        prompt=reading.checked(prompt),
        candidates=ranked.candidates,
        scores=ranked.scores,
        embeddings=ranked.embeddings,
        small=None if ranked.small.shape == ranked.images.shape else ranked.small,
    )


def check_prior(stages: Unclip, prior: str) -> None:
    """Raises UsageError for an unknown prior, or one whose stage is missing."""
    unclip.check_prior(stages, prior)


def vary(
    stages: Unclip,
    image: Image,
    n: int,
    settings: Settings,
    *,
    seed: int = 0,
    with_reconstruction: bool = False,
    progress: Progress = lambda done: None,
) -> Pictures:
    """Variations of a picture: what its CLIP embedding holds stays, the rest is sampled anew.

    Args:
      stages: the stages.
      image: the picture.
      n: how many.
      settings: `eta` 0 gives the picture back, 1 changes most.
      seed: of all noise.
      with_reconstruction: puts what the unchanged latent gives (eta 0) before the variations.
      progress: called with the number of variations so far.

    Returns:
      Pictures whose score is the CLIP cosine to the picture.
    """
    still, key, mesh = dataclasses.replace(settings, eta=0.0), jax.random.key(seed), meshes.local()
    picture = images.to_float(inputs.square(image, stages.image_px))[None]
    latent = manipulate.invert(stages, picture, still)
    parts, indices = [], np.arange(n)
    if with_reconstruction:
        parts.append(manipulate.vary(stages, latent, 1, still, key=key, mesh=mesh))
        indices = np.concatenate([[0], indices])
    common = dict(key=key, mesh=mesh)
    parts.append(manipulate.vary(stages, latent, n, settings, progress=progress, **common))
    varied = unclip.upsample(stages, np.concatenate(parts), settings, indices=indices, **common)
    cosines = _cosines(stages.clip, varied, stages.clip.embed_images(picture))
    return _pictures(stages, varied, seed, settings, scores=cosines)


def interpolate(
    stages: Unclip,
    first: Image,
    second: Image,
    num: int,
    settings: Settings,
    *,
    noise: str = "slerp",
    seed: int = 0,
    progress: Progress = lambda done: None,
) -> Pictures:
    """Pictures between two pictures.

    Args:
      stages: the stages.
      first: a picture.
      second: another.
      num: how many, both ends among them.
      settings: how decoder and upsamplers sample.
      noise: one of `manipulate.NOISES`.
      seed: of all noise.
      progress: called with the number of pictures so far.

    Returns:
      Pictures with `figures` theta (the place, 0 to 1), cosine_first and cosine_second.
    """
    if num < 2:
        raise UsageError(f"num={num}; expected 2 (both ends) or more.")
    pair = np.stack([inputs.square(image, stages.image_px) for image in (first, second)])
    ends = manipulate.invert(stages, images.to_float(pair), settings)
    thetas = np.linspace(0, 1, num)
    latent = manipulate.between(stages, ends, thetas, noise, key=jax.random.key(seed))
    # One noise for the upsamplers, so that the path is as smooth as the decoder's.
    indices = (np.arange(num), np.zeros(num, int))
    between = _finish(stages, latent, settings, seed, indices, progress)
    cosines = [_cosines(stages.clip, between, z[None]) for z in ends.z]
    figures = [
        dict(theta=round(float(theta), 4), cosine_first=a, cosine_second=b)
        for theta, a, b in zip(thetas, *cosines, strict=True)
    ]
    return _pictures(stages, between, seed, settings, {"noise": noise}, figures=figures)


def edit(
    stages: Unclip,
    image: Image,
    to: str,
    from_: str | None,
    thetas: Sequence[float],
    settings: Settings,
    *,
    seed: int = 0,
    progress: Progress = lambda done: None,
    warn: Warn = warnings.warn,
) -> Pictures:
    """A picture changed towards a caption.

    Args:
      stages: the stages.
      image: the picture.
      to: a caption of what the picture is to become.
      from_: a caption of what it is; None = none.
      thetas: how far to turn the embedding, each in [0, 1]; one picture for each.
      settings: how decoder and upsamplers sample.
      seed: of all noise.
      progress: called with the number of pictures so far.
      warn: called with every warning.

    Returns:
      Pictures with `figures` theta, cosine_to and, with `from_`, cosine_from.
    """
    ids = reading.read(stages.clip, [to, *([] if from_ is None else [from_])], "CLIP", warn)
    old = None if from_ is None else ids[1]
    manipulate.check_captions(ids[0], old)
    picture = images.to_float(inputs.square(image, stages.image_px))[None]
    latent = manipulate.invert(stages, picture, settings)
    path = manipulate.edit(stages, latent, ids[0], old, thetas)
    same = np.zeros(len(thetas), int)  # the same noise for all
    edited = _finish(stages, path, settings, seed, (same, same), progress)
    embeddings = stages.clip.embed_texts(ids)
    cosines = [_cosines(stages.clip, edited, z[None]) for z in embeddings]
    figures = [
        {"theta": float(theta)} | dict(zip(("cosine_to", "cosine_from"), each, strict=False))
        for theta, *each in zip(thetas, *cosines, strict=True)
    ]
    return _pictures(stages, edited, seed, settings, {"from": from_}, prompt=to, figures=figures)


def reconstruct(
    stages: Unclip,
    image: Image,
    dims: Sequence[int] | None,
    settings: Settings,
    *,
    seed: int = 0,
    progress: Progress = lambda done: None,
) -> Pictures:
    """Pictures from the leading principal components of a picture's CLIP embedding.

    Args:
      stages: with a PCA.
      image: the picture.
      dims: how many components, several; by default 1/16, 1/8, 1/4, 1/2 and all of them.
      settings: how decoder and upsamplers sample.
      seed: of all noise.
      progress: called with the number of pictures so far.

    Returns:
      Pictures with `figures` dims and cosine (to the whole embedding).
    """
    width = stages.clip.joint_width
    dims = list(dims or sorted({max(1, width // n) for n in (16, 8, 4, 2, 1)}))
    picture = images.to_float(inputs.square(image, stages.image_px))[None]
    latent, cosines = manipulate.truncate(stages, picture, dims, key=jax.random.key(seed))
    same = np.zeros(len(dims), int)  # the same noise for all
    rebuilt = _finish(stages, latent, settings, seed, (same, same), progress)
    figures = [
        dict(dims=d, cosine=round(float(x), 4)) for d, x in zip(dims, cosines[0], strict=True)
    ]
    return _pictures(stages, rebuilt, seed, settings, figures=figures)


def _finish(stages, latent, settings, seed, indices, progress) -> np.ndarray:
    """Pictures [B, h, h, 3] of latents; `indices` are the decoder's and the upsamplers' noise."""
    common = dict(key=jax.random.key(seed), mesh=meshes.local())
    small = manipulate.sample(
        stages, latent, settings, indices=indices[0], progress=progress, **common
    )
    return unclip.upsample(stages, small, settings, indices=indices[1], **common)


def _pictures(stages, array, seed, settings, extra=None, **parts) -> Pictures:
    names = ("steps", "sampler", "eta", "guidance")
    options = {name: getattr(settings, name) for name in names} | (extra or {})
    return Pictures.of(array, seed=seed, settings=options, stages=stages.parts, **parts)


def _cosines(clip: ClipStage, pictures: Array, embedding: Array) -> list[float]:
    """CLIP cosines between pictures [B, h, h, 3] and embeddings [B, E] or [1, E]."""
    z = clip.embed_images(pictures)
    return [round(float(x), 4) for x in np.sum(z * np.asarray(embedding), axis=-1)]
