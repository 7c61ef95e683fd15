"""May this start continue that workdir? The config, the disk and the mesh are compared first.

Everything here is decided before anything compiles, by all processes alike.
"""

import time
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from dalle_jax import config as cfg
from dalle_jax.engine import checkpoint, distributed, optim
from dalle_jax.types import UsageError

# Fields that may differ when a workdir continues: they change what is written and how fast, not
# what is learned. `train.steps` is checked apart.
MAY_CHANGE = (
    "train.", "mesh.", "data.threads", "data.prefetch", "data.cache_mib", "data.data_dir",
    "data.eval_batch", "stages.dvae_config", "stages.clip_config", "stages.encode_chunk",
)  # fmt: skip

# Fields that name a folder or file -> what a run keeps of it.
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

# Fields that may differ between the processes of one start: each host has disks and cores of its
# own.
PER_HOST = ("config.data.data_dir", "config.data.threads", "config.data.cache_mib")

# NFS may hide a new file for as long as its clients cache that there is none: 30 to 60 s.
_SHARED_DISK_S = 60.0


def claim(workdir: str, config: cfg.ConfigDict, keeps: Mapping[str, bytes] | None = None) -> None:
    """Stores config and kept files in a new workdir; in an old one checks that they are the same.

    A workdir without a checkpoint is new: a start that failed (a learning rate refused, too large
    a batch for the memory) leaves nothing that binds the next one.

    Args:
      workdir: the run's folder; made if absent.
      config: of this start.
      keeps: `Task.keeps`.

    Raises:
      UsageError: listing every field that differs, with both values; for a kept file that
        differs; or if not all processes see the same workdir.
    """
    keeps = keeps or {}
    # What is frozen may be moved, but not exchanged.
    moved = [field for field, file in _FROZEN.items() if file in keeps]
    may_change = (*MAY_CHANGE, *moved)
    _check_config(workdir, config, may_change)
    _check_kept(workdir, keeps)
    distributed.wait_for_all("workdir claimed")
    file = epath.Path(workdir).expanduser() / checkpoint.CONFIG
    deadline = time.monotonic() + _SHARED_DISK_S
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    if not distributed.all_true(file.exists()):
        raise UsageError(
            f"--workdir={workdir} is not the same folder for all processes: {file}, written by "
            "process 0, is not there for another. Use a disk that all hosts share, or gs://."
        )
    distributed.agree({f"the list of checkpoints in {workdir}": checkpoint.steps(workdir)})


def facts(workdir: str, config: cfg.ConfigDict) -> dict[str, Any]:
    """What all processes of a start must have in common, for `distributed.agree`."""
    return {
        "workdir": str(checkpoint.absolute(workdir)),
        "jax": jax.__version__,
        **{f"config.{name}": value for name, value in cfg.flatten(config).items()},
    }


def describe(mesh: jax.sharding.Mesh, config: cfg.ConfigDict) -> dict[str, Any]:
    """What a checkpoint remembers of the mesh that wrote it, as JSON.

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
    """Refuses a mesh that has become another than the checkpoint's by accident.

    A checkpoint restores on any mesh and any number of processes, with the same examples in the
    same order and the same loss up to rounding. But where the mesh is another although
    `config.mesh` asks for the same, devices have gone or come: a host that was lost, a GPU that is
    hidden. A changed `config.mesh` is a decision, and so is `may_reshard`.

    Args:
      workdir: for the text.
      meta: `Checkpointer.latest_meta()`.
      mesh: of this start.
      config: of this start.
      may_reshard: any mesh will do.

    Raises:
      UsageError: naming both meshes and the cure.
    """
    old, new = meta.get("mesh"), describe(mesh, config)["mesh"]
    if may_reshard or old is None or old["asked"] != new["asked"] or old["shape"] == new["shape"]:
        return
    sizes = " ".join(f"--config.mesh.{name}={size}" for name, size in new["shape"].items())
    raise UsageError(
        f"the newest checkpoint of {workdir} was written on a {_told(old)}; this start has a "
        f"{_told(new)}, although config.mesh is the same. Are all hosts and devices there? "
        "If it is meant so, add --reshard, or write the mesh out: "
        f"{sizes} (same examples, same loss up to rounding)."
    )


def _told(mesh: Mapping[str, Any]) -> str:
    sizes = ", ".join(f"{name}={size}" for name, size in mesh["shape"].items())
    count = mesh["processes"]
    return f"mesh ({sizes}) of {mesh['device_kind']}, {count} process{'es' * (count > 1)}"


def _check_kept(workdir: str, keeps: Mapping[str, bytes]) -> None:
    is_new = not checkpoint.steps(workdir)
    for name, content in keeps.items():
        file = epath.Path(workdir).expanduser() / name
        if is_new or not file.exists():
            if jax.process_index() == 0:
                part = file.with_name(file.name + ".part")
                part.write_bytes(content)
                part.replace(file)
        elif file.read_bytes() != content:
            raise UsageError(
                f"{file} differs from this start's, and what was trained depends on it: the "
                f"{_ORIGIN.get(name, 'tokenizer')} was made again since. Give the old one, or use "
                "a new --workdir."
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
