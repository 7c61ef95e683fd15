"""The cases of `bench`: the networks in configs/bench.py with random weights and random inputs.

All cases run on the first device only. Inputs are sampled once with a fixed seed and stay on the
device; a case's function returns when its result is on the host. cli/bench.py calls them.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax import config as cfg
from dalle_jax import tasks
from dalle_jax.benchmarks.measure import Case
from dalle_jax.data import pipeline, tokenizers
from dalle_jax.engine import flops, sharding
from dalle_jax.engine.program import Program
from dalle_jax.engine.task import Task
from dalle_jax.models import build
from dalle_jax.sampling import autoregressive, prior
from dalle_jax.stages import by_shape
from dalle_jax.stages.prior import PriorStage
from dalle_jax.types import Array, Params

PRIOR_STEPS = 50


def config_of(
    name: str,
    *,
    attention: str = "",
    size: str = "bench",
    changes: dict[str, Any] | None = None,
) -> cfg.ConfigDict:
    """The config of a case.

    Args:
      name: a key of `NETWORKS`.
      attention: kind of attention in the DALL-E cases; "" = full.
      size: "bench", or "smoke" for tests.
      changes: dotted field -> another value.

    Raises:
      UsageError: for values that configs/bench.py refuses.
    """
    config = cfg.load(f"bench:case={name},attention={attention},size={size}")
    return cfg.override(config, changes or {})


def make(name: str, config: cfg.ConfigDict, *, shared_prompt: bool = False) -> Case:
    """A case that runs a network.

    Args:
      name: a key of `NETWORKS`.
      config: the case's config, see `config_of`.
      shared_prompt: in dalle_sample, the batch has candidates of one prompt.
    """
    if name == "dalle_sample":
        return sample(config, shared_prompt=shared_prompt)
    return NETWORKS[name](config)


def train(config: cfg.ConfigDict) -> Case:
    """The training step of a config's task: forward, backward, optimiser, loss on the host."""
    task = tasks.make(config, shapes_only=True)
    program = Program.build(config, task, jax.devices()[:1])
    key = jax.device_put(jax.random.key(config.seed), program.replicated)
    state = program.init(key)
    batch = jax.device_put(_batch(config, task), program.batch_sharding)
    frozen = _noise(program.arguments[1], config.seed)

    def compile():
        with program.use():
            step = program.lower_step().compile()

        def call() -> float:
            nonlocal state
            state, metrics = jax.block_until_ready(step(state, frozen, batch, key))
            loss = float(metrics["loss"])
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss of {config.task} is {loss}.")
            return loss

        return call

    size = config.data.batch
    tokens = size * task.unit[1] if task.unit else 0
    params = _count(state.params)

    def work() -> float:
        with program.use():
            return flops.hardware(program.step, *program.arguments)

    return Case(compile, images=size, tokens=tokens, params=params, flops=work)


def sample(config: cfg.ConfigDict, *, shared_prompt: bool = False) -> Case:
    """Sampling the codes of data.batch pictures, one per prompt or all for one prompt."""
    codec = by_shape.codec(config)
    model = build.dalle(config, codec.grid, codec.num_codes)
    c, size, rng = model.config, config.data.batch, np.random.default_rng(config.seed)
    prompts, candidates = (1, size) if shared_prompt else (size, 1)
    text = jax.device_put(_ids(rng, (prompts, c.text_len), c.vocab_size))
    codes = np.zeros((1, c.num_image_tokens), np.int32)
    params = _init(model, text[:1], codes)["params"]
    key = jax.random.key(config.seed)

    def sample_codes(params: Params, text: Array) -> Array:
        return autoregressive.sample(model, params, text, num_candidates=candidates, key=key)

    return Case(
        lambda: lambda: np.asarray(sample_codes(params, text)),
        images=size,
        tokens=size * c.num_image_tokens,
        params=_count(params),
        flops=lambda: flops.hardware(sample_codes, params, text),
    )


def codec(config: cfg.ConfigDict) -> Case:
    """Pictures to the likeliest codes and back."""
    model = build.autoencoder(config)
    images = _pictures(config)
    variables = _init(model, images[:1])

    def there_and_back(variables: Params, images: Array) -> tuple[Array, Array]:
        codes = model.apply(variables, images, method="encode")
        return codes, model.apply(variables, codes, method="decode_codes")

    params = _count(variables["params"])
    return _compiled(there_and_back, variables, images, params=params)


def score(config: cfg.ConfigDict) -> Case:
    """CLIP's embeddings of pictures and captions, and the similarity of each with each."""
    model = build.clip(config)
    data, rng = config.data, np.random.default_rng(config.seed)
    images = _pictures(config)
    text = _ids(rng, (data.batch, data.text_len), data.vocab_size)
    text[:, -1] = config.model.eos_id
    params = _init(model, images[:1], text[:1])["params"]

    def similarity(params: Params, images: Array, text: Array) -> Array:
        image, caption, logit_scale = model.apply({"params": params}, images, text)
        return jnp.exp(logit_scale) * image @ caption.T  # [B, B]

    return _compiled(similarity, params, images, jax.device_put(text), params=_count(params))


