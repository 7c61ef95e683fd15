"""Measures trained networks; every number on the pages of this project comes from here.

  python -m dalle_jax evaluate --suite=shapes --pretrained=shapes --json
  python -m dalle_jax evaluate --suite=shapes --workdir=runs/dalle --clip=runs/clip --out=runs/eval
  python -m dalle_jax evaluate --suite=shapes --pipeline=unclip --pretrained=shapes --json
  python -m dalle_jax evaluate --suite=recon --dvae=runs/dvae
  python -m dalle_jax evaluate --suite=retrieval --clip=runs/clip --split=held_out
  python -m dalle_jax evaluate --suite=distribution --workdir=runs/dalle --clip=runs/clip
  python -m dalle_jax evaluate --suite=variations --pipeline=unclip --decoder=runs/decoder
  python -m dalle_jax evaluate --suite=inpainting --pipeline=unclip --decoder=runs/decoder

--suite=shapes draws prompts of the shapes grammar and judges every picture exactly: it counts as
right only if number, colours, shapes, their pairing, background and relation are what the caption
says. First comes the judge's own accuracy on rendered scenes (below 99.5 % nothing is measured).
With --dvae alone it measures judge and codec. Fields of the JSON:

  judge.oracle_accuracy   the judge on ground truth
  skills.KIND             one of single, count, binding, relation; `mean` is the mean of the four
    n                     prompts of seen combinations, and as many with held-out ones
    seen, held_out        share of right pictures among all drawn: best-of-1
    best_of.K, oracle.K   seen prompts: the picture that CLIP ranks first of K is right; at least
                          one of K is right (what a perfect ranking would reach)
    held_out_best_of, held_out_oracle   the same for held-out prompts
    conditions            share of drawn pictures of seen prompts with each condition met
    reconstruction        rendered scenes still right after the codec: the ceiling; and
                          held_out_reconstruction
  seconds_per_picture.K   seconds to draw and rank K candidates, compilation left out

--suite=distribution draws for the captions of a split and compares the drawn with the real pictures
as sets: the Fréchet distance on this CLIP's features (`frechet_clip`; or of plain pixels,
--features) beside its floor, precision, recall and diversity; the fields are explained in
evaluation/distribution.py. It is no FID: features are not Inception's.

--pipeline=unclip measures DALL-E 2 for each way from a caption to the decoder (--ways) and each
guidance scale (--guidances): `runs` is a list of such figures, each with its `prior` and
`guidance`, over the same prompts. `reconstruction` is then of pictures that the decoder draws from
the embedding of the rendered scene itself: what any prior could reach without the caption. The way
`dalle` measures a DALL-E 1 beside them: as without --pipeline, but ranked by DALL-E 2's CLIP. Suite
distribution has such `runs` too, and with this pipeline only there are:

--suite=variations renders scenes, draws variations as the command `vary` does, at each of --etas
and --guidances, and judges what must stay (`right`, `conditions`), beside the verdict of another
scene (`chance`), and how much has changed (`moved`, `pixel_change`).
--suite=inpainting masks a rectangle of rendered scenes and asks for another object in it (task
`replace`) or one more (`add`): `right`, and `baseline` with the old prompt; `untouched` must be 1.
Drawn with --inpainter where there is one and finished by the upsamplers, unless --no_upsample; the
other suites judge the decoder's own small pictures. Fields: evaluation/edits.py.

Figures at K are means over all subsets of K of a prompt's N candidates, not over the first K.

Several processes (--distributed) share the prompts of --suite=shapes; the other suites are measured
by process 0, while the others wait.
"""

import argparse
import functools
import json
import pathlib
import sys

from dalle_jax.cli import _flags, _prompts, evaluate_distribution, evaluate_edits, evaluate_unclip
from dalle_jax.cli import evaluate_parts as parts

SUMMARY = "measure a model: judged pictures and edits, reconstructions, retrieval, distributions"

