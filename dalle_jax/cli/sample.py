"""Draws pictures for captions with a trained DALL-E; CLIP ranks them and the best are kept.

  python -m dalle_jax sample --pretrained=shapes --prompt="a red cube on a white background"
  python -m dalle_jax sample --workdir=runs/dalle --clip=runs/clip --prompt="…" \\
      --candidates=64 --keep=8 --out=runs/samples
  … --image=picture.png --keep_rows=4     completes a picture from its first 4 rows of codes

Written to --out: a folder per prompt with the pictures (01.png is the best), their codes and
scores.json (the scores of all candidates, seed and settings), a contact sheet sheet.png, and
index.html. The same seed draws the same pictures, whatever the batch and the number of devices
and processes; more candidates only add to those of fewer. Several processes (--distributed) share
the prompts, so there is work for as many of them as there are prompts; --out is on a shared disk.
"""

import argparse
import functools
import json
import pathlib
import re
import shlex
import sys
import time

from dalle_jax.cli import common

SUMMARY = "draw pictures for captions and rank them with CLIP"

CANDIDATES, KEEP = 32, 8
MAX_PROMPT_CHARS = 1000  # 256 text slots at the paper's size hold about as many
_FIRST_PIECE = 260  # ids below are control ids and bytes: characters unseen in training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
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
    group.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="repeatable")
    group.add_argument("--prompts_file", metavar="FILE", help="one prompt per line, UTF-8")
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
        default=1.0,
        help="classifier-free guidance scale; 1 = off; needs training with data.caption_drop",
    )
    group.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    group.add_argument(
        "--batch", type=int, help="candidates drawn at a time (default: what fits the memory)"
    )
    group.add_argument(
        "--no_cache", action="store_true", help="without the key/value cache: slow, same pictures"
    )
    group = parser.add_argument_group("output")
    group.add_argument("--out", default="samples", metavar="DIR", help="default: %(default)s")
    group.add_argument("--json", action="store_true", help="print all scores as JSON")
    common.add_distributed(parser)
    common.add_cache(parser)


def run(args: argparse.Namespace) -> int:
    """Draws, ranks and writes; returns the exit code."""
    prompts = _prompts(args)
    _check(args)
    common.use_cache(args)
    with common.job(args):
        return _run(args, prompts)


