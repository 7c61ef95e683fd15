"""The objective of DALL-E 2's picture networks: the decoder and both upsamplers, by config.

  decoder    learns to draw the picture of an image embedding z_i, which the frozen CLIP makes
             inside the step, and of its caption. Either is dropped, independently: z_i by
             `loss.clip_drop`, the caption by `loss.text_drop`. With the variance (hybrid loss).
  upsampler  where `loss.low_res_px` is above 0: learns the picture from a smaller, corrupted one;
             on random crops of `loss.crop` of the side, and no caption. Without the variance.

`loss.inpaint` shows either the known part of the picture beside it.

Timesteps are drawn for each example. Metrics are averages over examples and steps; mse_q1 to mse_q4
are of the quarters of the steps, q1 the least noisy one.

Source: Ramesh et al. 2022 (arXiv:2204.06125) §2.1 and appendix C; the hybrid loss Nichol & Dhariwal
2021 (arXiv:2102.09672). How an upsampler's input comes about: tasks/conditions.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax import config as cfg
from dalle_jax import images
from dalle_jax.diffusion import gaussian, schedules
from dalle_jax.engine import task
from dalle_jax.engine.task import Output, Task
from dalle_jax.models import build, unet
from dalle_jax.sampling import diffusion
from dalle_jax.stages import by_shape, run
from dalle_jax.stages.clip import ClipStage
from dalle_jax.stages.run import Run
from dalle_jax.tasks import conditions
from dalle_jax.types import Array, Batch, Key, Params, UsageError

NAME = "diffusion"
PREVIEW_ROWS = 6
PREVIEW_SAMPLES = 2
QUARTERS = 4


def make(config: cfg.ConfigDict, read_tokenizer=None, *, shapes_only: bool = False) -> Task:
    """The task that trains a decoder on the embeddings of `config.stages.clip`, or an upsampler.

    Args:
      config: with the sections of configs/decoder.py or configs/upsampler.py.
      read_tokenizer: () -> the run's tokenizer, which must be the CLIP's; None in dry runs.
      shapes_only: for plans and dry runs: without a `stages.clip` the CLIP is the one that
        `stages.clip_config` describes, without weights.

    Raises:
      UsageError: for a missing CLIP, or values that do not fit together.
    """
    if config.loss.low_res_px:
        return assemble(config)
    if not config.stages.clip and not shapes_only:
        raise UsageError(
            "stages.clip is empty; a decoder needs a trained CLIP: give its workdir with "
            "--config.stages.clip=DIR."
        )
    clip = by_shape.clip(config) if shapes_only else ClipStage.load(config.stages.clip)
    return assemble(config, clip, read_tokenizer and read_tokenizer())


def assemble(config: cfg.ConfigDict, clip: ClipStage | None = None, tokenizer=None) -> Task:
    """`make` for a CLIP that is already loaded; None = an upsampler."""
    data, loss_config = config.data, config.loss
    if clip is not None:
        clip.check_reading(config, tokenizer)
    model = build.unet(config, 0 if clip is None else clip.joint_width)
    conditions.check(config, model.config)
    c, px = model.config, data.image_px
    schedule = schedules.make(loss_config.schedule, loss_config.num_steps)
    p = diffusion.parameterisation(c)

    def init(key: Key) -> tuple[Params, None]:
        # The side plays no part in the shapes of the parameters; the smallest is the fastest.
        spec = unet.cond_spec(c, 1, c.stride)
        cond = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), spec)
        pictures = jnp.zeros((1, c.stride, c.stride, 3))
        return model.init(key, pictures, jnp.zeros((1,), jnp.int32), cond)["params"], None

    def condition(frozen: Params, batch: Batch, key: Key, *, training=False, crop=1.0):
        """(x_0, cond): the pictures to draw, and what the network is shown of them."""
        pictures = images.to_float(batch["image"])
        keys = jax.random.split(key, 3)
        if clip is None:
            x_0, cond = conditions.upsampling(loss_config, pictures, crop, keys[0])
        else:
            x_0, z = pictures, clip.image_embeddings(frozen, pictures)
            has_clip, text = jnp.ones(len(z), bool), batch["text"]
            if training:
                has_clip, text = conditions.drop(loss_config, has_clip, text, keys[1])
            cond = {"clip": z, "has_clip": has_clip}
            cond |= {"text": text} if c.text_encoder else {}
        return x_0, cond | (conditions.inpainting(x_0, keys[2]) if c.inpaint else {})

    def losses(params, frozen, batch, t, key, *, training):
        cond_key, noise_key, dropout_key = jax.random.split(key, 3)
        x_0, cond = condition(frozen, batch, cond_key, training=training, crop=loss_config.crop)
        # Flat: XLA's CPU compiler takes seconds over a rank-4 draw.
        eps = jax.random.normal(noise_key, (x_0.size,)).reshape(x_0.shape)
        x_t = gaussian.q_sample(schedule, x_0, t, eps)
        drops = dropout_key if training and c.dropout else None
        output = model.apply({"params": params}, x_t, t, cond, drops)
        each = gaussian.losses(p, schedule, output, x_0, t, eps)
        if loss_config.snr_cap:
            weight = gaussian.capped_weight(p.predicts, schedule, t, loss_config.snr_cap)
            each["loss"] += (weight - 1) * each["mse"]
        power = loss_config.time_power if training else 1.0
        return jnp.mean(each["loss"]), averages(each, t, schedule.num_steps, power)

    def loss(params, extra, frozen, batch, key, step):
        del step
        step_key, key = jax.random.split(key)
        t = conditions.steps(loss_config, step_key, len(batch["image"]))
        total, metrics = losses(params, frozen, batch, t, key, training=True)
        return total, Output(metrics, extra)

    def evaluate(params, extra, frozen, batch, key):
        """With all conditions, at steps spread evenly over the batch: less noise than by chance."""
        del extra
        step_key, key = jax.random.split(key)
        count = len(batch["image"])
        places = (jnp.arange(count) + jax.random.uniform(step_key, (count,))) / count
        t = jnp.minimum((places * schedule.num_steps).astype(jnp.int32), schedule.num_steps - 1)
        return losses(params, frozen, batch, t, key, training=False)[1]

    steps = schedules.respace(schedule, loss_config.preview_spacing)
    shown = jax.jit(condition)  # whole pictures

    def preview(params, extra, frozen, batch, key):
        """A strip per picture; see the grids' names."""
        del extra
        few = {name: value[:PREVIEW_ROWS] for name, value in batch.items()}
        own, cond = task.to_host(shown(frozen, few, key))
        params = jax.device_put(task.to_host(params))

        def sample(cond, first, scale):
            return diffusion.sample(
                model, params, cond, schedule=steps, key=key, scale=scale,
                indices=first * len(own) + np.arange(len(own)), px=own.shape[1],
            )  # fmt: skip

        if clip is None:
            columns = {"small_drawn_own": [cond["low_res"], sample(cond, 0, 1.0), own]}
        else:
            guided = loss_config.preview_guidance
            samples = [sample(cond, i, guided) for i in range(PREVIEW_SAMPLES)]
            columns = {"own_then_samples": [own, *samples]}
            if c.text_encoder:
                alone = cond | {"has_clip": np.zeros_like(cond["has_clip"])}
                samples.append(sample(alone, PREVIEW_SAMPLES, guided))
                columns = {"own_then_samples_then_by_caption_alone": [own, *samples]}
        return {name: strips(each) for name, each in columns.items()}

    crop = round(px * loss_config.crop)
    spec = {"image": jax.ShapeDtypeStruct((data.batch, px, px, 3), jnp.uint8)}
    if clip is not None:
        spec["text"] = jax.ShapeDtypeStruct((data.batch, data.text_len), jnp.int32)
    return Task(
        name=NAME,
        batch_spec=spec,
        init=init,
        loss=loss,
        frozen=None if clip is None else clip.frozen_image_tower(),
        preview=preview,
        evaluate=evaluate,
        flops=3 * data.batch * unet.flops(c, crop),
        warm_start=_warm_start(config, c, clip, init),
        keeps={} if clip is None else run.identity_files(tokenizer, clip=clip),
    )


