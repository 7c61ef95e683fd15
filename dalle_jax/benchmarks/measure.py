"""The stopwatch: wall and processor seconds of a case, its memory, and its machine.

It knows no network; the cases come from `benchmarks.cases`.
"""

import dataclasses
import pathlib
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "numpy")


@dataclasses.dataclass(frozen=True)
class Case:
    """A function to time; its inputs exist before the first call and are the same in every call.

    Attributes:
      compile: called once; returns the function that runs one step or call to its end, with the
        result on the host.
      images: pictures per call.
      tokens: tokens per call; 0 = none.
      params: number of the network's parameters; 0 = no network.
      flops: counts the FLOPs of matrix products and convolutions per call, see
        `engine.flops.hardware`; None = there are none. Called last, because it traces the function.
    """

    compile: Callable[[], Callable[[], Any]]
    images: int
    tokens: int = 0
    params: int = 0
    flops: Callable[[], float] | None = None


def measure(case: Case, *, steps: int, warmup: int) -> dict[str, Any]:
    """Times `steps` calls after the first one and `warmup` more.

    Returns:
      median_s, wall seconds per call; cpu_s, the median of the processor seconds per call over all
      threads of this process; images_per_s and tokens_per_s (if there are tokens) at median_s;
      gflop per call and gflop_per_cpu_s, if they are counted; params; peak_rss_mib of this process
      so far; first_call_s, wall seconds of compiling and the first call.
    """
    return alternate((case,), steps=steps, warmup=warmup)[0]


def alternate(cases: Sequence[Case], *, steps: int, warmup: int) -> list[dict[str, Any]]:
    """Times several cases in turns, one call of each at a time: a disturbance affects all of them.

    Args:
      cases: the cases, compiled and called a first time in this order.
      steps: timed calls per case.
      warmup: calls per case before them, besides the first.

    Returns:
      The results of `measure`, one per case; peak_rss_mib is that of all cases together.
    """
    calls, firsts = [], []
    for case in cases:
        began = time.perf_counter()
        calls.append(case.compile())
        calls[-1]()
        firsts.append(time.perf_counter() - began)
    for _ in range(warmup):
        for call in calls:
            call()
    times: list[list[tuple[float, float]]] = [[] for _ in calls]
    for _ in range(steps):
        for call, seconds in zip(calls, times, strict=True):
            began, began_cpu = time.perf_counter(), time.process_time()
            call()
            cpu = time.process_time() - began_cpu
            seconds.append((time.perf_counter() - began, cpu))
    return [_result(*one) for one in zip(cases, times, firsts, strict=True)]


def _result(case: Case, times: list[tuple[float, float]], first: float) -> dict[str, Any]:
    median, cpu_s = (statistics.median(column) for column in zip(*times, strict=True))
    result = {"median_s": median, "cpu_s": cpu_s, "images_per_s": case.images / median}
    if case.tokens:
        result["tokens_per_s"] = case.tokens / median
    if case.flops:
        gflop = case.flops() / 1e9
        result |= {"gflop": gflop, "gflop_per_cpu_s": gflop / cpu_s}
    result |= {"params": case.params, "peak_rss_mib": peak_rss_mib(), "first_call_s": first}
    return {k: round(v, 5) if isinstance(v, float) else v for k, v in result.items()}


def peak_rss_mib() -> float:
    """The peak memory of this process, MiB.

    From /proc if it exists, because in `getrusage` a child begins with the peak of its parent
    (measured: 414 MiB instead of 13 for a bare Python, started from a process with 400 MiB).
    """
    status = pathlib.Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes, KiB


def device() -> str:
    """The kind of the first device; on a CPU the processor's name, if the system has it."""
    first = jax.devices()[0]
    if first.platform != "cpu":
        return first.device_kind
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions(*others: str) -> dict[str, str]:
    """Versions of Python and of the packages that determine the speed.

    Args:
      others: names in `peers.NAMES`; their versions and PyTorch's are added.
    """
    packages = [*PACKAGES, *(("torch", *others) if others else ())]
    installed = {name: metadata.version(name) for name in packages if name != "gpt"}
    return {"python": platform.python_version()} | installed