SUITES = ("shapes", "recon", "retrieval", "distribution", "variations", "inpainting")
_CANDIDATES = {"shapes": 64, "distribution": 2, "variations": 4, "inpainting": 4}
_ONLY = {  # flag -> the suite that it is for
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
    group = parser.add_argument_group("drawing")
    group.add_argument(
        "--prompts_per_skill",
        type=int,
        default=25,
        metavar="n",
        help="suite shapes: seen prompts of each of the four skills, and as many held-out; "
        "variations: scenes of each; inpainting: pictures of each task (default: %(default)s)",
    )
    group.add_argument(
        "--skills", metavar="S,S,…", help="suite shapes: which of single, count, binding, relation"
    )
    defaults = ", ".join(f"{suite} {n}" for suite, n in _CANDIDATES.items())
    group.add_argument(
        "--candidates", type=int, metavar="N", help=f"per prompt or picture (default: {defaults})"
    )
    group.add_argument("--temperature", type=float, default=1.0, help="default: %(default)s")
    group.add_argument("--top_k", type=int, default=0, help="likeliest codes only; 0 = all")
    group.add_argument("--top_p", type=float, default=1.0, help="nucleus mass; 1 = all")
    group.add_argument(
        "--guidance", type=float, default=1.0, help="of pipeline dalle, classifier-free; 1 = off"
    )
    group.add_argument(
        "--batch",
        type=int,
        default=256,
        help="pictures drawn at a time; bounds the memory (default: %(default)s)",
    )
    evaluate_unclip.add_arguments(parser)
    group = parser.add_argument_group("suites recon, retrieval and distribution")
    group.add_argument("--source", help="prepared set (default: what the network was trained on)")
    group.add_argument("--data_dir", help="where prepared sets live (default: as in training)")
    group.add_argument("--split", help="default: the eval split of the network's config")
    group.add_argument(
        "--num_examples", type=int, default=1000, metavar="n", help="at most (default: %(default)s)"
    )
    group.add_argument(
        "--features",
        choices=evaluate_distribution.FEATURES,
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
    from dalle_jax.types import UsageError

    for name, suite in _ONLY.items():
        if getattr(args, name) and args.suite != suite:
            raise UsageError(f"--{name} is of --suite={suite}, not of --suite={args.suite}.")
    if args.pipeline == "dalle" and args.suite in ("variations", "inpainting"):
        raise UsageError(f"--suite={args.suite} is of DALL-E 2; add --pipeline=unclip.")
    if args.candidates is None:
        args.candidates = _CANDIDATES.get(args.suite)
    least = dict(prompts_per_skill=1, candidates=1, batch=1, num_examples=1, seed=0)
    for name, lowest in least.items():
        value = getattr(args, name)
        if value is not None and value < lowest:
            raise UsageError(f"--{name} is {value}; expected at least {lowest}.")
    parts.skills(args)
    if args.out and pathlib.Path(args.out).is_file():
        raise UsageError(f"--out={args.out} is a file; expected a folder, new or old.")
    if args.suite == "distribution":
        evaluate_distribution.check(args)
    if args.pipeline == "unclip":
        evaluate_unclip.check(args)
    _flags.use_cache(args)
    with _flags.job(args):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    import jax

    from dalle_jax.engine import distributed

    distributed.agree({"the command": _prompts.command("evaluate", add_arguments, args)})
    is_unclip = args.pipeline == "unclip"
    folders = evaluate_unclip.folders(args) if is_unclip else _folders(args)
    if jax.process_index() == 0 or args.suite == "shapes":
        result, write_pictures = _measure(args, folders)
    if jax.process_index() == 0:
        _report(args, result, write_pictures)
    distributed.wait_for_all("measured")
    return 0


def _measure(args, folders):
    """(the figures, a function of (folder, figures) that writes pictures and page)."""
    told = dict(report=_to_stderr)
    suite = {
        ("dalle", "shapes"): _shapes,
        ("dalle", "recon"): _recon,
        ("dalle", "retrieval"): _retrieval,
        ("dalle", "distribution"): functools.partial(evaluate_distribution.of_dalle, **told),
        ("unclip", "distribution"): functools.partial(evaluate_distribution.of_unclip, **told),
        ("unclip", "shapes"): functools.partial(
            evaluate_unclip.measure, dalle=_dalle, shared=_shared, **told
        ),
        ("unclip", "variations"): functools.partial(evaluate_edits.variations, **told),
        ("unclip", "inpainting"): functools.partial(evaluate_edits.inpainting, **told),
    }[args.pipeline, args.suite]
    result, write_pictures = suite(args, folders)
    result = {
        "suite": args.suite,
        **result,
        "networks": folders,
        "command": _prompts.command("evaluate", add_arguments, args),
    }
    return _rounded(result), write_pictures


def _report(args, result, write_pictures) -> None:
    if args.out:
        out = pathlib.Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
        write_pictures(out, result)
        _to_stderr(f"written: {out / 'metrics.json'}, {out / 'index.html'}")
    from dalle_jax.pages import evaluation

    print(json.dumps(result, indent=2) if args.json else evaluation.as_text(result))


def _folders(args) -> dict[str, str]:
    """Stage name -> folder, for the stages that the suite uses."""
    from dalle_jax.stages import pretrained
    from dalle_jax.types import UsageError

    found = pretrained.folders(args.pretrained) if args.pretrained else {}
    given = {"dalle": args.workdir, "clip": args.clip, "dvae": args.dvae}
    found |= {name: folder for name, folder in given.items() if folder}
    needed = {
        "shapes": ("dalle", "dvae"),
        "recon": ("dvae", "dalle"),
        "retrieval": ("clip",),
        "distribution": ("dalle",),
    }[args.suite]
    if not any(name in found for name in needed):
        flag = {"dalle": "--workdir=DIR", "dvae": "--dvae=DIR", "clip": "--clip=DIR"}
        raise UsageError(
            f"--suite={args.suite} needs {' or '.join(flag[name] for name in needed)}, "
            f"or --pretrained=NAME."
        )
    if args.suite == "distribution" and args.features != "pixels" and "clip" not in found:
        raise UsageError(
            "--suite=distribution compares pictures by CLIP's features; give --clip=DIR, or "
            "--features=pixels."
        )
    draws = args.suite in ("shapes", "distribution") and "dalle" in found
    used = ("dalle", "dvae", "clip") if draws else needed
    return {name: found[name] for name in used if name in found}


def _codec(folders):
    from dalle_jax.stages.codec import Codec
    from dalle_jax.stages.dalle import DalleStage

    if "dvae" in folders:
        return Codec.load(folders["dvae"])
    return DalleStage.load(folders["dalle"]).codec


def _dalle(args, folders):
    """(image_px, generate, reconstruct) of a DALL-E, as `shapes_suite` takes them."""
    from dalle_jax.stages.dalle import DalleStage

    dalle = DalleStage.load(folders["dalle"], codec=folders.get("dvae", ""))
    draw, tokens = parts.dalle_generator(args, dalle), parts.tokens(dalle)

    def generate(captions, num_candidates, first_prompt):
        return draw(tokens(captions), num_candidates, first_prompt)

    return dalle.codec.image_px, generate, _there_and_back(dalle.codec)


def _there_and_back(codec):
    from dalle_jax import images

    encode, decode = parts.batched(codec.encode), parts.batched(codec.decode)
    return lambda pictures: images.to_uint8(decode(encode(images.to_float(pictures))))


def _shapes(args, folders):
    from dalle_jax import images
    from dalle_jax.evaluation import shapes
    from dalle_jax.sampling import rerank
    from dalle_jax.stages.clip import ClipStage

    generate = score = None
    if "dalle" in folders:
        clip = ClipStage.load(folders["clip"]) if "clip" in folders else None
        image_px, generate, reconstruct = _dalle(args, folders)
        if clip is not None:
            tokens = parts.tokens(clip)

            def score(pictures, captions):
                return rerank.score(clip, images.to_float(pictures), tokens(captions))

    else:
        codec = _codec(folders)
        image_px, reconstruct = codec.image_px, _there_and_back(codec)
    result, examples = shapes.shapes_suite(
        image_px=image_px,
        reconstruct=reconstruct,
        generate=generate and _shared(generate),
        score=score,
        prompts_per_skill=args.prompts_per_skill,
        skills=parts.skills(args),
        candidates=args.candidates,
        seed=args.seed,
        max_pictures=args.batch,
        report=_to_stderr,
    )
    from dalle_jax.pages import evaluation

    return result, lambda out, full: evaluation.write_shapes(out, full, examples)


def _recon(args, folders):
    from dalle_jax import images
    from dalle_jax.evaluation import shapes
    from dalle_jax.pages import evaluation

    codec = _codec(folders)
    encode, decode = parts.batched(codec.encode), parts.batched(codec.decode)
    split, batches = parts.batches(args, codec.config, {"image"})
    result, pairs = shapes.recon_suite(
        (batch["image"] for batch in batches),
        lambda pictures: encode(images.to_float(pictures)),
        lambda codes: images.to_uint8(decode(codes)),
        codec.num_codes,
        _to_stderr,
    )
    result["split"] = split
    return result, lambda out, full: evaluation.write_recon(out, full, pairs)


def _retrieval(args, folders):
    import jax

    from dalle_jax import images
    from dalle_jax.evaluation import shapes
    from dalle_jax.pages import evaluation
    from dalle_jax.stages.clip import ClipStage

    clip = ClipStage.load(folders["clip"])
    params = jax.device_put({"params": clip.params})

    def embed(method):
        apply = jax.jit(lambda params, x: clip.model.apply(params, x, method=method))
        return parts.batched(lambda x: apply(params, x))

    embed_image, embed_text = embed("encode_image"), embed("encode_text")
    own = clip.tokenizer
    split, batches = parts.batches(args, clip.config, {"image", "text"}, own)
    result = shapes.retrieval_suite(
        ((batch["image"], batch["text"]) for batch in batches),
        lambda pictures: embed_image(images.to_float(pictures)),
        embed_text,
        report=_to_stderr,
    )
    result["split"] = split
    return result, evaluation.write_retrieval


def _shared(generate):
    """`generate` with the captions divided among the processes; all get all pictures."""
    import jax

    from dalle_jax.engine import distributed

    def apply(captions, num_candidates, first_prompt):
        share = -(-len(captions) // jax.process_count())
        start = jax.process_index() * share
        mine = list(captions[start : start + share])
        mine += [captions[0]] * (share - len(mine))  # one shape for all
        pictures = generate(mine, num_candidates, first_prompt + start)
        return distributed.gather_rows(pictures)[: len(captions)]

    return apply


def _rounded(value):
    """Floats to five digits: what n prompts can tell, and readable."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 5) if isinstance(value, float) else value


def _to_stderr(line: str) -> None:
    import jax

    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)
