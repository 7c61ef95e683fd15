"""Makes `linear_task` importable, and compiles its programs once per checkout."""

import pathlib
import sys

import jax

# pytest's importlib mode adds no folders to the path.
sys.path.insert(0, str(pathlib.Path(__file__).parent))

# The linear task compiles in under the suite's threshold, some fifty times.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
