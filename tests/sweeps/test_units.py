"""Work units find their folders again, and their folders tell how far they are."""

import json
import re
import subprocess

import pytest
import yaml

from dalle_jax import config as cfg
from dalle_jax.pages import sweep
from dalle_jax.sweeps import local, results, scripts, units
from dalle_jax.types import UsageError

CONFIG = """
from dalle_jax import config as cfg

def get_config(arg=None):
    args = cfg.parse_args(arg, steps=10)
    return cfg.ConfigDict(dict(
        seed=0, optim=dict(lr=0.1, betas=(0.9, 0.99)), train=dict(steps=args.steps),
    ))

def get_hyper():
    return cfg.product(
        cfg.zipped(cfg.sweep("optim.lr", [1e-3, 3e-3]), cfg.sweep("train.steps", [10, 20])),
        cfg.sweep("seed", [0, 1]),
        cfg.fixed("optim.betas", (0.8, 0.9)),
    )
"""


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(CONFIG)
    return str(file)


@pytest.fixture
def four_units(tmp_path, config):
    return define(tmp_path, config)


def define(tmp_path, config, hyper=None, **changes):
    given = dict(common={}, units=hyper or cfg.load_hyper(config), metric="eval/loss", mode="min")
    sweep = units.define(str(tmp_path / "sweeps"), config, **(given | changes))
    sweep.save()
    return sweep


def finish(sweep, wid, loss, exit_code=0, error=""):
    """What a run of the unit leaves behind."""
    units.record(sweep, wid, exit_code, 30.0, error)
    steps = sweep.load_config(wid).train.steps
    events = [
        {"step": steps // 2, "kind": "eval", "loss": 2 * loss},
        {"step": steps, "kind": "eval", "loss": loss},
        {"step": steps, "kind": "run", "perf/mfu_pct": 40.0},
    ]
    file = units.epath.Path(sweep.workdir(wid)) / "metrics.jsonl"
    file.write_text("".join(json.dumps(event) + "\n" for event in events))


def test_get_hyper_makes_the_units(four_units):
    assert len(four_units.units) == 4 and list(four_units.wids) == [1, 2, 3, 4]
    seen = [four_units.load_config(wid) for wid in four_units.wids]
    assert [(c.optim.lr, c.train.steps, c.seed) for c in seen] == [
        (1e-3, 10, 0), (1e-3, 10, 1), (3e-3, 20, 0), (3e-3, 20, 1),
    ]  # fmt: skip
    assert all(c.optim.betas == (0.8, 0.9) for c in seen)


def test_the_command_line_makes_units_too(config):
    found = units.from_text(["optim.lr=1e-3,3e-3", "seed=0,1"])
    assert len(found) == 4 and found[1] == {"optim.lr": "1e-3", "seed": "1"}
    assert cfg.override(cfg.load(config), found[1]).optim.lr == 1e-3
    assert units.from_text(["optim.betas=[[0.5,0.6]]"]) == [{"optim.betas": [0.5, 0.6]}]
    for text in ("optim.lr", "optim.lr=", "=3", "optim.betas=[1"):
        with pytest.raises(UsageError, match="--sweep="):
            units.from_text([text])


def test_the_same_definition_finds_its_folder_again(tmp_path, config, four_units):
    assert four_units.xid == "1"
    assert define(tmp_path, config).folder == four_units.folder
    assert define(tmp_path, config, metric="eval/psnr", mode="max").folder == four_units.folder
    assert define(tmp_path, config, hyper=[{"seed": 5}]).xid == "2"
    assert define(tmp_path, config, common={"optim.lr": "0.5"}, hyper=[{"seed": 5}]).xid == "3"
    assert define(tmp_path, config, xid="mine").xid == "mine"
    assert units.load(four_units.folder).units[0]["optim.lr"] == 1e-3
    with pytest.raises(UsageError, match="holds another sweep"):
        define(tmp_path, config, hyper=[{"seed": 7}], xid="mine")
    with pytest.raises(UsageError, match="start the sweep"):
        units.load(str(tmp_path / "sweeps" / "99"))


@pytest.mark.parametrize(
    ("hyper", "text"),
    [
        ([{"optim.lrr": 1.0}], "did you mean 'lr'"),
        ([{"train.steps": "many"}], "not a valid int"),
        ([{"seed": 0}, {"seed": 0}], "units 1 and 2 are the same run"),
        ([{"seed": 0}, {"optim.lr": 0.1}], "units 1 and 2 are the same run"),
    ],
)
def test_every_unit_is_checked_before_one_starts(tmp_path, config, hyper, text):
    with pytest.raises(UsageError, match=text):
        define(tmp_path, config, hyper=hyper)
    with pytest.raises(UsageError, match="no units"):
        units.define(str(tmp_path), config, {}, [], "loss", "min")


def test_what_is_done_or_failed_is_not_run_again(four_units):
    finish(four_units, 1, 0.5)
    finish(four_units, 2, 0.4, exit_code=143)  # asked to stop: it has saved
    finish(four_units, 3, 0.3, exit_code=1, error="ValueError: no")
    assert units.to_run(four_units, retry=False) == [2, 4]
    assert units.to_run(four_units, retry=True) == [2, 3, 4]
    states = [units.status(four_units, wid)["state"] for wid in four_units.wids]
    assert states == ["done", "started", "failed", "waiting"]
    finish(four_units, 2, 0.4)
    assert units.status(four_units, 2)["seconds"] == 60.0, "all attempts count"


def test_results_rank_settings_over_seeds(four_units):
    for wid, loss in ((1, 0.1), (2, 0.9), (3, 0.3), (4, 0.4)):
        finish(four_units, wid, loss)
    found = results.write(four_units)
    assert [row["wid"] for row in found["units"]] == [1, 3, 4, 2]
    assert [round(g["mean"], 6) for g in found["groups"]] == [0.35, 0.5]
    assert found["best"] == 3, "the lucky seed of the worse setting does not win"
    folder = units.epath.Path(four_units.folder)
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(found))
    best = cfg.load(str(folder / "best.py"))
    assert cfg.differences(best, four_units.load_config(3)) == {} and best.optim.betas == (0.8, 0.9)
    page = sweep.page(found, results.curves(found, 8)).html()
    assert "4 of 4" in page and "Over seeds" in page and "<svg" in page and "<script" not in page
    text = results.table(found)
    assert "3*" in text and "optim.lr=0.003" in text
    assert results.missing_metric(found) == ""


