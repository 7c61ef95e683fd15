"""The compiled functions of a run with their shardings: `train` runs them, `plan` costs them.

Both build the same `Program`, so that a plan is the plan of the true step: the same functions under
the same `jax.jit`, on a mesh of the devices at hand or of a topology that does not exist here.
Building works on shapes only: it computes nothing and places nothing on a device.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import optax

from dalle_jax.config import ConfigDict
from dalle_jax.engine import meshes, optim, sharding, train_state, train_step
from dalle_jax.engine.task import Task
from dalle_jax.types import UsageError


@dataclasses.dataclass(frozen=True)
class Program:
    """The functions of a run and the shardings of their arguments.

    Attributes:
      config: the run's config.
      task: the task with its functions for stored parameters, see `train_state.unfolded`.
      mesh: the device mesh.
      rules: logical name -> mesh axes.
      tx: the optimiser.
      lr: its schedule.
      state_shapes: the training state as ShapeDtypeStructs with shardings.
      shardings: the training state as NamedShardings.
      folding: converts the state to the shapes of a checkpoint and back.
      frozen_shardings: NamedShardings of `Task.frozen`.
      batch_sharding: the sharding of every array in a batch.
      replicated: the sharding of keys and metrics, the same on every device.
      init: key -> TrainState.
      step: (state, frozen, batch, key) -> (state, metrics); the state is donated.
      evaluate: (params, extra, frozen, batch, key, step) -> metrics.
      arguments: the arguments of `step` as ShapeDtypeStructs with shardings.
    """

    config: ConfigDict
    task: Task
    mesh: jax.sharding.Mesh
    rules: sharding.Rules
    tx: optax.GradientTransformation
    lr: optim.Schedule
    state_shapes: train_state.TrainState
    shardings: train_state.TrainState
    folding: train_state.Folding
    frozen_shardings: Any
    batch_sharding: jax.sharding.NamedSharding
    replicated: jax.sharding.NamedSharding
    init: Any
    step: Any
    evaluate: Any
    arguments: tuple

    @classmethod
    def build(
        cls, config: ConfigDict, task: Task, devices: Sequence[jax.Device] | None = None
    ) -> "Program":
        """The program of a run.

        Args:
          config: the run's config.
          task: what to train; `frozen` may hold ShapeDtypeStructs where only shapes are needed.
          devices: the devices of the mesh; None = all devices.

        Raises:
          UsageError: for a mesh, batch, rules, optimiser or schedule that does not fit.
        """
        mesh = meshes.make_mesh(config.mesh, devices)
        _check_batch(config, task, mesh)
        rules = sharding.rules(config.mesh)
        replicated, batch_sharding = sharding.replicated(mesh), sharding.batch_sharding(mesh)
        key = jax.eval_shape(jax.random.key, 0)
        boxed = train_state.abstract(task, key)
        storage = sharding.storage(boxed[0], mesh, rules)
        tx, lr = optim.make(config.optim, boxed[0], task.decay_mask, config.train.steps, storage)
        has_ema = config.optim.ema_decay > 0
        state_shapes, shardings = train_state.shapes_and_shardings(
            boxed, tx, has_ema=has_ema, mesh=mesh, rules=rules
        )
        task = train_state.unfolded(task, storage)
        frozen_shardings = sharding.shardings(task.frozen, mesh, rules)
        step = jax.jit(
            train_step.make_step(task, tx, lr, config.optim.ema_decay, config.optim.accum_steps),
            in_shardings=(shardings, frozen_shardings, batch_sharding, replicated),
            out_shardings=(shardings, replicated),
            donate_argnums=0,  # the old state's memory becomes the new one's
        )

        def sharded(shape, sharding):
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

        arguments = (
            state_shapes,
            jax.tree.map(sharded, sharding.unbox(task.frozen), frozen_shardings),
            {name: sharded(spec, batch_sharding) for name, spec in task.batch_spec.items()},
            sharded(key, replicated),
        )
        init = train_state.make_init(task, tx, has_ema=has_ema)
        return cls(
            config=config,
            task=task,
            mesh=mesh,
            rules=rules,
            tx=tx,
            lr=lr,
            state_shapes=state_shapes,
            shardings=shardings,
            folding=train_state.Folding(state_shapes, storage),
            frozen_shardings=frozen_shardings,
            batch_sharding=batch_sharding,
            replicated=replicated,
            init=jax.jit(init, out_shardings=shardings),
            step=step,
            evaluate=jax.jit(train_step.make_eval(task), out_shardings=replicated),
            arguments=arguments,
        )

    def use(self):
        """The context in which the functions are traced; see `sharding.use`."""
        return sharding.use(self.mesh, self.rules, optim.reduce_dtype(self.config.optim))

    def lower_step(self):
        """The training step, traced for its arguments; `.compile()` gives the executable.

        The executable takes these shapes and no others, so nothing can compile a second time in
        the middle of a run.
        """
        with self.use():
            return self.step.lower(*self.arguments)


def _check_batch(config: ConfigDict, task: Task, mesh: jax.sharding.Mesh) -> None:
    """Refuses a batch that the mesh cannot split, or of another size than the task's."""
    sharding.check_batch(config.data.batch, mesh, "data.batch", config.optim.accum_steps)
    for name, spec in task.batch_spec.items():
        if spec.shape[0] != config.data.batch:
            raise UsageError(
                f"task {task.name} expects {name} with shape {spec.shape}, but data.batch="
                f"{config.data.batch}; the leading axis is the global batch."
            )
