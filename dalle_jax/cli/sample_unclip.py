"""`sample --pipeline=unclip`: pictures of captions by prior, decoder and upsamplers.

No command itself; it has no SUMMARY.
"""

import argparse
import functools
import json
import pathlib
import time

from dalle_jax.cli import _prompts, _unclip

CANDIDATES, KEEP, GUIDANCE = 8, 4, 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags that only this pipeline has."""
    group = parser.add_argument_group("pipeline unclip (DALL-E 2)")
    _unclip.add_stages(group, "prior_diffusion", "prior_ar")
    _unclip.add_prior(group)
    group.add_argument(
        "--sampler",
        choices=("ddim", "ddpm", "dpmpp"),
        default="ddim",
        help="of the decoder; dpmpp (DPM-Solver++) for few steps (default: ddim)",
    )
    _unclip.add_drawing(group)


def run(args: argparse.Namespace, prompts: list[str], command: str) -> int:
    """Draws, ranks, finishes and writes; returns the exit code."""
    import jax
    import numpy as np

    from dalle_jax.cli import gallery
    from dalle_jax.engine import distributed, meshes
    from dalle_jax.sampling import unclip

    distributed.agree({"the command": command, "prompts": prompts})
    way, names = _unclip.way(args)
    stages = _unclip.load(args, *names)
    unclip.check_prior(stages, way)
    text = _prompts.tokens(stages.clip, prompts, "CLIP")
    candidates = args.candidates or max(CANDIDATES, args.keep or 0)
    keep = args.keep or min(KEEP, candidates)
    drawing, mesh = _unclip.drawing(args), meshes.local()
    out = pathlib.Path(args.out)
    folders = _prompts.folders(out, prompts)
    for i in range(jax.process_index(), len(prompts), jax.process_count()):
        start, label = time.monotonic(), f"{i + 1}/{len(prompts)} {_prompts.short(prompts[i])}"
        drawn = unclip.sample_best(
            stages,
            way,
            text[i],
            drawing,
            num_candidates=candidates,
            keep=keep,
            key=jax.random.key(args.seed),
            mesh=mesh,
            progress=functools.partial(_prompts.progress, label, start, candidates),
            **_unclip.prior_options(args, way),
        )
        folders[i].mkdir(parents=True, exist_ok=True)
        np.save(folders[i] / "embeddings.npy", drawn.embeddings, allow_pickle=False)
        files = _write_pictures(folders[i], drawn)
        figures = _figures(args, prompts[i], way, drawn, files, time.monotonic() - start, stages)
        (folders[i] / "scores.json").write_text(json.dumps(figures, indent=1) + "\n")
    distributed.wait_for_all("all prompts are drawn")
    if jax.process_index() != 0:
        return 0
    blocks = [_block(out, folder) for folder in folders]
    subtitle = f"unCLIP, prior {way}, {args.steps} steps, guidance {args.guidance}"
    title = "Pictures from captions"
    result = gallery.write(out, title, subtitle, blocks, command=command, stages=stages.parts)
    gallery.report(result, out, args.json)
    return 0


def _figures(args, prompt, way, drawn, files, seconds, stages) -> dict:
    kept = [
        dict(rank=rank, candidate=int(i), score=round(float(drawn.scores[i]), 5), **written)
        for rank, (i, written) in enumerate(zip(drawn.candidates, files, strict=True), 1)
    ]
    names = ("seed", "steps", "sampler", "eta", "guidance", "prior_steps", "prior_guidance")
    return {
        "prompt": prompt,
        "settings": {"prior": way} | {name: getattr(args, name) for name in names},
        "kept": kept,
        "scores": [round(float(s), 5) for s in drawn.scores],
        "seconds": round(seconds, 2),
        "image_px": stages.image_px,
    }


def _write_pictures(folder, drawn) -> list[dict[str, str]]:
    """The files of each rank: `file`, and `small` as the decoder drew it, where it was enlarged."""
    from dalle_jax import images
    from dalle_jax.cli import gallery

    gallery.clear(folder)
    made = {"file": ("", drawn.images)}
    if drawn.small.shape != drawn.images.shape:
        made["small"] = ("_small", drawn.small)
    files = []
    for rank in range(len(drawn.images)):
        files.append({})
        for kind, (ending, pictures) in made.items():
            file = folder / f"{rank + 1:02d}{ending}.png"
            file.write_bytes(images.png_bytes(images.to_uint8(pictures[rank])))
            files[-1][kind] = str(file)
    return files


def _block(out, folder):
    """The block of a prompt as the process that drew it left it."""
    import numpy as np

    from dalle_jax import images
    from dalle_jax.cli import gallery
    from dalle_jax.types import UsageError

    try:
        figures = json.loads((folder / "scores.json").read_text())
    except OSError as error:
        raise UsageError(
            f"another process has drawn into {folder}, but this one cannot read it ({error}); "
            "--out must be on a disk that all hosts share."
        ) from error
    names = [f"{kept['rank']:02d}" for kept in figures["kept"]]
    return gallery.Block(
        folder=str(folder.relative_to(out)),
        title=figures["prompt"],
        text=f"{len(names)} of {len(figures['scores'])} pictures, ranked by CLIP, best first; "
        f"{figures['seconds']:.1f} seconds.",
        pictures=np.stack([images.read(folder / f"{name}.png") for name in names]),
        names=names,
        labels=[f"{kept['rank']} · {kept['score']:.3f}" for kept in figures["kept"]],
        figures=figures,
    )
