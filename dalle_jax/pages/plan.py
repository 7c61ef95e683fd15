"""Tables of plans for the terminal. Plans are plain data: the records of `planning`.

A record has the fields of `planning.plan.Plan`, and where they apply `changes`, the config fields
that a search changed, and `nearest`, the record of the nearest config that fits.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


def table(title: str, plan: Record) -> str:
    """The table of one plan."""
    lines = [f"{title} on {_topology(plan)}", "", _verdict(plan), ""]
    lines += _memory(plan) + _work(plan) + _time(plan) + _traffic(plan)
    lines += [f"note: {note}" for note in plan["notes"]]
    return "\n".join(lines) + "\n"


def line(plan: Record) -> str:
    """One line of a search."""
    seconds = seconds_per_sample(plan)
    rate = f", {seconds:.3f} s/sample ({plan['basis']})" if seconds else ""
    return (
        f"mesh {_sizes(plan, ' x ')}, batch {plan['batch']}, remat {plan['remat'] or 'none'}: "
        f"{plan['peak_gib']:.2f} GiB, {'fits' if plan['fits'] else 'does not fit'}{rate}"
    )


def pareto_table(title: str, topology: str, best: Sequence[Record], num_compiled: int) -> str:
    """The plans that no other plan beats in both time and memory."""
    head = (
        f"{title} on {topology}: {len(best)} of {num_compiled} tried that nothing beats in both\n"
    )
    if not best:
        return head + "  none fits: more chips, or a smaller model"
    rows = [("mesh", "batch", "remat", "GiB", "s/sample", "images/s", "MFU bound", "days")]
    for plan in best:
        rows.append(
            (
                _sizes(plan, "x"),
                f"{plan['batch']:,}",
                plan["remat"] or "-",
                f"{plan['peak_gib']:.2f}",
                number(seconds_per_sample(plan), ".3f"),
                number(plan["images_per_s"], ",.0f"),
                number(plan["mfu_bound"], ".0%"),
                number(plan["days"], ",.1f"),
            )
        )
    return head + "\n".join("  " + text for text in _columns(rows)) + "\n"


def sampling_table(record: Record) -> str:
    """The table of one sampling budget, see `planning.sampling_memory.record`."""
    r = record
    rows = [
        ("weights", f"{r['weights_gib']:.2f} GiB", "as stored"),
        ("working copy", f"{r['working_copy_gib']:.2f} GiB", "matrices in the compute dtype"),
        ("caches per prompt", f"{r['text_cache_mib']:.1f} MiB", "shared by its candidates"),
        ("one candidate", f"{r['candidate_mib']:.1f} MiB", "its own keys and values, logits"),
        ("candidates that fit", f"{r['candidates']:,}", f"in {r['capacity_gib']:.2f} GiB"),
    ]
    if r["floor_ms_per_token_1"]:
        each = f"{r['floor_s_per_image_1']:.2f} s per picture of {r['tokens']} tokens"
        rows.append(("floor, 1 candidate", f"{r['floor_ms_per_token_1']:.3f} ms/token", each))
    if r["floor_ms_per_token"]:
        every = f"{r['images_per_s_bound']:,.2f} pictures/s"
        rows.append(("floor, all of them", f"{r['floor_ms_per_token']:.3f} ms/token", every))
    guidance = "with guidance" if r["guidance"] else "without guidance"
    head = f"{r['config']}, sampling {guidance} on each {r['chip']} of {r['topology']}\n"
    tail = "  the floor is bytes read per token over the memory's bandwidth\n"
    return head + "\n".join("  " + text for text in _columns(rows)) + "\n" + tail


def comparison(plans: Sequence[Record]) -> str:
    """One line per plan, side by side; each record also has its `attention`."""
    rows = [("topology", "attention", "GiB", "of", "fits", "s/sample", "kernels", "basis", "MFU")]
    for plan in plans:
        rows.append(
            (
                plan["topology"],
                plan["attention"],
                f"{plan['peak_gib']:.2f}",
                f"{plan['capacity_gib']:.2f}",
                "yes" if plan["fits"] else "no",
                number(seconds_per_sample(plan), ".3f"),
                number(plan["kernels_s_per_sample"], ".3f"),
                plan["basis"],
                number(plan["mfu_bound"], ".0%"),
            )
        )
    return "\n".join(_columns(rows)) + "\n"


def number(value: float | None, form: str) -> str:
    """A figure that may be unknown."""
    return "-" if value is None else format(value, form)


def seconds_per_sample(plan: Record) -> float | None:
    """Chip-seconds: the estimate, else the floor."""
    return plan["estimated_s_per_sample"] or plan["floor_s_per_sample"]


def _sizes(plan: Record, separator: str) -> str:
    return separator.join(str(size) for size in plan["mesh"].values())


def _topology(plan: Record) -> str:
    mesh = " x ".join(f"{name} {size}" for name, size in plan["mesh"].items())
    batch = f"batch {plan['batch']:,} ({plan['batch'] / plan['devices']:g} per device"
    if plan["micro_batches"] > 1:
        batch += f", {plan['micro_batches']} micro-batches"
    remat = f", remat {plan['remat']}" if plan["remat"] else ""
    return (
        f"{plan['topology']}: {plan['devices']} x {plan['chip']}\n"
        f"mesh {mesh}, rules {plan['rules']}; {batch}){remat}; {plan['params']:,} parameters"
    )


def _verdict(plan: Record) -> str:
    peak, capacity = plan["peak_gib"], plan["capacity_gib"]
    if plan["fits"]:
        return (
            f"FITS: {peak:.4g} of {capacity:.4g} GiB per device, {capacity - peak:.4g} GiB to spare"
        )
    text = (
        f"DOES NOT FIT: needs {peak:.2f} GiB per device, {plan['shortfall_gib']:.2f} more than "
        f"the {capacity:.2f} there are"
    )
    if nearest := plan.get("nearest"):
        flags = " ".join(f"--config.{name}={value}" for name, value in nearest["changes"].items())
        text += f"\nthe nearest that fits ({nearest['peak_gib']:.2f} GiB): {flags}"
    return text


def _memory(plan: Record) -> list[str]:
    rows = [
        ("weights", plan["params_gib"], ""),
        ("their average", plan["ema_gib"], ""),
        ("optimiser", plan["optimiser_gib"], ""),
        ("frozen networks", plan["frozen_gib"], ""),
        ("input batch", plan["batch_gib"], ""),
        ("activations", plan["activations_gib"], "saved for the backward pass"),
        ("temporaries", plan["temporaries_gib"], "gradients, gathered weights, scratch, code"),
        ("peak", plan["peak_gib"], ""),
    ]
    rows = [(name, number(size, ".4g"), comment) for name, size, comment in rows]
    return _block("memory, GiB per device", rows)


def _work(plan: Record) -> list[str]:
    hardware = f"{plan['hardware_tflop_per_sample']:.4g}"
    rows = [
        (
            "model",
            f"{plan['model_tflop_per_sample']:.4g}",
            "3 x forward, attention on allowed keys",
        ),
        ("hardware", hardware, "all that runs: with recomputation and masked scores"),
    ]
    return _block("work, TFLOP per sample (2 per multiply-add)", rows)


def _time(plan: Record) -> list[str]:
    if seconds_per_sample(plan) is None:
        return ["time: unknown for this device", ""]
    rows = [("floor", f"{plan['floor_s_per_sample']:.4g}", "hardware FLOPs at the chip's peak")]
    if plan["estimated_s_per_sample"]:
        comment = "the compiler's, without waiting for collectives"
        rows.append(("estimate", f"{plan['estimated_s_per_sample']:.4g}", comment))
    if plan["kernels_s_per_sample"]:
        comment = "its Pallas kernels: our estimate, not the compiler's"
        rows.append(("kernels", f"{plan['kernels_s_per_sample']:.4g}", comment))
    tokens = f", {plan['tokens_per_s']:,.0f} tokens/s" if plan["tokens_per_s"] else ""
    rate = "at that rate" if plan["basis"] == "estimate" else "at best, at the floor"
    chip_days = plan["chip_days"]
    return _block("time, chip-seconds per sample", rows) + [
        f"{rate}: {plan['step_s']:.3g} s per step, {plan['images_per_s']:,.0f} images/s{tokens}; "
        f"MFU at most {plan['mfu_bound']:.0%}",
        f"{plan['steps']:,} steps: {plan['days']:,.3g} days, {chip_days:,.4g} chip-days "
        f"({chip_days * 24:,.4g} chip-hours)",
        "",
    ]


def _traffic(plan: Record) -> list[str]:
    if not plan["collectives"]:
        return []
    rows = [("kind", "axis", "type", "buffers", "GiB", "async")]
    for row in plan["collectives"]:
        share = f"{row['async_gib'] / row['gib']:.0%}" if row["gib"] else "-"
        count, size = f"{row['count']:,}", f"{row['gib']:.4g}"
        rows.append((row["kind"], row["axis"], row["dtype"], count, size, share))
    return _block("traffic per step, full buffers per device; async = beside other work", rows)


def _block(title: str, rows: list[tuple]) -> list[str]:
    return [title, *("  " + text for text in _columns(rows)), ""]


def _columns(rows: list[tuple]) -> list[str]:
    """Rows of text in aligned columns, numbers to the right."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]

    def aligned(cell: str, width: int) -> str:
        return cell.rjust(width) if cell[:1].isdigit() else cell.ljust(width)

    return [
        "  ".join(
            aligned(str(cell), width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
