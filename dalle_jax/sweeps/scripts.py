"""Renders a sweep for a cluster: a SLURM job array, an indexed Kubernetes job.

Every task of the array runs `python -m dalle_jax sweep --unit=WID`, which reads the definition
from WORKDIR/XID: all machines see the workdir, on a shared disk or in a bucket. A unit is one
process on one machine; a launcher runs one training over several (launch/README.md).
"""

import math
import re
import shlex
from collections.abc import Sequence

import yaml
from etils import epath

from dalle_jax.sweeps import units
from dalle_jax.sweeps.units import Sweep
from dalle_jax.types import UsageError

# Seconds between the request to stop and the kill: enough to save a model of some GiB.
_GRACE_S = 180


def slurm(sweep: Sweep, wids: Sequence[int], jobs: int, options: Sequence[str]) -> str:
    """A batch script: one array task per unit.

    Args:
      sweep: the sweep.
      wids: units that are left to run.
      jobs: maximum of simultaneous tasks; 0 = no limit.
      options: further `#SBATCH` options, e.g. `--partition=gpu`.

    Raises:
      UsageError: for an option that does not begin with a dash.
    """
    for option in options:
        if not re.fullmatch(r"-[^\n]+", option):
            raise UsageError(
                f"--sbatch={option!r} is no sbatch option; write --sbatch=--time=8:00:00."
            )
    lines = [
        f"--job-name={_name(sweep)}",
        f"--array={','.join(map(str, wids))}{f'%{jobs}' if jobs else ''}",
        "--ntasks=1",
        f"--output={_quoted(sweep.folder)}/slurm-%a.log",
        "--open-mode=append",
        # To the batch shell, which `exec` replaces by the run: it saves and exits with 143.
        f"--signal=B:TERM@{_GRACE_S}",
        *options,
    ]
    return (
        "#!/usr/bin/env bash\n"
        + "".join(f"#SBATCH {line}\n" for line in lines)
        + _listing(sweep, wids)
        + 'set -euo pipefail\ncd "${SLURM_SUBMIT_DIR:-.}"\n'
        + f'exec "${{PYTHON:-python}}" {_unit(sweep)} --unit="$SLURM_ARRAY_TASK_ID"\n'
    )


def gke(sweep: Sweep, wids: Sequence[int], jobs: int, image: str, accelerator: str) -> str:
    """A manifest for `kubectl apply`: an indexed Job with one pod per unit.

    Args:
      sweep: the sweep.
      wids: units that are left to run.
      jobs: maximum of simultaneous pods; 0 = no limit.
      image: container image with this package and its configs in the working directory.
      accelerator: `nvidia-h100-80gb:1` (name of GPU and number), `tpu-v5-lite-podslice:2x4` (one
        host: name and topology), or "" for CPUs.

    Raises:
      UsageError: without an image, or for an accelerator in another form.
    """
    if not image:
        raise UsageError("--runner=gke needs --image=IMAGE, a container image with this package.")
    selector, resources = _accelerator(accelerator)
    # Completion indices count from 0 without gaps; the units that are left may have gaps.
    script = (
        f"units=({' '.join(map(str, wids))})\n"
        f'exec python {_unit(sweep)} --unit="${{units[$JOB_COMPLETION_INDEX]}}"\n'
    )
    container = {
        "name": "train",
        "image": image,
        "command": ["bash", "-c", script],
        **({"resources": {"limits": resources, "requests": resources}} if resources else {}),
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE_S,
        **({"nodeSelector": selector} if selector else {}),
        "containers": [container],
    }
    name = _name(sweep)
    manifest = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": {"app": "dalle-jax", "sweep": name}},
        "spec": {
            "completionMode": "Indexed",
            "completions": len(wids),
            "parallelism": min(jobs or len(wids), len(wids)),
            # A preempted unit continues from its checkpoint; a failed one stops no other.
            "backoffLimitPerIndex": 3,
            "maxFailedIndexes": len(wids),
            "template": {"metadata": {"labels": {"sweep": name}}, "spec": pod},
        },
    }
    return _listing(sweep, wids) + yaml.dump(manifest, Dumper=_Dumper, sort_keys=False)


def _accelerator(text: str) -> tuple[dict[str, str], dict[str, int]]:
    """(node selector, resources) of `NAME:COUNT` or `NAME:TOPOLOGY`."""
    if not text:
        return {}, {}
    match = re.fullmatch(r"([a-z0-9-]+):(\d+(?:x\d+)*)", text)
    if not match:
        raise UsageError(
            f"--accelerator={text!r} is not understood; write nvidia-h100-80gb:1 or "
            "tpu-v5-lite-podslice:2x4."
        )
    name, size = match.groups()
    if name.startswith("tpu"):
        prefix = "cloud.google.com/gke-tpu"
        chips = math.prod(map(int, size.split("x")))
        return {f"{prefix}-accelerator": name, f"{prefix}-topology": size}, {
            "google.com/tpu": chips
        }
    if "x" in size:
        raise UsageError(f"--accelerator={text!r}: a GPU is written NAME:COUNT.")
    return {"cloud.google.com/gke-accelerator": name}, {"nvidia.com/gpu": int(size)}


def _unit(sweep: Sweep) -> str:
    folder = epath.Path(sweep.folder)
    arguments = ["-m", "dalle_jax", "sweep", f"--workdir={folder.parent}", f"--xid={folder.name}"]
    return shlex.join(arguments)


def _listing(sweep: Sweep, wids: Sequence[int]) -> str:
    """The tasks' commands as comments, for a reader."""
    lines = [f"# unit {wid}: {sweep.command(wid)}\n" for wid in wids]
    return "".join([*lines, f"# {sweep.folder}/{units.SWEEP} must exist: submitting writes it.\n"])


def _name(sweep: Sweep) -> str:
    """A DNS label, as Kubernetes wants it."""
    name = re.sub(r"[^a-z0-9]+", "-", f"dalle-sweep-{sweep.xid}".lower())
    return name[:50].strip("-")


def _quoted(folder: str) -> str:
    if re.search(r"\s", folder):
        raise UsageError(f"sbatch cannot write its logs to {folder!r}: no spaces in --workdir.")
    return folder


class _Dumper(yaml.SafeDumper):
    """Scripts as blocks, so that the manifest can be read."""

    def ignore_aliases(self, data):
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)
