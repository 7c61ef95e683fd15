"""`evaluate --suite=variations` and `--suite=inpainting`: what DALL-E 2 keeps, and what it changes.

No command itself; it has no SUMMARY.
"""

import argparse
import functools
import pathlib

from dalle_jax.cli import _unclip, evaluate_unclip


def variations(args: argparse.Namespace, found: dict[str, str], *, report):
    """The figures of variations at each guidance and eta, and a function that writes the page.

    Args:
      args: of the command.
      found: stage -> folder.
      report: takes lines of progress.
    """
    from dalle_jax.evaluation import edits, shapes
    from dalle_jax.pages import evaluation

    drawer = evaluate_unclip.prepare(args, found)
    stages = drawer.stages
    judge = shapes.checked_judge(stages.decoder.image_px, report=report)
    size = max(1, args.batch // args.candidates)
    runs, shown = [], {}
    for scale in evaluate_unclip.scales(args):
        still, latents = drawer.drawing(scale, eta=0.0), {}  # inverted once for all etas
        for eta in evaluate_unclip.etas(args):
            settings = {"guidance": scale, "eta": eta}
            title = evaluation.run_title(settings)
            report(title)

            num = args.candidates if eta else 1  # without noise all are one
            figures, shown[title] = edits.variations(
                functools.partial(_vary, drawer, latents, still, drawer.drawing(scale, eta)),
                image_px=stages.decoder.image_px,
                num=num,
                per_kind=args.prompts_per_skill,
                seed=args.seed,
                max_pictures=size * num,
                report=report,
            )
            runs.append({**settings, **figures})
    return {"judge": judge, "runs": runs}, lambda out, full: _write_variations(out, full, shown)


def inpainting(args: argparse.Namespace, found: dict[str, str], *, report):
    """The figures of inpainting in each way and at each guidance; as `variations`."""
    from dalle_jax.evaluation import edits, shapes
    from dalle_jax.pages import evaluation

    drawer = evaluate_unclip.prepare(args, found)
    stages = drawer.stages
    judge = shapes.checked_judge(stages.image_px, report=report)
    runs, shown = [], {}
    for scale in evaluate_unclip.scales(args):
        for way in drawer.ways:
            settings = {"prior": way, "guidance": scale}
            title = evaluation.run_title(settings)
            report(title)

            figures, shown[title] = edits.inpainting(
                functools.partial(_inpaint, drawer, way, drawer.drawing(scale)),
                image_px=stages.image_px,
                num=args.candidates,
                per_task=args.prompts_per_skill,
                seed=args.seed,
                report=report,
            )
            runs.append({**settings, **figures})
    by = "decoder" if stages.inpainter is None else "inpainter"
    result = {"judge": judge, "by": by, "runs": runs}
    return result, lambda out, full: _write_inpainting(out, full, shown)


def _vary(drawer, latents: dict, still, drawing, pictures, num: int, first: int):
    """uint8 [P, h, h, 3] to variations uint8 [P, N, h, h, 3], as the command `vary` draws them.

    `latents` keeps what pictures were inverted to: for `still`, the drawing without fresh noise.
    """
    from dalle_jax import images
    from dalle_jax.sampling import manipulate

    if first not in latents:
        latents[first] = manipulate.invert(drawer.stages, images.to_float(pictures), still)
    one = latents[first]
    many = manipulate.Latent(one.z.repeat(num, 0), one.x_t.repeat(num, 0))
    common = dict(key=drawer.key, indices=drawer.rows(first, len(pictures), num))
    drawn = manipulate.sample(drawer.stages, many, drawing, mesh=drawer.mesh, **common)
    return images.to_uint8(drawn).reshape(len(pictures), num, *drawn.shape[1:])


def _inpaint(drawer, way: str, drawing, picture, known, caption: str, num: int, index: int):
    """uint8 [N, h, h, 3] of the finished size, the best by CLIP first, as `inpaint` draws them."""
    from dalle_jax import images
    from dalle_jax.sampling import unclip

    drawn = unclip.sample_best(
        drawer.stages,
        way,
        drawer.tokens([caption])[0],
        drawing,
        num_candidates=num,
        keep=num,
        key=drawer.key,
        first=index * unclip.MAX_CANDIDATES,
        known=(images.to_float(picture), known),
        mesh=drawer.mesh,
        **_unclip.prior_options(drawer.args, way),
    )
    return images.to_uint8(drawn.images)


def _write_variations(out: pathlib.Path, result: dict, shown: dict) -> None:
    from dalle_jax.pages import evaluation, html

    page = html.Page(
        "Variations, judged",
        f"{result['runs'][0]['n']} rendered scenes, and whether their variations still show "
        "number, colours, shapes, pairs and background.",
    )
    for run in result["runs"]:
        page.section(evaluation.run_title(run)).table(
            [
                {
                    "kind": kind,
                    "right": figures["right"],
                    "by chance": figures["chance"]["right"],
                    **figures["conditions"],
                    "moved": figures["moved"],
                    "pixel change": figures["pixel_change"],
                }
                for kind, figures in {**run["kinds"], "mean": run["mean"]}.items()
            ],
            "By chance: the same pictures judged by another scene of the kind. Moved: in sides of "
            "the picture, where all objects are there.",
            ["kind", "right", "by chance", *run["kinds"]["relation"]["conditions"]]
            + ["moved", "pixel change"],
        )
    _write_pictures(page, out, result, shown)


def _write_inpainting(out: pathlib.Path, result: dict, shown: dict) -> None:
    from dalle_jax.pages import evaluation, html

    page = html.Page(
        "Inpainting, judged",
        f"Another object in a masked rectangle, or one more, drawn by the {result['by']}.",
    )
    page.section("Success").table(
        [
            {
                "run": evaluation.run_title(run),
                "task": task,
                "right": figures["right"],
                "CLIP's choice": figures["chosen"],
                "right with the old prompt": figures["baseline"]["right"],
                "old scene restored": figures["baseline"]["restored"],
                "drawn anew": figures["drawn_anew"],
                "untouched": run["untouched"],
            }
            for run in result["runs"]
            for task, figures in run["tasks"].items()
        ],
        "Untouched: share of known pixels that came back bit for bit.",
    )
    _write_pictures(page, out, result, shown)


def _write_pictures(page, out: pathlib.Path, result: dict, shown: dict) -> None:
    """sheet.png and the page's end; shown: a run's title -> `unclip_suites.Shown`s."""
    from dalle_jax.pages import evaluation

    rows = [
        (f"{item.title}: {title}", item.images, item.labels)
        for some in zip(*shown.values(), strict=True)
        for title, item in zip(shown, some, strict=True)
    ]
    evaluation.pictures(page, out, rows, "Each with its verdict.")
    page.section("Command").command(result["command"]).write(out / "index.html")
