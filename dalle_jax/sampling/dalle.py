"""Drawing image codes for captions: many candidates per prompt, one compiled program per shape.

The text (and the rows of a given picture that is to be completed) runs through the network once
per prompt and chunk; its keys and values are shared by all candidates. Then one `lax.scan` draws
the image tokens on the device against caches of fixed size. Guidance runs the empty caption as
more prompts of the same batch.

The noise of a token is a function of (key, prompt index, candidate index, position) alone, so a
candidate does not change with the number of candidates, of chunks or of devices.

Source: Ramesh et al. 2021 (arXiv:2102.12092), §2.6 (512 candidates) and figure 2c (completion of
the lower part of a picture); guidance as in dalle-mini, on logits.
"""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle_jax import axes
from dalle_jax.models import dalle
from dalle_jax.nn import attention, kv_cache, partition, transformer
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
      params: its parameters, no collection level. On the device already if called often.
      text: [P, T] int32, right-padded with 0.
      num_candidates: N.
      key: typed key.
      temperature: 0 = always the likeliest code; 1 = the model's own distribution.
      top_k: draw from the k likeliest codes; 0 = off.
      top_p: draw from the likeliest codes that hold this mass; 1 = off.
      guidance: scale of classifier-free guidance; 1 = off. Needs a model trained with
        data.caption_drop > 0.
      prefix: [P, n] int32, n < g*g: the first codes in raster order, kept as they are.
      first_candidate: global index of the first candidate, for drawing in chunks.
      first_prompt: global index of the first prompt, likewise.
      use_cache: False runs the whole stream for every token: the slow reference.
      mesh: spread the candidates over its data and fsdp axes; N is rounded up to fill them.

    Returns:
      [P, N, g*g] int32, raster order.

    Raises:
      UsageError: for an option out of range.
      ValueError: for a wrong shape.
    """
    c = model.config
    text, prefix = _check(c, text, prefix, num_candidates)
    categorical.check(temperature, top_k, top_p, guidance, c.num_codes)
    shards = math.prod(mesh.shape[a] for a in _data_axes(mesh)) if mesh is not None else 1
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
    """`sample` in chunks of candidates, so that 512 of them never sit on the device at once.

    The next chunk is dispatched before the last one is handed out. All chunks have one shape (one
    compilation); what the last one draws too much is cut off.

    Args:
      model: see `sample`, as for all arguments not named here.
      params: see `sample`.
      text: [P, T] int32.
      num_candidates: N in total.
      chunk: candidates per prompt in one chunk.
      key: typed key.
      first_candidate: global index of the first.
      **options: of `sample`.

    Yields:
      (index of the chunk's first candidate, counted from first_candidate; codes
      [P, <= chunk, g*g] int32 on the host).
    """
    if chunk < 1:
        raise UsageError(f"chunk={chunk}; expected 1 or more candidates at a time.")
    chunk = min(chunk, num_candidates)
    params = jax.device_put(params)  # nothing is moved that is on a device already

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
    """See `sample`. A None in options is static: the step it stands for is not compiled."""
    c = model.config
    n, num_prefix = num_candidates, prefix.shape[1]
    guided = options["guidance"] is not None
    streams = 2 if guided else 1
    rows = jnp.concatenate([text, jnp.zeros_like(text)]) if guided else text  # [R, T]
    keys = _noise_keys(key, options["first_prompt"], len(text), options["first_candidate"], n)
    keys = _spread(keys, mesh)
    # Inside, candidates come first: theirs is the axis that is spread over devices.

    def draw(logits, position):
        """[N, R, V] -> [N, P] codes."""
        if guided:
            conditional, unconditional = jnp.split(logits, 2, axis=1)
            logits = categorical.guide(conditional, unconditional, options["guidance"])
        noise = jax.vmap(
            jax.vmap(lambda k: categorical.gumbel(jax.random.fold_in(k, position), c.num_codes))
        )
        codes = categorical.draw(
            logits, noise(keys), options["temperature"], options["k"], options["p"]
        )
        return _spread(codes, mesh)

    with partition.unconstrained():
        decoder = _cached_decoder if use_cache else _full_decoder
        prefixes = jnp.tile(prefix, (streams, 1))
        logits, state, advance = decoder(model, params, rows, prefixes, n, mesh)

        def step(carry, position):
            logits, state = carry
            codes = draw(logits, position)
            logits, state = advance(state, jnp.tile(codes, (1, streams)), position)
            return (logits, state), codes

        last = c.num_image_tokens - 1
        (logits, _), drawn = jax.lax.scan(step, (logits, state), jnp.arange(num_prefix, last))
        final = draw(logits, last)

    given = jnp.broadcast_to(prefix[None], (n, *prefix.shape))
    codes = jnp.concatenate([given, jnp.moveaxis(drawn, 0, 2), final[..., None]], axis=2)
    return _spread(codes.transpose(1, 0, 2), mesh, axis=1)


def _cached_decoder(model, params, rows, prefix, n, mesh):
    """Logits after the prefix, the caches, and a function that advances both by one code."""
    c = model.config
    stack = c.stack(model.dtype)
    caches = [kv_cache.ImageCache(mask) for mask in c.layer_masks()]
    # One slice per layer, cut and cast outside the loop over tokens; norms' gains stay float32.
    stacked = jax.tree.map(
        lambda w: w.astype(model.dtype.compute) if w.ndim == 3 else w,
        params["transformer"]["blocks"],
    )
    layers = [jax.tree.map(lambda w, i=i: w[i], stacked) for i in range(c.num_layers)]
    apply = functools.partial(model.apply, {"params": params})

    # The prompt: [R, T + n, D], once, whatever the number of candidates.
    x = apply(rows, method="embed_text")
    x = jnp.concatenate([x, apply(prefix, method="embed_image")], axis=1)
    length = x.shape[1]
    texts, state = [], []
    for params_, cache in zip(layers, caches, strict=True):
        allowed = cache.mask.graph()[:length, :length]

        def attend(q, k, v, allowed=allowed):
            return attention.attention(q, k, v, allowed), (k, v)

        x, kv = transformer.apply_block(stack, params_, x, attend)
        texts.append([y[:, : c.text_len].transpose(0, 2, 1, 3) for y in kv])
        state.append([_spread(cache.fill(y[:, c.text_len :], n), mesh) for y in kv])

    def logits_of(x):
        return apply(apply(x, method="final_norm"), method="image_logits")

    logits = logits_of(x[:, -1:])  # [R, 1, V]
    logits = _spread(jnp.broadcast_to(logits[:, 0], (n, len(rows), c.num_codes)), mesh)

    def advance(state, codes, position):
        x = apply(codes[..., None], position[None], method="embed_image")[:, :, 0]  # [N, R, D]
        new_state = []
        for params_, cache, text_kv, image_kv in zip(layers, caches, texts, state, strict=True):

            def attend(q, k, v, cache=cache, text_kv=text_kv, image_kv=image_kv):
                written = [
                    cache.write(old, position, new)
                    for old, new in zip(image_kv, (k, v), strict=True)
                ]
                seen = [cache.read(y, position) for y in written]
                return kv_cache.cached(q, *text_kv, *seen, cache.allowed(position)), written

            x, written = transformer.apply_block(stack, params_, x, attend)
            new_state.append(written)
        return logits_of(x), new_state

    return logits, state, advance


def _full_decoder(model, params, rows, prefix, n, mesh):
    """The same without a cache: every step runs the whole stream of every candidate."""
    c = model.config
    r, num_prefix = prefix.shape
    text = jnp.tile(rows, (n, 1))  # [N * R, T]
    codes = jnp.zeros((n, r, c.num_image_tokens), jnp.int32)
    codes = _spread(codes.at[:, :, :num_prefix].set(prefix[None]), mesh)

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


def _spread(x: Array, mesh: Mesh | None, axis: int = 0) -> Array:
    """`x` with its candidate axis over the mesh's data axes; without a mesh, `x`."""
    if mesh is None:
        return x
    spec = PartitionSpec(*[None] * axis, _data_axes(mesh))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def _data_axes(mesh: Mesh) -> tuple[str, ...]:
    return tuple(name for name in mesh.axis_names if name != axes.TENSOR)


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
            f"the prefix holds {prefix.shape[1]} of {c.num_image_tokens} codes, so nothing is "
            f"left to draw; keep fewer rows than {c.grid}."
        )
    return text, jnp.asarray(prefix, jnp.int32)
