"""Memory that is kept between steps: no page is fetched twice, and the user's own choice stands."""

import platform
import subprocess
import sys

import pytest

from dalle_jax.cli import _malloc

PROGRAM = """
import resource, sys, threading
import numpy as np
from dalle_jax.cli import _malloc

done = "keep" in sys.argv and _malloc.keep_freed_memory()
faults = []

def touch():
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(100 * 2**20, np.uint8)  # 25,600 pages
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

for run in (touch, lambda: (t := threading.Thread(target=touch), t.start(), t.join())):
    run()
print(done, *faults)
"""


def run(*words):
    # Not the environment of the suite, which may have large pages.
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        env={"JAX_PLATFORMS": "cpu", "NUMPY_MADVISE_HUGEPAGE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    said, *faults = done.stdout.split()
    return said == "True", [int(n) for n in faults]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept_in_every_thread():
    kept, (first, *again) = run("keep")
    assert kept and first > 10_000
    assert max(again) < 1000
    _, without = run()
    assert min(without) > 10_000  # what it is for


def test_the_users_choice_stands(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name, value in (
        ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=1000000"),
        ("MALLOC_ARENA_MAX", "2"),
    ):
        with monkeypatch.context() as m:
            m.setenv(name, value)
            assert not _malloc.keep_freed_memory()


def test_accelerators_keep_their_hosts_malloc(monkeypatch):
    for platforms in ("cuda,cpu", "tpu"):
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        assert not _malloc.keep_freed_memory()
