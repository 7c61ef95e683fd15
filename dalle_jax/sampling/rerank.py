"""CLIP scores of samples, and their order: the one place of the house that uses pmap.

Reranking is embarrassingly parallel and its networks fit one device, which is what pmap is for.
The scores themselves are a pure function (`score_fn`), so jit over a mesh could replace pmap.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle_jax import chunks
from dalle_jax.models.clip import Clip
from dalle_jax.nn import kv_cache
from dalle_jax.sampling import autoregressive
from dalle_jax.stages import clip
from dalle_jax.stages.clip import ClipStage
from dalle_jax.stages.dalle import DalleStage
from dalle_jax.types import Array, Key, Params

MAX_CHUNK = 128  # candidates at a time and device; beyond it sampling gets no faster


@dataclasses.dataclass(frozen=True)
class Ranked:
    """The best of one prompt's candidates, best first.

    Attributes:
      candidates: [K] int, their global indices.
      codes: [K, g*g] int32.
      images: [K, h, w, 3] float32 in [-1, 1].
      scores: [N] float32 of *all* candidates in the order sampled; None without a CLIP.
    """

    candidates: np.ndarray
    codes: np.ndarray
    images: np.ndarray
    scores: np.ndarray | None


def score_fn(model: Clip, params: Params, images: Array, tokens: Array) -> Array:
    """Cosine between each picture and its own caption; pure and jit-able.

    Args:
      model: the CLIP module.
      params: its parameters.
      images: [B, h, w, 3] float in [-1, 1]; resized (bicubic, antialiased) to the model's size.
      tokens: [B, T] int32, one caption per picture.

    Returns:
      [B] float32 in [-1, 1]. Not multiplied by exp(logit_scale), which changes no order.

    Source: DALL·E (arXiv:2102.12092) §2.6; the cosine of CLIP (arXiv:2103.00020) §2.3.
    """
    text = model.apply({"params": params}, tokens, method="encode_text")
    return _score_embedded(model, params, images, text)


def score(
    stage: ClipStage,
    images: Array,
    text: Array,
    batch: int = 64,
    devices: Sequence[jax.Device] | None = None,
) -> np.ndarray:
    """CLIP scores of M pictures, spread over the local devices with pmap.

    Each distinct caption is embedded once, however many pictures it has. The last batch is padded
    to a multiple of the devices, and the padding's scores are dropped: the scores do not depend
    on the number of devices.

    Args:
      stage: the CLIP.
      images: [M, h, w, 3] float in [-1, 1].
      text: [M, T] int32 by the CLIP's own tokenizer, one caption per picture.
      batch: pictures per device and call; bounds memory only.
      devices: this process's devices to use; all by default.

    Returns:
      [M] float32 host array: cosines in [-1, 1].

    Raises:
      ValueError: if the counts differ or T is not the CLIP's text length.
    """
    images, text = np.asarray(images, np.float32), np.asarray(text, np.int32)
    if len(images) != len(text) or text.shape[1:] != (stage.text_len,):
        raise ValueError(
            f"got {len(images)} images and text {text.shape}; expected one caption of "
            f"{stage.text_len} ids per image."
        )
    if not len(images):
        return np.zeros((0,), np.float32)
    devices = tuple(jax.local_devices() if devices is None else devices)
    prompts, owners = np.unique(text, axis=0, return_inverse=True)
    embedded = np.asarray(_embed_text(stage.model)(stage.on(), prompts))  # [P, E]
    replicated = NamedSharding(Mesh(np.array(devices), "devices"), PartitionSpec())
    # A power of two per device: a run whose last batch is smaller compiles at most log2 programs.
    per_device = chunks.power_of_two(-(-len(images) // len(devices)), batch)
    mapped, scores = _pmapped(stage.model, devices), []
    for rows, count in chunks.rows(len(images), len(devices) * per_device):
        out = mapped(
            stage.on(replicated),
            images[rows].reshape(len(devices), per_device, *images.shape[1:]),
            embedded[owners.reshape(-1)[rows]].reshape(len(devices), per_device, -1),
        )
        scores.append(np.asarray(out).reshape(-1)[:count])
    return np.concatenate(scores)


def sample_best(
    dalle: DalleStage,
    ranker: ClipStage | None,
    text: Array,
    clip_text: Array | None,
    *,
    num_candidates: int,
    keep: int,
    chunk: int,
    key: Key,
    mesh: Mesh | None = None,
    progress: Callable[[int], None] = lambda done: None,
    **options,
) -> Ranked:
    """Samples N candidates for one prompt in chunks, scores them and keeps the best K.

    Of all others only the scores stay in memory, so that N is bounded by patience alone.

    Args:
      dalle: samples and decodes.
      ranker: scores them; None = the first K in the order sampled.
      text: [T] int32 by DALL-E's tokenizer.
      clip_text: [T] int32 by CLIP's tokenizer; None without a CLIP.
      num_candidates: N.
      keep: K.
      chunk: candidates at a time.
      key: typed key. The same key gives the same pictures for every chunk and device count.
      mesh: devices that share sampling and decoding; None = one device.
      progress: called with the number of candidates so far.
      **options: of `sampling.autoregressive.sample`.
    """
    replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    batches = autoregressive.sample_batches(
        dalle.model,
        dalle.on(replicated),
        np.asarray(text)[None],
        num_candidates=num_candidates,
        chunk=chunk,
        key=key,
        mesh=mesh,
        **options,
    )
    # One shape for the decoder too, which every device shares: the last chunk may be smaller.
    shards = 1 if mesh is None else mesh.size
    rows = -(-min(chunk, num_candidates) // shards) * shards
    scores, best = [], None
    for first, codes in batches:
        codes = codes[0]  # [n, g*g]: one prompt
        padded = np.pad(codes, ((0, rows - len(codes)), (0, 0)))
        if mesh is not None:
            padded = jax.device_put(padded, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
        images = np.asarray(dalle.codec.decode(padded))[: len(codes)]
        if ranker is None:
            scores.append(np.zeros(len(codes), np.float32))
        else:
            scores.append(score(ranker, images, np.repeat(clip_text[None], len(codes), axis=0)))
        ranked = (first + np.arange(len(codes)), scores[-1], codes, images)
        if best is not None:
            ranked = tuple(np.concatenate(pair) for pair in zip(best, ranked, strict=True))
        top = order(ranked[1])[:keep]
        best = tuple(values[top] for values in ranked)
        progress(first + len(codes))
    return Ranked(best[0], best[2], best[3], None if ranker is None else np.concatenate(scores))


def fitting_chunk(dalle: DalleStage, guidance: float = 1.0) -> int:
    """Candidates that one device samples at a time; see `chunks.fitting`."""
    c, codec = dalle.model.config, dalle.codec
    streams = 1 if guidance == 1 else 2
    slots = sum(kv_cache.ImageCache(mask).num_slots for mask in c.layer_masks())
    item = jnp.dtype(dalle.model.dtype.compute).itemsize
    caches = 2 * slots * c.transformer.width * item * streams
    # Caches exist twice while one is written; the codec's maps hold about 64 floats a pixel.
    each = 2 * caches + codec.image_px**2 * 64 * 4
    return chunks.fitting(each, MAX_CHUNK)


def order(scores: Array) -> np.ndarray:
    """Indices from best to worst, [M] int: highest score first, ties in the order of sampling.

    A score that is not a number goes last (numpy sorts it there): it must never be shown as best.
    """
    return np.argsort(-np.asarray(scores), kind="stable")


def _score_embedded(model: Clip, params: Params, images: Array, text: Array) -> Array:
    """Cosines of images [B, h, w, 3] with unit caption embeddings [B, E]."""
    return jnp.einsum("BE,BE->B", clip.encode_image(model, params, images), text)


@functools.lru_cache(maxsize=8)
def _embed_text(model: Clip):
    return jax.jit(lambda params, text: model.apply({"params": params}, text, method="encode_text"))


@functools.lru_cache(maxsize=8)
def _pmapped(model: Clip, devices: tuple[jax.Device, ...]):
    # Parameters are broadcast (in_axes None): jax.device_put_replicated is gone from jax 0.10.
    score = functools.partial(_score_embedded, model)
    return jax.pmap(score, in_axes=(None, 0, 0), devices=devices)