def test_results_of_a_sweep_that_is_not_finished(four_units):
    finish(four_units, 1, 0.5)
    finish(four_units, 2, 0.4, exit_code=137, error="killed by SIGKILL")
    found = results.write(four_units)
    assert found["best"] == 1 and [row["value"] for row in found["units"]] == [
        0.5,
        None,
        None,
        None,
    ]
    text = results.table(found)
    assert "unit 2 failed: killed by SIGKILL" in text and "waiting" in text
    assert "1 failed" in sweep.page(found, {}).html()
    other = results.collect(units.dataclasses.replace(four_units, metric="eval/lss"))
    assert "they have" in results.missing_metric(other) and "eval/loss" in results.missing_metric(
        other
    )


def test_shares_never_overlap():
    for jobs, cores in ((1, 4), (2, 4), (3, 8), (4, 4)):
        found = local.shares(jobs, list(range(cores)), [])
        used = [core for share, _ in found for core in share]
        assert sorted(used) == list(range(cores)) and len(found) == jobs
    assert len(local.shares(0, [0, 3], [])) == 2, "one run per core"
    gpus = local.shares(0, list(range(8)), ["0", "1"])
    assert [g for _, g in gpus] == [["0"], ["1"]]
    assert local.environment(gpus[1], {})["CUDA_VISIBLE_DEVICES"] == "1"
    alone = local.environment(([3], []), {"XLA_FLAGS": "--mine"})
    assert alone["XLA_FLAGS"].startswith("--mine ") and alone["OMP_NUM_THREADS"] == "1"
    with pytest.raises(UsageError, match="2 GPUs"):
        local.shares(3, list(range(8)), ["0", "1"])


