"""libtpu on a machine without a TPU: what keeps it quiet. Imports nothing heavy.

`plan` needs libtpu for its compiler. Once it is installed, jax tries it in every other command too:
it gives up at once, but with five lines about the cloud it is not in (libtpu 0.0.52; 0.2 s either
way).
"""

import importlib.util
import os
import pathlib

# Read when libtpu is loaded.
ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process dies at the first's lock file
    "TPU_SKIP_MDS_QUERY": "1",  # the cloud's metadata server
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def set_environment() -> None:
    """Sets `ENVIRONMENT` where libtpu is installed and nothing shows a TPU."""
    if importlib.util.find_spec("libtpu") is None:
        return
    if not has_device_files() and not any(name.startswith("TPU_") for name in os.environ):
        os.environ.update(ENVIRONMENT)


def has_device_files() -> bool:
    """Whether the system shows a TPU; others behind vfio are taken for one."""
    dev = pathlib.Path("/dev")
    return any(True for pattern in ("accel*", "vfio/[0-9]*") for _ in dev.glob(pattern))
