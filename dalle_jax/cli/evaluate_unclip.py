"""`evaluate --pipeline=unclip`: DALL-E 2's flags, stages and drawing; suite shapes in all its ways.

The other suites are `evaluate_distribution` and `evaluate_edits`. Of suite shapes, the way `dalle`
is a DALL-E 1 on the same prompts, beside the others. No command itself; it has no SUMMARY.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from dalle_jax.cli import _unclip
from dalle_jax.cli import evaluate_parts as parts

DALLE = "dalle"
WAYS = (*_unclip.WAYS, DALLE)
SUITES = ("shapes", "distribution", "variations", "inpainting")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags that only this pipeline has."""
    group = parser.add_argument_group(
        "pipeline unclip (DALL-E 2)",
        "--inpainter, --upsampler, --upsample_steps and --no_upsample are of suite inpainting",
    )
    _unclip.add_stages(group, "prior_diffusion", "prior_ar", "inpainter")
    group.add_argument(
        "--ways",
        metavar="W,W,…",
        help="from a caption to the decoder: some of diffusion, ar (priors), none (text embedding "
        "in the image embedding's place), caption (no embedding); of suite shapes also dalle (a "
        "DALL-E 1: of --pretrained, or --workdir; with its --guidance, --temperature, --top_k and "
        "--top_p) (default: all that there are, without dalle)",
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
    _unclip.add_drawing(group)


def check(args: argparse.Namespace) -> None:
    """What can be refused before anything is loaded."""
    from dalle_jax.types import UsageError

    if args.suite not in SUITES:
        raise UsageError(
            f"--pipeline=unclip goes with --suite={', '.join(SUITES)}, not --suite={args.suite}."
        )
    scales(args)
    given = [way for way in (args.ways or "").split(",") if way]
    known = WAYS if args.suite == "shapes" else _unclip.WAYS
    if set(given) - set(known):
        raise UsageError(f"--ways={args.ways}; expected some of {', '.join(known)}.")
    for name in ("workdir", "dvae"):
        if getattr(args, name) and DALLE not in given:
            raise UsageError(
                f"--{name} is of DALL-E 1, which suite shapes measures with {DALLE!r} among "
                "--ways; give --decoder=DIR for DALL-E 2."
            )
    if args.guidance != 1 and DALLE not in given:
        raise UsageError(
            f"--guidance={args.guidance:g} is of DALL-E 1; give DALL-E 2's decoder "
            f"--guidances={args.guidance:g}, or several to be compared."
        )
    if args.suite != "variations":
        return
    etas(args)
    if args.ways:
        raise UsageError("--ways is from a caption to a picture; variations have no caption.")
    if args.eta or args.sampler != "ddim":
        raise UsageError(
            "variations are drawn by ddim with each eta of --etas; leave --eta and --sampler out."
        )


def scales(args: argparse.Namespace) -> list[float]:
    """Of --guidances."""
    given = args.guidances or ("1" if args.suite == "variations" else "2")
    return _unclip.numbers(given, "guidances", float, lambda g: g >= 0, "scales >= 0")


def etas(args: argparse.Namespace) -> list[float]:
    """Of --etas."""
    good, expected = (lambda eta: 0 <= eta <= 1), "numbers in [0, 1]"
    return _unclip.numbers(args.etas or "0,1", "etas", float, good, expected)


def folders(args: argparse.Namespace) -> dict[str, str]:
    """Stage -> folder, for what is measured."""
    from dalle_jax.types import UsageError

    found, used = _unclip.folders(args), ["clip", "decoder"]
    if args.suite != "variations":
        used += ["prior", "prior_ar"]
    if args.suite == "inpainting":
        used += ["inpaint", *(() if args.no_upsample else ("upsampler_1", "upsampler_2"))]
    if DALLE in (args.ways or "").split(","):
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


@dataclasses.dataclass(frozen=True)
class Drawer:
    """DALL-E 2 as the suites draw with it.

    Attributes:
      args: of the command.
      stages: `unclip_set.Unclip`.
      ways: from caption to picture, those to measure.
      tokenizer: the CLIP's.
      key: typed key of all noise.
      mesh: this process's devices.
    """

    args: argparse.Namespace
    stages: Any
    ways: tuple[str, ...]
    tokenizer: Any
    key: Any
    mesh: Any

    def tokens(self, captions):
        """Ids [P, T] of captions."""
        data = self.stages.clip.config.data
        return self.tokenizer.encode(captions, data.text_len, add_bos_eos=data.add_bos_eos)

    def drawing(self, guidance: float, eta: float | None = None):
        """`unclip.Settings` of the flags with this guidance, and this eta in place of --eta."""
        from dalle_jax.sampling import unclip

        args = self.args
        made = {}
        if args.upsample_steps:
            made["upsample_steps"] = tuple(args.upsample_steps)
        eta = args.eta if eta is None else eta
        return unclip.Settings(
            steps=args.steps, sampler=args.sampler, eta=eta, guidance=guidance, **made
        )

    def rows(self, first: int, num_prompts: int, num_candidates: int):
        """Global indices int [P * N] of the candidates of prompts from the first on."""
        import numpy as np

        from dalle_jax.sampling import unclip

        prompts = first + np.arange(num_prompts)[:, None]
        return (prompts * unclip.MAX_CANDIDATES + np.arange(num_candidates)[None]).reshape(-1)

    def generate(self, way: str, drawing, ids, num_candidates: int, first_prompt: int):
        """Ids [P, T] of captions to uint8 [P, N, h, h, 3], of the decoder's size."""
        from dalle_jax import images
        from dalle_jax.sampling import unclip

        text = ids.repeat(num_candidates, axis=0)
        common = dict(key=self.key, indices=self.rows(first_prompt, len(ids), num_candidates))
        z, has_clip = unclip.image_embeddings(
            self.stages, way, text, **common, **_unclip.prior_options(self.args, way)
        )
        drawn = unclip.sample_base(
            self.stages.decoder, z, has_clip, text, drawing, mesh=self.mesh, **common
        )
        return images.to_uint8(drawn).reshape(len(ids), num_candidates, *drawn.shape[1:])


def prepare(args: argparse.Namespace, found: dict[str, str]) -> Drawer:
    """The stages in these folders, ready to draw.

    Raises:
      UsageError: for folders, ways or steps that do not fit, before anything compiles.
    """
    import jax

    from dalle_jax.diffusion import schedules
    from dalle_jax.engine import meshes
    from dalle_jax.sampling import unclip
    from dalle_jax.stages.unclip import Unclip

    stages = Unclip.load({k: v for k, v in found.items() if k not in ("dalle", "dvae")})
    reads = bool(stages.decoder.model.config.text_layers)
    ways = [*stages.priors, "none", *(["caption"] if reads else [])]
    if args.ways:
        ways = [way for way in args.ways.split(",") if way and way != DALLE]
    for way in ways:
        unclip.check_prior(stages, way)
    own, key = stages.clip.tokenizer, jax.random.key(args.seed)
    made = Drawer(args, stages, tuple(ways), own, key, meshes.local())
    schedules.respace(stages.decoder.schedule, made.drawing(1.0).steps)
    for stage in stages.upsamplers:
        for steps in made.drawing(1.0).upsample_steps:
            schedules.respace(stage.schedule, steps)
    return made


def measure(args: argparse.Namespace, found: dict[str, str], *, dalle, shared, report):
    """The figures of suite shapes, and a function of (folder, figures) that writes its page.

    Args:
      args: of the command.
      found: of `folders`.
      dalle: (args, folders) -> image_px, generate and reconstruct of the DALL-E 1 there.
      shared: divides `generate`'s captions among the processes.
      report: takes lines of progress.
    """
    import numpy as np

    from dalle_jax import images
    from dalle_jax.evaluation import shapes
    from dalle_jax.sampling import rerank, unclip
    from dalle_jax.types import UsageError

    drawer = prepare(args, found)
    stages = drawer.stages
    other = dalle(args, found) if "dalle" in found else None
    if other and other[0] != stages.decoder.image_px:
        raise UsageError(
            f"the DALL-E 1 {found['dalle']!r} draws {other[0]} px, but the decoder "
            f"{found['decoder']!r} {stages.decoder.image_px} px: the judge sees more on larger "
            "pictures; compare networks of one size, or measure each by itself."
        )

    def score(pictures, captions):
        return rerank.score(stages.clip, images.to_float(pictures), drawer.tokens(captions))

    runs, examples = [], {}

    def add(way, scale, reconstruct, generate, **settings):
        result, examples[way, scale] = shapes.shapes_suite(
            image_px=stages.decoder.image_px,
            reconstruct=reconstruct,
            generate=shared(generate),
            score=score,
            prompts_per_skill=args.prompts_per_skill,
            skills=parts.skills(args),
            candidates=args.candidates,
            seed=args.seed,
            max_pictures=args.batch,
            report=report,
        )
        runs.append({"prior": way, "guidance": scale, **settings, **result})

    for scale in scales(args) if drawer.ways else ():
        drawing = drawer.drawing(scale)
        drawn_once: dict[bytes, np.ndarray] = {}  # the same scenes for every way

        def reconstruct(pictures, drawing=drawing, drawn_once=drawn_once):
            name = pictures.tobytes()
            if name not in drawn_once:
                z = stages.clip.embed_images(images.to_float(pictures))
                some = np.arange(len(z))
                common = dict(key=drawer.key, indices=some, mesh=drawer.mesh)
                drawn = unclip.sample_base(stages.decoder, z, some >= 0, None, drawing, **common)
                drawn_once[name] = images.to_uint8(drawn)
            return drawn_once[name]

        for way in drawer.ways:
            report(f"prior {way}, guidance {scale:g}")

            def generate(captions, num_candidates, first_prompt, way=way, drawing=drawing):
                ids = drawer.tokens(captions)
                return drawer.generate(way, drawing, ids, num_candidates, first_prompt)

            add(way, scale, reconstruct, generate)
    if other:
        _, generate, reconstruct = other
        settings = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}
        report(f"DALL-E 1, guidance {args.guidance:g}")
        add(DALLE, args.guidance, reconstruct, generate, **settings)
    return {"runs": runs}, lambda out, full: write(out, full, examples)