def test_the_slurm_script_is_a_job_array(four_units, tmp_path):
    finish(four_units, 2, 0.1)
    left = units.to_run(four_units, retry=False)
    text = scripts.slurm(four_units, left, 2, ["--partition=gpu", "--gres=gpu:1"])
    file = tmp_path / "sweep.sbatch"
    file.write_text(text)
    assert subprocess.run(["bash", "-n", str(file)]).returncode == 0
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.M))
    assert options["array"] == "1,3,4%2" and options["partition"] == "gpu"
    assert options["signal"].startswith("B:TERM@")
    # One task of the array, with a stub in the place of Python.
    stub = tmp_path / "python"
    stub.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    env = {"PATH": "/usr/bin:/bin", "PYTHON": str(stub), "SLURM_ARRAY_TASK_ID": "3"}
    done = subprocess.run(["bash", str(file)], env=env, capture_output=True, text=True)
    parent = str(units.epath.Path(four_units.folder).parent)
    assert done.stdout.split() == [
        "-m", "dalle_jax", "sweep", f"--workdir={parent}", "--xid=1", "--unit=3",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="--sbatch"):
        scripts.slurm(four_units, left, 0, ["partition=gpu"])


def check_job(manifest):
    """The fields of batch/v1 Job that are used here, by its published schema."""
    assert manifest.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert (manifest["apiVersion"], manifest["kind"]) == ("batch/v1", "Job")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", manifest["metadata"]["name"])
    for value in manifest["metadata"]["labels"].values():
        assert re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", value)
    spec = manifest["spec"]
    types = {
        "completionMode": str, "completions": int, "parallelism": int, "template": dict,
        "backoffLimitPerIndex": int, "maxFailedIndexes": int,
    }  # fmt: skip
    assert spec.keys() == types.keys()
    assert all(type(spec[name]) is kind for name, kind in types.items())
    assert spec["completionMode"] == "Indexed" and 1 <= spec["parallelism"] <= spec["completions"]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "backoffLimitPerIndex needs it"
    assert type(pod["terminationGracePeriodSeconds"]) is int
    [container] = pod["containers"]
    assert container.keys() <= {"name", "image", "command", "resources"}
    assert all(type(word) is str for word in container["command"])
    return pod, container


@pytest.mark.parametrize(
    ("accelerator", "selector", "resource"),
    [
        ("", {}, {}),
        ("nvidia-h100-80gb:2", {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"},
         {"nvidia.com/gpu": 2}),
        ("tpu-v5-lite-podslice:2x4",
         {"cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
          "cloud.google.com/gke-tpu-topology": "2x4"}, {"google.com/tpu": 8}),
    ],
)  # fmt: skip
def test_the_gke_manifest_is_an_indexed_job(four_units, accelerator, selector, resource):
    finish(four_units, 2, 0.1)
    left = units.to_run(four_units, retry=False)
    text = scripts.gke(four_units, left, 2, "image:1", accelerator)
    pod, container = check_job(yaml.safe_load(text))
    assert pod.get("nodeSelector", {}) == selector
    assert container.get("resources", {}).get("limits", {}) == resource
    *shell, script = container["command"]
    assert shell == ["bash", "-c"]
    told = script.replace("exec python", "echo")
    for index, wid in enumerate(left):
        env = {"PATH": "/usr/bin:/bin", "JOB_COMPLETION_INDEX": str(index)}
        done = subprocess.run([*shell, told], env=env, capture_output=True, text=True)
        assert done.stdout.endswith(f"--unit={wid}\n"), done.stderr
    for bad in ("h100", "tpu-v5-lite-podslice", "nvidia-h100-80gb:2x2"):
        with pytest.raises(UsageError, match="--accelerator"):
            scripts.gke(four_units, left, 0, "image:1", bad)
    with pytest.raises(UsageError, match="--image"):
        scripts.gke(four_units, left, 0, "", accelerator)
