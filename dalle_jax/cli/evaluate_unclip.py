"""`evaluate --suite=shapes --pipeline=unclip`: DALL-E 2 by the exact judge, in all its ways.

No command itself; it has no SUMMARY.
"""

import argparse
import pathlib

from dalle_jax.cli import unclip_options as options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags that only this pipeline has."""
    group = parser.add_argument_group("suite shapes, pipeline unclip (DALL-E 2)")
    options.add_stages(group, "prior_diffusion", "prior_ar", upsamplers=False)
    group.add_argument(
        "--ways",
        metavar="W,W,…",
        help="from a caption to the decoder: some of diffusion, ar (priors), none (text embedding "
        "in the image embedding's place), caption (no embedding) (default: all that there are)",
    )
    group.add_argument(
        "--guidances",
        default="2",
        metavar="G,G,…",
        help="guidance scales of the decoder, each measured (default: %(default)s)",
    )
    options.add_prior_settings(group)
    group.add_argument(
        "--sampler", choices=("ddim", "ddpm"), default="ddim", help="of the decoder (default: ddim)"
    )
    options.add_decoding(group)


def check(args: argparse.Namespace) -> None:
    """What can be refused before anything is loaded."""
    from dalle_jax.types import UsageError

    if args.suite != "shapes":
        raise UsageError(f"--pipeline=unclip goes with --suite=shapes, not --suite={args.suite}.")
    for name in ("workdir", "dvae"):
        if getattr(args, name):
            raise UsageError(f"--{name} is of --pipeline=dalle; give --decoder=DIR.")
    scales(args)
    unknown = [way for way in (args.ways or "").split(",") if way and way not in options.WAYS]
    if unknown:
        raise UsageError(f"--ways={args.ways}; expected some of {', '.join(options.WAYS)}.")


def scales(args: argparse.Namespace) -> list[float]:
    """Of --guidances."""
    return options.numbers(args.guidances, "guidances", float, lambda g: g >= 0, "scales >= 0")


def folders(args: argparse.Namespace) -> dict[str, str]:
    """Stage -> folder, for what is measured."""
    used = ("clip", "decoder", "prior", "prior_ar")
    return {name: folder for name, folder in options.folders(args).items() if name in used}


def measure(args: argparse.Namespace, found: dict[str, str], *, shared, report):
    """The figures, and a function of (folder, figures) that writes pictures and page.

    Args:
      args: of the command.
      found: of `folders`.
      shared: divides `generate`'s captions among the processes.
      report: takes lines of progress.
    """
    import dataclasses

    import jax
    import numpy as np

    from dalle_jax import images
    from dalle_jax.data import tokenizer
    from dalle_jax.engine import meshes
    from dalle_jax.evaluation import run as suites
    from dalle_jax.sampling import embed, rerank, unclip, unclip_set

    stages = unclip_set.load(found)
    ways = args.ways.split(",") if args.ways else [*stages.priors, "none", "caption"]
    for way in ways:
        unclip.check_way(stages, way)
    mesh, key, data = meshes.local(), jax.random.key(args.seed), stages.clip.config.data
    own = tokenizer.Tokenizer(stages.clip.tokenizer_bytes)
    base = unclip.Drawing(steps=args.steps, sampler=args.sampler, eta=args.eta)

    def tokens(captions):
        return own.encode(captions, data.text_len, add_bos_eos=data.add_bos_eos)

    def score(pictures, captions):
        return rerank.score(stages.clip, images.to_float(pictures), tokens(captions))

    runs, examples = [], {}
    for scale in scales(args):
        drawing = dataclasses.replace(base, guidance=scale)
        drawn_once: dict[bytes, np.ndarray] = {}  # the same scenes for every way

        def reconstruct(pictures, drawing=drawing, drawn_once=drawn_once):
            name = pictures.tobytes()
            if name not in drawn_once:
                z = embed.images(stages.clip, images.to_float(pictures))
                some = np.arange(len(z))
                drawn = unclip.draw_base(
                    stages.decoder, z, some >= 0, None, drawing, key=key, indices=some, mesh=mesh
                )
                drawn_once[name] = images.to_uint8(drawn)
            return drawn_once[name]

        for way in ways:
            report(f"prior {way}, guidance {scale:g}")

            def generate(captions, num_candidates, first_prompt, way=way, drawing=drawing):
                text = tokens(captions).repeat(num_candidates, axis=0)
                prompts = first_prompt + np.arange(len(captions))
                candidates = np.arange(num_candidates)[None]
                rows = (prompts[:, None] * unclip.MAX_CANDIDATES + candidates).reshape(-1)
                z, has_clip = unclip.image_embeddings(
                    stages, way, text, key=key, indices=rows, **options.prior_options(args, way)
                )
                drawn = unclip.draw_base(
                    stages.decoder, z, has_clip, text, drawing, key=key, indices=rows, mesh=mesh
                )
                drawn = images.to_uint8(drawn)
                return drawn.reshape(len(captions), num_candidates, *drawn.shape[1:])

            result, shown = suites.shapes_suite(
                image_px=stages.decoder.image_px,
                reconstruct=reconstruct,
                generate=shared(generate),
                score=score,
                prompts_per_skill=args.prompts_per_skill,
                candidates=args.candidates,
                seed=args.seed,
                max_pictures=args.batch,
                report=report,
            )
            runs.append({"prior": way, "guidance": scale, **result})
            examples[way, scale] = shown
    return {"runs": runs}, lambda out, full: write(out, full, examples)


def write(out: pathlib.Path, result: dict, examples: dict) -> None:
    """sheet.png and index.html: a table of all runs, curves of the sweep, pictures side by side."""
    from dalle_jax import images, pages
    from dalle_jax.cli import evaluate_page

    runs = result["runs"]
    page = pages.Page(
        "Shapes by DALL-E 2, judged",
        "The same prompts in every way from caption to picture; a near miss is a miss.",
    )
    page.section("Success").table(
        [
            {"prior": run["prior"], "guidance": run["guidance"]}
            | {kind: round(skill["seen"], 3) for kind, skill in run["skills"].items()}
            | {"mean": round(run["mean"]["seen"], 3)}
            | {k: v for k, v in evaluate_page.row("", run["mean"]).items() if k != "skill"}
            for run in runs
        ],
        "Share of right pictures: one drawn of each kind of prompt, then the mean of the four.",
    )
    ways = list(dict.fromkeys(run["prior"] for run in runs))
    if len({run["guidance"] for run in runs}) > 1:
        curves = {
            way: (
                [run["guidance"] for run in runs if run["prior"] == way],
                [run["mean"]["seen"] for run in runs if run["prior"] == way],
            )
            for way in ways
        }
        page.section("Guidance").chart(
            curves, "Right pictures, mean of the four skills", "guidance", "share", y_min=0
        )
    rows = [
        (f"{example.prompt.scene.caption} — {way}, guidance {scale:g}", example.images, labels)
        for parts in zip(*examples.values(), strict=True)
        for (way, scale), example in zip(examples, parts, strict=True)
        for labels in [example.labels]
    ]
    if rows:
        scale = max(1, evaluate_page.PICTURE_PX // rows[0][1].shape[1])
        (out / "sheet.png").write_bytes(images.png_bytes(images.contact_sheet(rows, scale=scale)))
        page.section("Pictures", "Best first by CLIP, each with its verdict and score.")
        for title, pictures, labels in rows:
            page.heading(title).gallery(
                list(zip(pictures, labels, strict=True)), evaluate_page.PICTURE_PX
            )
    page.section("Command").command(result["command"]).write(out / "index.html")
