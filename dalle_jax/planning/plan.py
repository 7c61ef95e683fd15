"""The cost of a training step on a cluster that is not here: memory, FLOPs, time, traffic.

`Plan.compile` compiles the true step (the `Program` of `loop.train`) for a topology and reads the
executable: it needs no data, no weights and no device. All figures come from the compiler or from
arithmetic; none is a measurement:

  memory     the compiler's allocation, per device.
  hardware   FLOPs of all matrix products and convolutions that run, see `flops.hardware`; model
             FLOPs are the task's, without recomputation and masked scores.
  floor      hardware FLOPs at the chip's dense bfloat16 peak.
  estimate   the TPU compiler's cycles at the chip's clock. It includes memory traffic and layouts,
             but no waiting for collectives. The compiler counts Pallas kernels as 0; our estimate
             of them is added, see `kernel_estimates`.

Seconds per sample are chip-seconds: a step takes that times the samples per device.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from dalle_jax.config import ConfigDict
from dalle_jax.engine import flops, sharding
from dalle_jax.engine.program import Program
from dalle_jax.engine.task import Task
from dalle_jax.planning import compilation, hlo, kernel_estimates
from dalle_jax.planning.topology import Topology
from dalle_jax.types import UsageError

GIB = 2**30
DAY = 86_400


@dataclasses.dataclass(frozen=True)
class Plan:
    """The cost of one config on one topology. GiB are per device; None = unknown for this compiler.

    Attributes:
      task: name of the task.
      topology: name of the topology.
      chip: name of the devices' chip.
      devices: number of devices.
      mesh: axis -> size.
      rules: name of the rule table.
      batch: global batch.
      micro_batches: micro-batches per update.
      remat: name of the model's recomputation policy.
      fits: whether the step can run.
      peak_gib: peak memory of the step. If it does not fit: the compiler's figure before it gave
        up, or the state alone.
      capacity_gib: memory that a program can use.
      shortfall_gib: peak - capacity, 0 if it fits.
      params: number of trained parameters.
      params_gib: trained parameters.
      ema_gib: their moving average.
      optimiser_gib: the optimiser's state.
      state_gib: everything that a checkpoint holds.
      frozen_gib: networks that are not trained.
      batch_gib: one batch of input; the loop holds up to `data.prefetch` more.
      activations_gib: activations that the forward pass saves for the backward pass.
      temporaries_gib: the rest of the peak: gradients, gathered weights, scratch, code.
      model_tflop_per_sample: 3 x forward; attention on allowed keys.
      hardware_tflop_per_sample: see the module's docstring.
      estimated_s_per_sample: chip-seconds by the compiler's estimate, plus Pallas kernels.
      kernels_s_per_sample: chip-seconds of Pallas kernels in that estimate.
      floor_s_per_sample: chip-seconds at the peak rate.
      mfu_bound: model FLOPs over the chip's peak FLOPs in the estimated (else the floor) time.
      basis: "estimate" or "floor", the time that the figures below use.
      step_s: seconds per update.
      images_per_s: samples per second, all devices together.
      tokens_per_s: tokens per second, 0 for a task without tokens.
      steps: `train.steps`.
      days: days for all steps.
      chip_days: days x devices.
      collectives: sums by kind, mesh axis and dtype, full buffers per update.
      compile_s: seconds of compiling.
      is_quick: whether the compiler stopped before it made code, see `compilation`.
      notes: what the figures leave out.
    """

    task: str
    topology: str
    chip: str
    devices: int
    mesh: dict[str, int]
    rules: str
    batch: int
    micro_batches: int
    remat: str
    fits: bool
    peak_gib: float
    capacity_gib: float
    shortfall_gib: float
    params: int
    params_gib: float
    ema_gib: float
    optimiser_gib: float
    state_gib: float
    frozen_gib: float
    batch_gib: float
    activations_gib: float
    temporaries_gib: float | None
    model_tflop_per_sample: float
    hardware_tflop_per_sample: float
    estimated_s_per_sample: float | None
    kernels_s_per_sample: float
    floor_s_per_sample: float | None
    mfu_bound: float | None
    basis: str
    step_s: float | None
    images_per_s: float | None
    tokens_per_s: float | None
    steps: int
    days: float | None
    chip_days: float | None
    collectives: list[hlo.Traffic]
    compile_s: float
    is_quick: bool
    notes: list[str]

    @classmethod
    def compile(
        cls, config: ConfigDict, task: Task, topology: Topology, *, is_quick: bool = False
    ) -> "Plan":
        """Compiles one training step for a topology and reads its cost.

        Args:
          config: the run's config.
          task: its task, by shape.
          topology: the devices.
          is_quick: stop before machine code, hence without the compiler's estimate of time.

        Raises:
          UsageError: for a mesh or a batch that does not divide.
        """
        batch, accum = config.data.batch, config.optim.accum_steps
        program = Program.build(config, task, topology.devices)
        state, frozen, inputs, key = program.arguments
        parts = {
            name: device_bytes(getattr(state, name)) for name in ("params", "ema", "opt_state")
        }
        resident = device_bytes(state) + device_bytes(frozen) + device_bytes(inputs)

        with program.use():
            work = flops.hardware(program.step, *program.arguments) / batch
            kernels_s = 0.0
            if chip := topology.chip:
                kernels_s = kernel_estimates.seconds(program.step, *program.arguments, chip=chip)
            activations = flops.kept_bytes(
                program.task.loss, state.params, state.extra, frozen, inputs, key, state.step
            )
        activations = (
            activations / (program.mesh.shape["data"] * program.mesh.shape["fsdp"]) / accum
        )
        notes = _notes(config, program.mesh)
        if resident > topology.capacity:
            compiled = compilation.Compiled(False, resident, None, 0.0)
            notes.append("the state alone does not fit, so the step was not compiled.")
        else:
            compiled = compilation.step(program, resident, topology, is_quick=is_quick)
        text, peak = compiled.text or "", compiled.peak
        cycles = hlo.estimated_cycles(text)
        if compiled.is_quick:
            notes.append("--quick: times are the floor, and the peak is without the code itself.")
        elif compiled.fits and cycles is None:
            notes.append("this compiler gives no estimate that could be read; times are the floor.")
        elif unknown := hlo.without_estimate(text):
            notes.append(
                f"the compiler has no estimate of {unknown} instructions; they count as 0."
            )
        return cls(
            task=task.name,
            topology=topology.name,
            chip=chip.name if chip else "CPU",
            devices=len(topology.devices),
            mesh=dict(program.mesh.shape),
            rules=config.mesh.rules,
            batch=batch,
            micro_batches=accum,
            remat=str(config.model.get("remat", config.model.get("use_remat", ""))),
            fits=compiled.fits,
            peak_gib=peak / GIB,
            capacity_gib=topology.capacity / GIB,
            shortfall_gib=max(0.0, peak - topology.capacity) / GIB,
            params=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            params_gib=parts["params"] / GIB,
            ema_gib=parts["ema"] / GIB,
            optimiser_gib=parts["opt_state"] / GIB,
            state_gib=device_bytes(state) / GIB,
            frozen_gib=device_bytes(frozen) / GIB,
            batch_gib=device_bytes(inputs) / GIB,
            activations_gib=activations / GIB,
            temporaries_gib=max(0.0, peak - resident - activations) / GIB
            if compiled.fits
            else None,
            model_tflop_per_sample=task.flops / batch / 1e12,
            hardware_tflop_per_sample=work / 1e12,
            **_times(config, task, topology, work, cycles, kernels_s),
            collectives=hlo.traffic(hlo.collectives(text, program.mesh.shape)),
            compile_s=compiled.seconds,
            is_quick=compiled.is_quick,
            notes=notes,
        )

    @property
    def s_per_sample(self) -> float | None:
        """Chip-seconds: the estimate, else the floor."""
        return self.estimated_s_per_sample or self.floor_s_per_sample

    def record(self) -> dict[str, Any]:
        """The plan as plain data, unrounded."""
        return dataclasses.asdict(self)


def rounded(value: Any) -> Any:
    """`value` with floats of six significant digits, at any depth: no figure is more exact."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value


