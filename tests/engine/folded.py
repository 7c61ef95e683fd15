"""Tiny DALL-E and CLIP tasks, and their training steps on any mesh of the faked devices.

Width 24 over eight devices is 3968 over 128 in small: the shard of a plain matrix has 3 rows, the
folded one 24, three tiles of 8.
"""

import types

import jax
import numpy as np

from dalle_jax import config as cfg
from dalle_jax import layout
from dalle_jax.engine import optim, sharding, steps
from dalle_jax.engine import state as state_lib
from dalle_jax.tasks import clip, dalle

BATCH, WIDTH, GRID, TEXT = 16, 24, 4, 6


def config_of(root, task: str, **overrides) -> cfg.ConfigDict:
    """The smoke config, narrower and without warmup (its first steps would be too small to see)."""
    config = cfg.load(f"{root}/configs/{task}.py:size=smoke")
    shared = {
        "data.batch": BATCH, "data.eval_batch": BATCH, "data.text_len": TEXT,
        "data.vocab_size": 48, "data.image_px": 8, "optim.warmup_steps": 0, "optim.schedule":
        "constant", "mesh.rules": "fsdp", "train.steps": 10,
    }  # fmt: skip
    if task == "dalle":
        sizes = {"model.width": WIDTH, "model.num_layers": 3, "model.num_heads": 2}
        sizes |= {"stages.from_codes": True, "stages.dvae": "codec"}
    else:
        sizes = {"model.joint_width": 16, "model.patch_px": 4}
        for tower in ("image", "text"):
            sizes |= {f"model.{tower}_width": WIDTH, f"model.{tower}_layers": 2}
    return cfg.override(config, {**shared, **sizes, **overrides})


def task_of(config: cfg.ConfigDict):
    if config.task == "clip":
        return clip.make(config)
    codec = types.SimpleNamespace(grid=GRID, num_codes=32, params=None)
    return dalle.build(config, codec)


def batch_of(task) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(1, 32, spec.shape).astype(spec.dtype)
        for name, spec in task.batch_spec.items()
    }


class Run:
    """One task on one mesh: what `loop.train` puts together, without the loop."""

    def __init__(self, config: cfg.ConfigDict, data: int, fsdp: int, tensor: int = 1):
        self.config, self.plain_task = config, task_of(config)
        sizes = cfg.ConfigDict(dict(data=data, fsdp=fsdp, tensor=tensor, rules=config.mesh.rules))
        self.mesh = sharding.make_mesh(sizes, jax.devices()[: data * fsdp * tensor])
        self.rules = sharding.rules(sizes)
        self.key = jax.random.key(config.seed)
        self.boxed = state_lib.abstract(self.plain_task, self.key)
        self.storage = sharding.storage(self.boxed[0], self.mesh, self.rules)
        self.tx, self.lr = optim.make(
            config.optim, self.boxed[0], self.plain_task.decay_mask, config.train.steps,
            self.storage,
        )  # fmt: skip
        self.has_ema = config.optim.ema_decay > 0
        self.target, self.where = state_lib.shardings(
            self.boxed, self.tx, has_ema=self.has_ema, mesh=self.mesh, rules=self.rules
        )
        self.task = state_lib.seen_plain(self.plain_task, self.storage)
        self.saved = state_lib.Saved(self.target, self.storage)
        self.batch_where = sharding.batch_sharding(self.mesh)

    def use(self):
        return sharding.use(self.mesh, self.rules, optim.reduce_dtype(self.config.optim))

    def init(self) -> state_lib.TrainState:
        init = state_lib.make_init(self.task, self.tx, has_ema=self.has_ema)
        return jax.jit(init, out_shardings=self.where)(self.key)

    def compiled(self):
        """The training step, compiled for this mesh."""
        o, whole = self.config.optim, sharding.replicated(self.mesh)
        step = jax.jit(
            steps.make_step(self.task, self.tx, self.lr, o.ema_decay, o.accum_steps),
            in_shardings=(self.where, whole, self.batch_where, whole),
            out_shardings=(self.where, whole),
            donate_argnums=0,
        )
        spec = {
            name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=self.batch_where)
            for name, s in self.task.batch_spec.items()
        }
        with self.use():
            return step.lower(self.target, None, spec, self.key).compile()

    def batch(self):
        return sharding.to_global(batch_of(self.task), self.batch_where)

    def gradients(self, state: state_lib.TrainState):
        """(loss, plain gradients on the host) of the first batch."""

        def loss(params, batch, key):
            return self.task.loss(params, state.extra, None, batch, key, state.step)[0]

        with self.use():
            run = jax.jit(
                jax.value_and_grad(loss),
                out_shardings=(sharding.replicated(self.mesh), self.where.params),
            )
            value, gradients = run(state.params, self.batch(), self.key)
        return float(value), sharding.to_host(layout.plain(gradients, self.storage))
