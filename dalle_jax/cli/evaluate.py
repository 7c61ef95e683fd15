"""Measures trained networks; every number on the pages of this project comes from here.

  python -m dalle_jax evaluate --suite=shapes --pretrained=shapes --json
  python -m dalle_jax evaluate --suite=shapes --workdir=runs/dalle --clip=runs/clip --out=runs/eval
  python -m dalle_jax evaluate --suite=shapes --pipeline=unclip --pretrained=shapes --json
  python -m dalle_jax evaluate --suite=recon --dvae=runs/dvae
  python -m dalle_jax evaluate --suite=retrieval --clip=runs/clip --split=held_out

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

--pipeline=unclip measures DALL-E 2 for each way from a caption to the decoder (--ways) and each
guidance scale (--guidances): `runs` is a list of such figures, each with its `prior` and
`guidance`, over the same prompts. `reconstruction` is then of pictures that the decoder draws from
the embedding of the rendered scene itself: what any prior could reach without the caption. The way
`dalle` measures a DALL-E 1 beside them: as without --pipeline, but ranked by DALL-E 2's CLIP.

Figures at K are means over all subsets of K of a prompt's N candidates, not over the first K.

Several processes (--distributed) share the prompts of --suite=shapes; the other suites are measured
by process 0, while the others wait.
"""

import argparse
import functools
import json
import pathlib
import sys

from dalle_jax.cli import common, evaluate_unclip, prompts

SUMMARY = "measure a model: judged pictures and rerank curve, reconstructions, retrieval"

SUITES = ("shapes", "recon", "retrieval")
_BATCH = 64  # pictures at a time through codec and CLIP


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("--suite", required=True, choices=SUITES, help="what to measure")
    parser.add_argument(
        "--pipeline", choices=("dalle", "unclip"), default="dalle", help="of suite shapes"
    )
    group = parser.add_argument_group("networks")
    group.add_argument("--workdir", metavar="DIR", help="DALL-E: workdir of a dalle run")
    group.add_argument("--clip", metavar="DIR", help="CLIP: workdir of a clip run")
    group.add_argument("--dvae", metavar="DIR", help="codec: workdir of an autoencoder run")
    group.add_argument(
        "--pretrained", metavar="NAME", help="a set that ships with the package, instead of DIRs"
    )
    group = parser.add_argument_group("suite shapes")
    group.add_argument(
        "--prompts_per_skill",
        type=int,
        default=25,
        metavar="n",
        help="seen prompts of each of the four skills, and as many held-out (default: %(default)s)",
    )
    group.add_argument(
        "--candidates", type=int, default=64, metavar="N", help="per prompt (default: %(default)s)"
    )
    group.add_argument("--temperature", type=float, default=1.0, help="default: %(default)s")
    group.add_argument("--top_k", type=int, default=0, help="likeliest codes only; 0 = all")
    group.add_argument("--top_p", type=float, default=1.0, help="nucleus mass; 1 = all")
    group.add_argument(
        "--guidance", type=float, default=1.0, help="classifier-free guidance scale; 1 = off"
    )
    group.add_argument(
        "--batch",
        type=int,
        default=256,
        help="pictures drawn at a time; bounds the memory (default: %(default)s)",
    )
    evaluate_unclip.add_arguments(parser)
    group = parser.add_argument_group("suites recon and retrieval")
    group.add_argument("--source", help="prepared set (default: what the network was trained on)")
    group.add_argument("--data_dir", help="where prepared sets live (default: as in training)")
    group.add_argument("--split", help="default: the eval split of the network's config")
    group.add_argument(
        "--num_examples", type=int, default=1000, metavar="n", help="at most (default: %(default)s)"
    )
    group = parser.add_argument_group("output")
    group.add_argument("--seed", type=int, default=0, help="of prompts and noise")
    group.add_argument("--json", action="store_true", help="print only JSON on stdout")
    group.add_argument("--out", metavar="DIR", help="write metrics.json, sheet.png and index.html")
    common.add_distributed(parser)
    common.add_cache(parser)


