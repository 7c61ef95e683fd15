"""Samples image codes for captions: many candidates per prompt, one compiled program per shape.

The text, and the given rows of a picture to complete, run through the network once per prompt and
chunk; all candidates share their keys and values. Then one `lax.scan` on the device samples the
image tokens, with caches of fixed size. For guidance, the empty captions are more prompts in the
same batch.

The noise of a token is a function of (key, prompt index, candidate index, position) alone, so a
candidate does not depend on the number of candidates, chunks or devices.

Source: Ramesh et al. 2021 (arXiv:2102.12092), §2.6 (512 candidates) and figure 2c (completion of
the lower part of a picture); guidance as in dalle-mini, on logits.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dalle_jax.models import dalle
from dalle_jax.nn import kv_cache, partition, stack
from dalle_jax.sampling import categorical
from dalle_jax.types import Array, Key, Params, UsageError


def sample(
    model: dalle.Dalle,
    params: Params,
    text: Array,
    *,
    num_candidates: int,
    key: Key,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance: float = 1.0,
    prefix: Array | None = None,
    first_candidate: int = 0,
    first_prompt: int = 0,
    use_cache: bool = True,
    mesh: Mesh | None = None,
) -> Array:
    """Codes of num_candidates images per prompt.

    Args:
      model: the network.
      params: its parameters, without the collection level; on the device if called often.
      text: [P, T] int32, right-padded with 0.
      num_candidates: N.
      key: typed key.
      temperature: 0 = always the likeliest code; 1 = the model's own distribution.
      top_k: sample from the k likeliest codes; 0 = off.
      top_p: sample from the smallest set of likeliest codes with this mass; 1 = off.
      guidance: scale of classifier-free guidance; 1 = off. It needs a model that was trained with
        data.caption_drop > 0.
      prefix: [P, n] int32, n < g*g: the first codes in raster order, which stay unchanged.
      first_candidate: global index of the first candidate, for sampling in chunks.
      first_prompt: global index of the first prompt, for sampling in chunks.
      use_cache: False runs the full stream for every token; the slow reference.
      mesh: splits the candidates over its data and fsdp axes; N is rounded up to a multiple.

    Returns:
      [P, N, g*g] int32, raster order.

    Raises:
      UsageError: for an option out of range.
      ValueError: for a wrong shape.
    """
    c = model.config
    text, prefix = _check(c, text, prefix, num_candidates)
    categorical.check(temperature, top_k, top_p, guidance, c.num_codes)
    shards = partition.num_batch_shards(mesh)
    padded = -(-num_candidates // shards) * shards
    codes = _sample(
        model,
        params,
        text,
        prefix,
        key,
        dict(
            first_prompt=first_prompt,
            first_candidate=first_candidate,
            temperature=float(temperature),
            k=int(top_k) if top_k else None,
            p=float(top_p) if top_p < 1 else None,
            guidance=float(guidance) if guidance != 1 else None,
        ),
        num_candidates=padded,
        use_cache=use_cache,
        mesh=mesh,
    )
    return codes[:, :num_candidates]


def sample_batches(
    model: dalle.Dalle,
    params: Params,
    text: Array,
    *,
    num_candidates: int,
    chunk: int,
    key: Key,
    first_candidate: int = 0,
    **options,
) -> Iterator[tuple[int, np.ndarray]]:
    """`sample` in chunks of candidates, so that the device never holds all 512 of them.

    The next chunk is dispatched before the previous one is yielded. All chunks have one shape and
    so one compilation; surplus candidates of the last chunk are dropped.

    Args:
      model: see `sample`.
      params: see `sample`.
      text: [P, T] int32.
      num_candidates: N in total.
      chunk: candidates per prompt in one chunk.
      key: typed key.
      first_candidate: global index of the first candidate.
      **options: further arguments of `sample`.

    Yields:
      (index of the chunk's first candidate relative to first_candidate, codes
      [P, <= chunk, g*g] int32 on the host).
    """
    if chunk < 1:
        raise UsageError(f"chunk={chunk}; expected 1 or more candidates at a time.")
    chunk = min(chunk, num_candidates)
    params = jax.device_put(params)  # no copy of arrays that are on a device already

    def dispatch(start: int) -> Array:
        return sample(
            model,
            params,
            text,
            num_candidates=chunk,
            key=key,
            first_candidate=first_candidate + start,
            **options,
        )

    codes = dispatch(0)
    for start in range(0, num_candidates, chunk):
        following = dispatch(start + chunk) if start + chunk < num_candidates else None
        yield start, np.asarray(codes)[:, : num_candidates - start]
        codes = following


@functools.partial(jax.jit, static_argnames=("model", "num_candidates", "use_cache", "mesh"))
def _sample(model, params, text, prefix, key, options, *, num_candidates, use_cache, mesh):
    """See `sample`. An option that is None is static, and its step is not compiled."""
    c = model.config
    n, num_prefix = num_candidates, prefix.shape[1]
    guided = options["guidance"] is not None
    streams = 2 if guided else 1
    rows = jnp.concatenate([text, jnp.zeros_like(text)]) if guided else text  # [R, T]
    keys = _noise_keys(key, options["first_prompt"], len(text), options["first_candidate"], n)
    keys = partition.split_batch(keys, mesh)
    # Here candidates come first, because their axis is split over devices.

    def sample_code(logits, position):
        """[N, R, V] -> [N, P] codes."""
        if guided:
            conditional, unconditional = jnp.split(logits, 2, axis=1)
            logits = categorical.guide(conditional, unconditional, options["guidance"])
        noise = jax.vmap(
            jax.vmap(lambda k: categorical.gumbel(jax.random.fold_in(k, position), c.num_codes))
        )
        codes = categorical.sample(
            logits, noise(keys), options["temperature"], options["k"], options["p"]
        )
        return partition.split_batch(codes, mesh)

    with partition.unconstrained():
        decoder = _cached_decoder if use_cache else _full_decoder
        prefixes = jnp.tile(prefix, (streams, 1))
        logits, state, advance = decoder(model, params, rows, prefixes, n, mesh)

        def step(carry, position):
            logits, state = carry
            codes = sample_code(logits, position)
            logits, state = advance(state, jnp.tile(codes, (1, streams)), position)
            return (logits, state), codes

        last = c.num_image_tokens - 1
        (logits, _), codes = jax.lax.scan(step, (logits, state), jnp.arange(num_prefix, last))
        final = sample_code(logits, last)

    prefix = jnp.broadcast_to(prefix[None], (n, *prefix.shape))
    codes = jnp.concatenate([prefix, jnp.moveaxis(codes, 0, 2), final[..., None]], axis=2)
    return partition.split_batch(codes.transpose(1, 0, 2), mesh, axis=1)


def _cached_decoder(model, params, rows, prefix, n, mesh):
    """Logits after the prefix, the caches, and a function that advances both by one code."""
    c = model.config
    caches = [kv_cache.ImageCache(mask) for mask in c.layer_masks()]
    settings = (c.transformer, model.dtype)
    # Cut and cast here, outside the loop over tokens.
    layers = stack.layers(*settings, params["transformer"]["blocks"])
    apply = functools.partial(model.apply, {"params": params})

    # The prompt: [R, T + n, D], once, whatever the number of candidates.
    x = apply(rows, method="embed_text")
    x = jnp.concatenate([x, apply(prefix, method="embed_image")], axis=1)
    length = x.shape[1]
    allowed = (cache.mask.graph()[:length, :length] for cache in caches)
    x, prompt = stack.prefill(*settings, layers, x, allowed)
    texts, state = [], []
    for kv, cache in zip(prompt, caches, strict=True):
        texts.append([y[:, : c.text_len].transpose(0, 2, 1, 3) for y in kv])
        images = [cache.fill(y[:, c.text_len :], n) for y in kv]
        state.append(partition.split_batch(images, mesh))

    def logits_of(x):
        return apply(apply(x, method="final_norm"), method="image_logits")

    logits = logits_of(x[:, -1:])  # [R, 1, V]
    logits = jnp.broadcast_to(logits[:, 0], (n, len(rows), c.num_codes))
    logits = partition.split_batch(logits, mesh)

    def advance(state, codes, position):
        x = apply(codes[..., None], position[None], method="embed_image")[:, :, 0]  # [N, R, D]
        new_state = []
        for layer, cache, text_kv, image_kv in zip(layers, caches, texts, state, strict=True):

            def attend(q, k, v, cache=cache, text_kv=text_kv, image_kv=image_kv):
                new_kv = [
                    cache.write(old, position, new)
                    for old, new in zip(image_kv, (k, v), strict=True)
                ]
                visible = [cache.read(y, position) for y in new_kv]
                return kv_cache.cached(q, *text_kv, *visible, cache.allowed(position)), new_kv

            x, new_kv = stack.apply_block(*settings, layer, x, attend)
            new_state.append(new_kv)
        return logits_of(x), new_state

    return logits, state, advance


def _full_decoder(model, params, rows, prefix, n, mesh):
    """`_cached_decoder` without a cache: every step runs the full stream of every candidate."""
    c = model.config
    r, num_prefix = prefix.shape
    text = jnp.tile(rows, (n, 1))  # [N * R, T]
    codes = jnp.zeros((n, r, c.num_image_tokens), jnp.int32)
    codes = partition.split_batch(codes.at[:, :, :num_prefix].set(prefix[None]), mesh)

    def logits_of(codes, position):
        flat = codes.reshape(n * r, c.num_image_tokens)
        _, logits = model.apply({"params": params}, text, flat)
        return logits[:, position].reshape(n, r, c.num_codes)

    def advance(codes, new, position):
        codes = codes.at[:, :, position].set(new)
        return logits_of(codes, position + 1), codes

    return logits_of(codes, num_prefix), codes, advance


def _noise_keys(key: Key, first_prompt, num_prompts: int, first_candidate, n: int) -> Array:
    """[N, P] keys: fold_in(fold_in(key, prompt), candidate), both global indices."""
    prompts = first_prompt + jnp.arange(num_prompts)
    candidates = first_candidate + jnp.arange(n)
    by_prompt = jax.vmap(jax.random.fold_in, (None, 0))(key, prompts)
    return jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))(by_prompt, candidates)


def _check(c: dalle.DalleConfig, text: Array, prefix: Array | None, n: int):
    if text.ndim != 2 or text.shape[1] != c.text_len:
        raise ValueError(f"text has shape {text.shape}; expected [P, {c.text_len}].")
    if n < 1:
        raise UsageError(f"num_candidates={n}; expected 1 or more.")
    text = jnp.asarray(text, jnp.int32)
    if prefix is None:
        return text, np.zeros((len(text), 0), np.int32)
    if prefix.ndim != 2 or len(prefix) != len(text):
        raise ValueError(f"prefix has shape {prefix.shape}; expected [{len(text)}, n].")
    if prefix.shape[1] >= c.num_image_tokens:
        raise UsageError(
            f"the prefix has {prefix.shape[1]} of {c.num_image_tokens} codes, so nothing is left "
            f"to sample; keep fewer rows than {c.grid}."
        )
    return text, jnp.asarray(prefix, jnp.int32)
