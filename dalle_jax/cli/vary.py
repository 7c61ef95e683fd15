"""Samples variations of a picture with DALL-E 2: what CLIP sees in it stays, the rest may change.

  python -m dalle_jax vary --pretrained=shapes --image=picture.png --n=8
  python -m dalle_jax vary --decoder=runs/decoder --image=picture.png --eta=0.5

DDIM inversion splits the picture into two parts: its CLIP embedding, and the noise from which the
decoder samples exactly this picture. With fresh noise in every step (--eta above 0) the decoder
samples other pictures with the same embedding. --eta=0 gives the picture back, as well as the
decoder can. --guidance above 1 makes variations more alike and the inversion less exact.

--out receives a folder per picture with given.png (the square that is used), 00.png (sampled from
the unchanged latent) and the variations 01.png, 02.png, …; also sheet.png, index.html, and
results.json with the CLIP cosine between each picture and the given one.
"""

import argparse
import pathlib
import sys
import time

from dalle_jax.cli import _flags, _prompts, _unclip

SUMMARY = "sample variations of a picture (DALL-E 2)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    _unclip.add_networks(parser)
    group = parser.add_argument_group("what to sample")
    group.add_argument(
        "--image", action="append", required=True, metavar="FILE", help="picture; repeatable"
    )
    group.add_argument("--n", type=int, default=8, help="variations of each (default: %(default)s)")
    group = parser.add_argument_group("how to sample")
    _unclip.add_guidance(group, 1.0)
    _unclip.add_sampling(group, eta=1.0)
    _unclip.add_output(parser, "variations")


def run(args: argparse.Namespace) -> int:
    """Samples and writes; returns the exit code."""
    from dalle_jax.pages import gallery

    _unclip.check(args)
    _flags.use_cache(args)
    if args.eta == 0 and args.n > 1:
        _prompts.warn("at --eta=0 all variations are the picture itself: sampling one.")
    count = 1 if args.eta == 0 else args.n
    model = _unclip.model(args)
    px = model.unclip(upsample=not args.no_upsample).image_px
    given = [_unclip.read_picture(path, px) for path in args.image]
    out, blocks, stages = pathlib.Path(args.out), [], {}
    folders = _prompts.folders(out, [pathlib.Path(path).stem for path in args.image])
    for i, (folder, each) in enumerate(zip(folders, given, strict=True), 1):
        start = time.monotonic()
        common = _unclip.common(args, f"{i}/{len(given)} {each.path}", count)
        varied = model.vary(each.picture, count, with_reconstruction=True, **common)
        gallery.clear(folder)
        cosines = [round(float(x), 4) for x in varied.scores]
        labels = [f"eta 0 · {cosines[0]:.3f}"]
        labels += [f"{n} · {x:.3f}" for n, x in enumerate(cosines[1:], 1)]
        block = _unclip.given_block(
            each,
            varied,
            folder=str(folder.relative_to(out)),
            title=each.path,
            text="The picture, what the unchanged latent gives, and variations; each with its CLIP "
            f"cosine to the picture. {time.monotonic() - start:.1f} seconds.",
            names=[f"{n:02d}" for n in range(count + 1)],
            labels=labels,
            figures={"image": each.path, "eta": args.eta, "cosine": cosines},
        )
        blocks.append(block)
        stages = varied.stages
    notes = [note for each in given for note in each.notes]
    return _unclip.finish(args, sys.modules[__name__], "Variations", blocks, stages, notes)
