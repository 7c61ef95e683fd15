"""A task small enough to train thousands of steps a second: linear regression with a counter.

Also a program (`python linear_task.py WORKDIR key=value …`) for the tests that kill a run.
"""

import os
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dalle_jax import axes
from dalle_jax import config as cfg
from dalle_jax.engine import sharding
from dalle_jax.engine.task import Output, Task

D_IN, D_OUT = 8, 16


def make_config(**overrides) -> cfg.ConfigDict:
    c = cfg.ConfigDict(
        dict(
            task="linear",
            seed=1,
            data=dict(batch=16, eval_batch=16, prefetch=2, threads=1, cache_mib=1, data_dir="d"),
            optim=dict(
                name="adamw", lr=0.05, schedule="constant", warmup_steps=3, decay_steps=0,
                end_lr_ratio=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.01,
                clip_norm=1.0, ema_decay=0.9, accum_steps=1, mu_dtype="float32",
                nu_dtype="float32", grad_reduce_dtype="compute",
            ),
            train=dict(
                steps=20, log_every_steps=5, eval_every_steps=0, eval_batches=2,
                save_every_steps=6, keep_last=2, keep_every_steps=0, preview_every_steps=0,
                tensorboard=False, wandb_project="", hang_timeout_s=60, profile_steps=0,
                profile_at=10, dump_hlo=False,
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1, rules="fsdp"),
        )
    )  # fmt: skip
    return cfg.override(c, overrides)


def make_task(batch: int = 16, *, noise: float = 0.1, **fields) -> Task:
    def init(key):
        kernel = nn.with_logical_partitioning(nn.initializers.normal(0.1), (axes.EMBED, axes.MLP))(
            key, (D_IN, D_OUT), jnp.float32
        )
        bias = nn.with_logical_partitioning(nn.initializers.zeros, (axes.MLP,))(
            key, (D_OUT,), jnp.float32
        )
        return {"dense": {"kernel": kernel, "bias": bias}}, {"seen": jnp.zeros((), jnp.int32)}

    def loss(params, extra, frozen, batch, key, step):
        predicted = batch["x"] @ params["dense"]["kernel"] + params["dense"]["bias"][None]
        # Noise per example, so that a wrong key shows up in the bits.
        predicted = predicted + noise * jax.random.normal(key, predicted.shape)
        error = jnp.mean((predicted - frozen["scale"] * batch["y"]) ** 2)
        seen = extra["seen"] + len(batch["x"])
        return error, Output({"seen": seen.astype(jnp.float32)}, {"seen": seen})

    return Task(
        name="linear",
        batch_spec={
            "x": jax.ShapeDtypeStruct((batch, D_IN), jnp.float32),
            "y": jax.ShapeDtypeStruct((batch, D_OUT), jnp.float32),
        },
        init=init,
        loss=loss,
        frozen={"scale": np.float32(2.0)},
        flops=6.0 * batch * D_IN * D_OUT,
        **fields,
    )


class Batches:
    """Batches that are a function of the step; remembers which steps were asked for."""

    def __init__(self, batch: int = 16, *, bad_step: int | None = None, delay: float = 0.0):
        self.asked, self._batch, self._bad, self._delay = [], batch, bad_step, delay
        self._weights = np.random.default_rng(0).normal(size=(D_IN, D_OUT)).astype(np.float32)

    def __call__(self, step: int):
        self.asked.append(step)
        time.sleep(self._delay)
        x = np.random.default_rng(step + 1).normal(size=(self._batch, D_IN)).astype(np.float32)
        if step == self._bad:
            x[3] = np.nan
        return {"x": x, "y": x @ self._weights, "unused": np.zeros(3)}

    def ids(self, step: int) -> list[str]:
        return [f"ex{step}-{row}" for row in range(self._batch)]


class Part(Batches):
    """The rows of this process; keyword `fault`: a step -> a function called before it."""

    def __init__(self, mesh, fault=(None, None), **fields):
        super().__init__(**fields)
        self._rows, self._fault = sharding.local_rows(mesh, self._batch), fault

    def __call__(self, step: int):
        if step == self._fault[0]:
            self._fault[1]()
        whole = super().__call__(step)
        return {name: whole[name][self._rows] for name in ("x", "y")}


FAULTS = {
    "raise": lambda: open("/no/such/disk"),
    "hang": lambda: time.sleep(600),
    "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
}


def main() -> int:
    """Trains as one process of a job, or alone.

    `i=`, `n=` and `port=` make it one of several. `fault=KIND:I:STEP` does something of FAULTS to
    process I before it reads the batch of that step; `unreadable=I:STEP` hides that checkpoint
    from process I; `reshard=1` may continue on another mesh; `wait=` is how long to wait for all.
    """
    import orbax.checkpoint as ocp

    from dalle_jax.engine import distributed, loop, workdir

    folder, *pairs = sys.argv[1:]
    values = dict(pair.split("=") for pair in pairs)
    delay, may_reshard = float(values.pop("delay", 0)), bool(values.pop("reshard", 0))
    wait = int(values.pop("wait", 60))
    kind, who, when = values.pop("fault", "raise:-1:0").split(":")
    blind, hidden = values.pop("unreadable", "-1:0").split(":")
    start = None
    if "port" in values:
        address, i, n = (
            f"localhost:{values.pop('port')}",
            int(values.pop("i")),
            int(values.pop("n")),
        )
        start = distributed.Start(address, i, n, timeout_s=wait, heartbeat_timeout_s=10)
    restore = ocp.StandardCheckpointHandler.restore

    def restore_unless_hidden(self, directory, *args, **kwargs):
        if jax.process_index() == int(blind) and directory.parent.name == hidden:
            raise OSError("this process cannot read it")
        return restore(self, directory, *args, **kwargs)

    ocp.StandardCheckpointHandler.restore = restore_unless_hidden
    with distributed.job(start, takes_notice=True):
        config = make_config(**values)
        distributed.agree(workdir.facts(folder, config))
        program = loop.prepare(config, make_task())
        fault = (int(when), FAULTS[kind]) if jax.process_index() == int(who) else (None, None)
        batches = Part(program.mesh, fault, delay=delay)
        try:
            loop.train(program, batches, Part(program.mesh), folder, may_reshard=may_reshard)
        except loop.Interrupted as stop:
            print(stop, file=sys.stderr, flush=True)
            return 128 + stop.signum
    return 0


if __name__ == "__main__":
    sys.exit(main())