def write(out: pathlib.Path, result: dict, examples: dict) -> None:
    """sheet.png and index.html: a table of all runs, curves of the sweep, pictures side by side."""
    from dalle_jax.pages import evaluation, html

    runs = result["runs"]
    models = "DALL-E 1 and 2" if any(run["prior"] == DALLE for run in runs) else "DALL-E 2"
    page = html.Page(
        f"Shapes by {models}, judged",
        "The same prompts in every way from caption to picture; a near miss is a miss.",
    )
    table(page.section("Success"), runs)
    guidance_chart(page, runs)
    rows = [
        (f"{example.prompt.scene.caption}: {way}, guidance {scale:g}", example.images, labels)
        for each in zip(*examples.values(), strict=True)
        for (way, scale), example in zip(examples, each, strict=True)
        for labels in [example.labels]
    ]
    if rows:
        evaluation.pictures(page, out, rows, evaluation.RANKED)
    page.section("Command").command(result["command"]).write(out / "index.html")


def table(page, runs: Sequence[dict]) -> None:
    """A row per run: its skills, their mean, the curve of reranking and the ceiling."""
    from dalle_jax.pages import evaluation

    page.table(
        [
            {"prior": run["prior"], "guidance": run["guidance"]}
            | {kind: round(skill["seen"], 3) for kind, skill in run["skills"].items()}
            | {"mean": round(run["mean"]["seen"], 3)}
            | {k: v for k, v in evaluation.row("", run["mean"]).items() if k != "skill"}
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