def run(args: argparse.Namespace) -> int:
    """Measures and reports."""
    from dalle_jax.types import UsageError

    least = dict(prompts_per_skill=1, candidates=1, batch=1, num_examples=1, seed=0)
    for name, lowest in least.items():
        if getattr(args, name) < lowest:
            raise UsageError(f"--{name} is {getattr(args, name)}; expected at least {lowest}.")
    if args.out and pathlib.Path(args.out).is_file():
        raise UsageError(f"--out={args.out} is a file; expected a folder, new or old.")
    if args.pipeline == "unclip":
        evaluate_unclip.check(args)
    common.use_cache(args)
    with common.job(args):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    import jax

    from dalle_jax.engine import distributed

    distributed.agree({"the command": prompts.command("evaluate", add_arguments, args)})
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
    suite = dict(shapes=_shapes, recon=_recon, retrieval=_retrieval)[args.suite]
    if args.pipeline == "unclip":
        tools = dict(dalle=_dalle, shared=_shared, report=_to_stderr)
        suite = functools.partial(evaluate_unclip.measure, **tools)
    result, write_pictures = suite(args, folders)
    result = {
        "suite": args.suite,
        **result,
        "networks": folders,
        "command": prompts.command("evaluate", add_arguments, args),
    }
    return _rounded(result), write_pictures


def _report(args, result, write_pictures) -> None:
    if args.out:
        out = pathlib.Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
        write_pictures(out, result)
        _to_stderr(f"written: {out / 'metrics.json'}, {out / 'index.html'}")
    from dalle_jax.cli import evaluate_page

    print(json.dumps(result, indent=2) if args.json else evaluate_page.as_text(result))


def _folders(args) -> dict[str, str]:
    """Stage name -> folder, for the stages that the suite uses."""
    from dalle_jax.sampling import stages
    from dalle_jax.types import UsageError

    found = stages.pretrained(args.pretrained) if args.pretrained else {}
    given = {"dalle": args.workdir, "clip": args.clip, "dvae": args.dvae}
    found |= {name: folder for name, folder in given.items() if folder}
    needed = {
        "shapes": ("dalle", "dvae"),
        "recon": ("dvae", "dalle"),
        "retrieval": ("clip",),
    }[args.suite]
    if not any(name in found for name in needed):
        flag = {"dalle": "--workdir=DIR", "dvae": "--dvae=DIR", "clip": "--clip=DIR"}
        raise UsageError(
            f"--suite={args.suite} needs {' or '.join(flag[name] for name in needed)}, "
            f"or --pretrained=NAME."
        )
    used = (*needed, "clip") if args.suite == "shapes" and "dalle" in found else needed
    return {name: found[name] for name in used if name in found}


def _codec(folders):
    from dalle_jax.sampling import stages

    if "dvae" in folders:
        return stages.load_codec(folders["dvae"])
    return stages.load_dalle(folders["dalle"]).codec


def _dalle(args, folders):
    """(image_px, generate, reconstruct) of a DALL-E, as `shapes_suite` takes them."""
    import jax

    from dalle_jax import images
    from dalle_jax.engine import meshes, sharding
    from dalle_jax.sampling import dalle as sampling
    from dalle_jax.sampling import logits, stages

    dalle = stages.load_dalle(folders["dalle"], dvae=folders.get("dvae", ""))
    codec = dalle.codec
    logits.check(args.temperature, args.top_k, args.top_p, args.guidance, codec.num_codes)
    mesh, tokens, decode = meshes.local(), _tokens(dalle), _batched(codec.decode)

    def generate(captions, num_candidates, first_prompt):
        codes = sampling.sample(
            dalle.model,
            dalle.on(sharding.replicated(mesh)),
            tokens(captions),
            num_candidates=num_candidates,
            key=jax.random.key(args.seed),
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            guidance=args.guidance,
            first_prompt=first_prompt,
            mesh=mesh,
        )
        codes = jax.device_get(codes)
        pictures = decode(codes.reshape(-1, codes.shape[-1]))
        return images.to_uint8(pictures).reshape(*codes.shape[:2], *pictures.shape[1:])

    return codec.image_px, generate, _there_and_back(codec)


def _there_and_back(codec):
    from dalle_jax import images

    encode, decode = _batched(codec.encode), _batched(codec.decode)
    return lambda pictures: images.to_uint8(decode(encode(images.to_float(pictures))))


