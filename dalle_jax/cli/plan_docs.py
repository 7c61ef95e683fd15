"""`plan --docs`: the page of every shipped config on at least five topologies.

Records lie beside the page as JSON and are made once: an interrupted run goes on, and one plan is
made again by deleting its record; those of --quick are made again without it. What this machine has
no compiler for stays open on the page.
"""

import json
import pathlib
import sys
from typing import Any

from dalle_jax import config as cfg
from dalle_jax import tasks
from dalle_jax.cli import plan_page
from dalle_jax.planning import plan, topology
from dalle_jax.types import UsageError

_FEW = ("v4:2x2x1", "v5e:2x2", "h100:1x1", "h100:1x8", "h100:2x8")
_SOME = ("v4:2x4x4", "v5e:4x8", "v5p:2x4x4", "v6e:4x8", "h100:4x8")
_MANY = ("v4:4x4x8", "v5e:16x16", "v5p:4x4x8", "v6e:16x16", "h100:16x8")
# Multiples of 16 devices, and of 64: the weights of the configs there are in so many shards.
_NODES = ("v5e:16x16", "h100:2x8", "h100:4x8", "h100:8x8", "h100:16x8")
_SHARDS_OF_64 = ("v5e:8x8", "v5e:16x16", "h100:8x8", "h100:16x8", "h100:32x8")

# Config -> where a person might run it.
CASES = {
    "configs/dalle_12b.py": _MANY,
    "configs/dvae_paper.py": _SOME,
    "configs/clip.py:size=l14": _MANY,
    "configs/prior_diffusion.py:size=paper": _NODES,
    "configs/prior_ar.py:size=paper": _NODES,
    "configs/decoder_paper.py": _SHARDS_OF_64,
    "configs/upsampler.py:size=paper256": _NODES,
    "configs/upsampler.py:size=paper1024": _NODES,
    "configs/clip.py:size=b16": _NODES,
    "configs/clip.py:size=b32": _NODES,
    "configs/dalle.py:size=single_gpu": _FEW,
    "configs/vqvae.py:size=paper": _FEW,
    "configs/vqvae.py:size=shapes": _FEW,
    "configs/dvae.py:size=shapes": _FEW,
    "configs/dalle.py:size=shapes": _FEW,
    "configs/clip.py:size=shapes": _FEW,
    "configs/prior_diffusion.py:size=shapes": _FEW,
    "configs/decoder.py:size=shapes": _FEW,
    "configs/upsampler.py:size=shapes64": _FEW,
    "configs/vqvae.py:size=emoji": _FEW,
    "configs/dvae.py:size=emoji": _FEW,
    "configs/dalle.py:size=emoji": _FEW,
    "configs/clip.py:size=emoji": _FEW,
}

_HEAD = """# What every config costs, without a machine

Written by `python -m dalle_jax plan --docs docs/plans.md`, which compiles the training step of each
config for each topology and measures nothing: memory is the compiler's allocation, seconds are its
estimate (`est.`, TPU only, without waiting for collectives) or the floor at the peak rate (`fl.`).
`python -m dalle_jax plan --config=… --topology=…` prints one of them in full; `plan --help` tells
what the figures are.

GiB are per device: peak of what there is, and the training state in it. Work is in TFLOP a sample,
model and hardware (with recomputation and masked scores). Seconds a sample are chip-seconds. MFU is
the most that the time allows. Days are for all of the config's `train.steps`.
"""

_COLUMNS = (
    "topology", "mesh", "batch", "peak / GiB", "state", "model", "hardware", "s/sample", "MFU",
    "images/s", "days", "chip-days",
)  # fmt: skip


def write(file: str, *, is_quick: bool = False) -> int:
    """Makes the plans that are missing and writes the page after each; 1 if some stay open."""
    page = pathlib.Path(file)
    store = page.with_suffix(".json")
    records: dict[str, Any] = json.loads(store.read_text()) if store.exists() else {}
    missing = [
        (config, name)
        for config, names in CASES.items()
        for name in names
        if not _is_made(records.get(f"{config} {name}"), is_quick)
    ]
    for _, name in missing:
        topology.prepare(name)
    is_open = False
    for config, name in missing:
        try:
            found = _weigh(config, name, is_quick=is_quick)
        except UsageError as error:
            print(f"{config} on {name}: {error}", file=sys.stderr, flush=True)
            is_open = True
            continue
        records[f"{config} {name}"] = plan_page.record(config, found)
        print(f"{config} on {name}: {found.compile_s:.0f} s", file=sys.stderr, flush=True)
        _replace(store, json.dumps(records, indent=1) + "\n")
        _replace(page, text(records))
    _replace(page, text(records))
    return int(is_open)


def text(records: dict[str, Any]) -> str:
    """The page, in Markdown.

    Args:
      records: "CONFIG TOPOLOGY" -> `plan_page.record`; what is missing is said to be open.
    """
    parts, untouched = [_HEAD], []
    for config, names in CASES.items():
        made = [records.get(f"{config} {name}") for name in names]
        known = [record for record in made if record]
        if not known:
            untouched.append(f"`{config}`")
            continue
        what = f", {known[0]['params']:,} parameters"
        rows = [_COLUMNS, ("---",) * len(_COLUMNS)]
        rows += [_row(name, record) for name, record in zip(names, made, strict=True)]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        parts.append(f"\n## {config}{what}\n\n" + "\n".join(lines) + "\n")
        notes: dict[str, list[str]] = {}
        for name, record in zip(names, made, strict=True):
            for note in record["notes"] if record else ():
                notes.setdefault(note, []).append(name)
        parts += [f"\n{', '.join(where)}: {note}\n" for note, where in notes.items()]
    if untouched:
        parts.append(f"\n## Not compiled yet\n\n{', '.join(untouched)}\n")
    return "".join(parts)


def _is_made(record: dict[str, Any] | None, is_quick: bool) -> bool:
    return record is not None and (is_quick or not record.get("is_quick"))


def _weigh(config: str, name: str, *, is_quick: bool) -> plan.Plan:
    found = topology.get(name)
    loaded = cfg.load(config)
    return plan.weigh(loaded, tasks.make(loaded, shapes_only=True), found, is_quick=is_quick)


def _row(name: str, record: dict[str, Any] | None) -> tuple[str, ...]:
    if record is None:
        return (name, "not compiled yet") + ("",) * (len(_COLUMNS) - 2)
    seconds = record["estimated_s_per_sample"] or record["floor_s_per_sample"]
    kind = " est." if record["estimated_s_per_sample"] else " fl." if seconds else ""
    number = plan_page.number
    does = "" if record["fits"] else ", **does not fit**"
    does += " (quick)" if record.get("is_quick") else ""
    return (
        name,
        " x ".join(str(size) for size in record["mesh"].values()),
        f"{record['batch']:,}",
        f"{record['peak_gib']:.4g} of {record['capacity_gib']:.4g}{does}",
        f"{record['state_gib']:.3g}",
        f"{record['model_tflop_per_sample']:.4g}",
        f"{record['hardware_tflop_per_sample']:.4g}",
        number(seconds, ".3g") + kind,
        number(record["mfu_bound"], ".0%"),
        number(record["images_per_s"], ",.0f"),
        number(record["days"], ".3g"),
        number(record["chip_days"], ",.4g"),
    )


def _replace(file: pathlib.Path, content: str) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(content)
    part.replace(file)
