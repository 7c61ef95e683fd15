"""Draws the pictures that lie between two pictures, with DALL-E 2.

  python -m dalle_jax interpolate --pretrained=shapes --image=a.png --image=b.png --num=7
  … --noise=fixed     the same noise for all: smoother, but its ends are only variations

Each picture is read as its CLIP embedding and the noise from which the decoder draws just this
picture; between them both go along great circles (slerp), so that the ends are the pictures
themselves, as well as the decoder can draw them again.

Written to --out: given_1.png and given_2.png (as they were cut to the square that is used), the
pictures 01.png, 02.png, … from the first to the second, sheet.png, index.html and results.json with
the CLIP cosines of each to both.
"""

import argparse
import functools
import pathlib
import sys
import time

from dalle_jax.cli import _prompts, _unclip

SUMMARY = "draw the pictures between two pictures (DALL-E 2)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    _unclip.add_networks(parser)
    group = parser.add_argument_group("what to draw")
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
    group = parser.add_argument_group("how to draw")
    _unclip.add_guidance(group, 1.0)
    _unclip.add_drawing(group)
    _unclip.add_output(parser, "interpolation")


def run(args: argparse.Namespace) -> int:
    """Draws and writes; returns the exit code."""
    import jax
    import numpy as np

    from dalle_jax import images
    from dalle_jax.cli import _flags, gallery
    from dalle_jax.engine import meshes
    from dalle_jax.sampling import manipulate, unclip
    from dalle_jax.types import UsageError

    _unclip.check(args)
    if len(args.image) != 2:
        raise UsageError(f"{len(args.image)} pictures; give --image=A --image=B, two.")
    if args.num < 2:
        raise UsageError(f"--num={args.num}; expected 2 (both ends) or more.")
    _flags.use_cache(args)
    stages, drawing, mesh = _unclip.load(args), _unclip.drawing(args), meshes.local()
    given = [_unclip.read_picture(path, stages.image_px) for path in args.image]
    pair = np.stack([picture for picture, _, _ in given])
    start, out, key = time.monotonic(), pathlib.Path(args.out), jax.random.key(args.seed)
    ends = manipulate.invert(stages, images.to_float(pair), drawing)
    thetas = np.linspace(0, 1, args.num)
    way = manipulate.between(stages, ends, thetas, args.noise, key=key)
    tell = functools.partial(_prompts.progress, "between", start, args.num)
    indices = np.arange(args.num)
    small = manipulate.sample(
        stages, way, drawing, key=key, indices=indices, mesh=mesh, progress=tell
    )
    # One noise for the upsamplers, so that the way is as smooth as the decoder's.
    drawn = unclip.upsample(stages, small, drawing, key=key, indices=0 * indices, mesh=mesh)
    near = [_unclip.cosines(stages.clip, drawn, z[None]) for z in ends.z]
    gallery.clear(out)
    labels = [f"{t:.2f} · {a:.3f} {b:.3f}" for t, a, b in zip(thetas, *near, strict=True)]
    block = gallery.Block(
        folder="",
        title="From one picture to the other",
        text=f"Between {args.image[0]} and {args.image[1]}, noise {args.noise}; with each picture "
        "its place on the way and its CLIP cosines to both. "
        f"{time.monotonic() - start:.1f} seconds.",
        pictures=np.concatenate([pair[:1], images.to_uint8(drawn), pair[1:]]),
        names=["given_1", *(f"{n:02d}" for n in range(1, args.num + 1)), "given_2"],
        labels=["given", *labels, "given"],
        figures={
            "images": args.image,
            "noise": args.noise,
            "theta": [round(float(t), 4) for t in thetas],
            "cosine_first": near[0],
            "cosine_second": near[1],
        },
    )
    notes = [note for _, _, some in given for note in some]
    module = sys.modules[__name__]
    return gallery.finish(args, module, "Interpolation", [block], stages.parts, notes)
