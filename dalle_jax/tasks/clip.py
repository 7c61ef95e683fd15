"""CLIP's objective: the symmetric contrastive loss over the global batch.

Every picture is scored against every caption of the whole batch, on however many devices it
lies: image rows stay where they are, caption embeddings are gathered (B x E numbers, the only
traffic), and each device computes its rows of the B x B logits.

Source: Radford et al. 2021 (arXiv:2103.00020) §2.3 and figure 3. Deliberate differences, both
options: identical captions inside a batch do not count as negatives of one another
(`loss.mask_duplicates`; among 32,768 web captions they are rare, in a small grammar they are
not), and a part of the pictures can be passed through a frozen codec (`loss.recon_prob`), so that
a reranker has seen what decoders draw.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax import axes, images
from dalle_jax import config as cfg
from dalle_jax.engine import task
from dalle_jax.engine.task import Output, Task
from dalle_jax.models import build, clip
from dalle_jax.nn import partition
from dalle_jax.stages import by_shape, run
from dalle_jax.stages.clip import ClipStage
from dalle_jax.stages.codec import Codec
from dalle_jax.tasks import captions
from dalle_jax.types import Array, Params, UsageError

# Cosines are at most 1 and exp(logit_scale) at most 100: this is below every real logit, and
# finite, so that a row whose negatives are all duplicates has no NaN.
_EXCLUDED = -1e9
_PREVIEW_CAPTIONS, _PREVIEW_BEST = 6, 4


def make(config: cfg.ConfigDict, read_tokenizer=None, *, shapes_only: bool = False) -> Task:
    """The task that trains a CLIP.

    Args:
      config: with the sections of configs/clip.py.
      read_tokenizer: () -> the run's tokenizer, whose ids must fit `data.vocab_size`; None in dry
        runs.
      shapes_only: for plans and dry runs: without a `stages.dvae` the codec is the one that
        `stages.dvae_config` describes, without weights.

    Raises:
      UsageError: for values that do not fit together.
    """
    tokenizer = read_tokenizer and read_tokenizer()
    _check(config, tokenizer, shapes_only)
    model = build.clip(config)
    codec = _codec(config, shapes_only)
    data, batch = config.data, config.data.batch
    picture = jax.ShapeDtypeStruct((batch, data.image_px, data.image_px, 3), jnp.uint8)
    caption = jax.ShapeDtypeStruct((batch, data.text_len), jnp.int32)

    def init(key):
        pictures = jnp.zeros((1, data.image_px, data.image_px, 3))
        return model.init(key, pictures, jnp.zeros((1, data.text_len), jnp.int32))["params"], None

    def embed(params, pictures, text):
        return model.apply({"params": params}, pictures, text)

    def loss(params, extra, frozen, batch, key, step):
        pictures = images.to_float(batch["image"])
        if codec is not None:
            pictures = reconstruct_some(codec, frozen, pictures, config.loss.recon_prob)
        image, text, logit_scale = embed(params, pictures, batch["text"])
        tokens = batch["text"] if config.loss.mask_duplicates else None
        scalar, metrics = contrastive(image, text, clamp(logit_scale), tokens)
        return scalar, Output({"loss": scalar, **metrics}, extra)

    def evaluate(params, extra, frozen, batch, key):
        image, text, logit_scale = embed(params, images.to_float(batch["image"]), batch["text"])
        # Two pictures of one caption are both right answers, whatever the training loss says.
        scalar, metrics = contrastive(image, text, clamp(logit_scale), batch["text"])
        return {
            "loss": scalar,
            "recall1_image_to_text": metrics["accuracy_image_to_text"],
            "recall1_text_to_image": metrics["accuracy_text_to_image"],
            "recall1_chance": jnp.float32(1 / len(batch["text"])),
        }

    embed_jit = jax.jit(embed)

    def preview(params, extra, frozen, batch, key):
        pictures = images.to_float(batch["image"])
        image, text, _ = embed_jit(params, pictures, batch["text"])
        return {"own_then_best_matches": best_matches(*task.to_host((pictures, image, text)))}

    return Task(
        name="clip",
        batch_spec={"image": picture, "text": caption},
        init=init,
        loss=loss,
        frozen=None if codec is None else codec.frozen(),
        preview=preview,
        evaluate=evaluate,
        flops=3 * (batch * clip.flops(model.config) + 2 * batch**2 * model.config.joint_width),
        decay_mask=decay_mask,
        warm_start=_warm_start(config, init),
        keeps=run.identity_files(tokenizer, codec=codec),
    )


def contrastive(
    image: Array, text: Array, logit_scale: Array, tokens: Array | None = None
) -> tuple[Array, dict[str, Array]]:
    """The mean of the cross-entropies of picture to caption and of caption to picture.

    Args:
      image: [B, E] float32, unit length; may be sharded over B.
      text: [B, E] float32, unit length; row b belongs to picture b.
      logit_scale: float32 scalar, log of the inverse temperature, already clamped.
      tokens: [B, T] int32 to leave identical captions out of each other's negatives; None = every
        other caption is a negative.

    Returns:
      (float32 scalar, metrics: accuracies both ways and logit_scale as the factor that is used).
    """
    image = partition.constrain(image, axes.ACT_BATCH, None)
    everybody = partition.constrain(text, None, None)  # the one gather
    logits = jnp.exp(logit_scale) * jnp.einsum("BE,SE->BS", image, everybody)
    logits = partition.constrain(logits, axes.ACT_BATCH, None)
    # Neither a gather of the diagonal nor an argmax over pictures: their parts would travel.
    own = jnp.sum(logits, axis=1, where=jnp.eye(len(image), dtype=bool))
    if tokens is not None:
        logits = jnp.where(captions.duplicates(tokens), _EXCLUDED, logits)
    to_text = jax.nn.logsumexp(logits, axis=1) - own
    to_image = jax.nn.logsumexp(logits, axis=0) - own
    metrics = {
        "accuracy_image_to_text": jnp.mean(own >= logits.max(axis=1)),
        "accuracy_text_to_image": jnp.mean(own >= logits.max(axis=0)),
        "logit_scale": jnp.exp(logit_scale),
    }
    return (to_text.mean() + to_image.mean()) / 2, metrics


@jax.custom_vjp
def clamp(logit_scale: Array) -> Array:
    """min(logit_scale, ln 100), with a gradient that can only push back across the bound.

    The paper clamps the stored parameter after each step, which a loss cannot do. The projected
    gradient here has its effect: at the bound a push outwards is dropped, a push inwards passes,
    and what an optimiser's momentum carries over the bound is pulled back.
    """
    return jnp.minimum(logit_scale, clip.MAX_LOGIT_SCALE)


def _clamp_forward(logit_scale):
    return clamp(logit_scale), logit_scale


def _clamp_backward(logit_scale, gradient):
    over = logit_scale - clip.MAX_LOGIT_SCALE
    return (jnp.where(over < 0, gradient, jnp.maximum(gradient, 0) + over),)


clamp.defvjp(_clamp_forward, _clamp_backward)


def reconstruct_some(codec: Codec, params: Params, pictures: Array, share: float) -> Array:
    """`pictures` [B, h, w, 3] with a share of them replaced by the codec's reconstructions.

    Which ones is fixed, evenly spread over the batch (so also over devices): examples come in
    random order, so a coin per picture would only add the cost of encoding all of them.
    """
    count = round(len(pictures) * share)
    if not count:
        return pictures
    rows = np.floor(np.arange(count) * len(pictures) / count).astype(np.int32)
    copies = codec.decode_fn(params, codec.encode_fn(params, pictures[rows]))
    return pictures.at[rows].set(jax.lax.stop_gradient(copies).astype(pictures.dtype))


def best_matches(pictures: np.ndarray, image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """For the first captions: their own picture, then the best-scoring ones of the batch.

    Args:
      pictures: [B, h, w, 3] float.
      image: [B, E] unit embeddings.
      text: [B, E] unit embeddings.

    Returns:
      [rows * (1 + best), h, w, 3]; a perfect model repeats the first picture as the second.
    """
    scores = text[:_PREVIEW_CAPTIONS] @ image.T
    best = np.argsort(-scores, axis=1, kind="stable")[:, :_PREVIEW_BEST]
    rows = np.concatenate([np.arange(len(best))[:, None], best], axis=1)
    return pictures[rows.reshape(-1)]


def decay_mask(params: Params) -> Params:
    """True where weight decay applies: all but gains, biases, class token and temperature.

    Source: the paper's §2.5, "all weights that are not gains or biases"; embeddings do decay.
    """

    def decays(path, leaf):
        names = [str(getattr(part, "key", "")) for part in path]
        return not any(
            name.endswith("bias") or name in ("scale", "class_embed", "logit_scale")
            for name in names
        )

    return jax.tree_util.tree_map_with_path(decays, params)


def _check(config: cfg.ConfigDict, tokenizer, shapes_only: bool) -> None:
    data = config.data
    if not data.add_bos_eos:
        raise UsageError(
            "data.add_bos_eos=False, but CLIP reads its caption at the end token; "
            "set --config.data.add_bos_eos=true."
        )
    if tokenizer is not None and tokenizer.vocab_size > data.vocab_size:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, but data.vocab_size is "
            f"{data.vocab_size}; set --config.data.vocab_size={tokenizer.vocab_size}."
        )
    if data.batch < 2:
        raise UsageError(f"data.batch={data.batch} leaves no negatives; use 32 or more.")
    if not 0 <= config.loss.recon_prob <= 1:
        raise UsageError(f"loss.recon_prob={config.loss.recon_prob} is not in [0, 1].")
    if config.loss.recon_prob and not config.stages.dvae and not shapes_only:
        raise UsageError(
            f"loss.recon_prob={config.loss.recon_prob} needs a codec; give its workdir with "
            "--config.stages.dvae=DIR, or set --config.loss.recon_prob=0."
        )


def _codec(config: cfg.ConfigDict, shapes_only: bool) -> Codec | None:
    if not config.loss.recon_prob:
        return None
    codec = by_shape.codec(config) if shapes_only else Codec.load(config.stages.dvae)
    codec.check_px(config)
    return codec


def _warm_start(config: cfg.ConfigDict, init):
    """`init_from`: the weights of another CLIP of the same shape; None without."""
    if not config.init_from:
        return None
    stored = ClipStage.load(config.init_from).params
    different = run.same_shapes(jax.eval_shape(init, jax.random.key(0))[0], stored)
    if different:
        raise UsageError(
            f"init_from={config.init_from!r} has other shapes than this config, first "
            f"{different!r}; use the same model and data sizes."
        )
    return lambda params, extra: (stored, extra)
