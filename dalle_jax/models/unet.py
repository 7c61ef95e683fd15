"""unCLIP's U-Net: the decoder that draws a CLIP image embedding, and both upsamplers.

What it gives is what `diffusion.gaussian` calls an output: eps (or what `predicts` names), and
beside it the variance channels of a learned range. It knows no schedule, no loss and no CLIP:
embeddings come in.

  decoder     captions through a text encoder of its own, and CLIP image embeddings: both are tokens
              that attention sees and are added to the step. Either may be dropped, by example.
  upsampler   the smaller picture beside the noisy one; no caption, no embedding, no attention, so
              that it is trained on crops and applied to whole pictures.

Source: Ramesh et al. 2022 (arXiv:2204.06125) §2.1 and appendix C; the U-Net is GLIDE's (Nichol et
al. 2021, arXiv:2112.10741; openai/glide-text2im `text2im_model.py`), which is ADM's (Dhariwal &
Nichol 2021, arXiv:2105.05233; openai/guided-diffusion `unet.py`). Deliberate differences: none in
the sizes (tests count GLIDE's released ones), `patch_px` for CPUs, embeddings are scaled by sqrt(E)
to numbers of variance 1 (ours have unit length; the paper says nothing), and the inpainting
channels have a convolution of their own, which added up is the same.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax import axes
from dalle_jax.models import unet_plan
from dalle_jax.models.unet_plan import Place, UnetConfig
from dalle_jax.nn import conv, partition, transformer
from dalle_jax.nn import unet_blocks as blocks
from dalle_jax.types import Array, Batch, DtypePolicy, Key, Params, UsageError

KNOWN_STEM = "stem_known"  # what sees an inpainting network's picture and mask
ENCODED = ("text", "clip", "has_clip")  # conditions that `Unet.encode` replaces


class TextEncoder(nn.Module):
    """Captions to one vector and T tokens.

    A slot without a token (id 0) holds a vector of its own position, position included; no slot is
    masked. The vector is read at the last slot, as GLIDE does: usually padding, which sees all of
    the caption because nothing is causal, and always the same slot, whatever the caption's length.
    Captions come in CLIP's form, with begin and end; the null caption is all padding, GLIDE's
    empty one.
    """

    config: UnetConfig
    dtype: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, text: Array) -> tuple[Array, Array]:
        """[B, T] int32 -> ([B, 4 width], [B, T, text_width])."""
        c, dtype = self.config, self.dtype

        def table(name: str, rows: int, axis: str, std: float) -> Array:
            init = partition.param_with_axes(nn.initializers.normal(std), (axis, axes.EMBED))
            made = self.param(name, init, (rows, c.text_width), dtype.param)
            return partition.whole(made.astype(dtype.compute))

        tokens = table("tokens", c.vocab_size, axes.VOCAB, 1.0)
        positions = table("positions", c.text_len, axes.POSITIONS, 0.5)
        padding = table("padding", c.text_len, axes.POSITIONS, 1.0)
        x = jnp.where((text == 0)[..., None], padding[None], tokens[text] + positions[None])
        stack = c.text_encoder(dtype)
        x = transformer.Transformer(stack, (None,) * c.text_layers, name="transformer")(x)
        x = transformer.Norm("layer", dtype, name="norm_final")(x)
        names = (axes.EMBED, axes.CONV_OUT)
        kinds = dict(names=names, dtype=dtype.compute, param_dtype=dtype.param)
        pooled = blocks.Linear(c.text_width, c.step_width, name="pooled", **kinds)(x[:, -1])
        return pooled, x


class Condition(nn.Module):
    """Caption and embedding to what is added to the step, and to the tokens that attention sees."""

    config: UnetConfig
    dtype: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, cond: Batch) -> tuple[Array, Array]:
        """See `unet_plan.cond_spec` -> ([B, 4 width], [B, S, text_width])."""
        c, dtype = self.config, self.dtype
        added, context = [], []
        if c.clip_width:
            kinds = dict(dtype=dtype.compute, param_dtype=dtype.param)
            init = nn.initializers.normal(c.clip_width**-0.5)
            null = partition.param_with_axes(init, (axes.JOINT,))
            null = self.param("null_clip", null, (c.clip_width,), dtype.param)
            z = jnp.where(cond["has_clip"][:, None], cond["clip"], null[None])
            z = z * c.clip_width**0.5  # numbers of variance 1, as the layers' inputs are
            wide = c.clip_tokens * c.text_width
            added.append(blocks.Linear(c.clip_width, c.step_width, name="clip_step", **kinds)(z))
            tokens = blocks.Linear(c.clip_width, wide, name="clip_context", **kinds)(z)
            context.append(tokens.reshape(-1, c.clip_tokens, c.text_width))
        if c.text_layers:
            pooled, tokens = TextEncoder(c, dtype, name="text")(cond["text"])
            added.append(pooled)
            context.append(tokens)
        # In front of the caption, as Karlo has them; attention does not see the order.
        return sum(added), jnp.concatenate(context, axis=1)


class Unet(nn.Module):
    """The network.

    Attributes:
      config: sizes.
      dtype: parameters, compute, islands.
    """

    config: UnetConfig
    dtype: DtypePolicy = DtypePolicy()

    def setup(self):
        """Declares the encoder of caption and embedding, where there are any."""
        if self.config.context_len:
            self.condition = Condition(self.config, self.dtype)

    def encode(self, cond: Batch) -> Batch:
        """The same conditions with caption and embedding encoded, once for all steps of a drawing.

        Returns:
          `cond` without text, clip and has_clip, with step [B, 4 width] and context
          [B, S, text_width]; `__call__` takes it instead.
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
          t: [B] int32 steps of training, also where sampling takes fewer.
          cond: what the config asks for, [B, …] each; see `unet_plan.cond_spec`:
            text [B, T] int32 (all 0 = no caption);
            clip [B, E] float32 of unit length, and has_clip [B] bool: False = the learned null;
            low_res [B, l, l, 3] float in [-1, 1], of any size, stretched to h (bilinear, as ADM);
            picture [B, h, h, 3] and known [B, h, h, 1] bool: what inpainting keeps, elsewhere it
            is not looked at.
            Or what `encode` made of it.
          key: draws dropout; None = none.

        Returns:
          [B, h, h, 3 or 6] float32.

        Raises:
          UsageError: for a side that cannot be halved often enough.
          ValueError: for missing or foreign conditions.
        """
        c, dtype = self.config, self.dtype
        _check(c, x, cond)
        kinds = dict(dtype=dtype.compute, param_dtype=dtype.param)
        first = c.channel_mults[0] * c.width
        down, middle, up = unet_plan.plan(c)
        places = len(down + middle + up)
        keys = [None] * places if key is None else list(jax.random.split(key, places))
        res, attend = blocks.ResBlock, blocks.AttentionBlock
        if c.remat == "full":
            res, attend = nn.remat(res), nn.remat(attend)

        cond = cond if "step" in cond else self.encode(cond)
        context = cond.get("context")
        step = blocks.step_features(t, c.width)
        step = blocks.Linear(c.width, c.step_width, name="step_1", **kinds)(step)
        step = blocks.Linear(c.step_width, c.step_width, name="step_2", **kinds)(jax.nn.silu(step))
        step = jax.nn.silu(step + cond.get("step", 0))

        def block(place: Place, h: Array) -> Array:
            sizes = (place.in_features, place.features, place.resample, c.dropout, dtype)
            h = res(*sizes, name=place.name)(h, step, keys.pop())
            if place.attends:
                sizes = (place.features, c.head_width, c.text_width if c.context_len else 0, dtype)
                h = attend(*sizes, name=f"{place.name}_attention")(h, context)
            return h

        if c.low_res:
            low = cond["low_res"].astype(jnp.float32)
            if low.shape != x.shape:
                low = jax.image.resize(low, x.shape, "bilinear")
            x = jnp.concatenate([x, low.astype(x.dtype)], axis=-1)
        h = conv.to_patches(x, c.patch_px)
        h = conv.Conv(h.shape[-1], first, 3, name="stem", **kinds)(h)
        if c.inpaint:
            known = cond["known"].astype(x.dtype)
            seen = jnp.concatenate([cond["picture"] * known, known], axis=-1)
            seen = conv.to_patches(seen, c.patch_px)
            # Zero at the start: a plain decoder with these zeros added is the same function.
            h += conv.Conv(seen.shape[-1], first, 3, gain=0.0, name=KNOWN_STEM, **kinds)(seen)
        h = blocks.laid_out(h)
        kept = [h]
        for place in down:
            h = block(place, h)
            kept.append(h)
        for place in middle:
            h = block(place, h)
        for place in up:
            h = h if place.resample else jnp.concatenate([h, kept.pop()], axis=-1)
            h = block(place, h)
        h = blocks.GroupNorm(first, dtype=dtype, name="norm_out")(h)
        out = c.patch_px**2 * c.out_channels
        h = conv.Conv(first, out, 3, gain=0.0, name="out", **kinds)(h)
        return conv.from_patches(h, c.patch_px).astype(dtype.accum)


def null_cond(cond: Batch) -> Batch:
    """The same conditions without caption and embedding: what guidance leads away from."""
    made = dict(cond)
    if "text" in cond:
        made["text"] = jnp.zeros_like(cond["text"])
    if "clip" in cond:
        made["has_clip"] = jnp.zeros_like(cond["has_clip"])
    return made


def widen(params: Params, fresh: Params) -> Params:
    """An inpainting network's parameters that do what a plain one's do.

    Args:
      params: of a U-Net without `inpaint`, host arrays.
      fresh: of one with, otherwise the same config; shapes will do.

    Returns:
      `params` and the part of `fresh` that sees picture and mask, which is zero.

    Raises:
      UsageError: if the two differ in anything else.
    """
    added = {name: fresh[name] for name in fresh if name not in params}
    if set(added) != {KNOWN_STEM} or set(params) - set(fresh):
        raise UsageError(
            "only a U-Net that differs by loss.inpaint=true can be widened; these differ in "
            f"{sorted(set(fresh) ^ set(params))[:3]}."
        )
    return {
        **params,
        KNOWN_STEM: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), added[KNOWN_STEM]),
    }


def _check(c: UnetConfig, x: Array, cond: Batch) -> None:
    if x.ndim != 4 or x.shape[1] != x.shape[2] or x.shape[3] != 3:
        raise ValueError(f"x has shape {x.shape}; expected square pictures [B, h, h, 3].")
    unet_plan.check_px(c, x.shape[1])
    wanted = unet_plan.cond_spec(c, len(x), x.shape[1])
    if "step" in cond:
        wanted = {name: spec for name, spec in wanted.items() if name not in ENCODED}
        cond = {name: value for name, value in cond.items() if name not in ("step", "context")}
    if set(cond) != set(wanted):
        raise ValueError(f"conditions are {sorted(cond)}; this network takes {sorted(wanted)}.")
    for name, spec in wanted.items():
        if cond[name].shape != spec.shape and name != "low_res":
            raise ValueError(f"{name} has shape {cond[name].shape}; expected {spec.shape}.")
