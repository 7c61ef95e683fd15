"""What came of a sweep: a table for the terminal, results.json, a page, the best config."""

import json
import math
import pprint
from typing import Any

from etils import epath

from dalle_jax.engine import console, event_files
from dalle_jax.pages import charts, html
from dalle_jax.sweeps import units
from dalle_jax.sweeps.units import Sweep

RESULTS, PAGE, BEST = "results.json", "index.html", "best.py"

_MAX_CURVES = 8  # the colours of a chart


def collect(sweep: Sweep) -> dict[str, Any]:
    """The sweep's results as plain data, best unit first, those without a value last.

    Returns:
      xid, config, metric, mode, `units` (wid, state, step, steps, overrides, `value` of the metric
      or None, all `metrics`, seconds, error, workdir, command), `groups` (units that differ in
      seed alone: overrides, mean, spread = max - min, count) and `best`, a wid or None.
    """
    sign = 1 if sweep.mode == "min" else -1
    rows = []
    for wid in sweep.wids:
        found = units.status(sweep, wid)
        final = event_files.final_metrics(sweep.workdir(wid))
        value = final.get(sweep.metric) if found["state"] == units.DONE else None
        rows.append(
            {
                "wid": wid,
                **{name: found.get(name) for name in ("state", "step", "steps")},
                "overrides": sweep.units[wid - 1],
                "value": value,
                "metrics": final,
                "seconds": found.get("seconds", 0.0),
                "error": found.get("error", ""),
                "workdir": sweep.workdir(wid),
                "command": sweep.command(wid),
            }
        )
    rows.sort(key=lambda row: (row["value"] is None, sign * (row["value"] or 0), row["wid"]))
    groups = _groups(rows, sign)
    in_best = [row for row in rows if groups and _but_seed(row) == groups[0]["overrides"]]
    return {
        "xid": sweep.xid,
        "config": sweep.config,
        "overrides": sweep.common,
        "metric": sweep.metric,
        "mode": sweep.mode,
        "best": next((row["wid"] for row in in_best if row["value"] is not None), None),
        "groups": groups,
        "units": rows,
    }


def write(sweep: Sweep) -> dict[str, Any]:
    """Writes results.json, index.html and, once a unit has a value, best.py; returns `collect`."""
    found = collect(sweep)
    folder = epath.Path(sweep.folder)
    units.write_json(folder / RESULTS, found)
    (folder / PAGE).write_text(_page(sweep, found).html())
    if found["best"] is not None:
        (folder / BEST).write_text(_best_config(sweep, found))
    return found


def table(found: dict[str, Any]) -> str:
    """The results as text: one line per unit, best first."""
    lines = [("unit", "state", found["metric"], "time", "changes")]
    for row in found["units"]:
        value = "-" if row["value"] is None else f"{row['value']:.6g}"
        state = row["state"]
        if state == units.STARTED:
            state += f" {row['step']}/{row['steps']}"
        changes = " ".join(f"{k}={v}" for k, v in row["overrides"].items())
        mark = "*" if row["wid"] == found["best"] else " "
        time = console.format_duration(row["seconds"])
        lines.append((f"{row['wid']}{mark}", state, value, time, changes))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    text = [
        "  ".join(
            cell.ljust(width) for cell, width in zip(line, (*widths, 0), strict=True)
        ).rstrip()
        for line in lines
    ]
    failed = [row for row in found["units"] if row["state"] == units.FAILED]
    text += [
        f"unit {row['wid']} failed: {row['error'] or 'no message'} ({row['workdir']}/{units.LOG})"
        for row in failed
    ]
    return "\n".join(text)


def missing_metric(found: dict[str, Any]) -> str:
    """A sentence about a metric that no finished unit has; "" when there is one."""
    done = [row for row in found["units"] if row["state"] == units.DONE]
    if not done or any(row["value"] is not None for row in done):
        return ""
    known = sorted({name for row in done for name in row["metrics"]})
    return f"no unit has the metric {found['metric']!r}; they have {', '.join(known)}."


def _but_seed(row: dict[str, Any]) -> units.Overrides:
    return {key: value for key, value in row["overrides"].items() if key != "seed"}


