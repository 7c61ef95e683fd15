"""Draws pictures for captions with a trained DALL-E or DALL-E 2; CLIP ranks them, some are kept.

  python -m dalle_jax sample --pretrained=shapes --prompt="a red cube on a white background"
  python -m dalle_jax sample --workdir=runs/dalle --clip=runs/clip --prompt="…" \\
      --candidates=64 --keep=8 --out=runs/samples
  … --image=picture.png --keep_rows=4     completes a picture from its first 4 rows of codes
  python -m dalle_jax sample --pipeline=unclip --pretrained=shapes --prompt="two blue stars"
  … --prior=ar|diffusion|none|caption     how the caption becomes what DALL-E 2's decoder draws from

Written to --out: a folder per prompt with the pictures (01.png is the best), their codes (unclip:
image embeddings, and 01_small.png as the decoder drew it) and scores.json (the scores of all
candidates, seed and settings), a contact sheet sheet.png, and index.html. The same seed draws the
same pictures, whatever the batch and the number of devices and processes; more candidates only add
to those of fewer. Several processes (--distributed) share the prompts, so there is work for as many
of them as there are prompts; --out is on a shared disk.
"""

import argparse
import functools
import json
import pathlib
import time

from dalle_jax.cli import _flags, _prompts, _unclip, sample_unclip

SUMMARY = "draw pictures for captions and rank them with CLIP"

