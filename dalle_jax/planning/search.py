"""Searches for a config that fits: the nearest to one that does not, and the best of many.

Both compile (`Plan.compile`). Whether a program fits is known before the compiler makes code, so a
neighbour costs less time than a plan.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dalle_jax import axes
from dalle_jax import config as cfg
from dalle_jax.engine.task import Task
from dalle_jax.planning.plan import Plan
from dalle_jax.planning.topology import Topology
from dalle_jax.types import UsageError

# Maximum of compilations when searching for a neighbour that fits.
MAX_TRIES = 5

Overrides = dict[str, Any]
MakeTask = Callable[[cfg.ConfigDict], Task]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A config that was compiled.

    Attributes:
      changes: config fields that differ from the user's config.
      plan: its cost.
    """

    changes: Overrides
    plan: Plan

    def record(self) -> dict[str, Any]:
        """The candidate as plain data, unrounded."""
        return {"changes": self.changes, **self.plan.record()}


def nearest(
    config: cfg.ConfigDict, make_task: MakeTask, topology: Topology, failed: Plan
) -> Candidate | None:
    """The config that fits and differs least; None if none of the compiled ones fits.

    In order: all of the forward pass recomputed; more of the mesh over fsdp; the same batch in more
    micro-batches (the same update where the loss is a mean over examples); a smaller batch. The
    plan is a quick one.

    Args:
      config: the config that does not fit.
      make_task: config -> its task, by shape.
      topology: the devices.
      failed: the plan of `config`.
    """
    for changes in list(_neighbours(config, failed))[:MAX_TRIES]:
        changed = cfg.override(config, changes)
        plan = Plan.compile(changed, make_task(changed), topology, is_quick=True)
        if plan.fits:
            return Candidate(changes, plan)
    return None


def search(
    config: cfg.ConfigDict,
    make_task: MakeTask,
    topology: Topology,
    *,
    meshes: Sequence[tuple[int, int, int]],
    batches: Sequence[int],
    remats: Sequence[str],
    is_quick: bool = False,
) -> Iterator[Candidate]:
    """Every combination, each as soon as it is compiled.

    Batches go from small to large; batches larger than one that does not fit are left out, and so
    are batches that the mesh does not divide. Quick plans are compared by their floors.
    """
    for mesh in meshes:
        for remat in remats or ("",):
            for batch in sorted(batches):
                changes = dict(zip((f"mesh.{name}" for name in axes.MESH_AXES), mesh, strict=True))
                changes |= {"data.batch": batch} | (remat_override(config, remat) if remat else {})
                changed = cfg.override(config, changes)
                try:
                    plan = Plan.compile(changed, make_task(changed), topology, is_quick=is_quick)
                except UsageError:
                    continue
                yield Candidate(changes, plan)
                if not plan.fits:
                    break


def pareto(tried: Sequence[Candidate]) -> list[Candidate]:
    """The fitting candidates that no other beats in both chip-seconds per sample and memory."""
    fitting = [c for c in tried if c.plan.fits]

    def cost(candidate: Candidate) -> tuple[float, float]:
        plan = candidate.plan
        return (plan.s_per_sample or plan.hardware_tflop_per_sample, plan.peak_gib)

    def is_beaten(a: tuple[float, float]) -> bool:
        return any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in map(cost, fitting))

    return sorted((c for c in fitting if not is_beaten(cost(c))), key=cost)


def default_meshes(config: cfg.ConfigDict, devices: int) -> list[tuple[int, int, int]]:
    """(data, fsdp, tensor) with all, half and a quarter of the devices along fsdp.

    Size 1 along tensor; with rules that use tensor also 2 and 4.
    """
    tensors = (1, 2, 4) if config.mesh.rules.startswith("fsdp_tp") else (1,)
    meshes = [
        (devices // fsdp // tensor, fsdp, tensor)
        for tensor in tensors
        for fsdp in (devices // tensor, devices // tensor // 2, devices // tensor // 4)
        if fsdp and devices % (fsdp * tensor) == 0
    ]
    return list(dict.fromkeys(meshes))


def default_batches(config: cfg.ConfigDict) -> list[int]:
    """Half, once, twice and four times the config's batch."""
    batch = config.data.batch
    return [size for size in (batch // 2, batch, 2 * batch, 4 * batch) if size]


def default_remats(config: cfg.ConfigDict) -> list[str]:
    """The config's own, and full recomputation."""
    if "remat" in config.model:
        return list(dict.fromkeys([config.model.remat, "full"]))
    return ["False", "True"] if "use_remat" in config.model else []


def remat_override(config: cfg.ConfigDict, value: str) -> Overrides:
    """The override that sets the model's recomputation policy.

    Raises:
      UsageError: for a model without one.
    """
    for name in ("remat", "use_remat"):
        if name in config.model:
            return {f"model.{name}": value}
    raise UsageError("this config's model has no model.remat to override.")


def _neighbours(config: cfg.ConfigDict, failed: Plan) -> Iterator[Overrides]:
    base: Overrides = {}
    if config.model.get("remat", "full") != "full":
        base = {"model.remat": "full"}
    elif config.model.get("use_remat", True) is False:
        base = {"model.use_remat": True}
    if base:
        yield base
    fsdp, devices = failed.mesh[axes.FSDP], failed.devices
    resident = failed.state_gib + failed.frozen_gib + failed.batch_gib
    # While the state takes more than half of the memory, sharding it further helps most.
    while resident > failed.capacity_gib / 2 and fsdp < devices // failed.mesh[axes.TENSOR]:
        fsdp *= 2
        rules = {"mesh.rules": "fsdp"} if config.mesh.rules.startswith("dp") else {}
        yield base | {"mesh.data": -1, "mesh.fsdp": fsdp} | rules
    if resident > failed.capacity_gib:
        return  # no batch is small enough
    per_device = failed.batch // (failed.mesh[axes.DATA] * failed.mesh[axes.FSDP])
    # Memory beyond the state grows with the micro-batch; start with the linear estimate.
    room = max(failed.capacity_gib - resident, 0.0) / max(failed.peak_gib - resident, 1e-9)
    fitting = per_device / failed.micro_batches * room
    for parts in (n for n in range(2, per_device + 1) if per_device % n == 0):
        if per_device / parts <= fitting and parts > failed.micro_batches:
            yield base | {"optim.accum_steps": parts}
    smaller = 2 ** math.floor(math.log2(max(fitting, 1)))
    while smaller >= 1:
        yield base | {
            "data.batch": smaller * failed.batch // per_device,
            "optim.accum_steps": 1,
        }
        smaller //= 2
