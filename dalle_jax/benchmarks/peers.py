"""Other projects' versions of the cases of `bench`, by name: the same work in PyTorch.

PyTorch and these projects are no dependencies: `torch_peers` imports them when a peer is named.
This module does not import jax before that either, because cli/bench.py reads `NAMES` first.
"""

from __future__ import annotations

import functools
import typing

if typing.TYPE_CHECKING:
    from dalle_jax.benchmarks.measure import Case
    from dalle_jax.config import ConfigDict

# Case -> the names of its peers.
NAMES = {
    "dalle_train": ("gpt", "dalle-pytorch"),
    "dalle_sample": ("gpt",),
    "dvae_train": ("dalle-pytorch",),
    "dvae_codec": ("dall_e",),
    "clip_train": ("transformers",),
    "clip_score": ("transformers",),
    "prior_train": ("diffusers", "dalle2-pytorch"),
    "prior_sample": ("diffusers", "dalle2-pytorch"),
    "unet_train": ("diffusers", "dalle2-pytorch"),
}

# DALLE-pytorch depends on a tokenizer that can no longer be built, hence --no-deps.
INSTALL = (
    "pip install torch diffusers transformers DALL-E dalle2-pytorch "
    "'axial-positional-embedding<0.3' && pip install --no-deps dalle-pytorch"
)


def build(case: str, name: str, config: ConfigDict, threads: int) -> Case:
    """A peer's version of a case.

    Args:
      case: a key of `NAMES`.
      name: one of its values.
      config: the case's config, for its sizes; the inputs are sampled anew.
      threads: threads of PyTorch; 0 = its default.

    Raises:
      UsageError: if the packages are not installed.
    """
    from dalle_jax.benchmarks import cases
    from dalle_jax.types import UsageError

    try:
        import torch

        from dalle_jax.benchmarks import torch_peers
    except ImportError as error:
        raise UsageError(f"--against={name} times other projects ({error}): {INSTALL}") from error
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(config.seed)
    steps = dict(steps=cases.PRIOR_STEPS)
    known = {
        ("dalle_train", "gpt"): torch_peers.gpt_train,
        ("dalle_train", "dalle-pytorch"): torch_peers.dalle_pytorch_train,
        ("dalle_sample", "gpt"): torch_peers.gpt_sample,
        ("dvae_train", "dalle-pytorch"): torch_peers.dalle_pytorch_dvae,
        ("dvae_codec", "dall_e"): torch_peers.dall_e_codec,
        ("clip_train", "transformers"): torch_peers.clip_train,
        ("clip_score", "transformers"): torch_peers.clip_score,
        ("prior_train", "diffusers"): torch_peers.diffusers_prior_train,
        ("prior_train", "dalle2-pytorch"): torch_peers.dalle2_prior_train,
        ("prior_sample", "diffusers"): functools.partial(
            torch_peers.diffusers_prior_sample, **steps
        ),
        ("prior_sample", "dalle2-pytorch"): functools.partial(
            torch_peers.dalle2_prior_sample, **steps
        ),
        ("unet_train", "diffusers"): torch_peers.diffusers_unet,
        ("unet_train", "dalle2-pytorch"): torch_peers.dalle2_unet,
    }
    return known[case, name](config)
