"""From a caption to CLIP image embeddings: both priors, each one compiled program per shape.

The stream of a prior begins with the caption and its CLIP embedding, and is causal: this stem runs
through the network once per prompt, whatever the number of steps, tokens and draws, and its keys
and values are shared. Under guidance the stem of the nulls, the same for all prompts, runs once per
call. The diffusion prior then computes 3 positions per step and draw, the autoregressive one 1 per
dimension.

All noise is a function of (key, global index of the prompt, draw, step or dimension), so an
embedding is the same alone, in any batch and on any number of devices. Inputs that are spread over
devices are worked on where they lie.

Source: Ramesh et al. 2022 (arXiv:2204.06125) §2.2.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dalle_jax.diffusion import gaussian, guidance, samplers, schedules
from dalle_jax.models import clip, prior_ar, prior_diffusion
from dalle_jax.nn import attention, kv_cache, partition, transformer
from dalle_jax.sampling import categorical
from dalle_jax.stages import pca
from dalle_jax.types import Array, Key, Params, UsageError

SAMPLERS = ("ddpm", "ddim")
PAPER_STEPS = 64
DRAWS = 2  # of which the one with the higher z_i . z_t is kept
_DOT = 2**31 - 1  # the dot product's stream of noise, beside those of the dimensions


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
    num_draws: int = DRAWS,
    first: int = 0,
) -> Array:
    """One image embedding per caption: the best of num_draws by its dot product with z_t.

    Args:
      model: the network.
      params: its parameters, no collection level.
      text: [B, T] int32, as the CLIP reads captions.
      z_t: [B, E] float32, their CLIP embeddings of unit length.
      key: typed key.
      steps: how many, or another spacing of `diffusion.schedules`.
      sampler: "ddpm" (ancestral), or "ddim" (deterministic after its first noise at eta 0).
      eta: of ddim.
      guidance_scale: of classifier-free guidance; 1 = off, 0 ignores the text.
      num_draws: embeddings drawn per caption.
      first: global index of the first caption, for drawing in chunks.

    Returns:
      [B, E] float32 of unit length.

    Raises:
      UsageError: for an option out of range.

    Source: the paper's sampler is Analytic-DPM with 64 strided steps; here it is ancestral. Guided
    estimates of x_0 can be longer than any embedding is; they are cut to its length, as the
    estimate of a point on a sphere lies inside it.
    """
    if sampler not in SAMPLERS:
        raise UsageError(f"sampler {sampler!r} is unknown; use one of {', '.join(SAMPLERS)}.")
    if not 0 <= eta <= 1:
        raise UsageError(f"eta={eta}; expected 0 (no noise) to 1 (as much as DDPM).")
    _check(guidance_scale, num_draws)
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
        num_draws=num_draws,
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
    num_draws: int = 1,
    first: int = 0,
    use_cache: bool = True,
) -> Array:
    """One image embedding per caption, its dimensions drawn one after the other.

    Args:
      model: see `sample_diffusion`, as for all arguments not named here.
      params: see there.
      tables: `Pca.tables` for the model's number of dimensions.
      text: see there.
      z_t: see there.
      key: see there.
      temperature: 0 = always the likeliest bucket; 1 = the model's own distribution.
      top_k: draw from the k likeliest buckets; 0 = off.
      top_p: draw from the likeliest buckets that hold this mass; 1 = off.
      guidance_scale: see there.
      dot_range: part of the dot products' distribution (over training pairs) from which each draw
        is given one, as quantiles: the paper's "top half".
      num_draws: see there; 1, because the dot product already asks for a good one.
      first: see there.
      use_cache: False runs the whole stream for every dimension: the slow reference.

    Returns:
      [B, E] float32 of unit length.

    Raises:
      UsageError: for an option out of range.
    """
    c = model.config
    _check(guidance_scale, num_draws)
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
        num_draws=num_draws,
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


@functools.partial(jax.jit, static_argnames=("model", "schedule", "sampler", "num_draws"))
def _sample_diffusion(
    model, params, text, z_t, key, options, *, schedule, sampler, num_draws
) -> Array:
    """See `sample_diffusion`. A None in options is static: what it stands for is not compiled."""
    c, b, n = model.config, len(text), num_draws
    guided = options["guidance"] is not None
    apply = functools.partial(model.apply, {"params": params})
    with partition.unconstrained():
        layers = _layers(model, params)
        stem = _run_stem(model, layers, apply(text, z_t, method="stem"))
        if guided:
            stem = guidance.pair(stem, _null_stem(model, layers, apply, text, z_t))
        allowed = _tails(c.text_len + 1, n)

        def predict(x: Array, t: Array) -> Array:
            tail = apply(x.reshape(b, n, -1), t.reshape(b, n), method="tail")  # [B, N, 3, D]
            x = tail.swapaxes(1, 2).reshape(b, -1, c.width)  # times, noised embeddings, queries
            x = guidance.pair(x, x) if guided else x
            for i, (params_, (k, v)) in enumerate(zip(layers, stem, strict=True)):
                asked = n if i == c.num_layers - 1 else 0

                def attend(q, own_k, own_v, k=k, v=v, asked=asked):
                    keys = jnp.concatenate([k, own_k], axis=1)
                    values = jnp.concatenate([v, own_v], axis=1)
                    return attention.attention(q, keys, values, allowed[-asked:]), None

                x, _ = transformer.apply_block(
                    c.stack(model.dtype), params_, x, attend, None, asked
                )
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


@functools.partial(jax.jit, static_argnames=("model", "num_draws", "use_cache"))
def _sample_ar(model, params, tables, text, z_t, key, options, *, num_draws, use_cache) -> Array:
    """See `sample_ar`. A None in options is static: the step it stands for is not compiled."""
    c, b = model.config, len(text)
    guided = options["guidance"] is not None
    keys = _keys(key, options["first"], b, num_draws).T  # [N, B]: draws first, as nn.cache has it

    def dot(key: Key) -> Array:
        return jax.random.randint(jax.random.fold_in(key, _DOT), (), *options["dots"])

    def draw(logits: Array, dim: Array) -> Array:
        """[N, B or 2 B, V] -> [N, B] buckets of a dimension."""
        if guided:
            conditional, unconditional = logits[:, 0::2], logits[:, 1::2]
            logits = categorical.guide(conditional, unconditional, options["guidance"])
        fold = jax.vmap(
            jax.vmap(lambda k: categorical.gumbel(jax.random.fold_in(k, dim), c.num_buckets))
        )
        return categorical.draw(
            logits, fold(keys), options["temperature"], options["k"], options["p"]
        )

    with partition.unconstrained():
        first = c.num_buckets + jax.vmap(jax.vmap(dot))(keys)
        if guided:
            first = _pairs(first, jnp.full_like(first, c.null_dot))
        decoder = _cached_decoder if use_cache else _full_decoder
        state, advance = decoder(model, params, text, z_t, num_draws, guided)

        def step(carry, dim):
            ids, state = carry
            logits, state = advance(state, ids, dim)
            drawn = draw(logits, dim)
            return (_pairs(drawn, drawn) if guided else drawn, state), drawn

        _, drawn = jax.lax.scan(step, (first, state), jnp.arange(c.num_dims))  # [K, N, B]
    return _best(pca.dequantise(tables, drawn.transpose(2, 1, 0)), z_t)


def _cached_decoder(model, params, text, z_t, n, guided):
    """The caches, and a function that adds a token to them and gives the logits after it."""
    c = model.config
    stack, cache = c.stack(model.dtype), kv_cache.ImageCache(c.cache_mask())
    apply = functools.partial(model.apply, {"params": params})
    layers = _layers(model, params)
    stem = _run_stem(model, layers, apply(text, z_t, method="stem"))
    if guided:
        stem = guidance.pair(stem, _null_stem(model, layers, apply, text, z_t))
    stem = jax.tree.map(lambda y: y.transpose(0, 2, 1, 3), stem)  # [R, H, S, K]
    empty = jnp.zeros((stem[0][0].shape[0], 0, c.num_heads, c.width // c.num_heads))
    slots = cache.fill(empty.astype(stem[0][0].dtype), n)

    def advance(state, ids, place):
        x = apply(ids[..., None], place[None], method="tail")[:, :, 0]  # [N, R, D]
        new_state = []
        for params_, stem_kv, own in zip(layers, stem, state, strict=True):

            def attend(q, k, v, stem_kv=stem_kv, own=own):
                written = [cache.write(y, place, x) for y, x in zip(own, (k, v), strict=True)]
                return kv_cache.cached(q, *stem_kv, *written, cache.allowed(place)), written

            x, written = transformer.apply_block(stack, params_, x, attend)
            new_state.append(written)
        return apply(x, method="logits"), new_state

    return [[slots, slots] for _ in layers], advance


def _full_decoder(model, params, text, z_t, n, guided):
    """The same without a cache: every step runs the whole stream of every draw."""
    c = model.config
    dropped = jnp.zeros(len(text), bool)
    if guided:
        text, z_t, dropped = guidance.pair((text, z_t, dropped), (text, z_t, ~dropped))
    rows = [jnp.tile(y, (n,) + (1,) * (y.ndim - 1)) for y in (text, z_t, dropped)]
    state = jnp.zeros((n, len(text), c.num_dims + 1), jnp.int32)

    def advance(state, ids, place):
        state = state.at[:, :, place].set(ids)
        dot, dims = state[..., 0] - c.num_buckets, state[..., 1:]
        tokens = [y.reshape(-1, *y.shape[2:]) for y in (dot, dims)]
        logits = model.apply({"params": params}, *rows[:2], *tokens, rows[2])
        return logits[:, place].reshape(n, len(text), -1), state

    return state, advance


def _layers(model: Any, params: Params) -> list[Params]:
    """One slice of the stack per layer, cut and cast once; norms' gains stay float32."""
    blocks = jax.tree.map(
        lambda w: w.astype(model.dtype.compute) if w.ndim == 3 else w,
        params["transformer"]["blocks"],
    )
    return [jax.tree.map(lambda w, i=i: w[i], blocks) for i in range(model.config.num_layers)]


