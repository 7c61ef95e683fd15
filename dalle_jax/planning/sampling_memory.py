"""Memory of one device for sampling pictures: bytes of weights and caches, and seconds per token.

Arithmetic over the arrays of `sampling.autoregressive`, for `plan --sample`; nothing is compiled.
Decoding one token reads every weight and every cache once and computes next to nothing, so its time
is bytes over memory bandwidth. All candidates share the bytes of the weights.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from dalle_jax.models.dalle import Dalle
from dalle_jax.nn import kv_cache
from dalle_jax.planning.topology import Topology

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Budget:
    """Bytes on one device, which has the full network and a share of the candidates.

    Attributes:
      weights: parameters in their stored dtype.
      working: the matrices in the compute dtype, cast once per call; 0 if that is the stored dtype.
      text_cache: keys and values of the prompts, which all their candidates share.
      per_candidate: image keys and values, logits and codes of one candidate for every prompt.
      read_weights: bytes of weights that one token reads.
      read_text: bytes of the prompts' caches that one token reads.
      read_per_candidate: bytes of its own caches that one token of a candidate reads.
      tokens: tokens of a picture, sampled one after the other.
    """

    weights: int
    working: int
    text_cache: int
    per_candidate: int
    read_weights: int
    read_text: int
    read_per_candidate: int
    tokens: int

    def candidates(self, capacity: int) -> int:
        """Candidates per prompt that fit into `capacity` bytes."""
        room = capacity - self.weights - self.working - self.text_cache
        return max(0, room // self.per_candidate)

    def seconds_per_token(self, candidates: int, bytes_per_s: float) -> float:
        """Lower bound for one token of all candidates at a memory bandwidth."""
        own = candidates * self.read_per_candidate
        return (self.read_weights + self.read_text + own) / bytes_per_s


def budget(model: Dalle, *, prompts: int = 1, guidance: bool = False) -> Budget:
    """The budget for a call of `sampling.autoregressive.sample`.

    Args:
      model: the network.
      prompts: P, prompts in the call.
      guidance: classifier-free guidance runs the empty caption beside every prompt.
    """
    c, dtype = model.config, model.dtype
    rows = prompts * (2 if guidance else 1)
    text = jax.ShapeDtypeStruct((1, c.text_len), jnp.int32)
    codes = jax.ShapeDtypeStruct((1, c.num_image_tokens), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), text, codes)["params"]
    leaves = jax.tree.leaves(params)
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    # The matrices of the layers are stacked: [L, D, F].
    matrices = sum(leaf.size for leaf in leaves if leaf.ndim == 3)
    item = jnp.dtype(dtype.compute).itemsize
    is_cast = jnp.dtype(dtype.compute) != jnp.dtype(dtype.param)
    head = params["image_head"]
    head_size = math.prod(jax.tree.leaves(head)[0].shape)

    caches = [kv_cache.ImageCache(mask) for mask in c.layer_masks()]
    per_slot = 2 * c.transformer.width * item  # a key and a value
    own = rows * sum(cache.num_slots for cache in caches) * per_slot
    read = rows * sum(cache.num_read for cache in caches) * per_slot
    text_cache = rows * len(caches) * c.text_len * per_slot
    logits = 4 * rows * c.num_codes  # float32
    return Budget(
        weights=weights,
        working=matrices * item if is_cast else 0,
        text_cache=text_cache,
        per_candidate=own + logits + 4 * prompts * c.num_image_tokens,
        read_weights=(matrices + head_size) * item,
        read_text=text_cache,
        read_per_candidate=read,
        tokens=c.num_image_tokens,
    )


def record(budget: Budget, topology: Topology) -> dict[str, Any]:
    """The budget on one device of a topology, as plain data."""
    candidates, chip = budget.candidates(topology.capacity), topology.chip

    def floor(count: int) -> float | None:
        """Seconds per token of `count` candidates; None if unknown."""
        return budget.seconds_per_token(count, chip.hbm_bytes_per_s) if chip and count else None

    one, many = floor(1), floor(candidates)
    return {
        "topology": topology.name,
        "chip": chip.name if chip else "CPU",
        "capacity_gib": topology.capacity / GIB,
        "weights_gib": budget.weights / GIB,
        "working_copy_gib": budget.working / GIB,
        "text_cache_mib": budget.text_cache / 2**20,
        "candidate_mib": budget.per_candidate / 2**20,
        "candidates": candidates,
        "tokens": budget.tokens,
        "floor_ms_per_token_1": one * 1e3 if one else None,
        "floor_ms_per_token": many * 1e3 if many else None,
        "floor_s_per_image_1": one * budget.tokens if one else None,
        "images_per_s_bound": candidates / many / budget.tokens if many else None,
    }
