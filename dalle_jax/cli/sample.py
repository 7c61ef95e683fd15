"""Samples pictures for captions with a trained DALL-E or DALL-E 2; CLIP ranks them.

  python -m dalle_jax sample --pretrained=shapes --prompt="a red cube on a white background"
  python -m dalle_jax sample --workdir=runs/dalle --clip=runs/clip --prompt="…" \\
      --candidates=64 --keep=8 --out=runs/samples
  … --image=picture.png --keep_rows=4     completes a picture from its first 4 rows of codes
  python -m dalle_jax sample --pipeline=unclip --pretrained=shapes --prompt="two blue stars"
  … --prior=ar|diffusion|none|caption     what DALL-E 2's decoder is given beside the caption

--out receives a folder per prompt with the pictures (01.png is the best), their codes (unclip:
image embeddings, and 01_small.png by the decoder) and scores.json with the scores of all
candidates, the seed and the settings; also a contact sheet, sheet.png, and index.html. Each PNG
carries its prompt, seed, settings, command and the fingerprints of the networks.

The same seed gives the same pictures, whatever the batch and the number of devices and processes.
More candidates only add to those of fewer. Several processes (--distributed) share the prompts,
so at most as many processes as prompts have work; --out is on a shared disk.
"""

import argparse
import functools
import json
import pathlib
import time

from dalle_jax.cli import _flags, _prompts, _unclip

SUMMARY = "sample pictures for captions and rank them with CLIP"

