"""The same bits after any interruption, one compilation, nothing broken saved."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import linear_task as lt
import numpy as np
import pytest

from dalle_jax.engine import checkpoint, event_files, loop, metric_log
from dalle_jax.types import UsageError

HERE = pathlib.Path(__file__).parent
ONE = {"mesh.data": 1}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """One device unless a test says otherwise: eight compile ten times as long."""
    real = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda *a: real[:1])
    return real


def run(workdir, batches=None, task=None, **overrides):
    batches = batches or lt.Batches()
    config = lt.make_config(**overrides)
    program = loop.prepare(config, task or lt.make_task())
    return loop.train(program, batches, lt.Batches(), str(workdir))


def weights(workdir):
    return checkpoint.flatten(checkpoint.load_variables(str(workdir)).params)


def same(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return all(np.array_equal(a[name], b[name]) for name in a)


def test_training_lowers_the_loss(workdir):
    final = run(workdir, **{"train.steps": 200, "train.log_every_steps": 100})
    first = next(e for e in event_files.read(workdir) if e["kind"] == "train")
    assert final["step"] == 200
    assert final["eval/loss"] < 0.2 * first["loss"]


def test_resumed_run_equals_the_unbroken_one(tmp_path):
    unbroken = run(tmp_path / "a")
    batches = lt.Batches()
    run(tmp_path / "b", batches, **{"train.steps": 7})
    resumed = run(tmp_path / "b", batches)
    assert same(tmp_path / "a", tmp_path / "b")
    assert resumed == unbroken
    # Exactly the batches of the unbroken run, in order, none twice.
    assert batches.asked == list(range(20))


def test_steps_cannot_change_under_a_schedule_that_depends_on_them(workdir):
    run(workdir, **{"train.steps": 6, "optim.schedule": "cosine"})
    with pytest.raises(UsageError, match="train.steps: stored 6, given 20(.|\n)*decay_steps"):
        run(workdir, **{"optim.schedule": "cosine"})


def test_steps_can_grow_under_a_fixed_schedule(workdir):
    fixed = {"optim.schedule": "cosine", "optim.decay_steps": 20}
    run(workdir, **{"train.steps": 6, **fixed})
    assert run(workdir, **{"train.steps": 8, **fixed})["step"] == 8
    assert checkpoint.load_config(str(workdir)).train.steps == 8


def test_finished_run_is_a_no_op(workdir, capsys):
    final = run(workdir)
    batches = lt.Batches()
    again = run(workdir, batches)
    assert batches.asked == []
    assert "nothing to do" in capsys.readouterr().out
    assert again["step"] == final["step"] and again["eval/loss"] == pytest.approx(
        final["eval/loss"]
    )


def test_another_config_is_refused_by_field(workdir):
    run(workdir)
    with pytest.raises(UsageError, match=r"optim.lr: stored 0.05, given 0.1\n"):
        run(workdir, **{"optim.lr": 0.1, "train.log_every_steps": 3})


def test_step_compiles_once(workdir, caplog):
    with jax.log_compiles():
        run(workdir, **{"train.eval_every_steps": 5})
    compiled = [r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.msg]
    assert sum("jit(step)" in text for text in compiled) == 1
    assert sum("jit(evaluate)" in text for text in compiled) == 1


def test_nan_stops_the_run_and_is_not_saved(workdir):
    with pytest.raises(metric_log.NonFiniteError) as caught:
        run(workdir, lt.Batches(bad_step=14))
    text = str(caught.value)
    assert "step 15" in text and "ex14-3" in text and "Last good checkpoint: step 12" in text
    assert checkpoint.steps(str(workdir)) == [6, 12]
    # Mended data: the same command goes on.
    assert run(workdir)["step"] == 20


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_the_step_and_stops(workdir, tmp_path, signum):
    class Signalling(lt.Batches):
        def __call__(self, step):
            if step == 9:
                os.kill(os.getpid(), signum)
            return super().__call__(step)

    before = signal.getsignal(signum)
    with pytest.raises(loop.Interrupted) as caught:
        run(workdir, Signalling(delay=0.02))
    assert caught.value.signum == signum
    assert checkpoint.steps(str(workdir))[-1] == caught.value.step < 20
    assert signal.getsignal(signum) == before
    run(workdir)
    run(tmp_path / "unbroken")
    assert same(workdir, tmp_path / "unbroken")


def test_kill_9_then_the_same_command_gives_the_same_bits(workdir, tmp_path, compile_flags):
    root = HERE.parents[1]
    command = [sys.executable, str(HERE / "linear_task.py"), str(workdir), "mesh.data=1"]
    env = {**os.environ, "PYTHONPATH": str(root), "XLA_FLAGS": compile_flags}
    process = subprocess.Popen([*command, "delay=0.05"], env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not checkpoint.steps(str(workdir)) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < checkpoint.steps(str(workdir))[-1] < 20
    run(workdir, **ONE)
    run(tmp_path / "unbroken", **ONE)
    assert same(workdir, tmp_path / "unbroken")
    steps = [e["step"] for e in event_files.read(workdir) if e["kind"] == "train"]
    assert steps == sorted(set(steps)) and steps[-1] == 20


def test_error_of_the_reader_reaches_the_caller_and_the_thread_ends(workdir):
    class Broken(lt.Batches):
        def __call__(self, step):
            if step == 3:
                raise OSError("disk on fire")
            return super().__call__(step)

    with pytest.raises(OSError, match="disk on fire"):
        run(workdir, Broken())
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


def test_micro_batches_equal_the_whole_batch(tmp_path):
    # Without noise: each micro-batch draws its own.
    task = lt.make_task(noise=0.0)
    run(tmp_path / "whole", task=task)
    run(tmp_path / "parts", task=task, **{"optim.accum_steps": 4})
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-5)
    extra = checkpoint.load_variables(str(tmp_path / "parts")).extra
    assert extra["seen"] == 20 * 16


def test_many_devices_train_like_one(tmp_path, one_device, monkeypatch):
    one = run(tmp_path / "one")
    monkeypatch.setattr(jax, "devices", lambda *a: one_device)
    many = run(tmp_path / "many", **{"mesh.data": 2, "mesh.fsdp": 4})
    # The sums over devices are in another order; nothing else may differ.
    assert many["loss"] == pytest.approx(one["loss"], rel=1e-4)
    a, b = weights(tmp_path / "one"), weights(tmp_path / "many")
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-4)


def test_data_that_does_not_fit_is_refused_with_both_shapes(workdir):
    with pytest.raises(UsageError, match=r"expects x \(16, 8\) float32; the data gives \(32, 8\)"):
        run(workdir, lt.Batches(batch=32))


def test_batch_that_cannot_be_split_is_refused(workdir):
    with pytest.raises(UsageError, match="data.batch=16 is not a multiple of 3.*use 15 or 18"):
        run(workdir, **{"optim.accum_steps": 3})
    assert not workdir.exists()


def test_preview_alarm_and_warm_start(workdir, capsys):
    seen = []

    def preview(params, extra, frozen, batch, key):
        seen.append(params["dense"]["kernel"].shape)
        return {"weights": np.zeros((5, 8, 8, 3), np.float32)}

    def warm_start(params, extra):
        params["dense"]["bias"] = np.full_like(params["dense"]["bias"], 7)
        return params, extra

    task = lt.make_task(preview=preview, warm_start=warm_start, alarms={"seen": "many seen"})
    options = {"train.steps": 2, "optim.lr": 1e-9, "optim.weight_decay": 0.0}
    run(workdir, task=task, **options, **{"train.log_every_steps": 1})
    assert seen == [(8, 16)]
    assert (workdir / "previews" / "weights-2.png").exists()
    assert capsys.readouterr().out.count("many seen") == 1  # when it starts, not with every line
    np.testing.assert_allclose(weights(workdir)["dense/bias"], 7, atol=1e-5)


def test_dry_run_prints_what_would_be_trained():
    text = loop.dry_run(loop.prepare(lt.make_config(), lt.make_task()))
    assert "144 parameters" in text and "dense/kernel" in text and "(16, 8)" in text
    assert "step       20" in text


def test_metrics_are_strict_json(workdir):
    run(workdir)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line, parse_constant=lambda c: pytest.fail(c)) for line in lines]
    assert [e["step"] for e in events if e["kind"] == "train"] == [5, 10, 15, 20]
    assert {"loss", "grad_norm", "lr", "update_ratio", "perf/images_per_s"} <= events[0].keys()
