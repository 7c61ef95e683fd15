"""What the commands of DALL-E 2 share: flags for its stages and its drawing, and pictures given.

No command itself; it has no SUMMARY.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from dalle_jax.cli import _flags

WAYS = ("diffusion", "ar", "none", "caption")
_STAGES = {  # flag -> stage
    "clip": "clip",
    "prior_diffusion": "prior",
    "prior_ar": "prior_ar",
    "decoder": "decoder",
    "inpainter": "inpaint",
    "pca": "pca",
}
_HELP = {
    "clip": "CLIP of all of them (default: where the decoder's config says, or beside it)",
    "prior_diffusion": "diffusion prior: workdir of a run of configs/prior_diffusion.py",
    "prior_ar": "autoregressive prior: of configs/prior_ar.py",
    "decoder": "of configs/decoder.py",
    "inpainter": "decoder that was tuned with --config.loss.inpaint=true",
    "pca": "PCA of the CLIP's embeddings, by the command pca (default: the AR prior's)",
}


def add_stages(group, *names: str) -> None:
    """Adds --decoder, --upsampler and the flags of the named stages."""
    for name in ("decoder", *names):
        kind = "FILE" if name == "pca" else "DIR"
        group.add_argument(f"--{name}", metavar=kind, help=_HELP[name])
    group.add_argument(
        "--upsampler", action="append", metavar="DIR", help="of configs/upsampler.py; in order"
    )


def add_networks(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds --pretrained, --clip and `add_stages`' flags."""
    group = parser.add_argument_group("networks (a pretrained set, or workdirs and exported ones)")
    group.add_argument("--pretrained", metavar="NAME", help="a set that ships with the package")
    add_stages(group, "clip", *names)


def add_prior(group) -> None:
    """Adds --prior and its settings."""
    group.add_argument(
        "--prior",
        choices=WAYS,
        help="what the decoder is given beside the caption: an image embedding by the diffusion or "
        "the ar prior, none = the text embedding in its place, caption = no embedding at all "
        "(default: the first of these that there is)",
    )
    add_prior_settings(group)


def add_prior_settings(group) -> None:
    """Adds how a prior is drawn from."""
    group.add_argument("--prior_steps", metavar="S", help="of the diffusion prior (default: 64)")
    group.add_argument(
        "--prior_guidance", type=float, default=1.0, metavar="G", help="1 = off (default)"
    )
    group.add_argument(
        "--prior_draws",
        type=int,
        metavar="D",
        help="embeddings drawn, of which the nearest to the caption is kept (default: 2; ar: 1)",
    )


def add_drawing(group, *, eta: float = 0.0) -> None:
    """Adds the decoder's and the upsamplers' settings."""
    group.add_argument(
        "--steps",
        default="50",
        metavar="S",
        help="of the decoder: a number, numbers by section (10,10,5), ddimN, or logsnrN, evenly in "
        "log SNR, for --sampler=dpmpp (default: %(default)s; paper 250)",
    )
    group.add_argument(
        "--eta",
        type=float,
        default=eta,
        help="share of fresh noise in each step of ddim, 0 to 1 (default: %(default)s)",
    )
    group.add_argument(
        "--upsample_steps",
        action="append",
        metavar="S",
        help="of each upsampler; repeatable (default: fast27, then 15)",
    )
    group.add_argument(
        "--no_upsample", action="store_true", help="stop at the decoder's small pictures"
    )


def add_guidance(group, default: float) -> None:
    """Adds --guidance."""
    group.add_argument(
        "--guidance",
        type=float,
        default=default,
        metavar="G",
        help="classifier-free guidance of the decoder; 1 = off (default: %(default)s)",
    )


def add_output(parser: argparse.ArgumentParser, out: str) -> None:
    """Adds --seed, --batch, --out, --json and the cache's flag."""
    group = parser.add_argument_group("output")
    group.add_argument("--seed", type=int, default=0, help="of all noise (default: %(default)s)")
    group.add_argument(
        "--batch", type=int, metavar="B", help="pictures at a time (default: what fits the memory)"
    )
    group.add_argument("--out", default=out, metavar="DIR", help="default: %(default)s")
    group.add_argument("--json", action="store_true", help="print the figures as JSON")
    _flags.add_cache(parser)


def check(args: argparse.Namespace) -> None:
    """What can be refused before anything is loaded."""
    from dalle_jax.types import UsageError

    least = dict(seed=0, batch=1, candidates=1, keep=1, prior_draws=1, n=1)
    for name, lowest in least.items():
        value = getattr(args, name, None)
        if value is not None and value < lowest:
            raise UsageError(f"--{name}={value}; expected {lowest} or more.")
    if args.out and pathlib.Path(args.out).is_file():
        raise UsageError(f"--out={args.out} is a file; expected a folder, new or old.")
    drawing(args)


