"""Times the networks on this machine, at sizes that can be compared with other projects.

  python -m dalle_jax bench dalle_train --attention=axial
  python -m dalle_jax bench dalle_sample --batch=64 --shared_prompt --json
  python -m dalle_jax bench all --json > bench.jsonl
  python -m dalle_jax bench all --docs docs/performance.md
  python -m dalle_jax bench clip_train --against=transformers

Cases (sizes: configs/bench.py; a step is forward, backward, optimiser and the loss on the host):

  dalle_train   a step on stored codes: 8 examples with 64 text slots and 16x16 codes
  dalle_sample  sampling 256 codes after 64 text slots, for --batch prompts, or for one with
                --shared_prompt
  dvae_train    a step on 16 pictures at 64 px
  dvae_codec    pictures to codes and back: the released dVAE with 64 hidden channels, 2 at 256 px
  clip_train    a step on 64 pictures at 64 px with captions of 32 ids
  clip_score    similarities of 16 pictures and captions: ViT-B/32, 224 px
  prior_train   a step of the diffusion prior on 64 embeddings
  prior_sample  sampling 8 embeddings from it in 50 steps
  unet_train    a step of a decoder on 8 pictures at 32 px
  input         batches of a prepared set (--source, --data_dir): reading, decoding, tokenising
  all           every case in its own process; input reads 1,000 generated scenes unless --source
                names a set

float32, random weights, the same random inputs in all calls. Fields of the JSON, one line per case:

  median_s         wall seconds per step or call, the median of --steps after --warmup
  cpu_s            the median of its processor seconds, over all threads of the process
  images_per_s, tokens_per_s   at median_s
  gflop, gflop_per_cpu_s   matrix products and convolutions per call, 2 per multiply-add, as they
                   run; nothing else is counted
  params           number of the network's parameters
  peak_rss_mib     peak memory of the process
  first_call_s     tracing, compiling and the first call; compiled programs are not cached

--against=NAME also times another project's version of the case in the same process, one call of
each in turns; --against=all times all versions, and `all --against=all` every case that has any.
They use PyTorch and must be installed: gpt (a plain transformer), dalle-pytorch, dalle2-pytorch,
dall_e, diffusers, transformers. `ratio` is our cpu_s over theirs: below 1 we are faster.

Processor seconds on one thread (the default) depend least on other programs. On a CPU, set
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 for large pages, as launch/ does for training. All versions of
a case, ours and others', run with memory that the process retains between calls.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from dalle_jax.benchmarks import peers
from dalle_jax.cli import _flags
from dalle_jax.pages import bench

SUMMARY = "time training, sampling, the codec, CLIP and the input on this machine"

CASES = (
    "dalle_train", "dalle_sample", "dvae_train", "dvae_codec", "clip_train", "clip_score",
    "prior_train", "prior_sample", "unet_train", "input",
)  # fmt: skip
# The runs of `all`; input comes after them.
RUNS = (
    ("dalle_train", "--attention=full"),
    ("dalle_train", "--attention=axial"),
    ("dalle_train", "--attention=conv"),
    ("dalle_sample", "--batch=1"),
    ("dalle_sample", "--batch=16"),
    ("dalle_sample", "--batch=64"),
    ("dalle_sample", "--batch=64", "--shared_prompt"),
    ("dvae_train",),
    ("dvae_codec",),
    ("clip_train",),
    ("clip_score",),
    ("prior_train",),
    ("prior_sample",),
    ("unet_train",),
)
# Flag -> the cases that it applies to.
_BELONGS = {
    "attention": ("dalle_train", "dalle_sample"),
    "attention_impl": ("dalle_train",),
    "shared_prompt": ("dalle_sample",),
    "against": (*peers.NAMES, "all"),
    "batch": CASES,
    "docs": ("all",),
    "source": ("input", "all"),
    "data_dir": ("input", "all"),
    "image_px": ("input", "all"),
}
_INPUT_BATCH, _INPUT_PX = 64, 32
_SCENES = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("case", metavar="CASE", help=f"{', '.join(CASES)} or all")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument(
        "--docs",
        metavar="FILE.md",
        help="all: also write the table into this page, between its two bench comments",
    )
    parser.add_argument(
        "--steps", type=int, default=5, metavar="N", help="timed steps or calls (default: 5)"
    )
    parser.add_argument(
        "--warmup",
        type=int,
        default=2,  # memory grows in these calls: 2.9 s in the second call of clip_train
        metavar="N",
        help="steps or calls before them, besides the first (default: 2)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="threads of the CPU backend, of numpy's linear algebra and of the input; 0 = one per "
        "core (default: 1)",
    )
    parser.add_argument("--batch", type=int, metavar="N", help="examples per step or call")
    parser.add_argument(
        "--against", metavar="NAME", help="also time another project's version, in turns; or all"
    )
    group = parser.add_argument_group("dalle_train, dalle_sample")
    group.add_argument("--attention", metavar="KIND", help="full (default), axial or conv")
    group.add_argument(
        "--attention_impl", metavar="NAME", help="dalle_train: auto (default), dense or structured"
    )
    group.add_argument(
        "--shared_prompt",
        action="store_true",
        default=None,
        help="dalle_sample: the batch has candidates of one prompt instead of one per prompt",
    )
    group = parser.add_argument_group("input")
    group.add_argument("--source", metavar="NAME", help="a prepared set, as in data.source")
    group.add_argument(
        "--data_dir", metavar="DIR", help="folder of the prepared sets (default: data)"
    )
    group.add_argument(
        "--image_px", type=int, metavar="N", help=f"side of the pictures (default: {_INPUT_PX})"
    )


def run(args: argparse.Namespace) -> int:
    """Times a case, or all of them; returns 1 if one of them failed."""
    _check(args)
    if args.case == "all":
        return _all(args)
    _limit_threads(args.threads)
    # Compiling is part of first_call_s; a cached program would hide it.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    result = _measure(args)
    print(json.dumps(result) if args.json else f"{header()}\n{row(result)}", flush=True)
    return 0


def header() -> str:
    """The titles of `row`."""
    return _columns(
        "case", "seconds", "CPU s", "images/s", "tokens/s", "parameters", "peak MiB", "first s"
    )


def row(result: dict[str, Any]) -> str:
    """A result as a line of a table, and one line for each peer."""
    lines = [_row(bench.name(result), result)]
    for name, peer in result.get("against", {}).items():
        lines.append(_row(f"  {name}: ratio {peer['ratio']:.2f}", peer))
    return "\n".join(lines)


def _row(name: str, result: dict[str, Any]) -> str:
    tokens = result.get("tokens_per_s")
    return _columns(
        name,
        f"{result['median_s']:.4g}",
        f"{result['cpu_s']:.4g}",
        f"{result['images_per_s']:.4g}",
        f"{tokens:,.0f}" if tokens else "",
        f"{result['params']:,}" if result["params"] else "",
        f"{result['peak_rss_mib']:,.0f}",
        f"{result['first_call_s']:.1f}",
    )


def _columns(name: str, *values: str) -> str:
    widths = (9, 9, 10, 10, 13, 10, 9)
    return f"{name:<37}" + "".join(f"{v:>{w}}" for v, w in zip(values, widths, strict=True))


def _check(args: argparse.Namespace) -> None:
    """Raises UsageError for an unknown case, or flags that do not apply to it."""
    problem = ""
    least = dict(steps=1, warmup=0, threads=0, batch=1, image_px=1)
    belonging = [name for name in _BELONGS if getattr(args, name) is not None]
    if args.case not in (*CASES, "all"):
        near = _flags.nearest(args.case, (*CASES, "all"))
        problem = f"no case {args.case!r}{near}; choose {', '.join(CASES)} or all."
    elif alien := [name for name in belonging if args.case not in _BELONGS[name]]:
        takers = " and ".join(name for name in _BELONGS[alien[0]] if name != "all") or "all"
        takers = "a single case" if alien[0] == "batch" else takers
        problem = f"--{alien[0]} applies to {takers}, not to {args.case}; leave it out."
    elif args.case == "all" and args.data_dir and not args.source:
        problem = f"--data_dir={args.data_dir} needs --source, the set that input reads."
    elif args.against and args.against not in (*_peers_of(args.case), "all"):
        names = ", ".join(_peers_of(args.case))
        problem = f"--against={args.against} is unknown for {args.case}; choose {names} or all."
    elif args.case == "input" and not args.source:
        problem = (
            "input times a prepared set: give it with --source=NAME, e.g. --source=shapes after "
            "`python -m dalle_jax prepare shapes`, and its --data_dir if it is not data."
        )
    else:
        for name, lowest in least.items():
            value = getattr(args, name)
            if value is not None and value < lowest:
                problem = f"--{name} is {value}; expected at least {lowest}."
    if problem:
        from dalle_jax.types import UsageError

        raise UsageError(problem)


def thread_environment(threads: int, xla_flags: str) -> dict[str, str]:
    """Environment variables that limit the threads of jax and numpy, which read them at start.

    Args:
      threads: number of threads; 0 = no limit.
      xla_flags: the present XLA_FLAGS, which are preserved.
    """
    if not threads:
        return {}
    names = ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    variables = dict.fromkeys(names, str(threads))  # NPROC: XLA's own pools
    if threads == 1:
        variables["XLA_FLAGS"] = f"{xla_flags} --xla_cpu_multi_thread_eigen=false".strip()
    return variables


def _limit_threads(threads: int) -> None:
    if threads and "jax" in sys.modules:
        from dalle_jax.types import UsageError

        raise UsageError(
            f"--threads={threads} comes too late: jax runs already in this process. Start bench in "
            "its own process, or use --threads=0."
        )
    os.environ.update(thread_environment(threads, os.environ.get("XLA_FLAGS", "")))


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    from dalle_jax.benchmarks import cases, measure

    result: dict[str, Any] = {"case": args.case}
    if args.case == "input":
        batch = args.batch or _INPUT_BATCH
        case = cases.read(
            args.source,
            args.data_dir or "data",
            image_px=args.image_px or _INPUT_PX,
            batch=batch,
            threads=args.threads or os.cpu_count() or 1,
        )
        result |= {"source": args.source, "image_px": args.image_px or _INPUT_PX}
    else:
        changes = {"data.batch": args.batch, "model.attention_impl": args.attention_impl}
        changes = {key: value for key, value in changes.items() if value is not None}
        config = cases.config_of(args.case, attention=args.attention or "", changes=changes)
        batch = config.data.batch
        case = cases.make(args.case, config, shared_prompt=bool(args.shared_prompt))
        if args.case in _BELONGS["attention"]:
            result["attention"] = args.attention or "full"
        if args.attention_impl:
            result["attention_impl"] = args.attention_impl
        if args.case in _BELONGS["shared_prompt"]:
            result["shared_prompt"] = bool(args.shared_prompt)
    timed = [case]
    names = _peers_of(args.case) if args.against == "all" else (args.against,) * bool(args.against)
    timed += [peers.build(args.case, name, config, args.threads) for name in names]
    ours, *theirs = measure.alternate(timed, steps=args.steps, warmup=args.warmup)
    result |= ours
    if names:
        result["against"] = dict(zip(names, theirs, strict=True))
        for peer in theirs:
            peer["ratio"] = round(ours["cpu_s"] / peer["cpu_s"], 5)
    result |= dict(batch=batch, steps=args.steps, warmup=args.warmup, threads=args.threads)
    return result | {"device": measure.device(), "versions": measure.versions(*names)}


def _peers_of(case: str) -> tuple[str, ...]:
    """The projects with a version of the case; for "all", of any case."""
    if case != "all":
        return peers.NAMES[case]
    return tuple(dict.fromkeys(name for names in peers.NAMES.values() for name in names))


def _all(args: argparse.Namespace) -> int:
    """Runs every case in its own process: memory and threads of one do not affect the next."""
    flags = [f"--{name}={getattr(args, name)}" for name in ("steps", "warmup", "threads")]
    failed, results = [], []
    if args.docs:
        bench.check(args.docs, is_beside=bool(args.against))
    if not args.json:
        print(header(), flush=True)
    for words in _runs(args):
        code, output = run_command("bench", *words, *flags, "--json")
        if code:
            failed.append(" ".join(words))
            continue
        results.append(json.loads(output))
        print(output.strip() if args.json else row(results[-1]), flush=True)
    if args.docs and not failed:
        bench.write(args.docs, results, is_beside=bool(args.against))
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else 0


def _runs(args: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """The words after `bench` for each run; the generated set exists until the last one ends."""
    if args.against:
        for case, *words in RUNS:
            if args.against in (*_peers_of(case), "all"):
                yield case, *words, f"--against={args.against}"
        return
    yield from RUNS
    px = args.image_px or _INPUT_PX
    if args.source:
        folder = args.data_dir or "data"
        yield "input", f"--source={args.source}", f"--data_dir={folder}", f"--image_px={px}"
        return
    with tempfile.TemporaryDirectory(prefix="dalle_jax_bench_") as folder:
        prepared = (f"--data_dir={folder}", f"--image_px={px}")
        code, _ = run_command(
            "prepare", "shapes", *prepared, f"--num_train={_SCENES}", "--num_eval=100"
        )
        if code:
            print("error: the generated set was not written.", file=sys.stderr)
        yield "input", "--source=shapes", *prepared


def run_command(*words: str) -> tuple[int, str]:
    """Runs a command of this program in its own process: (exit code, its output)."""
    command = [sys.executable, "-m", "dalle_jax", *words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    return done.returncode, done.stdout
