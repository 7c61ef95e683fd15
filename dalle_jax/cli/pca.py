"""Fits the principal components of a CLIP's image embeddings, which the AR prior predicts.

  python -m dalle_jax pca --clip=runs/clip --out=runs/pca.npz
  python -m dalle_jax train --config=configs/prior_ar.py --config.stages.pca=runs/pca.npz …

The set, its folder and its keys are those of the CLIP's training, unless flags override them. The
command prints the share of the variance that the components explain, and the cosine between an
embedding and its quantised self.
"""

import argparse

from dalle_jax.cli import _flags, _sets

SUMMARY = "fit the PCA of a CLIP's image embeddings, for the autoregressive prior"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument(
        "--clip", required=True, metavar="DIR", help="a CLIP: a run's folder or an exported one"
    )
    parser.add_argument("--out", required=True, metavar="FILE.npz", help="file to write")
    _sets.add_flags(parser, "the CLIP", "embed")
    parser.add_argument("--split", default="train", metavar="NAME", help="default: %(default)s")
    parser.add_argument(
        "--max_examples",
        type=int,
        default=0,
        metavar="N",
        help="embed only the first N pictures (default: 0, all)",
    )
    parser.add_argument(
        "--dims", type=int, default=0, metavar="K", help="components (default: by --variance)"
    )
    parser.add_argument(
        "--variance",
        type=float,
        default=0.99,
        metavar="SHARE",
        help="without --dims: the fewest components that explain this share (default: %(default)s, "
        "as in the paper)",
    )
    parser.add_argument(
        "--buckets",
        type=int,
        default=1024,
        metavar="V",
        help="buckets per component (default: %(default)s)",
    )
    parser.add_argument(
        "--batch", type=int, default=256, metavar="N", help="pictures per batch (default: 256)"
    )
    _flags.add_cache(parser)


def run(args: argparse.Namespace) -> int:
    """Fits."""
    import jax

    _flags.use_cache(args)

    from dalle_jax.data import pipeline
    from dalle_jax.data.builders import store
    from dalle_jax.engine import console, meshes, sharding
    from dalle_jax.stages import embeddings, pca
    from dalle_jax.stages.clip import ClipStage
    from dalle_jax.types import UsageError

    for flag, least in (("batch", 1), ("max_examples", 0), ("dims", 0), ("buckets", 2)):
        if getattr(args, flag) < least:
            raise UsageError(
                f"--{flag}={getattr(args, flag)} is out of range; expected {least} or more."
            )
    if not args.out.endswith(".npz"):
        raise UsageError(f"--out={args.out!r} must end in .npz.")
    clip = ClipStage.load(args.clip)
    config = _sets.data_config(args, clip.config)
    config.cache_mib = 0  # every picture is read once
    mesh = meshes.local()
    batches = pipeline.make(
        config,
        0,
        split=args.split,
        fields={"image", "text"},
        tokenizer=clip.tokenizer,
        training=False,
        batch=-(-args.batch // mesh.size) * mesh.size,
    )
    total = min(batches.num_examples, args.max_examples or batches.num_examples)
    progress = store.Progress(total, "pictures embedded")
    image, text = embeddings.of_batches(
        clip,
        batches,
        total,
        sharding=sharding.batch_sharding(mesh),
        replicated=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
        progress=progress.add,
    )
    progress.close()
    batches.close()
    result = pca.fit(
        image,
        text,
        num_dims=args.dims,
        variance=args.variance,
        num_buckets=args.buckets,
        fingerprint=clip.fingerprint,
    )
    pca.save(result, args.out)
    console.log(
        f"{args.out}: {result.num_dims} of {result.joint_width} components of {total:,} embeddings "
        f"explain {result.explained(result.num_dims):.4f} of the variance; {result.num_buckets} "
        "buckets each; the cosine between an embedding and its quantised self is "
        f"{pca.quantised_cosine(result, image[:4096]):.4f}"
        + (f"; {sum(batches.skipped.values())} pictures skipped" if batches.skipped else "")
    )
    return 0
