"""Work units, the runs of a sweep: their configs, folders and progress.

    WORKDIR/XID/sweep.json         the definition: config, overrides of all units, metric
    WORKDIR/XID/results.json, index.html, best.py        see `results`
    WORKDIR/XID/WID/               an ordinary workdir of `train`
    WORKDIR/XID/WID/unit.json      the unit's exit code, written by the process that ran it

XID numbers the sweeps in one WORKDIR from 1, WID the units in one sweep from 1. The same definition
has the same XID, so the same command continues the sweep. The state of a unit is read from its
folder alone, on whichever machine it runs.
"""

import dataclasses
import json
import shlex
from typing import Any

from etils import epath

from dalle_jax import config as cfg
from dalle_jax.engine import event_files
from dalle_jax.types import UsageError

SWEEP = "sweep.json"
UNIT = "unit.json"
LOG = "log.txt"

WAITING, STARTED, DONE, FAILED = "waiting", "started", "done", "failed"

Overrides = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep and its folder.

    Attributes:
      folder: WORKDIR/XID.
      config: `FILE[:ARGS]`, as in `train`.
      common: overrides in every unit, dotted keys.
      units: overrides in each unit; unit WID is units[WID - 1].
      metric: name of the metric that ranks units, e.g. `eval/loss`.
      mode: "min" or "max", which of two values is better.
    """

    folder: str
    config: str
    common: Overrides
    units: tuple[Overrides, ...]
    metric: str
    mode: str

    @property
    def xid(self) -> str:
        """The sweep's number in its WORKDIR, or its name."""
        return epath.Path(self.folder).name

    @property
    def wids(self) -> range:
        """Numbers of all units."""
        return range(1, len(self.units) + 1)

    def workdir(self, wid: int) -> str:
        """The unit's folder."""
        return str(epath.Path(self.folder) / str(wid))

    def overrides(self, wid: int) -> Overrides:
        """All overrides of the unit's config."""
        return {**self.common, **self.units[wid - 1]}

    def load_config(self, wid: int) -> cfg.ConfigDict:
        """The unit's whole config, locked.

        Raises:
          UsageError: for an unknown field or a value of the wrong type.
        """
        return cfg.override(cfg.load(self.config), self.overrides(wid))

    def train_arguments(self, wid: int) -> list[str]:
        """Arguments of `train` for the unit."""
        changes = [f"--config.{key}={_text(v)}" for key, v in self.overrides(wid).items()]
        return [f"--config={self.config}", *changes, f"--workdir={self.workdir(wid)}"]

    def command(self, wid: int) -> str:
        """The unit's command for a shell."""
        return shlex.join(["python", "-m", "dalle_jax", "train", *self.train_arguments(wid)])

    def save(self) -> None:
        """Writes the definition."""
        folder = epath.Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        values = {k: v for k, v in dataclasses.asdict(self).items() if k != "folder"}
        write_json(folder / SWEEP, values)

    def defines(self) -> dict[str, Any]:
        """The fields in which equal sweeps agree; the metric is none of them, it only ranks."""
        values = dict(config=self.config, common=self.common, units=self.units)
        return json.loads(json.dumps(values))


