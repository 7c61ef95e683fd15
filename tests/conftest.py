"""What every test runs under: eight faked CPU devices, no silent broadcasting, a warm compiler."""

import hashlib
import importlib.metadata
import os
import pathlib
import platform
import sys

# Before jax is imported: the device count is read once.
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the suite's processor time is compilation. LLVM's optimiser wins nothing on tiny programs,
# and the fusion emitters take half of what is left (a sharded DALL-E step: 23 against 11 CPU
# seconds); jaxlib 0.12 has no flag for them. The same in every process that a test starts
# (`compile_flags`), so that bits compare.
COMPILE_FLAGS = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    COMPILE_FLAGS += " --xla_cpu_use_fusion_emitters=false"
DEVICES = "--xla_force_host_platform_device_count=8"
for flags in (COMPILE_FLAGS, DEVICES):
    if flags not in os.environ.get("XLA_FLAGS", ""):  # the workers of pytest -n inherit them
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # for weights.py


def _processor() -> str:
    """Tells processors apart: compiled CPU code of one must not be loaded on another."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    text = f"{jax.__version__} {platform.machine()} {features}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


jax.config.update("jax_numpy_rank_promotion", "raise")
# Equal programs compile once per checkout, not once per test.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / f"xla-{_processor()}"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture
def same_environment():
    """Takes back what the test sets in os.environ."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def rng() -> np.random.Generator:
    """Seeded: a test that fails, fails again."""
    return np.random.default_rng(0)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def workdir(tmp_path) -> pathlib.Path:
    """The path of a run that does not exist yet."""
    return tmp_path / "run"


@pytest.fixture(scope="session")
def compile_flags() -> str:
    """XLA_FLAGS for a process that compiles like this one but has one device."""
    return COMPILE_FLAGS


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
    """The repository."""
    return ROOT
