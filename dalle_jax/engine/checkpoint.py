"""The files of a run: its config and checkpoints, or the weights of an exported stage.

    config.json                                  the config that the weights were trained with
    checkpoints/<step>/{params,ema,extra,opt,meta}   one orbax item each, committed by one rename

`meta` holds the step, the versions and the mesh that wrote the checkpoint; any mesh can read it.
With several processes, all of them write, read, and decide together which checkpoint to read.

A sampler reads `ema` (or `params`) and `extra` and never reads the optimiser's state. An exported
stage is a folder with `config.json`, `params.safetensors` and, for tasks with text,
`tokenizer.model`; `load_variables` reads both kinds of folder. No file is a pickle: loading one
runs no code from it.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dalle_jax import config as cfg
from dalle_jax.engine import distributed, safetensors, sharding
from dalle_jax.engine.train_state import TrainState
from dalle_jax.types import UsageError

# Orbax logs every save and every absent optional file; users get the messages of this module.
logging.getLogger("absl").setLevel(logging.ERROR)

logger = logging.getLogger(__name__)

# Names of leaves, "a/b/c", as in an exported file.
flatten, unflatten = safetensors.flatten, safetensors.unflatten

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
DAMAGED = "damaged"
WEIGHTS = "params.safetensors"
TOKENIZER = "tokenizer.model"
CODEC = "codec.fingerprint"  # fingerprint of the frozen codec that a run was trained with
CLIP = "clip.fingerprint"  # fingerprint of the frozen CLIP
ORIGIN = "origin.fingerprint"  # fingerprint of the run that a CLIP was exported from
PCA = "pca.npz"  # PCA of the CLIP's embeddings, where a run needs one


def absolute(folder: str) -> epath.Path:
    """The folder, with ~ and relative parts resolved; gs:// and its like stay as they are."""
    path = epath.Path(folder).expanduser()
    return path if "://" in str(folder) else path.resolve()


@dataclasses.dataclass(frozen=True)
class Variables:
    """A network's variables on the host.

    Attributes:
      params: nested dict of numpy arrays; the EMA weights where the run has them.
      extra: the task's non-trained variables (a codebook, counters), nested dict, or None.
      step: training step of the checkpoint.
    """

    params: Any
    extra: Any
    step: int


