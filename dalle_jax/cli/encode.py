"""Stores the codes of a set's pictures, so that DALL-E trains without running the codec.

  python -m dalle_jax encode --workdir=runs/dvae --name=shapes_codes
  python -m dalle_jax train --config=configs/dalle.py --config.data.source=shapes_codes …

The set, its folder and its keys are those that the codec was trained on, unless given here. The
codes stand in the order of the pictures, so a run on them sees the batches that a run on the
pictures would see. All local devices work on a batch together.
"""

import argparse

from dalle_jax.cli import _flags

SUMMARY = "store the codes of a set's pictures for faster DALL-E training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    _flags.add_workdir(parser, "a trained dVAE or VQ-VAE: a run's folder or an exported one")
    parser.add_argument("--name", required=True, metavar="SET", help="name of the set to write")
    parser.add_argument("--source", metavar="SET", help="set to encode (default: the codec's own)")
    parser.add_argument(
        "--data_dir", metavar="DIR", help="where prepared sets live (default: the codec's own)"
    )
    parser.add_argument(
        "--split",
        default="train,validation",
        metavar="NAMES",
        help="splits to encode, with commas (default: %(default)s)",
    )
    parser.add_argument(
        "--crop",
        choices=("none", "center"),
        help="how a picture is made square: squeezed or cut (default: none if the codec was "
        "trained so, else center)",
    )
    for key in ("image_key", "caption_key", "label_template"):
        parser.add_argument(f"--{key}", help=f"as data.{key} of a config")
    parser.add_argument(
        "--batch", type=int, default=256, metavar="N", help="pictures at once (default: 256)"
    )
    parser.add_argument(
        "--threads", type=int, default=2, metavar="N", help="decoding threads (default: 2)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a set of that name made otherwise"
    )
    _flags.add_cache(parser)


def run(args: argparse.Namespace) -> int:
    """Encodes."""
    import jax

    _flags.use_cache(args)

    from dalle_jax import images
    from dalle_jax.config import ConfigDict
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
            f"encode was started in {jax.process_count()} processes; it writes one set, so start "
            "it in one (it uses all devices of that machine)."
        )

    codec = Codec.load(args.workdir)
    config = ConfigDict(codec.config.data.to_dict())
    for key in ("source", "data_dir", "image_key", "caption_key", "label_template"):
        if getattr(args, key) is not None:
            config[key] = getattr(args, key)
    if args.name == config.source:
        raise UsageError(f"--name={args.name!r} is the set to encode; give the codes another name.")
    opened = {split: sources.open_split(config, split) for split in splits}
    for split, source in opened.items():
        if "image" not in source.fields:
            raise UsageError(
                f"{config.source!r} has no pictures in {split!r}; it holds "
                f"{', '.join(sorted(source.fields))}. Choose another --source."
            )

    mesh = meshes.local()
    batch = -(-args.batch // mesh.size) * mesh.size
    layout = sharding.batch_sharding(mesh)

    def encode(pictures):
        return codec.encode(jax.device_put(images.to_float(pictures), layout))

    path, summary = codes.write(
        data_dir=config.data_dir,
        name=args.name,
        splits=opened,
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
        f"{path}: codes of {total - lost:,} pictures, {codec.grid} x {codec.grid} of "
        f"{codec.num_codes}" + (f"; {lost:,} skipped: {summary['skipped']}" if lost else "")
    )
    return 0
