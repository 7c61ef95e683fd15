"""Names of machines: which there are, what is said about those that are not."""

import os
import sys

import jax
import pytest

from dalle_jax import config as cfg
from dalle_jax.engine import chips, meshes
from dalle_jax.planning import libtpu_env, topology
from dalle_jax.types import UsageError

# What a command sets for its own process does not outlive a test.
pytestmark = pytest.mark.usefixtures("same_environment")


@pytest.mark.parametrize(
    "name, text",
    [
        ("v5e-256", "did you mean v5e:16x16?"),
        ("v5litepod-16", "did you mean v5e:4x4?"),
        ("v4-256", "did you mean v4:4x4x8?"),
        ("v5f:16x16", "did you mean v5e:16x16"),
        ("h1oo:16x8", "did you mean h100:16x8"),
        ("tpu", "2*v5e:16x16, h100:16x8, cpu:8"),
        ("v5e:4x4x4", "not of the form v5e:AxB"),
        ("v4:4x4", "not of the form v4:AxBxC"),
        ("h100:8", "not of the form h100:HOSTSxGPUS"),
        ("cpu:2x4", "not of the form cpu:DEVICES"),
        ("0*v5e:4x4", "not of the form"),
        ("v5e:0x4", "not of the form"),
    ],
)
def test_unknown_names_are_refused_with_near_ones(name, text):
    with pytest.raises(UsageError) as error:
        topology.prepare(name)
    assert text in str(error.value) and repr(name) in str(error.value)


def test_every_offered_name_has_a_form_and_a_chip():
    for name in topology.known():
        topology.prepare(name)
    kinds = {**topology._TPUS, **topology._GPUS}
    assert all(kind in chips.CHIPS for kind, _ in kinds.values())


def test_several_slices_of_gpus_are_refused():
    with pytest.raises(UsageError, match="only TPUs have slices"):
        topology.get("2*h100:2x8")


def test_the_cpu_of_this_machine():
    found = topology.get("cpu:8")
    assert found.devices == tuple(jax.devices()) and found.chip is None
    assert 0 < topology.get("cpu:8").capacity < topology.get("cpu:1").capacity
    assert len(topology.get("cpu:3").devices) == 3
    with pytest.raises(UsageError, match="xla_force_host_platform_device_count=999"):
        topology.get("cpu:999")


def test_faked_devices_are_asked_for_unless_they_are_already():
    os.environ["XLA_FLAGS"] = "--a=b"
    topology.prepare("cpu:6")
    assert os.environ["XLA_FLAGS"] == "--a=b --xla_force_host_platform_device_count=6"
    topology.prepare("cpu:4")
    assert os.environ["XLA_FLAGS"].endswith("=6")


def test_a_missing_compiler_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(UsageError, match=r"pip install 'dalle_jax\[plan\]'"):
        topology.get("v5e:2x2")


def test_libtpu_is_kept_quiet_only_where_it_is_and_no_tpu_is(monkeypatch):
    for name in [name for name in os.environ if name.startswith("TPU_")]:
        del os.environ[name]
    monkeypatch.setattr(libtpu_env.importlib.util, "find_spec", lambda name: None)
    libtpu_env.set_environment()
    assert "TPU_MIN_LOG_LEVEL" not in os.environ
    monkeypatch.setattr(libtpu_env.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(libtpu_env.pathlib.Path, "glob", lambda self, pattern: iter(["accel0"]))
    libtpu_env.set_environment()
    assert "TPU_MIN_LOG_LEVEL" not in os.environ
    monkeypatch.setattr(libtpu_env.pathlib.Path, "glob", lambda self, pattern: iter([]))
    libtpu_env.set_environment()
    assert os.environ["TPU_MIN_LOG_LEVEL"] == "3"


# Needs the `plan` extra, a package of 484 MB that the test extra leaves out.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, devices, kind",
    [
        ("v5e:4x4", 16, "TPU v5e"),
        ("v6e:2x2", 4, "TPU v6e"),
        ("v5p:2x2x2", 8, "TPU v5p"),
        ("v4:2x2x2", 8, "TPU v4"),
        ("2*v5e:2x2", 8, "TPU v5e"),
    ],
)
def test_tpu_slices_are_there_with_the_extra(name, devices, kind):
    topology.prepare(name)
    found = topology.get(name)
    assert (len(found.devices), found.chip.name) == (devices, kind)
    assert chips.CHIPS[found.devices[0].device_kind] == found.chip
    assert 0.9 * found.chip.hbm_bytes < found.capacity <= 1.01 * found.chip.hbm_bytes
    assert len({getattr(d, "slice_index", 0) for d in found.devices}) == found.slices


@pytest.mark.slow
def test_only_the_data_axis_crosses_slices():
    topology.prepare("2*v5e:2x2")
    devices = topology.get("2*v5e:2x2").devices
    mesh = meshes.make_mesh(cfg.ConfigDict(dict(data=-1, fsdp=4, tensor=1)), devices)
    assert [{d.slice_index for d in part.flat} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(UsageError, match="data=1 over 2 TPU slices"):
        meshes.make_mesh(cfg.ConfigDict(dict(data=1, fsdp=8, tensor=1)), devices)


@pytest.mark.slow
def test_a_slice_that_does_not_exist_is_refused():
    topology.prepare("v5e:16x17")
    with pytest.raises(UsageError, match="no topology 'v5e:16x17'.*8x16, 16x16"):
        topology.get("v5e:16x17")