class Checkpointer:
    """Asynchronous checkpoints of one run: atomic, pruned, restorable on any mesh.

    Args:
      workdir: the run's folder; created if absent.
      config: the run's config. The `train.keep_last` newest checkpoints are preserved, and all
        whose step is a multiple of `train.keep_every_steps` (0 = none).
      meta: what each checkpoint stores beside the arrays, as JSON; see `workdir.describe`.
    """

    def __init__(self, workdir: str, config: cfg.ConfigDict, meta: Mapping[str, Any] | None = None):
        self._dir = absolute(workdir) / CHECKPOINTS
        self._config = config
        self._meta = dict(meta or {}, task=config.task, versions=_versions())
        self._saved = None
        self._dir.mkdir(parents=True, exist_ok=True)
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        train, policies = self._config.train, ocp.checkpoint_managers
        preserved = [policies.LatestN(max(1, train.keep_last))]
        if train.keep_every_steps:
            preserved.append(policies.EveryNSteps(train.keep_every_steps))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(preserved),
            # Orbax never restores the folder of a killed save, but by default leaves it on disk.
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        return ocp.CheckpointManager(self._dir, options=options)

    def save(self, step: int, state: TrainState, *, wait: bool = False) -> None:
        """Starts writing `state` as the checkpoint of `step`; returns before it is on disk.

        The arrays are copied off the device first, so the caller may donate them. After a kill at
        any time, the previous checkpoint is the newest. Saving a step twice is a no-op.

        Args:
          step: number of finished training steps.
          state: the training state.
          wait: return only when the checkpoint is committed.
        """
        if step not in (self._saved, self.latest_step()):
            items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
            meta = ocp.args.JsonSave(dict(self._meta, step=step))
            args = ocp.args.Composite(meta=meta, **items)
            self._manager.save(step, args=args)
            self._saved = step
        if wait:
            self._manager.wait_until_finished()

    def latest_step(self) -> int | None:
        """Step of the newest committed checkpoint, None without any."""
        return self._manager.latest_step()

    def latest_meta(self) -> dict[str, Any]:
        """Step, versions and `meta` of the newest checkpoint.

        Returns:
          {} without a checkpoint, or if the meta is damaged; `restore` reports damage.
        """
        try:
            reader = ocp.JsonCheckpointHandler()
            path = self._dir / str(self.latest_step()) / "meta"
            return reader.restore(path, args=ocp.args.JsonRestore())
        except Exception:  # as in `restore`
            return {}

    def restore(self, abstract_state: TrainState) -> tuple[TrainState, int]:
        """The newest readable checkpoint and its step, with the shardings of `abstract_state`.

        A checkpoint that cannot be read is moved to `damaged/`, and the one before it is read, with
        a warning: a truncated file costs `save_every_steps` steps and not the run. If one process
        cannot read its part, all of them fall back.

        Args:
          abstract_state: ShapeDtypeStructs with shardings, on any mesh.

        Raises:
          UsageError: if no checkpoint can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        problem = None
        for position, step in enumerate(steps):
            state = own_problem = None
            try:
                state = self._read(step, abstract_state)
            except Exception as error:  # orbax and tensorstore raise many kinds for a bad file
                if _is_not_damage(error):
                    raise
                problem = own_problem = error
            if not distributed.all_true(state is not None):
                logger.warning(
                    "checkpoint of step %d is damaged (%s); falling back to %s.",
                    step,
                    _first_line(own_problem) if own_problem else "for another process",
                    f"step {steps[position + 1]}" if position + 1 < len(steps) else "nothing",
                )
                continue
            if position:
                self._set_aside(steps[:position])
            return state, step
        raise UsageError(
            f"no checkpoint under {self._dir} fits this model and can be read (steps "
            f"{steps[::-1]}; last problem: {_first_line(problem)}). If the code or config "
            "changed, use a new --workdir; otherwise remove the damaged folder."
        ) from problem

    def _read(self, step: int, abstract_state: TrainState) -> TrainState:
        # Not with the manager, which waits for all processes at the end: those that can read their
        # part would wait for one that cannot.
        items, reader = _items(abstract_state), ocp.StandardCheckpointHandler()
        trees = {
            name: reader.restore(self._dir / str(step) / name, args=ocp.args.StandardRestore(tree))
            for name, tree in items.items()
        }
        reader.close()
        scalar = abstract_state.step
        number = sharding.place(np.asarray(step, scalar.dtype), scalar.sharding)
        return TrainState(
            step=number,
            params=trees["params"],
            ema=trees["ema"] if "ema" in items else abstract_state.ema,
            extra=trees["extra"] if "extra" in items else abstract_state.extra,
            opt_state=trees["opt"] if "opt" in items else abstract_state.opt_state,
        )

    def _set_aside(self, steps: list[int]) -> None:
        """Moves unreadable checkpoints away, so that their steps can be saved again."""
        self._manager.close()
        if jax.process_index() == 0:
            for step in steps:
                target = self._dir.parent / DAMAGED / str(step)
                target.parent.mkdir(exist_ok=True)
                if target.exists():
                    target.rmtree()
                (self._dir / str(step)).rename(target)
        distributed.wait_for_all("damaged checkpoints set aside")
        self._manager = self._open()

    def close(self) -> None:
        """Waits for a save in progress and releases the threads."""
        self._manager.wait_until_finished()
        self._manager.close()


def steps(workdir: str) -> list[int]:
    """Steps of the committed checkpoints of a workdir, ascending."""
    folder = absolute(workdir) / CHECKPOINTS
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def save_config(workdir: str, config: cfg.ConfigDict) -> None:
    """Writes `config.json` by a rename, so that a reader never sees a part of it."""
    folder = absolute(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / (CONFIG + ".part")
    part.write_text(cfg.to_json(config) + "\n")
    part.replace(folder / CONFIG)


def load_config(workdir: str) -> cfg.ConfigDict:
    """The locked config stored in a workdir or exported folder.

    Raises:
      UsageError: if the folder is neither.
    """
    file = absolute(workdir) / CONFIG
    if not file.exists():
        raise UsageError(
            f"{workdir} is not a workdir: it has no {CONFIG}. Expected the --workdir of "
            "`python -m dalle_jax train`, or a folder written by `export`."
        )
    try:
        return cfg.from_json(file.read_text())
    except json.JSONDecodeError as error:
        raise UsageError(f"{file} is not valid JSON ({error}); restore it from a copy.") from error


def load_variables(workdir: str, step: int | None = None) -> Variables:
    """Weights of a stage as host arrays; the optimiser is not read.

    Args:
      workdir: a training workdir or an exported folder.
      step: the step of the checkpoint; None = the newest readable one. An exported folder has
        only one.

    Returns:
      Variables with the EMA weights where the run has them. Exported half-precision weights
      become float32.

    Raises:
      UsageError: if there is no such checkpoint.
    """
    folder = absolute(workdir)
    config = load_config(workdir)
    if (folder / WEIGHTS).exists():
        return Variables(
            *safetensors.decode((folder / WEIGHTS).read_bytes(), str(folder / WEIGHTS))
        )
    known = steps(workdir)
    if step is not None and step not in known:
        raise UsageError(f"{workdir} has no checkpoint of step {step}; it has {known}.")
    if not known:
        raise UsageError(
            f"{workdir} has no checkpoint yet; train it first with "
            f"`python -m dalle_jax train --workdir={workdir}` (task {config.task!r})."
        )
    problem = None
    for number in [step] if step is not None else reversed(known):
        path = folder / CHECKPOINTS / str(number)
        weights = "ema" if (path / "ema").exists() else "params"
        try:
            params = _read_item(path / weights)
            extra = _read_item(path / "extra") if (path / "extra").exists() else None
            return Variables(params, extra, number)
        except Exception as error:  # as in Checkpointer.restore
            problem = error
            logger.warning("%s is damaged (%s).", path, _first_line(error))
    raise UsageError(
        f"no checkpoint of {workdir} can be read; last problem: {_first_line(problem)}."
    ) from problem


def export(workdir: str, out_dir: str, dtype: str = "float16") -> dict[str, Any]:
    """Writes a small folder: config, weights as safetensors, tokenizer, PCA, fingerprints.

    The exported config has no path of this machine: `data.data_dir` and `init_from` keep their last
    name, `stages` is empty (an exported DALL-E reads its codec from the folder `dvae` beside it).

    Args:
      workdir: the run to export, with its EMA weights where it has them.
      out_dir: the new folder; created if absent, files in it are replaced.
      dtype: storage of floating arrays: float16, bfloat16 or float32. Integers are unchanged.

    Returns:
      {"step", "parameters" (count), "bytes" (of the weights file)}.

    Raises:
      UsageError: for an unknown dtype, or a weight that float16 cannot represent.
    """
    if dtype not in safetensors.DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown; use one of {', '.join(safetensors.DTYPES)}.")
    config = load_config(workdir)
    variables = load_variables(workdir)
    data = safetensors.encode(variables.params, variables.extra, variables.step, dtype)
    folder = absolute(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(data)
    save_config(out_dir, _portable(config))
    for name in (TOKENIZER, PCA, CLIP, ORIGIN):
        file = absolute(workdir) / name
        if file.exists() and folder != file.parent:
            (folder / name).write_bytes(file.read_bytes())
    count = sum(np.size(x) for x in jax.tree.leaves((variables.params, variables.extra)))
    return {"step": variables.step, "parameters": count, "bytes": len(data)}


def _portable(config: cfg.ConfigDict) -> cfg.ConfigDict:
    """The config without paths of the machine that it ran on."""
    changes = {}
    for key, value in cfg.flatten(config).items():
        if key in ("data.data_dir", "init_from"):
            changes[key] = epath.Path(value).name
        elif key.startswith("stages.") and isinstance(value, str):
            changes[key] = ""
    return cfg.override(config, changes)


def _items(state: TrainState) -> dict[str, Any]:
    """Orbax items of a state; absent collections have no item (orbax refuses empty trees)."""
    trees = dict(params=state.params, ema=state.ema, extra=state.extra, opt=state.opt_state)
    return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}


def _read_item(path: epath.Path) -> Any:
    """One item as nested numpy arrays, from any devices."""
    # Not with an orbax Checkpointer, which waits for all processes: one may read alone.
    reader = ocp.PyTreeCheckpointHandler()
    tree = reader.metadata(path).tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    read = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    reader.close()
    return read


def _versions() -> dict[str, str]:
    from importlib import metadata

    return {name: metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")}


def _is_not_damage(error: Exception) -> bool:
    """Whether the checkpoint may be intact: no memory to read it, or no permission."""
    return isinstance(error, MemoryError | PermissionError) or "RESOURCE_EXHAUSTED" in str(error)


def _first_line(error: BaseException | None) -> str:
    text = str(error).strip().splitlines()
    return (text[0][:200] if text else type(error).__name__) if error else "none"
