"""The stopwatch: wall and processor seconds of a case, the memory it took, and on what it ran.

It knows no network; `benchmarks.cases` makes what it times.
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
    """Something to time; its inputs, the same in every call, are ready when it is made.

    Attributes:
      compile: what is done once; gives the function that does one step or call to its end, with
        the result on the host.
      images: pictures of one call.
      tokens: tokens of one call; 0 = it has none.
      params: of the network; 0 = there is none.
      flops: counts those of the matrix products and convolutions of one call, see
        `engine.flops.hardware`; None = there are none. Called last, for it traces the function.
    """

    compile: Callable[[], Callable[[], Any]]
    images: int
    tokens: int = 0
    params: int = 0
    flops: Callable[[], float] | None = None


def measure(case: Case, *, steps: int, warmup: int) -> dict[str, Any]:
    """Times `steps` calls after the first one and `warmup` more.

    Returns:
      median_s, wall seconds of a call; cpu_s, the median of its processor seconds over all
      threads of this process; images_per_s and tokens_per_s (where there are tokens) at median_s;
      gflop of one call and gflop_per_cpu_s, where they are counted; params; peak_rss_mib of this
      process so far; first_call_s, wall seconds of compiling and the first call.
    """
    return alternate((case,), steps=steps, warmup=warmup)[0]


def alternate(cases: Sequence[Case], *, steps: int, warmup: int) -> list[dict[str, Any]]:
    """Times several cases in turns, a call of each at a time: what disturbs one disturbs all.

    Args:
      cases: compiled, and called a first time, in this order.
      steps: timed calls of each.
      warmup: calls of each before them, besides the first.

    Returns:
      What `measure` gives, for each; peak_rss_mib is that of all together.
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
        for call, found in zip(calls, times, strict=True):
            began, began_cpu = time.perf_counter(), time.process_time()
            call()
            cpu = time.process_time() - began_cpu
            found.append((time.perf_counter() - began, cpu))
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
    """The most memory that this process has held, MiB.

    Of the program that runs now, where /proc has it: in `getrusage` a child begins at the peak of
    its parent (measured: 414 MiB for a bare Python started from one that held 400 MiB, not 13).
    """
    status = pathlib.Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes, KiB


def device() -> str:
    """The kind of the first device: the processor's name on a CPU, where it can be found."""
    first = jax.devices()[0]
    if first.platform != "cpu":
        return first.device_kind
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions(*others: str) -> dict[str, str]:
    """Of Python and of the packages that decide how fast it is.

    Args:
      others: of `peers.NAMES`; PyTorch's version goes with them, and their own.
    """
    packages = [*PACKAGES, *(("torch", *others) if others else ())]
    found = {name: metadata.version(name) for name in packages if name != "gpt"}
    return {"python": platform.python_version()} | found
