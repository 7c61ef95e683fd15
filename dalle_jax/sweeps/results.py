"""The results of a sweep: results.json, the config of the best unit, a table for the terminal."""

import json
import math
import pprint
from collections.abc import Sequence
from typing import Any

from etils import epath

from dalle_jax.engine import console, event_files
from dalle_jax.sweeps import units
from dalle_jax.sweeps.units import Sweep

RESULTS, BEST = "results.json", "best.py"


def collect(sweep: Sweep) -> dict[str, Any]:
    """The sweep's results as plain data, best unit first, those without a value last.

    Returns:
      xid, config, metric, mode, `units` (wid, state, step, steps, overrides, `value` of the metric
      or None, all `metrics`, seconds, error, workdir, command), `groups` (units that differ only
      in seed: overrides, mean, spread = max - min, count) and `best`, a wid or None.
    """
    sign = 1 if sweep.mode == "min" else -1
    rows = []
    for wid in sweep.wids:
        status = units.status(sweep, wid)
        metrics = event_files.final_metrics(sweep.workdir(wid))
        value = metrics.get(sweep.metric) if status["state"] == units.DONE else None
        rows.append(
            {
                "wid": wid,
                **{name: status.get(name) for name in ("state", "step", "steps")},
                "overrides": sweep.units[wid - 1],
                "value": value,
                "metrics": metrics,
                "seconds": status.get("seconds", 0.0),
                "error": status.get("error", ""),
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
    """Writes results.json and, once a unit has a value, best.py; returns `collect`'s results."""
    results = collect(sweep)
    folder = epath.Path(sweep.folder)
    units.write_json(folder / RESULTS, results)
    if results["best"] is not None:
        (folder / BEST).write_text(_best_config(sweep, results))
    return results


def curves(results: dict[str, Any], count: int) -> dict[str, tuple[Sequence, Sequence]]:
    """ "unit WID" -> (steps, values of the metric at them), for the `count` best units."""
    kind, _, name = results["metric"].rpartition("/")
    series = {}
    for row in results["units"][:count]:
        points = [
            (event["step"], event[name])
            for event in event_files.read(row["workdir"])
            if event["kind"] == (kind or "train") and event.get(name) is not None
        ]
        if len(points) > 1:
            series[f"unit {row['wid']}"] = tuple(zip(*points, strict=True))
    return series


def table(results: dict[str, Any]) -> str:
    """The results as text: one line per unit, best first."""
    lines = [("unit", "state", results["metric"], "time", "changes")]
    for row in results["units"]:
        value = "-" if row["value"] is None else f"{row['value']:.6g}"
        state = row["state"]
        if state == units.STARTED:
            state += f" {row['step']}/{row['steps']}"
        changes = " ".join(f"{k}={v}" for k, v in row["overrides"].items())
        mark = "*" if row["wid"] == results["best"] else " "
        time = console.format_duration(row["seconds"])
        lines.append((f"{row['wid']}{mark}", state, value, time, changes))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    text = [
        "  ".join(
            cell.ljust(width) for cell, width in zip(line, (*widths, 0), strict=True)
        ).rstrip()
        for line in lines
    ]
    failed = [row for row in results["units"] if row["state"] == units.FAILED]
    text += [
        f"unit {row['wid']} failed: {row['error'] or 'no message'} ({row['workdir']}/{units.LOG})"
        for row in failed
    ]
    return "\n".join(text)


def missing_metric(results: dict[str, Any]) -> str:
    """A sentence on a metric that no finished unit has; "" if one has it."""
    done = [row for row in results["units"] if row["state"] == units.DONE]
    if not done or any(row["value"] is not None for row in done):
        return ""
    known = sorted({name for row in done for name in row["metrics"]})
    return f"no unit has the metric {results['metric']!r}; they have {', '.join(known)}."


def _but_seed(row: dict[str, Any]) -> units.Overrides:
    return {key: value for key, value in row["overrides"].items() if key != "seed"}


def _groups(rows: list[dict[str, Any]], sign: int) -> list[dict[str, Any]]:
    """Units that differ only in seed, best mean first: one lucky seed is no better setting."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["value"] is not None and math.isfinite(row["value"]):
            groups.setdefault(json.dumps(_but_seed(row), sort_keys=True), []).append(row)
    summaries = []
    for members in groups.values():
        values = [row["value"] for row in members]
        summaries.append(
            {
                "overrides": _but_seed(members[0]),
                "mean": sum(values) / len(values),
                "spread": max(values) - min(values),
                "count": len(values),
            }
        )
    return sorted(summaries, key=lambda group: sign * group["mean"])


def _best_config(sweep: Sweep, results: dict[str, Any]) -> str:
    """A config file that trains the best unit again."""
    wid = results["best"]
    value = next(row["value"] for row in results["units"] if row["wid"] == wid)
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
