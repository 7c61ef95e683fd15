"""`evaluate --suite=shapes --pipeline=unclip`: DALL-E 2 by the exact judge, in all its ways.

The way `dalle` is a DALL-E 1 on the same prompts, beside them.

No command itself; it has no SUMMARY.
"""

import argparse
import pathlib
from collections.abc import Sequence

from dalle_jax.cli import unclip_options as options

DALLE = "dalle"
WAYS = (*options.WAYS, DALLE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags that only this pipeline has."""
    group = parser.add_argument_group("suite shapes, pipeline unclip (DALL-E 2)")
    options.add_stages(group, "prior_diffusion", "prior_ar", upsamplers=False)
    group.add_argument(
        "--ways",
        metavar="W,W,…",
        help="from a caption to the decoder: some of diffusion, ar (priors), none (text embedding "
        "in the image embedding's place), caption (no embedding), dalle (a DALL-E 1: of "
        "--pretrained, or --workdir; with its --guidance, --temperature, --top_k and --top_p) "
        "(default: all that there are, without dalle)",
    )
    group.add_argument(
        "--guidances",
        default="2",
        metavar="G,G,…",
        help="guidance scales of the decoder, each measured (default: %(default)s)",
    )
    options.add_prior_settings(group)
    group.add_argument(
        "--sampler",
        choices=("ddim", "ddpm", "dpmpp"),
        default="ddim",
        help="of the decoder; dpmpp (DPM-Solver++) for few steps (default: ddim)",
    )
    options.add_decoding(group)


def check(args: argparse.Namespace) -> None:
    """What can be refused before anything is loaded."""
    from dalle_jax.types import UsageError

    if args.suite != "shapes":
        raise UsageError(f"--pipeline=unclip goes with --suite=shapes, not --suite={args.suite}.")
    scales(args)
    given = args.ways.split(",") if args.ways else []
    if set(given) - set(WAYS):
        raise UsageError(f"--ways={args.ways}; expected some of {', '.join(WAYS)}.")
    for name in ("workdir", "dvae"):
        if getattr(args, name) and DALLE not in given:
            raise UsageError(
                f"--{name} is of DALL-E 1, which is measured with {DALLE!r} among --ways; give "
                "--decoder=DIR for DALL-E 2."
            )


def scales(args: argparse.Namespace) -> list[float]:
    """Of --guidances."""
    return options.numbers(args.guidances, "guidances", float, lambda g: g >= 0, "scales >= 0")


def folders(args: argparse.Namespace) -> dict[str, str]:
    """Stage -> folder, for what is measured."""
    from dalle_jax.types import UsageError

    found = options.folders(args)
    used = ["clip", "decoder", "prior", "prior_ar"]
    if args.ways and DALLE in args.ways.split(","):
        given = {"dalle": args.workdir, "dvae": args.dvae}
        if args.workdir:  # knows its codec; the set's is of the set's own
            found.pop("dvae", None)
        found |= {name: folder for name, folder in given.items() if folder}
        if "dalle" not in found:
            raise UsageError(
                f"--ways={args.ways}, but there is no DALL-E 1: give --workdir=DIR, or a "
                "--pretrained set that holds one."
            )
        used += ["dalle", "dvae"]
    return {name: folder for name, folder in found.items() if name in used}


def measure(args: argparse.Namespace, found: dict[str, str], *, dalle, shared, report):
    """The figures, and a function of (folder, figures) that writes pictures and page.

    Args:
      args: of the command.
      found: of `folders`.
      dalle: (args, folders) -> image_px, generate and reconstruct of the DALL-E 1 there.
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
    from dalle_jax.types import UsageError

    stages = unclip_set.load({k: v for k, v in found.items() if k not in ("dalle", "dvae")})
    ways = args.ways.split(",") if args.ways else [*stages.priors, "none", "caption"]
    own_ways = [way for way in ways if way != DALLE]
    for way in own_ways:
        unclip.check_way(stages, way)
    other = dalle(args, found) if DALLE in ways else None
    if other and other[0] != stages.decoder.image_px:
        raise UsageError(
            f"the DALL-E 1 {found['dalle']!r} draws {other[0]} px, but the decoder "
            f"{found['decoder']!r} {stages.decoder.image_px} px: the judge sees more on larger "
            "pictures; compare networks of one size, or measure each by itself."
        )
    mesh, key, data = meshes.local(), jax.random.key(args.seed), stages.clip.config.data
    own = tokenizer.Tokenizer(stages.clip.tokenizer_bytes)
    base = unclip.Drawing(steps=args.steps, sampler=args.sampler, eta=args.eta)

    def tokens(captions):
        return own.encode(captions, data.text_len, add_bos_eos=data.add_bos_eos)

    def score(pictures, captions):
        return rerank.score(stages.clip, images.to_float(pictures), tokens(captions))

    runs, examples = [], {}

    def add(way, scale, reconstruct, generate, **settings):
        result, examples[way, scale] = suites.shapes_suite(
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
        runs.append({"prior": way, "guidance": scale, **settings, **result})

    for scale in scales(args) if own_ways else ():
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

        for way in own_ways:
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

            add(way, scale, reconstruct, generate)
    if other:
        _, generate, reconstruct = other
        settings = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}
        report(f"DALL-E 1, guidance {args.guidance:g}")
        add(DALLE, args.guidance, reconstruct, generate, **settings)
    return {"runs": runs}, lambda out, full: write(out, full, examples)


def write(out: pathlib.Path, result: dict, examples: dict) -> None:
    """sheet.png and index.html: a table of all runs, curves of the sweep, pictures side by side."""
    from dalle_jax import images, pages
    from dalle_jax.cli import evaluate_page

    runs = result["runs"]
    models = "DALL-E 1 and 2" if any(run["prior"] == DALLE for run in runs) else "DALL-E 2"
    page = pages.Page(
        f"Shapes by {models}, judged",
        "The same prompts in every way from caption to picture; a near miss is a miss.",
    )
    table(page.section("Success"), runs)
    guidance_chart(page, runs)
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


def table(page, runs: Sequence[dict]) -> None:
    """A row per run: its skills, their mean, the curve of reranking and the ceiling."""
    from dalle_jax.cli import evaluate_page

    page.table(
        [
            {"prior": run["prior"], "guidance": run["guidance"]}
            | {kind: round(skill["seen"], 3) for kind, skill in run["skills"].items()}
            | {"mean": round(run["mean"]["seen"], 3)}
            | {k: v for k, v in evaluate_page.row("", run["mean"]).items() if k != "skill"}
            for run in runs
        ],
        "Share of right pictures: one drawn of each kind of prompt, then the mean of the four. The "
        "ceiling, `reconstruction`: scenes that are right again when the decoder draws them from "
        "their own embedding.",
    )
    for run in runs:
        if run["prior"] == DALLE:
            page.text(
                "Prior `dalle` is a DALL-E 1, without prior and decoder, at temperature "
                f"{run['temperature']:g}, top_k {run['top_k']}, top_p {run['top_p']:g} and a "
                "guidance of its own; its ceiling is its codec's. One CLIP ranks for all."
            )


def guidance_chart(page, runs: Sequence[dict]) -> None:
    """Success against the decoder's guidance, a line per way; nothing where it was not varied.

    DALL-E 1, which has a guidance of its own, is a level.
    """
    scales = sorted({run["guidance"] for run in runs if run["prior"] != DALLE})
    if len(scales) < 2:
        return
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for run in runs:
        x, y = curves.setdefault(run["prior"], ([], []))
        here = [scales[0], scales[-1]] if run["prior"] == DALLE else [run["guidance"]]
        x += here
        y += [run["mean"]["seen"]] * len(here)
    title = "Guidance: right pictures, mean of the four skills"
    page.chart(curves, title, "guidance", "share", y_min=0)
