"""Trains the network that a config describes. The same --workdir continues an interrupted run.

  python -m dalle_jax train --config=configs/dvae.py:size=smoke --workdir=runs/dvae

A finished run is a no-op. A config that differs from the workdir's own is refused with the names
of the fields. Ctrl-C or SIGTERM saves at the next step and exits with 130 or 143, so that
`train … && train …` does not go on with a half-trained stage; a second Ctrl-C stops at once.
"""

import argparse

from dalle_jax.cli import common

SUMMARY = "train a stage from a config, or continue a workdir"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    common.add_config(parser)
    common.add_workdir(parser, "checkpoints, metrics and previews of this run")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print parameters, batch and schedules; needs no data and no codec, trains nothing",
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes (TPU pod, SLURM, …): calls jax.distributed.initialize()",
    )
    common.add_cache(parser)


def run(args: argparse.Namespace) -> int:
    """Trains; returns the exit code."""
    import sys

    import jax

    common.use_cache(args)
    if args.distributed:
        jax.distributed.initialize()

    from dalle_jax import tasks
    from dalle_jax.data import pipeline
    from dalle_jax.engine import loop, metrics
    from dalle_jax.types import UsageError

    config = common.load_config(args)
    if config.task not in tasks.TASKS:
        raise UsageError(
            f"task {config.task!r} is unknown; config.task is one of {', '.join(tasks.TASKS)}."
        )
    if args.dry_run:
        # No data and no trained codec: shapes are enough.
        task = tasks.TASKS[config.task](config, by_shape=True)
        metrics.say(loop.plan(config, task))
        return 0
    wanted = _wanted(config)
    tokenizer = _tokenizer(config, args.workdir) if "text" in wanted else None
    task = tasks.TASKS[config.task](config, tokenizer)
    if "codes" in wanted:
        _check_codes(config)
    loop.check(config, task)

    def batches(split: str, training: bool, batch: int):
        return pipeline.make(
            config.data,
            config.seed,
            split=split,
            wanted=wanted,
            tokenizer=tokenizer,
            training=training,
            batch=batch,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    training = batches(config.data.split, True, config.data.batch)
    held_out = batches(config.data.eval_split, False, config.data.eval_batch)
    try:
        loop.train(config, task, training, held_out, args.workdir)
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


def _wanted(config) -> set[str]:
    """What the batches of the config's task hold."""
    import sys

    from dalle_jax import tasks

    return sys.modules[tasks.TASKS[config.task].__module__].wanted(config)


def _check_codes(config) -> None:
    """Refuses stored codes of another codec than the one that will decode what is learnt."""
    from dalle_jax.data.builders import codes
    from dalle_jax.sampling import stages

    fingerprint = stages.load_codec(config.stages.dvae).fingerprint
    codes.check_codec(config.data, fingerprint, config.stages.dvae)


def _tokenizer(config, workdir: str):
    """The workdir's own tokenizer, or else that of the prepared set, copied into the workdir.

    A resumed run must read text as it was trained to, whatever happened to the prepared set.
    """
    import jax
    from etils import epath

    from dalle_jax.data import tokenizer
    from dalle_jax.engine import checkpoint

    file = epath.Path(workdir) / checkpoint.TOKENIZER
    if file.exists():
        return tokenizer.Tokenizer(file.read_bytes())
    found = tokenizer.find(config.data)
    if jax.process_index() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(file.name + ".part")
        part.write_bytes(found.model_bytes)
        part.replace(file)
    return found