def drawing(args: argparse.Namespace):
    """`unclip.Drawing` of the flags."""
    from dalle_jax.sampling import unclip

    made = {}
    if getattr(args, "upsample_steps", None):
        made["upsample_steps"] = tuple(args.upsample_steps)
    return unclip.Drawing(
        steps=args.steps,
        sampler=getattr(args, "sampler", "ddim"),
        eta=args.eta,
        guidance=args.guidance,
        chunk=args.batch or 0,
        **made,
    )


def folders(args: argparse.Namespace) -> dict[str, str]:
    """Stage -> folder: of the pretrained set, and what the flags say instead."""
    from dalle_jax.stages import run, unclip
    from dalle_jax.types import UsageError

    found = run.pretrained(args.pretrained) if args.pretrained else {}
    if args.pretrained and "decoder" not in found and not args.decoder:
        raise UsageError(
            f"the pretrained set {args.pretrained!r} holds no decoder of DALL-E 2, only "
            f"{', '.join(found)}; give --decoder=DIR."
        )
    for flag, stage in _STAGES.items():
        if getattr(args, flag, None):
            found[stage] = getattr(args, flag)
    given = getattr(args, "upsampler", None) or []
    if len(given) > len(unclip.UPSAMPLERS):
        raise UsageError(f"{len(given)} upsamplers; at most {len(unclip.UPSAMPLERS)} are used.")
    if given:
        found = {k: v for k, v in found.items() if k not in unclip.UPSAMPLERS}
        found |= dict(zip(unclip.UPSAMPLERS, given, strict=False))
    return found


def load(args: argparse.Namespace, *only: str):
    """The `Unclip` of the flags.

    Args:
      args: of the command.
      only: stages that it uses, beside CLIP, decoder and upsamplers.

    Raises:
      UsageError: for folders or settings that do not fit, before anything compiles.
    """
    from dalle_jax.diffusion import schedules
    from dalle_jax.stages import unclip

    found = folders(args)
    finishes = not getattr(args, "no_upsample", True)
    wanted = ("decoder", "clip", *only, *(unclip.UPSAMPLERS if finishes else ()))
    made = unclip.load(found, wanted)
    how = drawing(args)
    schedules.respace(made.decoder.schedule, how.steps)
    for stage in made.upsamplers:
        for steps in how.upsample_steps:
            schedules.respace(stage.schedule, steps)
    return made


def way(args: argparse.Namespace) -> tuple[str, tuple[str, ...]]:
    """(how a caption becomes an embedding, the stages to load for it)."""
    found = folders(args)
    chosen = args.prior
    if chosen is None:
        chosen = "diffusion" if "prior" in found else "ar" if "prior_ar" in found else "none"
    return chosen, {"diffusion": ("prior",), "ar": ("prior_ar",)}.get(chosen, ())


def prior_options(args: argparse.Namespace, chosen: str) -> dict:
    """Keyword arguments of `unclip.image_embeddings` for the prior."""
    if chosen not in ("diffusion", "ar"):
        return {}
    options = {"guidance_scale": args.prior_guidance}
    if args.prior_draws:
        options["num_samples"] = args.prior_draws
    if chosen == "diffusion" and args.prior_steps:
        options["steps"] = args.prior_steps
    return options


def read_picture(path: str, px: int) -> tuple:
    """(uint8 [px, px, 3], the file's uint8 [h, w, 3], notes on what was done to it)."""
    from PIL import Image

    from dalle_jax import images
    from dalle_jax.data import preprocess

    whole = images.read(path)
    with Image.open(path) as image:
        mode = image.mode
    height, width = whole.shape[:2]
    notes = []
    if mode != "RGB":
        on_white = ", see-through parts on white" if "A" in mode or mode == "P" else ""
        notes.append(f"{path} is of mode {mode}; it is taken as RGB{on_white}.")
    if height != width:
        side = min(height, width)
        notes.append(f"{path} is {width} x {height}; its central {side} x {side} are taken.")
    if min(height, width) < px:
        notes.append(f"{path} is smaller than {px} px and is enlarged.")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return preprocess.crop_center(whole, px), whole, notes


def numbers(text: str, name: str, kind: type, is_good, expected: str) -> list:
    """The numbers of "0,0.25,0.5"; UsageError, which says what was expected, for anything else."""
    from dalle_jax.types import UsageError

    try:
        found = [kind(part) for part in str(text).split(",")]
    except ValueError:
        found = []
    if not found or not all(is_good(x) for x in found):
        raise UsageError(f"--{name}={text}; expected {expected}, with commas between.")
    return found


def cosines(clip, pictures, embedding) -> Sequence[float]:
    """Of CLIP between pictures [B, h, h, 3] float and embeddings [B, E] or [1, E]."""
    import numpy as np

    from dalle_jax.sampling import embed

    z = embed.images(clip, pictures)
    return [round(float(x), 4) for x in np.sum(z * np.asarray(embedding), axis=-1)]
