"""Pretrained sets that ship with the package: a folder per stage."""

import pathlib

from dalle_jax.types import UsageError

ROOT = pathlib.Path(__file__).resolve().parent.parent / "pretrained"
STAGES = (
    "dvae", "clip", "dalle",
    "prior", "prior_ar", "decoder", "inpaint", "upsampler_1", "upsampler_2",
)  # fmt: skip


def names() -> list[str]:
    """The sets of this installation."""
    return sorted(p.name for p in ROOT.iterdir() if p.is_dir()) if ROOT.is_dir() else []


def folders(name: str) -> dict[str, str]:
    """Stage name -> folder of a pretrained set.

    Raises:
      UsageError: for an unknown name; the text lists the known ones.
    """
    if name not in names():
        known = ", ".join(names()) or "none in this installation"
        raise UsageError(f"there is no pretrained set {name!r}; known sets: {known}.")
    return {stage: str(ROOT / name / stage) for stage in STAGES if (ROOT / name / stage).is_dir()}
