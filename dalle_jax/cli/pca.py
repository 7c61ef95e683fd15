"""Fits the principal components of a CLIP's image embeddings, the alphabet of the AR prior.

  python -m dalle_jax pca --clip=runs/clip --out=runs/pca.npz
  python -m dalle_jax train --config=configs/prior_ar.py --config.stages.pca=runs/pca.npz …

The set, its folder and its keys are those that the CLIP was trained on, unless given here. Prints
how much of the variance the kept components explain, and how close an embedding is to its
quantised self.
"""

import argparse

from dalle_jax.cli import _flags

SUMMARY = "fit the PCA of a CLIP's image embeddings, for the autoregressive prior"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument(
        "--clip", required=True, metavar="DIR", help="a trained CLIP: a run's folder or an exported"
    )
    parser.add_argument("--out", required=True, metavar="FILE.npz", help="file to write")
    parser.add_argument("--source", metavar="SET", help="set to embed (default: the CLIP's own)")
    parser.add_argument(
        "--data_dir", metavar="DIR", help="where prepared sets live (default: the CLIP's own)"
    )
    parser.add_argument("--split", default="train", metavar="NAME", help="default: %(default)s")
    parser.add_argument(
        "--max_examples",
        type=int,
        default=0,
        metavar="N",
        help="embed the first N pictures only (default: 0, all)",
    )
    parser.add_argument(
        "--dims", type=int, default=0, metavar="K", help="components to keep (default: see below)"
    )
    parser.add_argument(
        "--variance",
        type=float,
        default=0.99,
        metavar="SHARE",
        help="without --dims: as few as explain this share (default: %(default)s, as the paper)",
    )
    parser.add_argument(
        "--buckets",
        type=int,
        default=1024,
        metavar="V",
        help="per component (default: %(default)s)",
    )
    parser.add_argument(
        "--batch", type=int, default=256, metavar="N", help="pictures at once (default: 256)"
    )
    for key in ("image_key", "caption_key", "label_template"):
        parser.add_argument(f"--{key}", help=f"as data.{key} of a config")
    _flags.add_cache(parser)


def run(args: argparse.Namespace) -> int:
    """Fits."""
    import pathlib
    import sys

    import jax
    import numpy as np

    _flags.use_cache(args)

    from dalle_jax import images
    from dalle_jax.config import ConfigDict
    from dalle_jax.data import pipeline
    from dalle_jax.data.builders import store
    from dalle_jax.engine import console, meshes, sharding
    from dalle_jax.stages import pca
    from dalle_jax.stages.clip import ClipStage
    from dalle_jax.types import UsageError

    for flag, least in (("batch", 1), ("max_examples", 0), ("dims", 0), ("buckets", 2)):
        if getattr(args, flag) < least:
            raise UsageError(
                f"--{flag}={getattr(args, flag)} is out of range; expected {least} or more."
            )
    out = pathlib.Path(args.out).expanduser()
    if out.suffix != ".npz":
        raise UsageError(f"--out={args.out!r} must end in .npz.")
    clip = ClipStage.load(args.clip)
    config = ConfigDict(clip.config.data.to_dict())
    for key in ("source", "data_dir", "image_key", "caption_key", "label_template"):
        if getattr(args, key) is not None:
            config[key] = getattr(args, key)
    config.cache_mib = 0  # every picture is read once
    mesh = meshes.local()
    batch = -(-args.batch // mesh.size) * mesh.size
    batches = pipeline.make(
        config,
        0,
        split=args.split,
        wanted={"image", "text"},
        tokenizer=clip.tokenizer,
        training=False,
        batch=batch,
    )
    total = min(batches.num_examples, args.max_examples or batches.num_examples)
    params = clip.on(jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    layout = sharding.batch_sharding(mesh)

    @jax.jit
    def embed(params, pictures, text):
        return clip.embeddings(params, images.to_float(pictures), text)

    progress = store.Progress(total, "pictures embedded", sys.stderr)
    found = []
    for step in range(-(-total // batch)):
        made = batches(step)
        pictures, text = (jax.device_put(made[name], layout) for name in ("image", "text"))
        pair = [np.asarray(z)[: total - step * batch] for z in embed(params, pictures, text)]
        found.append(pair)
        progress.add(len(pair[0]))
    progress.close()
    batches.close()
    z_i, z_t = (np.concatenate(z) for z in zip(*found, strict=True))
    fitted = pca.fit(
        z_i,
        z_t,
        num_dims=args.dims,
        variance=args.variance,
        num_buckets=args.buckets,
        fingerprint=clip.fingerprint,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_bytes(pca.to_bytes(fitted))
    part.replace(out)
    tables, few = fitted.tables(), z_i[:4096]
    again = np.asarray(pca.dequantise(tables, pca.quantise(tables, few)))
    console.log(
        f"{out}: {fitted.num_dims} of {fitted.joint_width} components of {total:,} embeddings "
        f"explain {fitted.explained(fitted.num_dims):.4f} of the variance; {fitted.num_buckets} "
        f"buckets each; cosine of an embedding to its quantised self "
        f"{np.sum(few * again, axis=1).mean():.4f}"
        + (f"; {sum(batches.skipped.values())} pictures skipped" if batches.skipped else "")
    )
    return 0
