"""How a plan looks: the table for people, the record for programs."""

import dataclasses
from typing import Any

from dalle_jax.planning.plan import Plan
from dalle_jax.planning.search import Candidate
from dalle_jax.planning.topology import Topology

GIB = 2**30


def record(
    config: str, plan: Plan, nearest: Candidate | None = None, changes: dict | None = None
) -> dict[str, Any]:
    """A plan as plain data.

    Args:
      config: what --config said.
      plan: its plan.
      nearest: what fits instead, if it does not.
      changes: fields that a search has changed.
    """
    data = {"config": config, **dataclasses.asdict(plan)}
    if changes is not None:
        data["changes"] = changes
    if nearest:
        data["nearest"] = {"changes": nearest.changes, **dataclasses.asdict(nearest.plan)}
    elif not plan.fits:
        data["nearest"] = None
    return _rounded(data)


def table(config: str, plan: Plan, nearest: Candidate | None = None) -> str:
    """The table of one plan."""
    lines = [f"{config} on {_where(plan)}", "", _verdict(plan, nearest), ""]
    lines += _memory(plan) + _work(plan) + _time(plan) + _traffic(plan)
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines) + "\n"


def line(candidate: Candidate) -> str:
    """One line of a search."""
    plan = candidate.plan
    sizes = " x ".join(str(size) for size in plan.mesh.values())
    fits = "fits" if plan.fits else "does not fit"
    rate = f", {plan.s_per_sample:.3f} s/sample ({plan.basis})" if plan.s_per_sample else ""
    return (
        f"mesh {sizes}, batch {plan.batch}, remat {plan.remat or 'none'}: "
        f"{plan.peak_gib:.2f} GiB, {fits}{rate}"
    )


def pareto_table(config: str, topology: str, best: list[Candidate], tried: int) -> str:
    """What nothing else beats in both time and memory."""
    head = f"{config} on {topology}: {len(best)} of {tried} tried that nothing beats in both\n"
    if not best:
        return head + "  none fits: more chips, or a smaller model"
    rows = [("mesh", "batch", "remat", "GiB", "s/sample", "images/s", "MFU bound", "days")]
    for candidate in best:
        p = candidate.plan
        rows.append(
            (
                "x".join(str(size) for size in p.mesh.values()),
                f"{p.batch:,}",
                p.remat or "-",
                f"{p.peak_gib:.2f}",
                number(p.s_per_sample, ".3f"),
                number(p.images_per_s, ",.0f"),
                number(p.mfu_bound, ".0%"),
                number(p.days, ",.1f"),
            )
        )
    return head + "\n".join("  " + text for text in _columns(rows)) + "\n"


def sampling_record(config: str, topology: Topology, guidance: bool, found) -> dict[str, Any]:
    """The budget of drawing, on one device of a topology."""
    candidates = found.candidates(topology.capacity)
    speed = topology.chip.hbm_bytes_per_s if topology.chip else None
    one, many = (
        found.seconds_per_token(n, speed) if speed and n else None for n in (1, candidates)
    )
    return _rounded(
        {
            "config": config,
            "topology": topology.name,
            "chip": topology.chip.name if topology.chip else "CPU",
            "guidance": guidance,
            "capacity_gib": topology.capacity / GIB,
            "weights_gib": found.weights / GIB,
            "working_copy_gib": found.working / GIB,
            "text_cache_mib": found.text_cache / 2**20,
            "candidate_mib": found.per_candidate / 2**20,
            "candidates": candidates,
            "tokens": found.tokens,
            "floor_ms_per_token_1": one * 1e3 if one else None,
            "floor_ms_per_token": many * 1e3 if many else None,
            "floor_s_per_image_1": one * found.tokens if one else None,
            "images_per_s_bound": candidates / many / found.tokens if many else None,
        }
    )


def sampling_table(r: dict[str, Any]) -> str:
    """The table of `sampling_record`."""
    rows = [
        ("weights", f"{r['weights_gib']:.2f} GiB", "as stored"),
        ("working copy", f"{r['working_copy_gib']:.2f} GiB", "matrices in the compute dtype"),
        ("caches of a prompt", f"{r['text_cache_mib']:.1f} MiB", "shared by its candidates"),
        ("a candidate", f"{r['candidate_mib']:.1f} MiB", "its own keys and values, logits"),
        ("candidates that fit", f"{r['candidates']:,}", f"in {r['capacity_gib']:.2f} GiB"),
    ]
    if r["floor_ms_per_token_1"]:
        each = f"{r['floor_s_per_image_1']:.2f} s a picture of {r['tokens']} tokens"
        rows.append(("floor, 1 candidate", f"{r['floor_ms_per_token_1']:.3f} ms/token", each))
    if r["floor_ms_per_token"]:
        every = f"{r['images_per_s_bound']:,.2f} pictures/s"
        rows.append(("floor, all of them", f"{r['floor_ms_per_token']:.3f} ms/token", every))
    what = "with guidance" if r["guidance"] else "without guidance"
    head = f"{r['config']}, drawing {what} on each {r['chip']} of {r['topology']}\n"
    tail = "  the floor is bytes read per token over the memory's bandwidth\n"
    return head + "\n".join("  " + text for text in _columns(rows)) + "\n" + tail


