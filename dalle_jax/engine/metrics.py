"""What a run says: console lines, metrics.jsonl, TensorBoard, preview pictures. Process 0 only.

One JSON object per event: {"step": 100, "kind": "train", "loss": …}. Training metrics are means
over the steps since the last event; `perf/…` are rates over the same interval (`observe.Meter`).
The event of kind "run" at the end has the rates and shares of the whole run.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from dalle_jax.config import ConfigDict
from dalle_jax.types import UsageError

METRICS = "metrics.jsonl"
PREVIEWS = "previews"


def say(text: str) -> None:
    """One line for the user, on process 0."""
    if jax.process_index() == 0:
        print(text, flush=True)


class Writer:
    """Writes the events of one run.

    Args:
      workdir: folder that gets metrics.jsonl, event files and previews/.
      config: `train.tensorboard`, `train.wandb_project` choose the sinks.
      first_step: the step that the run continues from. Events after it are of an interrupted run
        that will be repeated: they are dropped, so that a step is never told twice.

    Raises:
      UsageError: if wandb is asked for and not installed.
    """

    def __init__(self, workdir: str, config: ConfigDict, first_step: int = 0):
        self._dir = epath.Path(workdir)
        self._is_main = jax.process_index() == 0
        self._board = self._wandb = self._lines = None
        if not self._is_main:
            return
        self._dir.mkdir(parents=True, exist_ok=True)
        file = self._dir / METRICS
        kept = [line for line in read(workdir) if line["step"] <= first_step]
        part = self._dir / (METRICS + ".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in kept))
        part.replace(file)
        if config.train.wandb_project:
            self._wandb = _wandb(str(workdir), config)
        if config.train.tensorboard:
            self._board = _tensorboard(str(workdir), first_step)
        self._lines = file.open("a")

    def scalars(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """One event of kind "train", "eval" or "run"; values are Python or numpy scalars."""
        if not self._is_main:
            return
        values = {name: float(value) for name, value in values.items()}
        # JSON has no NaN: a strict reader would refuse the whole line.
        safe = {k: _rounded(v) if math.isfinite(v) else None for k, v in values.items()}
        self._lines.write(json.dumps({"step": step, "kind": kind, **safe}) + "\n")
        self._lines.flush()
        tagged = {name if "/" in name else f"{kind}/{name}": v for name, v in values.items()}
        if self._board:
            for name, value in tagged.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._wandb:
            self._wandb.log(tagged, step=step)

    def pictures(self, step: int, previews: Mapping[str, Any]) -> None:
        """Labelled grids: previews/<name>-<step>.png and TensorBoard.

        Args:
          step: number of finished steps.
          previews: name -> float images [n, h, w, 3] in [-1, 1].
        """
        from dalle_jax import images

        if not self._is_main:
            return
        folder = self._dir / PREVIEWS
        folder.mkdir(exist_ok=True)
        for name, value in previews.items():
            pixels = images.to_uint8(np.asarray(value))
            columns = max(1, round(math.sqrt(len(pixels) * 2)))
            scale = max(1, 128 // pixels.shape[1])
            picture = images.grid(pixels, columns=columns, scale=scale)
            picture.save(folder / f"{name}-{step}.png")
            if self._board:
                board = np.asarray(picture.convert("RGB"))
                self._board.add_image(f"preview/{name}", board, step, dataformats="HWC")

    def close(self) -> None:
        """Closes files."""
        for sink in (self._lines, self._board):
            if sink:
                sink.close()
        if self._wandb:
            self._wandb.finish()


def read(workdir: str) -> list[dict[str, Any]]:
    """The events of a run in order; a last line cut off by a kill is left out."""
    file = epath.Path(workdir) / METRICS
    events = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


def console_line(
    step: int, steps: int, values: Mapping[str, float], eta_s: float | None = None
) -> str:
    """`step 100/1000  loss 0.123  … | 812 images/s  … input wait 3%  ETA 0:12`."""
    plain = [f"{k} {_short(v)}" for k, v in values.items() if not k.startswith("perf/")]
    rates = []
    for name, value in values.items():
        what = name.removeprefix("perf/")
        if what == "tflops_per_device":
            small = value < 0.1
            unit = "GFLOP" if small else "TFLOP"
            rates.append(f"{value * 1000 if small else value:.3g} {unit}/s/device")
        elif what == "mfu_pct":
            rates.append(f"MFU {value:.1f}%")
        elif what == "input_wait_pct":
            rates.append(f"input wait {value:.0f}%")
        elif what.endswith("_per_s"):
            rates.append(f"{value:,.0f} {what.removesuffix('_per_s')}/s")
    if eta_s is not None:
        rates.append(f"ETA {duration(eta_s)}")
    end = " | " + "  ".join(rates) if rates else ""
    return f"step {step:>{len(str(steps))}}/{steps}  " + "  ".join(plain) + end


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def size(count: float) -> str:
    """1.2 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def _short(value: float) -> str:
    return f"{value:.4g}"


def _rounded(value: float) -> float:
    return float(f"{value:.9g}")  # float32 exactly


def _tensorboard(workdir: str, first_step: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        say("tensorboardX is not installed: no TensorBoard events (metrics.jsonl has them all).")
        return None
    return SummaryWriter(workdir, purge_step=first_step + 1 if first_step else None)


def _wandb(workdir: str, config: ConfigDict):
    try:
        import wandb
    except ImportError as error:
        raise UsageError(
            f"train.wandb_project={config.train.wandb_project!r} needs wandb: "
            "pip install 'dalle_jax[wandb]', or set it to ''."
        ) from error
    # id: a resumed run continues its page.
    name = epath.Path(workdir).name
    return wandb.init(
        project=config.train.wandb_project, dir=workdir, name=name, id=name, resume="allow",
        config=config.to_dict(),
    )  # fmt: skip
