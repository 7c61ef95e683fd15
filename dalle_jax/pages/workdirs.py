"""What launch/demo.sh and the commands it runs leave in a folder, read for `report`."""

import json
import pathlib
import re
import shlex
from typing import Any


def notes(logs: pathlib.Path) -> tuple[dict[str, str], dict[str, int]]:
    """Commands and seconds of the steps, from the demo's NAME.done files."""
    commands, seconds = {}, {}
    for path in sorted(logs.glob("*.done")):
        lines = path.read_text(encoding="utf-8").splitlines()
        if lines:
            commands[path.stem] = shlex.join(shlex.split(lines[0]))
        if len(lines) > 1 and lines[1].isdigit():
            seconds[path.stem] = int(lines[1])
    return commands, seconds


def scores(folder: pathlib.Path) -> list[pathlib.Path]:
    """The scores.json of every prompt that `sample` drew into the folder."""
    return sorted(folder.glob("*/scores.json"))


def read_json(path: pathlib.Path) -> Any:
    """What a JSON file holds; None if there is none or it was cut off."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def beside(folder: pathlib.Path, file: str) -> pathlib.Path | None:
    """The picture, also after the folder was moved: its last two parts are kept under `folder`."""
    path = pathlib.Path(file)
    for candidate in (path, folder / path.parent.name / path.name):
        if candidate.is_file():
            return candidate
    return None


def preview(workdir: pathlib.Path, name: str = "reconstructions") -> pathlib.Path | None:
    """The newest grid of this name (`*` = any) among a run's previews."""

    def step(path: pathlib.Path) -> int:
        return int(re.search(r"-(\d+)$", path.stem).group(1))

    grids = (workdir / "previews").glob(f"{name}-*.png")
    return max((path for path in grids if re.search(r"-\d+$", path.stem)), key=step, default=None)