def _run(args: argparse.Namespace, prompts: list[str]) -> int:
    import jax

    from dalle_jax.cli import sample_page
    from dalle_jax.engine import distributed, meshes
    from dalle_jax.sampling import logits, rerank

    distributed.agree({"the command": _command(args), "prompts": prompts})
    dalle, clip = _stages(args)
    codec = dalle.codec
    logits.check(args.temperature, args.top_k, args.top_p, args.guidance, codec.num_codes)
    if args.guidance != 1 and not dalle.config.data.caption_drop:
        _warn("--guidance has little meaning: this DALL-E was trained with data.caption_drop=0.")
    candidates, keep = _counts(args, clip is not None)
    text = _tokens(dalle, prompts, "DALL-E")
    clip_text = None if clip is None else _tokens(clip, prompts, "CLIP")
    given, prefix, rows = _prefix(args, codec)

    out = pathlib.Path(args.out)
    mesh = meshes.local()
    chunk = args.batch or rerank.fitting_chunk(dalle, args.guidance) * mesh.size
    results: dict[int, dict] = {}
    folders = _folders(out, prompts)
    for i in range(jax.process_index(), len(prompts), jax.process_count()):
        prompt, folder = prompts[i], folders[i]
        start = time.monotonic()
        label = f"{i + 1}/{len(prompts)} {_short(prompt)}"
        drawn = rerank.draw_best(
            dalle,
            clip,
            text[i],
            None if clip is None else clip_text[i],
            num_candidates=candidates,
            keep=keep,
            chunk=chunk,
            key=jax.random.key(args.seed),
            progress=functools.partial(_progress, label, start, candidates),
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
    sample_page.write_pages(args, out, everything, given, dalle, clip, _command(args))
    report = [{k: v for k, v in result.items() if k != "pictures"} for result in everything]
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        for result in report:
            best = result["kept"][0]
            score = "" if best["score"] is None else f", best score {best['score']:.3f}"
            print(f"{best['file']}  {_short(result['prompt'])} ({candidates} drawn{score})")
        print(f"{out / 'index.html'}")
    return 0


def _prompts(args) -> list[str]:
    """The prompts in order, each stripped, none empty."""
    from dalle_jax.types import UsageError

    prompts = list(args.prompt)
    if args.prompts_file:
        try:
            lines = pathlib.Path(args.prompts_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"--prompts_file={args.prompts_file} cannot be read ({error}); expected a UTF-8 "
                "text file with one prompt per line."
            ) from error
        prompts += [line for line in lines if line.strip()]
    if not prompts:
        raise UsageError('there is nothing to draw; give --prompt="…" or --prompts_file=FILE.')
    for prompt in prompts:
        if not prompt.strip():
            raise UsageError(f"prompt {prompt!r} is empty; expected a caption.")
        if len(prompt) > MAX_PROMPT_CHARS:
            raise UsageError(
                f"the prompt {_short(prompt)!r} has {len(prompt):,} characters; at most "
                f"{MAX_PROMPT_CHARS:,} are taken: shorten it."
            )
    return [prompt.strip() for prompt in prompts]


def _check(args) -> None:
    """What can be refused before anything is loaded."""
    from dalle_jax.types import UsageError

    if bool(args.workdir) == bool(args.pretrained):
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


def _stages(args):
    from dalle_jax.sampling import stages

    shipped = stages.pretrained(args.pretrained) if args.pretrained else {}
    clip_dir = args.clip or shipped.get("clip")
    dvae_dir = args.dvae or shipped.get("dvae", "")
    # CLIP first: it is the quicker one to find wrong.
    clip = stages.load_clip(clip_dir) if clip_dir else None
    dalle_dir = args.workdir or shipped.get("dalle", f"{args.pretrained}/dalle")
    return stages.load_dalle(dalle_dir, dvae=dvae_dir), clip


def _counts(args, has_clip: bool) -> tuple[int, int]:
    """(candidates, keep)."""
    if has_clip:
        candidates = args.candidates or max(CANDIDATES, args.keep or 0)
        return candidates, args.keep or min(KEEP, candidates)
    keep = args.keep or min(KEEP, args.candidates or KEEP)
    if args.candidates and args.candidates > keep:
        _warn(f"nothing ranks without --clip: drawing only the {keep} pictures that are kept.")
    return keep, keep


def _tokens(stage, prompts: list[str], name: str):
    """Ids [P, T] by the stage's own tokenizer; warns of what it will not read."""
    from dalle_jax.data import tokenizer
    from dalle_jax.types import UsageError

    own = tokenizer.Tokenizer(stage.tokenizer_bytes)
    data = stage.config.data
    for prompt, row in zip(prompts, own.pieces(prompts), strict=True):
        if not any(i >= _FIRST_PIECE and own.decode([i]).strip() for i in row):
            raise UsageError(
                f"{name} knows no character of the prompt {_short(prompt)!r}; its training "
                "captions were of another script: describe the picture in their words."
            )
        unknown = [c for c in dict.fromkeys(prompt) if c.strip() and not _knows(own, c)]
        if unknown:
            _warn(f"{name} never saw {' '.join(unknown)} in training; in {_short(prompt)!r}.")
        if tokenizer.overlong(row, data.text_len, data.add_bos_eos):
            _warn(
                f"{name} reads only the first {data.text_len - 2 * data.add_bos_eos} of "
                f"{len(row)} tokens of {_short(prompt)!r}."
            )
    return own.encode(prompts, data.text_len, add_bos_eos=data.add_bos_eos)


def _knows(own, character: str) -> bool:
    return any(i >= _FIRST_PIECE and own.decode([i]).strip() for i in own.pieces([character])[0])


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


def _folders(out: pathlib.Path, prompts: list[str]) -> list[pathlib.Path]:
    """One folder name per prompt: its words, numbered where two would be the same."""
    names: list[str] = []
    for prompt in prompts:
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "prompt"
        number, name = 2, slug
        while name in names:
            number, name = number + 1, f"{slug}-{number}"
        names.append(name)
    return [out / name for name in names]


def _command(args) -> str:
    """The command line that draws this again."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    skip = ("compilation_cache", "json", *common.DISTRIBUTED)
    words = ["python", "-m", "dalle_jax", "sample"]
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if action.dest in skip or value in (None, action.default):
            continue
        if value is True:
            words.append(f"--{action.dest}")
        else:
            words += [
                f"--{action.dest}={v}" for v in (value if isinstance(value, list) else [value])
            ]
    return shlex.join(words)


def _progress(label: str, start: float, total: int, done: int) -> None:
    """A line on stderr per batch; on a terminal it replaces itself."""
    rate = done / max(time.monotonic() - start, 1e-9)
    text = f"{label}: {done}/{total} drawn, {rate:.1f}/s"
    if done < total:
        text += f", about {(total - done) / rate:.0f} s left"
    is_terminal = sys.stderr.isatty()
    end = "\r" if is_terminal and done < total else "\n"
    print(text.ljust(79) if is_terminal else text, end=end, file=sys.stderr, flush=True)


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 60 else prompt[:57] + "…"


def _warn(text: str) -> None:
    import jax

    if jax.process_index() == 0:
        print(f"warning: {text}", file=sys.stderr)
