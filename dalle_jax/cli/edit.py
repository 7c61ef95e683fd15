"""Changes a picture towards a text with DALL-E 2.

  python -m dalle_jax edit --pretrained=shapes --image=picture.png \\
      --from="a red cube on a white background" --to="a blue cube on a white background" \\
      --guidance=3 --eta=1

The picture is represented by its CLIP embedding and the noise from which the decoder samples
exactly this picture. Each of --thetas turns the embedding by that share towards the difference
between the embeddings of both texts; without --from, towards the embedding of --to. The noise
stays, and with it what the texts do not mention. If a decoder takes much from the noise, the
picture changes little; --eta then replaces a share of the noise.

--out receives given.png (the square that is used), 01.png, 02.png, … for the thetas, sheet.png,
index.html, and results.json with the CLIP cosines between each picture and both texts.
"""

import argparse
import pathlib
import sys
import time

from dalle_jax.cli import _flags, _unclip

SUMMARY = "change a picture towards a text (DALL-E 2)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    _unclip.add_networks(parser)
    group = parser.add_argument_group("what to sample")
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
    group = parser.add_argument_group("how to sample")
    _unclip.add_guidance(group, 1.0)
    _unclip.add_sampling(group)
    _unclip.add_output(parser, "edits")


def run(args: argparse.Namespace) -> int:
    """Samples and writes; returns the exit code."""
    from dalle_jax import images
    from dalle_jax.pages import gallery
    from dalle_jax.pipelines import reading

    _unclip.check(args)
    thetas = _unclip.numbers(
        args.thetas, "thetas", float, lambda t: 0 <= t <= 1, "numbers in [0, 1]"
    )
    texts = [reading.checked(text) for text in (args.to, args.from_) if text is not None]
    _flags.use_cache(args)
    model = _unclip.model(args)
    px = model.unclip(upsample=not args.no_upsample).image_px
    given = _unclip.read_picture(args.image, px)
    start, common = time.monotonic(), _unclip.common(args, "edit", len(thetas))
    edited = model.edit(given.picture, args.to, args.from_, thetas=thetas, **common)
    gallery.clear(pathlib.Path(args.out))
    clip = model.unclip(upsample=False).clip
    own = clip.embed_images(images.to_float(given.picture)[None])
    cosines = {}
    for name, z in zip(("to", "from"), clip.embed_texts(clip.tokenize(texts)), strict=False):
        each = [picture.figures[f"cosine_{name}"] for picture in edited]
        cosines[f"cosine_{name}"] = [round(float(own[0] @ z), 4), *each]
    labels = [" ".join(f"{x:.3f}" for x in each) for each in zip(*cosines.values(), strict=True)]
    before = "" if args.from_ is None else f", “{args.from_}”"
    block = _unclip.given_block(
        given,
        edited,
        folder="",
        title=args.to,
        text=f"With each picture its CLIP cosine to “{args.to}”{before}. "
        f"{time.monotonic() - start:.1f} seconds.",
        names=[f"{n:02d}" for n in range(1, len(thetas) + 1)],
        labels=[f"theta {t:g} · {label}" for t, label in zip(thetas, labels[1:], strict=True)],
        figures={
            "image": args.image,
            "to": args.to,
            "from": args.from_,
            "theta": thetas,
            **cosines,
        },
    )
    block.labels[0] = f"given · {labels[0]}"
    module = sys.modules[__name__]
    return _unclip.finish(args, module, "An edit", [block], edited.stages, given.notes)
