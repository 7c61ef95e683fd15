"""Stores the codes of a set's pictures, so that DALL-E trains without running the codec.

  python -m dalle_jax encode --workdir=runs/dvae --name=shapes_codes
  python -m dalle_jax train --config=configs/dalle.py --config.data.source=shapes_codes …

The set, its folder and its keys are those of the codec's training, unless flags override them. The
codes have the order of the pictures, so a run on them sees the batches that a run on the pictures
would see. Each batch is divided among all local devices.
"""

import argparse

from dalle_jax.cli import _flags, _sets

SUMMARY = "store the codes of a set's pictures for faster DALL-E training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    _flags.add_workdir(parser, "a trained dVAE or VQ-VAE: a run's folder or an exported one")
    parser.add_argument("--name", required=True, metavar="SET", help="name of the set to write")
    _sets.add_flags(parser, "the codec", "encode")
    parser.add_argument(
        "--split",
        default="train,validation",
        metavar="NAMES",
        help="splits to encode, separated by commas (default: %(default)s)",
    )
    parser.add_argument(
        "--crop",
        choices=("none", "center"),
        help="none squeezes a picture to a square, center cuts one out (default: none if the codec "
        "was trained with it, else center)",
    )
    parser.add_argument(
        "--batch", type=int, default=256, metavar="N", help="pictures per batch (default: 256)"
    )
    parser.add_argument(
        "--threads", type=int, default=2, metavar="N", help="decoding threads (default: 2)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing set of that name"
    )
    _flags.add_cache(parser)


def run(args: argparse.Namespace) -> int:
    """Encodes."""
    import jax

    _flags.use_cache(args)

    from dalle_jax import images
    from dalle_jax.data import sources
    from dalle_jax.data.builders import codes, store
    from dalle_jax.engine import console, meshes, sharding
    from dalle_jax.stages.codec import Codec
    from dalle_jax.types import UsageError

    for flag in ("batch", "threads"):
        if getattr(args, flag) < 1:
            raise UsageError(f"--{flag}={getattr(args, flag)} is out of range; expected 1 or more.")
    store.check_name(args.name)
    splits = [split.strip() for split in args.split.split(",") if split.strip()]
    if not splits:
        raise UsageError(f"--split={args.split!r} names no split; expected e.g. train,validation.")
    if jax.process_count() > 1:
        raise UsageError(
            f"encode was started in {jax.process_count()} processes, but it writes one set; start "
            "it in one process, which uses all devices of that machine."
        )

    codec = Codec.load(args.workdir)
    config = _sets.data_config(args, codec.config)
    if args.name == config.source:
        raise UsageError(f"--name={args.name!r} is the set to encode; choose another.")
    sources_by_split = {split: sources.open_split(config, split) for split in splits}
    for split, source in sources_by_split.items():
        if "image" not in source.fields:
            raise UsageError(
                f"{config.source!r} has no pictures in {split!r}; it holds "
                f"{', '.join(sorted(source.fields))}. Choose another --source."
            )

    mesh = meshes.local()
    batch = -(-args.batch // mesh.size) * mesh.size
    batch_sharding = sharding.batch_sharding(mesh)

    def encode(pictures):
        return codec.encode(jax.device_put(images.to_float(pictures), batch_sharding))

    path, summary = codes.write(
        data_dir=config.data_dir,
        name=args.name,
        splits=sources_by_split,
        encode=encode,
        codec=dict(
            fingerprint=codec.fingerprint,
            grid=int(codec.grid),
            num_codes=int(codec.num_codes),
            workdir=str(codec.folder),
            step=int(codec.step),
        ),
        batch=batch,
        image_px=codec.image_px,
        crop=args.crop or ("none" if config.crop == "none" else "center"),
        threads=args.threads,
        overwrite=args.overwrite,
    )
    codes.copy_tokenizers(config.data_dir, config.source, args.name)
    total = sum(summary["recipe"]["splits"].values())
    lost = sum(summary["skipped"].values())
    console.log(
        f"{path}: codes of {total - lost:,} pictures, each {codec.grid} x {codec.grid} of "
        f"{codec.num_codes} codes" + (f"; {lost:,} skipped: {summary['skipped']}" if lost else "")
    )
    return 0
