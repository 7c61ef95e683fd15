"""What can be trained: one file per objective, plugged into the engine's socket."""

from dalle_jax.config import ConfigDict
from dalle_jax.engine.task import Task
from dalle_jax.tasks import autoencode, clip, dalle, diffusion, prior
from dalle_jax.types import UsageError

# Name in config.task -> its module, which has a function `make` like the one below. The one list.
TASKS = {
    "autoencode": autoencode,
    "clip": clip,
    "dalle": dalle,
    "diffusion": diffusion,
    "prior": prior,
}


def make(config: ConfigDict, read_tokenizer=None, *, shapes_only: bool = False) -> Task:
    """The task of a config.

    Args:
      config: `config.task` names the task.
      read_tokenizer: () -> the run's tokenizer, called only by a task with text; None in dry runs.
      shapes_only: for plans and dry runs: frozen networks have shapes but no weights.

    Raises:
      UsageError: for an unknown task, or values that do not fit together.
    """
    if config.task not in TASKS:
        raise UsageError(
            f"task {config.task!r} is unknown; config.task is one of {', '.join(TASKS)}."
        )
    return TASKS[config.task].make(config, read_tokenizer, shapes_only=shapes_only)