def device_bytes(tree: Any) -> int:
    """Bytes of ShapeDtypeStructs with shardings, per device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _times(
    config: ConfigDict,
    task: Task,
    topology: Topology,
    work: float,
    cycles: int | None,
    kernels_s: float,
) -> dict[str, Any]:
    """The fields of a plan that are times and rates.

    Args:
      config: the run's config.
      task: its task.
      topology: the devices.
      work: hardware FLOPs per sample.
      cycles: the compiler's estimate per step; None without one.
      kernels_s: seconds per step in Pallas kernels.
    """
    batch, steps, devices = config.data.batch, config.train.steps, len(topology.devices)
    chip = topology.chip
    estimate = (cycles / chip.clock_hz + kernels_s) * devices / batch if chip and cycles else None
    floor = work / chip.peak_flops if chip else None
    times = dict(
        estimated_s_per_sample=estimate,
        kernels_s_per_sample=kernels_s * devices / batch,
        floor_s_per_sample=floor,
        basis="estimate" if estimate else "floor",
        steps=steps,
    )
    s_per_sample = estimate or floor
    if s_per_sample is None:
        unknown = ("mfu_bound", "step_s", "images_per_s", "tokens_per_s", "days", "chip_days")
        return times | dict.fromkeys(unknown)
    step_s = s_per_sample * batch / devices
    days = steps * step_s / DAY
    return times | dict(
        mfu_bound=task.flops / batch / chip.peak_flops / s_per_sample,
        step_s=step_s,
        images_per_s=batch / step_s,
        tokens_per_s=batch * (task.unit[1] if task.unit else 0) / step_s,
        days=days,
        chip_days=days * devices,
    )


def _notes(config: ConfigDict, mesh: jax.sharding.Mesh) -> list[str]:
    notes = []
    try:
        sharding.check_batch(config.data.eval_batch, mesh, "data.eval_batch")
    except UsageError as error:
        notes.append(f"`train` will refuse: {error}")
    return notes
