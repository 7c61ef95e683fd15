"""Jobs of several processes, on this machine: what one does to the others, and what stays equal."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import linear_task as lt
import numpy as np
import pytest

from dalle_jax.engine import (
    checkpoint,
    distributed,
    event_files,
    interrupt,
    loop,
    meshes,
    sharding,
    workdir,
)
from dalle_jax.types import UsageError

check_mesh = workdir.check_mesh  # `workdir` is the fixture's name inside a test

HERE = pathlib.Path(__file__).parent
HEARTBEAT_S = 10  # of linear_task


class Job:
    """n processes of two faked devices each; they end with the test, whatever it does."""

    def __init__(self, workdir, n, *args, only=None, per_process=()):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        env = {
            **os.environ,
            "PYTHONPATH": str(HERE.parents[1]),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2"),
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        command = [sys.executable, str(HERE / "linear_task.py"), str(workdir), *args]
        command += [f"n={n}", f"port={port}"]
        extra = [*per_process, *[""] * n]
        self.processes = [
            subprocess.Popen(
                [*command, f"i={i}", *filter(None, [extra[i]])],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for i in (range(n) if only is None else only)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()  # also one that is stopped
            process.communicate()

    def end(self, *which, timeout=150) -> list[str]:
        """Waits for these processes (default: all); returns what they printed."""
        chosen = [self.processes[i] for i in which] if which else self.processes
        return [process.communicate(timeout=timeout)[0] for process in chosen]

    def codes(self) -> list[int]:
        return [process.returncode for process in self.processes]


def wait_for_checkpoints(workdir, count):
    deadline = time.monotonic() + 120
    while len(checkpoint.steps(str(workdir))) < count and time.monotonic() < deadline:
        time.sleep(0.05)


def alone(workdir, devices, monkeypatch, may_reshard=False, **overrides):
    """The same training in this process."""
    real = jax.devices()[:devices]
    with monkeypatch.context() as patch:
        patch.setattr(jax, "devices", lambda *a: real)
        config = lt.make_config(**{**EVERY_STEP, **overrides})
        batches = lt.Batches()
        program = loop.prepare(config, lt.make_task())
        return loop.train(program, batches, batches, str(workdir), may_reshard=may_reshard)


EVERY_STEP = {"train.log_every_steps": 1, "train.save_every_steps": 3}
EVERY_STEP_FLAGS = tuple(f"{k}={v}" for k, v in EVERY_STEP.items())


def losses(workdir) -> dict[int, float]:
    events = [e for e in event_files.read(str(workdir)) if e["kind"] == "train"]
    assert [e["step"] for e in events] == list(range(1, len(events) + 1))  # each once, in order
    return {e["step"]: e["loss"] for e in events}


def test_a_job_goes_on_with_other_processes_and_ends_like_an_unbroken_one(
    workdir, tmp_path, monkeypatch
):
    """8 devices in 4 processes, 4 in 2, 1, 8: killed, half blind, told to stop, resharded."""
    # Kill -9 one of four: the others end by themselves, soon, and say why.
    with Job(workdir, 4, *EVERY_STEP_FLAGS, "mesh.fsdp=4", "delay=0.2") as job:
        wait_for_checkpoints(workdir, 2)
        job.processes[2].kill()
        killed = time.monotonic()
        out = job.end()
        assert time.monotonic() - killed < 4 * HEARTBEAT_S
        assert job.codes()[2] == -signal.SIGKILL and 0 not in job.codes(), out
        assert all(re.search("another task died|error: process", out[i]) for i in (0, 1, 3)), out
    saved = checkpoint.steps(str(workdir))
    assert len(saved) >= 2 and saved[-1] < 15, saved

    # Two processes go on. One cannot read the newest checkpoint: both take the one before it.
    # Then one gets SIGTERM: both save the same step. Slowly, because JAX's runtime looks for the
    # signal once a second: on an idle machine the last 4 steps are over before.
    faults = ["fault=term:1:16", f"unreadable=1:{saved[-1]}", "delay=0.5"]
    with Job(workdir, 2, *EVERY_STEP_FLAGS, "mesh.fsdp=2", *faults) as job:
        out = job.end()
        assert job.codes() == [143, 143], out
    assert f"continuing {workdir} from step {saved[-2]}." in out[0]
    assert all(f"step {saved[-1]} is damaged" in text for text in out)
    assert (workdir / "damaged" / str(saved[-1])).is_dir()
    step = checkpoint.steps(str(workdir))[-1]
    assert 14 <= step < 20
    assert all(f"SIGTERM: saved step {step};" in text for text in out)

    # One device, then eight, in one process.
    if step < 18:
        alone(workdir, 1, monkeypatch, **{"train.steps": 18, "mesh.data": 1})
    alone(workdir, 8, monkeypatch, **{"mesh.fsdp": 8})

    alone(tmp_path / "unbroken", 8, monkeypatch, **{"mesh.fsdp": 4})
    a, b = losses(workdir), losses(tmp_path / "unbroken")
    assert len(a) == 20
    # The sums over devices are in another order; nothing else differs.
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-4)
    a, b = (
        checkpoint.flatten(checkpoint.load_variables(str(w)).params)
        for w in (workdir, tmp_path / "unbroken")
    )
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-4)


def test_a_process_with_another_config_is_named_by_all(workdir):
    with Job(workdir, 2, per_process=["", "optim.lr=0.1"]) as job:
        out = job.end()
        assert job.codes() == [2, 2], out
    for text in out:
        assert "process 1: config.optim.lr is 0.1 (process 0: 0.05)" in text, text
    assert not workdir.exists()


def test_an_error_of_one_process_ends_all_with_its_text(workdir):
    # tensor=4 spans both processes: each of them holds all rows of the batch.
    with Job(workdir, 2, "mesh.tensor=4", "fault=raise:1:5") as job:
        out = job.end()
        assert job.codes() == [1, 1], out
    assert "Traceback" in out[1] and "/no/such/disk" in out[1]
    # Where process 0 was then is not given: readers run ahead of the steps.
    assert re.search(
        r"process 0 of 2 .*, at .+, ends because of process 1 of 2 .*/no/such/disk", out[0]
    )


def test_a_process_that_hangs_ends_all_and_says_where(workdir):
    with Job(workdir, 2, "fault=hang:1:5", "train.hang_timeout_s=4") as job:
        out = job.end()
        assert job.codes() == [1, 1], out
    assert any("reading the batch of step 6" in text for text in out), out
    assert any("train.hang_timeout_s=4" in text for text in out)


def test_a_frozen_process_ends_the_others(workdir):
    with Job(workdir, 2, "fault=freeze:1:5", "delay=0.1") as job:
        out = job.end(0)
        assert job.codes()[0] not in (0, None)
    assert re.search(r"stopped sending heartbeats.*\n1\n", out[0]), out[0]


def test_a_process_that_never_comes_is_waited_for_until_the_timeout(workdir):
    with (
        Job(workdir, 2, "wait=3", only=[0]) as first,
        Job(workdir, 2, "wait=3", only=[1]) as second,
    ):
        (a,), (b,) = first.end(), second.end()
        assert first.codes() + second.codes() == [1, 1], a + b
    assert re.search(r"error: process 0 of 2 .*: waited 3 s at localhost:\d+ for all 2", a), a
    assert "process 1 of 2" in b and "so process 0 is missing" in b


def test_a_port_in_use_is_refused_before_anything_starts():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        start = distributed.Start(f"localhost:{port}", 0, 2)
        with pytest.raises(UsageError, match=rf"process 0 of 2 .*port {port} cannot be opened"):
            with distributed.job(start):
                raise AssertionError


@pytest.mark.parametrize(
    "fields, text",
    [
        (dict(coordinator="host:1"), "belong together"),
        (dict(process_id=0), "belong together"),
        (dict(coordinator="host", process_id=0, process_count=2), "HOST:PORT"),
        (dict(coordinator="host:http", process_id=0, process_count=2), "HOST:PORT"),
        (dict(coordinator="host:1", process_id=2, process_count=2), "expected 0 to 1"),
        (dict(timeout_s=0), "timeout_s=0"),
    ],
)
def test_flags_that_do_not_fit_are_refused(fields, text):
    with pytest.raises(UsageError, match=text):
        distributed.Start(**fields)


SLURM = dict(
    SLURM_JOB_ID="4100", SLURM_STEP_NODELIST="gpu[07-08,11]", SLURM_NTASKS="2", SLURM_PROCID="1",
    SLURM_LOCALID="1", SLURM_STEP_NUM_NODES="1",
)  # fmt: skip


def test_slurm_tells_who_and_where(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert distributed._detect(1) == ("gpu07:61444", 2, 1, [1])  # one GPU per task
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    assert distributed._detect(1)[3] is None  # one task per node: all its GPUs


def test_no_cluster_is_an_error_with_the_flags_to_use(monkeypatch):
    for name in SLURM:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    with pytest.raises(UsageError, match="found neither SLURM.*--coordinator=HOST:PORT"):
        with distributed.job(distributed.Start()):
            raise AssertionError


def test_one_process_is_not_touched(monkeypatch):
    with pytest.raises(KeyError):
        with distributed.job(None):
            raise KeyError
    distributed.agree({"a": 1})
    distributed.wait_for_all("nothing")
    assert distributed.all_true(True) and not distributed.all_true(False)


def test_same_config_on_another_mesh_needs_permission(workdir, monkeypatch):
    alone(workdir, 8, monkeypatch, **{"train.steps": 4})
    with pytest.raises(UsageError) as caught:
        alone(workdir, 2, monkeypatch)
    text = str(caught.value)
    assert "mesh (data=8, fsdp=1, tensor=1)" in text and "mesh (data=2, fsdp=1, tensor=1)" in text
    assert "--reshard" in text and "--config.mesh.data=2" in text
    # Permission, or a mesh that is written out.
    assert alone(workdir, 2, monkeypatch, True, **{"train.steps": 5})["step"] == 5
    assert alone(workdir, 4, monkeypatch, **{"mesh.data": 4, "train.steps": 6})["step"] == 6
    config = lt.make_config()
    keeper = checkpoint.Checkpointer(str(workdir), config)
    meta = keeper.latest_meta()
    keeper.close()
    assert meta["step"] == 6 and meta["mesh"]["shape"] == {"data": 4, "fsdp": 1, "tensor": 1}
    check_mesh(str(workdir), {}, meshes.make_mesh(config.mesh), config)  # an older one


def test_one_process_reads_all_rows():
    mesh = meshes.make_mesh(lt.make_config(**{"mesh.fsdp": 2, "mesh.tensor": 2}).mesh)
    np.testing.assert_array_equal(sharding.local_rows(mesh, 16), np.arange(16))


def test_watchdog_counts_only_its_own_waking_time(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    ends = []
    with interrupt.Watchdog(0.4, ends.append) as watchdog:
        for _ in range(8):
            watchdog.begin("something short")
            time.sleep(0.1)
        assert not ends
        watchdog.begin("a long thing")
        time.sleep(1.0)
    assert len(ends) == 1 and "a long thing has taken" in ends[0]


def test_watchdog_is_off_with_one_process():
    ends = []
    with interrupt.Watchdog(0.01, ends.append):
        time.sleep(0.1)
    assert not ends
