"""What a suite returns: figures for JSON, and pictures for a page."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dalle_jax.evaluation import progress

DALLE = "dalle"  # `prior` of a run that measures DALL-E 1 beside DALL-E 2
_SETTINGS = ("prior", "guidance", "eta", "temperature")  # that name a run, in this order


class Row(NamedTuple):
    """Pictures side by side: uint8 [n, h, w, 3], with a label for each."""

    title: str
    images: np.ndarray
    labels: Sequence[str]


class Result(NamedTuple):
    """What a suite measured: numbers, texts, lists and dictionaries; and some of the pictures."""

    figures: dict[str, Any]
    rows: Sequence[Row] = ()


def run_title(settings: dict) -> str:
    """The settings that distinguish a run from the others: `prior none, guidance 2`."""
    named = {name: settings[name] for name in _SETTINGS if name in settings}
    return ", ".join(f"{k} {v if isinstance(v, str) else f'{v:g}'}" for k, v in named.items())


def measure_runs(
    runs: Iterable[tuple[dict, Any]], measure: Callable[[Any], Result], report: progress.Report
) -> Result:
    """One suite under several settings.

    Args:
      runs: the settings that name a run, and its generator.
      measure: generator -> what the suite measures.
      report: called with the title of each run.

    Returns:
      `{"runs": [settings and figures]}`, and the rows of all runs, those of equal content together.
    """
    figures, rows = [], []
    for settings, generator in runs:
        title = run_title(settings)
        report(title)
        result = measure(generator)
        figures.append({**settings, **result.figures})
        rows.append(
            [row._replace(title=f"{row.title}: {title}".removeprefix(": ")) for row in result.rows]
        )
    return Result({"runs": figures}, [row for equal in zip(*rows, strict=True) for row in equal])


def rounded(value: Any) -> Any:
    """The value with its floats rounded to five digits: more than n prompts can resolve."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 5) if isinstance(value, float) else value