def define(
    workdir: str,
    config: str,
    common: Overrides,
    units: list[Overrides],
    metric: str,
    mode: str,
    xid: str = "",
    *,
    is_blind: bool = False,
) -> Sweep:
    """The sweep with these runs, which WORKDIR may already hold, or a new one.

    Args:
      workdir: folder of all sweeps of a kind.
      config: `FILE[:ARGS]`.
      common: overrides in every unit.
      units: overrides in each unit.
      metric: the metric that ranks the units.
      mode: "min" or "max".
      xid: name of the sweep; "" = the name of an equal sweep, or the next number.
      is_blind: treat WORKDIR as empty without reading it.

    Raises:
      UsageError: for no units, two equal units, a unit that the config refuses, or an xid that
        holds another sweep.
    """
    if not units:
        raise UsageError("the sweep has no units: get_hyper() returned an empty list.")
    folder = epath.Path(workdir)
    sweep = Sweep(str(folder / (xid or "new")), config, common, tuple(units), metric, mode)
    seen: dict[str, int] = {}
    for wid in sweep.wids:
        text = cfg.to_json(sweep.load_config(wid))
        if text in seen:
            raise UsageError(
                f"units {seen[text]} and {wid} are the same run, {units[wid - 1]}; sweep another "
                "value, or seed, to repeat one."
            )
        seen[text] = wid
    files = () if is_blind else folder.glob(f"*/{SWEEP}")
    known = {path.parent.name: load(str(path.parent)) for path in files}
    if xid:
        if xid in known and known[xid].defines() != sweep.defines():
            raise UsageError(
                f"{sweep.folder} holds another sweep ({known[xid].config}, {len(known[xid].units)} "
                "units); choose another --xid, or leave it out."
            )
        return sweep
    for name, other in known.items():
        if other.defines() == sweep.defines():
            return dataclasses.replace(sweep, folder=str(folder / name))
    number = 1 + max((int(name) for name in known if name.isdigit()), default=0)
    return dataclasses.replace(sweep, folder=str(folder / str(number)))


def load(folder: str) -> Sweep:
    """The sweep in the folder WORKDIR/XID.

    Raises:
      UsageError: if there is none.
    """
    file = epath.Path(folder) / SWEEP
    if not file.exists():
        raise UsageError(f"{file} does not exist; start the sweep with --config first.")
    values = json.loads(file.read_text())
    return Sweep(str(folder), **{**values, "units": tuple(values["units"])})


def from_text(texts: list[str]) -> list[Overrides]:
    """Units from texts like `optim.lr=1e-3,3e-3`: every combination of their values.

    Values that are lists are written as JSON: `model.attention=[["row"],["row","column"]]`.

    Raises:
      UsageError: for a text without values.
    """
    axes = []
    for text in texts:
        key, _, values = text.partition("=")
        if values.startswith("["):
            try:
                items = json.loads(values)
            except json.JSONDecodeError as error:
                raise UsageError(f"--sweep={text}: {values} is not a JSON list.") from error
        else:
            items = [item for item in values.split(",") if item]
        if not key or not items:
            raise UsageError(f"--sweep={text} has no values; write --sweep optim.lr=1e-3,3e-3.")
        axes.append(cfg.sweep(key, items))
    return cfg.product(*axes)


def status(sweep: Sweep, wid: int) -> dict[str, Any]:
    """The progress of a unit.

    Returns:
      `state` (waiting, started, done or failed), `step` and `steps`; from unit.json, where it
      exists, `exit_code`, `seconds` over all attempts and `error`, its last line of output.
    """
    folder = epath.Path(sweep.workdir(wid))
    file = folder / UNIT
    ended = json.loads(file.read_text()) if file.exists() else {}
    events = event_files.read(str(folder))
    steps = sweep.load_config(wid).train.steps
    step = events[-1]["step"] if events else 0
    state = ended.get("state", STARTED if events else WAITING)
    return {"state": state, "step": step, "steps": steps, **ended}


def record(sweep: Sweep, wid: int, exit_code: int, seconds: float, error: str = "") -> None:
    """Writes the end of a unit: exit code 0 is done, 130 and 143 are started, others failed."""
    folder = epath.Path(sweep.workdir(wid))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / UNIT
    before = json.loads(file.read_text())["seconds"] if file.exists() else 0.0
    state = {0: DONE, 130: STARTED, 143: STARTED}.get(exit_code, FAILED)
    values = dict(state=state, exit_code=exit_code, seconds=round(before + seconds, 1))
    write_json(file, {**values, "error": error if state == FAILED else ""})


def to_run(sweep: Sweep, *, retry: bool) -> list[int]:
    """Units that are neither done nor, unless `retry`, failed."""
    skip = {DONE} if retry else {DONE, FAILED}
    return [wid for wid in sweep.wids if status(sweep, wid)["state"] not in skip]


def write_json(file: epath.Path, values: Any) -> None:
    """Writes by a rename, so that a reader never sees a part of it."""
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(values, indent=1) + "\n")
    part.replace(file)


def _text(value: Any) -> str:
    """A config value on a command line; lists as `config.override` reads them."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(value)
