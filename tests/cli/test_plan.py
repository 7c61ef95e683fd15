"""The plan command: tables, JSON, exit codes, the sampling budget, the page of all configs."""

import json
import os
import pathlib

import pytest

from dalle_jax import __main__
from dalle_jax import config as cfg
from dalle_jax.pages import ledger
from dalle_jax.planning import shipped, topology

ROOT = pathlib.Path(__file__).parents[2]
TINY = [
    "--config=configs/dalle.py:size=smoke", "--config.model.width=16",
    "--config.model.num_layers=1", "--config.stages.from_codes=true", "--config.data.batch=2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    """In the checkout, and with the environment restored afterwards."""
    monkeypatch.chdir(ROOT)
    saved = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(saved)


def plan(*args) -> int:
    return __main__.main(["plan", *args])


def test_json_has_what_the_documents_promise(capsys):
    assert plan(*TINY, "--topology=cpu:1", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["fits"] is True and record["peak_gib"] < record["capacity_gib"]
    promised = (
        "params", "state_gib", "model_tflop_per_sample", "hardware_tflop_per_sample",
        "estimated_s_per_sample", "floor_s_per_sample", "collectives",
    )  # fmt: skip
    assert all(name in record for name in promised)
    assert record["config"] == "configs/dalle.py:size=smoke" and record["batch"] == 2
    assert record["hardware_tflop_per_sample"] >= record["model_tflop_per_sample"] > 0


def test_a_quick_plan_is_marked(capsys):
    assert plan(*TINY, "--topology=cpu:1", "--quick") == 0
    assert "note: --quick: times are the floor" in capsys.readouterr().out


def test_what_does_not_fit_says_by_how_much_and_what_would(capsys, monkeypatch):
    get = topology.get

    def small(name):
        found = get(name)
        return topology.Topology(name, found.devices, None, 10_000)

    monkeypatch.setattr(topology, "get", small)
    assert plan(*TINY, "--topology=cpu:2", "--mesh=2,1,1") == 1
    out = capsys.readouterr().out
    assert "DOES NOT FIT: needs" in out and "more than" in out
    assert plan(*TINY, "--topology=cpu:2", "--mesh=2,1,1", "--json", "--no_nearest") == 1
    record = json.loads(capsys.readouterr().out)
    assert record["shortfall_gib"] > 0 and record["nearest"] is None


def test_attentions_are_compared(capsys):
    args = [*TINY, "--topology=cpu:1", "--attention", "dense", "structured"]
    assert plan(*args, "--json") == 0
    records = json.loads(capsys.readouterr().out)
    assert [r["attention"] for r in records] == ["dense", "structured"]
    work = [r["hardware_tflop_per_sample"] for r in records]
    assert work[0] > work[1]
    assert plan(*args) == 0
    out = capsys.readouterr().out
    assert "size=smoke, dense attention on cpu:1" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("cpu:1 ")]
    assert [row[1] for row in rows] == ["dense", "structured"]


def test_search_prints_what_nothing_beats(capsys):
    args = [*TINY, "--topology=cpu:1", "--search", "--batch", "2", "4", "--mesh=1,1,1"]
    assert plan(*args, "--remat=none", "--json") == 0
    captured = capsys.readouterr()
    best = json.loads(captured.out)
    assert best and all(record["fits"] for record in best)
    assert {"mesh.fsdp", "data.batch", "model.remat"} <= best[0]["changes"].keys()
    assert captured.err.count("batch") == 2


def test_sampling_weighs_weights_and_caches(capsys):
    args = [*TINY, "--config.dtype.compute=bfloat16", "--topology=cpu:1", "--sample"]
    assert plan(*args) == 0
    out = capsys.readouterr().out
    assert "candidates that fit" in out and "with guidance" in out
    assert plan(*args, "--json") == 0
    without, guided = json.loads(capsys.readouterr().out)
    assert without["candidates"] > guided["candidates"] > 0
    assert without["tokens"] == 64


def test_the_12b_model_draws_on_a_v5p_and_on_no_v5e():
    """12.3 B weights of 4 bytes, and the blocks' matrices once more in bfloat16."""
    from dalle_jax.models import build
    from dalle_jax.planning import sampling_memory

    config = cfg.load("configs/dalle_12b.py")
    found = sampling_memory.budget(build.dalle(config, 32, 8192))
    assert found.weights == 4 * 12_292_808_448
    assert found.working == 2 * 64 * 12 * 3968**2
    assert found.candidates(16 * 2**30) == 0 < found.candidates(95 * 2**30)
    # Row layers keep 33 of 1024 slots: 47 row, 16 column and 1 conv layer.
    slots = 47 * 33 + 16 * 1024 + 166
    assert found.per_candidate == slots * 2 * 3968 * 2 + 4 * 8192 + 4 * 1024


@pytest.mark.parametrize(
    "args, text",
    [
        (TINY, "needs a config and a topology"),
        (["--topology=cpu:1"], "needs a config and a topology"),
        ([*TINY, "--topology=v5e-256"], "did you mean v5e:16x16?"),
        ([*TINY, "--topology=cpu:8", "--mesh=3,1,1"], "3 x 1 x 1 = 3, but there are 8 devices"),
        ([*TINY, "--topology=cpu:8"], "data.batch=2 is not a multiple of 8"),
        ([*TINY, "--topology=cpu:1", "--batch", "2", "4"], "--batch need --search"),
        ([*TINY, "--topology=cpu:1", "--attention=dance"], "'dance' is unknown"),
        ([*TINY, "--topology=cpu:1", "--search", "--attention=dense"], "attention_impl=NAME"),
        ([*TINY, "--topology=cpu:1", "--config.task=gan"], "task 'gan' is unknown"),
        ([*TINY, "--topology=cpu:1", "--remat=some"], "'some' is unknown"),
        (["--config=configs/clip.py", "--topology=cpu:1", "--sample"], "a config of task 'clip'"),
        (
            [*TINY, "--topology=cpu:1", "--config.stages.dvae_config=configs/clip.py"],
            "expected one of a codec",
        ),
    ],
)
def test_bad_input_is_exit_code_2_with_the_cure(args, text, capsys):
    assert plan(*args) == 2
    err = capsys.readouterr().err
    assert text in err and "Traceback" not in err


def test_the_page_is_written_from_its_ledger(tmp_path, monkeypatch, capsys):
    small = tmp_path / "small.py"
    small.write_text(
        "from dalle_jax import config as cfg\n"
        "def get_config(arg=None):\n"
        f"    config = cfg.load('{ROOT}/configs/dalle.py:size=smoke')\n"
        "    changes = {'model.width': 16, 'model.num_layers': 1, 'data.batch': 2}\n"
        "    return cfg.override(config, changes | {'stages.from_codes': True})\n"
    )
    monkeypatch.setattr(shipped, "CASES", {str(small): ("cpu:1", "h100:1x1")})
    page = tmp_path / "plans.md"
    assert plan("--docs", str(page), "--quick") == 1  # no compiler for NVIDIA GPUs here
    assert "h100:1x1: topology 'h100:1x1' needs the compiler" in capsys.readouterr().err
    text = page.read_text()
    assert text.count(" (quick) |") == 1 and "| h100:1x1 | not compiled yet |" in text
    assert list(json.loads((tmp_path / "plans.json").read_text())) == [f"{small} cpu:1"]


def test_the_page_in_docs_is_the_one_of_its_ledger():
    records = json.loads((ROOT / "docs" / "plans.json").read_text())
    assert ledger.page(records, shipped.CASES) == (ROOT / "docs" / "plans.md").read_text()


# Needs the `plan` extra (libtpu, 484 MB), which the test extra leaves out; half a minute each.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:2x2", "v6e:2x2", "v4:2x2x1", "v5p:2x2x1", "2*v5e:2x2"])
def test_a_tpu_slice_that_is_not_there(name, capsys):
    """The smoke DALL-E: time by the compiler, gradients over the data axis and nothing else."""
    assert plan("--config=configs/dalle.py:size=smoke", f"--topology={name}", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["estimated_s_per_sample"] > record["floor_s_per_sample"] > 0
    assert 0 < record["mfu_bound"] < 1
    assert {row["axis"] for row in record["collectives"]} == {"data"}
    args = ("--config=configs/dalle.py:size=smoke", f"--topology={name}", "--json", "--quick")
    assert plan(*args) == 0
    quick = json.loads(capsys.readouterr().out)
    assert quick["collectives"] == record["collectives"]
    assert 0.5 * record["peak_gib"] < quick["peak_gib"] < record["peak_gib"]  # code: 5 MiB
