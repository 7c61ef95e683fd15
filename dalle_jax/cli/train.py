"""Trains the network that a config describes. The same --workdir continues an interrupted run.

  python -m dalle_jax train --config=configs/dvae.py:size=smoke --workdir=runs/dvae

A finished run is a no-op. If the config differs from the workdir's own, `train` refuses it and
names the fields. Ctrl-C or SIGTERM saves at the next step and exits with 130 or 143, so that
`train … && train …` does not continue with a half-trained stage; a second Ctrl-C stops at once.

Several processes, one per host or GPU, run the same command with --distributed, or with explicit
addresses:

  … --coordinator=10.0.0.1:8476 --process_count=2 --process_id=0      # and 1 on the other host

Each process reads its own rows of the batch; process 0 writes metrics and previews; --workdir is on
a disk that all share. SIGTERM to any process makes all of them save the same step; if one process
fails, all of them end: docs/many_hosts.md.
"""

import argparse

from dalle_jax.cli import _flags

SUMMARY = "train a stage from a config, or continue a workdir"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    _flags.add_config(parser)
    _flags.add_workdir(parser, "checkpoints, metrics and previews of this run")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print parameters, batch and schedules; needs no data and no codec, trains nothing",
    )
    parser.add_argument(
        "--reshard",
        action="store_true",
        help="continue on the mesh of the present devices; without it, the same config.mesh on "
        "another number of devices than before is refused",
    )
    _flags.add_distributed(parser)
    _flags.add_cache(parser)


def run(args: argparse.Namespace) -> int:
    """Trains; returns the exit code."""
    _flags.use_cache(args)
    config = _flags.load_config(args)
    with _flags.job(args, takes_notice=True):
        return _train(args, config)


def _train(args: argparse.Namespace, config) -> int:
    import sys

    from dalle_jax.engine import console, loop, metric_log
    from dalle_jax.pipelines import training

    if args.dry_run:
        console.log(training.dry_run(config, args.workdir))
        return 0
    try:
        training.train(config, args.workdir, may_reshard=args.reshard)
    except loop.Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    except metric_log.NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
