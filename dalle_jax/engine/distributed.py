"""Several processes as one job: they find each other, agree, and end together.

Each host runs the same command. `job` starts JAX's own runtime (`jax.distributed`), so that all
devices of all processes form one set, and ensures that no process waits for one that is gone:

    one process                                 all other processes
    raises, refuses its input or hangs          print its message and end within 2 s (a note in the
                                                runtime's key-value store)
    is killed, or its machine is lost           end at the next collective or within
                                                `heartbeat_timeout_s`; the runtime names it
    never starts                                end after `timeout_s`

Exit codes: 2 if bad input ended the job, else 1. The runtime ends a process that has lost the
others with SIGABRT, 134. With one process, nothing here has any effect.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np

# The runtime's key-value store and the detection of clusters have no public name. Both are as
# old as jax.distributed, and orbax uses the store too.
from jax._src import clusters
from jax._src import distributed as runtime
from jax.experimental import multihost_utils

from dalle_jax.types import UsageError

_NOTE = "dalle_jax/ended"
_POLL_S = 1.0
# Process 0 serves the store: it stays this long after writing its own note.
_LINGER_S = 3.0
_DAY_MS = 24 * 3600 * 1000
_barriers = itertools.count()
_activity = "its start"


@dataclasses.dataclass(frozen=True)
class Start:
    """The address of process 0, and this process's number.

    Attributes:
      coordinator: HOST:PORT of process 0, the same text on all processes; "" = ask SLURM, TPU
        metadata, Open MPI or Kubernetes for it and for the two numbers below.
      process_id: number of this process, 0 to process_count - 1.
      process_count: number of processes.
      timeout_s: seconds to wait for all processes at the start.
      heartbeat_timeout_s: seconds without a heartbeat after which a process counts as dead.
    """

    coordinator: str = ""
    process_id: int | None = None
    process_count: int | None = None
    timeout_s: int = 300
    heartbeat_timeout_s: int = 100

    def __post_init__(self):
        given = (self.coordinator or None, self.process_id, self.process_count)
        if None in given and given != (None, None, None):
            raise UsageError(
                f"--coordinator={self.coordinator}, --process_id={self.process_id} and "
                f"--process_count={self.process_count} belong together; give all three, or only "
                "--distributed where a scheduler knows them."
            )
        if self.coordinator:
            _port(self.coordinator)
            if not 0 <= self.process_id < self.process_count:
                raise UsageError(
                    f"--process_id={self.process_id} of --process_count={self.process_count}: "
                    f"expected 0 to {self.process_count - 1}."
                )
        for name in ("timeout_s", "heartbeat_timeout_s"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}; expected 1 second or more.")


@contextlib.contextmanager
def job(start: Start | None, *, takes_notice: bool = False) -> Iterator[None]:
    """Runs the body as one process of the job; if one process ends early, all of them end.

    Enter it before anything asks JAX for a device.

    Args:
      start: the address of the others; None = this process is alone.
      takes_notice: the body asks `interrupt.Stop` at every step, so SIGTERM is a notice to all
        processes to save and end. Otherwise SIGTERM kills, as it does without a job.

    Raises:
      UsageError: before anything starts, for a port in use or a cluster that is not found.
      Exception: whatever the body raises, with one process. With several, this process exits
        instead, after notifying the others.
    """
    if start is not None:
        _join(start, takes_notice)
    if jax.process_count() == 1:
        yield
        return
    if runtime.global_state.client is None:
        raise UsageError(
            f"this is one of {jax.process_count()} processes of a pod slice, which do not know of "
            "each other; start all of them with --distributed."
        )
    ended = threading.Event()
    listener = threading.Thread(target=_listen, args=(ended,), name="job", daemon=True)
    listener.start()
    try:
        yield
    except UsageError as error:
        fail(str(error), code=2)
    except KeyboardInterrupt:
        fail("interrupted", code=130)
    except Exception as error:
        traceback.print_exc()
        is_lost = isinstance(error, jax.errors.JaxRuntimeError)
        hint = " (if a connection was lost: the process whose output just ends has died)"
        fail(_one_line(error) + hint * is_lost)
    finally:
        ended.set()
        listener.join()


def fail(text: str, code: int = 1) -> NoReturn:
    """Ends this process and all others of its job, with `text` on stderr.

    Not by an exception: at exit, a process would wait for its lost peers for minutes. Any thread
    may call it.
    """
    _print(f"error: {me()}: {text}")
    client = runtime.global_state.client
    if client is not None:
        note = json.dumps([code, jax.process_index(), f"{me()}: {text}"])
        try:
            client.key_value_set(_NOTE, note)
            if jax.process_index() == 0:
                time.sleep(_LINGER_S)
        except jax.errors.JaxRuntimeError:  # another was first, or the store is gone
            code = _print_other_note(text) or code
    sys.stdout.flush()
    os._exit(code)


def agree(facts: Mapping[str, Any], ignore: tuple[str, ...] = ()) -> None:
    """Refuses to continue unless all processes have the same facts; all must call it together.

    Args:
      facts: name -> a value, compared as text.
      ignore: prefixes of names that may differ.

    Raises:
      UsageError: the same on every process, with the facts that differ.
    """
    if jax.process_count() == 1:
        return
    mine = {k: str(v) for k, v in facts.items() if not k.startswith(ignore)}
    texts = _gather(json.dumps(mine, sort_keys=True))
    usual, count = collections.Counter(texts).most_common(1)[0]
    if count == len(texts):
        return
    lines, first = [], texts.index(usual)
    for i, text in enumerate(texts):
        if text != usual:
            a, b = json.loads(usual), json.loads(text)
            differs = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
            texts_of_5 = [f"{k} is {b.get(k)} (process {first}: {a.get(k)})" for k in differs[:5]]
            more = f" and {len(differs) - 5} more" * (len(differs) > 5)
            lines.append(f"  process {i}: {'; '.join(texts_of_5)}{more}")
    raise UsageError(
        "the processes were not started alike:\n"
        + "\n".join(lines)
        + "\nstart all of them with the same code, command and --workdir."
    )


def all_true(value: bool) -> bool:
    """Whether `value` is true on every process; all must call it together."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.asarray(value)).all())


