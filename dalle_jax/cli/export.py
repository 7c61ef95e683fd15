"""Writes a trained stage as a small folder to ship: weights, config, tokenizer.

  python -m dalle_jax export --workdir=runs/dvae --out=shipped/dvae

Every command that takes a stage's workdir takes the exported folder as well. Only training does
not: the optimiser stays behind.
"""

import argparse

from dalle_jax.cli import _flags

SUMMARY = "write a trained stage as a small folder (safetensors) to ship"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    _flags.add_workdir(parser, "what to export; its averaged weights when it kept an average")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--dtype",
        default="float16",
        metavar="TYPE",
        help="storage: float16 (default), bfloat16 or float32; read back as float32",
    )


def run(args: argparse.Namespace) -> int:
    """Exports."""
    import pathlib

    from dalle_jax.engine import checkpoint, console
    from dalle_jax.stages.clip import ClipStage

    done = checkpoint.export(args.workdir, args.out, args.dtype)
    if checkpoint.load_config(args.workdir).task == "clip":
        clip = ClipStage.load(args.workdir)
        origin = clip.origin or clip.fingerprint
        (pathlib.Path(args.out) / checkpoint.ORIGIN).write_text(origin)
    console.log(
        f"{args.out}: step {done['step']}, {done['parameters']:,} numbers as {args.dtype}, "
        f"{console.format_bytes(done['bytes'])}"
    )
    return 0
