"""Trains the network that a config describes. The same --workdir continues an interrupted run.

  python -m dalle_jax train --config=configs/dvae.py:size=smoke --workdir=runs/dvae

A finished run is a no-op. A config that differs from the workdir's own is refused with the names
of the fields. Ctrl-C or SIGTERM saves at the next step and exits with 130 or 143, so that
`train … && train …` does not go on with a half-trained stage; a second Ctrl-C stops at once.

Several processes, one per host or GPU, run the same command with --distributed, or by hand:

  … --coordinator=10.0.0.1:8476 --process_count=2 --process_id=0      # and 1 on the other host

Each reads its own rows of the batch; process 0 writes metrics and previews; --workdir is on a disk
that all share. SIGTERM to any of them makes all save at the same step; what ends one ends all:
docs/many_hosts.md.
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
        help="continue on whatever mesh today's devices make; without it, the same config.mesh on "
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
    from dalle_jax.engine import checkpoint, distributed, loop, meshes, metrics, sharding, workdir
    from dalle_jax.types import UsageError

    distributed.agree(workdir.facts(args.workdir, config), ignore=workdir.PER_HOST)
    if config.task not in tasks.TASKS:
        raise UsageError(
            f"task {config.task!r} is unknown; config.task is one of {', '.join(tasks.TASKS)}."
        )
    if args.dry_run:
        # No data and no trained codec: shapes are enough.
        task = tasks.TASKS[config.task].make(config, shapes_only=True)
        metrics.say(loop.plan(config, task))
        return 0
    read_tokenizer = functools.cache(lambda: _tokenizer(config, args.workdir))
    task = tasks.TASKS[config.task].make(config, read_tokenizer)
    tokenizer = read_tokenizer() if "text" in task.batch_spec else None
    if "codes" in task.batch_spec:
        # Stored codes of another codec than the one that will decode what is learnt are refused.
        fingerprint = task.keeps[checkpoint.CODEC].decode()
        codes.check_codec(config.data, fingerprint, config.stages.dvae)
    loop.check(config, task)

    mesh = meshes.make_mesh(config.mesh)

    def batches(split: str, training: bool, batch: int):
        return pipeline.make(
            config.data,
            config.seed,
            split=split,
            wanted=set(task.batch_spec),
            tokenizer=tokenizer,
            training=training,
            batch=batch,
            rows=sharding.local_rows(mesh, batch),
        )

    training = batches(config.data.split, True, config.data.batch)
    held_out = batches(config.data.eval_split, False, config.data.eval_batch)
    distributed.agree(
        {"training examples": training.num_examples, "held-out examples": held_out.num_examples}
    )
    try:
        loop.train(config, task, training, held_out, args.workdir, may_reshard=args.reshard)
    except loop.Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    except loop.NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        training.close()
        held_out.close()
    _report(training)
    return 0


def _report(pipeline) -> None:
    """Says what the data held that could not be used as it was."""
    from dalle_jax.engine import metrics

    for reason, count in pipeline.skipped.items():
        metrics.say(f"note: {count} records skipped: {reason}")
    if pipeline.truncated:
        metrics.say(f"note: {pipeline.truncated} captions were longer than data.text_len and cut.")


def _tokenizer(config, workdir: str):
    """That of the run in the workdir, else that of the frozen CLIP, else the prepared set's.

    A resumed run must read text as it was trained to, whatever happened to the prepared set; one
    that feeds captions to a CLIP must read them as that does.
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