def _shapes(args, folders):
    from dalle_jax import images
    from dalle_jax.evaluation import run as suites
    from dalle_jax.sampling import rerank, stages

    generate = score = None
    if "dalle" in folders:
        clip = stages.load_clip(folders["clip"]) if "clip" in folders else None
        image_px, generate, reconstruct = _dalle(args, folders)
        if clip is not None:
            tokens = _tokens(clip)

            def score(pictures, captions):
                return rerank.score(clip, images.to_float(pictures), tokens(captions))

    else:
        codec = _codec(folders)
        image_px, reconstruct = codec.image_px, _there_and_back(codec)
    result, examples = suites.shapes_suite(
        image_px=image_px,
        reconstruct=reconstruct,
        generate=generate and _shared(generate),
        score=score,
        prompts_per_skill=args.prompts_per_skill,
        candidates=args.candidates,
        seed=args.seed,
        max_pictures=args.batch,
        report=_to_stderr,
    )
    from dalle_jax.cli import evaluate_page

    return result, lambda out, full: evaluate_page.write_shapes(out, full, examples)


def _recon(args, folders):
    from dalle_jax import images
    from dalle_jax.cli import evaluate_page
    from dalle_jax.evaluation import run as suites

    codec = _codec(folders)
    encode, decode = _batched(codec.encode), _batched(codec.decode)
    split, batches = _batches(args, codec.config, {"image"})
    result, pairs = suites.recon_suite(
        (batch["image"] for batch in batches),
        lambda pictures: encode(images.to_float(pictures)),
        lambda codes: images.to_uint8(decode(codes)),
        codec.num_codes,
        _to_stderr,
    )
    result["split"] = split
    return result, lambda out, full: evaluate_page.write_recon(out, full, pairs)


def _retrieval(args, folders):
    import jax

    from dalle_jax import images
    from dalle_jax.cli import evaluate_page
    from dalle_jax.data import tokenizer
    from dalle_jax.evaluation import run as suites
    from dalle_jax.sampling import stages

    clip = stages.load_clip(folders["clip"])
    params = jax.device_put({"params": clip.params})

    def embed(method):
        apply = jax.jit(lambda params, x: clip.model.apply(params, x, method=method))
        return _batched(lambda x: apply(params, x))

    embed_image, embed_text = embed("encode_image"), embed("encode_text")
    own = tokenizer.Tokenizer(clip.tokenizer_bytes)
    split, batches = _batches(args, clip.config, {"image", "text"}, own)
    result = suites.retrieval_suite(
        ((batch["image"], batch["text"]) for batch in batches),
        lambda pictures: embed_image(images.to_float(pictures)),
        embed_text,
        report=_to_stderr,
    )
    result["split"] = split
    return result, evaluate_page.write_retrieval


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


def _tokens(stage):
    """Captions to ids by the stage's own tokenizer."""
    from dalle_jax.data import tokenizer

    own, data = tokenizer.Tokenizer(stage.tokenizer_bytes), stage.config.data
    return lambda captions: own.encode(captions, data.text_len, add_bos_eos=data.add_bos_eos)


def _batched(function, size: int = _BATCH):
    """`function` on chunks of one shape: the last is filled up, so that nothing compiles twice."""
    import numpy as np

    def apply(rows):
        parts = []
        for start in range(0, len(rows), size):
            part = np.asarray(rows[start : start + size])
            filled = np.concatenate([part, np.repeat(part[:1], size - len(part), axis=0)])
            parts.append(np.asarray(function(filled))[: len(part)])
        return np.concatenate(parts)

    return apply


def _batches(args, config, wanted, tokenizer=None):
    """(the split's name, batches of its first examples in order)."""
    from dalle_jax import config as cfg
    from dalle_jax.data import pipeline

    data = cfg.ConfigDict(config.data.to_dict())
    data.source, data.data_dir = args.source or data.source, args.data_dir or data.data_dir
    split = args.split or data.eval_split
    size = min(_BATCH, args.num_examples)
    pictures = pipeline.make(
        data, args.seed, split=split, wanted=wanted, tokenizer=tokenizer, training=False, batch=size
    )
    num = min(args.num_examples, pictures.num_examples)

    def batches():
        for step in range(-(-num // size)):
            batch = pictures(step)
            yield {name: rows[: num - step * size] for name, rows in batch.items()}

    return split, batches()


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
