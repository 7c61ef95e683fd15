"""CLIP embeddings of a set's pictures and captions, for fits that need all of them at once."""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from dalle_jax import images
from dalle_jax.stages.clip import ClipStage


def of_batches(
    clip: ClipStage,
    batches: Callable[[int], Mapping[str, np.ndarray]],
    num_examples: int,
    *,
    sharding: jax.sharding.Sharding,
    replicated: jax.sharding.Sharding,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Embeds the first `num_examples` examples.

    Args:
      clip: the CLIP.
      batches: step -> image uint8 [b, h, w, 3] and text int32 [b, T], as `data.pipeline` returns.
      num_examples: examples to embed, at least 1.
      sharding: of a batch.
      replicated: of the CLIP's weights.
      progress: called with the number of examples in each batch.

    Returns:
      Image and text embeddings, float32 [num_examples, E] of unit length.
    """

    @jax.jit
    def embed(params, pictures, text):
        return clip.embeddings(params, images.to_float(pictures), text)

    params, pairs, count = clip.on(replicated), [], 0
    while count < num_examples:
        batch = batches(len(pairs))
        pictures, text = (jax.device_put(batch[name], sharding) for name in ("image", "text"))
        pair = [np.asarray(z)[: num_examples - count] for z in embed(params, pictures, text)]
        pairs.append(pair)
        progress(len(pair[0]))
        count += len(pair[0])
    image, text = (np.concatenate(z) for z in zip(*pairs, strict=True))
    return image, text
