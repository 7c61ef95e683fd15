"""Measures trained networks; every number on the pages of this project comes from here.

  python -m dalle_jax evaluate --suite=shapes --pretrained=shapes --json
  python -m dalle_jax evaluate --suite=shapes --workdir=runs/dalle --clip=runs/clip --out=runs/eval
  python -m dalle_jax evaluate --suite=shapes --pipeline=unclip --pretrained=shapes --json
  python -m dalle_jax evaluate --suite=recon --dvae=runs/dvae
  python -m dalle_jax evaluate --suite=retrieval --clip=runs/clip --split=held_out
  python -m dalle_jax evaluate --suite=distribution --workdir=runs/dalle --clip=runs/clip
  python -m dalle_jax evaluate --suite=variations --pipeline=unclip --decoder=runs/decoder
  python -m dalle_jax evaluate --suite=inpainting --pipeline=unclip --decoder=runs/decoder

--suite=shapes samples pictures for prompts of the shapes grammar and judges each exactly: a picture
is right only if number, colours, shapes, their pairing, background and relation match the caption.
First comes the judge's own accuracy on rendered scenes; below 99.5 % nothing is measured. With
--dvae alone the suite measures judge and codec. Fields of the JSON:

  judge.oracle_accuracy   the judge on ground truth
  skills.KIND             one of single, count, binding, relation; `mean` is the mean of the four
    n                     prompts of seen combinations, and as many with held-out ones
    seen, held_out        share of right pictures among all samples: best-of-1
    best_of.K, oracle.K   seen prompts: the picture that CLIP ranks first of K is right; at least
                          one of K is right (the limit of a perfect ranking)
    held_out_best_of, held_out_oracle   the same for held-out prompts
    conditions            share of samples for seen prompts that meet each condition
    reconstruction        rendered scenes that are still right after the codec: the ceiling; and
                          held_out_reconstruction
  seconds_per_picture.K   seconds to sample and rank K candidates, without compilation

--suite=distribution samples pictures for the captions of a split and compares them with the real
pictures as sets: the Fréchet distance on this CLIP's features (`frechet_clip`; or on plain pixels,
--features) beside its floor, precision, recall and diversity. evaluation/distribution.py explains
the fields. The distance is no FID: its features are not Inception's.

--pipeline=unclip measures DALL-E 2 for each prior (--ways) and each guidance scale (--guidances):
`runs` is a list of such figures, each with its `prior` and `guidance`, over the same prompts.
`reconstruction` is then the share of scenes that are right after the decoder has sampled them from
the embedding of the rendered scene itself: the limit of any prior without the caption. The prior
`dalle` measures a DALL-E 1 beside them: as without --pipeline, but ranked by DALL-E 2's CLIP. Suite
distribution has such `runs` too. Two suites exist with this pipeline only:

--suite=variations renders scenes, samples variations as the command `vary` does, at each of --etas
and --guidances, and judges what must be preserved (`right`, `conditions`), beside the verdict of
another scene (`chance`), and how much has changed (`moved`, `pixel_change`).
--suite=inpainting masks a rectangle of rendered scenes and asks for another object there (task
`replace`) or for one more (`add`): `right`, and `baseline` with the old prompt; `untouched` must be
1. It uses --inpainter where there is one, and the upsamplers unless --no_upsample; the other suites
judge the decoder's own small pictures. evaluation/edits.py explains the fields.

Figures at K are means over all subsets of K of a prompt's N candidates, not over the first K.

Several processes (--distributed) share the prompts of --suite=shapes; process 0 measures the other
suites, while the others wait.
"""

import argparse
import json
import pathlib
import sys
from typing import TYPE_CHECKING

from dalle_jax.cli import _flags, _prompts, _unclip

if TYPE_CHECKING:
    from dalle_jax.evaluation.settings import Settings

SUMMARY = "measure a model: judged pictures and edits, reconstructions, retrieval, distributions"