def _run_stem(model: Any, layers: list[Params], x: Array) -> list[tuple[Array, Array]]:
    """Keys and values [B, S, H, K] of every layer for the stem [B, S, D]."""
    causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))

    def attend(q, k, v):
        return attention.attention(q, k, v, causal), (k, v)

    kept = []
    for params in layers:
        x, kv = transformer.apply_block(model.config.stack(model.dtype), params, x, attend)
        kept.append(kv)
    return kept


def _null_stem(model: Any, layers: list[Params], apply: Any, text: Array, z_t: Array):
    """`_run_stem` of the nulls, one row for all prompts."""
    nulls = apply(
        jnp.zeros_like(text[:1]), jnp.zeros_like(z_t[:1]), jnp.ones(1, bool), method="stem"
    )
    return _run_stem(model, layers, nulls)


def _tails(num_stem: int, n: int) -> Array:
    """bool [3 N, S + 3 N]: the tails of N draws, kind by kind, see the stem and their own draw."""
    place, draw = (
        jnp.arange(prior_diffusion.TAIL * n) // n,
        jnp.arange(prior_diffusion.TAIL * n) % n,
    )
    own = (draw[:, None] == draw[None, :]) & (place[None, :] <= place[:, None])
    return jnp.concatenate([jnp.ones((len(own), num_stem), bool), own], axis=1)


def _keys(key: Key, first: Array | int, b: int, n: int) -> Key:
    """[B, N] keys: fold_in(fold_in(key, prompt), draw), prompts by their global index."""
    by_prompt = samplers.example_keys(key, first + jnp.arange(b))
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(by_prompt, jnp.arange(n))


def _pairs(a: Array, b: Array) -> Array:
    """[N, B], [N, B] -> [N, 2 B], rows in turn as `guidance.pair` has them."""
    return jnp.stack([a, b], axis=2).reshape(len(a), -1)


def _best(z: Array, z_t: Array) -> Array:
    """Of the draws [B, N, E] the one with the highest dot product with z_t [B, E]: [B, E]."""
    if z.shape[1] == 1:
        return z[:, 0]
    scores = jnp.einsum("BNE,BE->BN", z, z_t)
    return jnp.take_along_axis(z, jnp.argmax(scores, axis=1)[:, None, None], axis=1)[:, 0]


def _check(guidance_scale: float, num_draws: int) -> None:
    if num_draws < 1:
        raise UsageError(f"num_draws={num_draws}; expected 1 or more, paper {DRAWS}.")
    if not guidance_scale >= 0:
        raise UsageError(f"guidance_scale={guidance_scale}; expected 1 (off) or more, or 0.")