def comparison(records: list[dict[str, Any]]) -> str:
    """A line per plan, side by side; of `record`s with the attention that each has."""
    rows = [("topology", "attention", "GiB", "of", "fits", "s/sample", "kernels", "basis", "MFU")]
    for r in records:
        second = r["estimated_s_per_sample"] or r["floor_s_per_sample"]
        rows.append(
            (
                r["topology"],
                r["attention"],
                f"{r['peak_gib']:.2f}",
                f"{r['capacity_gib']:.2f}",
                "yes" if r["fits"] else "no",
                number(second, ".3f"),
                number(r["kernels_s_per_sample"], ".3f"),
                r["basis"],
                number(r["mfu_bound"], ".0%"),
            )
        )
    return "\n".join(_columns(rows)) + "\n"


def number(value: float | None, form: str) -> str:
    """A figure that may be unknown."""
    return "-" if value is None else format(value, form)


def _where(plan: Plan) -> str:
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    per_device = plan.batch / plan.devices
    batch = f"batch {plan.batch:,} ({per_device:g} a device"
    if plan.micro_batches > 1:
        batch += f", {plan.micro_batches} micro-batches"
    remat = f", remat {plan.remat}" if plan.remat else ""
    return (
        f"{plan.topology}: {plan.devices} x {plan.chip}\n"
        f"mesh {mesh}, rules {plan.rules}; {batch}){remat}; {plan.params:,} parameters"
    )


def _verdict(plan: Plan, nearest: Candidate | None) -> str:
    if plan.fits:
        spare = plan.capacity_gib - plan.peak_gib
        return (
            f"FITS: {plan.peak_gib:.4g} of {plan.capacity_gib:.4g} GiB a device, "
            f"{spare:.4g} to spare"
        )
    text = (
        f"DOES NOT FIT: needs {plan.peak_gib:.2f} GiB a device, {plan.shortfall_gib:.2f} more than "
        f"the {plan.capacity_gib:.2f} there are"
    )
    if nearest:
        flags = " ".join(f"--config.{name}={value}" for name, value in nearest.changes.items())
        text += f"\nthe nearest that fits ({nearest.plan.peak_gib:.2f} GiB): {flags}"
    return text


def _memory(plan: Plan) -> list[str]:
    rows = [
        ("weights", plan.params_gib, ""),
        ("their average", plan.ema_gib, ""),
        ("optimiser", plan.optimiser_gib, ""),
        ("frozen networks", plan.frozen_gib, ""),
        ("input batch", plan.batch_gib, ""),
        ("activations", plan.activations_gib, "kept for the backward pass"),
        ("temporaries", plan.temporaries_gib, "gradients, gathered weights, scratch, code"),
        ("peak", plan.peak_gib, ""),
    ]
    shown = [(name, number(size, ".4g"), what) for name, size, what in rows]
    return _block("memory, GiB a device", shown)


def _work(plan: Plan) -> list[str]:
    rows = [
        ("model", f"{plan.model_tflop_per_sample:.4g}", "3 x forward, attention on allowed keys"),
        (
            "hardware",
            f"{plan.hardware_tflop_per_sample:.4g}",
            "what runs: with recomputation, masks",
        ),
    ]
    return _block("work, TFLOP a sample (2 per multiply-add)", rows)


def _time(plan: Plan) -> list[str]:
    if plan.s_per_sample is None:
        return ["time: not known for this device", ""]
    rows = [("floor", f"{plan.floor_s_per_sample:.4g}", "hardware FLOPs at the chip's peak")]
    if plan.estimated_s_per_sample:
        what = "the compiler's, without waiting for collectives"
        rows.append(("estimate", f"{plan.estimated_s_per_sample:.4g}", what))
    if plan.kernels_s_per_sample:
        what = "of it, by their products and bytes: our estimate, not the compiler's"
        rows.append(("kernels", f"{plan.kernels_s_per_sample:.4g}", what))
    lines = _block("time, chip-seconds a sample", rows)
    tokens = f", {plan.tokens_per_s:,.0f} tokens/s" if plan.tokens_per_s else ""
    rate = "at that rate" if plan.basis == "estimate" else "at best, at the floor"
    return lines + [
        f"{rate}: {plan.step_s:.3g} s a step, {plan.images_per_s:,.0f} images/s{tokens}; "
        f"MFU at most {plan.mfu_bound:.0%}",
        f"{plan.steps:,} steps: {plan.days:,.3g} days, {plan.chip_days:,.4g} chip-days "
        f"({plan.chip_days * 24:,.4g} chip-hours)",
        "",
    ]


def _traffic(plan: Plan) -> list[str]:
    if not plan.collectives:
        return []
    rows = [("kind", "axis", "type", "buffers", "GiB", "async")]
    for row in plan.collectives:
        share = f"{row.async_gib / row.gib:.0%}" if row.gib else "-"
        size = f"{row.gib:.4g}"
        rows.append((row.kind, row.axis, row.dtype, f"{row.count:,}", size, share))
    return _block("traffic a step, full buffers a device; async = beside other work", rows)


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


def _rounded(value: Any) -> Any:
    """Floats to six digits, at any depth: the figures are no better."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
