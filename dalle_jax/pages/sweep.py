"""The page of a sweep: its units ranked, groups over seeds, curves, commands."""

import datetime
from collections.abc import Mapping
from typing import Any

from dalle_jax.pages import charts, html

PAGE = "index.html"
MAX_CURVES = 8  # the colours of a chart


def page(results: Mapping[str, Any], curves: Mapping[str, charts.Series]) -> html.Page:
    """The page.

    Args:
      results: the content of results.json, see `sweeps.results.collect`.
      curves: name of a unit -> (steps, values of the metric), at most `MAX_CURVES`.
    """
    rows, metric = results["units"], results["metric"]
    done = sum(row["state"] == "done" for row in rows)
    failed = [row for row in rows if row["state"] == "failed"]
    better = "lower" if results["mode"] == "min" else "higher"
    page = html.Page(f"Sweep {results['xid']}", f"{len(rows)} runs of {results['config']}")
    page.section("Results", f"Ranked by `{metric}`; {better} is better.")
    facts = [
        ("done", f"{done} of {len(rows)}", f"{len(failed)} failed" if failed else "none failed")
    ]
    for row in rows:
        if row["wid"] == results["best"]:
            changes = ", ".join(f"{key}={value}" for key, value in row["overrides"].items())
            facts.append((f"best {metric}", f"{row['value']:.4g}", f"unit {row['wid']}: {changes}"))
    total = _duration(sum(row["seconds"] for row in rows))
    page.facts([*facts, ("time of all runs", total, "hours:minutes:seconds")])
    keys = dict.fromkeys(key for row in rows for key in row["overrides"])
    page.table(
        [
            {
                "unit": row["wid"],
                "state": row["state"],
                metric: row["value"],
                **_texts(row["overrides"]),
                "time": _duration(row["seconds"]),
            }
            for row in rows
        ],
        "All units, best first",
        ["unit", "state", metric, *keys, "time"],
    )
    if any(group["count"] > 1 for group in results["groups"]):
        page.table(
            [
                {
                    **_texts(group["overrides"]),
                    "mean": group["mean"],
                    "spread": group["spread"],
                    "seeds": group["count"],
                }
                for group in results["groups"]
            ],
            "Over seeds, best mean first; spread is the largest minus the smallest",
        )
    for row in failed:
        page.note(f"Unit {row['wid']} failed: {row['error'] or 'no message'}")
    if curves:
        page.section("Curves").chart(curves, metric, "step", metric)
    page.section("Commands", "Each unit is an ordinary run; its command continues or repeats it.")
    for row in rows:
        page.command(row["command"])
    return page


def _texts(overrides: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in overrides.items()}


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))  # 1:02:03
