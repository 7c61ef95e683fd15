"""Variations, interpolations, edits and reconstructions of pictures, by their unCLIP latents.

The latent is (z_i, x_T): the CLIP embedding, which holds what a picture is of, and the noise from
which the decoder samples just this picture, which holds the rest. Inversion and sampling share one
`unclip.Settings`, so that an unchanged latent gives the picture back. The decoder is shown no
caption here, only the embedding. Pictures are [B, h, h, 3] float in [-1, 1] of any size, resized to
the decoder's; what comes back is of the decoder's size too, to be finished by `unclip.upsample`.

Source: Ramesh et al. 2022 (arXiv:2204.06125) §3 and §4.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dalle_jax.diffusion import samplers, schedules
from dalle_jax.nn import conv
from dalle_jax.sampling import inversion, latents, unclip
from dalle_jax.stages import pca
from dalle_jax.stages.unclip import Unclip
from dalle_jax.types import Array, Key, UsageError

NOISES = ("slerp", "fixed")


@dataclasses.dataclass(frozen=True)
class Latent:
    """Pictures as unCLIP sees them.

    Attributes:
      z: [B, E] float32, CLIP image embeddings of unit length.
      x_t: [B, s, s, 3] float32, from which the decoder samples them with these embeddings.
    """

    z: np.ndarray
    x_t: np.ndarray


def invert(
    stages: Unclip,
    pictures: Array,
    settings: unclip.Settings,
    *,
    corrections: int = inversion.CORRECTIONS,
) -> Latent:
    """The latents of pictures, for the steps and guidance of `settings`.

    Args:
      stages: CLIP and decoder.
      pictures: [B, h, h, 3] float in [-1, 1].
      settings: how they will be sampled.
      corrections: see `samplers.ddim_invert`; each costs as much as sampling.
    """
    decoder, small = stages.decoder, _resized(pictures, stages)
    # As in training, where the embedding is that of the decoder's own small picture.
    z = stages.clip.embed_images(small)
    schedule = schedules.respace(decoder.schedule, settings.steps)
    size = settings.chunk or unclip.fitting_chunk(decoder, settings.guidance != 1)
    x_t = []
    for start in range(0, len(small), size):
        rows = slice(start, start + size)
        cond = unclip.conditions(decoder, z[rows], np.ones(len(z[rows]), bool), None)
        x_t.append(
            inversion.invert(
                decoder.model,
                decoder.on(),
                unclip.nothing_known(decoder, cond),
                small[rows],
                schedule=schedule,
                scale=settings.guidance,
                corrections=corrections,
            )
        )
    return Latent(z, np.concatenate([np.asarray(x) for x in x_t]))


def sample(
    stages: Unclip,
    latent: Latent,
    settings: unclip.Settings,
    *,
    key: Key,
    indices: Array,
    mesh: Mesh | None = None,
    progress: unclip.Progress = lambda done: None,
) -> np.ndarray:
    """Small pictures of latents, [B, s, s, 3] float32 in [-1, 1]; see `unclip.sample_base`."""
    has_clip = np.ones(len(latent.z), bool)
    options = dict(key=key, indices=indices, x_t=latent.x_t, mesh=mesh, progress=progress)
    return unclip.sample_base(stages.decoder, latent.z, has_clip, None, settings, **options)


def vary(
    stages: Unclip,
    latent: Latent,
    num: int,
    settings: unclip.Settings,
    *,
    key: Key,
    mesh: Mesh | None = None,
    progress: unclip.Progress = lambda done: None,
) -> np.ndarray:
    """Variations of one picture.

    Args:
      stages: the stages.
      latent: of the picture, B = 1.
      num: how many; at eta 0 all of them are the picture again.
      settings: `eta` controls how much changes that the embedding does not hold.
      key: typed key; more variations only add to those of fewer.
      mesh: see `unclip.sample_base`.
      progress: see there.

    Returns:
      [num, s, s, 3] float32.
    """
    many = Latent(latent.z.repeat(num, 0), latent.x_t.repeat(num, 0))
    options = dict(key=key, indices=np.arange(num), mesh=mesh, progress=progress)
    return sample(stages, many, settings, **options)


def between(
    stages: Unclip, ends: Latent, thetas: Sequence[float], noise: str, *, key: Key
) -> Latent:
    """The latents along the path between two pictures.

    Args:
      stages: the stages.
      ends: of the two, B = 2.
      thetas: places on the path, 0 = the first picture and 1 = the second.
      noise: "slerp" goes from one picture's noise to the other's, so that the ends are the pictures
        themselves; "fixed" samples one noise for all: the path is smoother, its ends are
        variations.
      key: typed key, of the fixed noise.

    Source: §3.2 and its figure 4.
    """
    if noise not in NOISES:
        raise UsageError(f"noise {noise!r} is unknown; use one of {', '.join(NOISES)}.")
    thetas = _thetas(thetas)
    z = latents.slerp(ends.z[:1], ends.z[1:], thetas[:, None])
    if noise == "slerp":
        x_t = latents.slerp_noise(*ends.x_t, thetas)
    else:
        x_t = fixed_noise(stages, len(thetas), key=key)
    return Latent(np.asarray(z), np.asarray(x_t))


def edit(
    stages: Unclip, latent: Latent, new: Array, old: Array | None, thetas: Sequence[float]
) -> Latent:
    """The latents along the path from a picture towards a caption, its noise unchanged.

    Args:
      stages: the stages.
      latent: of the picture, B = 1.
      new: [T] int32, a caption of what the picture is to become, by the CLIP's tokenizer.
      old: [T] int32, a caption of what it is, or None.
      thetas: how far to turn the embedding, 0 = not at all, 1 = completely; paper 0.25 to 0.5.

    Raises:
      UsageError: if both captions are one.

    Source: §3.3.
    """
    check_captions(new, old)
    z_t = stages.clip.embed_texts(np.stack([new, new if old is None else old]))
    direction = latents.text_difference(z_t[:1], None if old is None else z_t[1:])
    thetas = _thetas(thetas)
    z = latents.slerp(latent.z, direction, thetas[:, None])
    return Latent(np.asarray(z), latent.x_t.repeat(len(thetas), 0))


def check_captions(new: Array, old: Array | None) -> None:
    """Raises UsageError if both captions are one."""
    if old is not None and np.array_equal(new, old):
        raise UsageError("the two captions are the same to CLIP, and name no direction.")


def truncate(
    stages: Unclip, pictures: Array, dims: Sequence[int], *, key: Key
) -> tuple[Latent, np.ndarray]:
    """What CLIP retains of pictures: latents of embeddings cut to their leading components.

    Args:
      stages: with a PCA.
      pictures: [B, h, h, 3] float in [-1, 1].
      dims: how many components to keep, several.
      key: typed key of the noise, which is the same for all.

    Returns:
      latents of all dims of the first picture, then of the second, …; and the cosines [B, D]
      between each embedding and what is left of it.

    Raises:
      UsageError: without a PCA, or for more components than there are.

    Source: §4 and its figure 7.
    """
    if stages.pca is None:
        raise UsageError(
            "these stages have no PCA of the CLIP's embeddings; give --pca=FILE, which `python -m "
            "dalle_jax pca` makes, or an AR prior, which has one."
        )
    z = stages.clip.embed_images(_resized(pictures, stages))
    cut = np.stack([np.asarray(pca.truncate(stages.pca, z, d)) for d in dims], axis=1)  # [B, D, E]
    x_t = fixed_noise(stages, cut.shape[0] * cut.shape[1], key=key)
    cosines = np.einsum("BDE,BE->BD", cut, z)
    return Latent(cut.reshape(-1, cut.shape[-1]), x_t), cosines


def fixed_noise(stages: Unclip, num: int, *, key: Key) -> np.ndarray:
    """One x_T, num times: [num, s, s, 3]."""
    px = stages.decoder.image_px
    keys = samplers.example_keys(key, jnp.zeros(1, jnp.int32))
    flat = samplers.start(stages.decoder.schedule, keys, (px * px * 3,))
    return np.broadcast_to(np.asarray(flat).reshape(1, px, px, 3), (num, px, px, 3))


def _thetas(thetas: Sequence[float]) -> np.ndarray:
    array = np.asarray(thetas, np.float32)
    if array.ndim != 1 or not len(array) or not ((array >= 0) & (array <= 1)).all():
        raise UsageError(f"theta={list(thetas)}; expected numbers in [0, 1].")
    return array


def _resized(pictures: Array, stages: Unclip) -> np.ndarray:
    """Pictures at the decoder's size, float32 on the host."""
    return np.asarray(conv.resize(np.asarray(pictures, np.float32), stages.decoder.image_px))
