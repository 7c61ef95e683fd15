"""Sampling from a U-Net: conditions and guidance as a `predict`, one compiled loop around it.

The noise of a picture is a function of (key, global index of the picture, step) alone, so it does
not change with the batch, with chunks or with the number of devices. Caption and embedding are
encoded once, not at every step. Called by tasks/diffusion.py for previews; whoever chains
networks, inverts or edits builds on the same `denoiser`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dalle_jax.diffusion import gaussian, guidance, samplers, schedules
from dalle_jax.models import unet
from dalle_jax.nn import partition
from dalle_jax.types import Array, Batch, Key, Params, UsageError

SAMPLERS = ("ddim", "ddpm", "dpmpp")


def parameterisation(
    c: unet.UnetConfig, clip: gaussian.Clip = "static"
) -> gaussian.Parameterisation:
    """What the outputs of such a U-Net mean; the variance is learned where it has channels."""
    variance = "learned_range" if c.learned_variance else "posterior"
    return gaussian.Parameterisation(c.predicts, variance, clip)


def denoiser(
    model: unet.Unet, params: Params, cond: Batch, scale: Array | float | None = None
) -> Callable[[Array, Array], Array]:
    """`predict` of the samplers for pictures with these conditions.

    Args:
      model: the network.
      params: its parameters, no collection level.
      cond: `unet.cond_spec`, [B, …] each.
      scale: of classifier-free guidance away from `unet.null_cond`, a number or [B], may be
        traced; None = no guidance and half the work.

    Returns:
      (x [B, h, h, 3], t [B]) -> [B, h, h, 3 or 6].
    """
    if scale is not None:
        cond = guidance.pair(cond, unet.null_cond(cond))
    with partition.unconstrained():
        encoded = model.apply({"params": params}, cond, method="encode")

    def predict(x: Array, t: Array) -> Array:
        # A batch of sampling is not the training batch that the rules speak of.
        with partition.unconstrained():
            return model.apply({"params": params}, x, t, encoded)

    return predict if scale is None else guidance.guided(predict, scale)


def sample(
    model: unet.Unet,
    params: Params,
    cond: Batch,
    *,
    schedule: schedules.Schedule,
    key: Key,
    indices: Array,
    px: int = 0,
    sampler: str = "ddim",
    eta: float = 0.0,
    scale: float | Array = 1.0,
    clip: gaussian.Clip = "static",
    x_t: Array | None = None,
    keep: tuple[Array, Array] | None = None,
    mesh: Mesh | None = None,
) -> Array:
    """Pictures with these conditions. Compiled once for each shape, schedule and sampler.

    Args:
      model: the network.
      params: its parameters, no collection level. On the device already if called often.
      cond: `unet.cond_spec`, [B, …] each, on the host or on the device.
      schedule: the steps to take: `schedules.respace` of the network's own.
      key: typed key.
      indices: [B] int, the global index of each picture.
      px: side of the pictures; 0 = what the network is made for.
      sampler: "ddim", "ddpm" with the network's variance, or "dpmpp" for few steps.
      eta: of ddim, 0 to 1.
      scale: of guidance, a number or [B]; 1 = none.
      clip: what becomes of estimates outside [-1, 1], see `gaussian.Parameterisation`.
      x_t: [B, px, px, 3] to start from instead of noise.
      keep: (pictures [B, px, px, 3], known [B, px, px, 1] bool): pixels that come back bit for bit.
      mesh: spread the pictures over its data and fsdp axes; B is padded to fill them.

    Returns:
      [B, px, px, 3] float32 in [-1, 1].

    Raises:
      UsageError: for an unknown sampler, an eta out of range or a side that does not fit.
    """
    px = px or model.config.image_px
    unet.check_px(model.config, px)
    check_eta(sampler, eta)
    scalar = isinstance(scale, int | float)
    options = dict(
        # What is None is left out of the program.
        eta=float(eta) if eta else None,
        scale=None if scalar and scale == 1 else jnp.asarray(scale, jnp.float32),
    )
    rows = dict(cond=cond, indices=jnp.asarray(indices, jnp.int32), x_t=x_t, keep=keep)
    count = len(rows["indices"])
    shards = partition.num_batch_shards(mesh)
    short = -count % shards
    if short:
        rows = jax.tree.map(lambda x: jnp.concatenate([x, x[:1].repeat(short, 0)]), rows)
        if not scalar and jnp.ndim(scale):
            options["scale"] = jnp.concatenate([options["scale"], jnp.ones(short)])
    static = dict(schedule=schedule, px=px, sampler=sampler, clip=clip, mesh=mesh)
    return _sample(model, params, key, rows, options, **static)[:count]


def check_eta(sampler: str, eta: float) -> None:
    """Raises UsageError for an unknown sampler, or an eta that it does not take."""
    if sampler not in SAMPLERS:
        raise UsageError(f"sampler {sampler!r} is unknown; use one of {', '.join(SAMPLERS)}.")
    if not 0 <= eta <= 1:
        raise UsageError(f"eta={eta}; expected 0 (no noise) to 1 (as much as DDPM).")
    if eta and sampler == "dpmpp":
        raise UsageError(f"eta={eta}, but dpmpp adds no noise; use sampler ddim, or eta=0.")


@functools.partial(jax.jit, static_argnames=("model", "schedule", "px", "sampler", "clip", "mesh"))
def _sample(model, params, key, rows, options, *, schedule, px, sampler, clip, mesh):
    rows = partition.split_batch(rows, mesh)
    p = parameterisation(model.config, clip)
    predict = denoiser(model, params, rows["cond"], options["scale"])
    keys = samplers.example_keys(key, rows["indices"])
    x_t = rows["x_t"]
    if x_t is None:
        flat = samplers.start(schedule, keys, (px * px * 3,))
        x_t = flat.reshape(-1, px, px, 3)
    project = None if rows["keep"] is None else samplers.keep_known(*rows["keep"])
    if sampler == "ddpm":
        x_0 = samplers.ddpm(predict, schedule, p, x_t, keys, project=project)
    elif sampler == "dpmpp":
        x_0 = samplers.dpmpp(predict, schedule, p, x_t, project=project)
    else:
        eta = 0.0 if options["eta"] is None else options["eta"]
        x_0 = samplers.ddim(predict, schedule, p, x_t, keys, eta=eta, project=project)
    if rows["keep"] is not None:
        picture, known = rows["keep"]
        return partition.split_batch(jnp.where(known, picture, jnp.clip(x_0, -1, 1)), mesh)
    return partition.split_batch(jnp.clip(x_0, -1, 1), mesh)
