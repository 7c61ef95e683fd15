"""Every second is booked to its cause, and the verdict names the one that was put there."""

import gzip
import time
import types

import jax
import jax.numpy as jnp
import linear_task as lt
import numpy as np
import pytest

from dalle_jax.engine import checkpoint, chips, console, event_files, loop, prefetch, timing
from dalle_jax.types import UsageError


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *a: one)


def run(workdir, **overrides):
    config = lt.make_config(**overrides)
    program = loop.prepare(config, lt.make_task())
    return loop.train(program, lt.Batches(), lt.Batches(), str(workdir))


class Clock:
    """Time that passes when it is told to, and a device that is ready when it is told to be."""

    def __init__(self, monkeypatch, kind="TPU v5 lite", platform="tpu"):
        self.now, self.ready = 0.0, True
        fake = types.SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(timing, "time", fake)
        device = types.SimpleNamespace(device_kind=kind, platform=platform)
        task = lt.make_task(unit=("tokens", 80))
        self.meter = timing.Meter(16, task, [device] * 4)
        self.flops = task.flops

    def spend(self, cause, seconds):
        self.now += seconds
        self.meter.spent(cause)

    def step(self, seconds=0.0):
        self.now += seconds
        self.meter.step(types.SimpleNamespace(is_ready=lambda: self.ready))


def test_rates_of_an_interval(monkeypatch):
    clock = Clock(monkeypatch)
    for _ in range(10):
        clock.spend("input", 0.1)
        clock.step()
        clock.spend("compute", 0.4)
    clock.spend("checkpoint", 3.0)
    clock.spend("evaluation", 7.0)
    values = clock.meter.read()
    per_device = 2 * clock.flops / 4  # two steps a second on four devices
    expected = {
        "perf/images_per_s": 32.0,
        "perf/step_ms": 500.0,
        "perf/input_ms": 100.0,
        "perf/host_ms": 0.0,
        "perf/tokens_per_s": 2560.0,
        "perf/tflops_per_device": per_device / 1e12,
        "perf/mfu_pct": 100 * per_device / 197e12,
        "perf/input_wait_pct": 20.0,
        "perf/checkpoint_s": 3.0,
        "perf/evaluation_s": 7.0,
    }
    assert values == pytest.approx(expected)
    clock.step()
    clock.spend("compute", 1.0)
    assert clock.meter.read()["perf/step_ms"] == pytest.approx(1000.0)
    assert clock.meter.totals()["perf/checkpoint_pct"] == pytest.approx(100 * 3 / 16)


def test_a_wait_that_leaves_the_device_at_work_is_nobodys_fault(monkeypatch):
    clock = Clock(monkeypatch)
    clock.step()
    clock.ready = False
    clock.spend("input", 5.0)
    clock.spend("host", 5.0)
    assert clock.meter.totals()["perf/compute_pct"] == 100
    clock.ready = True
    clock.spend("input", 10.0)
    assert clock.meter.totals()["perf/input_pct"] == 50


@pytest.mark.parametrize(("platform", "cause"), [("tpu", "host"), ("cpu", "compute")])
def test_dispatch_computes_on_a_cpu_and_idles_elsewhere(monkeypatch, platform, cause):
    clock = Clock(monkeypatch, platform=platform)
    clock.step()
    clock.step(2.0)
    assert clock.meter.totals()[f"perf/{cause}_pct"] == 100


@pytest.mark.parametrize(
    ("cause", "remedy"),
    [("input", "data.threads"), ("host", "data.batch"), ("checkpoint", "train.save_every_steps"),
     ("evaluation", "train.eval_every_steps"), ("compute", "train.profile_steps")],
)  # fmt: skip
def test_the_verdict_names_cause_share_and_remedy(monkeypatch, cause, remedy):
    clock = Clock(monkeypatch)
    clock.step()
    clock.spend("compute", 70.0)
    clock.spend(cause, 30.0)
    text = clock.meter.verdict()
    assert text.startswith(f"{cause}-bound: {100 if cause == 'compute' else 30}%")
    assert remedy in text and "MFU" in text and "197" in text
    assert clock.meter.bound() == f"{cause}-bound"


