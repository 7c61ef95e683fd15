"""What launch/demo.sh and the commands it runs leave in a folder, read for the pages of demos."""

import json
import pathlib
import re
import shlex
from collections.abc import Iterable
from typing import Any

from dalle_jax.engine import event_files


def read(demo: pathlib.Path, stages: Iterable[str]) -> dict[str, Any]:
    """The numbers in a demo's folder.

    Args:
      demo: the folder.
      stages: names of workdirs in it.

    Returns:
      `stages` (the last training and evaluation event of each), `evaluation` (the figures that
      `evaluate` wrote, or None), `samples` (what `sample` wrote for each prompt), `commands` and
      `seconds` of the steps, and `events` (all of them, by stage).
    """
    events = {name: event_files.read(str(demo / name)) for name in stages}
    commands, seconds = _steps(demo / "logs")
    return {
        "stages": {
            name: {
                kind: next((e for e in reversed(lines) if e["kind"] == kind), None)
                for kind in ("train", "eval")
            }
            for name, lines in events.items()
            if lines
        },
        "evaluation": read_json(demo / "evaluation" / "metrics.json"),
        "samples": read_scores(demo / "samples"),
        "commands": commands,
        "seconds": seconds,
        "events": events,
    }


def read_scores(folder: pathlib.Path) -> list[Any]:
    """The scores.json of each prompt for which `sample` wrote pictures into the folder."""
    return [read_json(path) for path in sorted(folder.glob("*/scores.json"))]


def read_json(path: pathlib.Path) -> Any:
    """The content of a JSON file; None if it is absent or was cut off."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def picture(folders: Iterable[pathlib.Path], file: str | None) -> pathlib.Path | None:
    """The file of a picture; None if it is absent.

    Args:
      folders: where it may be if the demo was moved: there with the last two parts of its path.
      file: its path when it was written.
    """
    if not file:
        return None
    path = pathlib.Path(file)
    candidates = [path, *(folder / path.parent.name / path.name for folder in folders)]
    return next((path for path in candidates if path.is_file()), None)


def preview(workdir: pathlib.Path, name: str = "*") -> pathlib.Path | None:
    """The newest grid of this name (`*` = any) among a run's previews."""

    def step(path: pathlib.Path) -> int:
        return int(re.search(r"-(\d+)$", path.stem).group(1))

    grids = (workdir / "previews").glob(f"{name}-*.png")
    return max((path for path in grids if re.search(r"-\d+$", path.stem)), key=step, default=None)


def _steps(logs: pathlib.Path) -> tuple[dict[str, str], dict[str, int]]:
    """Commands and seconds of the steps, from the demo's NAME.done files."""
    commands, seconds = {}, {}
    for path in sorted(logs.glob("*.done")):
        lines = path.read_text(encoding="utf-8").splitlines()
        if lines:
            commands[path.stem] = shlex.join(shlex.split(lines[0]))
        if len(lines) > 1 and lines[1].isdigit():
            seconds[path.stem] = int(lines[1])
    return commands, seconds