def gather_rows(rows: np.ndarray) -> np.ndarray:
    """The rows of all processes in process order; every process must pass equally many."""
    if jax.process_count() == 1:
        return rows
    return np.asarray(multihost_utils.process_allgather(rows, tiled=True))


def wait_for_all(event: str) -> None:
    """Returns when every process has called this, however long that takes.

    Through the key-value store: on some backends a collective gives up after a while.
    """
    if jax.process_count() > 1:
        name = f"dalle_jax/{event}/{next(_barriers)}"
        runtime.global_state.client.wait_at_barrier(name, _DAY_MS)


def set_activity(activity: str) -> None:
    """Sets what this process prints as its activity if another process ends the job."""
    global _activity
    _activity = activity


def me() -> str:
    """`process 3 of 8 (host-3)`, also before the others have started."""
    state = runtime.global_state
    return f"process {state.process_id} of {state.num_processes} ({socket.gethostname()})"


def _join(start: Start, takes_notice: bool) -> None:
    """Connects to the other processes; returns when all have started."""
    address, count, index, local = start.coordinator, start.process_count, start.process_id, None
    if not address:
        address, count, index, local = _detect(start.timeout_s)
    if count == 1:
        return
    name = f"process {index} of {count} ({socket.gethostname()})"
    if index == 0:
        _check_port(_port(address), name)
    # Without the service SIGTERM keeps its usual effect; with it, the runtime catches the signal.
    jax.config.update("jax_enable_preemption_service", takes_notice)
    # The runtime gives up with SIGABRT and a C++ stack; the timer gives up earlier, in words.
    timer = threading.Timer(start.timeout_s, _give_up, (name, index, count, address, start))
    timer.daemon = True
    timer.start()
    jax.distributed.initialize(
        address,
        count,
        index,
        local_device_ids=local,
        cluster_detection_method="deactivate",  # done above, where a failure can be explained
        initialization_timeout=start.timeout_s + 60,
        heartbeat_timeout_seconds=start.heartbeat_timeout_s,
    )
    jax.devices()  # the exchange of all devices also waits for all processes
    timer.cancel()


