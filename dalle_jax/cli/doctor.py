"""Checks whether this machine can train: versions, devices, memory, and two measured rates.

  python -m dalle_jax doctor
  python -m dalle_jax doctor --json > doctor.json
  python -m dalle_jax doctor --dependencies --newest

Exits with 1 if a check fails, above all if JAX does not use an accelerator of this machine: a run
would silently be a hundred times slower. Missing optional packages are notes, and so is a matmul
far below the chip's peak.

--dependencies prints a table instead: for each package the lowest accepted version, the version in
constraints.txt for this Python, the installed one and, with --newest, the newest on pip's
index ("unknown" without a network).
"""

import argparse
import json
import os
import pathlib
import platform
import shutil
import sys
import time
from typing import Any

SUMMARY = "check versions, devices, memory and speed of this machine"

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml_collections", "numpy",
    "tensorflow-datasets", "array_record", "sentencepiece", "Pillow", "safetensors",
)  # fmt: skip
OPTIONAL = {
    "tensorboardX": "TensorBoard events; metrics.jsonl is written without it",
    "wandb": "train.wandb_project",
    "tensorflow": "only for TFDS sets stored as tfrecord; everything else works without it",
}

OK, NOTE, FAIL = "ok", "note", "fail"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--no_bench", action="store_true", help="skip the two measured rates")
    parser.add_argument(
        "--disk", default=".", metavar="DIR", help="folder whose free space counts (default: .)"
    )
    parser.add_argument(
        "--dependencies", action="store_true", help="print the table of dependencies instead"
    )
    parser.add_argument(
        "--newest", action="store_true", help="--dependencies: ask pip's index for newest versions"
    )
    parser.add_argument(
        "--constraints",
        default="constraints.txt",
        metavar="FILE",
        help="--dependencies: pinned versions (default: %(default)s, where it exists)",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the report; returns 1 if a check failed."""
    if args.dependencies:
        from dalle_jax.cli import _dependencies

        rows = _dependencies.table(args.constraints, has_newest=args.newest)
        print(json.dumps(rows, indent=2) if args.json else _dependencies.as_text(rows))
        return 0
    report = examine(args.disk, bench=not args.no_bench)
    print(json.dumps(report, indent=2) if args.json else as_text(report))
    failed = [check for check in report["checks"] if check["status"] == FAIL]
    for check in failed if args.json else ():
        print(f"FAIL {check['name']}: {check['text']}", file=sys.stderr)
    return 1 if failed else 0


def examine(disk: str, *, bench: bool) -> dict[str, Any]:
    """The report as plain data."""
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:  # a driver that does not match the installed plugin
        devices, problem = [], str(error).splitlines()[0]
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in (*PACKAGES, *OPTIONAL)},
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_gib": _memory_gib(),
        "disk_free_gib": _disk_gib(disk),
        "backend": devices[0].platform if devices else None,
        "devices": [_device(device) for device in devices],
        "rates": {},
    }
    checks = [check_python(sys.version_info[:2])]
    if devices:
        report["rates"] = measure(devices) if bench else {}
        platforms = os.environ.get("JAX_PLATFORMS", "")
        checks.append(check_backend(system_accelerator(), report["backend"], platforms))
        if "matmul_bfloat16_gflops" in report["rates"]:
            rate = report["rates"]["matmul_bfloat16_gflops"]
            checks += check_rate(devices[0].device_kind, rate)
    else:
        checks.append(_check("devices", FAIL, f"JAX starts on no device: {problem}"))
    checks += check_packages(report["versions"])
    checks.append(check_disk(disk, report["disk_free_gib"]))
    has_npm = shutil.which("npm") is not None
    text = "installed" if has_npm else "not installed; `prepare` needs it to fetch the emoji set"
    checks.append(_check("npm", OK if has_npm else NOTE, text))
    report["checks"] = checks
    return report


def check_python(version: tuple[int, int]) -> dict[str, str]:
    """Python 3.11 and newer."""
    text = ".".join(map(str, version))
    if version < (3, 11):
        return _check("python", FAIL, f"{text} is too old; use 3.11 or newer")
    return _check("python", OK, text)


def check_backend(seen: str | None, backend: str, platforms: str) -> dict[str, str]:
    """Fails if the machine has an accelerator that JAX does not use.

    Args:
      seen: the accelerator that the operating system shows: "gpu", "tpu" or None.
      backend: platform of jax.devices()[0].
      platforms: $JAX_PLATFORMS; with "cpu" the user has chosen not to use it.
    """
    if seen is None or backend != "cpu":
        return _check("backend", OK, f"JAX runs on {backend}")
    if platforms.strip() == "cpu":
        return _check("backend", NOTE, f"the {seen} is not used: JAX_PLATFORMS=cpu")
    extra = {"gpu": "jax[cuda12]", "tpu": "jax[tpu]"}[seen]
    return _check(
        "backend",
        FAIL,
        f"this machine has a {seen}, but JAX runs on the CPU. Install the plugin that matches the "
        f"driver (pip install -U '{extra}'), and check that CUDA_VISIBLE_DEVICES and "
        "JAX_PLATFORMS do not hide it",
    )


def check_packages(versions: dict[str, str | None]) -> list[dict[str, str]]:
    """Missing required packages fail, missing optional ones are notes."""
    missing = [name for name in PACKAGES if versions.get(name) is None]
    text = f"missing: {', '.join(missing)}; pip install dalle_jax" if missing else "all installed"
    checks = [_check("packages", FAIL if missing else OK, text)]
    for name, use in OPTIONAL.items():
        if versions.get(name) is None:
            checks.append(_check(name, NOTE, f"not installed ({use})"))
    return checks


def check_rate(kind: str, gflops: float) -> list[dict[str, str]]:
    """The bfloat16 matmul against the chip's peak; [] for a chip that `chips` does not have."""
    from dalle_jax.engine import chips

    if kind not in chips.CHIPS:
        return []
    chip = chips.CHIPS[kind]
    share = gflops * 1e9 / chip.peak_flops
    text = (
        f"bfloat16 matmul at {share:.0%} of the {chip.name}'s {chip.peak_flops / 1e12:,.0f} TFLOP/s"
    )
    if share < 0.5:
        text += ": another program may be using it, or it is throttled"
    return [_check("matmul", OK if share >= 0.5 else NOTE, text)]


def check_disk(folder: str, free_gib: float | None) -> dict[str, str]:
    """Notes a disk that is too small for a few checkpoints of a small model."""
    if free_gib is None:
        return _check("disk", NOTE, f"{folder} is not a local folder")
    low = free_gib < 2
    text = f"{free_gib:.1f} GiB free in {folder}"
    return _check(
        "disk", NOTE if low else OK, text + (", too little for checkpoints" if low else "")
    )


def measure(devices: list) -> dict[str, float]:
    """The matmul rate of one device and the all-reduce rate over all devices.

    Returns:
      matmul_float32_gflops, matmul_bfloat16_gflops (2 n^3 over the best of 3 times) and, with
      several devices, all_reduce_gib_per_s: bytes of one device's buffer over the best time.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, PartitionSpec

    is_cpu = devices[0].platform == "cpu"
    n = 1024 if is_cpu else 8192
    rates = {}
    for name in ("float32", "bfloat16"):
        matrix = jax.device_put(jnp.ones((n, n), name), jax.local_devices()[0])
        seconds = _best_time(jax.jit(lambda x: x @ x), matrix)
        rates[f"matmul_{name}_gflops"] = round(2 * n**3 / seconds / 1e9, 1)
    if len(devices) > 1:
        count = 2**20 if is_cpu else 2**26  # float32 per device
        mesh = Mesh(np.asarray(devices), ("d",))
        spec = PartitionSpec("d")

        def add(x):
            return jax.lax.psum(x, "d")

        sharding = jax.sharding.NamedSharding(mesh, spec)
        make = jax.jit(lambda: jnp.ones((len(devices) * count,)), out_shardings=sharding)
        reduce = jax.shard_map(add, mesh=mesh, in_specs=spec, out_specs=PartitionSpec())
        seconds = _best_time(jax.jit(reduce), make())
        rates["all_reduce_gib_per_s"] = round(4 * count / seconds / 2**30, 2)
    return rates


def as_text(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"python {report['python']}, {report['machine']}"]
    lines += [f"  {name} {version}" for name, version in report["versions"].items() if version]
    memory, disk = report["memory_gib"], report["disk_free_gib"]
    lines.append(
        f"{report['cpu_cores']} CPU cores, "
        f"{'unknown' if memory is None else f'{memory:.1f} GiB'} memory, "
        f"{'unknown' if disk is None else f'{disk:.1f} GiB'} disk free"
    )
    lines.append(f"{len(report['devices'])} JAX devices:")
    for device in report["devices"][:8]:
        held = f", {device['memory_gib']:.1f} GiB" if device["memory_gib"] else ""
        lines.append(f"  {device['id']}: {device['kind']} ({device['platform']}{held})")
    if len(report["devices"]) > 8:
        lines.append(f"  … {len(report['devices']) - 8} more")
    lines += [f"{name}: {rate:,}" for name, rate in report["rates"].items()]
    marks = {OK: " ok ", NOTE: "note", FAIL: "FAIL"}
    lines += [f"[{marks[c['status']]}] {c['name']}: {c['text']}" for c in report["checks"]]
    return "\n".join(lines)


def _check(name: str, status: str, text: str) -> dict[str, str]:
    return {"name": name, "status": status, "text": text}


def _best_time(function, *args) -> float:
    import jax

    jax.block_until_ready(function(*args))  # compiles
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return min(times)


def _device(device) -> dict[str, Any]:
    try:
        limit = (device.memory_stats() or {}).get("bytes_limit")
    except Exception:  # some backends have no statistics, and raise different errors
        limit = None
    return {
        "id": device.id,
        "platform": device.platform,
        "kind": device.device_kind,
        "memory_gib": round(limit / 2**30, 2) if limit else None,
    }


def system_accelerator() -> str | None:
    """The accelerator that the operating system shows, whether or not JAX can use it."""
    # A container may have the device without the tools.
    files = (pathlib.Path("/proc/driver/nvidia/version"), pathlib.Path("/dev/nvidia0"))
    if shutil.which("nvidia-smi") or any(file.exists() for file in files):
        return "gpu"
    if any(pathlib.Path("/dev").glob("accel*")) or "TPU_NAME" in os.environ:
        return "tpu"
    return None


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _memory_gib() -> float | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError, AttributeError):
        return None


def _disk_gib(folder: str) -> float | None:
    try:
        return shutil.disk_usage(folder).free / 2**30
    except OSError:
        return None
