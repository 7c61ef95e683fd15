"""The table of `doctor --dependencies`: lowest, pinned, installed and newest version of each."""

import pathlib
import re
import subprocess
import sys
from importlib import metadata

COLUMNS = ("package", "extra", "lowest", "pinned", "installed", "newest", "note")

# Known limits and deprecations; tests/engine/test_deprecations.py fails at any that is in use.
NOTES = {
    "jax": "0.10.2 is the last version for Python 3.11",
    "flax": "linen is called deprecated in flax's documentation, without a date of removal",
    "orbax-checkpoint": "max_to_keep and keep_period are deprecated, and not used",
    "numpy": "2.4.6 is the last version for Python 3.11",
    "scipy": "1.17.1 is the last version for Python 3.11",
}

_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[\w,]+\])?(?:>=([\w.]+))?(?:.*extra == ['\"](\w+)['\"])?")
_PIN = re.compile(r"([\w.-]+)==([\w.]+)(?:\s*;\s*python_version\s*(<|>=)\s*\"3\.(\d+)\")?")


def table(constraints: str, *, has_newest: bool = False) -> list[dict[str, str]]:
    """One row per declared dependency, with `COLUMNS` as keys; "" = none.

    Args:
      constraints: the file of pinned versions; an absent file pins nothing.
      has_newest: ask pip's index for the newest versions; "unknown" without an answer.
    """
    pinned = pins(constraints, sys.version_info[1])
    rows = []
    for text in metadata.requires("dalle-jax") or ():
        name, lowest, extra = _REQUIREMENT.match(text).groups(default="")
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed = ""
        newest, note = _newest(name) if has_newest else "", NOTES.get(name, "")
        row = (name, extra, lowest, pinned.get(_normal(name), ""), installed, newest, note)
        rows.append(dict(zip(COLUMNS, row, strict=True)))
    return rows


def pins(file: str, minor: int) -> dict[str, str]:
    """Name -> version in a constraints file, for Python 3.`minor`."""
    path, versions = pathlib.Path(file), {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        if match := _PIN.match(line):
            name, version, sign, bound = match.groups()
            if sign is None or (minor < int(bound)) == (sign == "<"):
                versions[_normal(name)] = version
    return versions


def as_text(rows: list[dict[str, str]]) -> str:
    """The table as text, without columns that are empty."""
    names = [name for name in COLUMNS if any(row[name] for row in rows)]
    lines = [names, *([row[name] for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def _newest(name: str) -> str:
    command = [sys.executable, "-m", "pip", "index", "versions", name]
    done = subprocess.run(command, capture_output=True, text=True)
    match = re.match(r"\S+ \(([\w.]+)\)", done.stdout)
    return match[1] if done.returncode == 0 and match else "unknown"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
