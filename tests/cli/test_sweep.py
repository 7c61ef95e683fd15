"""The sweep command: what it refuses, renders and submits; and two learning rates x two seeds."""

import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import types

import jax
import pytest
import yaml

from dalle_jax import __main__, tasks
from dalle_jax import config as cfg
from dalle_jax.data import pipeline
from dalle_jax.engine import checkpoint
from dalle_jax.sweeps import units

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "engine"))

import linear_task as lt  # noqa: E402

CONFIG = f"--config={ROOT}/configs/dvae.py:size=smoke"
AXES = ["--sweep", "optim.lr=1e-3,3e-3", "--sweep", "seed=0,1"]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs `sweep` in this process."""
    monkeypatch.chdir(ROOT)

    def run(*args, config=CONFIG, workdir=tmp_path / "runs"):
        return __main__.main(
            ["sweep", *([config] if config else []), f"--workdir={workdir}", *args]
        )

    return run


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--sweep", "optim.lrr=1"], "did you mean 'lr'"),
        (["--sweep", "optim.lr"], "has no values"),
        (["--sweep", "seed=0,0"], "are the same run"),
        ([*AXES, "--jobs=-1"], "--jobs=-1"),
        ([*AXES, "--runner=gke"], "--image"),
        ([*AXES, "--runner=slurm", "--sbatch=gpu"], "--sbatch=--time"),
        ([*AXES, "--xid=old", "--unit=9"], "units 1 to 4"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(command, tmp_path, capsys, args, text):
    assert command(*args, "--dry_run") == 2
    assert text in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_sweep_must_be_named_and_be_there(command, capsys):
    assert command("--table", config=None) == 2
    assert "--config=FILE" in capsys.readouterr().err
    assert command("--table", "--xid=3", config=None) == 2
    assert "sweep.json does not exist" in capsys.readouterr().err


def test_get_hyper_is_the_default(command, capsys):
    assert command("--dry_run", "--jobs=1") == 0
    lines = capsys.readouterr().out.splitlines()
    trains = [line for line in lines if line.startswith("python -m dalle_jax train")]
    assert len(trains) == len(cfg.load_hyper(f"{ROOT}/configs/dvae.py")) == 6
    assert "--config.model.kl_weight=0.05" in trains[2]


def test_dry_runs_render_scripts_and_write_nothing(command, tmp_path, capsys):
    assert command(*AXES, "--runner=slurm", "--dry_run", "--jobs=2") == 0
    script = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert "#SBATCH --array=1,2,3,4%2\n" in script
    assert command(*AXES, "--runner=gke", "--image=i:1", "--dry_run") == 0
    assert yaml.safe_load(capsys.readouterr().out)["spec"]["completions"] == 4
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_asks_no_bucket(command, monkeypatch, capsys):
    """gcsfs need not be there, nor a network; without --dry_run its absence is told."""
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    bucket = ("--workdir=gs://bucket/sweeps", "--runner=gke", "--image=i:1")
    assert command(*AXES, *bucket, "--dry_run") == 0
    manifest = yaml.safe_load(capsys.readouterr().out)
    assert manifest["spec"]["completions"] == 4
    assert "--workdir=gs://bucket/sweeps --xid=1 " in str(manifest)
    assert command(*AXES, *bucket) == 2
    err = capsys.readouterr().err
    assert "gcsfs" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("runner", "program", "name"),
    [("slurm", "sbatch", "sweep.sbatch"), ("gke", "kubectl", "sweep.yaml")],
)
def test_submits_through_the_clusters_own_program(
    command, tmp_path, monkeypatch, capsys, runner, program, name
):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command(*AXES, f"--runner={runner}", "--image=i:1") == 2
    assert f"needs {program}, which is not on PATH" in capsys.readouterr().err
    stub = tmp_path / program
    stub.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/called\n')
    stub.chmod(0o755)
    assert command(*AXES, f"--runner={runner}", "--image=i:1") == 0
    file = tmp_path / "runs" / "1" / name
    assert (tmp_path / "called").read_text().split()[-1] == str(file) and file.exists()
    assert (tmp_path / "runs" / "1" / "sweep.json").exists()
    assert "--xid=1 --table" in capsys.readouterr().out


@pytest.fixture
def linear(monkeypatch, tmp_path):
    """A saved sweep of the engine tests' linear task, in this process: trained in a second."""

    class Pipeline(lt.Batches):
        skipped, truncated, num_examples, close = {}, 0, 16, lambda self: None

        def __call__(self, step):
            if step == Pipeline.stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(step)

    Pipeline.stop_at = None
    module = types.SimpleNamespace(make=lambda *args, shapes_only: lt.make_task())
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *args: one)
    monkeypatch.setitem(tasks.TASKS, "linear", module)
    monkeypatch.setattr(pipeline, "make", lambda *args, **kwargs: Pipeline(delay=0.01))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    file = tmp_path / "linear_config.py"
    file.write_text(
        "import linear_task as lt\n"
        "def get_config(arg=None):\n"
        "    c = lt.make_config()\n"
        "    c.unlock()\n"
        "    c.data.split, c.data.eval_split = 'train', 'validation'\n"
        "    return c\n"
    )
    hyper = [{"optim.lr": 0.01}, {"optim.lr": 1e38}, {"train.profile_steps": 99}]
    sweep = units.define(str(tmp_path / "runs"), str(file), {}, hyper, "eval/loss", "min")
    sweep.save()
    return sweep, Pipeline