CANDIDATES, KEEP = 32, 8
PIPELINES = ("dalle", "unclip")
_DALLE_ONLY = ("workdir", "dvae", "image", "keep_rows", "temperature", "top_k", "top_p", "no_cache")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument(
        "--pipeline", choices=PIPELINES, default="dalle", help="what draws (default: %(default)s)"
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
    group = parser.add_argument_group("what to draw")
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
        help=f"pictures drawn per prompt (default: {CANDIDATES}; without a CLIP, as many as kept)",
    )
    group.add_argument("--keep", type=int, metavar="K", help=f"pictures kept (default: {KEEP})")
    group = parser.add_argument_group("how to draw")
    group.add_argument("--temperature", type=float, default=1.0, help="default: %(default)s")
    group.add_argument("--top_k", type=int, default=0, help="likeliest codes only; 0 = all")
    group.add_argument("--top_p", type=float, default=1.0, help="nucleus mass; 1 = all")
    group.add_argument(
        "--guidance",
        type=float,
        help="classifier-free guidance scale; 1 = off (default: 1, which needs no training with "
        f"data.caption_drop; pipeline unclip: {sample_unclip.GUIDANCE})",
    )
    group.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    group.add_argument(
        "--batch", type=int, help="candidates drawn at a time (default: what fits the memory)"
    )
    group.add_argument(
        "--no_cache", action="store_true", help="without the key/value cache: slow, same pictures"
    )
    sample_unclip.add_arguments(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--out", default="samples", metavar="DIR", help="default: %(default)s")
    group.add_argument("--json", action="store_true", help="print all scores as JSON")
    _flags.add_distributed(parser)
    _flags.add_cache(parser)


def run(args: argparse.Namespace) -> int:
    """Draws, ranks and writes; returns the exit code."""
    prompts = _prompts.given(args)
    is_unclip = args.pipeline == "unclip"
    if args.guidance is None:
        args.guidance = sample_unclip.GUIDANCE if is_unclip else 1.0
    _check(args)
    _flags.use_cache(args)
    with _flags.job(args):
        if is_unclip:
            command = _prompts.command("sample", add_arguments, args)
            return sample_unclip.run(args, prompts, command)
        return _run(args, prompts)


def _run(args: argparse.Namespace, prompts: list[str]) -> int:
    import jax

    from dalle_jax.cli import sample_page
    from dalle_jax.engine import distributed, meshes
    from dalle_jax.sampling import categorical, rerank

    distributed.agree(
        {"the command": _prompts.command("sample", add_arguments, args), "prompts": prompts}
    )
    dalle, clip = _stages(args)
    codec = dalle.codec
    categorical.check(args.temperature, args.top_k, args.top_p, args.guidance, codec.num_codes)
    if args.guidance != 1 and not dalle.config.data.caption_drop:
        _prompts.warn(
            "--guidance has little meaning: this DALL-E was trained with data.caption_drop=0."
        )
    candidates, keep = _counts(args, clip is not None)
    text = _prompts.tokens(dalle, prompts, "DALL-E")
    clip_text = None if clip is None else _prompts.tokens(clip, prompts, "CLIP")
    given, prefix, rows = _prefix(args, codec)

    out = pathlib.Path(args.out)
    mesh = meshes.local()
    chunk = args.batch or rerank.fitting_chunk(dalle, args.guidance) * mesh.size
    results: dict[int, dict] = {}
    folders = _prompts.folders(out, prompts)
    for i in range(jax.process_index(), len(prompts), jax.process_count()):
        prompt, folder = prompts[i], folders[i]
        start = time.monotonic()
        label = f"{i + 1}/{len(prompts)} {_prompts.short(prompt)}"
        drawn = rerank.sample_best(
            dalle,
            clip,
            text[i],
            None if clip is None else clip_text[i],
            num_candidates=candidates,
            keep=keep,
            chunk=chunk,
            key=jax.random.key(args.seed),
            progress=functools.partial(_prompts.progress, label, start, candidates),
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            guidance=args.guidance,
            prefix=prefix,
            use_cache=not args.no_cache,
            mesh=mesh,
        )
        seconds = time.monotonic() - start
        results[i] = sample_page.write(args, folder, prompt, drawn, seconds, dalle, clip, rows)
    distributed.wait_for_all("all prompts are drawn")
    if jax.process_index() != 0:
        return 0
    everything = [results.get(i) or sample_page.read(folder) for i, folder in enumerate(folders)]
    sample_page.write_pages(
        args,
        out,
        everything,
        given,
        dalle,
        clip,
        _prompts.command("sample", add_arguments, args),
    )
    report = [{k: v for k, v in result.items() if k != "pictures"} for result in everything]
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        for result in report:
            best = result["kept"][0]
            score = "" if best["score"] is None else f", best score {best['score']:.3f}"
            print(f"{best['file']}  {_prompts.short(result['prompt'])} ({candidates} drawn{score})")
        print(f"{out / 'index.html'}")
    return 0


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
    sample_unclip.add_arguments(ours)
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


def _stages(args):
    from dalle_jax.stages import pretrained
    from dalle_jax.stages.clip import ClipStage
    from dalle_jax.stages.dalle import DalleStage

    shipped = pretrained.folders(args.pretrained) if args.pretrained else {}
    clip_dir = args.clip or shipped.get("clip")
    dvae_dir = args.dvae or shipped.get("dvae", "")
    # CLIP first: it is the quicker one to find wrong.
    clip = ClipStage.load(clip_dir) if clip_dir else None
    dalle_dir = args.workdir or shipped.get("dalle", f"{args.pretrained}/dalle")
    return DalleStage.load(dalle_dir, codec=dvae_dir), clip


def _counts(args, has_clip: bool) -> tuple[int, int]:
    """(candidates, keep)."""
    if has_clip:
        candidates = args.candidates or max(CANDIDATES, args.keep or 0)
        return candidates, args.keep or min(KEEP, candidates)
    keep = args.keep or min(KEEP, args.candidates or KEEP)
    if args.candidates and args.candidates > keep:
        _prompts.warn(
            f"nothing ranks without --clip: drawing only the {keep} pictures that are kept."
        )
    return keep, keep


def _prefix(args, codec):
    """(the given picture as the codec sees it uint8, its first codes [1, R*g], R)."""
    import numpy as np

    from dalle_jax import images
    from dalle_jax.data import preprocess
    from dalle_jax.types import UsageError

    if not args.image:
        return None, None, 0
    rows = codec.grid // 2 if args.keep_rows is None else args.keep_rows
    if not 0 < rows < codec.grid:
        raise UsageError(
            f"--keep_rows={rows}; this codec has {codec.grid} rows of codes: keep 1 to "
            f"{codec.grid - 1} of them."
        )
    given = preprocess.crop_center(images.read(args.image), codec.image_px)
    codes = np.asarray(codec.encode(images.to_float(given)[None])).reshape(1, -1)
    return given, codes[:, : rows * codec.grid], rows
