"""Draws variations of a picture with DALL-E 2: what CLIP sees in it stays, the rest may change.

  python -m dalle_jax vary --pretrained=shapes --image=picture.png --n=8
  python -m dalle_jax vary --decoder=runs/decoder --image=picture.png --eta=0.5

The picture is read as two things: its CLIP embedding, and the noise from which the decoder draws
just this picture (by DDIM inversion). With fresh noise in every step (--eta above 0) the decoder
draws other pictures of the same embedding; --eta=0 gives the picture back, as well as the decoder
can. --guidance above 1 makes variations more alike and the inversion less exact.

Written to --out: a folder per picture with given.png (as it was cut to the square that is used),
00.png (drawn from the unchanged latent) and the variations 01.png, 02.png, …; sheet.png, index.html
and results.json with the CLIP cosine of each to the picture given.
"""

import argparse
import functools
import pathlib
import sys
import time

from dalle_jax.cli import _prompts, _unclip

SUMMARY = "draw variations of a picture (DALL-E 2)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    _unclip.add_networks(parser)
    group = parser.add_argument_group("what to draw")
    group.add_argument(
        "--image", action="append", required=True, metavar="FILE", help="picture; repeatable"
    )
    group.add_argument("--n", type=int, default=8, help="variations of each (default: %(default)s)")
    group = parser.add_argument_group("how to draw")
    _unclip.add_guidance(group, 1.0)
    _unclip.add_drawing(group, eta=1.0)
    _unclip.add_output(parser, "variations")


def run(args: argparse.Namespace) -> int:
    """Draws and writes; returns the exit code."""
    import dataclasses

    import jax
    import numpy as np

    from dalle_jax import images
    from dalle_jax.cli import _flags, gallery
    from dalle_jax.engine import meshes
    from dalle_jax.sampling import manipulate, unclip

    _unclip.check(args)
    _flags.use_cache(args)
    if args.eta == 0 and args.n > 1:
        _prompts.warn("at --eta=0 all variations are the picture itself: drawing one.")
    count = 1 if args.eta == 0 else args.n
    stages, drawing, mesh = _unclip.load(args), _unclip.drawing(args), meshes.local()
    given = [_unclip.read_picture(path, stages.image_px) for path in args.image]
    out, blocks = pathlib.Path(args.out), []
    still = dataclasses.replace(drawing, eta=0.0)
    key, draw = jax.random.key(args.seed), functools.partial(unclip.upsample, stages)
    folders = _prompts.folders(out, [pathlib.Path(path).stem for path in args.image])
    for i, (folder, (picture, _, _)) in enumerate(zip(folders, given, strict=True), 1):
        start, label = time.monotonic(), f"{i}/{len(given)} {args.image[i - 1]}"
        one = images.to_float(picture)[None]
        latent = manipulate.invert(stages, one, still)
        again = manipulate.vary(stages, latent, 1, still, key=key, mesh=mesh)
        tell = functools.partial(_prompts.progress, label, start, count)
        varied = manipulate.vary(stages, latent, count, drawing, key=key, mesh=mesh, progress=tell)
        small = np.concatenate([again, varied])
        indices = np.concatenate([[0], np.arange(count)])
        drawn = draw(small, drawing, key=key, indices=indices, mesh=mesh)
        near = _unclip.cosines(stages.clip, drawn, stages.clip.embed_images(one))
        gallery.clear(folder)
        numbers = [f"{n:02d}" for n in range(count + 1)]
        labels = [f"eta 0 · {near[0]:.3f}"]
        labels += [f"{n} · {x:.3f}" for n, x in enumerate(near[1:], 1)]
        blocks.append(
            gallery.Block(
                folder=str(folder.relative_to(out)),
                title=args.image[i - 1],
                text="The picture, what the unchanged latent draws, and variations; each with its "
                f"CLIP cosine to the picture. {time.monotonic() - start:.1f} seconds.",
                pictures=np.concatenate([picture[None], images.to_uint8(drawn)]),
                names=["given", *numbers],
                labels=["given", *labels],
                figures={"image": args.image[i - 1], "eta": args.eta, "cosine": near},
            )
        )
    notes = [note for _, _, some in given for note in some]
    module = sys.modules[__name__]
    return gallery.finish(args, module, "Variations", blocks, stages.parts, notes)