def sample_prior(config: cfg.ConfigDict) -> Case:
    """Sampling one image embedding per caption, data.batch captions: 50 steps, no guidance."""
    task = tasks.make(config, shapes_only=True)
    clip = by_shape.clip(config)
    model = PriorStage.build(config, clip, None)
    params = sharding.unbox(jax.jit(task.init)(jax.random.key(0))[0])
    data, rng = config.data, np.random.default_rng(config.seed)
    text = jax.device_put(_ids(rng, (data.batch, data.text_len), data.vocab_size))
    z_t = rng.normal(size=(data.batch, model.config.joint_width)).astype(np.float32)
    z_t = jax.device_put(z_t / np.linalg.norm(z_t, axis=1, keepdims=True))
    key = jax.random.key(config.seed)

    def sample_embeddings(params: Params, text: Array, z_t: Array) -> Array:
        return prior.sample_diffusion(
            model, params, text, z_t, key=key, steps=PRIOR_STEPS, num_samples=1
        )

    return Case(
        lambda: lambda: np.asarray(sample_embeddings(params, text, z_t)),
        images=data.batch,
        params=_count(params),
        flops=lambda: flops.hardware(sample_embeddings, params, text, z_t),
    )


NETWORKS: dict[str, Callable[[cfg.ConfigDict], Case]] = {
    "dalle_train": train,
    "dalle_sample": sample,
    "dvae_train": train,
    "dvae_codec": codec,
    "clip_train": train,
    "clip_score": score,
    "prior_train": train,
    "prior_sample": sample_prior,
    "unet_train": train,
}


def read(source: str, data_dir: str, *, image_px: int, batch: int, threads: int) -> Case:
    """Batches of a prepared set: reading, decoding, resizing, tokenising; nothing is cached.

    Batches have text if the set has a tokenizer; a benchmark trains none.

    Args:
      source: the set, as in data.source.
      data_dir: folder of the prepared sets.
      image_px: side of the pictures.
      batch: examples per call.
      threads: threads that decode.

    Raises:
      UsageError: if the set is not prepared, or holds fewer than `batch` examples.
    """
    given = dict(source=source, data_dir=data_dir, image_px=image_px, batch=batch)
    changes = {f"data.{key}": value for key, value in given.items()}
    changes |= {"data.cache_mib": 0, "data.threads": threads}
    fields = {"image"}
    for path in sorted(tokenizers.folder(data_dir, source).glob("tokenizer-*.model"))[:1]:
        fields.add("text")
        changes["data.vocab_size"] = int(path.stem.partition("-")[2])
    config = cfg.override(cfg.load("base"), changes)
    batches = pipeline.make(
        config.data,
        config.seed,
        split=config.data.split,
        fields=fields,
        training=True,
        batch=batch,
    )
    numbers = itertools.count()
    return Case(lambda: lambda: batches(next(numbers)), images=batch)


def _compiled(function: Callable, *arguments: Any, params: int) -> Case:
    """`function` with these arguments under jit; the pictures are the second argument."""

    def compile():
        run = jax.jit(function).lower(*arguments).compile()
        return lambda: jax.device_get(run(*arguments))

    work = functools.partial(flops.hardware, function, *arguments)
    return Case(compile, images=len(arguments[1]), params=params, flops=work)


def _noise(shapes: Any, seed: int) -> Any:
    """Random weights in place of trained ones; None for None."""
    rng = np.random.default_rng(seed)

    def normal(spec: jax.ShapeDtypeStruct) -> Array:
        values = 0.02 * rng.standard_normal(spec.shape)
        return jax.device_put(values.astype(spec.dtype), spec.sharding)

    return jax.tree.map(normal, shapes)


def _init(model: Any, *inputs: Array) -> Params:
    """Random variables of a linen module."""
    return sharding.unbox(jax.jit(model.init)(jax.random.key(0), *inputs))


def _count(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _pictures(config: cfg.ConfigDict) -> Array:
    """[B, h, w, 3] float32 in [-1, 1]."""
    rng, data = np.random.default_rng(config.seed), config.data
    images = rng.uniform(-1, 1, (data.batch, data.image_px, data.image_px, 3))
    return jax.device_put(images.astype(np.float32))


def _ids(rng: np.random.Generator, shape: tuple[int, int], num: int) -> np.ndarray:
    """int32 in [1, num): 0 would be padding."""
    return rng.integers(1, num, shape, np.int32)


def _batch(config: cfg.ConfigDict, task: Task) -> dict[str, np.ndarray]:
    """A batch with the task's batch_spec; captions fill their slots, CLIP's end with eos_id."""
    rng, batch = np.random.default_rng(config.seed), {}
    for name, spec in task.batch_spec.items():
        if name == "image":
            batch[name] = rng.integers(0, 256, spec.shape, np.uint8)
        else:
            num = config.data.vocab_size if name == "text" else by_shape.codec(config).num_codes
            batch[name] = _ids(rng, spec.shape, num)
    if "eos_id" in config.model:
        batch["text"][:, -1] = config.model.eos_id
    return batch
