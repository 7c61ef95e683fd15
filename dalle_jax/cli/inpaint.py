"""Samples part of a picture anew for a text with DALL-E 2; the rest stays bit for bit.

  python -m dalle_jax inpaint --pretrained=shapes --image=room.png --rect=8,8,12,12 \\
      --prompt="a red cube on a white background"
  python -m dalle_jax inpaint … --mask=mask.png       transparent, or white, where to sample

The mask has the size of the picture. It is a PNG with an alpha channel (transparent = sample
here) or in black and white (white = sample here); --invert_mask inverts it. --prompt describes
the full picture, not only the part. A decoder that was tuned to inpaint (--inpainter) sees the
rest of the picture in every step. Without one the plain decoder is used, and the known pixels are
put back after every step. CLIP ranks the candidates. Upsamplers keep the known pixels too.

--out receives given.png (the square that is used), masked.png (the part to sample in grey), the
pictures 01.png (the best), 02.png, …, sheet.png, index.html and results.json.
"""

import argparse
import pathlib
import sys
import time

from dalle_jax.cli import _flags, _unclip

SUMMARY = "sample part of a picture anew for a text (DALL-E 2)"

CANDIDATES, KEEP, GUIDANCE = 8, 4, 2.0
_GREY = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    _unclip.add_networks(parser, "prior_diffusion", "prior_ar", "inpainter")
    group = parser.add_argument_group("what to sample")
    group.add_argument("--image", required=True, metavar="FILE", help="picture")
    group.add_argument(
        "--prompt", required=True, metavar="TEXT", help="what the whole picture is to show"
    )
    group.add_argument("--mask", metavar="FILE", help="where: see-through or white")
    group.add_argument("--rect", metavar="x,y,w,h", help="or a rectangle, in the picture's pixels")
    group.add_argument(
        "--invert_mask", action="store_true", help="sample outside the mask or rectangle"
    )
    group.add_argument(
        "--candidates", type=int, default=CANDIDATES, metavar="N", help="default: %(default)s"
    )
    group.add_argument("--keep", type=int, metavar="K", help=f"pictures kept (default: {KEEP})")
    group = parser.add_argument_group("how to sample")
    _unclip.add_prior(group)
    _unclip.add_guidance(group, GUIDANCE)
    _unclip.add_sampling(group)
    _unclip.add_output(parser, "inpainted")


def run(args: argparse.Namespace) -> int:
    """Samples and writes; returns the exit code."""
    import numpy as np

    from dalle_jax.cli import _masks
    from dalle_jax.pages import gallery
    from dalle_jax.pipelines import inputs, reading
    from dalle_jax.types import UsageError

    _unclip.check(args)
    prompt = reading.checked(args.prompt)
    if bool(args.mask) == bool(args.rect):
        raise UsageError("give either --mask=FILE or --rect=x,y,w,h: the part to sample anew.")
    if args.keep and args.keep > args.candidates:
        raise UsageError(f"--keep={args.keep} is more than --candidates={args.candidates}.")
    _flags.use_cache(args)
    model = _unclip.model(args)
    prior = model.choose_prior(args.prior)
    stages = model.unclip_with(prior, "inpaint", upsample=not args.no_upsample)
    given = _unclip.read_picture(args.image, stages.image_px)
    shape = given.original.shape[:2]
    if args.mask:
        mask = _masks.read(args.mask, shape, args.image)
    else:
        mask = _masks.rectangle(args.rect, shape, args.image)
    known = inputs.fit_mask(~mask if args.invert_mask else mask, stages.image_px)
    start = time.monotonic()
    inpainted = model.inpaint(
        given.picture,
        prompt,
        known[..., 0],
        candidates=args.candidates,
        keep=args.keep or min(KEEP, args.candidates),
        prior=prior,
        prior_options=_unclip.prior_options(args, prior),
        **_unclip.common(args, "inpaint", args.candidates),
    )
    gallery.clear(pathlib.Path(args.out))
    masked = np.where(known, given.picture, np.uint8(_GREY))
    scores = [picture.score for picture in inpainted]
    by = "plain decoder" if stages.inpainter is None else "decoder tuned to inpaint"
    block = gallery.Block(
        folder="",
        title=prompt,
        text=f"{1 - known.mean():.0%} of the picture sampled anew by the {by}, prior {prior}; "
        f"{len(scores)} of {args.candidates}, ranked by CLIP, best first. "
        f"{time.monotonic() - start:.1f} seconds.",
        pictures=np.concatenate([given.picture[None], masked[None], inpainted.arrays]),
        names=["given", "masked", *(f"{n:02d}" for n in range(1, len(scores) + 1))],
        labels=["given", "masked", *(f"{n} · {s:.3f}" for n, s in enumerate(scores, 1))],
        figures={
            "image": args.image,
            "prompt": prompt,
            "prior": prior,
            "drawn_anew": round(float(1 - known.mean()), 4),
            "candidates": [picture.candidate for picture in inpainted],
            "score": scores,
        },
        metadata=[{}, {}, *(picture.metadata for picture in inpainted)],
    )
    module = sys.modules[__name__]
    return _unclip.finish(args, module, "Inpainting", [block], inpainted.stages, given.notes)
