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
    import functools
    import sys

    from dalle_jax import tasks
    from dalle_jax.data import pipeline
    from dalle_jax.data.builders import codes
    from dalle_jax.engine import (
        checkpoint,
        console,
        distributed,
        loop,
        metric_log,
        sharding,
        workdir,
    )

    distributed.agree(workdir.facts(args.workdir, config), ignore=workdir.PER_HOST)
    if args.dry_run:
        # Shapes are enough: no data and no trained codec.
        task = tasks.make(config, shapes_only=True)
        console.log(loop.dry_run(loop.prepare(config, task)))
        return 0
    read_tokenizer = functools.cache(lambda: _tokenizer(config, args.workdir))
    task = tasks.make(config, read_tokenizer)
    program = loop.prepare(config, task)
    tokenizer = read_tokenizer() if "text" in task.batch_spec else None
    if "codes" in task.batch_spec:
        # Refuses codes that another codec wrote than the one that will decode the samples.
        fingerprint = task.keeps[checkpoint.CODEC].decode()
        codes.check_codec(config.data, fingerprint, config.stages.dvae)

    def open_split(split: str, batch: int, *, training: bool):
        return pipeline.make(
            config.data,
            config.seed,
            split=split,
            wanted=set(task.batch_spec),
            tokenizer=tokenizer,
            training=training,
            batch=batch,
            rows=sharding.local_rows(program.mesh, batch),
        )

    batches = open_split(config.data.split, config.data.batch, training=True)
    held_out = open_split(config.data.eval_split, config.data.eval_batch, training=False)
    distributed.agree(
        {"training examples": batches.num_examples, "held-out examples": held_out.num_examples}
    )
    try:
        loop.train(program, batches, held_out, args.workdir, may_reshard=args.reshard)
    except loop.Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    except metric_log.NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        batches.close()
        held_out.close()
    for reason, count in batches.skipped.items():
        console.log(f"note: {count} records skipped: {reason}")
    if batches.truncated:
        console.log(f"note: {batches.truncated} captions were longer than data.text_len and cut.")
    return 0


def _tokenizer(config, workdir: str):
    """The tokenizer of the run in the workdir, else of the frozen CLIP, else of the prepared set.

    A resumed run reads text as before, even if the prepared set has changed; a run that feeds
    captions to a CLIP reads them as the CLIP does.
    """
    from etils import epath

    from dalle_jax.data import tokenizers
    from dalle_jax.engine import checkpoint
    from dalle_jax.stages.run import Run

    file = epath.Path(workdir) / checkpoint.TOKENIZER
    if file.exists() and checkpoint.steps(workdir):
        return tokenizers.Tokenizer(file.read_bytes())
    clip = config.get("stages", {}).get("clip", "")
    if clip:
        return Run.open(clip, "clip").tokenizer
    return tokenizers.find(config.data)
