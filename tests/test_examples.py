"""The notebook runs from its first cell to its last, in an empty folder."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def test_the_notebook_runs(tmp_path, compile_flags):
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert len(cells) > 5 and "dalle_jax.load(" in cells[0]
    script = tmp_path / "notebook.py"
    # Few candidates and steps: the test is of the calls, not of the pictures.
    source = "\n\n".join(cells).replace("candidates=16", "candidates=4").replace('"10"', '"2"')
    script.write_text(source + '\n\nassert 0 < best.score < 1 and "best" in dir()\n')
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": compile_flags}
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", str(script)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "best.png").stat().st_size > 500
