"""Writes a set of captioned pictures that `train` reads, and its tokenizer.

  python -m dalle_jax prepare shapes --image_px=32
  python -m dalle_jax prepare emoji --image_px=64
  python -m dalle_jax prepare pairs --from=folder --input=my_photos --name=photos --image_px=64
  python -m dalle_jax prepare tfds --name=coco_captions

An existing set is not changed, and an interrupted `pairs` continues. docs/data.md describes the
input of each kind and the items that it skips.
"""

import argparse
import collections
import os
import pathlib
import shlex
from typing import Any

SUMMARY = "write a set of captioned pictures and its tokenizer"

# Default number of tokenizer pieces per kind, as in the configs for that kind.
_VOCAB = {"shapes": 512, "emoji": 2048, "pairs": 4096, "tfds": 4096}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of every kind."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    threads = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)

    def kind(name: str, help: str, px: int | None, px_help: str = "side of the pictures"):
        sub = kinds.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.add_argument(
            "--data_dir", default="data", metavar="DIR", help="parent of all sets (default: data)"
        )
        if px is not None:
            sub.add_argument(
                "--image_px", type=int, default=px, metavar="N", help=f"{px_help} (default: {px})"
            )
        sub.add_argument(
            "--vocab_size",
            type=int,
            default=_VOCAB[name],
            metavar="N",
            help="pieces of the tokenizer, trained on the captions of train; 0 = no tokenizer "
            f"(default: {_VOCAB[name]})",
        )
        return sub

    shapes = kind("shapes", "generated scenes with an exact judge; needs no download", 32)
    shapes.add_argument(
        "--num_train",
        type=int,
        default=30_000,
        metavar="N",
        help="training scenes (default: 30000)",
    )
    shapes.add_argument(
        "--num_eval",
        type=int,
        default=800,
        metavar="N",
        help="scenes of validation, and as many of held_out (default: 800)",
    )
    shapes.add_argument(
        "--kinds",
        type=lambda text: text.split(","),
        metavar="A,B,…",
        help="kinds of training scenes, in turn; a kind may be named twice "
        "(default: single,count,binding,relation)",
    )
    shapes.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default: 0)")
    shapes.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that render (default: 1)"
    )

    emoji = kind("emoji", "11.5 thousand real pictures in eight styles; fetched with npm", 32)
    emoji.add_argument(
        "--skin_tones",
        action="store_true",
        help="twice as many pictures, as config <image_px>px_tones",
    )
    _add_workers(emoji, threads)
    _add_overwrite(emoji)

    pairs = kind("pairs", "your own pictures with captions", 0, "shorter side; 0 keeps all sizes")
    pairs.add_argument(
        "--from",
        dest="source_kind",
        required=True,
        choices=("folder", "wds", "jsonl", "csv", "parquet"),
        help="x.jpg + x.txt files | webdataset tars | JSON lines | table | img2dataset parquet",
    )
    pairs.add_argument(
        "--input",
        required=True,
        metavar="PATH",
        help="file or folder; for wds and parquet also a pattern",
    )
    pairs.add_argument(
        "--name", required=True, help="name of the set, e.g. my_photos: its data.source"
    )
    pairs.add_argument(
        "--validation",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of validation pictures (default: 0.01)",
    )
    pairs.add_argument("--image_field", default="", metavar="NAME", help="column of the picture")
    pairs.add_argument("--text_field", default="", metavar="NAME", help="column of the caption")
    pairs.add_argument(
        "--images",
        default="",
        metavar="DIR",
        help="folder for a table's file names (default: the table's)",
    )
    _add_workers(pairs, threads)
    _add_overwrite(pairs)

    tfds = kind("tfds", "a set of the TFDS catalogue: built, or converted from tfrecord", None)
    tfds.add_argument("--name", default="", help="name of the set, e.g. coco_captions, cifar10")
    tfds.add_argument("--input", default="", metavar="DIR", help="or a set's folder")


def _add_workers(parser: argparse.ArgumentParser, threads: int) -> None:
    parser.add_argument(
        "--workers", type=int, default=threads, metavar="N", help=f"threads (default: {threads})"
    )


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a set that was prepared with other flags"
    )


def run(args: argparse.Namespace) -> int:
    """Prepares; prints the counts and the next command."""
    from dalle_jax.data import prepared, tokenizers

    if args.vocab_size:  # checked before a set, which takes minutes, is written
        tokenizers.check_vocab_size(args.vocab_size)
    folder, summary = _PREPARE[args.kind](args)
    # With its config if the set may have several.
    with_config = args.kind == "tfds" or (args.kind == "emoji" and args.skin_tones)
    data = prepared.data_section(folder, args.data_dir, args.vocab_size, with_config=with_config)
    print(f"{folder}")
    _print_summary(summary)
    _finish(args, folder, data)
    return 0


