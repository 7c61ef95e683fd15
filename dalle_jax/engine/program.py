"""Everything of a run that is compiled, with its shardings: what `train` runs and `plan` weighs.

One place for both, so that a plan is the plan of the true step: the same functions under the same
`jax.jit`, on a mesh of the devices at hand or of a topology that is not there. Shapes only; nothing
is computed or placed here.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import optax

from dalle_jax.config import ConfigDict
from dalle_jax.engine import meshes, optim, sharding, train_state, train_step
from dalle_jax.engine.task import Task


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled functions of a run and where their arguments live.

    Attributes:
      task: what is trained, its functions for parameters as the state stores them.
      mesh: the device mesh.
      rules: logical name -> mesh axes.
      reduce_dtype: see `sharding.use`.
      tx: the optimiser.
      lr: its schedule.
      target: the training state as ShapeDtypeStructs with shardings.
      where: its NamedShardings.
      saved: takes the state to the plain shapes of a checkpoint and back.
      frozen_where: those of `Task.frozen`.
      batch_where: that of every array of a batch.
      whole: the same array on every device: keys, metrics.
      init: key -> TrainState.
      step: (state, frozen, batch, key) -> (state, metrics); the state is donated.
      evaluate: (params, extra, frozen, batch, key, step) -> metrics.
      arguments: what `step` takes, as ShapeDtypeStructs with shardings.
    """

    task: Task
    mesh: jax.sharding.Mesh
    rules: sharding.Rules
    reduce_dtype: Any
    tx: optax.GradientTransformation
    lr: optim.Schedule
    target: train_state.TrainState
    where: train_state.TrainState
    saved: train_state.Saved
    frozen_where: Any
    batch_where: jax.sharding.NamedSharding
    whole: jax.sharding.NamedSharding
    init: Any
    step: Any
    evaluate: Any
    arguments: tuple

    def use(self):
        """The context in which the functions are traced; see `sharding.use`."""
        return sharding.use(self.mesh, self.rules, self.reduce_dtype)

    def lower_step(self):
        """The training step, traced for its arguments; `.compile()` makes the executable.

        Compiled ahead it takes these shapes and no others, so nothing can compile a second time in
        the middle of a run.
        """
        with self.use():
            return self.step.lower(*self.arguments)


def build(config: ConfigDict, task: Task, devices: Sequence[jax.Device] | None = None) -> Program:
    """The program of a run.

    Args:
      config: the run's config.
      task: what to train; `frozen` may be ShapeDtypeStructs if only shapes are asked for.
      devices: to make the mesh of; all devices by default.

    Raises:
      UsageError: for a mesh, rules, optimiser or schedule that do not fit.
    """
    mesh = meshes.make_mesh(config.mesh, devices)
    rules = sharding.rules(config.mesh)
    whole = sharding.replicated(mesh)
    key = jax.eval_shape(jax.random.key, 0)
    boxed = train_state.abstract(task, key)
    storage = sharding.storage(boxed[0], mesh, rules)
    tx, lr = optim.make(config.optim, boxed[0], task.decay_mask, config.train.steps, storage)
    has_ema = config.optim.ema_decay > 0
    target, where = train_state.shardings(boxed, tx, has_ema=has_ema, mesh=mesh, rules=rules)
    task = train_state.seen_plain(task, storage)
    frozen_where = sharding.shardings(task.frozen, mesh, rules)
    batch_where = sharding.batch_sharding(mesh)
    step = jax.jit(
        train_step.make_step(task, tx, lr, config.optim.ema_decay, config.optim.accum_steps),
        in_shardings=(where, frozen_where, batch_where, whole),
        out_shardings=(where, whole),
        donate_argnums=0,  # the old state's memory becomes the new one's
    )

    def placed(shape, place):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)

    arguments = (
        target,
        jax.tree.map(placed, sharding.unbox(task.frozen), frozen_where),
        {name: placed(spec, batch_where) for name, spec in task.batch_spec.items()},
        placed(key, whole),
    )
    return Program(
        task=task,
        mesh=mesh,
        rules=rules,
        reduce_dtype=optim.reduce_dtype(config.optim),
        tx=tx,
        lr=lr,
        target=target,
        where=where,
        saved=train_state.Saved(target, storage),
        frozen_where=frozen_where,
        batch_where=batch_where,
        whole=whole,
        init=jax.jit(train_state.make_init(task, tx, has_ema=has_ema), out_shardings=where),
        step=step,
        evaluate=jax.jit(train_step.make_eval(task), out_shardings=whole),
        arguments=arguments,
    )
