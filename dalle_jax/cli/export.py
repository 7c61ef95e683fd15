"""Writes a trained stage as a small folder to ship: weights, config, tokenizer.

  python -m dalle_jax export --workdir=runs/dvae --out=shipped/dvae

Every command that takes a stage's workdir also takes the exported folder, except `train`: the
export has no optimiser state.
"""

import argparse

from dalle_jax.cli import _flags

SUMMARY = "write a trained stage as a small folder (safetensors) to ship"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    _flags.add_workdir(parser, "run to export; its averaged weights if it has an average")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--dtype",
        default="float16",
        metavar="TYPE",
        help="stored type: float16 (default), bfloat16 or float32; loaded as float32",
    )


def run(args: argparse.Namespace) -> int:
    """Exports."""
    from dalle_jax.engine import console
    from dalle_jax.stages import export

    result = export.export(args.workdir, args.out, args.dtype)
    console.log(
        f"{args.out}: step {result['step']}, {result['parameters']:,} numbers as {args.dtype}, "
        f"{console.format_bytes(result['bytes'])}"
    )
    return 0
