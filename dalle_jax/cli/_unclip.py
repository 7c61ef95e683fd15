"""What the commands of DALL-E 2 share: flags for its stages and settings, and given pictures."""

import argparse
import dataclasses
import functools
import pathlib
import sys
import time
import types
from collections.abc import Sequence
from typing import Any

from dalle_jax.cli import _flags, _prompts

PRIORS = ("diffusion", "ar", "none", "caption")
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
        choices=PRIORS,
        help="what the decoder is given beside the caption: an image embedding by the diffusion or "
        "the ar prior, none = the text embedding in its place, caption = no embedding at all "
        "(default: the first of these that there is)",
    )
    add_prior_settings(group)


def add_prior_settings(group) -> None:
    """Adds the settings of the priors."""
    group.add_argument("--prior_steps", metavar="S", help="of the diffusion prior (default: 64)")
    group.add_argument(
        "--prior_guidance", type=float, default=1.0, metavar="G", help="1 = off (default)"
    )
    group.add_argument(
        "--prior_draws",
        type=int,
        metavar="D",
        help="embeddings sampled, of which the nearest to the caption is kept (default: 2; ar: 1)",
    )


def add_sampling(group, *, eta: float = 0.0) -> None:
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
    settings(args)


def settings(args: argparse.Namespace) -> dict:
    """The flags that are fields of `sampling.unclip.Settings`.

    Raises:
      UsageError: for values that do not fit together.
    """
    from dalle_jax.sampling.unclip import Settings

    fields = dict(
        steps=args.steps,
        sampler=getattr(args, "sampler", "ddim"),
        eta=args.eta,
        guidance=args.guidance,
        chunk=args.batch or 0,
    )
    if getattr(args, "upsample_steps", None):
        fields["upsample_steps"] = tuple(args.upsample_steps)
    Settings(**fields)
    return fields


def folders(args: argparse.Namespace) -> dict[str, str]:
    """Stage -> folder: of the pretrained set, replaced by what the flags name."""
    from dalle_jax.stages import pretrained
    from dalle_jax.stages.unclip import Unclip
    from dalle_jax.types import UsageError

    folders = pretrained.folders(args.pretrained) if args.pretrained else {}
    if args.pretrained and "decoder" not in folders and not args.decoder:
        raise UsageError(
            f"the pretrained set {args.pretrained!r} holds no decoder of DALL-E 2, only "
            f"{', '.join(folders)}; give --decoder=DIR."
        )
    for flag, stage in _STAGES.items():
        if getattr(args, flag, None):
            folders[stage] = getattr(args, flag)
    given = getattr(args, "upsampler", None) or []
    if len(given) > len(Unclip.UPSAMPLERS):
        raise UsageError(f"{len(given)} upsamplers; at most {len(Unclip.UPSAMPLERS)} are used.")
    if given:
        folders = {k: v for k, v in folders.items() if k not in Unclip.UPSAMPLERS}
        folders |= dict(zip(Unclip.UPSAMPLERS, given, strict=False))
    return folders


def model(args: argparse.Namespace):
    """The `Model` of the flags; warnings go to stderr."""
    from dalle_jax.pipelines.model import Model

    return Model(folders(args), warn=_prompts.warn)


def common(args: argparse.Namespace, label: str, total: int) -> dict:
    """Keyword arguments that every call of a `Model` method shares."""
    progress = functools.partial(_prompts.progress, label, time.monotonic(), total)
    return dict(seed=args.seed, upsample=not args.no_upsample, progress=progress, **settings(args))


def prior_options(args: argparse.Namespace, prior: str) -> dict:
    """Keyword arguments of `sampling.prior` for the prior of that name."""
    if prior not in ("diffusion", "ar"):
        return {}
    options = {"guidance_scale": args.prior_guidance}
    if args.prior_draws:
        options["num_samples"] = args.prior_draws
    if prior == "diffusion" and args.prior_steps:
        options["steps"] = args.prior_steps
    return options


@dataclasses.dataclass(frozen=True)
class Given:
    """A picture that was given by its path.

    Attributes:
      path: of the file.
      picture: uint8 [px, px, 3], its central square.
      original: uint8 [h, w, 3].
      notes: how it was changed.
    """

    path: str
    picture: Any
    original: Any
    notes: tuple[str, ...]


def read_picture(path: str, px: int) -> Given:
    """The picture of a file; what is done to it is printed as notes on stderr."""
    from PIL import Image

    from dalle_jax import images
    from dalle_jax.pipelines import inputs

    original = images.read(path)
    with Image.open(path) as image:
        mode = image.mode
    height, width = original.shape[:2]
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
    return Given(path, inputs.square(original, px), original, tuple(notes))


def numbers(text: str, name: str, kind: type, is_good, expected: str) -> list:
    """The numbers of "0,0.25,0.5"; UsageError with `expected` for anything else."""
    from dalle_jax.types import UsageError

    try:
        values = [kind(part) for part in str(text).split(",")]
    except ValueError:
        values = []
    if not values or not all(is_good(x) for x in values):
        raise UsageError(f"--{name}={text}; expected {expected}, with commas between.")
    return values


def finish(
    args: argparse.Namespace,
    module: types.ModuleType,
    title: str,
    blocks: Sequence,
    stages: dict,
    notes: Sequence[str] = (),
) -> int:
    """Writes the pictures and the page of a command and reports them; returns its exit code."""
    from dalle_jax.pages import gallery

    name = module.__name__.rpartition(".")[2]
    out = pathlib.Path(args.out)
    subtitle = f"{args.steps} steps, guidance {args.guidance:g}, seed {args.seed}"
    command = _prompts.command(name, module.add_arguments, args)
    result = gallery.write(
        out, title, subtitle, blocks, command=command, stages=stages, notes=notes
    )
    gallery.report(result, out, args.json)
    return 0


def given_block(given: Given, pictures, **fields):
    """A `gallery.Block` of a given picture and what was sampled from it."""
    import numpy as np

    from dalle_jax.pages import gallery

    names, labels = fields.pop("names"), fields.pop("labels")
    return gallery.Block(
        pictures=np.concatenate([given.picture[None], pictures.arrays]),
        names=["given", *names],
        labels=["given", *labels],
        metadata=[{}, *(picture.metadata for picture in pictures)],
        **fields,
    )
