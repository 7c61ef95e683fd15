"""launch: the demo and the local cluster with a stub instead of Python; shellcheck."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = ["prepare", "vqvae", "dvae", "clip", "dalle", "evaluate", "samples", "completion", "report"]
UNCLIP_STEPS = [
    "prepare", "prepare64", "clip", "upsampler", "decoder", "prior", "inpainter", "evaluate",
    "samples", "variations", "interpolation", "edited", "inpainted", "report",
]  # fmt: skip

# Records its arguments, then fails or hangs at the step that the test names.
STUB = """#!/usr/bin/env bash
[[ $1 == -c ]] && exit 0
echo "$*" >>"$STUB_CALLS"
echo "step 7/9 loss 0.5"
case "$*" in
  *"$STUB_FAIL"*) echo "error: the stub fails on request" >&2; exit 3 ;;
  *$STUB_HANG*) exec sleep 60 ;; # a pattern
esac
"""


@pytest.fixture
def house(tmp_path) -> pathlib.Path:
    """A copy of the files that the demo reads, with a stub environment that counts as installed."""
    for name in ("launch", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    stub = tmp_path / "venv" / "bin" / "python"
    stub.parent.mkdir(parents=True)
    stub.write_text(STUB)
    stub.chmod(0o755)
    hashed = "cat setup.cfg pyproject.toml constraints.txt | cksum"
    text = subprocess.run(["bash", "-c", hashed], cwd=tmp_path, capture_output=True, text=True)
    version = "{}.{}".format(*sys.version_info[:2])
    (stub.parent.parent / ".installed-").write_text(f"{text.stdout.strip()} {version} {tmp_path}\n")
    return tmp_path


def environment(house: pathlib.Path, fail: str = "<none>", hang: str = "<none>") -> dict:
    return os.environ | {
        "PYTHON": sys.executable,
        "VENV": str(house / "venv"),
        "STUB_CALLS": str(house / "calls"),
        "STUB_FAIL": fail,
        "STUB_HANG": hang,
    }


def demo(house: pathlib.Path, *arguments: str, **stub: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "launch/demo.sh", *arguments],
        cwd=house,
        env=environment(house, **stub),
        capture_output=True,
        text=True,
        timeout=60,
    )


def calls(house: pathlib.Path) -> list[str]:
    file = house / "calls"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize("data", ["shapes", "emoji"])
def test_the_demo_runs_every_step_once(house, data):
    done = demo(house, f"--data={data}", "--out=runs/x")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "runs/x/index.html" in done.stdout
    commands = calls(house)
    assert len(commands) == len(STEPS)
    order = {name: i for i, call in enumerate(commands) for name in STEPS if f"/{name}.py" in call}
    assert order["vqvae"] < order["dvae"] < order["dalle"]
    assert {p.stem for p in (house / "runs/x/logs").glob("*.done")} == set(STEPS)

    started = time.monotonic()
    again = demo(house, f"--data={data}", "--out=runs/x")
    assert again.returncode == 0 and "nothing left to do" in again.stdout
    assert calls(house) == commands and time.monotonic() - started < 10


def test_the_demo_of_dalle_2_runs_every_step_once(house):
    done = demo(house, "--pipeline=unclip", "--out=runs/x")
    assert done.returncode == 0, done.stdout + done.stderr
    commands = calls(house)
    assert {p.stem for p in (house / "runs/x/logs").glob("*.done")} == set(UNCLIP_STEPS)
    assert len(commands) == len(UNCLIP_STEPS)

    def place(part):
        return next(i for i, call in enumerate(commands) if part in call)

    # A stage is trained before the first step that reads its workdir.
    order = ["x/clip ", "x/decoder ", "init_from=runs/x/decoder", "inpaint --clip", "report --demo"]
    assert sorted(order, key=place) == order
    for call in commands:  # the input pictures exist
        for word in call.split():
            if word.startswith("--image=launch/"):
                assert (house / word.removeprefix("--image=")).is_file()
    again = demo(house, "--pipeline=unclip", "--out=runs/x")
    assert "nothing left to do" in again.stdout and calls(house) == commands


def test_a_failed_step_fails_the_demo_and_is_tried_again(house):
    failed = demo(house, fail="configs/dvae.py")
    assert failed.returncode == 3
    assert "dvae failed with exit code 3" in failed.stderr
    assert "the stub fails on request" in failed.stderr
    before = len(calls(house))
    assert demo(house).returncode == 0
    assert not any("prepare" in call or "vqvae.py" in call for call in calls(house)[before:])


def test_a_failure_in_the_background_is_not_lost(house):
    failed = demo(house, fail="configs/clip.py", hang="configs/dalle.py")  # seen at once
    assert failed.returncode == 3 and "clip failed" in failed.stderr


@pytest.mark.skipif(not shutil.which("flock"), reason="flock is not installed")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_the_demo_ends_its_children(house, number):
    process = subprocess.Popen(
        # With SIGINT's default action, which a test runner in the background may ignore. Not by
        # preexec_fn, because it forks and JAX is multithreaded.
        ["env", "--default-signal=INT", "bash", "launch/demo.sh"],
        cwd=house,
        env=environment(house, hang="configs/[cd][la]"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    pids = [house / "runs/demo/logs" / f"{name}.pid" for name in ("clip", "dalle")]
    for _ in range(200):
        if all(p.exists() and p.read_text().strip() for p in pids):
            break
        time.sleep(0.05)
    children = [int(p.read_text()) for p in pids]
    second = demo(house)
    assert second.returncode == 1 and "another demo is at work" in second.stderr
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 128 + number
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data=cats"], ["--size="], ["fast"], ["--pipeline=vae"],
        ["--data=emoji", "--pipeline=unclip"], ["--size=shapes", "--pipeline=unclip"],
    ],
)  # fmt: skip
def test_the_demo_refuses_what_it_does_not_understand(house, arguments):
    done = demo(house, *arguments)
    assert done.returncode == 2 and arguments[0] in done.stderr and "usage" in done.stderr


def test_a_dry_run_touches_nothing(house):
    done = demo(house, "--dry_run")
    assert done.returncode == 0 and done.stdout.count("python -m dalle_jax") == len(STEPS)
    assert not calls(house) and not (house / "runs").exists()


def cluster(house: pathlib.Path, *arguments: str, **stub: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "launch/local_cluster.sh", *arguments],
        cwd=house,
        env=environment(house, **stub),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_local_cluster_prepares_then_trains_in_n_processes(house):
    done = cluster(house, "3", "--out=runs/x", "--port=9000", "--", "--config.train.steps=5")
    assert done.returncode == 0, done.stdout + done.stderr
    commands = calls(house)
    assert (
        len(commands) == 5 and "prepare shapes" in commands[0] and "configs/dvae.py" in commands[1]
    )
    for i in range(3):
        (call,) = [c for c in commands if f"--process_id={i} " in c]
        assert "--coordinator=localhost:9000 --process_count=3" in call
        assert call.endswith("--config.train.steps=5")
        assert f"[p{i}] step 7/9 loss 0.5" in done.stdout.splitlines()


def test_a_failed_process_fails_the_local_cluster(house):
    done = cluster(house, "2", fail="--process_id=1")
    assert done.returncode == 3
    assert "[p1] error: the stub fails on request" in done.stdout
    assert "[p1] process" in done.stdout and "ended with exit code 3" in done.stdout
    # Without a codec there is nothing to train.
    before = len(calls(house))
    assert cluster(house, "2", fail="configs/dvae.py").returncode == 3
    assert not any("dalle.py" in call for call in calls(house)[before:])


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_a_local_cluster_ends_its_processes(house, number, code):
    process = subprocess.Popen(
        ["env", "--default-signal=INT", "bash", "launch/local_cluster.sh", "2"],
        cwd=house,
        env=environment(house, hang="--process_id="),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for _ in range(400):
        if len(calls(house)) == 4:
            break
        time.sleep(0.05)
    time.sleep(0.2)  # until the script is in its `wait`
    process.send_signal(number)
    out = process.communicate(timeout=20)[0]
    assert process.returncode == code, out
    pids = [int(line.split()[-1]) for line in out.splitlines() if "] is process" in line]
    assert len(pids) == 4
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("arguments", [[], ["0"], ["four"], ["2", "--devices=0"], ["2", "fast"]])
def test_the_local_cluster_refuses_what_it_does_not_understand(house, arguments):
    done = cluster(house, *arguments)
    assert done.returncode == 2 and "error" in done.stderr and not calls(house)


def test_a_dry_run_of_the_local_cluster_touches_nothing(house):
    done = cluster(house, "4", "--dry_run")
    assert done.returncode == 0 and done.stdout.count("python -m dalle_jax") == 6
    assert not calls(house) and not (house / "runs").exists()


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_scripts_pass_shellcheck():
    scripts = [".ci/run", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("launch/*.s[hb]*"))]
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
