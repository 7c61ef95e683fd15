"""Runs work units on this machine, a few at a time, each on its own cores or GPUs."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from dalle_jax.engine import console
from dalle_jax.sweeps import units
from dalle_jax.sweeps.units import Sweep
from dalle_jax.types import UsageError

# One thread per process: on two cores, two such runs are faster than two runs that share both.
_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"

Share = tuple[list[int], list[str]]  # cores, GPUs


class Stopped(Exception):
    """A signal ended the sweep; its units have saved.

    Attributes:
      signum: the signal.
    """

    def __init__(self, signum: int):
        super().__init__(f"stopped; the same command continues ({signal.Signals(signum).name}).")
        self.signum = signum


def shares(jobs: int, cores: list[int], gpus: list[str]) -> list[Share]:
    """The cores and GPUs of each of `jobs` simultaneous runs; no core or GPU is in two shares.

    Args:
      jobs: simultaneous runs; 0 = one per GPU, or one per core without GPUs.
      cores: the cores that this process may use.
      gpus: ids of GPUs.

    Raises:
      UsageError: for more jobs than GPUs: two JAX processes do not share one.
    """
    jobs = jobs or len(gpus) or len(cores)
    if jobs < 0 or (gpus and jobs > len(gpus)):
        raise UsageError(
            f"--jobs={jobs}; there are {len(cores)} cores and {len(gpus)} GPUs: use 1 to "
            f"{len(gpus) or len(cores)}."
        )
    # More jobs than cores are allowed: then runs share cores.
    return [(cores[i::jobs] or [cores[i % len(cores)]], gpus[i::jobs]) for i in range(jobs)]


def environment(share: Share, base: dict[str, str]) -> dict[str, str]:
    """The environment of a run with this share."""
    cores, gpus = share
    variables = dict(base)
    if gpus:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    else:
        variables["OMP_NUM_THREADS"] = variables["OPENBLAS_NUM_THREADS"] = str(len(cores))
        if len(cores) == 1:
            variables["XLA_FLAGS"] = f"{base.get('XLA_FLAGS', '')} {_ONE_THREAD}".strip()
    return variables


def command(sweep: Sweep, wid: int, share: Share) -> list[str]:
    """The command of a unit, pinned to its cores where `taskset` exists."""
    pin = ["taskset", "-c", ",".join(map(str, share[0]))] if shutil.which("taskset") else []
    folder = pathlib.Path(sweep.folder)
    return [
        *pin, sys.executable, "-m", "dalle_jax", "sweep", f"--workdir={folder.parent}",
        f"--xid={folder.name}", f"--unit={wid}",
    ]  # fmt: skip


def hardware() -> tuple[list[int], list[str]]:
    """(cores that this process may use, ids of NVIDIA GPUs that it may use)."""
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
    else:
        cores = list(range(os.cpu_count() or 1))
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        visible = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        return cores, [gpu for gpu in visible if gpu not in ("", "-1")]
    if os.environ.get("JAX_PLATFORMS", "").strip() == "cpu" or not shutil.which("nvidia-smi"):
        return cores, []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return cores, [str(i) for i, _ in enumerate(listed.splitlines())]


def run(sweep: Sweep, wids: list[int], shares: list[Share], on_change: Callable[[], None]) -> None:
    """Runs the units, at most one per share at a time.

    Args:
      sweep: a saved sweep.
      wids: units to run, in order.
      shares: the cores and GPUs of each of the simultaneous runs.
      on_change: called whenever a unit has ended.

    Raises:
      Stopped: after SIGINT or SIGTERM, when every run has saved and ended.
    """
    waiting, running = list(wids), {}
    free = list(shares)
    progress = _Progress(sweep, wids)
    with _signals() as stop:
        try:
            while waiting or running:
                while waiting and free:
                    wid, share = waiting.pop(0), free.pop(0)
                    running[wid] = (_start(sweep, wid, share), share)
                    devices = f"GPU {','.join(share[1])}" if share[1] else f"cores {share[0]}"
                    progress.log(f"unit {wid} started on {devices}")
                for wid, (process, share) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[wid]
                    free.append(share)
                    _note_death(sweep, wid, process.returncode)
                    state = units.status(sweep, wid)["state"]
                    progress.log(f"unit {wid} {state if state != units.STARTED else 'was stopped'}")
                    on_change()
                progress.show(list(running))
                if stop:
                    raise Stopped(stop[0])
                time.sleep(0.2)
        finally:
            _end([process for process, _ in running.values()], stop, progress)


def _start(sweep: Sweep, wid: int, share: Share) -> subprocess.Popen:
    folder = pathlib.Path(sweep.workdir(wid))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / units.LOG).open("ab") as log:
        return subprocess.Popen(
            command(sweep, wid, share),
            env=environment(share, dict(os.environ)),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which sends one SIGTERM
        )


def _note_death(sweep: Sweep, wid: int, code: int) -> None:
    """Records an end that the run could not record itself: a kill, or a crash at the start."""
    recorded = units.status(sweep, wid).get("exit_code")
    if code < 0:
        name = signal.Signals(-code).name
        cure = "; out of memory? fewer --jobs" if -code == signal.SIGKILL else ""
        units.record(sweep, wid, 128 - code, 0.0, f"killed by {name}{cure}")
    elif recorded != code:
        lines = (pathlib.Path(sweep.workdir(wid)) / units.LOG).read_text(errors="replace")
        last = (lines.strip().splitlines() or [""])[-1]
        units.record(sweep, wid, code, 0.0, last[:300])


def _end(processes: list[subprocess.Popen], stop: list[int], progress: "_Progress") -> None:
    """Asks the runs to save and end; a second signal kills them."""
    if not processes:
        return
    progress.log(f"stopping: {len(processes)} runs save first (a second signal kills them)")
    for process in processes:
        process.terminate()
    num_signals = len(stop)
    while any(process.poll() is None for process in processes):
        if len(stop) > num_signals:
            for process in processes:
                process.kill()
        time.sleep(0.1)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The SIGINTs and SIGTERMs that arrive, as a growing list."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    old = {number: signal.signal(number, lambda n, _: received.append(n)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class _Progress:
    """Prints progress: one line, overwritten, on a terminal; elsewhere a line every 30 s."""

    def __init__(self, sweep: Sweep, wids: list[int]):
        self._sweep, self._wids = sweep, wids
        self._is_terminal = sys.stdout.isatty()
        self._start = self._shown = time.monotonic()
        self._states = {wid: units.status(sweep, wid) for wid in wids}
        self._steps_before = self._steps()

    def log(self, text: str) -> None:
        """Prints a line that is not overwritten."""
        clear = "\r\x1b[K" if self._is_terminal else ""
        print(
            f"{clear}[{console.format_duration(time.monotonic() - self._start)}] {text}", flush=True
        )

    def show(self, running: list[int]) -> None:
        """Shows finished units, steps of the running ones and the time left."""
        now = time.monotonic()
        if now - self._shown < (1 if self._is_terminal else 30):
            return
        self._shown = now
        for wid in self._wids:
            if self._states[wid]["state"] not in (units.DONE, units.FAILED):
                self._states[wid] = units.status(self._sweep, wid)
        done = sum(s["state"] == units.DONE for s in self._states.values())
        steps_of_running = ", ".join(
            f"{wid}: {self._states[wid]['step']}/{self._states[wid]['steps']}" for wid in running
        )
        gained = self._steps() - self._steps_before
        left = sum(
            s["steps"] - s["step"] for s in self._states.values() if s["state"] != units.FAILED
        )
        eta = console.format_duration(left * (now - self._start) / gained) if gained else "?"
        text = f"{done}/{len(self._wids)} done · steps of unit {steps_of_running} · ETA {eta}"
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:width]}", end="", flush=True)
        else:
            self.log(text)

    def _steps(self) -> int:
        return sum(state["step"] for state in self._states.values())
