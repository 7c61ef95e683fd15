"""The ledger of plans: what is missing is compiled once, quick plans are replaced by full ones."""

import json
import pathlib

import pytest

from dalle_jax import config as cfg
from dalle_jax.planning import plan, shipped, topology
from dalle_jax.types import UsageError

ROOT = pathlib.Path(__file__).parents[2]
CASES = {"configs/a.py": ("cpu:1", "cpu:2"), "configs/b.py": ("cpu:1",)}

# What a command sets for its own process does not outlive a test.
pytestmark = pytest.mark.usefixtures("same_environment")


class Compiler:
    """A compiler for all topologies but cpu:2, until it is installed."""

    def __init__(self):
        self.compiled, self.is_installed = [], False

    def __call__(self, config, name, is_quick):
        if name == "cpu:2" and not self.is_installed:
            raise UsageError("no compiler here")
        self.compiled.append((config, name))
        return {"config": config, "compile_s": 1.0, "is_quick": is_quick}


def test_an_interrupted_update_continues(tmp_path, capsys):
    file, compiler = str(tmp_path / "plans.json"), Compiler()

    def update(**options):
        compiler.compiled.clear()
        return list(shipped.update(file, CASES, compile_case=compiler, **options))[-1]

    next(shipped.update(file, CASES, is_quick=True, compile_case=compiler))  # interrupted
    assert list(json.loads(pathlib.Path(file).read_text())) == ["configs/a.py cpu:1"]
    records = update(is_quick=True)
    assert compiler.compiled == [("configs/b.py", "cpu:1")]
    assert "configs/a.py on cpu:2: no compiler here" in capsys.readouterr().err
    assert shipped.missing(records, CASES, is_quick=True) == [("configs/a.py", "cpu:2")]
    update(is_quick=True)
    assert not compiler.compiled
    compiler.is_installed = True
    assert len(update()) == 3 and len(compiler.compiled) == 3  # quick ones are replaced
    assert update() == json.loads(pathlib.Path(file).read_text()) and not compiler.compiled


def test_the_ledger_has_every_config_on_five_topologies(monkeypatch):
    monkeypatch.chdir(ROOT)
    known = topology.known()
    # No training run by themselves: the defaults, and the networks of `bench`.
    files = {path.name for path in (ROOT / "configs").glob("*.py")} - {"base.py", "bench.py"}
    assert {config.split("/")[1].split(":")[0] for config in shipped.CASES} == files
    for config, names in shipped.CASES.items():
        assert len(set(names)) >= 5 and set(names) <= set(known)
        assert cfg.load(config).task


def test_records_are_rounded_at_any_depth():
    assert plan.rounded({"a": [1.23456789, {"b": (2,)}]}) == {"a": [1.23457, {"b": [2]}]}
