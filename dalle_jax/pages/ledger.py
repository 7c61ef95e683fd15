"""The page of the plan ledger: all shipped configs on at least five topologies, in Markdown."""

from collections.abc import Mapping, Sequence

from dalle_jax.pages import plan

_HEAD = """# The cost of every config, by compiling

`python -m dalle_jax plan --docs docs/plans.md` writes this page. It compiles the training step of
each config for each topology and measures nothing: memory is the compiler's allocation, seconds are
its estimate (`est.`, TPU only, without waiting for collectives) or the floor at the peak rate
(`fl.`). `python -m dalle_jax plan --config=… --topology=…` prints one plan in full; `plan --help`
defines the figures.

GiB are per device: the peak of the available memory, and the training state in it. Work is in TFLOP
per sample, model and hardware (with recomputation and masked scores). Seconds per sample are
chip-seconds. MFU is its upper bound in that time. Days are for all of the config's `train.steps`.
"""

_COLUMNS = (
    "topology", "mesh", "batch", "peak / GiB", "state", "model", "hardware", "s/sample", "MFU",
    "images/s", "days", "chip-days",
)  # fmt: skip


def page(records: Mapping[str, plan.Record], cases: Mapping[str, Sequence[str]]) -> str:
    """The page, in Markdown.

    Args:
      records: "CONFIG TOPOLOGY" -> record of the plan; a missing one is "not compiled yet".
      cases: config -> names of topologies, in the order of the page.
    """
    parts, not_compiled = [_HEAD], []
    for config, names in cases.items():
        plans = {name: records.get(f"{config} {name}") for name in names}
        compiled = {name: record for name, record in plans.items() if record}
        if not compiled:
            not_compiled.append(f"`{config}`")
            continue
        params = next(iter(compiled.values()))["params"]
        rows = [_COLUMNS, ("---",) * len(_COLUMNS)]
        rows += [_row(name, record) for name, record in plans.items()]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        parts.append(f"\n## {config}, {params:,} parameters\n\n" + "\n".join(lines) + "\n")
        notes: dict[str, list[str]] = {}
        for name, record in compiled.items():
            for note in record["notes"]:
                notes.setdefault(note, []).append(name)
        parts += [f"\n{', '.join(topologies)}: {note}\n" for note, topologies in notes.items()]
    if not_compiled:
        parts.append(f"\n## Not compiled yet\n\n{', '.join(not_compiled)}\n")
    return "".join(parts)


def _row(name: str, record: plan.Record | None) -> tuple[str, ...]:
    if record is None:
        return (name, "not compiled yet") + ("",) * (len(_COLUMNS) - 2)
    seconds = plan.seconds_per_sample(record)
    kind = " est." if record["estimated_s_per_sample"] else " fl." if seconds else ""
    remark = "" if record["fits"] else ", **does not fit**"
    remark += " (quick)" if record.get("is_quick") else ""
    return (
        name,
        " x ".join(str(size) for size in record["mesh"].values()),
        f"{record['batch']:,}",
        f"{record['peak_gib']:.4g} of {record['capacity_gib']:.4g}{remark}",
        f"{record['state_gib']:.3g}",
        f"{record['model_tflop_per_sample']:.4g}",
        f"{record['hardware_tflop_per_sample']:.4g}",
        plan.number(seconds, ".3g") + kind,
        plan.number(record["mfu_bound"], ".0%"),
        plan.number(record["images_per_s"], ",.0f"),
        plan.number(record["days"], ".3g"),
        plan.number(record["chip_days"], ",.4g"),
    )
