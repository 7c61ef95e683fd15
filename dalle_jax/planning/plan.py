"""What a training step costs on machines that are not there: memory, FLOPs, time, traffic.

`weigh` compiles the true step (`Program.build`, the functions of `loop.train`) for a topology
and reads the executable: no data, no weights, no device. Figures are the compiler's own and
arithmetic, and none is a measurement:

  memory     the compiler's allocation, per device.
  hardware   FLOPs of all matrix products and convolutions that run, see `flops.hardware`; model
             FLOPs are the task's, without recomputation and masked scores.
  floor      hardware FLOPs at the chip's dense bfloat16 peak.
  estimate   the TPU compiler's cycles at the chip's clock. It knows memory traffic and layouts,
             but does not wait for collectives. Kernels written by hand, which it counts as nothing,
             are added: see `kernels`.

Seconds per sample are chip-seconds: a step takes that times the samples of one device.
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
    """One config on one topology. GiB are per device; None = not known for this compiler.

    Attributes:
      task: its name.
      topology: its name.
      chip: of which devices.
      devices: how many.
      mesh: axis -> size.
      rules: name of the rule table.
      batch: global.
      micro_batches: of one update.
      remat: what the model recomputes.
      fits: whether the step can run.
      peak_gib: what it needs; if it does not fit, what the compiler said before it gave up, or
        what the state alone takes.
      capacity_gib: what a device offers a program.
      shortfall_gib: what is missing, 0 if it fits.
      params: number of trained parameters.
      params_gib: their bytes.
      ema_gib: those of their moving average.
      optimiser_gib: those of the optimiser's state.
      state_gib: all that a checkpoint holds.
      frozen_gib: networks that are not trained.
      batch_gib: one batch of input; the loop keeps up to `data.prefetch` more.
      activations_gib: what the backward pass keeps of the forward pass.
      temporaries_gib: the rest of the peak: gradients, gathered weights, scratch, code.
      model_tflop_per_sample: 3 x forward; attention on allowed keys.
      hardware_tflop_per_sample: see the module's docstring.
      estimated_s_per_sample: chip-seconds by the compiler, kernels written by hand added.
      kernels_s_per_sample: the part of it that is kernels written by hand.
      floor_s_per_sample: chip-seconds at the peak rate.
      mfu_bound: model FLOPs over what the chip could do in the estimated (else the floor) time.
      basis: "estimate" or "floor": what the figures below follow from.
      step_s: seconds of one update.
      images_per_s: samples of all devices.
      tokens_per_s: likewise, 0 for a task without tokens.
      steps: `train.steps`.
      days: they take.
      chip_days: days x devices.
      collectives: kinds by mesh axis and type, full buffers per update.
      compile_s: how long the compiler took.
      is_quick: whether it ended before it made code, see `aot`.
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

    @property
    def s_per_sample(self) -> float | None:
        """Chip-seconds: the estimate, else the floor."""
        return self.estimated_s_per_sample or self.floor_s_per_sample


def weigh(config: ConfigDict, task: Task, topology: Topology, *, is_quick: bool = False) -> Plan:
    """Compiles one training step for a topology and weighs it.

    Args:
      config: the run's config.
      task: made of it, by shape.
      topology: where it would run.
      is_quick: without the machine code, hence without the compiler's estimate of time.

    Raises:
      UsageError: for a mesh or a batch that does not divide.
    """
    batch, accum = config.data.batch, config.optim.accum_steps
    program = Program.build(config, task, topology.devices)
    state, frozen, inputs, key = program.arguments
    parts = {name: held_bytes(getattr(state, name)) for name in ("params", "ema", "opt_state")}
    held = held_bytes(state) + held_bytes(frozen) + held_bytes(inputs)

    with program.use():
        work = flops.hardware(program.step, *program.arguments) / batch
        kernels_s = 0.0
        if chip := topology.chip:
            kernels_s = kernel_estimates.seconds(program.step, *program.arguments, chip=chip)
        activations = flops.kept_bytes(
            program.task.loss, state.params, state.extra, frozen, inputs, key, state.step
        )
    shards = program.mesh.shape["data"] * program.mesh.shape["fsdp"]
    activations = activations / shards / accum
    notes = _notes(config, program.mesh)
    if held > topology.capacity:
        compiled = compilation.Compiled(False, held, None, 0.0)
        notes.append("the state alone does not fit, so the step was not compiled.")
    else:
        compiled = compilation.step(program, held, topology, is_quick=is_quick)
    text = compiled.text or ""
    cycles = hlo.estimated_cycles(text)
    if compiled.is_quick:
        notes.append("--quick: times are the floor, and the peak is without the code itself.")
    elif compiled.fits and cycles is None:
        notes.append("this compiler gives no estimate that could be read; times are the floor.")
    elif blind := hlo.without_estimate(text):
        notes.append(f"the compiler has no estimate of {blind} instructions; they count as 0.")
    return Plan(
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
        peak_gib=compiled.peak / GIB,
        capacity_gib=topology.capacity / GIB,
        shortfall_gib=max(0.0, compiled.peak - topology.capacity) / GIB,
        params=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        params_gib=parts["params"] / GIB,
        ema_gib=parts["ema"] / GIB,
        optimiser_gib=parts["opt_state"] / GIB,
        state_gib=held_bytes(state) / GIB,
        frozen_gib=held_bytes(frozen) / GIB,
        batch_gib=held_bytes(inputs) / GIB,
        activations_gib=activations / GIB,
        temporaries_gib=max(0.0, compiled.peak - held - activations) / GIB
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


def held_bytes(tree: Any) -> int:
    """Bytes that ShapeDtypeStructs with shardings take on one device."""
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
      topology: where it would run.
      work: hardware FLOPs of one sample.
      cycles: the compiler's estimate for one step; None = it makes none.
      kernels_s: seconds of one step in Pallas kernels.
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
    second = estimate or floor
    if second is None:
        unknown = ("mfu_bound", "step_s", "images_per_s", "tokens_per_s", "days", "chip_days")
        return times | dict.fromkeys(unknown)
    step_s = second * batch / devices
    days = steps * step_s / DAY
    return times | dict(
        mfu_bound=task.flops / batch / chip.peak_flops / second,
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
