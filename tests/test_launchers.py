"""launch: what the launchers of clusters render, and what they refuse; nothing is rented here."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]
TRAIN = ["--config=configs/dalle_12b.py", "--config.stages.dvae=gs://b/d", "--workdir=gs://b/12b"]
POD = ["--name=d12b", "--zone=us-west4-a", "--type=v5litepod-256"]


def launch(script: str, *arguments: str, train=(), env=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", f"launch/{script}", *arguments, *(["--", *train] if train else [])],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable, "XLA_FLAGS": ""} | (env or {}),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="session")
def stub(tmp_path_factory):
    """An environment whose Python only tells how it was called: these tests are about the shell."""
    file = tmp_path_factory.mktemp("stub") / "python"
    file.write_text('#!/usr/bin/env bash\necho "$@"\n')
    file.chmod(0o755)
    return {"PYTHON": str(file)}


def rendered(done: subprocess.CompletedProcess) -> list[list[str]]:
    """The commands that a dry run printed, as words."""
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_every_action_of_a_pod(stub):
    """The words that reach the shell of a host are those that were given, quoted once."""
    odd = "--config.data.source=it's a set"
    [train] = rendered(
        launch("tpu_pod.sh", "train", *POD, "--dry_run", train=[*TRAIN, odd], env=stub)
    )
    assert train[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "d12b"]
    assert "--worker=all" in train
    remote = train[-1].removeprefix("--command=")
    assert subprocess.run(["bash", "-n", "-c", remote]).returncode == 0
    words = shlex.split(remote.split("-m dalle_jax train ")[1].split(">>")[0])
    assert words == ["--distributed", *TRAIN, odd]

    [create] = rendered(launch("tpu_pod.sh", "create", *POD, "--spot=yes", "--dry_run", env=stub))
    assert "--accelerator-type=v5litepod-256" in create and "--spot" in create
    assert "--runtime-version=v2-alpha-tpuv5-lite" in create
    setup = rendered(launch("tpu_pod.sh", "setup", *POD, "--dry_run", env=stub))
    assert setup[1][:2] == ["git", "archive"] and "doctor" in setup[-1][-1]
    for action, word in [("state", "describe"), ("log", "tail"), ("stop", "TERM")]:
        [command] = rendered(launch("tpu_pod.sh", action, *POD, "--dry_run", env=stub))
        assert command[0] == "gcloud" and word in " ".join(command)
    [delete] = rendered(launch("tpu_pod.sh", "delete", *POD, "--dry_run", env=stub))
    assert delete[4:6] == ["delete", "d12b"] and "--force" in delete


@pytest.mark.parametrize(
    ("type", "hosts", "per_host", "topology"),
    [
        ("v5litepod-256", 64, 4, "16x16"),
        ("v5litepod-8", 1, 8, "2x4"),
        ("v6e-1", 1, 1, "1x1"),
        ("v6e-128", 32, 4, "8x16"),
        ("v4-256", 32, 4, "4x4x8"),
        ("v5p-256", 32, 4, "4x4x8"),
        ("v5p-8", 1, 4, "2x2x1"),
    ],
)
def test_hosts_and_chips_of_a_slice(stub, type, hosts, per_host, topology):
    done = launch(
        "gke.sh", "--name=run", "--image=i:1", f"--tpu={type}", "--dry_run", train=TRAIN, env=stub
    )
    assert f"--hosts={hosts} --devices_per_host={per_host}" in done.stderr
    manifest = yaml.safe_load(done.stdout)
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == job["parallelism"] == hosts
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
    sides = [int(side) for side in topology.split("x")]
    chips = sides[0] * sides[1] * (sides[2] if len(sides) > 2 else 1)
    resources = pod["containers"][0]["resources"]
    assert resources["limits"] == resources["requests"] == {"google.com/tpu": per_host}
    assert chips == hosts * per_host


def test_the_jobset_of_gpus(stub):
    flags = ["--name=run", "--image=i:1", "--gpu=h100-80gb", "--nodes=16", "--dry_run"]
    manifest = yaml.safe_load(launch("gke.sh", *flags, train=TRAIN, env=stub).stdout)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [jobs] = manifest["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    [container] = job["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    # JobSet's name of the first pod: SET-JOB-0-0, in the service of the set's name.
    script = container["command"][-1]
    address = f"{manifest['metadata']['name']}-{jobs['name']}-0-0.{manifest['metadata']['name']}"
    assert f"--coordinator={address}:8476 --process_count=16" in script
    assert '--process_id="$JOB_COMPLETION_INDEX"' in script
    assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0


def test_xpk_joins_slices(stub):
    flags = ["--name=run", "--image=i:1", "--with=xpk", "--cluster=c", "--zone=z", "--dry_run"]
    [command] = rendered(
        launch("gke.sh", *flags, "--tpu=v5litepod-256", "--slices=2", train=TRAIN, env=stub)
    )
    assert command[:3] == ["xpk", "workload", "create"] and "--num-slices=2" in command
    assert command[-1].endswith(shlex.join(TRAIN))
    [command] = rendered(
        launch("gke.sh", *flags, "--gpu=h100-80gb", "--nodes=2", train=TRAIN, env=stub)
    )
    assert "--device-type=h100-80gb-8" in command and "--num-nodes=2" in command


def test_slurm_submits_the_batch_script(stub):
    flags = ["--nodes=16", "--processes=gpu", "--time=8:00:00", "--mounts=/a:/a,/b:/b", "--dry_run"]
    [command] = rendered(launch("slurm.sh", *flags, train=TRAIN, env=stub))
    assert command[:2] == ["env", "MOUNTS=/a:/a,/b:/b"]
    assert {"--nodes=16", "--gpus-per-node=8", "--time=8:00:00"} <= set(command)
    assert command[-len(TRAIN) - 1 :] == ["launch/slurm.sbatch", *TRAIN]


@pytest.mark.parametrize("processes", ["node", "gpu"])
def test_the_batch_script_starts_the_processes_that_it_was_asked_for(tmp_path, processes):
    """srun is a stub that tells how it was called, and by which environment."""
    srun = tmp_path / "srun"
    srun.write_text('#!/usr/bin/env bash\necho "$JAX_LOCAL_DEVICE_IDS"\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "PROCESSES": processes,
        "CONTAINER": "image",
        "JAX_LOCAL_DEVICE_IDS": "",
        "PYTHON": "python",
    }
    done = launch("slurm.sbatch", *TRAIN, env=env)
    assert done.returncode == 0, done.stderr
    ids, *words = done.stdout.splitlines()
    # Without them JAX would leave seven of eight GPUs of a node idle.
    assert ids == ("0,1,2,3,4,5,6,7" if processes == "node" else "")
    per_node, count = (1, 2) if processes == "node" else (8, 16)
    assert {f"--ntasks-per-node={per_node}", f"--ntasks={count}"} <= set(words)
    assert words[-len(TRAIN) - 5 :] == [
        "python",
        "-m",
        "dalle_jax",
        "train",
        "--distributed",
        *TRAIN,
    ]


def test_one_machine(stub):
    *_, doctor, train = rendered(
        launch("one_gpu.sh", "--gpus=2", "--dry_run", train=TRAIN, env=stub)
    )
    assert doctor[-2:] == ["doctor", "--no_bench"] and train[-len(TRAIN) :] == TRAIN
    done = launch("one_gpu.sh", "--gpus=2", "--dry_run", train=TRAIN, env=stub)
    assert "JAX_PLATFORMS=cuda" in done.stdout and "CUDA_VISIBLE_DEVICES=0,1" in done.stdout
    exported, train = rendered(launch("one_cpu.sh", "--core=1", "--dry_run", train=TRAIN, env=stub))
    assert "JAX_PLATFORMS=cpu" in exported and train[-len(TRAIN) :] == TRAIN
    ran = launch("one_cpu.sh", train=TRAIN, env=stub)
    assert ran.returncode == 0 and f"train {' '.join(TRAIN)}" in ran.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "text"),
    [
        ("tpu_pod.sh", ["rent", *POD], "rent is not understood"),
        ("tpu_pod.sh", ["create", "--name=Big_Run", *POD[1:]], "--name=Big_Run"),
        ("tpu_pod.sh", ["create", *POD[:2], "--type=v5e-256"], "v5litepod-256"),
        ("tpu_pod.sh", ["create", *POD[:2], "--type=v5litepod-512"], "512 chips"),
        ("tpu_pod.sh", ["create", POD[0], POD[2]], "--zone"),
        ("gke.sh", ["--name=a", "--image=i", "--tpu=v6e-8", "--gpu=h100-80gb"], "give --tpu"),
        ("gke.sh", ["--name=a", "--tpu=v6e-8"], "--image"),
        ("gke.sh", ["--name=a", "--image=i", "--tpu=v6e-8", "--slices=2"], "--with=xpk"),
        ("gke.sh", ["--name=a", "--image=i", "--tpu=v6e-8", "--with=helm"], "jobset or xpk"),
        ("slurm.sh", ["--nodes=many"], "--nodes=many"),
        ("slurm.sh", ["--nodes=2", "--processes=core"], "node or gpu"),
        ("one_gpu.sh", ["--gpus=0"], "--gpus=0"),
        ("one_cpu.sh", ["--cores=2"], "--cores=2 is not understood"),
    ],
)
def test_bad_input_names_itself_and_the_cure(stub, script, arguments, text):
    done = launch(script, *arguments, "--dry_run", train=TRAIN, env=stub)
    assert done.returncode == 2 and text in done.stderr and not done.stdout


def test_a_run_needs_a_config_and_a_workdir(stub):
    for train, missing in ((TRAIN[:1], "--workdir"), (TRAIN[2:], "--config")):
        done = launch("slurm.sh", "--nodes=2", "--dry_run", train=train, env=stub)
        assert done.returncode == 2 and f"no {missing}" in done.stderr


def test_hosts_times_chips_must_be_the_mesh():
    """The real check, once each way: 32 chips hold no mesh of 128 x anything."""
    fits = launch("tpu_pod.sh", "train", *POD, "--dry_run", train=TRAIN)
    assert fits.returncode == 0, fits.stderr
    assert "data 2 x fsdp 128 x tensor 1 = 256 devices = 64 hosts x 4" in fits.stderr
    small = launch("slurm.sh", "--nodes=4", "--dry_run", train=TRAIN)
    assert small.returncode == 2 and not small.stdout
    assert "32 devices" in small.stderr and "128" in small.stderr


def test_xla_knows_the_flags():
    """XLA ends a program that has a flag it does not know, on the first use of a device."""
    text = "source launch/gpu_flags.sh && exec \"$0\" -c 'import jax; jax.devices()'"
    done = subprocess.run(
        ["bash", "-c", text, sys.executable],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_scripts_parse():
    for file in sorted((ROOT / "launch").glob("*.s[hb]*")):
        assert subprocess.run(["bash", "-n", str(file)]).returncode == 0, file


def test_the_readme_names_every_script():
    text = (ROOT / "launch" / "README.md").read_text()
    for file in sorted((ROOT / "launch").glob("*.s[hb]*")):
        assert f"`{file.name}`" in text, file.name


def test_the_readmes_commands_pass_their_dry_run(stub):
    """Every launcher call in launch/README.md renders, with the arguments as they stand there."""
    text = (ROOT / "launch" / "README.md").read_text().replace("\\\n", " ")
    calls = re.findall(
        r"^ +bash launch/((?:tpu_pod|gke|slurm|one_gpu|one_cpu)\.sh .*)$", text, re.M
    )
    assert len(calls) > 8
    for call in calls:
        script, *words = shlex.split(call, comments=True)
        done = launch(script, *words[:1], "--dry_run", *words[1:], env=stub)
        assert done.returncode == 0, f"{call}\n{done.stderr}"


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_kubectl_reads_the_job_of_a_sweep(tmp_path):
    """kubectl knows the schema of batch/v1 without a cluster: a wrong type is refused."""
    from dalle_jax.sweeps import scripts, units

    sweep = units.Sweep(str(tmp_path / "1"), "configs/dvae.py", {}, ({"seed": 0},), "loss", "min")
    text = scripts.gke(sweep, [1], 0, "image:1", "nvidia-h100-80gb:1")
    command = ["kubectl", "set", "image", "--local", "-f", "-", "train=other", "-o", "name"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert done.returncode == 0 and "job.batch/dalle-sweep-1" in done.stdout, done.stderr
    wrong = text.replace("completions: 1", "completions: one")
    assert subprocess.run(command, input=wrong, capture_output=True, text=True).returncode != 0
