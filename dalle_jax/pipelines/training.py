"""Training from a config alone: the prepared set, the task and the loop, joined."""

import functools

from etils import epath

from dalle_jax import config as cfg
from dalle_jax import tasks
from dalle_jax.data import pipeline, tokenizers
from dalle_jax.data.builders import codes
from dalle_jax.data.tokenizers import Tokenizer
from dalle_jax.engine import checkpoint, console, distributed, loop, sharding, workdir
from dalle_jax.stages import run


def train(
    config: str | cfg.ConfigDict, folder: str, *, may_reshard: bool = False, **overrides
) -> dict[str, float]:
    """Trains a config in a workdir, or continues what the folder holds.

    Args:
      config: `dalle:size=smoke`, the path of a config file, or a config.
      folder: the workdir, a new folder or one of the same run.
      may_reshard: continue even if the workdir's mesh is another than today's devices make.
      **overrides: fields by their dotted names, as in `**{"train.steps": 100}`.

    Returns:
      The last metrics: {"step", "loss", …, "eval/loss", …}. A finished run returns those stored.

    Raises:
      UsageError: before anything compiles, for a config that does not fit the data, the devices or
        the workdir.
      metric_log.NonFiniteError: at the first loss or gradient that is not finite.
      loop.Interrupted: after SIGTERM or SIGINT, with the current step saved.
    """
    config = cfg.load(config) if isinstance(config, str) else config
    config = cfg.override(config, overrides)
    distributed.agree(workdir.facts(folder, config), ignore=workdir.PER_HOST)
    read_tokenizer = functools.cache(lambda: _tokenizer(config, folder))
    task = tasks.make(config, read_tokenizer)
    program = loop.prepare(config, task)
    tokenizer = read_tokenizer() if "text" in task.batch_spec else None
    if "codes" in task.batch_spec:
        # Refuses codes that another codec wrote than the one that will decode the samples.
        codes.check_codec(config.data, task.keeps[checkpoint.CODEC].decode(), config.stages.dvae)

    def open_split(split: str, batch: int, *, training: bool):
        return pipeline.make(
            config.data,
            config.seed,
            split=split,
            fields=set(task.batch_spec),
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
        metrics = loop.train(program, batches, held_out, folder, may_reshard=may_reshard)
    finally:
        batches.close()
        held_out.close()
    for reason, count in batches.skipped.items():
        console.log(f"note: {count} records skipped: {reason}")
    if batches.truncated:
        console.log(f"note: {batches.truncated} captions were longer than data.text_len and cut.")
    return metrics


def dry_run(config: cfg.ConfigDict, folder: str) -> str:
    """What `train` would do, as text: parameters, batch, schedule; needs neither data nor codec."""
    distributed.agree(workdir.facts(folder, config), ignore=workdir.PER_HOST)
    return loop.dry_run(loop.prepare(config, tasks.make(config, shapes_only=True)))


def _tokenizer(config: cfg.ConfigDict, folder: str) -> Tokenizer:
    """The tokenizer of the run in the workdir, else of the frozen CLIP, else of the prepared set.

    A resumed run reads text as before, even if the prepared set has changed; a run that feeds
    captions to a CLIP reads them as the CLIP does.
    """
    file = epath.Path(folder) / checkpoint.TOKENIZER
    if file.exists() and checkpoint.steps(folder):
        return Tokenizer(file.read_bytes())
    clip = config.get("stages", {}).get("clip", "")
    return run.read_tokenizer(clip) if clip else tokenizers.find(config.data)
