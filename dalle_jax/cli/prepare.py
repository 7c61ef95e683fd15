"""Writes a set of captioned pictures that `train` reads, and its tokenizer.

  python -m dalle_jax prepare shapes --image_px=32
  python -m dalle_jax prepare emoji --image_px=64
  python -m dalle_jax prepare pairs --from=folder --input=my_photos --name=photos --image_px=64
  python -m dalle_jax prepare tfds --name=coco_captions

A set that is there is left alone; an interrupted `pairs` goes on where it stopped. docs/data.md
tells what each kind reads and what it skips.
"""

import argparse
import collections
import os
import pathlib
import shlex
from typing import Any

SUMMARY = "write a set of captioned pictures and its tokenizer"

_SHEET = 24  # pictures of the contact sheet
# Pieces of the tokenizer unless said otherwise: what the configs of that kind of caption use.
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
            help="pieces of the tokenizer trained on the captions of train; 0 = none "
            f"(default: {_VOCAB[name]})",
        )
        return sub

    shapes = kind("shapes", "generated scenes with an exact judge; needs nothing", 32)
    shapes.add_argument(
        "--num_train", type=int, default=30_000, metavar="N", help="scenes (default: 30000)"
    )
    shapes.add_argument(
        "--num_eval",
        type=int,
        default=800,
        metavar="N",
        help="scenes of validation and of held_out, each (default: 800)",
    )
    shapes.add_argument(
        "--kinds",
        type=lambda text: text.split(","),
        metavar="A,B,…",
        help="kinds of scenes to train on, which take turns; one may be named twice "
        "(default: single,count,binding,relation)",
    )
    shapes.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn")
    shapes.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that draw (default: 1)"
    )

    emoji = kind("emoji", "11.5 thousand real pictures in eight styles; fetched with npm", 32)
    emoji.add_argument(
        "--skin_tones", action="store_true", help="twice as many, as config <image_px>px_tones"
    )
    _add_workers(emoji, threads)
    _add_overwrite(emoji)

    pairs = kind("pairs", "your own pictures with captions", 0, "shorter side; 0 keeps the sizes")
    pairs.add_argument(
        "--from",
        dest="source_kind",
        required=True,
        choices=("folder", "wds", "jsonl", "csv", "parquet"),
        help="x.jpg + x.txt files | webdataset tars | JSON lines | table | img2dataset parquet",
    )
    pairs.add_argument(
        "--input", required=True, metavar="PATH", help="file or folder; wds, parquet: or a pattern"
    )
    pairs.add_argument("--name", required=True, help="of the set, e.g. my_photos: data.source")
    pairs.add_argument(
        "--validation", type=float, default=0.01, metavar="SHARE", help="share held back (0.01)"
    )
    pairs.add_argument("--image_field", default="", metavar="NAME", help="column of the picture")
    pairs.add_argument("--text_field", default="", metavar="NAME", help="column of the caption")
    pairs.add_argument(
        "--images", default="", metavar="DIR", help="where a table's file names start (its folder)"
    )
    _add_workers(pairs, threads)
    _add_overwrite(pairs)

    tfds = kind("tfds", "a set of the TFDS catalogue: built, or converted from tfrecord", None)
    tfds.add_argument("--name", default="", help="such as coco_captions or cifar10")
    tfds.add_argument("--input", default="", metavar="DIR", help="a set's folder elsewhere")


def _add_workers(parser: argparse.ArgumentParser, threads: int) -> None:
    parser.add_argument(
        "--workers", type=int, default=threads, metavar="N", help=f"threads (default: {threads})"
    )


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a set that was prepared another way"
    )


def run(args: argparse.Namespace) -> int:
    """Prepares; prints what was counted and the next command."""
    from dalle_jax.data import tokenizers

    if args.vocab_size:  # a set takes minutes, and the tokenizer comes after it
        tokenizers.check_vocab_size(args.vocab_size)
    folder, summary = _PREPARE[args.kind](args)
    folder = pathlib.Path(folder)
    data = _data_section(args, folder)
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


