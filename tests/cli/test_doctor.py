"""doctor fails where a run would be silently slow, and only there."""

import json

import pytest

from dalle_jax import __main__
from dalle_jax.cli import doctor


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
    monkeypatch.setattr(doctor, "_seen_hardware", lambda: "gpu")
    monkeypatch.setenv("JAX_PLATFORMS", "")
    assert __main__.main(["doctor", "--no_bench"]) == 1
    assert "[FAIL] backend: this machine has a gpu" in capsys.readouterr().out


def test_json_report_with_rates(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_seen_hardware", lambda: None)
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