def averages(
    each: dict[str, Array], t: Array, num_steps: int, power: float = 1.0
) -> dict[str, Array]:
    """Means of the losses of the examples, and of each quarter of the steps.

    Args:
      each: of `gaussian.losses`, [B] each.
      t: [B] steps.
      num_steps: of the process.
      power: `loss.time_power` by which t was drawn.

    A quarter's mean is the batch's sum of what lies in it over the count that is expected there:
    right on average, also where a small batch has nothing of a quarter.
    """
    metrics = {name: jnp.mean(value) for name, value in each.items()}
    quarter = t * QUARTERS // num_steps
    for q in range(QUARTERS):
        share = ((q + 1) / QUARTERS) ** (1 / power) - (q / QUARTERS) ** (1 / power)
        metrics[f"mse_q{q + 1}"] = jnp.mean(each["mse"] * (quarter == q)) / share
    return metrics


def strips(columns: list[Array]) -> np.ndarray:
    """Pictures [n, h, w, 3] side by side: [n, h, w columns, 3]."""
    return np.concatenate([np.asarray(column) for column in columns], axis=2)


def _warm_start(config: cfg.ConfigDict, c: unet.UnetConfig, clip, init):
    """`init_from`: a run of the same sizes, or the plain one that learns to inpaint.

    The former may have been trained with another CLIP.
    """
    if not config.init_from:
        return None
    stored = Run.open(config.init_from, NAME)
    # Learning to inpaint takes minutes, so the meaning of the embeddings must be known already. A
    # whole run learns the meaning of another CLIP's embeddings anew and keeps what it has learnt of
    # pictures.
    if clip is not None and c.inpaint:
        clip.check_trained_on(config.init_from)
    params = stored.variables["params"]
    fresh = nn.meta.unbox(jax.eval_shape(init, jax.random.key(0))[0])
    if c.inpaint and not stored.config.loss.inpaint:
        params = unet.widen(params, fresh)
    different = run.same_shapes(fresh, params)
    if different:
        raise UsageError(
            f"init_from={config.init_from!r} has other shapes than this config, first "
            f"{different!r}; use the same model and data sizes, and a CLIP of the same joint width."
        )
    return lambda _, extra: (params, extra)
