"""What the suites of `evaluate` share: skills, ids, chunks, batches of a split, how DALL-E draws.

No command itself; it has no SUMMARY.
"""

import argparse
from collections.abc import Callable

BATCH = 64  # pictures at a time through codec and CLIP


def skills(args: argparse.Namespace) -> tuple[str, ...]:
    """Of --skills: all without it.

    Raises:
      UsageError: for a name that is none, or twice the same.
    """
    from dalle_jax.data import scenes
    from dalle_jax.types import UsageError

    if not args.skills:
        return scenes.KINDS
    names = tuple(args.skills.split(","))
    if set(names) - set(scenes.KINDS) or len(set(names)) < len(names):
        raise UsageError(
            f"--skills={args.skills}; expected some of {', '.join(scenes.KINDS)}, each once."
        )
    return names


def tokens(stage) -> Callable:
    """Captions to ids by the stage's own tokenizer."""

    own, data = stage.tokenizer, stage.config.data
    return lambda captions: own.encode(captions, data.text_len, add_bos_eos=data.add_bos_eos)


def batched(function: Callable, size: int = BATCH) -> Callable:
    """`function` on chunks of one shape: the last is filled up, so that nothing compiles twice."""
    import numpy as np

    def apply(rows):
        parts = []
        for start in range(0, len(rows), size):
            part = np.asarray(rows[start : start + size])
            filled = np.concatenate([part, np.repeat(part[:1], size - len(part), axis=0)])
            parts.append(np.asarray(function(filled))[: len(part)])
        return np.concatenate(parts)

    return apply


def batches(args: argparse.Namespace, config, wanted: set[str], tokenizer=None) -> tuple:
    """(the split's name, batches of its first examples in order).

    Args:
      args: of the command; its --source, --data_dir and --split go before the config's.
      config: of a trained network.
      wanted: see `data.pipeline.make`.
      tokenizer: see there.
    """
    from dalle_jax import config as cfg
    from dalle_jax.data import pipeline

    data = cfg.ConfigDict(config.data.to_dict())
    data.source, data.data_dir = args.source or data.source, args.data_dir or data.data_dir
    split = args.split or data.eval_split
    size = min(BATCH, args.num_examples)
    pictures = pipeline.make(
        data, args.seed, split=split, wanted=wanted, tokenizer=tokenizer, training=False, batch=size
    )
    num = min(args.num_examples, pictures.num_examples)

    def made():
        for step in range(-(-num // size)):
            batch = pictures(step)
            yield {name: rows[: num - step * size] for name, rows in batch.items()}

    return split, made()


def dalle_generator(args: argparse.Namespace, dalle) -> Callable:
    """(ids [P, T], N, index of the first prompt) -> uint8 [P, N, h, h, 3] by a DALL-E.

    Raises:
      UsageError: for settings of the draw that cannot work.
    """
    import jax

    from dalle_jax import images
    from dalle_jax.engine import meshes, sharding
    from dalle_jax.sampling import categorical
    from dalle_jax.sampling import dalle as sampling

    categorical.check(
        args.temperature, args.top_k, args.top_p, args.guidance, dalle.codec.num_codes
    )
    mesh, decode = meshes.local(), batched(dalle.codec.decode)

    def generate(ids, num_candidates, first_prompt):
        codes = sampling.sample(
            dalle.model,
            dalle.on(sharding.replicated(mesh)),
            ids,
            num_candidates=num_candidates,
            key=jax.random.key(args.seed),
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            guidance=args.guidance,
            first_prompt=first_prompt,
            mesh=mesh,
        )
        codes = jax.device_get(codes)
        pictures = decode(codes.reshape(-1, codes.shape[-1]))
        return images.to_uint8(pictures).reshape(*codes.shape[:2], *pictures.shape[1:])

    return generate