# Repeated here so that --help imports nothing heavy; a test compares them with `suites.SUITES`.
SUITES = ("shapes", "recon", "retrieval", "distribution", "variations", "inpainting")
FEATURES = ("clip", "pixels")
_DALLE = "dalle"  # among --ways: a DALL-E 1
_CANDIDATES = {"shapes": 64, "distribution": 2, "variations": 4, "inpainting": 4}
_ONLY = {  # flag -> the suite that it belongs to
    "skills": "shapes",
    "features": "distribution",
    "etas": "variations",
    "inpainter": "inpainting",
    "upsampler": "inpainting",
    "upsample_steps": "inpainting",
    "no_upsample": "inpainting",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("--suite", required=True, choices=SUITES, help="what to measure")
    parser.add_argument(
        "--pipeline", choices=("dalle", "unclip"), default="dalle", help="default: %(default)s"
    )
    group = parser.add_argument_group("networks")
    group.add_argument("--workdir", metavar="DIR", help="DALL-E: workdir of a dalle run")
    group.add_argument("--clip", metavar="DIR", help="CLIP: workdir of a clip run")
    group.add_argument("--dvae", metavar="DIR", help="codec: workdir of an autoencoder run")
    group.add_argument(
        "--pretrained", metavar="NAME", help="a set that ships with the package, instead of DIRs"
    )
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--prompts_per_skill",
        type=int,
        default=25,
        metavar="n",
        help="suite shapes: seen prompts of each of the four skills, and as many held-out; "
        "variations: scenes of each; inpainting: pictures of each task (default: %(default)s)",
    )
    group.add_argument(
        "--skills", metavar="S,S,…", help="suite shapes: some of single, count, binding, relation"
    )
    defaults = ", ".join(f"{suite} {n}" for suite, n in _CANDIDATES.items())
    group.add_argument(
        "--candidates", type=int, metavar="N", help=f"per prompt or picture (default: {defaults})"
    )
    group.add_argument("--temperature", type=float, default=1.0, help="default: %(default)s")
    group.add_argument("--top_k", type=int, default=0, help="likeliest codes only; 0 = all")
    group.add_argument("--top_p", type=float, default=1.0, help="nucleus mass; 1 = all")
    group.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        help="classifier-free guidance of DALL-E 1; 1 = off",
    )
    group.add_argument(
        "--batch",
        type=int,
        default=256,
        help="pictures sampled at a time; bounds the memory (default: %(default)s)",
    )
    group = parser.add_argument_group(
        "pipeline unclip (DALL-E 2)",
        "--inpainter, --upsampler, --upsample_steps and --no_upsample belong to suite inpainting",
    )
    _unclip.add_stages(group, "prior_diffusion", "prior_ar", "inpainter")
    group.add_argument(
        "--ways",
        metavar="W,W,…",
        help="priors to measure, some of diffusion, ar, none (the text embedding replaces the "
        "image embedding), caption (no embedding); suite shapes also dalle (a DALL-E 1: of "
        "--pretrained, or --workdir, with its --guidance, --temperature, --top_k and --top_p) "
        "(default: all that the stages support, without dalle)",
    )
    group.add_argument(
        "--guidances",
        metavar="G,G,…",
        help="guidance scales of the decoder, each measured (default: 2; suite variations 1)",
    )
    group.add_argument(
        "--etas",
        metavar="E,E,…",
        help="suite variations: shares of fresh noise in each step, each measured (default: 0,1)",
    )
    _unclip.add_prior_settings(group)
    group.add_argument(
        "--sampler",
        choices=("ddim", "ddpm", "dpmpp"),
        default="ddim",
        help="of the decoder; dpmpp (DPM-Solver++) for few steps (default: ddim)",
    )
    _unclip.add_sampling(group)
    group = parser.add_argument_group("suites recon, retrieval and distribution")
    group.add_argument("--source", help="prepared set (default: that of the network's training)")
    group.add_argument("--data_dir", help="folder of prepared sets (default: as in training)")
    group.add_argument("--split", help="default: the eval split of the network's config")
    group.add_argument(
        "--num_examples", type=int, default=1000, metavar="n", help="at most (default: %(default)s)"
    )
    group.add_argument(
        "--features",
        choices=FEATURES,
        help="suite distribution: embeddings of this CLIP, or pixels at 8 x 8 (default: clip)",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--seed", type=int, default=0, help="of prompts and noise")
    group.add_argument("--json", action="store_true", help="print only JSON on stdout")
    group.add_argument("--out", metavar="DIR", help="write metrics.json, sheet.png and index.html")
    _flags.add_distributed(parser)
    _flags.add_cache(parser)


def run(args: argparse.Namespace) -> int:
    """Measures and reports."""
    _check(args)
    if args.candidates is None:
        args.candidates = _CANDIDATES.get(args.suite)
    settings = _settings(args)
    _flags.use_cache(args)
    with _flags.job(args):
        return _run(args, settings)


def _run(args: argparse.Namespace, settings: "Settings") -> int:
    import jax

    from dalle_jax.engine import distributed
    from dalle_jax.evaluation import suites
    from dalle_jax.pages import evaluation

    command = _prompts.command("evaluate", add_arguments, args)
    distributed.agree({"the command": command})
    folders, is_first = _folders(args), jax.process_index() == 0
    if is_first or args.suite == "shapes":
        report = _to_stderr if is_first else (lambda line: None)
        figures, rows = suites.measure(args.pipeline, args.suite, folders, settings, report)
        figures["command"] = command
    if is_first:
        if args.out:
            out = pathlib.Path(args.out)
            evaluation.write(out, figures, rows)
            _to_stderr(f"written: {out / 'metrics.json'}, {out / 'index.html'}")
        print(json.dumps(figures, indent=2) if args.json else evaluation.as_text(figures))
    distributed.wait_for_all("measured")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuses flags that do not belong together."""
    from dalle_jax.evaluation import suites
    from dalle_jax.types import UsageError

    for name, suite in _ONLY.items():
        if getattr(args, name) and args.suite != suite:
            raise UsageError(f"--{name} belongs to --suite={suite}, not to --suite={args.suite}.")
    suites.find(args.pipeline, args.suite)
    if args.out and pathlib.Path(args.out).is_file():
        raise UsageError(f"--out={args.out} is a file; expected a folder, new or old.")
    if args.pipeline != "unclip":
        return
    priors = _names(args.ways)
    known = (*_unclip.PRIORS, _DALLE) if args.suite == "shapes" else _unclip.PRIORS
    if set(priors) - set(known):
        raise UsageError(f"--ways={args.ways}; expected some of {', '.join(known)}.")
    for name, default in (("workdir", None), ("dvae", None), ("guidance", 1)):
        if getattr(args, name) != default and _DALLE not in priors:
            raise UsageError(
                f"--{name} belongs to DALL-E 1, which suite shapes measures with {_DALLE!r} among "
                "--ways; DALL-E 2 takes --decoder=DIR and --guidances=G,G,…"
            )
    if args.suite == "variations" and args.ways:
        raise UsageError("--ways chooses priors for captions; variations have no caption.")
    if args.suite == "variations" and (args.eta or args.sampler != "ddim"):
        raise UsageError(
            "variations are sampled by ddim with each eta of --etas; leave --eta and --sampler out."
        )


def _settings(args: argparse.Namespace) -> "Settings":
    """The flags as the record that the suites take."""
    from dalle_jax.data import scenes
    from dalle_jax.evaluation import settings
    from dalle_jax.sampling import unclip

    guidances = args.guidances or ("1" if args.suite == "variations" else "2")
    share = dict(is_good=lambda eta: 0 <= eta <= 1, expected="numbers in [0, 1]")
    scale = dict(is_good=lambda g: g >= 0, expected="scales >= 0")
    steps = {"upsample_steps": tuple(args.upsample_steps)} if args.upsample_steps else {}
    return settings.Settings(
        seed=args.seed,
        prompts_per_skill=args.prompts_per_skill,
        skills=tuple(args.skills.split(",")) if args.skills else scenes.KINDS,
        candidates=1 if args.candidates is None else args.candidates,
        batch=args.batch,
        examples=settings.Examples(
            args.source or "", args.data_dir or "", args.split or "", args.num_examples
        ),
        features=args.features or "clip",
        dalle=settings.DalleSettings(args.temperature, args.top_k, args.top_p, args.guidance),
        unclip=settings.UnclipSettings(
            priors=_names(args.ways) if args.ways else None,
            guidances=tuple(_unclip.numbers(guidances, "guidances", float, **scale)),
            etas=tuple(_unclip.numbers(args.etas or "0,1", "etas", float, **share)),
            sampling=unclip.Settings(steps=args.steps, sampler=args.sampler, eta=args.eta, **steps),
            prior_options={kind: _unclip.prior_options(args, kind) for kind in ("diffusion", "ar")},
            upsamples=not args.no_upsample,
        ),
    )


def _folders(args: argparse.Namespace) -> dict[str, str]:
    """Stage -> folder: of the pretrained set, and of the flags, which take precedence."""
    from dalle_jax.stages import pretrained

    if args.pipeline == "unclip":
        folders = _unclip.folders(args)
        if args.workdir:  # its codec is not that of the pretrained set
            folders.pop("dvae", None)
    else:
        folders = pretrained.folders(args.pretrained) if args.pretrained else {}
    given = {"dalle": args.workdir, "clip": args.clip, "dvae": args.dvae}
    return folders | {name: folder for name, folder in given.items() if folder}


def _names(text: str | None) -> tuple[str, ...]:
    """The names of "a,b"; none for None."""
    return tuple(name for name in (text or "").split(",") if name)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
