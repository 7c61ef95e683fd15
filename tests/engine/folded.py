"""Tiny DALL-E and CLIP tasks, and their training steps on any mesh of the faked devices.

Width 24 over eight devices is 3968 over 128 in small: the shard of a plain matrix has 3 rows, the
folded one 24, three tiles of 8.
"""

import dataclasses
import types

import jax
import numpy as np
import weights

from dalle_jax import config as cfg
from dalle_jax.engine import loop, program, sharding, train_state
from dalle_jax.tasks import clip, dalle

BATCH, WIDTH, GRID, TEXT = 16, 24, 4, 6


def config_of(root, task: str, **overrides) -> cfg.ConfigDict:
    """The smoke config, narrower and without warmup (its first steps would be too small to see)."""
    config = cfg.load(f"{root}/configs/{task}.py:size=smoke")
    shared = {
        "data.batch": BATCH, "data.eval_batch": BATCH, "data.text_len": TEXT,
        "data.vocab_size": 48, "data.image_px": 8, "optim.warmup_steps": 0, "optim.schedule":
        "constant", "mesh.rules": "fsdp", "train.steps": 10, "model.scan_layers": True,
    }  # fmt: skip
    if task == "dalle":
        sizes = {"model.width": WIDTH, "model.num_layers": 3, "model.num_heads": 2}
        sizes |= {"model.attention": ("row",), "model.last_attention": ""}  # one period, scanned
        sizes |= {"stages.from_codes": True, "stages.dvae": "codec"}
    else:
        sizes = {"model.joint_width": 16, "model.patch_px": 4}
        for tower in ("image", "text"):
            sizes |= {f"model.{tower}_width": WIDTH, f"model.{tower}_layers": 2}
    return cfg.override(config, {**shared, **sizes, **overrides})


def task_of(config: cfg.ConfigDict):
    if config.task == "clip":
        return clip.make(config)
    codec = types.SimpleNamespace(grid=GRID, num_codes=32, params=None, fingerprint="")
    return dalle.assemble(config, codec)


def batch_of(task, step: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {
        name: rng.integers(1, 32, spec.shape).astype(spec.dtype)
        for name, spec in task.batch_spec.items()
    }


def train(config: cfg.ConfigDict, steps: int, workdir) -> dict[str, float]:
    """`loop.train` over the devices of `jax.devices()`, all of them along fsdp."""
    short = {
        "train.steps": steps, "train.eval_batches": 0, "train.tensorboard": False,
        "train.log_every_steps": 1, "mesh.fsdp": len(jax.devices()), "mesh.data": 1,
    }  # fmt: skip
    task = dataclasses.replace(task_of(config), preview=None)

    def batches(step):
        return batch_of(task, step)

    return loop.train(cfg.override(config, short), task, batches, batches, str(workdir))


class Run:
    """One task on one mesh: what `loop.train` puts together, without the loop."""

    def __init__(self, config: cfg.ConfigDict, data: int, fsdp: int, tensor: int = 1):
        sizes = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
        config = cfg.override(config, sizes)
        devices = jax.devices()[: data * fsdp * tensor]
        self.config, self.program = config, program.build(config, task_of(config), devices)
        self.key = jax.random.key(config.seed)

    def init(self) -> train_state.TrainState:
        """Weights of noise, before the first step."""
        target = self.program.saved.target
        fresh = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), target)
        params = weights.noise(target.params)
        average = None if target.ema is None else params
        return self.place(fresh.replace(params=params, ema=average))

    def place(self, state: train_state.TrainState) -> train_state.TrainState:
        """A plain state, of the host or of another mesh, as this mesh stores it."""
        target = self.program.saved.target
        placed = sharding.place(sharding.to_host(state), jax.tree.map(lambda x: x.sharding, target))
        return self.program.saved.back(placed)

    def compiled(self) -> str:
        """The text of the training step, compiled for this mesh."""
        return self.program.lower_step().compile().as_text()

    def step(self, state: train_state.TrainState):
        made = self.program
        return made.lower_step().compile()(state, None, self.batch(), self.placed_key())

    def placed_key(self):
        return jax.device_put(self.key, self.program.whole)

    def batch(self):
        made = self.program
        return sharding.to_global(batch_of(made.task), made.batch_where)

    def plain(self, params):
        """Parameters or gradients on the host, in the shapes that models see."""
        target = self.program.saved.target.params
        return jax.tree.map(lambda x, t: np.asarray(x).reshape(t.shape), params, target)

    def gradients(self, state: train_state.TrainState):
        """(loss, plain gradients) of the first batch."""
        made = self.program

        def loss(params, batch, key):
            return made.task.loss(params, state.extra, None, batch, key, state.step)[0]

        with made.use():
            run = jax.jit(jax.value_and_grad(loss), out_shardings=(made.whole, made.where.params))
            value, gradients = run(state.params, self.batch(), self.key)
        return float(value), self.plain(gradients)
