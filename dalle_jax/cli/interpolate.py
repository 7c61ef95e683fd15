"""Samples the pictures between two pictures with DALL-E 2.

  python -m dalle_jax interpolate --pretrained=shapes --image=a.png --image=b.png --num=7
  … --noise=fixed     the same noise for all: smoother, but its ends are only variations

Each picture is represented by its CLIP embedding and the noise from which the decoder samples
exactly this picture. Both are interpolated along great circles (slerp), so that the ends are the
pictures themselves, as well as the decoder can reproduce them.

--out receives given_1.png and given_2.png (the squares that are used), the pictures 01.png,
02.png, … from the first to the second, sheet.png, index.html, and results.json with the CLIP
cosines between each picture and both given ones.
"""

import argparse
import pathlib
import sys
import time

from dalle_jax.cli import _flags, _unclip

SUMMARY = "sample the pictures between two pictures (DALL-E 2)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    _unclip.add_networks(parser)
    group = parser.add_argument_group("what to sample")
    group.add_argument(
        "--image", action="append", required=True, metavar="FILE", help="picture; give two"
    )
    group.add_argument(
        "--num",
        type=int,
        default=7,
        metavar="N",
        help="pictures, both ends among them (default: %(default)s)",
    )
    group.add_argument(
        "--noise",
        choices=("slerp", "fixed"),
        default="slerp",
        help="from one picture's noise to the other's, or one for all (default: %(default)s)",
    )
    group = parser.add_argument_group("how to sample")
    _unclip.add_guidance(group, 1.0)
    _unclip.add_sampling(group)
    _unclip.add_output(parser, "interpolation")


def run(args: argparse.Namespace) -> int:
    """Samples and writes; returns the exit code."""
    import numpy as np

    from dalle_jax.pages import gallery
    from dalle_jax.types import UsageError

    _unclip.check(args)
    if len(args.image) != 2:
        raise UsageError(f"{len(args.image)} pictures; give --image=A --image=B, two.")
    if args.num < 2:
        raise UsageError(f"--num={args.num}; expected 2 (both ends) or more.")
    _flags.use_cache(args)
    model = _unclip.model(args)
    px = model.unclip(upsample=not args.no_upsample).image_px
    first, second = (_unclip.read_picture(path, px) for path in args.image)
    start = time.monotonic()
    between = model.interpolate(
        first.picture, second.picture, args.num, noise=args.noise,
        **_unclip.common(args, "between", args.num),
    )  # fmt: skip
    gallery.clear(pathlib.Path(args.out))
    figures = {name: [p.figures[name] for p in between] for name in between[0].figures}
    labels = [f"{t:.2f} · {a:.3f} {b:.3f}" for t, a, b in zip(*figures.values(), strict=True)]
    block = gallery.Block(
        folder="",
        title="From one picture to the other",
        text=f"Between {first.path} and {second.path}, noise {args.noise}; with each picture its "
        "place on the path and its CLIP cosines to both. "
        f"{time.monotonic() - start:.1f} seconds.",
        pictures=np.concatenate([first.picture[None], between.arrays, second.picture[None]]),
        names=["given_1", *(f"{n:02d}" for n in range(1, args.num + 1)), "given_2"],
        labels=["given", *labels, "given"],
        figures={"images": args.image, "noise": args.noise, **figures},
        metadata=[{}, *(picture.metadata for picture in between), {}],
    )
    module, notes = sys.modules[__name__], first.notes + second.notes
    return _unclip.finish(args, module, "Interpolation", [block], between.stages, notes)