UNCLIP_GUIDANCE = 2.0
PIPELINES = ("dalle", "unclip")
_DALLE_ONLY = ("workdir", "dvae", "image", "keep_rows", "temperature", "top_k", "top_p", "no_cache")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument(
        "--pipeline", choices=PIPELINES, default="dalle", help="which model (default: %(default)s)"
    )
    group = parser.add_argument_group("networks")
    group.add_argument("--workdir", metavar="DIR", help="DALL-E: workdir of a dalle run")
    group.add_argument(
        "--pretrained", metavar="NAME", help="a set that ships with the package, instead of DIRs"
    )
    group.add_argument("--clip", metavar="DIR", help="CLIP that ranks: workdir of a clip run")
    group.add_argument(
        "--dvae", metavar="DIR", help="codec, if it is no longer where the DALL-E's config says"
    )
    group = parser.add_argument_group("what to sample")
    _prompts.add_arguments(group)
    group.add_argument("--image", metavar="FILE", help="complete this picture")
    group.add_argument(
        "--keep_rows",
        type=int,
        metavar="R",
        help="rows of codes to keep of --image (default: half of them)",
    )
    group.add_argument(
        "--candidates",
        type=int,
        metavar="N",
        help="pictures sampled per prompt (default: 32, without a CLIP as many as are kept; "
        "pipeline unclip: 8)",
    )
    group.add_argument(
        "--keep", type=int, metavar="K", help="pictures kept (default: 8; unclip: 4)"
    )
    group = parser.add_argument_group("how to sample")
    group.add_argument("--temperature", type=float, default=1.0, help="default: %(default)s")
    group.add_argument("--top_k", type=int, default=0, help="likeliest codes only; 0 = all")
    group.add_argument("--top_p", type=float, default=1.0, help="nucleus mass; 1 = all")
    group.add_argument(
        "--guidance",
        type=float,
        help="classifier-free guidance scale; 1 = off (default: 1, which needs no training with "
        f"data.caption_drop; pipeline unclip: {UNCLIP_GUIDANCE})",
    )
    group.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    group.add_argument(
        "--batch", type=int, help="candidates at a time (default: what fits the memory)"
    )
    group.add_argument(
        "--no_cache", action="store_true", help="without the key/value cache: slow, same pictures"
    )
    _add_unclip(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--out", default="samples", metavar="DIR", help="default: %(default)s")
    group.add_argument("--json", action="store_true", help="print all scores as JSON")
    _flags.add_distributed(parser)
    _flags.add_cache(parser)


def _add_unclip(parser: argparse.ArgumentParser) -> None:
    """Declares the flags that only pipeline unclip has."""
    group = parser.add_argument_group("pipeline unclip (DALL-E 2)")
    _unclip.add_stages(group, "prior_diffusion", "prior_ar")
    _unclip.add_prior(group)
    group.add_argument(
        "--sampler",
        choices=("ddim", "ddpm", "dpmpp"),
        default="ddim",
        help="of the decoder; dpmpp (DPM-Solver++) for few steps (default: ddim)",
    )
    _unclip.add_sampling(group)


def run(args: argparse.Namespace) -> int:
    """Samples, ranks and writes; returns the exit code."""
    prompts = _prompts.given(args)
    is_unclip = args.pipeline == "unclip"
    if args.guidance is None:
        args.guidance = UNCLIP_GUIDANCE if is_unclip else 1.0
    _check(args)
    _flags.use_cache(args)
    with _flags.job(args):
        return _run(args, prompts)


def _run(args: argparse.Namespace, prompts: list[str]) -> int:
    import jax

    from dalle_jax.engine import distributed
    from dalle_jax.pages import gallery, samples
    from dalle_jax.pipelines import reading

    command = _prompts.command("sample", add_arguments, args)
    distributed.agree({"the command": command, "prompts": prompts})
    is_unclip = args.pipeline == "unclip"
    sample, context = (_unclip_sampler if is_unclip else _dalle_sampler)(args, prompts)
    out, results = pathlib.Path(args.out), {}
    folders = _prompts.folders(out, prompts)
    for i in range(jax.process_index(), len(prompts), jax.process_count()):
        start, label = time.monotonic(), f"{i + 1}/{len(prompts)} {reading.short(prompts[i])}"
        pictures = sample(prompts[i], label)
        seconds = time.monotonic() - start
        results[i] = samples.write(folders[i], pictures, seconds, command, context)
    distributed.wait_for_all("all prompts are sampled")
    if jax.process_index() != 0:
        return 0
    results = [results.get(i) or samples.read(folder) for i, folder in enumerate(folders)]
    if is_unclip:
        blocks, title = samples.blocks(out, folders, results), "Pictures from captions"
        result = gallery.write(
            out, title, context.subtitle, blocks, command=command, stages=context.stages
        )
        gallery.report(result, out, args.json)
        return 0
    samples.write_page(out, results, command, context)
    if args.json:
        results = [{k: v for k, v in result.items() if k != "pictures"} for result in results]
        print(json.dumps(results, indent=1))
        return 0
    for result in results:
        best, count = result["kept"][0], len(result["scores"] or result["kept"])
        score = "" if best["score"] is None else f", best score {best['score']:.3f}"
        print(f"{best['file']}  {reading.short(result['prompt'])} ({count} sampled{score})")
    print(f"{out / 'index.html'}")
    return 0


def _dalle_sampler(args: argparse.Namespace, prompts: list[str]):
    """((prompt, label) -> Pictures by DALL-E, the `samples.Context` of all)."""
    from dalle_jax.pages import samples
    from dalle_jax.pipelines import dalle, inputs, reading
    from dalle_jax.pipelines.model import Model
    from dalle_jax.stages import pretrained

    given = {"dalle": args.workdir, "clip": args.clip, "dvae": args.dvae}
    folders = pretrained.folders(args.pretrained) if args.pretrained else {}
    folders |= {name: folder for name, folder in given.items() if folder}
    model = Model(folders, warn=_prompts.warn)
    ranker, stage = model.ranker, model.dalle  # CLIP first: it is the quicker one to find wrong
    options = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    options |= dict(guidance=args.guidance)
    dalle.check(stage, **options, warn=_prompts.warn)
    # Every prompt is checked before the first one takes its time.
    reading.read(stage, prompts, "DALL-E", _prompts.warn)
    if ranker is not None:
        reading.read(ranker, prompts, "CLIP", _prompts.warn)
    inputs.counts(
        args.candidates, args.keep, dalle.CANDIDATES, dalle.KEEP, ranker is not None, _prompts.warn
    )
    picture, prefix, total = None, None, args.candidates or dalle.CANDIDATES
    if args.image:
        picture = inputs.square(args.image, stage.image_px)
        prefix = dalle.encode_rows(stage, args.image, args.keep_rows)

    def sample(prompt: str, label: str):
        return dalle.sample(
            stage,
            ranker,
            prompt,
            candidates=args.candidates,
            keep=args.keep,
            seed=args.seed,
            batch=args.batch or 0,
            use_cache=not args.no_cache,
            prefix=prefix,
            progress=functools.partial(_prompts.progress, label, time.monotonic(), total),
            warn=lambda text: None,  # reported above
            **options,
        )

    return sample, samples.Context(
        subtitle=f"Seed {args.seed}, temperature {args.temperature}",
        settings=options | {"seed": args.seed, "image": args.image},
        given=picture,
        stages={"dalle": stage.provenance, "clip": ranker and ranker.provenance},
    )


def _unclip_sampler(args: argparse.Namespace, prompts: list[str]):
    """The same for DALL-E 2."""
    from dalle_jax.pages import samples
    from dalle_jax.pipelines import reading, unclip

    model = _unclip.model(args)
    prior = model.choose_prior(args.prior)
    stages = model.unclip_with(prior, upsample=not args.no_upsample)
    reading.read(stages.clip, prompts, "CLIP", _prompts.warn)
    model.warn = lambda text: None  # reported above
    total = args.candidates or unclip.CANDIDATES

    def sample(prompt: str, label: str):
        return model.sample(
            prompt,
            pipeline="unclip",
            candidates=args.candidates,
            keep=args.keep,
            prior=prior,
            prior_options=_unclip.prior_options(args, prior),
            **_unclip.common(args, label, total),
        )

    names = ("seed", "steps", "sampler", "eta", "guidance", "prior_steps", "prior_guidance")
    return sample, samples.Context(
        subtitle=f"unCLIP, prior {prior}, {args.steps} steps, guidance {args.guidance}",
        settings={"prior": prior} | {name: getattr(args, name) for name in names},
        stages={name: stage.provenance for name, stage in stages.parts.items()},
        is_unclip=True,
    )


def _check(args) -> None:
    """What can be refused before anything is loaded."""
    from dalle_jax.types import UsageError

    _check_pipeline(args)
    if args.pipeline == "dalle" and bool(args.workdir) == bool(args.pretrained):
        raise UsageError("give either --workdir=DIR or --pretrained=NAME.")
    for name in ("candidates", "keep", "batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name}={value}; expected 1 or more.")
    if args.keep and args.candidates and args.keep > args.candidates:
        raise UsageError(
            f"--keep={args.keep} is more than --candidates={args.candidates}; raise the "
            "candidates or keep fewer."
        )
    if args.seed < 0:
        raise UsageError(f"--seed={args.seed}; expected 0 or more.")
    if args.keep_rows is not None and not args.image:
        raise UsageError(f"--keep_rows={args.keep_rows} needs --image=FILE, whose rows they are.")
    out = pathlib.Path(args.out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out={args.out} is a file; expected a folder, new or old.")


def _check_pipeline(args) -> None:
    """Refuses flags of the other pipeline, and what unclip's can be refused for."""
    from dalle_jax.types import UsageError

    ours, both = argparse.ArgumentParser(), argparse.ArgumentParser()
    _add_unclip(ours)
    add_arguments(both)
    names = [action.dest for action in ours._actions if action.dest != "help"]
    names = _DALLE_ONLY if args.pipeline == "unclip" else names
    for name in names:
        if getattr(args, name) != both.get_default(name):
            other = "dalle" if args.pipeline == "unclip" else "unclip"
            raise UsageError(
                f"--{name} belongs to --pipeline={other}, not to --pipeline={args.pipeline}; leave "
                "it out, or change the pipeline."
            )
    if args.pipeline == "unclip":
        _unclip.check(args)