def _shapes(args: argparse.Namespace) -> tuple[pathlib.Path, dict[str, Any]]:
    from dalle_jax.data import scenes
    from dalle_jax.data.builders import shapes

    folder = shapes.prepare(
        args.data_dir,
        image_px=args.image_px,
        num_train=args.num_train,
        num_eval=args.num_eval,
        seed=args.seed,
        workers=args.workers,
        kinds=args.kinds or scenes.KINDS,
    )
    return folder, {}


def _emoji(args: argparse.Namespace) -> tuple[pathlib.Path, dict[str, Any]]:
    from dalle_jax.data.builders import emoji

    return emoji.prepare(
        args.data_dir, args.image_px, args.skin_tones, args.overwrite, args.workers
    )


def _pairs(args: argparse.Namespace) -> tuple[pathlib.Path, dict[str, Any]]:
    from dalle_jax.data.builders import items, pairs

    fields = items.Fields(args.image_field, args.text_field, args.images)
    options = pairs.Options(args.image_px, args.validation, fields, args.workers)
    return pairs.prepare(
        args.data_dir, args.name, args.source_kind, args.input, options, args.overwrite
    )


def _tfds(args: argparse.Namespace) -> tuple[pathlib.Path, dict[str, Any]]:
    from dalle_jax.data.builders import convert

    return convert.prepare(args.data_dir, args.name, args.input)


_PREPARE = {"shapes": _shapes, "emoji": _emoji, "pairs": _pairs, "tfds": _tfds}


def _finish(args: argparse.Namespace, folder: pathlib.Path, data: Any) -> None:
    """Writes the tokenizer and the contact sheet, and prints the next command."""
    from dalle_jax.data import prepared, sources, tokenizers
    from dalle_jax.types import UsageError

    try:
        source = sources.open_split(data, "train")
    except UsageError as error:  # a catalogue set whose keys are not in STOCK
        print(f"  {error}")
        return
    if "text" in source.fields and args.vocab_size:
        path = tokenizers.model_path(data.data_dir, data.source, data.vocab_size)
        if getattr(args, "overwrite", False):
            path.unlink(missing_ok=True)  # trained on the replaced captions
        tokenizer = tokenizers.find(data)
        print(f"  tokenizer  {path} ({tokenizer.vocab_size:,} pieces)")
    if "image" in source.fields:
        path = folder.parent / f"{folder.parent.name}.png"
        prepared.contact_sheet(source).save(path)
        print(f"  pictures   {path}")
    print(f"next: {_next_command(args, data)}")


def _print_summary(summary: dict[str, Any]) -> None:
    """Prints the counts, one per line; nothing for a kind without counts."""
    for split, count in summary.get("examples", {}).items():
        print(f"  {count:>9,}  {split}")
    for title in ("styles", "left_out", "notes"):
        if summary.get(title):
            counts = collections.Counter()
            for name, count in summary[title].items():
                counts[name.split(": ")[-1]] += count  # summed over styles, unlike prepare.json
            pairs = counts.most_common()
            print(f"  {title.replace('_', ' ')}: " + ", ".join(f"{k} {n:,}" for k, n in pairs))
    skipped = summary.get("skipped") or {}
    if skipped and all(isinstance(n, int) for n in skipped.values()):
        print("  skipped: " + ", ".join(f"{n:,} x {why}" for why, n in skipped.items()))
    elif skipped:
        print(f"  skipped: {len(skipped):,}: {', '.join(list(skipped)[:5])}")
    for line in summary.get("first_skipped", ()):
        print(f"    {line}")
    if summary.get("first_skipped"):
        print("    skipped.jsonl beside the set's records lists all of them")
    if summary.get("seconds"):
        print(f"  {summary['seconds']:,.0f} s")


def _next_command(args: argparse.Namespace, data: Any) -> str:
    size = args.kind if args.kind in ("shapes", "emoji") else "pairs"
    changes = {"data.data_dir": data.data_dir}
    if data.source != size:
        changes["data.source"] = data.source
    if args.kind in ("shapes", "emoji") and data.image_px != 32:
        changes["data.image_px"] = data.image_px
    if args.kind == "pairs" and args.image_px not in (0, 64):
        changes["data.image_px"] = args.image_px
    overrides = " ".join(f"--config.{k}={shlex.quote(str(v))}" for k, v in changes.items())
    return (
        f"python -m dalle_jax train --config=configs/vqvae.py:size={size} {overrides} "
        f"--workdir=runs/{pathlib.PurePath(data.source).parts[0]}/vqvae"
    )
