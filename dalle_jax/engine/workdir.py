"""Decides whether a start may continue a workdir: compares config, files and mesh with it.

All processes decide alike, before anything compiles.
"""

import time
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from dalle_jax import config as cfg
from dalle_jax.engine import checkpoint, distributed, optim
from dalle_jax.types import UsageError

# Fields that may differ when a workdir continues: they change output and speed, not the weights.
# `train.steps` is checked separately.
MAY_CHANGE = (
    "train.", "mesh.", "data.threads", "data.prefetch", "data.cache_mib", "data.data_dir",
    "data.eval_batch", "stages.dvae_config", "stages.clip_config", "stages.encode_chunk",
)  # fmt: skip

# Fields that name a frozen network or file -> the workdir's file that identifies it.
_FROZEN = {
    "stages.dvae": checkpoint.CODEC,
    "stages.clip": checkpoint.CLIP,
    "stages.pca": checkpoint.PCA,
}

_ORIGIN = {
    checkpoint.CODEC: "codec in stages.dvae",
    checkpoint.CLIP: "CLIP in stages.clip",
    checkpoint.PCA: "file in stages.pca",
}

# Fields that may differ between the processes of one start: each host has its own disks and
# cores.
PER_HOST = ("config.data.data_dir", "config.data.threads", "config.data.cache_mib")

# NFS clients may cache the absence of a new file for 30 to 60 s.
_SHARED_DISK_S = 60.0


def claim(workdir: str, config: cfg.ConfigDict, files: Mapping[str, bytes] | None = None) -> None:
    """Stores config and files in a new workdir; in an old one, checks that they are the same.

    A workdir without a checkpoint is new: a start that failed (a refused learning rate, a batch too
    large for the memory) does not bind the next one.

    Args:
      workdir: the run's folder; created if absent.
      config: the config of this start.
      files: `Task.keeps`.

    Raises:
      UsageError: with every field that differs and both values; for a file that differs; or if
        not all processes see the same workdir.
    """
    files = files or {}
    # A frozen network may move to another folder, but not change.
    movable = [field for field, name in _FROZEN.items() if name in files]
    _check_config(workdir, config, (*MAY_CHANGE, *movable))
    _check_files(workdir, files)
    distributed.wait_for_all("workdir claimed")
    file = epath.Path(workdir).expanduser() / checkpoint.CONFIG
    deadline = time.monotonic() + _SHARED_DISK_S
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    if not distributed.all_true(file.exists()):
        raise UsageError(
            f"--workdir={workdir} is not the same folder for all processes: {file}, written by "
            "process 0, does not exist for another. Use a disk that all hosts share, or gs://."
        )
    distributed.agree({f"the list of checkpoints in {workdir}": checkpoint.steps(workdir)})


def facts(workdir: str, config: cfg.ConfigDict) -> dict[str, Any]:
    """The facts on which all processes of a start must agree, see `distributed.agree`."""
    return {
        "workdir": str(checkpoint.absolute(workdir)),
        "jax": jax.__version__,
        **{f"config.{name}": value for name, value in cfg.flatten(config).items()},
    }


def describe(mesh: jax.sharding.Mesh, config: cfg.ConfigDict) -> dict[str, Any]:
    """The mesh of a run as JSON, for the meta of its checkpoints.

    Returns:
      {"mesh": {"shape": size of each axis, "asked": the sizes in `config.mesh` (-1 = the rest),
      "processes", "device_kind"}}.
    """
    return {
        "mesh": dict(
            shape={name: int(size) for name, size in mesh.shape.items()},
            asked={name: int(config.mesh[name]) for name in mesh.shape},
            processes=jax.process_count(),
            device_kind=mesh.devices.flat[0].device_kind,
        )
    }


def check_mesh(
    workdir: str,
    meta: Mapping[str, Any],
    mesh: jax.sharding.Mesh,
    config: cfg.ConfigDict,
    may_reshard: bool = False,
) -> None:
    """Refuses a mesh that differs from the checkpoint's by accident.

    A checkpoint restores on any mesh and any number of processes, with the same examples in the
    same order and the same loss up to rounding. But if the mesh differs and `config.mesh` does not,
    the devices have changed: a lost host, a hidden GPU. A changed `config.mesh` is a decision, and
    so is `may_reshard`.

    Args:
      workdir: the run's folder, for the message.
      meta: `Checkpointer.latest_meta()`.
      mesh: the mesh of this start.
      config: the config of this start.
      may_reshard: accept any mesh.

    Raises:
      UsageError: with both meshes and the cure.
    """
    old, new = meta.get("mesh"), describe(mesh, config)["mesh"]
    if may_reshard or old is None or old["asked"] != new["asked"] or old["shape"] == new["shape"]:
        return
    sizes = " ".join(f"--config.mesh.{name}={size}" for name, size in new["shape"].items())
    raise UsageError(
        f"the newest checkpoint of {workdir} was written on a {_text(old)}; this start has a "
        f"{_text(new)}, although config.mesh is the same. Check that no host or device is missing. "
        "If the change is intended, add --reshard, or give the mesh explicitly: "
        f"{sizes} (same examples, same loss up to rounding)."
    )


def _text(mesh: Mapping[str, Any]) -> str:
    sizes = ", ".join(f"{name}={size}" for name, size in mesh["shape"].items())
    count = mesh["processes"]
    return f"mesh ({sizes}) of {mesh['device_kind']}, {count} process{'es' * (count > 1)}"


def _check_files(workdir: str, files: Mapping[str, bytes]) -> None:
    is_new = not checkpoint.steps(workdir)
    for name, content in files.items():
        file = epath.Path(workdir).expanduser() / name
        if is_new or not file.exists():
            if jax.process_index() == 0:
                part = file.with_name(file.name + ".part")
                part.write_bytes(content)
                part.replace(file)
        elif file.read_bytes() != content:
            raise UsageError(
                f"{file} differs from this start's file, and the trained weights depend on it: the "
                f"{_ORIGIN.get(name, 'tokenizer')} has changed since. Give the old one, or use a "
                "new --workdir."
            )


def _check_config(workdir: str, config: cfg.ConfigDict, may_change: tuple[str, ...]) -> None:
    is_new = not (epath.Path(workdir).expanduser() / checkpoint.CONFIG).exists()
    if is_new or not checkpoint.steps(workdir):
        if jax.process_index() == 0:
            checkpoint.save_config(workdir, config)
        return
    stored = checkpoint.load_config(workdir)
    changed = cfg.differences(stored, config)
    refused = {k: v for k, v in changed.items() if not k.startswith(may_change)}
    hint = ""
    if "train.steps" in changed and (
        optim.depends_on_steps(config.optim) or optim.depends_on_steps(stored.optim)
    ):
        refused["train.steps"] = changed["train.steps"]
        hint = (
            f" train.steps sets the length of the {config.optim.schedule} schedule; a run whose "
            "steps should grow later needs optim.decay_steps from the start."
        )
    if refused:
        lines = [f"  {k}: stored {old!r}, given {new!r}" for k, (old, new) in refused.items()]
        raise UsageError(
            f"{workdir} holds another run; these fields differ:\n" + "\n".join(lines) + "\n"
            f"use a new --workdir, or the stored values.{hint}"
        )
    if changed and jax.process_index() == 0:
        checkpoint.save_config(workdir, config)
