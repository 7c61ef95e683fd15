"""The local runner, with a shell script in the place of training."""

import os
import signal
import threading
import time

import pytest

from dalle_jax.sweeps import local, units

CONFIG = """
from dalle_jax import config as cfg

def get_config(arg=None):
    return cfg.ConfigDict(dict(seed=0, train=dict(steps=4)))
"""

# Notes when it began and ended, and does what the file `$1/todo` asks of it.
PROGRAM = """
echo "begin $2" >>"$3"
trap 'echo "end $2" >>"$3"; exit 143' TERM
echo '{"step": 2, "kind": "eval", "loss": 0.5}' >>"$1/metrics.jsonl"
case "$(cat "$1/todo" 2>/dev/null)" in
  hang) sleep 60 & wait ;;
  die) kill -KILL $$ ;;
  fail) echo "error: told to fail"; echo "end $2" >>"$3"; exit 3 ;;
  *) sleep 0.2 ;;
esac
echo '{"step": 4, "kind": "eval", "loss": 0.25}' >>"$1/metrics.jsonl"
echo "end $2" >>"$3"
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    file = tmp_path / "config.py"
    file.write_text(CONFIG)
    hyper = [{"seed": seed} for seed in range(4)]
    sweep_of_seeds = units.define(str(tmp_path / "runs"), str(file), {}, hyper, "eval/loss", "min")
    sweep_of_seeds.save()
    log = tmp_path / "log"

    def command(sweep, wid, share):
        return ["bash", "-c", PROGRAM, "unit", sweep.workdir(wid), str(wid), str(log)]

    monkeypatch.setattr(local, "command", command)
    return sweep_of_seeds


def tell(sweep, wid, what):
    folder = units.epath.Path(sweep.workdir(wid))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "todo").write_text(what)


def events(tmp_path):
    file = tmp_path / "log"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def states(sweep):
    return [units.status(sweep, wid)["state"] for wid in sweep.wids]


def run(sweep, jobs=2, retry=False):
    changes = []
    places = local.shares(jobs, [0, 1], [])
    local.run(sweep, units.to_run(sweep, retry=retry), places, lambda: changes.append(1))
    return changes


@pytest.mark.parametrize("jobs", [1, 2, 4])
def test_every_unit_runs_once_and_few_at_a_time(sweep, tmp_path, jobs):
    assert len(run(sweep, jobs)) == 4
    assert states(sweep) == ["done"] * 4
    at_work = most = 0
    for what, _ in events(tmp_path):
        at_work += 1 if what == "begin" else -1
        most = max(most, at_work)
    assert most <= jobs and len(events(tmp_path)) == 8
    assert run(sweep) == [], "finished units are not run again"


def test_a_failure_stops_no_other_and_can_be_tried_again(sweep, capsys):
    tell(sweep, 1, "fail")
    tell(sweep, 2, "die")
    run(sweep)
    assert states(sweep) == ["failed", "failed", "done", "done"]
    assert units.status(sweep, 1)["error"] == "error: told to fail"
    assert "SIGKILL" in units.status(sweep, 2)["error"]
    assert "unit 1 failed" in capsys.readouterr().out
    assert run(sweep) == []
    tell(sweep, 1, "")
    tell(sweep, 2, "")
    assert len(run(sweep, retry=True)) == 2 and states(sweep) == ["done"] * 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_runs_save_and_the_sweep_goes_on_later(sweep, tmp_path, number):
    for wid in (1, 2):
        tell(sweep, wid, "hang")
    before = signal.getsignal(number)

    def interrupt():
        deadline = time.monotonic() + 60
        while len(events(tmp_path)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)  # until the programs have their traps
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(local.Stopped) as caught:
        run(sweep)
    thread.join()
    assert caught.value.signum == number and signal.getsignal(number) == before
    ended = [wid for what, wid in events(tmp_path) if what == "end"]
    assert sorted(ended) == ["1", "2"], "asked to end, not killed"
    assert states(sweep) == ["started", "started", "waiting", "waiting"]
    for wid in (1, 2):
        tell(sweep, wid, "")
    run(sweep)
    assert states(sweep) == ["done"] * 4


def test_a_unit_keeps_to_its_cores(monkeypatch, tmp_path):
    sweep_of_seeds = units.Sweep("runs/7", "c.py", {}, ({"seed": 0},), "loss", "min")
    monkeypatch.setattr(local.shutil, "which", lambda name: f"/usr/bin/{name}")
    words = local.command(sweep_of_seeds, 1, ([2, 3], []))
    assert words[:3] == ["taskset", "-c", "2,3"]
    assert words[-3:] == ["--workdir=runs", "--xid=7", "--unit=1"]
    monkeypatch.setattr(local.shutil, "which", lambda name: None)
    assert "taskset" not in local.command(sweep_of_seeds, 1, ([2, 3], []))


def test_gpus_are_those_that_are_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert local.hardware()[1] == ["2", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.hardware()[1] == []
    assert local.hardware()[0], "there is at least one core"
