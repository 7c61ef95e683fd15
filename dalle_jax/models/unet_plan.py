"""The sizes of a U-Net: its config, the plan of its blocks, what it must be given, what it costs.

The network itself is models/unet.py. Nothing here computes.

Source: openai/guided-diffusion and openai/glide-text2im, `unet.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dalle_jax.nn import transformer
from dalle_jax.nn import unet_blocks as blocks
from dalle_jax.types import DtypePolicy, UsageError

REMAT = ("none", "full")
PREDICTS = ("eps", "x_0", "v")


@dataclasses.dataclass(frozen=True)
class UnetConfig:
    """A U-Net.

    Attributes:
      image_px: side of the pictures it is made for; `attention_px` refers to it. Others can be
        given, see `check_px`.
      width: channels at full size; those of the other levels are multiples.
      channel_mults: of each level; each level but the first has half the side of the one before.
      num_blocks: residual blocks of a level on the way down; one more on the way up.
      attention_px: sides at which attention follows each block, and in the middle; () = none at
        all, GLIDE's without a middle one too.
      head_width: channels of a head.
      dropout: in the residual blocks.
      patch_px: pixels a side that are one position of the first level; 1 is the paper's. On a CPU
        the first level costs most and needs it least.
      predicts: what its output stands for: "eps" (the paper's), "v" or "x_0", see
        `diffusion.gaussian`.
      learned_variance: 6 channels out instead of 3.
      low_res: takes a smaller picture.
      inpaint: takes the known part of a picture and where it is.
      text_len: T, ids of a caption.
      vocab_size: rows of the text encoder's table.
      text_width: D of the text encoder, and of the tokens that attention sees.
      text_layers: its L; 0 = there is none.
      text_heads: its H.
      clip_width: E of the CLIP; 0 = no embedding comes in.
      clip_tokens: tokens that an embedding becomes.
      scan_layers: of the text encoder.
      remat: what backward keeps: "none" (everything) or "full" (inputs of blocks only).
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
    text_width: int = 0
    text_layers: int = 0
    text_heads: int = 1
    clip_width: int = 0
    clip_tokens: int = 4
    scan_layers: bool = False
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
        # The middle attends too, where anything does.
        levels = [i for i in range(len(sides)) if self.attends(i)]
        for level in [*levels, *([len(sides) - 1] if levels else [])]:
            width = self.channel_mults[level] * self.width
            if width % self.head_width:
                raise UsageError(
                    f"{width} channels are no multiple of head_width {self.head_width}; use "
                    f"head_width={self.width} or another width."
                )
        if (self.text_layers or self.clip_width) and not (self.text_width and self.attention_px):
            raise UsageError(
                "captions and embeddings need attention_px and text_width (the width of the "
                f"tokens); they are {self.attention_px} and {self.text_width}."
            )
        if self.text_layers:
            self.text_encoder(DtypePolicy())  # its own checks

    @property
    def stride(self) -> int:
        """What the side of a picture has to be a multiple of."""
        return self.patch_px * 2 ** (len(self.channel_mults) - 1)

    @property
    def out_channels(self) -> int:
        """Per pixel: the prediction, and variance if it is learned."""
        return 6 if self.learned_variance else 3

    @property
    def step_width(self) -> int:
        """Of the embedding of a step."""
        return 4 * self.width

    @property
    def context_len(self) -> int:
        """Tokens that attention sees beside the picture."""
        text = self.text_len if self.text_layers else 0
        return text + (self.clip_tokens if self.clip_width else 0)

    def side(self, level: int) -> int:
        """Positions a side at a level, for a picture of image_px."""
        return self.image_px // self.patch_px >> level

    def attends(self, level: int) -> bool:
        """Whether attention follows the blocks of a level."""
        return self.side(level) in self.attention_px

    def text_encoder(self, dtype: DtypePolicy) -> transformer.TransformerConfig:
        """The text encoder's stack: GLIDE's, bidirectional, exact GELU."""
        return transformer.TransformerConfig(
            width=self.text_width,
            num_layers=self.text_layers,
            num_heads=self.text_heads,
            norm="layer",
            activation="gelu",
            use_bias=True,
            scan_layers=self.scan_layers,
            remat=self.remat,
            dtype=dtype,
        )


@dataclasses.dataclass(frozen=True)
class Place:
    """One residual block of the plan: its name, its level, its channels, what follows."""

    name: str
    level: int  # whose side it has in the end
    in_features: int
    features: int
    resample: str = ""
    attends: bool = False


def plan(c: UnetConfig) -> tuple[list[Place], list[Place], list[Place]]:
    """Blocks of the way down, the middle and the way up, in order.

    What leaves the stem and each block of the way down is kept; each block of the way up that does
    not double the side takes the newest that is left beside its input.
    """
    last = len(c.channel_mults) - 1
    channels, kept = c.channel_mults[0] * c.width, []
    kept.append(channels)
    down, up = [], []
    for level, mult in enumerate(c.channel_mults):
        width = mult * c.width
        for i in range(c.num_blocks):
            down.append(Place(f"down_{level}_{i}", level, channels, width, "", c.attends(level)))
            channels = width
            kept.append(channels)
        if level != last:
            down.append(Place(f"down_{level}_halve", level + 1, channels, channels, "down"))
            kept.append(channels)
    middle = [
        Place("middle_0", last, channels, channels, "", bool(c.attention_px)),
        Place("middle_1", last, channels, channels),
    ]
    for level in reversed(range(last + 1)):
        width = c.channel_mults[level] * c.width
        for i in range(c.num_blocks + 1):
            taken = channels + kept.pop()
            up.append(Place(f"up_{level}_{i}", level, taken, width, "", c.attends(level)))
            channels = width
        if level:
            up.append(Place(f"up_{level}_double", level - 1, channels, channels, "up"))
    return down, middle, up


def cond_spec(c: UnetConfig, batch: int, px: int) -> dict[str, jax.ShapeDtypeStruct]:
    """name -> shape and dtype of all that `Unet` must be given beside x and t."""
    made = {}
    if c.text_layers:
        made["text"] = ((batch, c.text_len), jnp.int32)
    if c.clip_width:
        made["clip"] = ((batch, c.clip_width), jnp.float32)
        made["has_clip"] = ((batch,), jnp.bool_)
    if c.low_res:
        made["low_res"] = ((batch, px, px, 3), jnp.float32)
    if c.inpaint:
        made["picture"] = ((batch, px, px, 3), jnp.float32)
        made["known"] = ((batch, px, px, 1), jnp.bool_)
    return {name: jax.ShapeDtypeStruct(*spec) for name, spec in made.items()}


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
    """Forward FLOPs of one picture of px (2 per multiply-add), text encoder included."""
    down, middle, up = plan(c)
    macs = 0
    for place in [*down, *middle, *up]:
        pixels = (px // c.patch_px >> place.level) ** 2
        macs += blocks.block_macs(pixels, place.in_features, place.features, c.step_width)
        if place.attends:
            width, length = c.text_width, c.context_len
            macs += blocks.attention_macs(pixels, place.features, width, length)
    channels = 3 + 3 * c.low_res + 4 * c.inpaint + c.out_channels
    first = c.channel_mults[0] * c.width
    macs += px**2 * 9 * channels * first
    macs += c.step_width * (c.width + c.step_width)
    macs += c.clip_width * (c.step_width + c.clip_tokens * c.text_width)
    text = 0.0
    if c.text_layers:
        stack = c.text_encoder(DtypePolicy())
        text = transformer.flops(stack, (None,) * c.text_layers, c.text_len)
        macs += c.text_width * c.step_width
    return 2.0 * macs + text
