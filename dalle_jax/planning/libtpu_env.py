"""Environment variables that keep libtpu quiet on a machine without a TPU. Imports nothing heavy.

`plan` needs libtpu for its compiler. Once it is installed, jax loads it in every other command too:
it gives up at once, but prints five lines about a missing cloud (libtpu 0.0.52; 0.2 s in both
cases).
"""

import importlib.util
import os
import pathlib

# libtpu reads them when it is loaded.
ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process dies at the first's lock file
    "TPU_SKIP_MDS_QUERY": "1",  # the cloud's metadata server
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def set_environment() -> None:
    """Sets `ENVIRONMENT` if libtpu is installed and there is no sign of a TPU."""
    if importlib.util.find_spec("libtpu") is None:
        return
    if not has_device_files() and not any(name.startswith("TPU_") for name in os.environ):
        os.environ.update(ENVIRONMENT)


def has_device_files() -> bool:
    """Whether the system has a TPU; other devices behind vfio count as one."""
    dev = pathlib.Path("/dev")
    return any(True for pattern in ("accel*", "vfio/[0-9]*") for _ in dev.glob(pattern))
