"""doctor fails where a run would be silently slow, and only there."""

import json
import subprocess
import sys

import jax
import pytest

from dalle_jax import __main__
from dalle_jax.cli import _dependencies, doctor


@pytest.mark.parametrize(
    "seen, backend, platforms, status",
    [
        (None, "cpu", "", "ok"),
        ("gpu", "gpu", "", "ok"),
        ("tpu", "tpu", "", "ok"),
        ("gpu", "cpu", "cpu", "note"),
        ("gpu", "cpu", "", "fail"),
        ("tpu", "cpu", "", "fail"),
    ],
)
def test_an_accelerator_that_jax_does_not_use_is_a_failure(seen, backend, platforms, status):
    check = doctor.check_backend(seen, backend, platforms)
    assert check["status"] == status
    if status == "fail":
        assert "pip install" in check["text"]


def test_exit_code_is_1_when_a_check_fails(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "system_accelerator", lambda: "gpu")
    monkeypatch.setenv("JAX_PLATFORMS", "")
    assert __main__.main(["doctor", "--no_bench"]) == 1
    assert "[FAIL] backend: this machine has a gpu" in capsys.readouterr().out


def test_json_report_with_rates(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "system_accelerator", lambda: None)
    assert __main__.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backend"] == "cpu" and len(report["devices"]) == 8
    assert report["rates"]["matmul_float32_gflops"] > 0.1
    assert report["rates"]["all_reduce_gib_per_s"] > 0
    assert {"jax", "flax", "optax"} <= report["versions"].keys()


def test_missing_packages_fail_and_optional_ones_are_notes():
    versions = dict.fromkeys(doctor.PACKAGES, "1.0") | {"flax": None}
    checks = {c["name"]: c["status"] for c in doctor.check_packages(versions)}
    assert checks == {
        "packages": "fail",
        "tensorboardX": "note",
        "wandb": "note",
        "tensorflow": "note",
    }


def test_a_matmul_is_measured_against_the_peak():
    [fast] = doctor.check_rate("NVIDIA H100 80GB HBM3", 700_000)
    assert fast["status"] == "ok" and "71% of the H100 SXM's 989 TFLOP/s" in fast["text"]
    [slow] = doctor.check_rate("TPU v5 lite", 50_000)
    assert slow["status"] == "note" and "25%" in slow["text"]
    assert doctor.check_rate("cpu", 100) == []


def test_old_python_and_full_disk():
    assert doctor.check_python((3, 10))["status"] == "fail"
    assert doctor.check_python((3, 13))["status"] == "ok"
    assert doctor.check_disk("runs", 0.5)["status"] == "note"


def test_the_table_of_dependencies(tmp_path, capsys):
    file = tmp_path / "constraints.txt"
    file.write_text(
        '# pins\njax==0.10.2 ; python_version < "3.12"\njax==0.12.0.1 ; python_version >= "3.12"\n'
        "orbax-checkpoint==0.12.8\nml.collections==1.1.0\n"
    )
    assert __main__.main(["doctor", "--dependencies", f"--constraints={file}", "--json"]) == 0
    rows = {row["package"]: row for row in json.loads(capsys.readouterr().out) if not row["extra"]}
    minor = sys.version_info[1]
    assert rows["jax"]["pinned"] == ("0.10.2" if minor < 12 else "0.12.0.1")
    assert rows["jax"]["installed"] == jax.__version__ and rows["jax"]["lowest"] == "0.10"
    assert rows["ml_collections"]["pinned"] == "1.1.0" and rows["flax"]["pinned"] == ""
    assert "deprecated" in rows["orbax-checkpoint"]["note"]
    assert __main__.main(["doctor", "--dependencies", "--constraints=nowhere"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "pinned" not in lines[0] and "newest" not in lines[0]
    assert any(line.startswith("jax ") and jax.__version__ in line for line in lines)


@pytest.mark.parametrize(
    "code, output, newest",
    [(0, "jax (0.12.1)\nAvailable versions: 0.12.1, 0.12.0\n", "0.12.1"), (1, "", "unknown")],
)
def test_the_newest_version_is_the_indexs_or_unknown(monkeypatch, code, output, newest):
    done = subprocess.CompletedProcess([], code, output, "")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
    rows = _dependencies.table("nowhere", has_newest=True)
    assert {row["newest"] for row in rows} == {newest}