def test_a_unit_trains_and_records_how_it_ended(command, linear, capsys):
    sweep, data = linear

    def run(wid):
        return command("--xid=1", f"--unit={wid}", config=None)

    data.stop_at = 9
    assert run(1) == 143 and units.status(sweep, 1)["state"] == "started"
    data.stop_at = None
    with open(f"{sweep.workdir(1)}/.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run(1) == 2
    assert "is being trained by another process" in capsys.readouterr().err
    assert run(1) == 0
    found = units.status(sweep, 1)
    assert (found["state"], found["step"], found["exit_code"]) == ("done", 20, 0)
    assert run(2) == 1 and units.status(sweep, 2)["state"] == "failed"
    assert run(3) == 2 and "train.profile_at" in units.status(sweep, 3)["error"]

    assert command("--xid=1", "--table", config=None) == 1
    said = capsys.readouterr().out
    assert "1*" in said and "unit 3 failed" in said
    assert units.to_run(sweep, retry=False) == []


def test_two_learning_rates_and_two_seeds(command, tmp_path, monkeypatch, capsys, compile_flags):
    """The real thing: four runs of the smoke dVAE, two at a time; one of them had been begun."""
    data = tmp_path / "data"
    small = ["--num_train=64", "--num_eval=32", "--vocab_size=0"]
    assert __main__.main(["prepare", "shapes", f"--data_dir={data}", *small]) == 0
    monkeypatch.setenv("XLA_FLAGS", compile_flags)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    changes = {
        "data.data_dir": str(data), "train.steps": "4", "optim.warmup_steps": "1",
        "train.tensorboard": "0", "train.eval_batches": "1",
    }  # fmt: skip
    arguments = [*AXES, *(f"--config.{key}={value}" for key, value in changes.items()), "--jobs=2"]
    hyper = units.from_text(AXES[1::2])
    config = CONFIG.removeprefix("--config=")
    units.define(str(tmp_path / "runs"), config, changes, hyper, "eval/loss", "min").save()
    one = [sys.executable, "-m", "dalle_jax", "sweep", f"--workdir={tmp_path}/runs", "--xid=1"]
    done = subprocess.run([*one, "--unit=3"], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    begun = (tmp_path / "runs/1/3/metrics.jsonl").stat().st_mtime_ns
    capsys.readouterr()

    assert command(*arguments) == 0
    said = capsys.readouterr().out
    assert "3 of 4 units to run, 2 at a time" in said
    assert (tmp_path / "runs/1/3/metrics.jsonl").stat().st_mtime_ns == begun
    folder = tmp_path / "runs" / "1"
    found = json.loads((folder / "results.json").read_text())
    assert [row["state"] for row in found["units"]] == ["done"] * 4
    values = [row["value"] for row in found["units"]]
    assert values == sorted(values) and len(set(values)) == 4
    for wid in range(1, 5):
        assert checkpoint.steps(str(folder / str(wid))) == [4]
    best = cfg.load(str(folder / "best.py"))
    assert best.optim.lr == float(found["groups"][0]["overrides"]["optim.lr"])
    assert "Over seeds" in (folder / "index.html").read_text()

    assert command(*arguments) == 0 and "units to run" not in capsys.readouterr().out
    assert command("--xid=1", "--table", "--metric=eval/lss", config=None) == 2
    assert "eval/loss" in capsys.readouterr().err
