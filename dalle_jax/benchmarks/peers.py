"""What other projects make of the cases of `bench`, by name: the same work in PyTorch.

PyTorch and they are no dependencies of this project: `torch_peers` imports them when one is asked
for. Nothing here imports jax before that either, for cli/bench.py reads `NAMES` first.
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

# DALLE-pytorch asks for a tokenizer that builds no more, hence --no-deps.
INSTALL = (
    "pip install torch diffusers transformers DALL-E dalle2-pytorch "
    "'axial-positional-embedding<0.3' && pip install --no-deps dalle-pytorch"
)


def build(case: str, name: str, config: ConfigDict, threads: int) -> Case:
    """A peer's version of a case.

    Args:
      case: a key of `NAMES`.
      name: one of its values.
      config: of `cases.config_of`; its sizes are taken, its inputs are drawn anew.
      threads: of PyTorch; 0 = as many as it takes.

    Raises:
      UsageError: if the packages are not there.
    """
    from dalle_jax.benchmarks import cases
    from dalle_jax.types import UsageError

    try:
        import torch

        from dalle_jax.benchmarks import torch_peers as made
    except ImportError as error:
        raise UsageError(f"--against={name} times other projects ({error}): {INSTALL}") from error
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(config.seed)
    steps = dict(steps=cases.PRIOR_STEPS)
    known = {
        ("dalle_train", "gpt"): made.gpt_train,
        ("dalle_train", "dalle-pytorch"): made.dalle_pytorch_train,
        ("dalle_sample", "gpt"): made.gpt_sample,
        ("dvae_train", "dalle-pytorch"): made.dalle_pytorch_dvae,
        ("dvae_codec", "dall_e"): made.dall_e_codec,
        ("clip_train", "transformers"): made.clip_train,
        ("clip_score", "transformers"): made.clip_score,
        ("prior_train", "diffusers"): made.diffusers_prior_train,
        ("prior_train", "dalle2-pytorch"): made.dalle2_prior_train,
        ("prior_sample", "diffusers"): functools.partial(made.diffusers_prior_sample, **steps),
        ("prior_sample", "dalle2-pytorch"): functools.partial(made.dalle2_prior_sample, **steps),
        ("unet_train", "diffusers"): made.diffusers_unet,
        ("unet_train", "dalle2-pytorch"): made.dalle2_unet,
    }
    return known[case, name](config)
