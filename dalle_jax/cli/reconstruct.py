"""Samples pictures from fewer and fewer components of their CLIP embedding with DALL-E 2.

  python -m dalle_jax reconstruct --pretrained=shapes --image=picture.png --dims=2,4,8,16
  python -m dalle_jax reconstruct --decoder=runs/decoder --pca=runs/pca.npz --image=picture.png

The embedding is cut to its leading principal components, --dims of them, and decoded with the
same noise each time. The PCA is one that the command `pca` fitted, or that of the autoregressive
prior. Coarse features come first, as in the paper's figure 7.

--out receives a folder per picture with given.png (the square that is used) and 020.png, 040.png,
… named by the number of components; also sheet.png, index.html, and results.json with the cosine
between each truncated embedding and the full one.
"""

import argparse
import pathlib
import sys

from dalle_jax.cli import _flags, _prompts, _unclip

SUMMARY = "sample pictures from part of their CLIP embedding (DALL-E 2)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    _unclip.add_networks(parser, "prior_ar", "pca")
    group = parser.add_argument_group("what to sample")
    group.add_argument(
        "--image", action="append", required=True, metavar="FILE", help="picture; repeatable"
    )
    group.add_argument(
        "--dims",
        metavar="K,K,…",
        help="components to keep (default: 1/16, 1/8, 1/4, 1/2 and all of them; paper "
        "20,30,40,80,120,160,200,320)",
    )
    group = parser.add_argument_group("how to sample")
    _unclip.add_guidance(group, 1.0)
    _unclip.add_sampling(group)
    _unclip.add_output(parser, "reconstructions")


def run(args: argparse.Namespace) -> int:
    """Samples and writes; returns the exit code."""
    from dalle_jax.pages import gallery

    _unclip.check(args)
    dims = None
    if args.dims:
        expected = "whole numbers of 1 or more"
        dims = _unclip.numbers(args.dims, "dims", int, lambda d: d >= 1, expected)
    _flags.use_cache(args)
    model = _unclip.model(args)
    stages = model.unclip(upsample=not args.no_upsample)
    given = [_unclip.read_picture(path, stages.image_px) for path in args.image]
    out, blocks, rebuilt = pathlib.Path(args.out), [], None
    folders = _prompts.folders(out, [pathlib.Path(path).stem for path in args.image])
    for i, (folder, each) in enumerate(zip(folders, given, strict=True), 1):
        common = _unclip.common(args, f"{i}/{len(given)} {each.path}", len(dims or range(5)))
        rebuilt = model.reconstruct(each.picture, dims, **common)
        gallery.clear(folder)
        figures = {name: [p.figures[name] for p in rebuilt] for name in rebuilt[0].figures}
        block = _unclip.given_block(
            each,
            rebuilt,
            folder=str(folder.relative_to(out)),
            title=each.path,
            text="The picture, and pictures from so many components of its embedding; with the "
            "cosine of these to the whole embedding.",
            names=[f"{d:03d}" for d in figures["dims"]],
            labels=[
                f"{d} of {stages.clip.joint_width} · {x:.3f}"
                for d, x in zip(figures["dims"], figures["cosine"], strict=True)
            ],
            figures={"image": each.path, **figures},
        )
        blocks.append(block)
    notes = [note for each in given for note in each.notes]
    module = sys.modules[__name__]
    return _unclip.finish(args, module, "Reconstructions", blocks, rebuilt.stages, notes)
