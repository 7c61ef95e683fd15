"""Plans of all shipped configs, on at least five topologies each, in one JSON file: the ledger.

An interrupted update continues: it compiles only the plans that are missing. To compile a plan
again, delete its record; an update without `is_quick` also replaces quick plans. Topologies whose
compiler is not installed here stay missing.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from dalle_jax import config as cfg
from dalle_jax import tasks
from dalle_jax.planning import plan, topology
from dalle_jax.types import UsageError

_FEW = ("v4:2x2x1", "v5e:2x2", "h100:1x1", "h100:1x8", "h100:2x8")
_SOME = ("v4:2x4x4", "v5e:4x8", "v5p:2x4x4", "v6e:4x8", "h100:4x8")
_MANY = ("v4:4x4x8", "v5e:16x16", "v5p:4x4x8", "v6e:16x16", "h100:16x8")
# Multiples of 16 devices, and of 64: the numbers of shards in these configs.
_NODES = ("v5e:16x16", "h100:2x8", "h100:4x8", "h100:8x8", "h100:16x8")
_SHARDS_OF_64 = ("v5e:8x8", "v5e:16x16", "h100:8x8", "h100:16x8", "h100:32x8")

# Config -> topologies on which a person might run it.
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

Records = dict[str, dict[str, Any]]  # "CONFIG TOPOLOGY" -> record of the plan, rounded


def missing(
    records: Records, cases: Mapping[str, Sequence[str]], *, is_quick: bool = False
) -> list[tuple[str, str]]:
    """(config, topology) of all cases without a record; without `is_quick`, quick ones count."""

    def is_done(record: dict[str, Any] | None) -> bool:
        return record is not None and (is_quick or not record.get("is_quick"))

    return [
        (config, name)
        for config, names in cases.items()
        for name in names
        if not is_done(records.get(f"{config} {name}"))
    ]


def compile_case(config: str, name: str, is_quick: bool) -> dict[str, Any]:
    """The record of one config on one topology.

    Raises:
      UsageError: if the config does not fit the topology, or its compiler is not installed.
    """
    loaded = cfg.load(config)
    task = tasks.make(loaded, shapes_only=True)
    result = plan.Plan.compile(loaded, task, topology.get(name), is_quick=is_quick)
    return plan.rounded({"config": config, **result.record()})


def update(
    file: str,
    cases: Mapping[str, Sequence[str]],
    *,
    is_quick: bool = False,
    compile_case: Callable[[str, str, bool], dict[str, Any]] = compile_case,
) -> Iterator[Records]:
    """Compiles what is missing in the ledger `file`; yields all records after each plan.

    Args:
      file: the JSON file; created if absent.
      cases: config -> names of topologies.
      is_quick: make quick plans.
      compile_case: (config, topology, is_quick) -> record.
    """
    path = epath.Path(file)
    records: Records = json.loads(path.read_text()) if path.exists() else {}
    open_cases = missing(records, cases, is_quick=is_quick)
    for _, name in open_cases:
        topology.prepare(name)
    for config, name in open_cases:
        try:
            record = compile_case(config, name, is_quick)
        except UsageError as error:
            print(f"{config} on {name}: {error}", file=sys.stderr, flush=True)
            continue
        records[f"{config} {name}"] = record
        print(f"{config} on {name}: {record['compile_s']:.0f} s", file=sys.stderr, flush=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(records, indent=1) + "\n")
        part.replace(path)
        yield records
    yield records
