"""Which config fits: the nearest to one that does not, and the best of many.

Both compile (`plan.weigh`). Whether a program fits is known before its code is made, so that
looking for a neighbour costs less than a plan.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dalle_jax import axes
from dalle_jax import config as cfg
from dalle_jax.engine.task import Task
from dalle_jax.planning import plan
from dalle_jax.planning.plan import Plan
from dalle_jax.planning.topology import Topology
from dalle_jax.types import UsageError

# The most that a run with too large a batch is compiled again for its neighbour.
_TRIES = 5

Overrides = dict[str, Any]
Make = Callable[[cfg.ConfigDict], Task]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A config that was tried.

    Attributes:
      changes: config fields that differ from the user's config.
      plan: what it costs.
    """

    changes: Overrides
    plan: Plan


def nearest(
    config: cfg.ConfigDict, make: Make, topology: Topology, failed: Plan
) -> Candidate | None:
    """The config that fits and differs least; None if none of the tried ones does.

    In order: all of the forward pass recomputed; more of the mesh over fsdp; the same batch in more
    micro-batches (the same update where the loss is a mean over examples); a smaller batch.
    Its plan is a quick one.

    Args:
      config: the one that does not fit.
      make: config -> its task, by shape.
      topology: where it should run.
      failed: its plan.
    """
    for changes in list(_neighbours(config, failed))[:_TRIES]:
        changed = cfg.override(config, changes)
        found = plan.weigh(changed, make(changed), topology, is_quick=True)
        if found.fits:
            return Candidate(changes, found)
    return None


def search(
    config: cfg.ConfigDict,
    make: Make,
    topology: Topology,
    *,
    meshes: Sequence[tuple[int, int, int]],
    batches: Sequence[int],
    remats: Sequence[str],
    is_quick: bool = False,
) -> Iterator[Candidate]:
    """Every combination, each as soon as it is compiled.

    Batches are tried from small to large; what is larger than one that does not fit is left out,
    and so is what the mesh does not divide. Quick plans are compared by their floors.
    """
    for mesh in meshes:
        for remat in remats or ("",):
            for batch in sorted(batches):
                changes = dict(zip((f"mesh.{name}" for name in axes.MESH_AXES), mesh, strict=True))
                changes |= {"data.batch": batch} | (remat_override(config, remat) if remat else {})
                changed = cfg.override(config, changes)
                try:
                    found = plan.weigh(changed, make(changed), topology, is_quick=is_quick)
                except UsageError:
                    continue
                yield Candidate(changes, found)
                if not found.fits:
                    break


def pareto(tried: Sequence[Candidate]) -> list[Candidate]:
    """Those that fit and that no other beats in both chip-seconds per sample and memory."""
    fitting = [c for c in tried if c.plan.fits]

    def cost(candidate: Candidate) -> tuple[float, float]:
        found = candidate.plan
        return (found.s_per_sample or found.hardware_tflop_per_sample, found.peak_gib)

    def is_beaten(a: tuple[float, float]) -> bool:
        return any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in map(cost, fitting))

    return sorted((c for c in fitting if not is_beaten(cost(c))), key=cost)


def default_meshes(config: cfg.ConfigDict, devices: int) -> list[tuple[int, int, int]]:
    """(data, fsdp, tensor) with all, half and a quarter of the devices along fsdp.

    One way along tensor, and with rules that use it also 2 and 4.
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
    """The override that sets what the model recomputes.

    Raises:
      UsageError: for a model without that choice.
    """
    for name in ("remat", "use_remat"):
        if name in config.model:
            return {f"model.{name}": value}
    raise UsageError("this config's model has nothing to recompute: it has no model.remat.")


def _neighbours(config: cfg.ConfigDict, failed: Plan) -> Iterator[Overrides]:
    base: Overrides = {}
    if config.model.get("remat", "full") != "full":
        base = {"model.remat": "full"}
    elif config.model.get("use_remat", True) is False:
        base = {"model.use_remat": True}
    if base:
        yield base
    fsdp, devices = failed.mesh[axes.FSDP], failed.devices
    held = failed.state_gib + failed.frozen_gib + failed.batch_gib
    # While the state takes more than half, sharding it further is what helps.
    while held > failed.capacity_gib / 2 and fsdp < devices // failed.mesh[axes.TENSOR]:
        fsdp *= 2
        rules = {"mesh.rules": "fsdp"} if config.mesh.rules.startswith("dp") else {}
        yield base | {"mesh.data": -1, "mesh.fsdp": fsdp} | rules
    if held > failed.capacity_gib:
        return  # no batch is small enough
    per_device = failed.batch // (failed.mesh[axes.DATA] * failed.mesh[axes.FSDP])
    # Memory beyond the state grows with the micro-batch: start where a linear law would fit.
    room = max(failed.capacity_gib - held, 0.0) / max(failed.peak_gib - held, 1e-9)
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
