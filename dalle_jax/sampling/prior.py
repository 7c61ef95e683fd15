"""Samples CLIP image embeddings for captions: both priors, each one compiled program per shape.

The stream of a prior is causal and begins with the caption and its CLIP embedding. This stem runs
through the network once per prompt, and all steps, tokens and samples share its keys and values.
With guidance the stem of the nulls, the same for all prompts, runs once per call. The diffusion
prior then computes 3 positions for each step and sample, the autoregressive one 1 position for
each dimension.

All noise is a function of (key, global index of the prompt, sample, step or dimension), so an
embedding is the same alone, in any batch and on any number of devices. Inputs that are sharded
over devices stay sharded.

Source: Ramesh et al. 2022 (arXiv:2204.06125) §2.2.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dalle_jax.diffusion import gaussian, guidance, samplers, schedules
from dalle_jax.models import clip, prior_ar, prior_diffusion
from dalle_jax.nn import attention, kv_cache, partition, stack
from dalle_jax.sampling import categorical
from dalle_jax.stages import pca
from dalle_jax.types import Array, Key, Params, UsageError

SAMPLERS = ("ddpm", "ddim")
PAPER_STEPS = 64
NUM_SAMPLES = 2  # per caption; the result is the one with the highest z_i . z_t
_DOT = 2**31 - 1  # folded into the key for the dot product, as dimensions are for theirs


def sample_diffusion(
    model: prior_diffusion.DiffusionPrior,
    params: Params,
    text: Array,
    z_t: Array,
    *,
    key: Key,
    steps: schedules.Spacing = PAPER_STEPS,
    sampler: str = "ddpm",
    eta: float = 0.0,
    guidance_scale: float = 1.0,
    num_samples: int = NUM_SAMPLES,
    first: int = 0,
) -> Array:
    """One image embedding per caption: of num_samples samples the one with the highest z_i . z_t.

    Args:
      model: the network.
      params: its parameters, without the collection level.
      text: [B, T] int32 in CLIP's form.
      z_t: [B, E] float32, the CLIP embeddings of the captions, of unit length.
      key: typed key.
      steps: number of steps, or another spacing of `diffusion.schedules`.
      sampler: "ddpm" (ancestral) or "ddim" (at eta 0 deterministic after the initial noise).
      eta: share of DDPM's noise in ddim.
      guidance_scale: scale of classifier-free guidance; 1 = off, 0 ignores the text.
      num_samples: samples per caption.
      first: global index of the first caption, for sampling in chunks.

    Returns:
      [B, E] float32 of unit length.

    Raises:
      UsageError: for an option out of range.

    Source: the paper's sampler is Analytic-DPM with 64 strided steps; here it is ancestral. Guided
    estimates of x_0 can be longer than any embedding. They are shortened to the length of an
    embedding, because the mean of points on a sphere is inside the sphere.
    """
    if sampler not in SAMPLERS:
        raise UsageError(f"sampler {sampler!r} is unknown; use one of {', '.join(SAMPLERS)}.")
    if not 0 <= eta <= 1:
        raise UsageError(f"eta={eta}; expected 0 (no noise) to 1 (as much as DDPM).")
    _check(guidance_scale, num_samples)
    c = model.config
    schedule = schedules.respace(schedules.make(c.schedule, c.num_steps), steps)
    return _sample_diffusion(
        model,
        params,
        jnp.asarray(text, jnp.int32),
        jnp.asarray(z_t, jnp.float32),
        key,
        dict(
            first=first,
            eta=None if sampler == "ddpm" or eta == 0 else eta,
            guidance=float(guidance_scale) if guidance_scale != 1 else None,
        ),
        schedule=schedule,
        sampler=sampler,
        num_samples=num_samples,
    )


def sample_ar(
    model: prior_ar.ArPrior,
    params: Params,
    tables: dict[str, Array],
    text: Array,
    z_t: Array,
    *,
    key: Key,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance_scale: float = 1.0,
    dot_range: tuple[float, float] = (0.5, 1.0),
    num_samples: int = 1,
    first: int = 0,
    use_cache: bool = True,
) -> Array:
    """One image embedding per caption, sampled dimension by dimension.

    Args:
      model: the network.
      params: see `sample_diffusion`.
      tables: `Pca.tables` for the model's number of dimensions.
      text: see `sample_diffusion`.
      z_t: see `sample_diffusion`.
      key: typed key.
      temperature: 0 = always the likeliest bucket; 1 = the model's own distribution.
      top_k: sample from the k likeliest buckets; 0 = off.
      top_p: sample from the smallest set of likeliest buckets with this mass; 1 = off.
      guidance_scale: see `sample_diffusion`.
      dot_range: quantiles of the distribution of dot products over training pairs; the dot product
        of each sample is from this range. The default is the paper's "top half".
      num_samples: see `sample_diffusion`; 1, because the dot product is already high.
      first: see `sample_diffusion`.
      use_cache: False runs the full stream for every dimension; the slow reference.

    Returns:
      [B, E] float32 of unit length.

    Raises:
      UsageError: for an option out of range.
    """
    c = model.config
    _check(guidance_scale, num_samples)
    categorical.check(temperature, top_k, top_p, guidance_scale, c.num_buckets)
    low, high = (round(share * c.num_buckets) for share in dot_range)
    if not 0 <= low < high <= c.num_buckets:
        raise UsageError(f"dot_range={dot_range}; expected two rising quantiles in [0, 1].")
    return _sample_ar(
        model,
        params,
        tables,
        jnp.asarray(text, jnp.int32),
        jnp.asarray(z_t, jnp.float32),
        key,
        dict(
            first=first,
            temperature=float(temperature),
            k=int(top_k) if top_k else None,
            p=float(top_p) if top_p < 1 else None,
            guidance=float(guidance_scale) if guidance_scale != 1 else None,
            dots=(low, high),
        ),
        num_samples=num_samples,
        use_cache=use_cache,
    )


def sample(
    model: Any,
    params: Params,
    tables: dict[str, Array] | None,
    text: Array,
    z_t: Array,
    *,
    key: Key,
    **options,
) -> Array:
    """`sample_diffusion`, or `sample_ar` where there are the tables of a PCA."""
    if tables is None:
        return sample_diffusion(model, params, text, z_t, key=key, **options)
    return sample_ar(model, params, tables, text, z_t, key=key, **options)


@functools.partial(jax.jit, static_argnames=("model", "schedule", "sampler", "num_samples"))
def _sample_diffusion(
    model, params, text, z_t, key, options, *, schedule, sampler, num_samples
) -> Array:
    """See `sample_diffusion`. An option that is None is static, and its step is not compiled."""
    c, b, n = model.config, len(text), num_samples
    guided = options["guidance"] is not None
    apply = functools.partial(model.apply, {"params": params})
    with partition.unconstrained():
        layers, stem = _stem(model, params, text, z_t, guided)
        allowed = _tails(c.text_len + 1, n)

        def predict(x: Array, t: Array) -> Array:
            tail = apply(x.reshape(b, n, -1), t.reshape(b, n), method="tail")  # [B, N, 3, D]
            x = tail.swapaxes(1, 2)  # times, then noised embeddings, then queries
            x = x.reshape(b, -1, c.transformer.width)
            x = guidance.pair(x, x) if guided else x
            for i, (layer, (k, v)) in enumerate(zip(layers, stem, strict=True)):
                num_out = n if i == len(layers) - 1 else 0

                def attend(q, own_k, own_v, k=k, v=v, num_out=num_out):
                    keys = jnp.concatenate([k, own_k], axis=1)
                    values = jnp.concatenate([v, own_v], axis=1)
                    return attention.attention(q, keys, values, allowed[-num_out:]), None

                settings = (c.transformer, model.dtype)
                x, _ = stack.apply_block(*settings, layer, x, attend, None, num_out)
            x_0 = apply(x, method="estimate")  # [B or 2 B, N, E]
            if guided:
                x_0 = guidance.mix(x_0, options["guidance"], c.joint_width)
            return x_0.reshape(b * n, -1)

        def project(x_0: Array, t: Array) -> Array:
            del t
            size = jnp.linalg.norm(x_0, axis=-1, keepdims=True)
            return x_0 * (c.scale / jnp.maximum(size, c.scale))

        keys = _keys(key, options["first"], b, n).reshape(-1)
        p = gaussian.Parameterisation("x_0", clip="none")
        noise = samplers.start(schedule, keys, (c.joint_width,))
        if sampler == "ddpm":
            x_0 = samplers.ddpm(predict, schedule, p, noise, keys, project=project)
        else:
            eta = 0.0 if options["eta"] is None else options["eta"]
            x_0 = samplers.ddim(predict, schedule, p, noise, keys, eta=eta, project=project)
    return _best(clip.unit(x_0).reshape(b, n, -1), z_t)


@functools.partial(jax.jit, static_argnames=("model", "num_samples", "use_cache"))
def _sample_ar(model, params, tables, text, z_t, key, options, *, num_samples, use_cache) -> Array:
    """See `sample_ar`. An option that is None is static, and its step is not compiled."""
    c, b = model.config, len(text)
    guided = options["guidance"] is not None
    keys = _keys(key, options["first"], b, num_samples).T  # [N, B], the order of `nn.kv_cache`

    def dot(key: Key) -> Array:
        return jax.random.randint(jax.random.fold_in(key, _DOT), (), *options["dots"])

    def sample_bucket(logits: Array, dim: Array) -> Array:
        """[N, B or 2 B, V] -> [N, B] buckets of a dimension."""
        if guided:
            conditional, unconditional = logits[:, 0::2], logits[:, 1::2]
            logits = categorical.guide(conditional, unconditional, options["guidance"])
        noise = jax.vmap(
            jax.vmap(lambda k: categorical.gumbel(jax.random.fold_in(k, dim), c.num_buckets))
        )
        return categorical.sample(
            logits, noise(keys), options["temperature"], options["k"], options["p"]
        )

    with partition.unconstrained():
        first = c.num_buckets + jax.vmap(jax.vmap(dot))(keys)
        if guided:
            first = _pairs(first, jnp.full_like(first, c.null_dot))
        decoder = _cached_decoder if use_cache else _full_decoder
        state, advance = decoder(model, params, text, z_t, num_samples, guided)

        def step(carry, dim):
            ids, state = carry
            logits, state = advance(state, ids, dim)
            buckets = sample_bucket(logits, dim)
            return (_pairs(buckets, buckets) if guided else buckets, state), buckets

        _, buckets = jax.lax.scan(step, (first, state), jnp.arange(c.num_dims))  # [K, N, B]
    return _best(pca.dequantise(tables, buckets.transpose(2, 1, 0)), z_t)


def _cached_decoder(model, params, text, z_t, n, guided):
    """The caches, and a function that adds a token to them and returns the logits after it."""
    c = model.config
    cache = kv_cache.ImageCache(c.cache_mask())
    apply = functools.partial(model.apply, {"params": params})
    layers, stem = _stem(model, params, text, z_t, guided)
    stem = jax.tree.map(lambda y: y.transpose(0, 2, 1, 3), stem)  # [R, H, S, K]
    rows, heads, _, head_dim = stem[0][0].shape
    empty = jnp.zeros((rows, 0, heads, head_dim))
    slots = cache.fill(empty.astype(stem[0][0].dtype), n)

    def advance(state, ids, position):
        x = apply(ids[..., None], position[None], method="tail")[:, :, 0]  # [N, R, D]
        new_state = []
        for layer, stem_kv, own in zip(layers, stem, state, strict=True):

            def attend(q, k, v, stem_kv=stem_kv, own=own):
                new_kv = [cache.write(y, position, x) for y, x in zip(own, (k, v), strict=True)]
                return kv_cache.cached(q, *stem_kv, *new_kv, cache.allowed(position)), new_kv

            x, new_kv = stack.apply_block(c.transformer, model.dtype, layer, x, attend)
            new_state.append(new_kv)
        return apply(x, method="logits"), new_state

    return [[slots, slots] for _ in layers], advance


def _full_decoder(model, params, text, z_t, n, guided):
    """`_cached_decoder` without a cache: every step runs the full stream of every sample."""
    c = model.config
    dropped = jnp.zeros(len(text), bool)
    if guided:
        text, z_t, dropped = guidance.pair((text, z_t, dropped), (text, z_t, ~dropped))
    rows = [jnp.tile(y, (n,) + (1,) * (y.ndim - 1)) for y in (text, z_t, dropped)]
    state = jnp.zeros((n, len(text), c.num_dims + 1), jnp.int32)

    def advance(state, ids, position):
        state = state.at[:, :, position].set(ids)
        dot, dims = state[..., 0] - c.num_buckets, state[..., 1:]
        tokens = [y.reshape(-1, *y.shape[2:]) for y in (dot, dims)]
        logits = model.apply({"params": params}, *rows[:2], *tokens, rows[2])
        return logits[:, position].reshape(n, len(text), -1), state

    return state, advance


def _stem(
    model: Any, params: Params, text: Array, z_t: Array, guided: bool
) -> tuple[list[Params], list[tuple[Array, Array]]]:
    """The layers of a prior, and the keys and values [R, S, H, K] of its stem in each layer.

    With guidance R = 2 B: each prompt is followed by the nulls, which run once for all prompts.
    """
    settings = (model.config.transformer, model.dtype)
    apply = functools.partial(model.apply, {"params": params}, method="stem")
    layers = stack.layers(*settings, params["transformer"]["blocks"])

    def run(x: Array) -> list[tuple[Array, Array]]:
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        return stack.prefill(*settings, layers, x, [causal] * len(layers))[1]

    stem = run(apply(text, z_t))
    if guided:
        nulls = apply(jnp.zeros_like(text[:1]), jnp.zeros_like(z_t[:1]), jnp.ones(1, bool))
        stem = guidance.pair(stem, run(nulls))
    return layers, stem


def _tails(num_stem: int, n: int) -> Array:
    """bool [3 N, S + 3 N]: which keys the tails of N samples see, all of the stem and their own.

    The 3 N positions are ordered by kind, then by sample.
    """
    size = prior_diffusion.TAIL * n
    kind, sample = jnp.arange(size) // n, jnp.arange(size) % n
    own = (sample[:, None] == sample[None, :]) & (kind[None, :] <= kind[:, None])
    return jnp.concatenate([jnp.ones((len(own), num_stem), bool), own], axis=1)


def _keys(key: Key, first: Array | int, b: int, n: int) -> Key:
    """[B, N] keys: fold_in(fold_in(key, prompt), sample); prompts have their global index."""
    by_prompt = samplers.example_keys(key, first + jnp.arange(b))
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(by_prompt, jnp.arange(n))


def _pairs(a: Array, b: Array) -> Array:
    """[N, B], [N, B] -> [N, 2 B], alternating as in `guidance.pair`."""
    return jnp.stack([a, b], axis=2).reshape(len(a), -1)


def _best(z: Array, z_t: Array) -> Array:
    """Of the samples [B, N, E] the one with the highest dot product with z_t [B, E]: [B, E]."""
    if z.shape[1] == 1:
        return z[:, 0]
    scores = jnp.einsum("BNE,BE->BN", z, z_t)
    return jnp.take_along_axis(z, jnp.argmax(scores, axis=1)[:, None, None], axis=1)[:, 0]


def _check(guidance_scale: float, num_samples: int) -> None:
    if num_samples < 1:
        raise UsageError(f"num_samples={num_samples}; expected 1 or more, paper {NUM_SAMPLES}.")
    if not guidance_scale >= 0:
        raise UsageError(f"guidance_scale={guidance_scale}; expected 1 (off) or more, or 0.")
