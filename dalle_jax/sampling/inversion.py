"""From a picture back to its noise: the x_T from which a decoder samples it again.

The other half of unCLIP's latent of a picture, beside its CLIP embedding. One compiled loop around
the `denoiser` of `sampling.diffusion`.

Source: Ramesh et al. 2022 (arXiv:2204.06125) §3; the inversion is `samplers.ddim_invert`.
"""

import functools

import jax
import jax.numpy as jnp

from dalle_jax.diffusion import gaussian, samplers, schedules
from dalle_jax.models import unet
from dalle_jax.sampling import diffusion
from dalle_jax.types import Array, Batch, Params

CORRECTIONS = 2  # see `samplers.ddim_invert`: 25 steps there and back miss by 0.002 and not 0.15


def invert(
    model: unet.Unet,
    params: Params,
    cond: Batch,
    pictures: Array,
    *,
    schedule: schedules.Schedule,
    scale: Array | float = 1.0,
    corrections: int = CORRECTIONS,
    clip: gaussian.Clip = "static",
) -> Array:
    """The x_T from which `diffusion.sample` (ddim, eta 0, same options) gives the pictures.

    Args:
      model: the network.
      params: its parameters, no collection level.
      cond: `unet.cond_spec`, [B, …] each.
      pictures: [B, h, h, 3] float in [-1, 1].
      schedule: the steps that will be sampled with.
      scale: of guidance, as it will be sampled with; 1 = none.
      corrections: calls of the network per step beyond the first.
      clip: as it will be sampled with. Without clipping the way back is a little more exact, but at
        the noisiest steps an estimate of x_0 is the network's error a thousandfold, and a changed
        embedding or noise leads nowhere.

    Returns:
      [B, h, h, 3] float32.
    """
    is_off = isinstance(scale, int | float) and scale == 1
    scale = None if is_off else jnp.asarray(scale, jnp.float32)
    static = dict(schedule=schedule, corrections=corrections, clip=clip)
    return _invert(model, params, cond, jnp.asarray(pictures, jnp.float32), scale, **static)


@functools.partial(jax.jit, static_argnames=("model", "schedule", "corrections", "clip"))
def _invert(model, params, cond, pictures, scale, *, schedule, corrections, clip):
    p = diffusion.parameterisation(model.config, clip)
    predict = diffusion.denoiser(model, params, cond, scale)
    return samplers.ddim_invert(predict, schedule, p, pictures, corrections=corrections)
