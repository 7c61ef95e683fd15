"""What can be trained: one file per objective, plugged into the engine's socket."""

from dalle_jax.tasks import autoencode, clip, dalle, diffusion, prior

# Name in config.task -> its module, whose
#   make(config, read_tokenizer=None, *, shapes_only=False) -> engine.task.Task
# builds what the loop trains. The one list.
TASKS = {
    "autoencode": autoencode,
    "clip": clip,
    "dalle": dalle,
    "diffusion": diffusion,
    "prior": prior,
}
