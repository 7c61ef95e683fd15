"""The event files of a run: metrics.jsonl, TensorBoard, wandb, preview images. Process 0 only.

One JSON object per event: {"step": 100, "kind": "train", "loss": …}. Training metrics are means
over the steps since the last event; `perf/…` are rates over the same interval (`timing.Meter`).
The event of kind "run" at the end has the rates and shares over all of the run.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from dalle_jax.config import ConfigDict
from dalle_jax.engine import console
from dalle_jax.types import UsageError

METRICS = "metrics.jsonl"
PREVIEWS = "previews"


class Writer:
    """Writes the events of one run.

    Args:
      workdir: folder of metrics.jsonl, TensorBoard's event files and previews/.
      config: `train.tensorboard` and `train.wandb_project` choose the sinks.
      first_step: the step that the run continues from. Events after it come from an interrupted
        run whose steps will be repeated; they are dropped, so that no step is written twice.

    Raises:
      UsageError: if the config asks for wandb and it is not installed.
    """

    def __init__(self, workdir: str, config: ConfigDict, first_step: int = 0):
        self._dir = epath.Path(workdir)
        self._is_main = jax.process_index() == 0
        self._board = self._wandb = self._lines = None
        if not self._is_main:
            return
        self._dir.mkdir(parents=True, exist_ok=True)
        file = self._dir / METRICS
        events = [event for event in read(workdir) if event["step"] <= first_step]
        part = self._dir / (METRICS + ".part")
        part.write_text("".join(json.dumps(event) + "\n" for event in events))
        part.replace(file)
        if config.train.wandb_project:
            self._wandb = _wandb(str(workdir), config)
        if config.train.tensorboard:
            self._board = _tensorboard(str(workdir), first_step)
        self._lines = file.open("a")

    def scalars(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Writes one event of kind "train", "eval" or "run"; values are Python or numpy scalars."""
        if not self._is_main:
            return
        values = {name: float(value) for name, value in values.items()}
        # JSON has no NaN: a strict reader would refuse the line.
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

    def images(self, step: int, previews: Mapping[str, Any]) -> None:
        """Writes grids of images to previews/<name>-<step>.png and TensorBoard.

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
            grid = images.grid(pixels, columns=columns, scale=scale)
            grid.save(folder / f"{name}-{step}.png")
            if self._board:
                board = np.asarray(grid.convert("RGB"))
                self._board.add_image(f"preview/{name}", board, step, dataformats="HWC")

    def close(self) -> None:
        """Closes the files."""
        for sink in (self._lines, self._board):
            if sink:
                sink.close()
        if self._wandb:
            self._wandb.finish()


def read(workdir: str) -> list[dict[str, Any]]:
    """The events of a run in order, without a last line that a kill cut off."""
    file = epath.Path(workdir) / METRICS
    events = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


def final_metrics(workdir: str) -> dict[str, float]:
    """The last metrics in the events of a run, in the form that `loop.train` returns."""
    final: dict[str, float] = {}
    for event in read(workdir):
        kind, prefix = event.pop("kind"), ""
        if kind == "eval":
            final["step"], prefix = event.pop("step"), "eval/"
        final.update({f"{prefix}{k}": v for k, v in event.items() if not k.startswith("perf/")})
    return final


def _rounded(value: float) -> float:
    return float(f"{value:.9g}")  # float32 exactly


def _tensorboard(workdir: str, first_step: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        console.log(
            "tensorboardX is not installed: no TensorBoard events (metrics.jsonl has them all)."
        )
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
    # A resumed run continues the page with its id.
    name = epath.Path(workdir).name
    return wandb.init(
        project=config.train.wandb_project, dir=workdir, name=name, id=name, resume="allow",
        config=config.to_dict(),
    )  # fmt: skip