def _groups(rows: list[dict[str, Any]], sign: int) -> list[dict[str, Any]]:
    """Units that differ in seed alone, best mean first: one lucky seed is no better setting."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["value"] is not None and math.isfinite(row["value"]):
            groups.setdefault(json.dumps(_but_seed(row), sort_keys=True), []).append(row)
    found = []
    for members in groups.values():
        values = [row["value"] for row in members]
        found.append(
            {
                "overrides": _but_seed(members[0]),
                "mean": sum(values) / len(values),
                "spread": max(values) - min(values),
                "count": len(values),
            }
        )
    return sorted(found, key=lambda group: sign * group["mean"])


def _best_config(sweep: Sweep, found: dict[str, Any]) -> str:
    """A config file that trains the best unit again."""
    wid = found["best"]
    value = next(row["value"] for row in found["units"] if row["wid"] == wid)
    body = pprint.pformat(sweep.load_config(wid).to_dict(), width=92, sort_dicts=False)
    return (
        f'"""Unit {wid} of {sweep.folder}, the best of {len(sweep.units)}: '
        f'{sweep.metric} {value:.6g}."""\n\n'
        "from dalle_jax import config as cfg\n\n"
        f"CONFIG = {body}\n\n\n"
        "def get_config(arg: str | None = None) -> cfg.ConfigDict:\n"
        '    """The whole config of that unit."""\n'
        "    cfg.parse_args(arg)\n"
        "    return cfg.ConfigDict(CONFIG)\n"
    )


def _page(sweep: Sweep, found: dict[str, Any]) -> html.Page:
    rows = found["units"]
    done = sum(row["state"] == units.DONE for row in rows)
    failed = sum(row["state"] == units.FAILED for row in rows)
    better = "lower" if sweep.mode == "min" else "higher"
    page = html.Page(f"Sweep {sweep.xid}", f"{len(rows)} runs of {sweep.config}")
    page.section("Results", f"Ranked by `{sweep.metric}`; {better} is better.")
    facts = [("done", f"{done} of {len(rows)}", f"{failed} failed" if failed else "none failed")]
    if found["best"] is not None:
        best = next(row for row in rows if row["wid"] == found["best"])
        changes = ", ".join(f"{k}={v}" for k, v in best["overrides"].items())
        facts.append(
            (f"best {sweep.metric}", f"{best['value']:.4g}", f"unit {best['wid']}: {changes}")
        )
    spent = console.format_duration(sum(row["seconds"] for row in rows))
    page.facts([*facts, ("time of all runs", spent, "hours:minutes:seconds")])
    page.table(
        [
            {
                "unit": row["wid"],
                "state": row["state"],
                sweep.metric: row["value"],
                **{key: str(value) for key, value in row["overrides"].items()},
                "time": console.format_duration(row["seconds"]),
            }
            for row in rows
        ],
        "All units, best first",
        ["unit", "state", sweep.metric, *_keys(rows), "time"],
    )
    if any(group["count"] > 1 for group in found["groups"]):
        page.table(
            [
                {
                    **{key: str(value) for key, value in group["overrides"].items()},
                    "mean": group["mean"],
                    "spread": group["spread"],
                    "seeds": group["count"],
                }
                for group in found["groups"]
            ],
            "Over seeds, best mean first; spread is the largest minus the smallest",
        )
    for row in rows:
        if row["state"] == units.FAILED:
            page.note(f"Unit {row['wid']} failed: {row['error'] or 'no message'}")
    series = _curves(sweep, rows)
    if series:
        page.section("Curves").chart(series, sweep.metric, "step", sweep.metric)
    page.section("Commands", "Each unit is an ordinary run; its command continues or repeats it.")
    for row in rows:
        page.command(row["command"])
    return page


def _keys(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row["overrides"]))


def _curves(sweep: Sweep, rows: list[dict[str, Any]]) -> dict[str, charts.Series]:
    """The metric over the steps, of the best units."""
    kind, _, name = sweep.metric.rpartition("/")
    series = {}
    for row in rows[:_MAX_CURVES]:
        points = [
            (event["step"], event[name])
            for event in event_files.read(row["workdir"])
            if event["kind"] == (kind or "train") and event.get(name) is not None
        ]
        if len(points) > 1:
            series[f"unit {row['wid']}"] = tuple(zip(*points, strict=True))
    return series
