"""Draws pictures from ever less of their CLIP embedding, with DALL-E 2: what CLIP keeps, and where.

  python -m dalle_jax reconstruct --pretrained=shapes --image=picture.png --dims=2,4,8,16
  python -m dalle_jax reconstruct --decoder=runs/decoder --pca=runs/pca.npz --image=picture.png

The embedding is cut to its leading principal components, --dims of them (a PCA that the command
`pca` fits, or the autoregressive prior's), and decoded with the same noise each time. Coarse things
come first: the paper's figure 7.

Written to --out: a folder per picture with given.png (as it was cut to the square that is used) and
020.png, 040.png, … named by the number of components; sheet.png, index.html and results.json with
the cosine of what is left to the whole embedding.
"""

import argparse
import functools
import pathlib
import sys
import time

from dalle_jax.cli import _prompts, _unclip

SUMMARY = "draw pictures from part of their CLIP embedding (DALL-E 2)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    _unclip.add_networks(parser, "prior_ar", "pca")
    group = parser.add_argument_group("what to draw")
    group.add_argument(
        "--image", action="append", required=True, metavar="FILE", help="picture; repeatable"
    )
    group.add_argument(
        "--dims",
        metavar="K,K,…",
        help="components to keep (default: 1/16, 1/8, 1/4, 1/2 and all of them; paper "
        "20,30,40,80,120,160,200,320)",
    )
    group = parser.add_argument_group("how to draw")
    _unclip.add_guidance(group, 1.0)
    _unclip.add_drawing(group)
    _unclip.add_output(parser, "reconstructions")


def run(args: argparse.Namespace) -> int:
    """Draws and writes; returns the exit code."""
    import jax
    import numpy as np

    from dalle_jax import images
    from dalle_jax.cli import _flags, gallery
    from dalle_jax.engine import meshes
    from dalle_jax.sampling import manipulate, unclip

    _unclip.check(args)
    dims = None
    if args.dims:
        expected = "whole numbers of 1 or more"
        dims = _unclip.numbers(args.dims, "dims", int, lambda d: d >= 1, expected)
    _flags.use_cache(args)
    # The prior is only opened for its PCA.
    stages = _unclip.load(args, "pca", *(() if args.pca else ("prior_ar",)))
    drawing, mesh = _unclip.drawing(args), meshes.local()
    width = stages.clip.model.config.joint_width
    dims = dims or sorted({max(1, width // n) for n in (16, 8, 4, 2, 1)})
    given = [_unclip.read_picture(path, stages.image_px) for path in args.image]
    pictures = np.stack([picture for picture, _, _ in given])
    start, out, key = time.monotonic(), pathlib.Path(args.out), jax.random.key(args.seed)
    latent, cosines = manipulate.truncate(stages, images.to_float(pictures), dims, key=key)
    tell = functools.partial(_prompts.progress, "reconstruct", start, len(latent.z))
    indices = np.zeros(len(latent.z), int)  # the same noise for all
    small = manipulate.sample(
        stages, latent, drawing, key=key, indices=indices, mesh=mesh, progress=tell
    )
    drawn = unclip.upsample(stages, small, drawing, key=key, indices=indices, mesh=mesh)
    drawn = images.to_uint8(drawn).reshape(len(pictures), len(dims), *pictures.shape[1:])
    blocks = []
    folders = _prompts.folders(out, [pathlib.Path(path).stem for path in args.image])
    for i, folder in enumerate(folders):
        gallery.clear(folder)
        near = [round(float(x), 4) for x in cosines[i]]
        labels = [f"{d} of {width} · {x:.3f}" for d, x in zip(dims, near, strict=True)]
        blocks.append(
            gallery.Block(
                folder=str(folder.relative_to(out)),
                title=args.image[i],
                text="The picture, and what is drawn from so many components of its embedding; "
                "with the cosine of these to the whole embedding.",
                pictures=np.concatenate([pictures[i : i + 1], drawn[i]]),
                names=["given", *(f"{d:03d}" for d in dims)],
                labels=["given", *labels],
                figures={"image": args.image[i], "dims": dims, "cosine": near},
            )
        )
    notes = [note for _, _, some in given for note in some]
    module = sys.modules[__name__]
    return gallery.finish(args, module, "Reconstructions", blocks, stages.parts, notes)