def test_no_mfu_without_a_known_peak(monkeypatch):
    clock = Clock(monkeypatch, kind="Mystery 9000")
    clock.step(1.0)
    assert "perf/mfu_pct" not in clock.meter.read() and "MFU" not in clock.meter.verdict()
    assert "perf/tflops_per_device" in clock.meter.totals()
    assert all(kind.startswith(("TPU", "NVIDIA")) for kind in chips.PEAK_FLOPS)


@pytest.mark.parametrize("cause", ["input", "host", "checkpoint", "compute"])
def test_a_run_tells_what_held_it_back(monkeypatch, workdir, capsys, cause):
    """Time passes in one place of a real run, and the verdict names that place."""
    now, wait = [0.0], jax.block_until_ready
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def slowed(function, seconds):
        def slow(*args, **kwargs):
            wait(jax.live_arrays())  # the devices have nothing left to do
            now[0] += seconds
            return function(*args, **kwargs)

        return slow

    class InlineFeed(prefetch.Prefetch):
        """Reads in the loop's own thread, so that the time passes while the loop waits."""

        def __init__(self, read, indices, depth):
            self._read, self._indices = read, indices

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def wait(self):
            pass

        def __iter__(self):
            return ((i, slowed(self._read, 1.0)(i)) for i in self._indices)

    match cause:
        case "input":
            monkeypatch.setattr(prefetch, "Prefetch", InlineFeed)
        case "host":
            monkeypatch.setattr(console, "step_line", slowed(console.step_line, 1.0))
        case "checkpoint":
            save = checkpoint.Checkpointer.save
            monkeypatch.setattr(checkpoint.Checkpointer, "save", slowed(save, 1.0))
        case "compute":
            monkeypatch.setattr(jax, "block_until_ready", slowed(jax.block_until_ready, 1.0))
    final = run(workdir, **{"train.eval_batches": 0})
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"{cause}-bound: 100%") for line in lines), lines
    last = event_files.read(str(workdir))[-1]
    assert (last["kind"], last["step"]) == ("run", 20) and final["step"] == 20
    shares = {k: v for k, v in last.items() if k.endswith("_pct")}
    assert shares.pop(f"perf/{cause}_pct") == 100 and not any(shares.values())


def test_totals_are_no_metrics_of_the_model(workdir):
    run(workdir)
    stored = event_files.final_metrics(str(workdir))
    assert stored["step"] == 20 and not any(name.startswith("perf/") for name in stored)


def test_profile_and_hlo_by_config(workdir, capsys):
    run(workdir, **{"train.profile_steps": 2, "train.profile_at": 3, "train.dump_hlo": True})
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    assert "HloModule" in gzip.decompress((workdir / "hlo" / "step.txt.gz").read_bytes()).decode()
    assert "profile in" in capsys.readouterr().out


def test_a_profile_that_the_run_cannot_hold_is_refused():
    for values in ({"profile_steps": 3, "profile_at": 18}, {"profile_steps": -1}):
        config = lt.make_config(**{f"train.{k}": v for k, v in values.items()})
        with pytest.raises(UsageError, match="train.profile_at"):
            loop.prepare(config, lt.make_task())


def test_a_program_that_cannot_be_printed_does_not_end_the_run(workdir, capsys):
    class Mute:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    timing.dump_hlo(str(workdir), Mute())
    assert "cannot print" in capsys.readouterr().out and not workdir.exists()


def test_metering_costs_microseconds():
    """A step is metered in far less than the 20 us that dispatching one takes."""
    meter = timing.Meter(16, lt.make_task(), jax.devices())
    result = jnp.zeros(())
    times = []
    for _ in range(200):
        start = time.perf_counter()
        meter.spent(timing.INPUT)
        meter.step(result)
        meter.spent(timing.COMPUTE)
        meter.spent(timing.HOST)
        times.append(time.perf_counter() - start)
    assert np.median(times) < 1e-4
