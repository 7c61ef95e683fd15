"""DALL-E's objective: the transformer learns codes of a frozen codec after their caption.

Images become codes inside the step (argmax, no noise), or come from the prepared set when
`stages.from_codes` says that it stores them. The codec's own image size and the data's must
agree; grid and codebook size come from the codec, never from the config.

Source: Ramesh et al. 2021 (arXiv:2102.12092), §2.2: argmax codes without Gumbel noise, text and
image cross-entropy weighted 1/8 and 7/8.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax import config as cfg
from dalle_jax import images
from dalle_jax.engine import task
from dalle_jax.engine.task import Output, Task
from dalle_jax.models import build, dalle
from dalle_jax.nn import partition
from dalle_jax.sampling import autoregressive
from dalle_jax.stages import by_shape, run
from dalle_jax.stages.codec import Codec
from dalle_jax.stages.dalle import DalleStage
from dalle_jax.types import Array, Key, Params, UsageError

NAME = "dalle"
PREVIEW_CAPTIONS = 6
PREVIEW_CANDIDATES = 4


def make(config: cfg.ConfigDict, read_tokenizer=None, *, shapes_only: bool = False) -> Task:
    """The task that trains a DALL-E on top of the codec in `config.stages.dvae`.

    Args:
      config: with the sections of configs/dalle.py.
      read_tokenizer: () -> the run's tokenizer, whose ids must fit `data.vocab_size`; None in dry
        runs.
      shapes_only: for plans and dry runs: without a `stages.dvae` the codec is the one that
        `stages.dvae_config` describes, without weights.

    Raises:
      UsageError: for a missing codec, or values that do not fit together.
    """
    tokenizer = read_tokenizer and read_tokenizer()
    _check(config, tokenizer, shapes_only)
    codec = by_shape.codec(config) if shapes_only else Codec.load(config.stages.dvae)
    codec.check_px(config)
    return assemble(config, codec, tokenizer)


def assemble(config: cfg.ConfigDict, codec: Codec, tokenizer=None) -> Task:
    """`make` for a codec that is already loaded."""
    model = build.dalle(config, codec.grid, codec.num_codes)
    c, data = model.config, config.data
    text_spec = jax.ShapeDtypeStruct((data.batch, data.text_len), jnp.int32)
    if config.stages.from_codes:
        spec = {"codes": jax.ShapeDtypeStruct((data.batch, c.num_image_tokens), jnp.int32)}
    else:
        shape = (data.batch, data.image_px, data.image_px, 3)
        spec = {"image": jax.ShapeDtypeStruct(shape, jnp.uint8)}

    def init(key: Key) -> tuple[Params, None]:
        text = jnp.zeros((1, c.text_len), jnp.int32)
        codes = jnp.zeros((1, c.num_image_tokens), jnp.int32)
        return model.init(key, text, codes)["params"], None

    def codes_of(frozen: Params, batch) -> Array:
        if "codes" in batch:
            return batch["codes"]
        encode = partition.in_chunks(codec.encode_fn, config.stages.encode_chunk)
        codes = encode(frozen, images.to_float(batch["image"]))
        return jax.lax.stop_gradient(codes.reshape(len(codes), -1))

    def losses(params, frozen, batch, key):
        codes = codes_of(frozen, batch)
        logits = model.apply({"params": params}, batch["text"], codes, key)
        return dalle.loss(*logits, batch["text"], codes)

    def loss(params, extra, frozen, batch, key, step):
        del step
        total, metrics = losses(params, frozen, batch, key if c.transformer.dropout else None)
        return total, Output(metrics, extra)

    def evaluate(params, extra, frozen, batch, key):
        del extra, key
        return losses(params, frozen, batch, None)[1]

    codes_jit = jax.jit(codes_of)

    def preview(params, extra, frozen, batch, key):
        """A strip per caption: the reconstruction of its own picture, then samples."""
        del extra
        few = {name: value[:PREVIEW_CAPTIONS] for name, value in batch.items()}
        own = codes_jit(frozen, few)
        samples = autoregressive.sample(
            model, params, few["text"], num_candidates=PREVIEW_CANDIDATES, key=key
        )
        own, samples = task.to_host((own, samples))
        rows = np.concatenate([own[:, None], samples], axis=1)
        pictures = codec.decode(rows.reshape(-1, c.num_image_tokens))  # [n * k, h, w, 3]
        h, w = pictures.shape[1:3]
        strips = np.asarray(pictures).reshape(len(rows), -1, h, w, 3).swapaxes(1, 2)
        return {"own_then_samples": strips.reshape(len(rows), h, -1, 3)}

    return Task(
        name=NAME,
        batch_spec={"text": text_spec, **spec},
        init=init,
        loss=loss,
        frozen=None if config.stages.from_codes else codec.frozen_encoder(),
        preview=preview,
        evaluate=evaluate,
        flops=3 * data.batch * dalle.flops(c),
        decay_mask=None,
        warm_start=_warm_start(config, init),
        unit=("tokens", c.length),
        keeps=run.identity_files(tokenizer, codec=codec),
    )


def _check(config: cfg.ConfigDict, tokenizer, shapes_only: bool) -> None:
    data = config.data
    if not config.stages.dvae and not shapes_only:
        raise UsageError(
            "stages.dvae is empty; a DALL-E needs a trained codec: give its workdir with "
            "--config.stages.dvae=DIR."
        )
    if data.add_bos_eos:
        raise UsageError(
            "data.add_bos_eos=True, but DALL-E's stream has neither; "
            "set --config.data.add_bos_eos=false."
        )
    if tokenizer is not None and tokenizer.vocab_size > data.vocab_size:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, but data.vocab_size is "
            f"{data.vocab_size}; set --config.data.vocab_size={tokenizer.vocab_size}."
        )


def _warm_start(config: cfg.ConfigDict, init):
    """`init_from`: the weights of another DALL-E of the same shape; None without."""
    if not config.init_from:
        return None
    stored = DalleStage.load(config.init_from, codec=config.stages.dvae).params
    if run.same_shapes(jax.eval_shape(init, jax.random.key(0))[0], stored):
        raise UsageError(
            f"init_from={config.init_from!r} has other shapes than this config; use the same "
            "model sizes, text_len, vocab_size and codec."
        )
    return lambda params, extra: (stored, extra)
