"""What the picture networks of DALL-E 2 are shown in training: dropped conditions, small pictures.

Called by tasks/diffusion.py. All of it is arithmetic on a batch; noise and losses are elsewhere.
"""

import jax
import jax.numpy as jnp

from dalle_jax import config as cfg
from dalle_jax.diffusion import corrupt, masks
from dalle_jax.models import unet
from dalle_jax.types import Array, Batch, Key, UsageError


def check(config: cfg.ConfigDict, model_config: unet.UnetConfig) -> None:
    """Raises UsageError for values of `loss` that do not fit together or the network."""
    c, px = config.loss, config.data.image_px
    for name in ("clip_drop", "text_drop"):
        if not 0 <= c[name] <= 1:
            raise UsageError(f"loss.{name}={c[name]}; expected a share in [0, 1].")
    if c.snr_cap and not c.snr_cap >= 1:
        raise UsageError(f"loss.snr_cap={c.snr_cap}; expected 0 (no weights) or 1 and more.")
    if not c.time_power > 0:
        raise UsageError(
            f"loss.time_power={c.time_power}; expected above 0: 1 draws all steps evenly, 0.5 the "
            "noisier ones more often."
        )
    if c.corruption not in corrupt.KINDS:
        raise UsageError(
            f"loss.corruption={c.corruption!r} is unknown; use one of {', '.join(corrupt.KINDS)}."
        )
    if not c.low_res_px:
        if c.crop != 1:
            raise UsageError(
                f"loss.crop={c.crop}, but a decoder sees whole pictures; set --config.loss.crop=1."
            )
        return
    if model_config.text_encoder or model_config.attention_px:
        raise UsageError(
            f"loss.low_res_px={c.low_res_px} makes an upsampler, which has neither text encoder "
            "nor attention; set --config.model.text_layers=0 and --config.model.attention_px=()."
        )
    if px % c.low_res_px or px == c.low_res_px:
        raise UsageError(
            f"data.image_px={px} is no whole multiple of loss.low_res_px={c.low_res_px}; the paper "
            "goes from 64 to 256 and from 256 to 1024."
        )
    crop = round(px * c.crop)
    if not 0 < crop <= px or crop % (px // c.low_res_px):
        raise UsageError(
            f"loss.crop={c.crop} of {px} px is {crop} px; expected at most 1 and whole pixels of "
            f"the {c.low_res_px} px picture, paper 0.25."
        )
    unet.check_px(model_config, crop)


def steps(c: cfg.ConfigDict, key: Key, count: int) -> Array:
    """Steps t [count] int32 of a batch's examples, in 0 … `num_steps` - 1.

    t / `num_steps` is u ** `time_power` of an even u: at 1 every step is as likely (the paper's),
    at 0.5 one is the likelier the noisier it is, in proportion.

    Args:
      c: the config's `loss`.
      key: of this step.
      count: of examples.
    """
    if c.time_power == 1:
        return jax.random.randint(key, (count,), 0, c.num_steps)
    places = jax.random.uniform(key, (count,)) ** c.time_power
    # float32 rounds the last places up to num_steps.
    return jnp.minimum((places * c.num_steps).astype(jnp.int32), c.num_steps - 1)


def drop(c: cfg.ConfigDict, has_clip: Array, text: Array, key: Key) -> tuple[Array, Array]:
    """Without the embedding in a share clip_drop, without the caption in a share text_drop.

    Args:
      c: the `loss` section.
      has_clip: [B] bool.
      text: [B, T] int32.
      key: of this step.

    The coins of an example are independent of one another and of all others: an embedding alone, a
    caption alone and nothing at all are all learnt. (The paper's §5.1 has 5 % where its §2.1 has
    10 %: that is how often a caption comes without an embedding.)
    """
    clip_key, text_key = jax.random.split(key)
    has_clip &= ~jax.random.bernoulli(clip_key, c.clip_drop, has_clip.shape)
    no_text = jax.random.bernoulli(text_key, c.text_drop, has_clip.shape)
    return has_clip, jnp.where(no_text[:, None], 0, text)


def inpainting(x_0: Array, key: Key) -> Batch:
    """Conditions `picture` and `known` of an inpainting network for pictures [B, h, h, 3]."""
    keys = jax.random.split(key, len(x_0))
    return {"picture": x_0, "known": masks.random_masks(keys, x_0.shape[1])}


def upsampling(c: cfg.ConfigDict, pictures: Array, crop: float, key: Key) -> tuple[Array, Batch]:
    """Crops to learn from, and the same crops of the smaller pictures.

    The picture is reduced by antialiased bicubic interpolation, corrupted, rounded to 256
    levels (an upsampler is given those), and stretched again as the network would (bilinear); then
    both are cut. So a crop's border is like any other place, which the border of a small picture
    that was stretched alone is not. Crops begin at whole pixels of the small picture: the phase
    between the two is then that of whole pictures.

    Args:
      c: the `loss` section, whose low_res_px and corruption are used.
      pictures: [B, h, h, 3] in [-1, 1].
      crop: share of the side that is cut out; 1 = the whole picture.
      key: of this step.

    Returns:
      (x_0 [B, s, s, 3], {"low_res": [B, s, s, 3]}) with s = crop * h.
    """
    count, px = pictures.shape[:2]
    small = (count, c.low_res_px, c.low_res_px, 3)
    corrupt_key, crop_key = jax.random.split(key)
    low = jnp.clip(jax.image.resize(pictures, small, "cubic"), -1, 1)
    low = corrupt.corrupt(c.corruption, low, jax.random.split(corrupt_key, count))
    low = jax.image.resize(low, pictures.shape, "bilinear")
    side, factor = round(px * crop), px // c.low_res_px
    if side == px:
        return pictures, {"low_res": low}
    most = (px - side) // factor + 1
    corners = factor * jax.random.randint(crop_key, (count, 2), 0, most)

    def cut(picture: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(picture, (corner[0], corner[1], 0), (side, side, 3))

    return jax.vmap(cut)(pictures, corners), {"low_res": jax.vmap(cut)(low, corners)}
