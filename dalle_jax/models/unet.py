"""unCLIP's U-Net: the decoder from CLIP image embeddings, and both upsamplers.

Its output is eps (or what `predicts` names) and, for a learned range, the variance channels, as
`diffusion.gaussian` expects. It knows no schedule, no loss and no CLIP: embeddings are inputs.

  decoder     Its conditions are captions, which it encodes itself, and CLIP image embeddings. Both
              become tokens that attention sees and are added to the embedding of the step. Either
              may be dropped for each example.
  upsampler   It sees the smaller picture beside the noisy one. It has no caption, no embedding and
              no attention, so that it can train on crops and run on full pictures.

Source: Ramesh et al. 2022 (arXiv:2204.06125) §2.1 and appendix C; the U-Net is GLIDE's (Nichol et
al. 2021, arXiv:2112.10741; openai/glide-text2im `text2im_model.py`), which is ADM's (Dhariwal &
Nichol 2021, arXiv:2105.05233; openai/guided-diffusion `unet.py`). Deliberate differences: none in
the sizes (tests count GLIDE's released ones); `patch_px` for CPUs; the inpainting channels have a
convolution of their own, whose sum with the stem is the same function.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.nn import conv, embed, stack, unet_blocks
from dalle_jax.nn.context import Context
from dalle_jax.nn.transformer import TransformerConfig
from dalle_jax.types import Array, Batch, DtypePolicy, Key, Params, UsageError

REMAT = ("none", "full")
PREDICTS = ("eps", "x_0", "v")
KNOWN_STEM = "stem_known"  # the convolution of an inpainting network's picture and mask
ENCODED = ("text", "clip", "has_clip")  # conditions that `Unet.encode` replaces


@dataclasses.dataclass(frozen=True)
class UnetConfig:
    """Sizes of a U-Net.

    Attributes:
      image_px: side of the pictures that `attention_px` refers to; `check_px` accepts other sides.
      width: channels at full size; the other levels have multiples of it.
      channel_mults: multiple of each level; each level but the first halves the side.
      num_blocks: residual blocks of a level of the downward path; the upward path has one more.
      attention_px: sides at which attention follows each block and is in the middle; () = no
        attention at all, unlike GLIDE, which always has it in the middle.
      head_width: channels of a head.
      dropout: rate in the residual blocks.
      patch_px: side of the patch that is one position of the first level; 1 in the paper. On a CPU
        the first level costs most and matters least.
      predicts: meaning of the output: "eps" (the paper's), "v" or "x_0", see `diffusion.gaussian`.
      learned_variance: 6 output channels instead of 3.
      low_res: a smaller picture is an input.
      inpaint: the known part of a picture and its mask are inputs.
      text_len: T, text ids per caption.
      vocab_size: text ids.
      context_width: D of the tokens that attention sees, and of the text encoder.
      text_encoder: its stack (GLIDE's has exact GELU); None = captions are no input.
      clip_width: E of the CLIP; 0 = embeddings are no input.
      clip_tokens: number of tokens for an embedding.
      remat: what is saved for the backward pass: "none" (no remat, everything) or "full" (only the
        inputs of blocks).
    """

    image_px: int
    width: int = 64
    channel_mults: tuple[int, ...] = (1, 2, 3, 4)
    num_blocks: int = 2
    attention_px: tuple[int, ...] = ()
    head_width: int = 64
    dropout: float = 0.0
    patch_px: int = 1
    predicts: str = "eps"
    learned_variance: bool = True
    low_res: bool = False
    inpaint: bool = False
    text_len: int = 0
    vocab_size: int = 0
    context_width: int = 0
    text_encoder: TransformerConfig | None = None
    clip_width: int = 0
    clip_tokens: int = 4
    remat: str = "none"

    def __post_init__(self):
        for name in ("image_px", "num_blocks", "patch_px", "head_width"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}; expected 1 or more.")
        if self.width < 4 or self.width % 2:
            raise UsageError(f"width={self.width}; expected an even number of 4 or more.")
        if not self.channel_mults or min(self.channel_mults) < 1:
            raise UsageError(f"channel_mults={self.channel_mults}; expected (1, 2, …).")
        if self.remat not in REMAT:
            raise UsageError(f"remat={self.remat!r} is unknown; use one of {', '.join(REMAT)}.")
        if self.predicts not in PREDICTS:
            raise UsageError(f"predicts={self.predicts!r}; use one of {', '.join(PREDICTS)}.")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout={self.dropout} is not in [0, 1).")
        check_px(self, self.image_px)
        sides = [self.side(level) for level in range(len(self.channel_mults))]
        for px in self.attention_px:
            if px not in sides:
                raise UsageError(
                    f"attention_px has {px}, but the levels have sides {sides}; use some of these."
                )
        # If any level has attention, the middle has it too.
        levels = [i for i in range(len(sides)) if self.attends(i)]
        for level in [*levels, *([len(sides) - 1] if levels else [])]:
            width = self.channel_mults[level] * self.width
            if width % self.head_width:
                raise UsageError(
                    f"{width} channels are no multiple of head_width {self.head_width}; use "
                    f"head_width={self.width} or another width."
                )
        has_context = self.text_encoder or self.clip_width
        if has_context and not (self.context_width and self.attention_px):
            raise UsageError(
                "captions and embeddings need attention_px and text_width (the width of the "
                f"tokens); they are {self.attention_px} and {self.context_width}."
            )
        if self.text_encoder and self.text_encoder.width != self.context_width:
            raise UsageError("text_width is the width of the text encoder and of the context.")

    @property
    def stride(self) -> int:
        """The side of a picture is a multiple of this."""
        return self.patch_px * 2 ** (len(self.channel_mults) - 1)

    @property
    def out_channels(self) -> int:
        """Output channels: the prediction, and the variance if it is learned."""
        return 6 if self.learned_variance else 3

    @property
    def step_width(self) -> int:
        """Width of the embedding of a step."""
        return 4 * self.width

    @property
    def context_len(self) -> int:
        """Number of tokens that attention sees beside the picture."""
        text = self.text_len if self.text_encoder else 0
        return text + (self.clip_tokens if self.clip_width else 0)

    def side(self, level: int) -> int:
        """Positions a side at a level, for a picture of image_px."""
        return self.image_px // self.patch_px >> level

    def attends(self, level: int) -> bool:
        """Whether attention follows the blocks of a level."""
        return self.side(level) in self.attention_px


@dataclasses.dataclass(frozen=True)
class Place:
    """One residual block of the plan, and whether attention follows it."""

    name: str
    level: int  # after resampling
    in_features: int
    features: int
    resample: str = ""
    attends: bool = False


def plan(c: UnetConfig) -> tuple[list[Place], list[Place], list[Place]]:
    """The blocks of the downward path, the middle and the upward path, in order.

    The outputs of the stem and of each block of the downward path go on a stack of skip
    connections. Each block of the upward path that does not double the side pops one and
    concatenates it to its input.
    """
    last = len(c.channel_mults) - 1
    channels = c.channel_mults[0] * c.width
    down, up, skips = [], [], [channels]
    for level, mult in enumerate(c.channel_mults):
        width = mult * c.width
        for i in range(c.num_blocks):
            down.append(Place(f"down_{level}_{i}", level, channels, width, "", c.attends(level)))
            channels = width
            skips.append(channels)
        if level != last:
            down.append(Place(f"down_{level}_halve", level + 1, channels, channels, "down"))
            skips.append(channels)
    middle = [
        Place("middle_0", last, channels, channels, "", bool(c.attention_px)),
        Place("middle_1", last, channels, channels),
    ]
    for level in reversed(range(last + 1)):
        width = c.channel_mults[level] * c.width
        for i in range(c.num_blocks + 1):
            joined = channels + skips.pop()
            up.append(Place(f"up_{level}_{i}", level, joined, width, "", c.attends(level)))
            channels = width
        if level:
            up.append(Place(f"up_{level}_double", level - 1, channels, channels, "up"))
    return down, middle, up


class Unet(nn.Module):
    """The network; `dtype` is for parameters, compute and islands."""

    config: UnetConfig
    dtype: DtypePolicy = DtypePolicy()

    def setup(self):
        """Declares the encoder of caption and embedding, if either is an input."""
        c = self.config
        if c.context_len:
            sizes = (c.text_len, c.vocab_size, c.clip_width, c.clip_tokens, self.dtype)
            self.condition = Context(c.context_width, c.step_width, c.text_encoder, *sizes)

    def encode(self, cond: Batch) -> Batch:
        """The conditions with caption and embedding encoded, once for all steps of sampling.

        Returns:
          `cond` without text, clip and has_clip, with step [B, 4 width] and context
          [B, S, context_width]; `__call__` accepts it instead of `cond`.
        """
        if not self.config.context_len:
            return cond
        step, context = self.condition(cond)
        rest = {name: value for name, value in cond.items() if name not in ENCODED}
        return rest | {"step": step, "context": context}

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Batch, key: Key | None = None) -> Array:
        """The output for pictures x at steps t; zero before the first update.

        Args:
          x: [B, h, h, 3] noisy pictures; h a multiple of `config.stride`.
          t: [B] int32 steps of the training process, even if sampling has fewer.
          cond: the conditions of `cond_spec`, [B, ...] each, or the result of `encode`:
            text [B, T] int32; all 0 = no caption.
            clip [B, E] float32 of unit length, and has_clip [B] bool; False = the learned null.
            low_res [B, l, l, 3] float in [-1, 1], of any side, resized to h (bilinear, as ADM).
            picture [B, h, h, 3] and known [B, h, h, 1] bool; only known pixels are used.
          key: samples the dropout; None = no dropout.

        Returns:
          [B, h, h, 3 or 6] float32.

        Raises:
          UsageError: if the side cannot be halved at every level.
          ValueError: for missing or unknown conditions.
        """
        c, dtype = self.config, self.dtype
        _check(c, x, cond)
        first = c.channel_mults[0] * c.width
        down, middle, up = plan(c)
        num_places = len(down + middle + up)
        keys = [None] * num_places if key is None else list(jax.random.split(key, num_places))
        res, attend = unet_blocks.ResBlock, unet_blocks.AttentionBlock
        if c.remat == "full":
            res, attend = nn.remat(res), nn.remat(attend)

        cond = cond if "step" in cond else self.encode(cond)
        context = cond.get("context")
        step = embed.timestep_features(t, c.width)
        step = unet_blocks.Linear(c.width, c.step_width, dtype=dtype, name="step_1")(step)
        step = jax.nn.silu(step)
        step = unet_blocks.Linear(c.step_width, c.step_width, dtype=dtype, name="step_2")(step)
        step = jax.nn.silu(step + cond.get("step", 0))

        def block(place: Place, h: Array) -> Array:
            sizes = (place.in_features, place.features, place.resample, c.dropout, dtype)
            h = res(*sizes, name=place.name)(h, step, keys.pop())
            if place.attends:
                context_width = c.context_width if c.context_len else 0
                sizes = (place.features, c.head_width, context_width, dtype)
                h = attend(*sizes, name=f"{place.name}_attention")(h, context)
            return h

        if c.low_res:
            low = cond["low_res"].astype(jnp.float32)
            if low.shape != x.shape:
                low = jax.image.resize(low, x.shape, "bilinear")
            x = jnp.concatenate([x, low.astype(x.dtype)], axis=-1)
        h = conv.to_patches(x, c.patch_px)
        h = conv.Conv(h.shape[-1], first, 3, dtype=dtype, name="stem")(h)
        if c.inpaint:
            known = cond["known"].astype(x.dtype)
            known = jnp.concatenate([cond["picture"] * known, known], axis=-1)
            known = conv.to_patches(known, c.patch_px)
            # Zero at the start, so that widening a plain decoder does not change its function.
            size = (known.shape[-1], first, 3)
            h += conv.Conv(*size, gain=0.0, dtype=dtype, name=KNOWN_STEM)(known)
        h = conv.constrain(h)
        skips = [h]
        for place in down:
            h = block(place, h)
            skips.append(h)
        for place in middle:
            h = block(place, h)
        for place in up:
            h = h if place.resample else jnp.concatenate([h, skips.pop()], axis=-1)
            h = block(place, h)
        h = unet_blocks.GroupNorm(first, dtype=dtype, name="norm_out")(h)
        out = c.patch_px**2 * c.out_channels
        h = conv.Conv(first, out, 3, gain=0.0, dtype=dtype, name="out")(h)
        return conv.from_patches(h, c.patch_px).astype(dtype.accum)


def null_cond(cond: Batch) -> Batch:
    """The conditions without caption and embedding, for classifier-free guidance."""
    null = {name: jnp.zeros_like(cond[name]) for name in ("text", "has_clip") if name in cond}
    return {**cond, **null}


def widen(params: Params, fresh: Params) -> Params:
    """The parameters of an inpainting network that computes the function of a plain one.

    Args:
      params: host arrays of a U-Net without `inpaint`.
      fresh: arrays or shapes of a U-Net with `inpaint` and otherwise the same config.

    Returns:
      `params`, and zeros for the convolution of picture and mask.

    Raises:
      UsageError: if the two differ in anything else.
    """
    added = {name: fresh[name] for name in fresh if name not in params}
    if set(added) != {KNOWN_STEM} or set(params) - set(fresh):
        raise UsageError(
            "only a U-Net that differs by loss.inpaint=true can be widened; these differ in "
            f"{sorted(set(fresh) ^ set(params))[:3]}."
        )
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), added[KNOWN_STEM])
    return {**params, KNOWN_STEM: zeros}


def _check(c: UnetConfig, x: Array, cond: Batch) -> None:
    if x.ndim != 4 or x.shape[1] != x.shape[2] or x.shape[3] != 3:
        raise ValueError(f"x has shape {x.shape}; expected square pictures [B, h, h, 3].")
    check_px(c, x.shape[1])
    specs = cond_spec(c, len(x), x.shape[1])
    if "step" in cond:
        specs = {name: spec for name, spec in specs.items() if name not in ENCODED}
        cond = {name: value for name, value in cond.items() if name not in ("step", "context")}
    if set(cond) != set(specs):
        raise ValueError(f"conditions are {sorted(cond)}; this network takes {sorted(specs)}.")
    for name, spec in specs.items():
        if cond[name].shape != spec.shape and name != "low_res":
            raise ValueError(f"{name} has shape {cond[name].shape}; expected {spec.shape}.")


def cond_spec(c: UnetConfig, batch: int, px: int) -> dict[str, jax.ShapeDtypeStruct]:
    """name -> shape and dtype of every condition of the network, for pictures with side px."""
    specs = {}
    if c.text_encoder:
        specs["text"] = ((batch, c.text_len), jnp.int32)
    if c.clip_width:
        specs["clip"] = ((batch, c.clip_width), jnp.float32)
        specs["has_clip"] = ((batch,), jnp.bool_)
    if c.low_res:
        specs["low_res"] = ((batch, px, px, 3), jnp.float32)
    if c.inpaint:
        specs["picture"] = ((batch, px, px, 3), jnp.float32)
        specs["known"] = ((batch, px, px, 1), jnp.bool_)
    return {name: jax.ShapeDtypeStruct(*spec) for name, spec in specs.items()}


def check_px(c: UnetConfig, px: int) -> None:
    """Refuses a side that cannot be halved at every level.

    Raises:
      UsageError: naming the nearest sides that can.
    """
    if px % c.stride or px < c.stride:
        low, high = px // c.stride * c.stride, px // c.stride * c.stride + c.stride
        good = f"{low} or {high}" if low else f"{high}"
        raise UsageError(
            f"pictures of {px} px do not fit {len(c.channel_mults)} levels on {c.patch_px} px "
            f"patches: the side must be a multiple of {c.stride}; use {good}."
        )


def flops(c: UnetConfig, px: int) -> float:
    """Forward FLOPs of one picture with side px (2 per multiply-add), text encoder included.

    A formula, because tracing the network takes 1 to 5 CPU seconds.
    """
    macs = c.step_width * (c.width + c.step_width)
    for place in sum(plan(c), []):
        pixels = (px // c.patch_px >> place.level) ** 2
        macs += unet_blocks.block_macs(pixels, place.in_features, place.features, c.step_width)
        if place.attends:
            size = (pixels, place.features, c.context_width, c.context_len)
            macs += unet_blocks.attention_macs(*size)
    channels = 3 + 3 * c.low_res + 4 * c.inpaint + c.out_channels
    macs += px**2 * 9 * channels * c.channel_mults[0] * c.width
    macs += c.clip_width * (c.step_width + c.clip_tokens * c.context_width)
    if not c.text_encoder:
        return 2.0 * macs
    macs += c.context_width * c.step_width
    return 2.0 * macs + stack.flops(c.text_encoder, (None,) * c.text_encoder.num_layers, c.text_len)
