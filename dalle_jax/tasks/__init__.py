"""What can be trained: one file per objective, plugged into the engine's socket."""

from dalle_jax.tasks import autoencode, clip, dalle, diffusion, prior

# Name in config.task -> make(config, tokenizer=None, *, shapes_only=False) -> engine.task.Task.
# The one list.
TASKS = {
    "autoencode": autoencode.make,
    "clip": clip.make,
    "dalle": dalle.make,
    "diffusion": diffusion.make,
    "prior": prior.make,
}
