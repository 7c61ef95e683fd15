"""Changes a picture towards what a text says, with DALL-E 2.

  python -m dalle_jax edit --pretrained=shapes --image=picture.png \\
      --from="a red cube on a white background" --to="a blue cube on a white background" \\
      --guidance=3 --eta=1

The picture is read as its CLIP embedding and the noise from which the decoder draws just this
picture. The embedding is turned towards the difference of the two texts' embeddings by growing
shares of the way, --thetas; the noise stays, and with it what the texts do not speak of. A decoder
that reads much from the noise changes little then: --eta draws some of it anew. Without
--from the embedding is turned towards --to itself.

Written to --out: given.png (the picture as it was cut to the square that is used), 01.png, 02.png,
… one for each theta, sheet.png, index.html and results.json with the CLIP cosines of each to both
texts.
"""

import argparse
import functools
import pathlib
import sys
import time

from dalle_jax.cli import _prompts, _unclip

SUMMARY = "change a picture towards a text (DALL-E 2)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    _unclip.add_networks(parser)
    group = parser.add_argument_group("what to draw")
    group.add_argument("--image", required=True, metavar="FILE", help="picture")
    group.add_argument("--to", required=True, metavar="TEXT", help="what it is to become")
    group.add_argument(
        "--from", dest="from_", metavar="TEXT", help='what it is, or as little as "a picture"'
    )
    group.add_argument(
        "--thetas",
        default="0,0.1,0.2,0.3,0.4,0.5",
        metavar="T,T,…",
        help="how far to turn the embedding, each in [0, 1] (default: %(default)s; paper 0.25 to "
        "0.5 at the most)",
    )
    group = parser.add_argument_group("how to draw")
    _unclip.add_guidance(group, 1.0)
    _unclip.add_drawing(group)
    _unclip.add_output(parser, "edits")


def run(args: argparse.Namespace) -> int:
    """Draws and writes; returns the exit code."""
    import jax
    import numpy as np

    from dalle_jax import images
    from dalle_jax.cli import _flags, gallery
    from dalle_jax.engine import meshes
    from dalle_jax.sampling import manipulate, unclip

    _unclip.check(args)
    thetas = _unclip.numbers(
        args.thetas, "thetas", float, lambda t: 0 <= t <= 1, "numbers in [0, 1]"
    )
    texts = [_prompts.checked(t) for t in (args.to, args.from_) if t is not None]
    _flags.use_cache(args)
    stages, drawing, mesh = _unclip.load(args), _unclip.drawing(args), meshes.local()
    tokens = _prompts.tokens(stages.clip, texts, "CLIP")
    old = tokens[1] if len(tokens) > 1 else None
    manipulate.check_captions(tokens[0], old)
    picture, _, notes = _unclip.read_picture(args.image, stages.image_px)
    start, out, key = time.monotonic(), pathlib.Path(args.out), jax.random.key(args.seed)
    one = images.to_float(picture)[None]
    latent = manipulate.invert(stages, one, drawing)
    way = manipulate.edit(stages, latent, tokens[0], old, thetas)
    tell = functools.partial(_prompts.progress, "edit", start, len(thetas))
    indices = np.zeros(len(thetas), int)  # the same noise for all
    small = manipulate.sample(
        stages, way, drawing, key=key, indices=indices, mesh=mesh, progress=tell
    )
    drawn = unclip.upsample(stages, small, drawing, key=key, indices=indices, mesh=mesh)
    shown = np.concatenate([one, drawn])
    embedded = stages.clip.embed_texts(tokens)
    near = [_unclip.cosines(stages.clip, shown, z[None]) for z in embedded]
    gallery.clear(out)
    labels = [" ".join(f"{x:.3f}" for x in some) for some in zip(*near, strict=True)]
    names = ["given", *(f"theta {t:g}" for t in thetas)]
    figures = {"image": args.image, "to": args.to, "from": args.from_, "theta": thetas}
    figures |= {f"cosine_{name}": x for name, x in zip(("to", "from"), near, strict=False)}
    was = "" if args.from_ is None else f", “{args.from_}”"
    block = gallery.Block(
        folder="",
        title=args.to,
        text=f"With each picture its CLIP cosine to “{args.to}”{was}. "
        f"{time.monotonic() - start:.1f} seconds.",
        pictures=np.concatenate([picture[None], images.to_uint8(drawn)]),
        names=["given", *(f"{n:02d}" for n in range(1, len(thetas) + 1))],
        labels=[f"{name} · {label}" for name, label in zip(names, labels, strict=True)],
        figures=figures,
    )
    return gallery.finish(args, sys.modules[__name__], "An edit", [block], stages.parts, notes)