def _data_section(args: argparse.Namespace, folder: pathlib.Path):
    """The data section that reads what was prepared: the fields sources and tokenizer look at."""
    import ml_collections

    root = pathlib.Path(args.data_dir)
    inside = folder.is_relative_to(root)
    source = folder.relative_to(root).parts[0] if inside else str(folder)
    if args.kind == "tfds" and inside:  # with its config: a catalogue set may have several
        source = folder.parent.relative_to(root).as_posix()
    size = folder.parent.name.removesuffix("px").removesuffix("px_tones")
    if args.kind == "emoji" and args.skin_tones:
        source = f"{source}/{folder.parent.name}"
    return ml_collections.ConfigDict(
        dict(
            source=source,
            data_dir=args.data_dir,
            split="train",
            image_px=int(size) if size.isdigit() else 8,
            image_key="image",
            caption_key="captions",
            label_template="",
            vocab_size=args.vocab_size,
        )
    )


def _finish(args: argparse.Namespace, folder: pathlib.Path, data: Any) -> None:
    """The tokenizer, the contact sheet and the next command."""
    from dalle_jax.data import sources, tokenizers
    from dalle_jax.types import UsageError

    try:
        source = sources.open_split(data, "train")
    except UsageError as error:  # a catalogue set whose keys are not in our table
        print(f"  {error}")
        return
    if "text" in source.fields and args.vocab_size:
        path = tokenizers.model_path(data.data_dir, data.source, data.vocab_size)
        if getattr(args, "overwrite", False):
            path.unlink(missing_ok=True)  # of the captions that were replaced
        found = tokenizers.find(data)
        print(f"  tokenizer  {path} ({found.vocab_size:,} pieces)")
    if "image" in source.fields:
        sheet = contact_sheet(source)
        path = folder.parent / f"{folder.parent.name}.png"
        sheet.save(path)
        print(f"  look       {path}")
    print(f"next: {_next_command(args, data)}")


def contact_sheet(source: Any, count: int = _SHEET):
    """A PIL image of `count` examples spread over the split, with one of their captions each."""
    import numpy as np
    from PIL import Image

    from dalle_jax import images

    count = min(count, len(source))
    pixels, labels, side = [], [], 0
    for i, index in enumerate(np.linspace(0, len(source) - 1, count).astype(int)):
        example = source[index]
        if isinstance(example.image, bytes):
            image = images.decode(example.image, example.id)
        else:
            image = np.asarray(example.image)
            image = np.repeat(image, 3, -1) if image.shape[-1] == 1 else image
        side = side or min(128, max(32, min(image.shape[:2])))
        picture = Image.fromarray(image)
        low = min(picture.size)
        left, top = (picture.width - low) // 2, (picture.height - low) // 2
        picture = picture.crop((left, top, left + low, top + low))
        if low != side:
            picture = picture.resize((side, side), Image.Resampling.LANCZOS)
        pixels.append(np.asarray(picture))
        labels.append(example.captions[i % len(example.captions)])
    return images.grid(np.stack(pixels), 8, labels, scale=max(1, 128 // side))


def _print_summary(summary: dict[str, Any]) -> None:
    """Counts, a line each; nothing for a kind that has none."""
    for split, count in summary.get("examples", {}).items():
        print(f"  {count:>9,}  {split}")
    for title in ("styles", "left_out", "notes"):
        if summary.get(title):
            counts = collections.Counter()
            for name, count in summary[title].items():
                counts[name.split(": ")[-1]] += count  # over styles; prepare.json has them apart
            found = counts.most_common()
            print(f"  {title.replace('_', ' ')}: " + ", ".join(f"{k} {n:,}" for k, n in found))
    skipped = summary.get("skipped") or {}
    if skipped and all(isinstance(n, int) for n in skipped.values()):
        print("  skipped: " + ", ".join(f"{n:,} x {why}" for why, n in skipped.items()))
    elif skipped:
        print(f"  skipped: {len(skipped):,}: {', '.join(list(skipped)[:5])}")
    for line in summary.get("first_skipped", ()):
        print(f"    {line}")
    if summary.get("first_skipped"):
        print("    all of them are in skipped.jsonl beside the set's records")
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