def _detect(timeout_s: int) -> tuple[str, int, int, list[int] | None]:
    """(address of process 0, processes, number of this one, its devices or None = all)."""
    given = os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        address, count, index, local = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            given, None, None, None, None, timeout_s
        )
    except Exception as error:  # a silent metadata server, a variable that is not a number
        raise UsageError(
            f"--distributed asked this machine for the other processes and failed "
            f"({_one_line(error)}); give --coordinator=HOST:PORT --process_id=I --process_count=N."
        ) from error
    if None in (address, count, index):
        raise UsageError(
            "--distributed found neither SLURM (srun), TPU metadata, Open MPI nor Kubernetes; "
            "give --coordinator=HOST:PORT --process_id=I --process_count=N."
        )
    # JAX assigns one GPU to every SLURM task; a node's only task owns all of its GPUs.
    if "JAX_LOCAL_DEVICE_IDS" in os.environ or os.environ.get("SLURM_STEP_NUM_NODES") == str(count):
        local = None
    return address, count, index, None if local is None else list(local)


def _port(address: str) -> int:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(
            f"--coordinator={address}; expected HOST:PORT of process 0, e.g. 10.0.0.1:8476."
        )
    return int(port)


def _check_port(port: int, name: str) -> None:
    """Refuses a port that another program uses: gRPC would crash, or share it silently."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    both = family == socket.AF_INET6
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise UsageError(
            f"{name}: port {port} cannot be opened ({error.strerror or error}); another job on "
            "this machine is probably using it: choose another port in --coordinator, the same "
            "for all processes."
        ) from error


def _give_up(name: str, index: int, count: int, address: str, start: Start) -> None:
    """Ends a process that has waited too long for the others."""
    others = (
        f"each process that did start prints this message; of processes 0 to {count - 1}, those "
        "that print nothing are missing"
    )
    if index > 0:
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), 5).close()
        except OSError as error:
            others = f"nothing answers at that address ({error}), so process 0 is missing"
    _print(
        f"error: {name}: waited {start.timeout_s} s at {address} for all {count} processes: "
        f"{others}. Check that each was started with this address, this count and its own number, "
        "and that no firewall is in between; --start_timeout_s waits longer."
    )
    os._exit(1)


def _listen(ended: threading.Event) -> None:
    """Ends this process when another one has written a note."""
    while not ended.wait(_POLL_S):
        if code := _print_other_note():
            sys.stdout.flush()
            os._exit(code)


def _print_other_note(printed: str = "") -> int:
    """Prints the note of another process; returns its exit code, 0 without a note.

    Args:
      printed: the text that this process has already printed; an equal note is not repeated.
    """
    try:
        note = runtime.global_state.client.key_value_try_get(_NOTE)
    except jax.errors.JaxRuntimeError:  # none; or a lost runtime, which ends the process by itself
        return 0
    code, index, text = json.loads(note)
    if index == jax.process_index():
        return 0
    if not printed or not text.endswith(printed):
        _print(f"error: {me()}, at {_activity}, ends because of {text}")
    return code


def _gather(text: str) -> list[str]:
    """The texts of all processes, on every process."""
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(data.size, np.int32))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [row[:n].tobytes().decode() for row, n in zip(np.asarray(rows), sizes, strict=True)]


def _one_line(error: BaseException) -> str:
    """An exception in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}"


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
