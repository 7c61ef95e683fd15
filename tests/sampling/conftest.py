"""Makes `tiny_stages` importable: pytest's importlib mode adds no folders to the path."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
